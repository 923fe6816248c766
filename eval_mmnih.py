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

import glob
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from filelock import FileLock

import mm_niah
import plots
import pope
import scoring
from answering import Answerer, answer, encode_pictures, mark_too_long
from checkpoint import locate, read_json, resolve_run, whole_or_nothing, write_json
from diagnostics import answer_attention, needle_share
from errors import UserError, one_line_errors
from haystack import PicturePool, Question, read_pictures, read_pool
from intervals import mean_over_seeds, paired_over_seeds
from mmneedle import build, cache_folder, candidates, read_questions, settings, write_responses
from modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor, open_image
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
    score: tuple[str, ...] = ()  # folders of answers: score and draw them anew
    compare: tuple[str, ...] = ()  # two folders of answers or runs, or two quoted patterns of several seeds each


def check_flags(config: Config):
    """Raise UserError for a number that no run can have, and for a model left out."""
    least = {"batch_size": 1, "workers": 0, "samples": 0, "per_cell": 0, "cell": 0, "attention": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise UserError(f"--{name}={getattr(config, name)}: must be at least {low}")
    if not config.model:
        raise UserError("--model: names no model: give hub ids, model folders or run folders")


# ---- questions
def make_questions(config: Config, accelerator: Accelerator) -> list[Question]:
    """The questions of a benchmark, in their own order. Raises UserError when its files are missing or empty."""
    if config.benchmark == "pope":
        if config.data == "haystack" or not config.pictures:
            raise UserError("POPE needs --data, the folder of its files, and --pictures, that of COCO val2014")
        questions = pope.read_pope(config.data, config.pictures, prefix=config.prefix, limit=config.samples or None)
    elif config.benchmark == "mm-niah":
        questions = mm_niah_questions(config, accelerator)
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
    pictures = [p for p in (read_pictures(source) if source else read_pool()) if p.split == split]
    if not source and split == "test_concept":
        pictures = [p for p in pictures if p.style == "noto"]  # the style that is never trained, as in test_style
    if not pictures:
        raise UserError(f"--split={split}: {config.data} has no such pictures")
    cell, samples = config.cell or (256 if source else 64), config.samples or 1000
    name = f"{Path(source).stem or 'embedded'}-{split}"
    folder = cache_folder(Path("runs/haystacks"), name, pictures, config.seed, samples, cell)
    if builds:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):  # evaluations of two models may start together
            pool = PicturePool(pictures)
            for setting in asked:
                build(pool, folder, setting, samples, config.seed, cell)
    return folder


def mm_niah_questions(config: Config, accelerator: Accelerator) -> list[Question]:
    """The benchmark's questions, or with --data=haystack those of a small generated set."""
    if config.data != "haystack":
        questions = mm_niah.read_mm_niah(config.data, config.pictures or config.data, limit=config.samples or None)
    else:
        pictures, rows = read_pool(splits=("test_style",)), config.samples or 15
        folder = cache_folder(Path("runs/haystacks"), "mm-niah-mini", pictures, config.seed, rows)
        with accelerator.main_process_first():
            if not folder.exists():
                with whole_or_nothing(folder) as new:
                    mm_niah.make_mini_set(new, pictures, config.seed, rows)
        questions = mm_niah.read_mm_niah(folder, folder / "images")
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
    record = record_of(config, accelerator, name, dtype, len(questions))
    if accelerator.is_main_process:
        open_folder(folder, record, config.overwrite)
        print(describe(config, record, processor, questions), flush=True)
    accelerator.wait_for_everyone()
    model = PaliGemmaForConditionalGeneration.from_pretrained(name, dtype, accelerator.device)
    answerer = Answerer(model, processor, accelerator, dtype, config.batch_size, config.workers)
    if config.benchmark == "mmneedle" and config.protocol == "rank":
        answerer.candidates = {str(s): candidates(s) for s in settings(config.images, config.grids, config.needles)}
    answer(answerer, questions, folder / "answers.jsonl", BENCHMARKS[config.benchmark].judge)
    if accelerator.is_main_process and config.attention and config.benchmark == "mmneedle":
        write_json(folder / "attention.json", attention_on_needles(answerer, questions, config.attention))
    accelerator.wait_for_everyone()
    return folder


