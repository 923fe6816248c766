"""Answers per second of the needle evaluation beside transformers' own PaliGemma: same weights, questions and batches.

    python benchmarks/answers.py

Both read the stitched pictures from disk, preprocess, encode and generate greedily; the answers must be equal before
anything is timed. Both in one process, turn by turn, one thread, process time; median over rounds of the ratio.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import transformers
import tyro
from accelerate import Accelerator
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from answering import Answerer, answer_batches, plan_batches  # noqa: E402
from haystack import PicturePool, Question, read_pool  # noqa: E402
from mmneedle import Setting, build, read_questions  # noqa: E402
from modeling_gemma import PaliGemmaForConditionalGeneration  # noqa: E402
from processing_paligemma import PaliGemmaProcessor  # noqa: E402

NANO = ROOT / "assets" / "paligemma-nano"


@dataclass
class Config:
    rounds: int = 9  # timed rounds, after one that is not counted
    samples: int = 64  # pictures, each searched for a thing that is there and for one that is not
    batch_size: int = 32  # questions answered at once
    protocol: str = "detect"  # what the embedded model can do untuned
    output: str = str(ROOT / "benchmarks" / "results" / "answers.json")


def ours(answerer: Answerer, batches: list[list[Question]]) -> list[str]:
    return [row["response"] for rows in answer_batches(answerer, batches) for row in rows]


def theirs(model, processor, batches: list[list[Question]]) -> list[str]:
    """The model card's way: every picture of every prompt opened, preprocessed and encoded."""
    texts = []
    for batch in batches:
        images = [[Image.open(path).convert("RGB") for path in question.images] for question in batch]
        prompts = ["<image>" + question.prompt for question in batch]
        inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=batch[0].max_new_tokens, do_sample=False)
        texts += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def main():
    config = tyro.cli(Config)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pool, setting = PicturePool(read_pool(splits=("test_style",))), Setting(1, 4)
        build(pool, Path(folder), setting, config.samples, seed=0, cell=64)
        questions = read_questions(folder, setting, config.protocol, config.samples)
        batches = plan_batches(questions, config.batch_size)
        model, processor = (c.from_pretrained(NANO) for c in (PaliGemmaForConditionalGeneration, PaliGemmaProcessor))
        answerer = Answerer(model, processor, Accelerator(cpu=True), torch.float32)
        their_model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).eval()
        their_processor = transformers.AutoProcessor.from_pretrained(NANO, backend="pil")
        if ours(answerer, batches) != theirs(their_model, their_processor, batches):
            sys.exit("the answers differ: there is nothing to time")
        rounds = []
        for _ in range(config.rounds):
            marks = [time.process_time()]
            ours(answerer, batches)
            marks.append(time.process_time())
            theirs(their_model, their_processor, batches)
            marks.append(time.process_time())
            rounds.append([len(questions) / (b - a) for a, b in zip(marks, marks[1:], strict=False)])
    ratios = sorted(mine / other for mine, other in rounds)
    quartiles = statistics.quantiles(ratios, n=4)
    told = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, process time",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "questions": len(questions),
        "batch_size": config.batch_size,
        "protocol": config.protocol,
        "answers per second": dict(
            zip(("ours", "transformers"), map(statistics.median, zip(*rounds, strict=True)), strict=True)
        ),
        "speed ratio": {"median": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]]},
    }
    Path(config.output).write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
