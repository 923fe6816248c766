"""Needle in a haystack for vision-language models: MMNeedle, POPE or MM-NIAH, any model of this repository.

    python eval_mmnih.py --model=runs/original_seed0                      # haystacks of the embedded pictures
    python eval_mmnih.py --model assets/paligemma-nano runs/original_seed0 runs/diff_seed0      # side by side
    python eval_mmnih.py --model=google/paligemma-3b-pt-224 --data=MMNEEDLE --protocol=official # the released benchmark
    python eval_mmnih.py --benchmark=pope --data=POPE --pictures=COCO/val2014
    python eval_mmnih.py --compare runs/original_seed0 runs/diff_seed0    # the same questions, tested pair by pair
    python eval_mmnih.py --compare "runs/original_seed*" "runs/diff_seed*"                      # over seeds
    torchrun --nproc-per-node=4 eval_mmnih.py --model=...

Which benchmark ran stands in every file: `mmneedle` is arXiv 2406.11230 (and other pictures in its schema),
`mm-niah` is arXiv 2406.07230, another one, `pope` is arXiv 2305.10355. An interrupted evaluation continues.
"""

import hashlib
import json
import math
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from filelock import FileLock

from checkpoint import locate, resolve_run
from diagnostics import answer_attention, needle_share
from errors import UserError, one_line_errors
from files import open_image, read_json, write_json
from haystack import ImagePool, read_captioned_images, read_pool
from modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from needle_eval import mm_niah, pope
from needle_eval.mmneedle import build, cache_folder, candidates, read_questions, settings
from needle_eval.questions import Question
from needle_eval.report import BENCHMARKS, compare, report, slug
from needle_eval.runner import Answerer, answer, encode_pictures, mark_too_long
from processing_paligemma import PaliGemmaProcessor
from run_folder import choose_dtype, device_name, git_commit, make_accelerator, portable_path, versions


@dataclass
class Config:
    # --- what answers
    model: tuple[str, ...] = ("assets/paligemma-nano",)  # hub ids, model folders or run folders, side by side
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a card that has it
    batch_size: int = 64  # questions answered at once
    workers: int = 0  # processes that read pictures
    # --- what is asked
    benchmark: Literal["mmneedle", "pope", "mm-niah"] = "mmneedle"  # MMNeedle 2406.11230, POPE, MM-NIAH 2406.07230
    data: str = "haystack"  # haystack, haystack:PICTURES (a folder or jsonl with captions), or the benchmark's folder
    split: str = ""  # pictures of haystacks; empty: test_style of the embedded pool, test of others
    pictures: str = ""  # POPE, MM-NIAH: the folder of the pictures that the questions name
    protocol: Literal["finetuned", "official", "rank", "quadrant", "detect"] = "finetuned"  # MMNeedle's question
    prefix: str = ""  # put before every prompt
    images: tuple[int, ...] = (1,)  # MMNeedle: pictures a question
    grids: tuple[int, ...] = (2, 4)  # cells along a side of a picture
    needles: tuple[int, ...] = (1,)  # captions a question
    samples: int = 0  # positives, and negatives, a setting; 0: the benchmark's own number
    per_cell: int = 0  # so many positives of every cell instead of the first ones
    cell: int = 0  # side of a built cell in pixels; 0: 64 of the embedded pool, 256 of other pictures
    seed: int = 0  # of built haystacks
    # --- what comes out
    attention: int = 0  # so many positives a setting to measure attention on the needle with
    skip_none: bool = False  # leave broken questions out of the denominators, as MMNeedle's own scorer does
    output_dir: str = ""  # empty: eval/ of the run folder, else runs/eval/MODEL
    overwrite: bool = False  # answer anew what was answered already
    # --- without a model
    score: tuple[str, ...] | None = None  # folders of answers: score and draw them anew
    compare: tuple[str, ...] | None = (
        None  # two folders of answers or runs, or two quoted patterns of several seeds each
    )