def fitting(config: Config, questions: list[Question], processor: PaliGemmaProcessor, limit: int) -> list[Question]:
    """Questions that do not fit the model are refused; MM-NIAH's, of up to 72k tokens, count as wrong."""
    marked = mark_too_long(questions, processor, limit)
    long = [new for new, old in zip(marked, questions, strict=True) if new is not old]
    if long and config.benchmark != "mm-niah":
        raise UserError(f"{long[0].id} and {len(long) - 1:,} other questions do not fit: {long[0].told['error']}")
    return marked


def describe(config: Config, record: dict, processor: PaliGemmaProcessor, questions: list[Question]) -> str:
    """What runs, in one paragraph, with the first prompt."""
    told = (
        f"{record['model']}: benchmark {config.benchmark}, {len(questions):,} questions, {record['decoding']} answers, "
        f"{processor.image_size} px in {processor.num_image_tokens:,} tokens a picture, {record['dtype']} on "
        f"{record['device']}, weights {record['weights']}\nfirst prompt: {questions[0].prompt[:300]!r}"
    )
    if config.benchmark == "mmneedle":
        patches = math.isqrt(processor.num_image_tokens)
        cells = ", ".join(f"{n}x{n}: {processor.image_size // n} px, {patches / n:g} patches" for n in config.grids)
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
    return run / "eval" / (what if home.name == "final" else f"{home.name}-{what}")


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.removeprefix("./").removeprefix("runs/").removeprefix("assets/").strip("/"))


def record_of(config: Config, accelerator: Accelerator, name: str, dtype: torch.dtype, count: int) -> dict:
    """What eval.json says: benchmark, protocol, questions, decoding, model and its weights, versions."""
    watching = (
        "model",
        "batch_size",
        "workers",
        "attention",
        "skip_none",
        "output_dir",
        "overwrite",
        "score",
        "compare",
    )
    return {
        "benchmark": config.benchmark,
        "model": portable_path(name),
        "weights": weights_digest(name),
        "questions": count,
        "config": json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in watching})),
        "decoding": "ranked" if (config.benchmark, config.protocol) == ("mmneedle", "rank") else "greedy",
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
        asked = [
            q for q in questions if q.setting == setting and q.told["kind"] == "positive" and "error" not in q.told
        ]
        images, grid, needles = asked[0].told["shape"]
        if needles > 1:
            continue
        shares = []
        for question in asked[:count]:
            pixels = {path: answerer.processor.pixels(open_image(path)) for path in question.images}
            features = encode_pictures(answerer, pixels)
            row = answerer.processor.encode(question.prompt, question.truth, images)
            batch = {
                key: tensor.to(answerer.accelerator.device) for key, tensor in answerer.processor.pad([row]).items()
            }
            batch |= {"pixel_values": None, "image_features": torch.stack([features[path] for path in question.images])}
            paid = answer_attention(answerer.model, batch)[:, 0].float()  # [layers, T, M N]
            place = [int(n) - 1 for n in question.truth.split(", ")]
            shares.append(needle_share(paid, place, images, grid).mean(1))
        mean = torch.stack(shares).mean(0)
        found[setting] = {
            "n": len(shares),
            "even": 1 / (images * grid**2),
            "share": [round(x, 4) for x in mean.tolist()],
        }
    return found


# ---- scores, tables, plots: from the files alone
class Benchmark(NamedTuple):
    """How a benchmark is scored: rows to scores, scores of models by name to lines, a row to right or wrong."""

    score: Callable
    table: Callable
    judge: Callable


BENCHMARKS = {
    "mmneedle": Benchmark(scoring.score, scoring.table, scoring.judge),
    "pope": Benchmark(
        pope.score_pope, pope.pope_table, lambda row: pope.parse_pope(row["response"]) == row["ground_truth"]
    ),
    "mm-niah": Benchmark(
        mm_niah.score_mm_niah,
        mm_niah.mm_niah_table,
        lambda row: mm_niah.score_answer(row["response"], row["ground_truth"]) == 1,
    ),
}


