"""Benchmark this repository on a GPU against transformers + peft: one command, ten minutes.

    python benchmarks/gpu.py                                   # PaliGemma 3b with random weights, bfloat16
    python benchmarks/gpu.py --sections ceilings steps_224     # some of SECTIONS below
    python benchmarks/gpu.py --device=cpu --size=tiny          # check that the code runs

Sections are independent: one that fails or runs out of time is reported, and the others still run. The results file is
written after every row, so nothing is lost if the command is interrupted. Variants of a row are interleaved; ratios are
medians over rounds of the ratio within a round. The sides:

    HF-default           logits of every row, the vision tower at every step, peft's float32 adapters
    HF-default, autocast the same under bfloat16 autocast, as transformers' Trainer runs it
    HF-tuned             logits of label rows, vision features kept, adapters in bfloat16; also with FlexAttention
    ours, a preset       standard or differential attention as training.py runs it, vision features kept
    ours, vision         the same with the vision tower at every step

B batch, L sequence, H query heads, K key/value heads, D head dim.
"""

import contextlib
import gc
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import answers  # noqa: E402
from compare import (  # noqa: E402
    check_losses,
    decode_times,
    default_loss,
    hf_config,
    hf_model,
    interleaved,
    make_batch,
    make_tuned_loss,
    mid_size,
    our_model,
    ratio,
    vision_config,
    with_lora,
)

import attention  # noqa: E402
from fused_ops import cast_lora, lora_layers  # noqa: E402
from machine import compile_layers, git_commit  # noqa: E402
from modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration  # noqa: E402
from modeling_siglip import SiglipVisionConfig  # noqa: E402
from modeling_vlm import GraphCache  # noqa: E402

NANO = ROOT / "assets" / "paligemma-nano"
BATCH, PROMPT, LABELS = 8, 64, 64  # rows of a step; tokens of the longest prompt and answer, without the image
DATASHEET_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 311.8, "L40S": 362.0, "4090": 165.2}  # dense bfloat16
SPARE_SECONDS = 15  # minimum time left to start a section
TOP_KERNELS = 12  # kernels listed per profile


@dataclass
class Config:
    seconds: int = 540  # time limit of the whole command; sections that do not fit are left out
    sections: tuple[str, ...] = ()  # sections to run, always in the order of SECTIONS; empty: all
    device: Literal["cuda", "cpu"] = "cuda"
    size: Literal["full", "tiny"] = "full"  # tiny: only check that the code runs
    rounds: int = 20  # timed rounds
    warmups: int = 3  # untimed rounds before them
    output: str = ""  # empty: benchmarks/results/gpu_CARD.json


# ---- models and batches
def paligemma_3b(config: Config, image_size: int = 224):
    if config.size == "tiny":
        return mid_size(config)
    return hf_config(257216, 2048, 18, 16384, 8, 256, vision_config(1152, 27, 4304, 16, image_size))


def paligemma2_3b(config: Config, image_size: int):
    import transformers

    if config.size == "tiny":
        made, sizes = mid_size(config), dict(hidden_size=32, num_hidden_layers=2, intermediate_size=64, head_dim=8)
    else:
        made = paligemma_3b(config, image_size)
        sizes = dict(hidden_size=2304, num_hidden_layers=26, intermediate_size=9216, head_dim=256)
    text = transformers.Gemma2Config(
        vocab_size=made.text_config.vocab_size, num_attention_heads=8, num_key_value_heads=4,
        query_pre_attn_scalar=sizes["head_dim"], attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
        sliding_window=4096, **sizes,
    )  # fmt: skip
    return transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=made.vision_config,
        image_token_index=made.image_token_index,
        projection_dim=text.hidden_size,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip


