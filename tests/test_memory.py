"""The memory of a training step as counted by benchmarks/memory.py equals what autograd saves on real tensors."""

import importlib.util
import sys
from pathlib import Path

import pretend_cuda
import pytest
import torch
from torch import Tensor

import fused_ops
from modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from modeling_siglip import SiglipVisionConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def memory():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "benchmarks"))
    return module


def small_model(memory, preset: str | None, device: str) -> torch.nn.Module:
    """Three decoder layers shaped like Gemma 2B's, an eighth as wide."""
    text = GemmaConfig(hidden_size=256, intermediate_size=2048, num_hidden_layers=3, head_dim=32, vocab_size=512)
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=511)
    with torch.device(device):
        model = PaliGemmaForConditionalGeneration(config, preset).to(torch.bfloat16)
    memory.with_lora(model.requires_grad_(False))
    return model


def saved_bytes(model, batch: dict[str, Tensor]) -> int:
    """Bytes of what the second layer saves for the backward pass: every storage once, weights and masks left out."""
    kept = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, counts = {}, [False]

    def pack(t: Tensor) -> Tensor:
        if counts[0] and t.untyped_storage().data_ptr() not in kept:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layer = model.model.language_model.layers[1]
    layer.register_forward_pre_hook(lambda _, args: counts.__setitem__(0, True))
    layer.register_forward_hook(lambda *_: counts.__setitem__(0, False))
    plan = model.model.plan(**batch)
    features = torch.zeros(len(batch["input_ids"]), model.config.vision_config.num_patches, 256, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), fused_ops.cast_lora(fused_ops.lora_layers(model)):
        for module in model.modules():  # cast factors are made once for all layers
            for t in getattr(module, fused_ops.CAST_FACTORS, ()):
                kept.add(t.untyped_storage().data_ptr())
        loss = model(**batch, image_features=features, plan=plan).loss
    loss.backward()
    return sum(saved.values())


@pytest.mark.parametrize("preset", [pytest.param(None, marks=pytest.mark.slow), "split"])
def test_the_count_is_what_autograd_saves(preset, memory, monkeypatch):
    """For one layer on the paths of a GPU, within 3 %, on the meta device and on the CPU."""
    pretend_cuda.force(monkeypatch)
    batch = memory.make_batch(small_model(memory, None, "meta").config, rows=2)
    with pretend_cuda.Counts():  # RMSNorm is one kernel, as on CUDA
        expected = saved_bytes(small_model(memory, preset, "cpu"), batch)
    found, _ = memory.count_step(small_model(memory, preset, "meta"), batch)
    print(f"{preset}: counted {found:,}, saved {expected:,}")
    assert found == pytest.approx(expected, rel=0.03)


def test_memory_is_released_when_tensors_are(memory):
    with memory.LiveMemory() as live:
        x = torch.ones(1000, device="meta")
        y = x + 1
        assert live.now == 8000
        del y
        z = x.view(10, 100)
        assert live.now == 4000 and live.most == 8000
        del x
        assert live.now == 4000
        del z
    assert live.now == 0
