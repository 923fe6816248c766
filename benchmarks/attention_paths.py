"""Time every path of attention.py at several lengths: the measurements behind `choose_path`.

    python benchmarks/attention_paths.py

Forward + backward of the attention core on a CPU with one thread, in process time, all paths interleaved. Results are
medians over rounds of the ratio to standard attention through SDPA in the same round. "maps" keeps explicit maps,
"chunks" recomputes them for a few queries at a time, "sdpa" is torch's SDPA on the heads of both maps at once.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compare import machine  # noqa: E402

import attention  # noqa: E402
from attention import PrefixMask  # noqa: E402

SHAPES = {  # query heads, key heads of each map, value heads, width of a map, width of a value, differential
    "Gemma, standard": (8, 1, 1, 256, 256, False),
    "Gemma, second query (split, v2)": (8, 1, 1, 256, 256, True),
    "Gemma, halves (v1_width)": (8, 2, 1, 128, 256, True),
    "SigLIP, standard": (16, 16, 16, 72, 72, False),
    "SigLIP, pairs (v1)": (8, 16, 8, 72, 144, True),
}


@dataclass
class Config:
    lengths: tuple[int, ...] = (256, 512, 768, 1024)
    rounds: int = 5  # timed rounds, after one that is not counted
    output: str = str(ROOT / "benchmarks" / "results" / "attention_paths.json")


def work(shape, length: int, dtype, path: str):
    """A function that runs this shape forward and backward on this path; the last 48 rows are causal."""
    heads, keys, values, width, value_width, differential = shape
    torch.manual_seed(0)
    sizes = [(heads, width), (heads, width), (keys, width), (values, value_width)]
    q1, q2, k, v = (torch.randn(1, h, length, d).to(dtype).requires_grad_() for h, d in sizes)
    types = (torch.arange(length) >= length - 48).long()[None]
    mask = PrefixMask.from_tensors(torch.ones_like(types), types)
    weight, direction = torch.ones(1, requires_grad=True), torch.randn(1, heads, length, value_width).to(dtype)

    def run():
        attention.choose_path = lambda *args: path
        if differential:
            out = attention.blended_attention(q1, q2, k, v, mask, 0.0625, weight, True)
        else:
            out = attention.attention(q1, k, v, mask, 0.0625)
        out.backward(direction)

    return run


def main():
    config = tyro.cli(Config, use_underscores=True)
    torch.set_num_threads(1)
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "torch": torch.__version__}
    result |= {"rounds": config.rounds, "rows": []}
    print("| shape | S | dtype | taken | maps | chunks | sdpa |\n|---|---|---|---|---|---|---|")
    chosen = attention.choose_path
    for (name, shape), length in ((item, s) for item in SHAPES.items() for s in config.lengths):
        for dtype in (torch.float32, torch.bfloat16):
            width, value_width = shape[3:5]
            base = SHAPES["SigLIP, standard" if "SigLIP" in name else "Gemma, standard"]
            variants = {p: work(shape, length, dtype, p) for p in ("maps", "chunks", "sdpa")}
            variants["base"] = work(base, length, dtype, "sdpa")
            times = {p: [] for p in variants}
            for _ in range(config.rounds + 1):
                for path, run in variants.items():
                    began = time.process_time()
                    run()
                    times[path].append(time.process_time() - began)
            ratios = {
                p: round(statistics.median(a / b for a, b in zip(times[p][1:], times["base"][1:], strict=True)), 2)
                for p in ("maps", "chunks", "sdpa")
            }
            keys, values = (torch.empty(1, 1, length, d) for d in (width, value_width))
            taken = chosen(keys, keys, values, None, None, None, "cpu")
            result["rows"].append(dict(shape=name, length=length, dtype=str(dtype), taken=taken, **ratios))
            print(f"| {name} | {length} | {dtype} | {taken} | {' | '.join(map(str, ratios.values()))} |", flush=True)
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