def make_step_batch(hf, device: str, ragged: bool) -> dict[str, Tensor]:
    """BATCH rows of an image, a prompt and an answer; if `ragged`, of different lengths and padded on the left."""
    batch = make_batch(hf, torch.bfloat16, BATCH, PROMPT, LABELS)
    if ragged:
        length, pad = batch["input_ids"].shape[1], hf.pad_token_id
        columns, image = torch.arange(length), length - PROMPT - LABELS
        for row in range(BATCH):
            prompt, labels = PROMPT - 5 * row % 23, LABELS - 3 * row % 7
            start = length - image - prompt - labels
            ids = batch["input_ids"][row].clone()
            batch["input_ids"][row] = torch.cat((torch.full((start,), pad), ids[: length - start]))
            batch["attention_mask"][row] = columns >= start
            batch["token_type_ids"][row] = columns >= length - labels
        is_answer = batch["token_type_ids"] == 1
        batch["labels"] = batch["input_ids"].masked_fill(~is_answer, -100)
    return {key: tensor.to(device) for key, tensor in batch.items()}


def step_flops(hf, batch: dict, with_vision: bool) -> float:
    """FLOPs of one step on padded rows: forward pass and activation gradients (weights are frozen, LoRA is left out),
    the head at label rows, attention as dense squares; for the vision tower only the forward pass."""
    text, (rows, length) = hf.text_config, batch["input_ids"].shape
    width = text.num_attention_heads * text.head_dim
    layer = 2 * text.hidden_size * (width + text.num_key_value_heads * text.head_dim)
    layer += 3 * text.hidden_size * text.intermediate_size
    decoder = 4 * text.num_hidden_layers * layer * rows * length
    head = 4 * text.hidden_size * text.vocab_size * int((batch["labels"] != -100).sum())
    return decoder + head + 12 * text.num_hidden_layers * rows * length**2 * width + with_vision * tower_flops(hf, rows)


def tower_flops(hf, images: int) -> float:
    vision = hf.vision_config
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    layer = 2 * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches * width
    return images * patches * layer * vision.num_hidden_layers


# ---- one update
@dataclass
class Variant:
    """A side of the comparison: its loss, optimizer and model, wrapped by peft."""

    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    adapted: torch.nn.Module
    is_ours: bool
    with_vision: bool

    def update(self):
        self.optimizer.zero_grad(set_to_none=True)
        with cast_lora(lora_layers(self.adapted)) if self.is_ours else contextlib.nullcontext():
            loss = self.loss()
            loss.backward()
        self.optimizer.step()
        return loss.item()

    def fixed_bytes(self) -> int:
        """Bytes of weights, adapters and optimizer state."""
        state = [t for entry in self.optimizer.state.values() for t in entry.values()]
        return sum(t.nbytes for t in [*self.adapted.parameters(), *state])


def make_variants(hf, batch: dict[str, Tensor], names: tuple[str, ...], device: str) -> dict[str, Variant]:
    """Variants by their names in the module docstring, on shared frozen weights; ", compiled" compiles their layers."""
    source = hf_model(hf, torch.bfloat16, device)
    weights = source.state_dict()
    features = our_model(hf, weights).model.image_features(batch["pixel_values"])
    made = {}
    for name in names:
        is_hf, tuned, with_vision = name.startswith("HF"), "tuned" in name, "vision" in name or "default" in name
        if is_hf:
            model = hf_model(hf, torch.bfloat16, device, weights)
            if "flex" in name:
                model.set_attn_implementation("flex_attention")
            adapted = with_lora(model, own_dtype=tuned)
        else:
            preset = name.partition(",")[0]
            adapted = with_lora(our_model(hf, weights, None if preset == "ours" else preset).to(device))
        if "compiled" in name:
            compile_layers(adapted.get_base_model())
        if tuned:
            loss = make_tuned_loss(adapted, batch, features)
        elif is_hf:
            loss = autocast(lambda adapted=adapted: default_loss(adapted, batch), device, "autocast" in name)
        else:
            loss = autocast(make_our_loss(adapted, batch, None if with_vision else features), device, True)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        made[name] = Variant(loss, optimizer, adapted, not is_hf, with_vision)
    return made


