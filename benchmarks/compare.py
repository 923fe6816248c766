"""Time ours against transformers + peft, and differential against standard attention, with the same weights and work.

    python benchmarks/compare.py                 # CPU, one thread; benchmarks/gpu.py is for a GPU
    python benchmarks/compare.py --compiled=True # also both sides under torch.compile, with minutes of warm-up

Every ratio is the median over rounds of the ratio within a round, with quartiles; all variants of a row are interleaved
in one process, and the first round is dropped. Seconds are process time of one thread. Losses (1e-5 in float32) and
greedy tokens are compared before anything is timed. The two baselines:

    HF-default  what people run: logits of every row, the vision tower at every step, peft's float32 adapters
    HF-tuned    what an expert runs: logits of label rows, vision features reused, adapters in the model's dtype

Ours reuses vision features as well, as with `--vision_cache_gb`, without the time of the look-up; its adapters are
float32. All rows of a batch have the same length, so there is no padding and there are no ragged prefixes.
"""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from attention import PrefixMask  # noqa: E402
from data import loader, make_data  # noqa: E402
from differential_attention import (  # noqa: E402
    DifferentialConfig,
    add_differential,
    make_differential,
    unfreeze_differential,
)
from finetune_original import Config as Finetune  # noqa: E402
from modeling_gemma import (  # noqa: E402
    GemmaConfig,
    GemmaDecoderLayer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    rotary_tables,
)
from processing_paligemma import PaliGemmaProcessor  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Config:
    size: Literal["full", "tiny"] = "full"  # tiny: only check that the code runs
    rounds: int = 5  # timed rounds, after one that is not counted
    compiled: bool = False  # time both sides under torch.compile as well
    output: str = str(ROOT / "benchmarks" / "results" / "compare_cpu.json")
    child: str = ""  # internal: the variant whose step memory this process measures
    dtype: str = "float32"  # internal: its dtype


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
    """185 M parameters with a vocabulary of 257,216 tokens; for `--size=tiny` a toy with the same structure."""
    if config.size == "tiny":
        return hf_config(512, 32, 2, 64, 4, 8, vision_config(24, 2, 32, 2, image_size=28))
    return hf_config(vocabulary, 512, 6, 4096, 8, 64, vision_config(384, 6, 1536, 6))


def hf_model(hf, dtype, device="cpu", weights=None):
    """A PaliGemma of transformers, with random weights or sharing the tensors `weights`."""
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
    """Add peft's LoRA of rank 8 to the language model, with the same random non-zero factors for every model."""
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


def tuned_loss(adapted, batch, features, labelled):
    """Loss of HF-tuned; `labelled` [n] are the positions that have a label in any row."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    seen = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    logits = adapted(**inputs, mm_encoder_outputs=seen, logits_to_keep=labelled - 1).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, labelled].flatten())


def make_tuned_loss(adapted, batch, features) -> Callable:
    """`tuned_loss` of a batch, after checking that transformers uses the features; 5.17 silently ignores them."""
    labelled = (batch["labels"] != -100).any(0).nonzero().squeeze(1)
    with torch.no_grad():
        losses = [tuned_loss(adapted, batch, t, labelled).item() for t in (features, torch.zeros_like(features))]
    assert losses[0] != losses[1], "transformers ignores mm_encoder_outputs: use 5.23, as in requirements.txt"
    return lambda: tuned_loss(adapted, batch, features, labelled)


def our_loss(adapted, batch, features):
    inputs = {key: value for key, value in batch.items() if key != "pixel_values"}
    dtype = features.dtype  # as training.py runs: float32 masters, autocast where the base is bf16
    with torch.autocast(features.device.type, dtype, enabled=dtype == torch.bfloat16):
        return adapted(**inputs, pixel_values=None, image_features=features).loss


def training_variants(hf, dtype, batch, device="cpu", which=("HF-default", "HF-tuned", "ours", "split")) -> dict:
    """Name -> (loss function, optimizer). All variants share the frozen weights."""
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
        elif kind == "HF-tuned":
            loss = make_tuned_loss(adapted, batch, features)
        else:
            loss = lambda adapted=adapted: our_loss(adapted, batch, features)  # noqa: E731
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


def interleaved(variants: dict[str, Callable], rounds: int, device="cpu", warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of every variant, interleaved round by round; the first rounds are dropped."""
    times = {name: [] for name in variants}
    for _ in range(warmups + rounds):
        for name, work in variants.items():
            times[name].append(seconds(work, device))
    return {name: spent[warmups:] for name, spent in times.items()}


