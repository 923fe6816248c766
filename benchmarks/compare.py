"""Ours against transformers + peft, and differential against standard attention: same weights, same work, one process.

    python benchmarks/compare.py                 # CPU, one thread
    python benchmarks/compare.py --compiled=True # also both sides under torch.compile, which takes minutes to warm up
    python benchmarks/compare.py --device=cuda   # PaliGemma 3b with random weights, bf16

Every ratio is the median over rounds of the ratio within a round, quartiles beside it; all variants of a row take turns
in one process, the first round is not counted. On a CPU seconds are process time of one thread. Losses (1e-5 in
float32) and greedy tokens are compared before anything is timed. The two baselines:

    HF-default  what people run: logits of every row, the vision tower at every step, peft's float32 adapters
    HF-tuned    what an expert runs: logits of label rows, vision features kept, adapters in the model's dtype
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention import PrefixMask  # noqa: E402
from differential_attention import (  # noqa: E402
    DifferentialAttention,
    DifferentialConfig,
    add_differential,
    unfreeze_differential,
)
from modeling_gemma import (  # noqa: E402
    GemmaConfig,
    GemmaDecoderLayer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    rotary_tables,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Config:
    device: Literal["cpu", "cuda"] = "cpu"
    size: Literal["full", "tiny"] = "full"  # tiny: does the code run?
    rounds: int = 5  # timed, after one that is not
    compiled: bool = False  # time both sides under torch.compile as well
    only: str = ""  # rows whose name holds this
    peak_tflops: float = 989.0  # of the card, dense bf16: an H100's
    bandwidth_tb: float = 3.35  # of the card, TB/s: an H100's
    output: str = ""  # empty: benchmarks/results/compare_{device}.json
    child: str = ""  # internal: what this process measures alone


# ---- models and batches
def hf_config(vocabulary: int, hidden: int, layers: int, mlp: int, heads: int, width: int, vision: dict):
    import transformers

    text = transformers.GemmaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp,
        num_attention_heads=heads, num_key_value_heads=1, head_dim=width,
    )  # fmt: skip
    return transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(patch_size=14, vision_use_head=False, **vision),
        image_token_index=vocabulary - 1,
        projection_dim=hidden,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip


def vision_config(hidden, layers, mlp, heads, image_size=224):
    return dict(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=mlp, num_attention_heads=heads,
        image_size=image_size,
    )  # fmt: skip


def mid_size(config: Config, vocabulary: int = 257216):
    """185 M parameters at 257,216 tokens; for the smoke test a toy of the same shape."""
    if config.size == "tiny":
        return hf_config(512, 32, 2, 64, 4, 8, vision_config(24, 2, 32, 2, image_size=28))
    return hf_config(vocabulary, 512, 6, 4096, 8, 64, vision_config(384, 6, 1536, 6))


def paligemma_3b(config: Config, image_size: int = 224):
    if config.size == "tiny":
        return mid_size(config)
    return hf_config(257216, 2048, 18, 16384, 8, 256, vision_config(1152, 27, 4304, 16, image_size))


def hf_model(hf, dtype, device="cpu", weights=None):
    """A transformers PaliGemma, random or on the very tensors `weights`."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(hf, dtype=dtype)
    if weights is not None:
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    return model.eval().requires_grad_(False)


def our_model(hf, weights, differential=None):
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(hf.to_dict()))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if differential is not None:
        add_differential(model, differential)
    return model.eval().requires_grad_(False)


def with_lora(model, own_dtype: bool = False):
    """peft's LoRA of rank 8 in the language model, none of its factors zero, the same for every model."""
    from peft import LoraConfig, get_peft_model

    targets = rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(LINEARS)})"
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
    adapted = get_peft_model(model, lora, autocast_adapter_dtype=not own_dtype)
    draw_lora(adapted)
    unfreeze_differential(adapted)
    return adapted.train()


def draw_lora(adapted):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))