def make_our_loss(adapted, batch: dict[str, Tensor], features: Tensor | None) -> Callable[[], Tensor]:
    """The loss as training.py computes it, with the plan made on the CPU; with `features` None the tower runs too."""
    inputs = {key: tensor for key, tensor in batch.items() if key != "pixel_values"}
    images = dict(pixel_values=batch["pixel_values"]) if features is None else dict(image_features=features)
    plan = adapted.get_base_model().model.plan(**{key: tensor.cpu() for key, tensor in inputs.items()})
    plan = plan.to(batch["input_ids"].device)
    return lambda: adapted(**inputs, **images, plan=plan).loss


def autocast(loss: Callable[[], Tensor], device: str, enabled: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            return loss()

    return run


# ---- sections: each yields (name, row)
Rows = Iterator[tuple[str, dict]]


def ceilings(config: Config) -> Rows:
    """What the GPU achieves on simple operations, for comparison with the other sections."""
    size, mega = (8192, 1024) if config.size == "full" else (64, 1)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=config.device) for _ in range(2))
    times = interleaved({"matmul": lambda: a @ b}, config.rounds, config.device, config.warmups)
    tflops = 2 * size**3 / statistics.median(times["matmul"]) / 1e12
    yield "ceiling: matmul, bfloat16", {"tflops": round(tflops, 1), "datasheet": datasheet_tflops(config)}
    x = torch.ones(mega << 20, dtype=torch.float32, device=config.device)
    y = torch.empty_like(x)
    times = interleaved({"copy": lambda: y.copy_(x)}, config.rounds, config.device, config.warmups)
    bandwidth = 2 * x.numel() * 4 / statistics.median(times["copy"]) / 1e12
    yield "ceiling: copy", {"tb_per_s": round(bandwidth, 3)}
    tiny, launches = torch.zeros(1, device=config.device), 1000
    times = interleaved({"add": lambda: [tiny.add_(1) for _ in range(launches)]}, config.rounds, config.device)
    yield "ceiling: launches", {"microseconds": round(1e6 * statistics.median(times["add"]) / launches, 2)}


def datasheet_tflops(config: Config) -> float | None:
    name = torch.cuda.get_device_name() if config.device == "cuda" else ""
    return next((rate for card, rate in DATASHEET_TFLOPS.items() if card in name), None)


def backends(config: Config) -> Rows:
    """Which kernels SDPA chooses, forward and backward, by the names of the operations that ran."""
    for name, heads, kv_heads, width, masked, dtype in (
        ("SigLIP", 16, 16, 72, False, torch.bfloat16),
        ("Gemma, no mask", 8, 1, 256, False, torch.bfloat16),
        ("Gemma, dense mask", 8, 1, 256, True, torch.bfloat16),
        ("Gemma, float32", 8, 1, 256, False, torch.float32),
    ):
        q, k, v = (
            torch.randn(2, h, 384, width, dtype=dtype, device=config.device, requires_grad=True)
            for h in (heads, kv_heads, kv_heads)
        )
        mask = torch.ones(384, 384, dtype=torch.bool, device=config.device).tril()[None, None] if masked else None
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            attention.call_sdpa(q, k, v, mask, width**-0.5).sum().backward()
        ran = sorted({e.key.removeprefix("aten::") for e in seen.key_averages() if "dot_product" in e.key})
        yield f"SDPA backend: {name}", {"ops": [op for op in ran if op != "scaled_dot_product_attention"]}


def steps_224(config: Config) -> Rows:
    names = ("HF-default", "HF-default, autocast", "HF-tuned", "ours", "ours, vision", "split")
    yield from step_rows(config, "224 px", paligemma_3b(config), names)


def steps_flex(config: Config) -> Rows:
    yield from step_rows(config, "224 px", paligemma_3b(config), ("HF-tuned, flex", "ours"))


