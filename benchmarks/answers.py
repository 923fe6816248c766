"""Answers per second of the needle evaluation against transformers' own PaliGemma: same weights, questions and batches.

    python benchmarks/answers.py

Both sides read the stitched images from disk, preprocess, encode and generate greedily, with and without a LoRA adapter
(a random one, since the text does not matter). The answers must be equal before anything is timed. Both sides run in
turn in one process with one thread; the result is the median over rounds of the ratio of process times.
`benchmarks/gpu.py` runs the same on a GPU.
"""

import json
import platform
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import peft
import torch
import transformers
import tyro
from accelerate import Accelerator
from peft import PeftModel
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from compare import seconds  # noqa: E402

from adapters import new_lora  # noqa: E402
from finetune_original import Config as Finetune  # noqa: E402
from haystack import ImagePool, read_pool  # noqa: E402
from modeling_gemma import PaliGemmaForConditionalGeneration  # noqa: E402
from needle_eval.mmneedle_build import write_haystacks  # noqa: E402
from needle_eval.mmneedle_prompts import Setting  # noqa: E402
from needle_eval.mmneedle_release import read_questions  # noqa: E402
from needle_eval.questions import Question  # noqa: E402
from needle_eval.runner import Answerer, answer_batches, plan_batches  # noqa: E402
from processing_paligemma import PaliGemmaProcessor  # noqa: E402

MIN_EQUAL_ON_GPU = 0.98  # required share of equal answers: rounding may decide between two close logits
GPU_WORKERS = 4  # processes that load images for our side on a GPU, as in eval_mmnih.py
NANO = ROOT / "assets" / "paligemma-nano"


@dataclass
class Config:
    rounds: int = 9  # timed rounds, after one that is not counted
    samples: int = 64  # images; each is asked for an object that it shows and for one that it does not
    batch_size: int = 32  # questions answered at once
    protocol: str = "detect"  # a task that the included model can do without fine-tuning
    device: Literal["cpu", "cuda"] = "cpu"
    output: str = str(ROOT / "benchmarks" / "results" / "answers.json")


def ours(answerer: Answerer, batches: list[list[Question]]) -> list[str]:
    with torch.inference_mode():
        return [row["response"] for rows in answer_batches(answerer, batches) for row in rows]


def theirs(model: torch.nn.Module, processor: transformers.ProcessorMixin, batches: list[list[Question]]) -> list[str]:
    """As on the model card: every image of every prompt is opened, preprocessed and encoded."""
    texts = []
    for batch in batches:
        images = [[Image.open(path).convert("RGB") for path in question.images] for question in batch]
        prompts = ["<image>" + question.prompt for question in batch]
        inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=batch[0].max_new_tokens, do_sample=False)
        texts += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def model_pair(lora: bool, folder: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and theirs, with the same weights and, if `lora`, the same adapter, as after fine-tuning."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(NANO)
    their_model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).eval()
    if lora:
        adapted = new_lora(Finetune(), model)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns about a base without a hub entry
            adapted.save_pretrained(folder, save_embedding_layers=False)
        their_model = PeftModel.from_pretrained(their_model, folder).eval()
    return model.eval(), their_model


def measure(config: Config, lora: bool, questions: list[Question], folder: str) -> dict:
    model, their_model = (side.to(config.device) for side in model_pair(lora, folder))
    on_cpu = config.device == "cpu"
    processor, accelerator = PaliGemmaProcessor.from_pretrained(NANO), Accelerator(cpu=on_cpu)
    answerer = Answerer(model, processor, accelerator, torch.float32, workers=0 if on_cpu else GPU_WORKERS)
    their_processor = transformers.AutoProcessor.from_pretrained(NANO, backend="pil")
    batches = plan_batches(questions, config.batch_size)
    pairs = list(zip(ours(answerer, batches), theirs(their_model, their_processor, batches), strict=True))
    equal = sum(mine == other for mine, other in pairs) / len(pairs)
    if equal < (1 if on_cpu else MIN_EQUAL_ON_GPU):
        sys.exit(f"{equal:.1%} of the answers are equal: there is nothing to time")
    rounds = []
    for _ in range(config.rounds):
        mine = seconds(lambda: ours(answerer, batches), config.device)
        other = seconds(lambda: theirs(their_model, their_processor, batches), config.device)
        rounds.append([len(questions) / mine, len(questions) / other])
    low, median, high = statistics.quantiles([mine / other for mine, other in rounds], n=4)
    mine, other = (round(statistics.median(column), 1) for column in zip(*rounds, strict=True))
    return {
        "ours": mine,
        "transformers": other,
        "ratio": round(median, 2),
        "quartiles": [round(low, 2), round(high, 2)],
    } | ({} if on_cpu else {"equal": round(equal, 4)})


def rows(config: Config) -> Iterator[tuple[str, dict]]:
    with tempfile.TemporaryDirectory() as folder:
        pool, setting = ImagePool(read_pool(splits=("test_style",))), Setting(1, 4)
        write_haystacks(pool, Path(folder), setting, config.samples, seed=0, cell=64)
        questions = read_questions(folder, setting, config.protocol, config.samples)
        for name, lora in (("untuned", False), ("with LoRA", True)):
            yield f"answers per second, {name}", measure(config, lora, questions, f"{folder}/adapter")


def main():
    config = tyro.cli(Config)
    torch.set_num_threads(1)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, process time, float32",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "questions": 2 * config.samples,
        "batch_size": config.batch_size,
        "protocol": config.protocol,
    }
    result |= rows(config)
    Path(config.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
