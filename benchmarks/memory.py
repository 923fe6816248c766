"""GPU memory of a training step, counted on the meta device at full size, without weights and without a GPU.

    python benchmarks/memory.py

One forward and backward pass of PaliGemma with LoRA on a ragged batch of 8 rows (an image, 64 prompt and 64 answer
tokens), with the code paths of a GPU. "saved": bytes that a decoder layer saves for the backward pass, per token;
"peak": peak bytes of all tensors, including weights, adapters and optimizer state. The CUDA context (0.5 to 1 GB) and
fragmentation in the allocator come on top. tests/test_memory.py compares the count with what autograd saves.
"""

import json
import sys
import time
import weakref
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from compare import with_lora  # noqa: E402

import fused_ops  # noqa: E402
from modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration  # noqa: E402
from modeling_siglip import SiglipVisionConfig  # noqa: E402

ROWS, PROMPT, LABELS = 8, 64, 64
OPTIMIZER_BYTES = 8  # AdamW state per trained parameter
GEMMA2 = dict(model_type="gemma2", **GemmaConfig.GEMMA2_DEFAULTS)
GEMMA2_9B = GEMMA2 | dict(
    hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8
)
MODELS = {  # text config, image size, rows
    "PaliGemma 3b": (GemmaConfig(), 224, ROWS),
    "PaliGemma 3b, batch 32": (GemmaConfig(), 224, 32),
    "PaliGemma 3b, 448 px": (GemmaConfig(), 448, ROWS),
    "PaliGemma 2 3b": (GemmaConfig(**GEMMA2), 224, ROWS),
    "PaliGemma 2 10b": (GemmaConfig(**GEMMA2_9B), 224, ROWS),
}


@dataclass
class Config:
    output: str = str(ROOT / "benchmarks" / "results" / "memory.json")


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of live storages created by operations: now, and the maximum so far."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in given | self.known:
                self.add(t.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage):
        key, size = id(storage), storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int):
        self.known.discard(key)
        self.now -= size


def make_batch(config: PaliGemmaConfig, rows: int = ROWS) -> dict[str, Tensor]:
    """A ragged batch on the CPU: the prompts of odd rows are one token shorter."""
    image = torch.full((rows, config.vision_config.num_patches), config.image_token_id)
    ids = torch.cat((image, torch.full((rows, PROMPT + LABELS), 5)), dim=1)
    valid, types = torch.ones_like(ids), torch.zeros_like(ids)
    types[:, -LABELS:] = 1
    ids[1::2] = ids[1::2].roll(1, 1)
    ids[1::2, 0] = valid[1::2, 0] = 0
    labels = ids.masked_fill(types == 0, -100)
    return dict(input_ids=ids, attention_mask=valid, token_type_ids=types, labels=labels)


def count_step(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    """(bytes that the second decoder layer saves, peak bytes of a step without weights and optimizer state).

    `model` has LoRA and is in training mode; `batch` is on the CPU and is moved to the device of the model.
    """
    saved, live = [], LiveMemory()
    layer = model.model.language_model.layers[1]
    hooks = [
        layer.register_forward_pre_hook(lambda *_: saved.append(live.now)),
        layer.register_forward_hook(lambda *_: saved.append(live.now)),
    ]
    head = model.lm_head.weight
    plan = model.model.plan(**batch).to(head.device)
    batch = {key: tensor.to(head.device) for key, tensor in batch.items()}
    shape = len(batch["input_ids"]), model.config.vision_config.num_patches, head.shape[1]
    features = torch.zeros(shape, dtype=head.dtype, device=head.device)  # the tower is frozen and keeps nothing
    with (
        mock.patch.object(fused_ops, "matmul_dtype", lambda x: x.dtype),  # autocast does not support the meta device
        fused_ops.cast_lora(fused_ops.lora_layers(model)),
        live,
    ):
        model(**batch, image_features=features, plan=plan).loss.backward()
    for hook in hooks:
        hook.remove()
    return saved[1] - saved[0], live.most


def make_model(text: GemmaConfig, image_size: int, preset: str | None) -> tuple[torch.nn.Module, int]:
    """(a model on the meta device in bfloat16 with LoRA, bytes of weights, adapters and optimizer state)."""
    config = PaliGemmaConfig(text_config=text, vision_config=SiglipVisionConfig(image_size=image_size))
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(config, preset).to(torch.bfloat16)
    adapted = with_lora(model.requires_grad_(False))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return model, weights + OPTIMIZER_BYTES * sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def table(rows: dict[str, dict]) -> list[str]:
    """The rows as docs/memory.md shows them."""
    lines = [
        "| model | fixed | saved by a layer, per token | peak | with gradient checkpointing |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = (f"{row[key]:.1f} GB" for key in ("fixed_gb", "peak_gb", "checkpointed_gb"))
        fixed, peak, checkpointed = cells
        lines.append(f"| {name} | {fixed} | {row['saved_kib']:.0f} KiB | {peak} | {checkpointed} |")
    return lines


def main():
    config = tyro.cli(Config, use_underscores=True)
    result = {"date": time.strftime("%Y-%m-%d"), "torch": version("torch"), "rows": {}}
    for name, (text, image_size, rows) in MODELS.items():
        for preset in (None, "split"):
            model, fixed = make_model(text, image_size, preset)
            batch = make_batch(model.config, rows)
            saved, most = count_step(model, batch)
            model.gradient_checkpointing_enable()
            _, checkpointed = count_step(model, batch)
            row = {"fixed_gb": fixed / 1e9, "saved_kib": saved / batch["input_ids"].numel() / 1024}
            row |= {"peak_gb": (fixed + most) / 1e9, "checkpointed_gb": (fixed + checkpointed) / 1e9}
            kind = f"{name}, {preset or 'standard'}"
            result["rows"][kind] = {key: round(value, 2) for key, value in row.items()}
            print(kind, result["rows"][kind], flush=True)
    print(*table(result["rows"]), sep="\n")
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