def steps_448(config: Config) -> Rows:
    names = ("HF-tuned", "ours", "ours, vision", "split", "v1_width")
    yield from step_rows(config, "448 px", paligemma_3b(config, 448), names)


def steps_gemma2(config: Config) -> Rows:
    """Steps of a model with soft-capped scores, which flash attention does not support."""
    yield from step_rows(config, "PaliGemma 2, 448 px", paligemma2_3b(config, 448), ("HF-tuned", "ours", "split"))


def compiled(config: Config) -> Rows:
    """Ragged rows only, since compiling takes a minute. transformers is not compiled: if its layers are compiled one by
    one, every layer compiles again."""
    torch._dynamo.config.recompile_limit = 32  # both arms run the code of the same layers, six graphs each
    names = ("HF-tuned", "ours", "ours, compiled", "split", "split, compiled")
    yield from step_rows(config, "224 px", paligemma_3b(config), names, kinds=("ragged",))


def step_rows(
    config: Config, label: str, hf, names: tuple[str, ...], kinds: tuple[str, ...] = ("uniform", "ragged")
) -> Rows:
    """For uniform and ragged batches: milliseconds, peak memory and TFLOP/s of every variant, then ratios."""
    medians = {}
    names = tuple(name for name in names if config.device == "cuda" or "flex" not in name)  # no training on a CPU
    for kind in kinds:
        batch = make_step_batch(hf, config.device, ragged=kind == "ragged")
        variants, losses, peaks = make_variants(hf, batch, names, config.device), {}, {}
        for name, variant in list(variants.items()):
            try:
                losses[name], peaks[name] = first_update(variant, config.device)
            except torch.OutOfMemoryError:
                del variants[name]
                yield f"step, {label}, {kind}: {name}", {"error": "out of memory"}
        check_losses(losses, 0.05)
        work = {name: variant.update for name, variant in variants.items()}
        times = interleaved(work, config.rounds, config.device, config.warmups)
        for name, spent in times.items():
            seconds = medians[name, kind] = statistics.median(spent)
            rate = step_flops(hf, batch, variants[name].with_vision) / seconds / 1e12
            row = {"ms": round(1e3 * seconds, 1), "tflops": round(rate, 1), "peak_gb": peaks[name]}
            sheet = datasheet_tflops(config)
            yield f"step, {label}, {kind}: {name}", row | ({"mfu": round(rate / sheet, 3)} if sheet else {})
        for first, second in ratios_of(times):
            yield f"step, {label}, {kind}: {first} / {second}", ratio(times[first], times[second])
        del variants, work, variant
        free()
    for name in names:
        if (name, "uniform") in medians and (name, "ragged") in medians:
            share = round(medians[name, "ragged"] / medians[name, "uniform"], 3)
            yield f"step, {label}, ragged / uniform: {name}", {"ratio": share}


def first_update(variant: Variant, device: str) -> tuple[float, float]:
    """(loss, peak memory in GB of this variant alone) of one update, after one that allocates the optimizer state."""
    loss = variant.update()
    if device == "cpu":
        return loss, 0.0
    variant.optimizer.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant.update()
    peak = torch.cuda.max_memory_allocated() - before + variant.fixed_bytes()
    return loss, round(peak / 1e9, 2)


def ratios_of(times: dict) -> list[tuple[str, str]]:
    """The pairs of variants to compare."""
    pairs = [("ours, vision", "HF-default"), ("ours, vision", "HF-default, autocast"), ("ours", "HF-tuned")]
    pairs += [("ours", "HF-tuned, flex"), ("split", "ours"), ("v1_width", "ours"), ("ours, compiled", "ours")]
    pairs += [("split, compiled", "ours, compiled"), ("split, compiled", "split"), ("ours, compiled", "HF-tuned")]
    return [pair for pair in pairs if set(pair) <= set(times)]