def check_flags(config: Config):
    """Raise UserError for what no run can have or would pass over in silence."""
    least = {"batch_size": 1, "workers": 0, "samples": 0, "per_cell": 0, "cell": 0, "attention": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise UserError(f"--{name}={getattr(config, name)}: must be at least {low}")
    if not config.model:
        raise UserError("--model: names no model: give hub ids, model folders or run folders")
    if config.skip_none and config.benchmark != "mmneedle":
        raise UserError("--skip_none: is MMNeedle's rule, the other benchmarks count every question")
    if config.attention and (config.benchmark != "mmneedle" or config.protocol in ("detect", "quadrant")):
        raise UserError("--attention: needs a protocol of MMNeedle that answers a place: finetuned, official or rank")


# ---- questions
def make_questions(config: Config, accelerator: Accelerator) -> list[Question]:
    """The questions of a benchmark, in their own order. Raises UserError when its files are missing or empty."""
    if config.benchmark == "pope":
        if config.data == "haystack" or not config.pictures:
            raise UserError("POPE needs --data, the folder of its files, and --pictures, that of COCO val2014")
        questions = pope.read_pope(config.data, config.pictures, prefix=config.prefix, limit=config.samples or None)
    elif config.benchmark == "mm-niah":
        questions = mm_niah_questions(config)
    else:
        asked = settings(config.images, config.grids, config.needles)
        with accelerator.main_process_first():  # which builds what the others then find
            folder = mmneedle_folder(config, asked, accelerator.is_main_process)
        questions = [
            question
            for setting in asked
            for question in read_questions(
                folder, setting, config.protocol, config.samples, config.per_cell, config.prefix
            )
        ]
    if not questions:
        raise UserError(f"{config.data}: holds no question for these settings")
    check_pictures(config, questions)
    return questions


def mmneedle_folder(config: Config, asked: list, builds: bool = True) -> Path:
    """The folder of the release, or one in its schema, built of pictures once and kept: by one process at a time."""
    kind, _, source = config.data.partition(":")
    if kind != "haystack":
        return Path(config.data)
    split = config.split or ("test" if source else "test_style")
    pictures = [p for p in (read_captioned_images(source) if source else read_pool()) if p.split == split]
    if not source and split == "test_concept":
        pictures = [p for p in pictures if p.style == "noto"]  # the style that is never trained, as in test_style
    if not pictures:
        raise UserError(f"--split={split}: {config.data} has no such pictures")
    cell, samples = config.cell or (256 if source else 64), config.samples or 1000
    name = f"{Path(source).resolve().stem if source else 'embedded'}-{split}"
    folder = cache_folder(Path("runs/haystacks"), name, pictures, config.seed, samples, cell)
    if builds:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # evaluations of two models may start together
            pool = ImagePool(pictures)
            for setting in asked:
                build(pool, folder, setting, samples, config.seed, cell)
    return folder


def mm_niah_questions(config: Config) -> list[Question]:
    """The benchmark's questions. Raises UserError where `config.data` names no folder or file of the release."""
    if config.data.partition(":")[0] == "haystack":
        raise UserError(f"--benchmark=mm-niah --data={config.data}: give the folder or a file of the released MM-NIAH")
    questions = mm_niah.read_mm_niah(config.data, config.pictures or config.data, limit=config.samples or None)
    return [replace(q, prompt=config.prefix + mm_niah.flatten_prompt(q.prompt)) for q in questions]


def check_pictures(config: Config, questions: list[Question]):
    """Raise UserError when there is none of the pictures at all; single ones that lack are told with their answers."""
    paths = {path for question in questions for path in question.images}
    if paths and not any(Path(path).is_file() for path in paths):
        raise UserError(
            f"{min(paths)}: none of {len(paths):,} pictures is there: "
            + ("give their folder by --pictures" if config.benchmark != "mmneedle" else "complete the data folder")
        )


# ---- a model's answers
def evaluate(config: Config, accelerator: Accelerator, name: str, questions: list[Question]) -> Path:
    """Answer `questions` with the model `name`; the folder of its eval.json, answers.jsonl and scores.json."""
    folder = output_folder(config, name)
    dtype, _ = choose_dtype(config.dtype, accelerator.device)
    processor = PaliGemmaProcessor.from_pretrained(name)
    limit = PaliGemmaConfig.from_pretrained(name).text_config.max_position_embeddings
    questions = fitting(config, questions, processor, limit)
    record = record_of(config, accelerator, name, dtype, processor, len(questions))
    model = PaliGemmaForConditionalGeneration.from_pretrained(name, dtype, accelerator.device)
    if accelerator.is_main_process:  # nothing is made or thrown away for a model that does not load
        open_folder(folder, record, config.overwrite)
        print(describe(config, record, questions), flush=True)
    accelerator.wait_for_everyone()
    answerer = Answerer(model, processor, accelerator, dtype, config.batch_size, config.workers)
    if config.benchmark == "mmneedle" and config.protocol == "rank":
        answerer.candidates = {str(s): candidates(s) for s in settings(config.images, config.grids, config.needles)}
    answer(answerer, questions, folder / "answers.jsonl", BENCHMARKS[config.benchmark].judge)
    if accelerator.is_main_process and config.attention:
        write_json(folder / "attention.json", attention_on_needles(answerer, questions, config.attention))
    accelerator.wait_for_everyone()
    return folder


def fitting(config: Config, questions: list[Question], processor: PaliGemmaProcessor, limit: int) -> list[Question]:
    """Questions that do not fit the model are refused; MM-NIAH's, of up to 72k tokens, count as wrong."""
    marked = mark_too_long(questions, processor, limit)
    long = [new for new, old in zip(marked, questions, strict=True) if new is not old]
    if long and config.benchmark != "mm-niah":
        raise UserError(f"{long[0].id} and {len(long) - 1:,} other questions do not fit: {long[0].fields['error']}")
    return marked


def describe(config: Config, record: dict, questions: list[Question]) -> str:
    """What runs, in one paragraph, with the first prompt."""
    pixels, tokens = record["image_size"], record["image_tokens"]
    told = (
        f"{record['model']}: benchmark {config.benchmark}, {len(questions):,} questions, {record['decoding']} answers, "
        f"{pixels} px in {tokens:,} tokens a picture, {record['dtype']} on {record['device']}, weights "
        f"{record['weights']}\nfirst prompt: {questions[0].prompt[:300]!r}"
    )
    if config.benchmark == "mmneedle":
        patches = math.isqrt(tokens)
        cells = ", ".join(f"{n}x{n}: {pixels // n} px, {patches / n:g} patches" for n in config.grids)
        told = f"{told}\nprotocol {config.protocol}; a cell's side: {cells}"
        if max(config.images) > 1:
            told += "\nseveral pictures a prompt: the base models saw one, so this is outside their pre-training"
    return told


def output_folder(config: Config, name: str) -> Path:
    """eval/ of the run folder that `name` is, or of the one it lies in; runs/eval/MODEL for any other model."""
    told = [config.benchmark]
    if config.benchmark == "mmneedle":
        told += [config.protocol, re.sub(r"[^\w.]+", "_", config.data.rstrip("/"))[-40:]]
        told += [config.split] if config.split else []
    what = "-".join(told)
    if config.output_dir:
        return Path(config.output_dir) / (slug(name) if len(config.model) > 1 else "")
    _, adapter = resolve_run(name)
    if adapter is None:
        return Path("runs/eval") / slug(name) / what
    home = adapter.parent  # final, best, or a checkpoint
    run = home.parent.parent if home.parent.name == "checkpoints" else home.parent
    if not (run / "run.json").exists():  # an adapter that lies anywhere
        return Path("runs/eval") / slug(name) / what
    return run / "eval" / (what if home.name == "final" else f"{home.name}-{what}")


def record_of(config: Config, accelerator: Accelerator, name: str, dtype: torch.dtype, processor, count: int) -> dict:
    """What eval.json says: benchmark, protocol, questions, decoding, model and its weights, versions."""
    asked = ["benchmark", "data", "pictures", "prefix", "samples", "seed"]
    if config.benchmark == "mmneedle":
        asked += ["split", "protocol", "images", "grids", "needles", "per_cell", "cell"]
    return {
        "benchmark": config.benchmark,
        "model": portable_path(name),
        "weights": weights_digest(name),
        "questions": count,
        "config": json.loads(json.dumps({key: getattr(config, key) for key in asked})),
        "decoding": "ranked" if (config.benchmark, config.protocol) == ("mmneedle", "rank") else "greedy",
        "image_size": processor.image_size,
        "image_tokens": processor.num_image_tokens,
        "dtype": str(dtype),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "commit": git_commit(),
    }


def weights_digest(name: str) -> str:
    """Changes with the trained weights: what was trained by contents, the base by its files' names, sizes and times."""
    base, adapter = resolve_run(name)
    digest = hashlib.sha256()
    if adapter is not None:
        files = ("adapter_config.json", "adapter_model.safetensors")
        for file in (*(adapter / name for name in files), adapter.parent / "differential.safetensors"):
            digest.update(file.read_bytes() if file.is_file() else b"")
    for file in sorted(locate(base).glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def open_folder(folder: Path, record: dict, overwrite: bool):
    """Make the folder, or take up an interrupted evaluation. Raises UserError where it holds another one."""
    file = folder / "eval.json"
    if overwrite:
        if file.exists():  # figures and response files of settings that are not asked again
            for name in ("response", "plots"):
                shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("answers.jsonl", "eval.json", "scores.json", "attention.json", "comparison.json"):
            (folder / name).unlink(missing_ok=True)
    elif file.exists():
        old = read_json(file)
        changed = [
            k for k in ("benchmark", "model", "weights", "questions", "config", "dtype") if old.get(k) != record[k]
        ]
        if "config" in changed:
            ours, theirs = record["config"], old.get("config", {})
            changed += [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]
        if changed:
            raise UserError(
                f"{folder} holds another evaluation (other {', '.join(changed)}): give another --output_dir, or "
                "answer anew with --overwrite=True"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}): give another --output_dir") from error
    write_json(file, record)


def attention_on_needles(answerer: Answerer, questions: list[Question], count: int) -> dict[str, dict]:
    """By setting: what the answer's tokens pay to the needle's patches, as a share of the pictures', by layer.

    The mean over the first `count` positives of the true answer's tokens, `even` what a blind layer would pay
    (arXiv 2507.15875, its second table; here for every layer).
    """
    found = {}
    for setting in dict.fromkeys(q.setting for q in questions):
        asked = [q for q in questions if q.setting == setting and q.fields["kind"] == "positive"]
        shares = [share for q in asked[:count] if (share := attention_on_needle(answerer, q)) is not None]
        if shares:
            images, grid, _ = asked[0].fields["shape"]
            mean = torch.stack(shares).mean(0).tolist()
            even = 1 / (images * grid**2)
            found[setting] = {"n": len(shares), "even": even, "share": [round(x, 4) for x in mean]}
    return found


def attention_on_needle(answerer: Answerer, question: Question) -> torch.Tensor | None:
    """The needle's share in every layer, the mean over the true answer's tokens: [layers]. None for a broken question
    and for several needles."""
    images, grid, needles = question.fields["shape"]
    if "error" in question.fields or needles > 1:
        return None
    try:
        pixels = {path: answerer.processor.pixels(open_image(path)) for path in question.images}
        row = answerer.processor.encode(question.prompt, question.truth, images)
    except UserError:  # its answer row names it
        return None
    features = encode_pictures(answerer, pixels)
    batch = {key: tensor.to(answerer.accelerator.device) for key, tensor in answerer.processor.pad([row]).items()}
    batch |= {"pixel_values": None, "image_features": torch.stack([features[path] for path in question.images])}
    paid = answer_attention(answerer.model, batch)[:, 0].float()  # [layers, T, M N]
    place = tuple(int(n) - 1 for n in question.truth.split(", "))
    return needle_share(paid, place, images, grid).mean(1)


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    if config.compare is not None:
        if len(config.compare) != 2:
            raise UserError(f"--compare takes two runs or two quoted patterns, not {len(config.compare)}")
        print(*compare(*config.compare), sep="\n")
        return
    if config.score is not None:
        if not config.score:
            raise UserError("--score: names no folder of answers")
        print(*report([Path(folder) for folder in config.score], config.skip_none), sep="\n")
        return
    check_flags(config)
    accelerator = make_accelerator()
    questions = make_questions(config, accelerator)
    folders = [evaluate(config, accelerator, name, questions) for name in config.model]
    if accelerator.is_main_process:
        print(*report(folders, config.skip_none), *(f"\nanswers, scores, plots: {f}" for f in folders), sep="\n")


if __name__ == "__main__":
    main()
