"""A random PaliGemma of full size, written by transformers in bf16 shards: does it load here, and at what cost?

    python benchmarks/full_size.py --folder=/tmp/paligemma-3b-random

Writes the checkpoint (5.9 GB) unless it is there, then loads it and answers one prompt, here and with transformers, in
bfloat16 and in float32, each in a fresh process: seconds, peak resident memory, and how far the logits lie apart.
In bfloat16 two correct programs differ by rounding; float32 tells whether they are the same function. Needs 16 GB.
"""

import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
PROMPT = [257152] * 256 + [2, 21209, 659, 108]  # a picture, <bos>, "caption en", newline


@dataclass
class Config:
    folder: str = "/tmp/paligemma-3b-random"  # where the checkpoint goes
    new_tokens: int = 5  # answered greedily
    output: str = str(ROOT / "benchmarks" / "results" / "full_size.json")
    side: str = ""  # internal: the library that this process measures
    dtype: str = "bfloat16"  # internal: what it computes in


def write_checkpoint(folder: str):
    import transformers

    text = transformers.GemmaConfig(
        vocab_size=257216, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18,
        num_attention_heads=8, num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=224, patch_size=14, vision_use_head=False,
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=257152, projection_dim=2048
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")


def peak_gb() -> float:
    """Most memory this process ever had resident; getrusage would tell its parent's if that was larger."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def measure(config: Config) -> dict:
    """Load, answer once; run in a process of its own."""
    before, dtype = peak_gb(), getattr(torch, config.dtype)
    began = time.perf_counter()
    if config.side == "ours":
        sys.path.insert(0, str(ROOT))
        from modeling_gemma import PaliGemmaForConditionalGeneration as Model

        model = Model.from_pretrained(config.folder, dtype=dtype)
    else:
        from transformers import PaliGemmaForConditionalGeneration as Model

        model = Model.from_pretrained(config.folder, dtype=dtype).eval()
    seconds = time.perf_counter() - began
    peak = peak_gb() - before
    ids = torch.tensor([PROMPT])
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    batch["pixel_values"] = pixels.to(dtype)
    began = time.perf_counter()
    more = {} if config.side == "ours" else {"do_sample": False}
    answer = model.generate(**batch, max_new_tokens=config.new_tokens, **more)[0, len(PROMPT) :].tolist()
    seconds_to_answer = time.perf_counter() - began
    with torch.no_grad():
        last = model(**batch).logits[0, -1].float()
    return {
        "import_and_load_seconds": round(seconds, 1),
        "load_peak_gb": round(peak, 2),
        "answer_seconds": round(seconds_to_answer, 1),
        "total_peak_gb": round(peak_gb(), 2),
        "answer": answer,
        "logits": last.tolist(),
    }


def main():
    config = tyro.cli(Config, use_underscores=True)
    if config.side:
        print(json.dumps(measure(config)))
        return
    if not (Path(config.folder) / "config.json").exists():
        write_checkpoint(config.folder)
    weights = sum(f.stat().st_size for f in Path(config.folder).glob("*.safetensors"))
    result = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "machine": platform.machine()}
    result |= {"threads": torch.get_num_threads(), "weights_gb": round(weights / 1e9, 2)}
    for dtype in ("bfloat16", "float32"):
        logits = []
        for side in ("ours", "transformers"):
            for file in Path(config.folder).glob("*.safetensors"):
                file.read_bytes()  # both find the pages in memory
            flags = [
                f"--side={side}",
                f"--dtype={dtype}",
                f"--folder={config.folder}",
                f"--new_tokens={config.new_tokens}",
            ]
            told = [
                subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
                for _ in range(2)
            ]
            first, measured = (json.loads(process.stdout.splitlines()[-1]) for process in told)
            measured |= {key: min(first[key], measured[key]) for key in measured if key.endswith("seconds")}
            logits.append(torch.tensor(measured.pop("logits"), dtype=torch.float32))
            result[f"{side} {dtype}"] = measured
            print(side, dtype, measured)
        apart, spread = (logits[0] - logits[1]).abs().max().item(), logits[1].std().item()
        result[f"logits {dtype}"] = {"largest_difference": round(apart, 6), "their_spread": round(spread, 4)}
        print(result[f"logits {dtype}"])
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