ADAPTERS = ("HF, adapter", "ours, adapter")


def decode(config: Config) -> Rows:
    """Tokens per second after the first token. Ours replays the graph of its last answer, "new graph" records one per
    answer. `of_floor` is relative to the speed at which each token only reads every decoder weight once."""
    hf, device = paligemma_3b(config), config.device
    source = hf_model(hf, torch.bfloat16, device)
    weights = source.state_dict()
    sides = {"HF": source, "HF, static cache": hf_model(hf, torch.bfloat16, device, weights)}
    sides["HF, adapter"] = with_lora(hf_model(hf, torch.bfloat16, device, weights)).eval()
    for name in ("ours", "ours, adapter", "split, adapter", "ours, new graph"):
        sides[name] = our_model(hf, weights, "split" if "split" in name else None).to(device)
        if "adapter" in name:
            with_lora(sides[name])
        sides[name].eval()
    for name, side in sides.items():
        if name.startswith("HF"):
            side.generation_config.eos_token_id = None
        else:
            side.config.eos_token_id = -1
    read = 2 * sum(p.numel() for p in sides["ours"].model.language_model.parameters())  # bytes; the head is tied
    floor = read / copy_bandwidth(config)
    new, rounds = (33, 3) if config.size == "full" else (5, 1)
    kept = {name: {"graphs": GraphCache()} for name in sides if not name.startswith("HF") and "new graph" not in name}
    for rows in (1, BATCH):
        prompt = make_batch(hf, torch.bfloat16, rows, PROMPT, 0, device)
        times, _ = decode_times(sides, prompt, new, rounds, device, kept)
        for name, spent in times.items():
            speed = rows * (new - 1) / statistics.median(spent)
            row = {"tokens_per_s": round(speed), "of_floor": round(floor * speed / rows, 3)}
            yield f"decode, batch {rows}: {name}", row
        for first, second in (("HF", "ours"), ("HF, static cache", "ours"), ("ours", "ours, adapter"), ADAPTERS):
            yield f"decode, batch {rows}: time of {first} / {second}", ratio(times[first], times[second])


def copy_bandwidth(config: Config) -> float:
    """Bytes read and written per second."""
    return next(row["tb_per_s"] for name, row in ceilings(config) if name == "ceiling: copy") * 1e12


def kernels(config: Config) -> Rows:
    """Forward + backward of the attention of one layer on every path that supports it; `taken`: the path in use."""
    lengths = (384, 1152) if config.size == "full" else (24,)
    for name, (second, value_width, softcap, paths) in {
        "standard": (False, 256, None, ("varlen", "sdpa")),
        "split": (True, 256, None, ("varlen", "sdpa")),
        "soft-cap": (False, 256, 50.0, ("flex", "chunks", "maps")),
        "wide values": (True, 512, None, ("flex", "chunks", "maps")),
    }.items():
        for length in lengths:
            run = attention_work(config, length, second, value_width, softcap)
            works = {path: lambda run=run, path=path: run(path) for path in paths if can_run(run, path)}
            times = interleaved(works, config.rounds, config.device, config.warmups)
            taken = run(None)
            for path, spent in times.items():
                row = {"ms": round(1e3 * statistics.median(spent), 3), "taken": path == taken}
                if config.device == "cuda":
                    row["card_ms"] = round(card_ms(works[path]), 3)
                yield f"attention, {length} keys, {name}: {path}", row


def can_run(run: Callable, path: str) -> bool:
    try:
        run(path)
    except (RuntimeError, NotImplementedError) as error:  # no kernel on this device, or out of memory
        print(f"not timed: {path} ({str(error).splitlines()[0][:120]})")
        return False
    return True


