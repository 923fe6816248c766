"""Scores, tables, plots and comparisons of evaluations, from the files that they left and nothing else.

An evaluation's folder holds eval.json (what was asked, of which model), answers.jsonl, and what is made here of them:
scores.json, plots/, response/ in the form of the benchmark's own scorer, comparison.json.
"""

import glob
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from errors import UserError
from files import read_json, read_json_lines, write_json
from needle_eval import mm_niah, mmneedle, plots, pope
from needle_eval.mmneedle import write_responses
from needle_eval.statistics import mean_over_seeds, paired_over_seeds


class Benchmark(NamedTuple):
    """How a benchmark is scored: rows to scores, scores of models by name to lines, a row to right or wrong."""

    score: Callable
    table: Callable
    judge: Callable


BENCHMARKS = {
    "mmneedle": Benchmark(mmneedle.score, mmneedle.table, mmneedle.judge),
    "pope": Benchmark(
        pope.score_pope, pope.pope_table, lambda row: pope.parse_pope(row["response"]) == row["ground_truth"]
    ),
    "mm-niah": Benchmark(
        mm_niah.score_mm_niah,
        mm_niah.mm_niah_table,
        lambda row: mm_niah.score_answer(row["response"], row["ground_truth"]) == 1,
    ),
}


def slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name.removeprefix("./").removeprefix("runs/").removeprefix("assets/").strip("/"))


def read_rows(folder: Path) -> list[dict]:
    """All answers of a folder. Raises UserError where some are still missing."""
    if not (folder / "answers.jsonl").is_file():
        raise UserError(f"{folder}: holds no answers.jsonl: give a folder that eval_mmnih.py wrote")
    count, lines = read_json(folder / "eval.json").get("questions"), read_json_lines(folder / "answers.jsonl")
    if count not in (None, len(lines)):
        raise UserError(f"{folder}: {len(lines):,} answers to {count:,} questions: run the evaluation again to end it")
    return lines


def score_folder(folder: Path, skip_none: bool) -> tuple[dict, dict]:
    """eval.json and the scores of a folder; writes scores.json, plots/ and the official response files."""
    record, rows = read_json(folder / "eval.json"), read_rows(folder)
    told = {key: value for key, value in record.items() if key not in ("device", "processes")} | {
        "skip_none": skip_none
    }
    if record["benchmark"] == "mmneedle":
        scores = mmneedle.score(rows, skip_none)
        write_responses(mmneedle.answers(rows), folder / "response", slug(record["model"]))
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
        what = f"MMNeedle's questions, protocol {config['protocol']}, data {config['data']}"
        plots.draw_side_by_side(by_name, folders[-1] / "plots" / "accuracy.png", what)
        return [*lines, *mmneedle.table(by_name, ranked=config["protocol"] == "rank")]
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
            rows = [mmneedle.answers(part) for part in rows]
        found.append(mmneedle.compare(*rows, BENCHMARKS[benchmark].judge))
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
