"""Evaluate any model of this repository on MMNeedle, MM-NIAH (needle in a haystack) or POPE.

    python eval_mmnih.py --model=runs/original_seed0                      # haystacks of the included images
    python eval_mmnih.py --model assets/paligemma-nano runs/original_seed0 runs/diff_seed0      # side by side
    python eval_mmnih.py --model=google/paligemma-3b-pt-224 --data=MMNEEDLE --protocol=official # the released benchmark
    python eval_mmnih.py --benchmark=pope --data=POPE/output/coco --image_folder=COCO/val2014
    python eval_mmnih.py --compare runs/original_seed0 runs/diff_seed0    # paired tests on the same questions
    python eval_mmnih.py --compare "runs/original_seed*" "runs/diff_seed*"                      # over seeds
    torchrun --nproc-per-node=4 eval_mmnih.py --model=...

eval.json and scores.json of a folder name the benchmark: `mmneedle` is arXiv 2406.11230 (also with other images in its
schema), `mm-niah` is arXiv 2406.07230, a different benchmark, and `pope` is arXiv 2305.10355. An interrupted evaluation
is resumed.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from msgspec import Meta

from differential_attention import knock_out
from errors import UserError, one_line_errors
from files import MESSAGE_LENGTH, check_no_other_flags, check_ranges, one_line, remove, write_json
from machine import choose_dtype, choose_workers, make_accelerator, out_of_memory_as
from models import classes_of
from needle_eval.folder import fill_defaults, make_record, open_folder, output_folder
from needle_eval.needle_attention import measure_needle_attention
from needle_eval.questions import Question
from needle_eval.report import BENCHMARKS, compare, report
from needle_eval.runner import Answerer, answer_questions, mark_too_long

NonNegative, Positive = Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=1)]
Size = Annotated[int, Meta(ge=1, le=1000)]


@dataclass
class Config:
    # --- model
    model: tuple[str, ...] = ("assets/paligemma-nano",)  # hub ids, model folders or run folders, side by side
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU that has it
    batch_size: Positive = 64  # questions answered at once
    workers: Annotated[int, Meta(ge=-1)] = -1  # processes that load images; -1: none on a CPU, 4 on a GPU
    knockout: bool = False  # set lambda to 0 in every differential layer, to see what the second map contributes
    # --- questions
    benchmark: Literal["mmneedle", "pope", "mm-niah"] = "mmneedle"  # MMNeedle 2406.11230, POPE, MM-NIAH 2406.07230
    data: str = "haystack"  # haystack, haystack:IMAGES (a folder or jsonl with captions), or the benchmark's folder
    split: str = ""  # split of haystack images; empty: test_style for the included pool, test for other images
    # POPE, MM-NIAH: folder of the images that the questions refer to
    image_folder: str = ""
    protocol: Literal["finetuned", "official", "rank", "quadrant", "detect"] = "finetuned"  # MMNeedle's question
    prefix: str = ""  # text put before every prompt
    images: tuple[Size, ...] = (1,)  # MMNeedle: images per question
    grids: tuple[Size, ...] = ()  # cells per side of an image; empty: 2 4, or 2 for quadrant
    needles: tuple[Size, ...] = (1,)  # captions per question
    # MMNeedle: positives, and as many negatives, per setting (0: the benchmark's own number); POPE and MM-NIAH:
    # questions per split or task (0: all)
    samples: NonNegative = 0
    per_cell: NonNegative = 0  # take this many positives of every cell instead of the first ones in the file
    # side of a cell of generated haystacks in pixels; 0: 64 for the included pool, 256 for other images
    cell: Annotated[int, Meta(ge=0, le=4096)] = 0
    seed: int = 0  # seed of the generated haystacks
    # --- output
    attention: NonNegative = 0  # measure attention on the needle for this many positives per setting
    skip_none: bool = False  # leave broken questions out of the denominators, as MMNeedle's own scorer does
    output_dir: str = ""  # empty: eval/ of the run folder, else runs/eval/MODEL
    overwrite: bool = False  # delete earlier answers and start again
    # --- without a model
    score: tuple[str, ...] | None = None  # folders of answers to score and plot again
    # two folders of answers or runs to compare, or two quoted patterns that each match several seeds
    compare: tuple[str, ...] | None = None


def check_flags(config: Config, benchmark: ModuleType):
    """Raise UserError for values that are out of range, and for flags that the benchmark would ignore."""
    check_ranges(config)
    if not config.model:
        raise UserError("--model: give at least one hub id, model folder or run folder")
    others = {flag for other in BENCHMARKS.values() for flag in other.FLAGS} - set(benchmark.FLAGS)
    for field in fields(config):
        if field.name in others and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name}: does not apply to --benchmark={config.benchmark}: leave it out")


def evaluate(config: Config, accelerator: Accelerator, name: str, questions: list[Question]) -> Path:
    """Answer `questions` with the model `name`. Returns the folder of its eval.json and answers.jsonl."""
    # --- questions that do not fit the model's context
    benchmark = BENCHMARKS[config.benchmark]
    folder = output_folder(config, benchmark, name)
    dtype, _ = choose_dtype(config.dtype, accelerator.device)
    model_class, processor_class = classes_of(name)
    processor = processor_class.from_pretrained(name)
    if config.protocol == "detect" and not processor.answers_boxes:
        raise UserError(f"--protocol=detect: {name} has no location tokens: use another protocol")
    limit = model_class.config_class.from_pretrained(name).text_config.max_position_embeddings
    marked = mark_too_long(questions, processor, limit)
    too_long = [new for new, old in zip(marked, questions, strict=True) if new is not old]
    if too_long and not benchmark.LONG_QUESTIONS_ARE_WRONG:
        first, more = too_long[0], len(too_long) - 1
        raise UserError(f"{first.id} and {more:,} other questions do not fit: {first.error}")
    record = make_record(config, benchmark, marked, name, processor, dtype, accelerator)

    # --- load the model before any file is made or deleted, since loading may fail
    model = model_class.from_pretrained(name, dtype, accelerator.device)
    if config.knockout:
        knock_out(model)
    lock = None  # held until the answers are complete
    if accelerator.is_main_process:
        lock = open_folder(folder, record, config.overwrite)
        print(*describe(config, benchmark, record, marked), sep="\n", flush=True)
    accelerator.wait_for_everyone()

    # --- answer
    workers = choose_workers(config.workers, accelerator.device)
    answerer = Answerer(model, processor, accelerator, dtype, config.batch_size, workers)
    with out_of_memory_as("lower --batch_size"):
        answer_questions(answerer, marked, folder / "answers.jsonl", benchmark.is_correct, progress=folder.name)
    if accelerator.is_main_process and config.attention:
        remove(folder / "attention.json")
        try:
            write_json(folder / "attention.json", measure_needle_attention(answerer, marked, config.attention))
        except torch.OutOfMemoryError as error:  # explicit maps need more memory than answers
            reason = one_line(error)[:MESSAGE_LENGTH]
            print(f"attention is not measured: the GPU is out of memory: lower --images ({reason})", flush=True)
    accelerator.wait_for_everyone()
    if lock is not None:
        lock.release()
    return folder


def describe(config: Config, benchmark: ModuleType, record: dict, questions: list[Question]) -> list[str]:
    """Lines to print about the run, with the first prompt."""
    pixels, tokens = record["image_size"], record["image_tokens"]
    lines = [
        f"{record['model']}: benchmark {config.benchmark}, {len(questions):,} questions, {record['decoding']} answers, "
        f"{pixels} px in {tokens:,} tokens per image, {record['dtype']} on {record['device']}, weights "
        f"{record['weights']}",
        f"first prompt: {questions[0].prompt[:300]!r}",
    ]
    return lines + (benchmark.describe(config, pixels, tokens) if hasattr(benchmark, "describe") else [])


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    comparisons = Path(config.output_dir or "runs/comparisons")
    if config.compare is not None:
        if len(config.compare) != 2:
            raise UserError(f"--compare takes two runs or two quoted patterns, not {len(config.compare)}")
        check_no_other_flags(config, "compare", allowed=("output_dir",))
        print(*compare(*config.compare, comparisons), sep="\n")
        return
    if config.score is not None:
        if not config.score:
            raise UserError("--score: give at least one folder of answers")
        check_no_other_flags(config, "score", allowed=("skip_none", "output_dir"))
        folders = [Path(folder) for folder in dict.fromkeys(config.score)]
        print(*report(folders, config.skip_none, comparisons), sep="\n")
        return
    benchmark = BENCHMARKS[config.benchmark]
    check_flags(config, benchmark)
    config = fill_defaults(config, benchmark)
    accelerator = make_accelerator()
    with accelerator.main_process_first():  # it may build haystacks, which the other processes then find
        questions = benchmark.load_questions(config)
    if not questions:
        raise UserError(f"{config.data}: holds no question for these settings")
    folders = [evaluate(config, accelerator, name, questions) for name in dict.fromkeys(config.model)]
    if accelerator.is_main_process:
        print(
            *report(folders, config.skip_none, comparisons),
            *(f"\nanswers, scores, plots: {f}" for f in folders),
            sep="\n",
        )


if __name__ == "__main__":
    main()