def attention_work(config: Config, length: int, second: bool, value_width: int, softcap: float | None) -> Callable:
    """A function that runs Gemma 2B's attention of a ragged batch forward and backward on a given path, or with None on
    the path in use, and returns the path."""
    heads, width = (8, 256) if config.size == "full" else (4, 8)
    value_width = width * value_width // 256
    device, dtype, chosen = config.device, torch.bfloat16, []
    types = torch.arange(length) >= length - 24
    valid = torch.arange(length) >= torch.arange(BATCH)[:, None]  # rows with 0 to BATCH - 1 padding tokens
    mask = attention.PrefixMask.from_tensors(valid.long(), types.long().expand(BATCH, -1)).to(device)
    shapes = [(heads, width), (heads, width), (1, width), (1, value_width)]
    q1, q2, k, v = (torch.randn(BATCH, h, length, d, dtype=dtype, device=device) for h, d in shapes)
    leaves = [t.requires_grad_() for t in ((q1, q2, k, v) if second else (q1, k, v))]
    weight = torch.ones(1, device=device, requires_grad=True)
    real = attention.choose_path

    def run(path: str | None) -> str:
        def choose(*args) -> str:
            chosen.append(path or real(*args))
            return chosen[-1]

        attention.choose_path = choose
        try:
            if second:
                out = attention.blended_attention(q1, q2, k, v, mask, width**-0.5, weight, True, softcap)
            else:
                out = attention.attention(q1, k, v, mask, width**-0.5, softcap)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        finally:
            attention.choose_path = real
        return chosen[-1]

    return run


def profiles(config: Config) -> Rows:
    """Profile of one update on a ragged batch: launches, syncs, share of GPU busy time, and the slowest kernels."""
    hf = paligemma_3b(config)
    batch = make_step_batch(hf, config.device, ragged=True)
    variants = make_variants(hf, batch, ("ours", "split", "HF-tuned"), config.device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (config.device == "cuda")
    for name, variant in variants.items():
        for _ in range(config.warmups):
            variant.update()
        began = time.perf_counter()
        variant.update()
        wall = time.perf_counter() - began
        with profile(activities=activities) as seen:
            variant.update()
        events = seen.key_averages()
        ran = sorted(kernels_among(events), key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in ran) / 1e6
        launches = sum(e.count for e in events if "LaunchKernel" in e.key)
        row = {"ms": round(1e3 * wall, 1), "launches": launches, "busy": round(busy / wall, 3)}
        row["syncs"] = sum(e.count for e in events if "StreamSynchronize" in e.key)
        row["top"] = {e.key[:90]: round(e.self_device_time_total / 1e3, 2) for e in ran[:TOP_KERNELS]}
        yield f"profile, ragged: {name}", row


def kernels_among(events) -> list:
    """The events of a profile that ran on the GPU."""
    return [event for event in events if event.device_type == DeviceType.CUDA]


def card_ms(work: Callable[[], object], times: int = 5) -> float:
    """GPU time of one call of `work` in milliseconds."""
    work()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(times):
            work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in kernels_among(seen.key_averages())) / times / 1e3


def resume(config: Config) -> Rows:
    """finetune_diff.py on the included model: a run that is killed and resumed against an uninterrupted one."""
    with tempfile.TemporaryDirectory() as folder:
        steps, samples, save_every = (60, 64, 20) if config.size == "full" else (4, 2, 2)
        flags = [f"--max_steps={steps}", f"--save_every={save_every}", "--log_every=1", f"--eval_samples={samples}"]
        losses = {}
        for name, killed_at in (("whole", None), ("killed", save_every)):
            run = Path(folder, name)
            seconds = run_script("finetune_diff.py", flags, run, killed_at)
            lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
            losses[name] = [line["loss"] for line in lines if "loss" in line]
            yield f"included model, {name}", {"seconds": round(seconds, 1), "last_loss": losses[name][-1]}
        pairs = zip(losses["whole"], losses["killed"], strict=True)
        yield "included model, killed / whole", {"largest_loss_difference": max(abs(a - b) for a, b in pairs)}


