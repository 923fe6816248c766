import pytest
import torch
from pretrain import build_tokenizer

from files import write_json
from haystack import read_pool
from modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from modeling_siglip import SiglipVisionConfig

torch.set_num_threads(1)  # tests run in two processes, whose threads would slow each other down


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model folder with a real tokenizer and random weights: 16 image tokens, two layers, steps take milliseconds."""
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = build_tokenizer([p.caption for p in read_pool()] + ["answer en where is ?\n", "1, 2, 3, 4, -1"])
    image = tokenizer.token_to_id("<image>")
    text = GemmaConfig(
        vocab_size=image + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=16,
    )
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    PaliGemmaForConditionalGeneration(PaliGemmaConfig(text, vision, image)).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "preprocessor_config.json", {"size": {"height": 32, "width": 32}})
    return folder