def ratio(first: list[float], second: list[float]) -> dict:
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}


# ---- rows of the table: each yields (name, numbers)
def step_rows(config: Config, vocabulary: int, dtype: str):
    """A LoRA training step, batch 2 of 256 image + 32 prompt + 32 label tokens."""
    hf = mid_size(config, vocabulary)
    batch = make_batch(hf, DTYPES[dtype], 2, 32, 32)
    which = ("HF-default", "HF-tuned", "ours", "split")
    which += ("HF-tuned, compiled", "ours, compiled") if config.compiled else ()
    variants = training_variants(hf, DTYPES[dtype], batch, which=which)
    losses = {name: loss().item() for name, (loss, _) in variants.items()}  # one graph at a time
    check_losses(losses, 1e-5 if dtype == "float32" else 0.05)
    times = interleaved({name: lambda v=v: step(*v) for name, v in variants.items()}, config.rounds)
    name = f"step, vocabulary {vocabulary:,}, {dtype}"
    yield f"{name}: ours / HF-default", ratio(times["ours"], times["HF-default"])
    yield f"{name}: ours / HF-tuned", ratio(times["ours"], times["HF-tuned"])
    yield f"{name}: split / standard", ratio(times["split"], times["ours"])
    if config.compiled:
        yield f"{name}: both compiled, ours / HF-tuned", ratio(times["ours, compiled"], times["HF-tuned, compiled"])
        yield f"{name}: ours compiled / ours", ratio(times["ours, compiled"], times["ours"])


def check_losses(losses: dict[str, float], tolerance: float):
    assert max(losses.values()) - min(losses.values()) < tolerance, f"losses differ: {losses}"


def layer_rows(config: Config, dtype: str, length: int):
    """One decoder layer of Gemma 2B's size, forward + backward, LoRA on all seven linears, the last 48 rows causal."""
    times = interleaved(layer_variants(config, DTYPES[dtype], length), config.rounds)
    for preset in ("split", "v1_width"):
        yield f"Gemma 2B layer, S = {length}, {dtype}: {preset} / standard", ratio(times[preset], times["standard"])


def layer_variants(config: Config, dtype, length: int) -> dict[str, Callable]:
    from peft import LoraConfig, get_peft_model

    text = GemmaConfig() if config.size == "full" else GemmaConfig(hidden_size=32, intermediate_size=64, head_dim=8)
    types = (torch.arange(length) >= length - 48).long()[None]
    mask = PrefixMask.from_tensors(torch.ones_like(types), types)
    rotary = rotary_tables(text, torch.arange(1, length + 1)[None], dtype)
    torch.manual_seed(0)
    weights = {key: 0.02 * torch.randn_like(t) for key, t in GemmaDecoderLayer(text, 0).to(dtype).state_dict().items()}
    x, direction = torch.randn(2, 1, length, text.hidden_size).to(dtype)
    made = {}
    for name, preset in dict(standard=None, split="split", v1_width="v1_width").items():
        layer = GemmaDecoderLayer(text, 0).requires_grad_(False)
        layer.load_state_dict(weights, assign=True)
        if preset:
            attention, resolved = layer.self_attn, DifferentialConfig(preset).resolve()
            attention.differential = make_differential(resolved, attention.shape, "text", 0, attention.q_proj)
        adapted = get_peft_model(layer, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS))
        draw_lora(adapted)
        unfreeze_differential(adapted)

        def work(layer=layer, adapted=adapted):
            adapted.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                out = layer(x.clone().requires_grad_(), rotary, mask, None)
            out.backward(direction)

        made[name] = work
    return made


