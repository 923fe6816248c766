"""Tiny random Phi-3 models: decoders, ours and transformers', and folders of Phi-3-vision with a tokenizer."""

from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from files import write_json
from haystack import read_pool
from modeling_clip import ClipVisionConfig
from modeling_phi3 import Phi3Config, Phi3ForCausalLM, Phi3TextConfig, Phi3VForCausalLM

HEADS, HEAD_DIM = 4, 16
ORIGINAL = 24  # positions up to which the short factors apply
SPECIAL = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|image|>")
RSTRIP = ("</s>", "<|assistant|>", "<|image|>")  # they strip whitespace to their right


def longrope(dims: int = HEAD_DIM, kind: str = "longrope") -> dict:
    count = dims // 2
    return {
        "rope_type": kind,
        "short_factor": [1 + 0.05 * i for i in range(count)],
        "long_factor": [1.2 + 1.5 * i for i in range(count)],
    }


VARIANTS = {
    "default rotary": {},
    "longrope": dict(rope_scaling=longrope(), max_position_embeddings=512, original_max_position_embeddings=ORIGINAL),
    "grouped queries": dict(num_key_value_heads=2),
    "partial rotary": dict(
        num_key_value_heads=2,
        partial_rotary_factor=0.75,
        rope_scaling=longrope(12),
        max_position_embeddings=512,
        original_max_position_embeddings=ORIGINAL,
    ),
    "tied heads": dict(tie_word_embeddings=True),
    "window": dict(sliding_window=5),
}


def hf_decoder(variant: str = "longrope", seed: int = 0, amplify: float = 3.0, **changes):
    """transformers' Phi3ForCausalLM, its weights amplified so that masks and angles show."""
    fields = dict(vocab_size=96, hidden_size=HEADS * HEAD_DIM, intermediate_size=80, num_hidden_layers=3)
    fields |= dict(num_attention_heads=HEADS, pad_token_id=0, eos_token_id=[2], max_position_embeddings=512)
    torch.manual_seed(seed)
    config = transformers.Phi3Config(**fields | VARIANTS[variant] | changes)
    config._attn_implementation = "eager"
    model = transformers.Phi3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.mul_(amplify)
    return model


def ours_like(hf) -> Phi3ForCausalLM:
    """Our decoder with the weights of transformers', loaded with the key maps."""
    from checkpoint import rename_key

    model = Phi3ForCausalLM(Phi3Config.from_dict(hf.config.to_dict()))
    model.load_state_dict({rename_key(key): tensor for key, tensor in hf.state_dict().items()}, strict=True)
    return model.eval()


def pair(variant: str = "longrope", **kwargs):
    hf = hf_decoder(variant, **kwargs)
    return hf, ours_like(hf)


def ids_and_mask(lengths: tuple[int, ...], seed: int = 0) -> dict:
    """Random prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, 96, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def tokenizer() -> Tokenizer:
    """A tokenizer in the form of Phi-3's: words of the image pool, `<s>` in front, U+2581 for blanks."""
    words = {word for image in read_pool() for word in image.caption.split()}
    words |= {"where", "is", "there", "a", "an", "the", "What", "Is", "yes", "no", "No", "in", "this", "image", "shown"}
    letters = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,.;:?!'-\n()\"&/é▁"})
    pieces = [*letters, *sorted("▁" + word for word in words if len(word) > 1), *(f"▁{n}" for n in range(10))]
    vocabulary = [*SPECIAL, *dict.fromkeys(pieces)]
    made = Tokenizer(models.Unigram([(piece, -float(i > 60) * 5 - 1) for i, piece in enumerate(vocabulary)], unk_id=0))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(t, rstrip=t in RSTRIP, normalized=False, special=True) for t in SPECIAL])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def folder(path: Path, num_crops: int = 4, vision: bool = True, **text) -> Path:
    """A model folder of Phi-3-vision: random weights, crops of 16 px with 4 image tokens; steps take milliseconds."""
    words = tokenizer()
    text_config = Phi3TextConfig(
        **dict(
            vocab_size=words.get_vocab_size(),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            original_max_position_embeddings=64,
            short_factor=tuple(longrope()["short_factor"]),
            long_factor=tuple(longrope()["long_factor"]),
        )
        | text
    )
    tower = ClipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = Phi3Config(
        text_config,
        tower if vision else None,
        "phi3_v" if vision else "phi3",
        image_token_id=words.token_to_id("<|image|>"),
        pad_token_id=words.token_to_id("<|endoftext|>"),
        stop_ids=(words.token_to_id("<|end|>"), words.token_to_id("<|endoftext|>")),
    )
    torch.manual_seed(0)
    model = (Phi3VForCausalLM if vision else Phi3ForCausalLM)(config)
    if vision:
        for parameter in (model.model.multi_modal_projector.glb_GN, model.model.multi_modal_projector.sub_GN):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    words.save(str(path / "tokenizer.json"))
    if vision:
        write_json(path / "preprocessor_config.json", {"num_crops": num_crops})
    return path