def read_rows(folder: Path) -> list[dict]:
    """All answers of a folder. Raises UserError where some are still missing."""
    if not (folder / "answers.jsonl").is_file():
        raise UserError(f"{folder}: holds no answers.jsonl: give a folder that eval_mmnih.py wrote")
    count, lines = read_json(folder / "eval.json").get("questions"), plots.read_lines(folder / "answers.jsonl")
    if count not in (None, len(lines)):
        raise UserError(f"{folder}: {len(lines):,} answers to {count:,} questions: run the evaluation again to end it")
    return lines


def score_folder(folder: Path, skip_none: bool) -> tuple[dict, dict]:
    """eval.json and the scores of a folder; writes scores.json, plots/ and the official response files."""
    record, rows = read_json(folder / "eval.json"), read_rows(folder)
    told = {key: record[key] for key in ("benchmark", "model", "weights", "config", "decoding", "dtype")}
    told["skip_none"] = skip_none and record["benchmark"] == "mmneedle"
    if record["benchmark"] == "mmneedle":
        scores = scoring.score(rows, skip_none)
        write_responses(scoring.answers(rows), folder / "response", slug(record["model"]))
        plots.draw_haystacks(scores, folder / "plots")
    else:
        scores = BENCHMARKS[record["benchmark"]].score(rows)
    if record["benchmark"] == "mm-niah":
        write_mm_niah_outputs(rows, folder / "response", slug(record["model"]))
    attention = read_json(folder / "attention.json") if (folder / "attention.json").exists() else None
    broken = [f"{row['id']}: {row['error']}" for row in rows if "error" in row]
    write_json(
        folder / "scores.json",
        told | {"broken": broken, "scores": scores} | ({"attention on the needle": attention} if attention else {}),
    )
    return record, scores | ({"attention": attention} if attention else {})