def included_rows(config: Config):
    """Answers of the included model to eight needle questions; the whole call of generate is timed."""
    import transformers

    folder = ROOT / "assets" / "paligemma-nano"
    source, _ = make_data(Finetune())
    processor = PaliGemmaProcessor.from_pretrained(folder)
    ((_, batch),) = loader(source, processor, [[(0, i) for i in range(8)]], with_suffix=False)
    sides = {
        "HF": transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(),
        "ours": PaliGemmaForConditionalGeneration.from_pretrained(folder),
    }
    ids = sides["ours"].config  # the folder has no generation_config.json
    sides["HF"].generation_config.update(eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id)
    calls = {
        "HF": lambda: sides["HF"].generate(**batch, max_new_tokens=20, do_sample=False),
        "ours": lambda: sides["ours"].generate(**batch, max_new_tokens=20),
    }
    answers = {name: call().tolist() for name, call in calls.items()}
    assert answers["HF"] == answers["ours"], f"greedy tokens differ: {answers}"
    times = interleaved(calls, config.rounds)
    yield "generate, included model, batch 8: HF / ours", ratio(times["HF"], times["ours"])


def decode_rows(config: Config, dtype: str):
    """Greedy decoding of the mid-size model, vocabulary 257,216, batch 1: time of 33 new tokens minus that of 1."""
    hf = mid_size(config)
    prompt = make_batch(hf, DTYPES[dtype], 1, 32, 0)
    source = hf_model(hf, DTYPES[dtype])
    source.generation_config.eos_token_id = None
    sides = {"HF": source} | {
        name: our_model(hf, source.state_dict(), preset) for name, preset in dict(ours=None, split="split").items()
    }
    for name in ("ours", "split"):
        sides[name].config.eos_token_id = -1
    times, answers = decode_times(sides, prompt, 33, config.rounds)
    if dtype == "float32":  # in bfloat16 rounding may swap two close logits
        assert answers["HF"] == answers["ours"], f"greedy tokens differ: {answers}"
    yield f"decode, vocabulary 257,216, batch 1, {dtype}: HF / ours", ratio(times["HF"], times["ours"])
    yield f"decode, {dtype}: tokens/s of split / standard", ratio(times["ours"], times["split"])


def decode_times(
    sides: dict, prompt: dict, new: int, rounds: int, device: str = "cpu", options: dict[str, dict] | None = None
) -> tuple[dict, dict]:
    """Seconds for the tokens after the first, and the tokens of every model. `options` are additional arguments of
    `generate`, by side."""
    prompt = {key: prompt[key] for key in ("input_ids", "attention_mask", "pixel_values")}
    answers = {}

    def call(name: str, count: int):
        more = dict(do_sample=False) if name.startswith("HF") else {}
        more |= dict(cache_implementation="static") if "static" in name else {}
        more |= (options or {}).get(name, {}) if count > 1 else {}
        answers[name] = sides[name].generate(**prompt, max_new_tokens=count, **more).tolist()

    many = {name: lambda name=name: call(name, new) for name in sides}
    one = {f"{name} 1": lambda name=name: call(name, 1) for name in sides}
    times = interleaved(one | many, rounds, device)
    return {n: [a - b for a, b in zip(times[n], times[f"{n} 1"], strict=True)] for n in sides}, answers


def memory_rows(config: Config, dtype: str):
    """Growth of resident memory in the first step, each variant in its own process."""
    names = ("HF-default", "HF-tuned", "ours", "split")
    flags = [f"--size={config.size}", f"--dtype={dtype}"]
    peaks = {name: json.loads(fresh_process([__file__, f"--child={name}", *flags])) for name in names}
    for name, other in (("ours", "HF-default"), ("ours", "HF-tuned"), ("split", "ours")):
        row = {"ratio": round(peaks[name] / peaks[other], 3), "MB": [round(peaks[name]), round(peaks[other])]}
        yield f"step memory, vocabulary 257,216, {dtype}: {name} / {'standard' if other == 'ours' else other}", row