def run_script(script: str, flags: list[str], folder: Path, killed_at: int | None) -> float:
    """Seconds of a fine-tuning run into `folder`. With `killed_at` the run is killed once that checkpoint exists, and
    started again."""
    command = [sys.executable, script, *flags, f"--output_dir={folder}", "--tracker=none"]
    began = time.perf_counter()
    if killed_at is not None:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None and not (folder / "checkpoints" / f"step-{killed_at:06d}").exists():
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return time.perf_counter() - began


def answer_rows(config: Config) -> Rows:
    """Answers per second of the needle evaluation, as in benchmarks/answers.py."""
    full = config.size == "full"
    options = answers.Config(rounds=3, samples=512 if full else 2, batch_size=64 if full else 2, device=config.device)
    yield from answers.rows(options)


def train_3b(config: Config) -> Rows:
    """Run the scripts on a random PaliGemma 3b: 50 steps of both arms, killed and resumed; evaluation; export."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps, samples, save_every, rows = (50, 16, 20, BATCH) if config.size == "full" else (3, 2, 2, 2)
        write_random_model(config, folder / "model")
        flags = [f"--model={folder / 'model'}", f"--batch_size={rows}", "--lr=1e-4", "--log_every=1"]
        flags += [f"--max_steps={steps}", f"--save_every={save_every}", f"--eval_samples={samples}"]
        for script in ("finetune_original.py", "finetune_diff.py"):
            run = folder / script.removesuffix(".py")
            seconds = run_script(script, flags, run, save_every)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses = [line["loss"] for line in lines if "loss" in line]
            speed = statistics.median(line["tokens_per_second"] for line in lines if "tokens_per_second" in line)
            row = {"seconds": round(seconds, 1), "losses": [losses[0], losses[-1]], "tokens_per_s": speed}
            yield f"random 3b: {script}, killed and continued", row
        for script, more in {
            "eval_mmnih.py": [f"--model={run}", f"--samples={samples}", "--grids=2"],
            "export.py": [f"--model={folder / 'finetune_original'}", f"--output={folder / 'merged'}"],
        }.items():
            began = time.perf_counter()
            done = subprocess.run([sys.executable, script, *more], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            yield f"random 3b: {script}", {"seconds": round(time.perf_counter() - began, 1)}


def write_random_model(config: Config, folder: Path):
    """PaliGemma 3b with random weights in bfloat16, with the tokenizer of the included model."""
    small = PaliGemmaConfig.from_pretrained(NANO)
    text, vision = GemmaConfig(), SiglipVisionConfig()
    if config.size == "tiny":
        text, vision = small.text_config, small.vision_config
    ids = {name: getattr(small, name) for name in ("image_token_id", "pad_token_id", "eos_token_id", "bos_token_id")}
    with torch.device(config.device):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(text, vision, **ids)).to(torch.bfloat16)
    model.save_pretrained(folder)
    shutil.copy(NANO / "tokenizer.json", folder)


SECTIONS: dict[str, tuple[Callable[[Config], Rows], int]] = {  # section -> (function, time limit in seconds)
    "ceilings": (ceilings, 30),
    "backends": (backends, 30),
    "steps_224": (steps_224, 120),
    "decode": (decode, 120),
    "profiles": (profiles, 40),
    "compiled": (compiled, 240),
    "kernels": (kernels, 90),
    "steps_448": (steps_448, 120),
    "steps_gemma2": (steps_gemma2, 120),
    "steps_flex": (steps_flex, 120),
    "resume": (resume, 90),
    "answers": (answer_rows, 60),
    "train_3b": (train_3b, 400),
}


# ---- the clock and the file
@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside the block after `seconds`."""

    def stop(*_):
        raise TimeoutError(f"out of time after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe_machine(config: Config) -> dict:
    described = {"date": time.strftime("%Y-%m-%d"), "commit": git_commit(), "card": platform.machine()}
    described["python"] = platform.python_version()
    if config.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        described["card"] = f"{card.name}, {card.total_memory / 1e9:.0f} GB"
        described |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return described | {name: version(name) for name in ("torch", "transformers", "peft")}


def table(rows: dict[str, dict]) -> list[str]:
    """One line per row, without cells that are tables themselves."""
    cells = {
        name: ", ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, dict))
        for name, row in rows.items()
    }
    return [f"{name:64} {text}" for name, text in cells.items()]


def summary(rows: dict[str, dict]) -> list[str]:
    """Steps, decoding and attention as markdown tables."""
    lines = ["| step | ms, uniform | ms, ragged | TFLOP/s, ragged | peak |", "|---|---|---|---|---|"]
    steps = [name for name in rows if name.startswith("step, ") and ", ragged: " in name and "ms" in rows[name]]
    for name in steps:
        ragged, uniform = rows[name], rows.get(name.replace(", ragged: ", ", uniform: "), {})
        label = name.removeprefix("step, ").replace(", ragged: ", ": ")
        lines.append(
            f"| {label} | {uniform.get('ms', '-')} | {ragged['ms']} | {ragged['tflops']:.0f} | {ragged['peak_gb']} GB |"
        )
    lines += ["", "| decoding | tokens/s, batch 1 | of the floor | batch 8 | of the floor |", "|---|---|---|---|---|"]
    for name in (name for name in rows if name.startswith("decode, batch 1: ") and "tokens_per_s" in rows[name]):
        cells = [rows[name], rows[name.replace("batch 1", f"batch {BATCH}")]]
        numbers = " | ".join(f"{cell['tokens_per_s']:,} | {100 * cell['of_floor']:.0f} %" for cell in cells)
        lines.append(f"| {name.partition(': ')[2]} | {numbers} |")
    lines += ["", "| attention of one layer, forward + backward | host and GPU | GPU alone |", "|---|---|---|"]
    for name, row in rows.items():
        if name.startswith("attention, "):
            taken = " (used)" if row["taken"] else ""
            lines.append(
                f"| {name.removeprefix('attention, ')}{taken} | {row['ms']:.2f} ms | {row['card_ms']:.2f} ms |"
            )
    return lines


def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    if unknown := set(config.sections) - set(SECTIONS):
        sys.exit(f"--sections: {min(unknown)!r} is not one of {', '.join(SECTIONS)}")
    if config.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: --device=cpu --size=tiny checks that the code runs")
    end = time.monotonic() + config.seconds
    result = {**describe_machine(config), "rounds": config.rounds, "rows": {}, "faults": {}, "seconds": {}}
    card = re.sub(r"\W+", "_", result["card"].partition(",")[0]).lower()
    output = Path(config.output or ROOT / "benchmarks" / "results" / f"gpu_{card}.json")

    def write():
        temporary = output.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, output)

    print(json.dumps({key: value for key, value in result.items() if isinstance(value, str)}))
    for section, (make_rows, longest) in SECTIONS.items():
        left = end - time.monotonic()
        if config.sections and section not in config.sections:
            continue
        if left < SPARE_SECONDS:
            result["faults"][section] = f"left out: {left:.0f} s were left"
            continue
        began = time.monotonic()
        try:
            with time_limit(min(longest, left)):
                for name, row in make_rows(config):
                    result["rows"][name] = row
                    write()
                    print(*table({name: row}), flush=True)
        except Exception as error:  # the other sections still run
            result["faults"][section] = "".join(traceback.format_exception(error))[-1500:]
            print(f"{section}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        result["seconds"][section] = round(time.monotonic() - began, 1)
        write()
        free()
    write()
    print(
        "",
        *table(result["rows"]),
        *(f"{section}: {fault.splitlines()[-1]}" for section, fault in result["faults"].items()),
        f"written to {output}",
        sep="\n",
    )


if __name__ == "__main__":
    main()