def make_batch(hf, dtype, rows: int, prompt: int, labelled: int, device="cpu") -> dict:
    generator = torch.Generator().manual_seed(2)
    size, vocabulary = hf.vision_config.image_size, hf.text_config.vocab_size
    image = torch.full((rows, (size // 14) ** 2), vocabulary - 1)
    words = torch.randint(3, vocabulary - 1, (rows, prompt + labelled), generator=generator)
    ids = torch.cat((image, words), dim=1)
    types = torch.zeros_like(ids)
    types[:, ids.shape[1] - labelled :] = 1
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types)
    batch["labels"] = ids.masked_fill(types == 0, -100)
    batch["pixel_values"] = (torch.rand(rows, 3, size, size, generator=generator) * 2 - 1).to(dtype)
    return {key: tensor.to(device) for key, tensor in batch.items()}


# ---- the work of one training step
def default_loss(adapted, batch):
    return adapted(**batch).loss


def tuned_loss(adapted, batch, features):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    labelled = (batch["labels"][0] != -100).nonzero().squeeze(1)  # the same columns in every row
    told = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    seen = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    logits = adapted(**told, mm_encoder_outputs=seen, logits_to_keep=labelled - 1).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, labelled].flatten())


def our_loss(adapted, batch, features):
    told = {key: value for key, value in batch.items() if key != "pixel_values"}
    dtype = features.dtype  # as training.py runs: float32 masters, autocast where the base is bf16
    with torch.autocast(features.device.type, dtype, enabled=dtype == torch.bfloat16):
        return adapted(**told, pixel_values=None, image_features=features).loss


def training_variants(hf, dtype, batch, device="cpu", which=("HF-default", "HF-tuned", "ours", "split")) -> dict:
    """Name -> (loss function, its parameters' optimizer). All share the frozen weights."""
    source = hf_model(hf, dtype, device)
    weights = source.state_dict()
    features = our_model(hf, weights).model.image_features(batch["pixel_values"])
    made = {}
    for name in which:
        kind = name.removesuffix(", compiled")
        if kind.startswith("HF"):
            adapted = with_lora(hf_model(hf, dtype, device, weights), own_dtype=kind == "HF-tuned")
        else:
            adapted = with_lora(our_model(hf, weights, "split" if kind == "split" else None))
        if kind == "HF-default":
            loss = lambda adapted=adapted: default_loss(adapted, batch)  # noqa: E731
        else:
            of = tuned_loss if kind == "HF-tuned" else our_loss
            loss = lambda adapted=adapted, of=of: of(adapted, batch, features)  # noqa: E731
        if name != kind:
            for layer in adapted.base_model.model.model.language_model.layers:
                layer.compile()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        made[name] = loss, torch.optim.AdamW(trained, lr=1e-5, fused=True)
    return made


def step(loss, optimizer):
    optimizer.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    optimizer.step()
    return value.item()


# ---- measuring
def seconds(work: Callable, device="cpu") -> float:
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(variants: dict[str, Callable], rounds: int, device="cpu") -> dict[str, list[float]]:
    """Seconds of every variant, turn by turn, the first round dropped."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, work in variants.items():
            times[name].append(seconds(work, device))
    return {name: spent[1:] for name, spent in times.items()}


def ratio(first: list[float], second: list[float]) -> dict:
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


# ---- rows of the table
LAYER_VARIANTS = {"standard": None, "split": "split", "v1_width": "v1_width"}


def layer_variants(config: Config, dtype, length: int) -> dict[str, Callable]:
    """Forward + backward of one decoder layer of Gemma 2B's size, LoRA on all seven linears, 48 causal rows."""
    from peft import LoraConfig, get_peft_model

    text = GemmaConfig() if config.size == "full" else GemmaConfig(hidden_size=32, intermediate_size=64, head_dim=8)
    prefix = length - 48
    ids = torch.ones(1, length, dtype=torch.long)
    mask = PrefixMask.from_tensors(ids, (torch.arange(length) >= prefix).long()[None])
    rotary = rotary_tables(text, torch.arange(1, length + 1)[None], dtype)
    torch.manual_seed(0)
    made, weights = {}, None
    for name, preset in LAYER_VARIANTS.items():
        layer = GemmaDecoderLayer(text, 0).to(dtype).requires_grad_(False)
        if weights is None:
            weights = {key: 0.02 * torch.randn_like(value) for key, value in layer.state_dict().items()}
        layer.load_state_dict(weights, assign=True)
        if preset:
            layer.self_attn.differential = DifferentialAttention(DifferentialConfig(preset), layer.self_attn, "text", 0)
        adapted = get_peft_model(layer, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS))
        draw_lora(adapted)
        unfreeze_differential(adapted)
        x = torch.randn(1, length, text.hidden_size).to(dtype).requires_grad_()
        direction = torch.randn_like(x)

        def work(layer=layer, adapted=adapted, x=x, direction=direction):
            adapted.zero_grad(set_to_none=True)
            x.grad = None
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                out = layer(x, rotary, mask, None)
            out.backward(direction)

        made[name] = work
    return made
