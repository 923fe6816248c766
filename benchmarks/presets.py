"""The cost of each differential preset: parameters at PaliGemma 3b's size, and time relative to standard attention.

    python benchmarks/presets.py

Time is process time of forward + backward of the included model with LoRA on a batch of needle questions, with all
presets interleaved in one process with one thread: the median over rounds of the ratio to standard attention in the
same round.
"""

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from adapters import new_lora  # noqa: E402
from data import loader, make_data  # noqa: E402
from differential_attention import PRESETS, differential_parameters, unfreeze_differential  # noqa: E402
from errors import UserError  # noqa: E402
from finetune_original import Config as Finetune  # noqa: E402
from modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration  # noqa: E402
from processing_paligemma import PaliGemmaProcessor  # noqa: E402


@dataclass
class Config:
    rounds: int = 15  # timed rounds, after one that is not counted
    batch_size: int = 8  # needle questions per batch
    output: str = str(ROOT / "benchmarks" / "results" / "presets.json")


def parameters_at_3b(preset: str) -> int:
    """Trainable parameters in the decoder of PaliGemma 3b, or of PaliGemma 2 3b where one kv head is too few."""
    text = (
        GemmaConfig(hidden_size=2304, num_hidden_layers=26, num_key_value_heads=4) if preset == "v1" else GemmaConfig()
    )
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text), preset)
    unfreeze_differential(model)
    return sum(p.numel() for p in differential_parameters(model).values() if p.requires_grad)


def variant(preset: str | None):
    model = PaliGemmaForConditionalGeneration.from_pretrained(ROOT / "assets" / "paligemma-nano", differential=preset)
    adapted = new_lora(Finetune(), model.requires_grad_(False))
    unfreeze_differential(model)
    return adapted.train()


def seconds(model, batch) -> float:
    model.zero_grad(set_to_none=True)
    began = time.process_time()
    model(**batch).loss.backward()
    return time.process_time() - began


def main():
    config = tyro.cli(Config, use_underscores=True)
    torch.set_num_threads(1)
    processor = PaliGemmaProcessor.from_pretrained(ROOT / "assets" / "paligemma-nano")
    source, _ = make_data(Finetune())
    ((_, batch),) = loader(source, processor, [[(0, i) for i in range(config.batch_size)]], with_suffix=True)
    variants = {"standard": variant(None)}
    for preset in PRESETS:
        try:
            variants[preset] = variant(preset)
        except UserError as error:
            print(f"not timed: {error}")
    times = {name: [] for name in variants}
    for _ in range(config.rounds + 1):
        for name, model in variants.items():
            times[name].append(seconds(model, batch))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "presets": {},
    }
    result |= {"rounds": config.rounds, "standard_seconds": round(statistics.median(times["standard"][1:]), 4)}
    for preset, row in PRESETS.items():
        ratios = [a / b for a, b in zip(times.get(preset, []), times["standard"], strict=False)][1:]
        entry = {"parameters": parameters_at_3b(preset), "exact": row.exact}
        if ratios:
            low, _, high = statistics.quantiles(ratios, n=4)
            entry |= {"time": round(statistics.median(ratios), 3), "quartiles": [round(low, 3), round(high, 3)]}
        result["presets"][preset] = entry
        exact, cost = "yes" if row.exact else "no", f"{entry['time']:.2f}" if ratios else "-"
        print(f"| `{preset}` | {row.formula} | {exact} | {entry['parameters']:,} | {cost} |")
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