def write_mm_niah_outputs(rows: list[dict], folder: Path, model: str):
    """One file a task, as the benchmark's own scorer reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in dict.fromkeys(row["setting"] for row in rows):
        lines = mm_niah.output_rows(row for row in rows if row["setting"] == task)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / mm_niah.output_name(model, task, "val")).write_text(text, encoding="utf-8")


def report(folders: list[Path], skip_none: bool) -> list[str]:
    """The table of all folders side by side, after what was asked and how."""
    scored = [score_folder(folder, skip_none) for folder in folders]
    benchmark = scored[0][0]["benchmark"]
    if any(record["benchmark"] != benchmark or record["config"] != scored[0][0]["config"] for record, _ in scored):
        raise UserError(f"{', '.join(map(str, folders))}: answer different questions and cannot stand side by side")
    config = scored[0][0]["config"]
    lines = [f"benchmark {benchmark}, data {config['data']}, prefix {config['prefix']!r}"]
    if benchmark == "mmneedle":
        lines[0] += f", protocol {config['protocol']}" + (", broken questions skipped" if skip_none else "")
        names = [slug(record["model"]) for record, _ in scored]
        if len(set(names)) < len(names):  # one model answered twice
            names = [str(folder) for folder in folders]
        by_name = {name: scores for name, (_, scores) in zip(names, scored, strict=True)}
        plots.draw_side_by_side(by_name, folders[-1] / "plots" / "accuracy.png")
        return [*lines, *scoring.table(by_name)]
    if benchmark == "mm-niah" and config["data"] == "haystack":
        lines[0] += ": a small generated set in its schema, no score of the benchmark"
    for record, scores in scored:
        lines += [f"\n{record['model']}", *BENCHMARKS[benchmark].table(scores)]
    return lines


# ---- one arm against the other
def compare(first: str, second: str) -> list[str]:
    """Two runs, or two patterns of runs over the same seeds, on the same questions; also into comparison.json."""
    pairs = pair_folders(first, second)
    found = []
    for one, other in pairs:
        benchmark = read_json(one / "eval.json")["benchmark"]
        rows = [read_rows(folder) for folder in (one, other)]
        if benchmark == "mmneedle":
            rows = [scoring.answers(part) for part in rows]
        found.append(scoring.compare(*rows, BENCHMARKS[benchmark].judge))
    lines = []
    for (one, other), scores in zip(pairs, found, strict=True):
        lines += [
            f"\n{other} against {one}: difference of right answers in points, 95 % interval of a paired bootstrap"
        ]
        lines += [compare_line(name, told) for name, told in scores.items()]
    told = {"pairs": [[str(a), str(b)] for a, b in pairs], "by pair": found}
    if len(pairs) > 1:
        told["over seeds"] = over_seeds(found)
        lines += [f"\nover {len(pairs)} seeds: mean, 95 % t interval; paired t test"]
        lines += [seeds_line(name, over) for name, over in told["over seeds"].items()]
    write_json(pairs[-1][1] / "comparison.json", told)
    return lines


def pair_folders(first: str, second: str) -> list[tuple[Path, Path]]:
    """Answer folders of both arms, paired by seed where there are several. Raises UserError for unequal seeds."""
    arms = [[answer_folder(Path(path)) for path in sorted(glob.glob(pattern))] for pattern in (first, second)]
    for pattern, folders in zip((first, second), arms, strict=True):
        if not folders:
            raise UserError(f"{pattern}: there is no such folder: give a run, a folder of answers, or a quoted pattern")
    if [len(arm) for arm in arms] == [1, 1]:
        return [(arms[0][0], arms[1][0])]
    seeds = [{seed_of(folder): folder for folder in arm} for arm in arms]
    if set(seeds[0]) != set(seeds[1]) or any(len(s) < len(arm) for s, arm in zip(seeds, arms, strict=True)):
        told = " and ".join(str(sorted(s)) for s in seeds)
        raise UserError(f"{first} and {second}: seeds {told} cannot be paired: evaluate the same seeds of both arms")
    return [(seeds[0][seed], seeds[1][seed]) for seed in sorted(seeds[0])]


def answer_folder(path: Path) -> Path:
    """`path` itself if it holds answers, else the one evaluation of a run folder."""
    if (path / "answers.jsonl").exists():
        return path
    found = sorted(file.parent for file in path.glob("eval/*/answers.jsonl"))
    if len(found) != 1:
        told = ", ".join(map(str, found)) or "no answers"
        raise UserError(f"{path}: holds {told}: give the one folder of answers, or evaluate the run first")
    return found[0]


def seed_of(folder: Path) -> int:
    """The training seed of the run that was evaluated."""
    for run in folder.parents:
        if (run / "run.json").exists():
            return read_json(run / "run.json")["config"]["seed"]
    raise UserError(f"{folder}: lies in no run folder, its seed is unknown: compare it alone")


def over_seeds(found: list[dict]) -> dict[str, dict]:
    told = {}
    if any(set(scores) != set(found[0]) for scores in found):
        raise UserError("the seeds were evaluated in different settings: evaluate all with the same flags")
    for name in found[0]:
        arms = [[scores[name][arm]["rate"] for scores in found] for arm in ("first", "second")]
        told[name] = dict(zip(("first", "second"), map(mean_over_seeds, arms), strict=True))
        told[name]["difference"] = paired_over_seeds(*arms)
    return told


def compare_line(name: str, told: dict) -> str:
    mean, low, high = (100 * told["difference"][key] for key in ("mean", "low", "high"))
    return (
        f"{name:24}{100 * told['first']['rate']:7.1f} ->{100 * told['second']['rate']:6.1f}  {mean:+6.1f} "
        f"[{low:+.1f}, {high:+.1f}]  only first {told['only first']}, only second {told['only second']}, "
        f"McNemar p = {told['p']:.3g}, n = {told['first']['n']}"
    )


def seeds_line(name: str, over: dict) -> str:
    def span(told: dict) -> str:
        return f"{100 * told['mean']:.1f} [{100 * told['low']:.1f}, {100 * told['high']:.1f}]"

    return (
        f"{name:24}{span(over['first'])} -> {span(over['second'])}, difference {span(over['difference'])}, "
        f"p = {over['difference']['p']:.3g}"
    )


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    if config.compare:
        if len(config.compare) != 2:
            raise UserError(f"--compare takes two runs or two quoted patterns, not {len(config.compare)}")
        print(*compare(*config.compare), sep="\n")
        return
    if config.score:
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