def fresh_process(arguments: list[str]) -> str:
    """Run Python in a new process with one thread. Returns the last line that it prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ONE_THREAD, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def step_memory(config: Config) -> float:
    """Growth of resident memory in MB in one step of the variant `config.child`."""
    dtype = DTYPES[config.dtype]
    hf = mid_size(config)
    batch = make_batch(hf, dtype, 2, 32, 32)
    ((_, work),) = training_variants(hf, dtype, batch, which=(config.child,)).items()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is not returned would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the resident memory
    before = resident("VmHWM")
    step(*work)
    return resident("VmHWM") - before


def resident(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6  # in KiB


def load_rows(config: Config):
    """Load a checkpoint of 1.3 GB in bf16 shards from the page cache: wall time in fresh processes, best of three."""
    with tempfile.TemporaryDirectory() as folder:
        vision = vision_config(384, 6, 1536, 6)
        hf = mid_size(config) if config.size == "tiny" else hf_config(257216, 1024, 12, 8192, 8, 128, vision)
        hf_model(hf, torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
        sides = dict(ours="modeling_gemma", HF="transformers")
        measured = {n: [json.loads(fresh_process(["-c", LOAD, m, folder])) for _ in range(4)] for n, m in sides.items()}
    for i, name in enumerate(("load 1.3 GB, warm", "import + load")):
        seconds = [round(min(spent[i] for spent in measured[side][1:]), 3) for side in ("ours", "HF")]
        yield f"{name}, bfloat16: ours / HF", {"ratio": round(seconds[0] / seconds[1], 3), "seconds": seconds}


LOAD = """
import importlib, json, sys, time
began = time.perf_counter()
Model = importlib.import_module(sys.argv[1]).PaliGemmaForConditionalGeneration
imported = time.perf_counter()
import torch
Model.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
done = time.perf_counter()
print(json.dumps([done - imported, done - began]))
"""


def cpu_rows(config: Config):
    for vocabulary in (257216, 32000):
        for dtype in DTYPES:
            yield from step_rows(config, vocabulary, dtype)
    for dtype in DTYPES:
        yield from memory_rows(config, dtype)
    for length in (304, 1100):
        for dtype in DTYPES:
            yield from layer_rows(config, dtype, length)
    yield from included_rows(config)
    for dtype in DTYPES:
        yield from decode_rows(config, dtype)
    yield from load_rows(config)


# ---- the table
def line(name: str, row: dict) -> str:
    if "ratio" not in row:
        return f"| {name} | {', '.join(f'{key} {value}' for key, value in row.items())} | |"
    more = {key: value for key, value in row.items() if key not in ("ratio", "quartiles")}
    spread = "{} - {}".format(*row["quartiles"]) if "quartiles" in row else ""
    return f"| {name} | {row['ratio']} | {spread or ', '.join(f'{key} {value}' for key, value in more.items())} |"


def summary(rows: dict[str, dict]) -> list[str]:
    """The ratios as the README shows them: one line per kind of work with both dtypes, quartiles in brackets."""
    cells: dict[str, dict[str, str]] = {}
    for name, row in rows.items():
        dtype = next((d for d in DTYPES if f", {d}" in name), "float32")
        spread = " [{:.2f}, {:.2f}]".format(*row["quartiles"]) if "quartiles" in row else ""
        cells.setdefault(name.replace(f", {dtype}", ""), {})[dtype] = f"{row['ratio']:.2f}{spread}"
    head = ["| work | " + " | ".join(DTYPES) + " |", "|---" * (1 + len(DTYPES)) + "|"]
    return head + [f"| {name} | " + " | ".join(row.get(d, "") for d in DTYPES) + " |" for name, row in cells.items()]


def machine() -> str:
    names = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
    return f"{names[0].partition(': ')[2]}, 1 thread of {os.cpu_count()}"


def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    torch.set_num_threads(1)
    if config.child:
        print(json.dumps(step_memory(config)))
        return
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "rounds": config.rounds}
    result |= {name: version(name) for name in ("torch", "transformers", "peft")} | {"rows": {}}
    print("| work | ratio | quartiles |\n|---|---|---|")
    for name, row in cpu_rows(config):
        result["rows"][name] = row
        print(line(name, row), flush=True)
    print("\n", *summary(result["rows"]), sep="\n")
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
