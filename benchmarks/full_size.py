"""Compare loading and answering with a random PaliGemma 3b to transformers: time, peak memory, logits.

    python benchmarks/full_size.py --folder=/tmp/paligemma-3b-random

transformers writes the checkpoint as bf16 shards (5.9 GB) unless the folder holds one. Both libraries then load it and
answer one prompt, in bfloat16 and in float32, each in its own process. In bfloat16 two correct implementations differ
by rounding; float32 shows whether they compute the same function. Needs 16 GB of memory.
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SIZE, IMAGE_TOKENS, IMAGE_TOKEN_ID = 224, 256, 257152
PROMPT = [IMAGE_TOKEN_ID] * IMAGE_TOKENS + [2, 21209, 659, 108]  # an image, then <bos>, "caption en", newline
PROCESSES = 2  # per measurement; the faster time counts


@dataclass
class Config:
    folder: str = "/tmp/paligemma-3b-random"  # checkpoint; written if it does not exist
    new_tokens: int = 5  # length of the greedy answer
    output: str = str(ROOT / "benchmarks" / "results" / "full_size.json")
    side: Literal["", "ours", "transformers"] = ""  # internal: the library that this process measures
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # internal: dtype of its weights and computation


def write_checkpoint(folder: str) -> None:
    """Write a random model of PaliGemma 3b's size with transformers, in bf16 shards."""
    import transformers

    text = transformers.GemmaConfig(
        vocab_size=257216, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
        num_attention_heads=8, num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=IMAGE_SIZE, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN_ID, projection_dim=2048
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")


def peak_gb() -> float:
    """Peak resident memory of this process in GB. getrusage would return that of the parent process if larger."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9  # the kernel counts in KiB


def measure(config: Config) -> dict:
    """Load the model and answer once with `config.side`. Peak memory is only right in a fresh process."""
    # --- import and load
    before, dtype = peak_gb(), getattr(torch, config.dtype)
    started = time.perf_counter()
    if config.side == "ours":
        sys.path.insert(0, str(ROOT))
        from modeling_gemma import PaliGemmaForConditionalGeneration as Model

        model = Model.from_pretrained(config.folder, dtype=dtype)
    else:
        from transformers import PaliGemmaForConditionalGeneration as Model

        model = Model.from_pretrained(config.folder, dtype=dtype).eval()
    load_seconds = time.perf_counter() - started
    load_peak = peak_gb() - before

    # --- one greedy answer
    ids = torch.tensor([PROMPT])
    pixels = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    batch["pixel_values"] = pixels.to(dtype)
    greedy = {} if config.side == "ours" else {"do_sample": False}
    started = time.perf_counter()
    answer = model.generate(**batch, max_new_tokens=config.new_tokens, **greedy)[0, len(PROMPT) :].tolist()
    answer_seconds = time.perf_counter() - started
    with torch.no_grad():
        logits = model(**batch).logits[0, -1].float()
    return {
        "import_and_load_seconds": round(load_seconds, 1),
        "load_peak_gb": round(load_peak, 2),
        "answer_seconds": round(answer_seconds, 1),
        "total_peak_gb": round(peak_gb(), 2),
        "answer": answer,
        "logits": logits.tolist(),
    }


def measure_in_fresh_processes(config: Config, side: str, dtype: str) -> dict:
    """Run `measure` in `PROCESSES` processes, one after another. Returns the last result with the shortest times."""
    for file in Path(config.folder).glob("*.safetensors"):
        file.read_bytes()  # so that both libraries find the files in the page cache
    flags = [f"--side={side}", f"--dtype={dtype}", f"--folder={config.folder}", f"--new_tokens={config.new_tokens}"]
    runs = []
    for _ in range(PROCESSES):
        process = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
        runs.append(json.loads(process.stdout.splitlines()[-1]))
    fastest = {key: min(run[key] for run in runs) for key in runs[-1] if key.endswith("seconds")}
    return runs[-1] | fastest


def main() -> None:
    config = tyro.cli(Config, use_underscores=True)
    if config.side:
        print(json.dumps(measure(config)))
        return
    if not (Path(config.folder) / "config.json").exists():
        write_checkpoint(config.folder)
    weights = sum(file.stat().st_size for file in Path(config.folder).glob("*.safetensors"))
    result = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": platform.machine()}
    result |= {"threads": torch.get_num_threads(), "weights_gb": round(weights / 1e9, 2)}
    for dtype in ("bfloat16", "float32"):
        logits = {}
        for side in ("ours", "transformers"):
            measured = measure_in_fresh_processes(config, side, dtype)
            logits[side] = torch.tensor(measured.pop("logits"), dtype=torch.float32)
            result[f"{side} {dtype}"] = measured
            print(side, dtype, measured)
        difference = (logits["ours"] - logits["transformers"]).abs().max().item()
        spread = logits["transformers"].std().item()
        result[f"logits {dtype}"] = {"largest_difference": round(difference, 6), "their_spread": round(spread, 4)}
        print(result[f"logits {dtype}"])
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
