"""Scores, tables, figures and comparisons of evaluations, computed from the files in their folders."""

import contextlib
import glob
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Annotated

import msgspec

from errors import UserError
from files import read_typed, write_json, writing
from needle_eval import mm_niah, mmneedle, plots, pope
from needle_eval.folder import changed_fields, read_answer_rows, read_record, slug
from needle_eval.statistics import MIN_SEEDS, mcnemar_exact, mean_over_seeds, paired_difference, paired_over_seeds, rate

# A benchmark is a module with load_questions(config), is_correct(row), score(rows), format_table(scores_by_model) and
# write_official(rows, folder, model_name). ANSWER_ROW is the type of its answer rows, FLAGS are the flags that not all
# benchmarks read, NAME_FLAGS those whose values name its folders. HAS_CELLS: scores are drawn as maps of cells, and for
# several models side by side. LONG_QUESTIONS_ARE_WRONG: one that does not fit the model counts as wrong instead of
# ending the evaluation. Optional: complete_flags(config), prepare_rows(rows), describe(config, image_size,
# num_image_tokens).
BENCHMARKS: dict[str, ModuleType] = {"mmneedle": mmneedle, "pope": pope, "mm-niah": mm_niah}
NAME_LENGTH = 120  # characters of the models' names in a figure's file name
NOT_FINAL = ("best-", "step-", "knockout-")  # prefixes of evaluations of other weights than those of final/
MACHINE = ("device", "processes")  # fields of eval.json that scores.json leaves out


# ---- one evaluation
def open_record(folder: Path) -> tuple[dict, ModuleType]:
    """eval.json of a folder, and the benchmark that it names."""
    record = read_record(folder)
    if record["benchmark"] not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(f"{folder / 'eval.json'}: benchmark {record['benchmark']!r} is unknown: {known} are known")
    return record, BENCHMARKS[record["benchmark"]]


def prepare_rows(rows: list[dict], benchmark: ModuleType) -> list[dict]:
    """Answer rows in the form used for scoring and comparing, one for each question of the benchmark."""
    return getattr(benchmark, "prepare_rows", list)(rows)


def score_folder(folder: Path, skip_none: bool) -> tuple[dict, dict]:
    """eval.json and the scores of a folder; writes scores.json, plots/ and the official response files.

    The returned scores have two more keys for the table: "decoding", and "attention" if it was measured.
    """
    record, benchmark = open_record(folder)
    raw = read_answer_rows(folder, benchmark.ANSWER_ROW)
    rows = prepare_rows(raw, benchmark)
    scores = benchmark.score([row for row in rows if not (skip_none and row["response"] is None)])
    with writing(folder / "response"):
        benchmark.write_official(rows, folder / "response", slug(model_name(record)))
    if benchmark.HAS_CELLS:
        plots.draw_haystacks(scores, folder / "plots", figure_title(folder, record))
    attention = read_attention(folder / "attention.json")
    broken = [f"{row['id']}: {row['error']}" for row in raw if "error" in row]
    written = {key: value for key, value in record.items() if key not in MACHINE} | {"skip_none": skip_none}
    written |= {"broken": broken, "scores": scores} | ({"attention on the needle": attention} if attention else {})
    write_json(folder / "scores.json", written)
    return record, scores | {"decoding": record["decoding"]} | ({"attention": attention} if attention else {})


def model_name(record: dict) -> str:
    """The model of an evaluation, marked if its lambda was set to 0."""
    return record["model"] + (", lambda 0" if record.get("knockout") else "")


def figure_title(folder: Path, record: dict) -> str:
    """The model, its training seed if known, and the benchmark, protocol and data."""
    config, seed = record["config"], ""
    with contextlib.suppress(UserError):
        seed = f" (seed {seed_of(folder)})"
    protocol, data = config.get("protocol"), config.get("data", "")
    return f"{model_name(record)}{seed}: {record['benchmark']}, protocol {protocol}, {data}"


class NeedleAttention(msgspec.Struct):
    """The needle's share of the attention in one setting: the mean of each layer over n questions."""

    n: Annotated[int, msgspec.Meta(ge=1)]
    even: float
    share: list[float]


def read_attention(file: Path) -> dict[str, dict] | None:
    """attention.json, by setting, or None if the file does not exist."""
    if not file.exists():
        return None
    measured = read_typed(file, dict[str, NeedleAttention], "delete it, or measure again with --overwrite=True")
    return msgspec.to_builtins(measured)


def report(folders: list[Path], skip_none: bool, comparisons: Path) -> list[str]:
    """Lines to print: the settings, then the table of all folders side by side.

    If the benchmark HAS_CELLS, accuracy is drawn into plots/ of each folder, and of several folders into `comparisons`.
    """
    scored = [score_folder(folder, skip_none) for folder in folders]
    record = scored[0][0]
    if any(changed_fields(record, other, ("benchmark", "config")) for other, _ in scored):
        raise UserError(f"{', '.join(map(str, folders))}: answer different questions and cannot be compared")
    names = [slug(model_name(other)) for other, _ in scored]
    if len(set(names)) < len(names):  # the same model in two folders
        names = [str(folder) for folder in folders]
    scores_by_model = {name: scores for name, (_, scores) in zip(names, scored, strict=True)}
    benchmark, config = BENCHMARKS[record["benchmark"]], record["config"]
    line = f"benchmark {record['benchmark']}, data {config.get('data', '')}, prefix {config.get('prefix', '')!r}"
    line += f", protocol {config['protocol']}" if "protocol" in config else ""
    line += ", broken questions skipped" if skip_none else ""
    lines = [line, *benchmark.format_table(scores_by_model)]
    if benchmark.HAS_CELLS:
        title = f"MMNeedle's questions, protocol {config.get('protocol')}, data {config.get('data', '')}"
        for folder, (name, scores), (other, _) in zip(folders, scores_by_model.items(), scored, strict=True):
            figure = folder / "plots" / "accuracy.png"
            plots.draw_side_by_side({name: scores}, figure, figure_title(folder, other))
        if len(folders) > 1:
            figure = comparisons / f"{'-'.join(slug(name) for name in names)[:NAME_LENGTH]}-accuracy.png"
            plots.draw_side_by_side(scores_by_model, figure, title)
            lines.append(f"\nside by side: {figure}")
    return lines


# ---- one arm against the other
def compare(first: str, second: str, comparisons: Path) -> list[str]:
    """Lines to print that compare two runs, or two patterns of runs over the same seeds, question by question; writes
    them into `comparisons` as JSON."""
    pairs = pair_folders(first, second)
    compared = [compare_folders(*folders) for folders in pairs]
    lines = []
    for (one, other), groups in zip(pairs, compared, strict=True):
        lines.append(
            f"\n{other} against {one}: difference of right answers in points, 95 % score interval for paired rates"
        )
        lines += [format_comparison(name, found) for name, found in groups.items()]
    written = {"pairs": [[str(a), str(b)] for a, b in pairs], "by pair": compared}
    if len(pairs) > 1:
        written["over seeds"] = compare_over_seeds(compared)
        tested = "mean, 95 % t interval; paired t test"
        few = f"mean; interval and test need {MIN_SEEDS} seeds"
        lines.append(f"\nover {len(pairs)} seeds: {tested if len(pairs) >= MIN_SEEDS else few}")
        lines += [format_seeds(name, over) for name, over in written["over seeds"].items()]
    file = comparisons / f"{slug(second)}-against-{slug(first)}.json"
    with writing(file):
        comparisons.mkdir(parents=True, exist_ok=True)
    write_json(file, written)
    return [*lines, f"\nwritten: {file}"]


def compare_folders(first: Path, second: Path) -> dict[str, dict]:
    """`compare_answers` of two folders. Raises UserError if they answer different questions."""
    (record, benchmark), (other, _) = map(open_record, (first, second))
    changed = changed_fields(record, other, ("benchmark", "config", "decoding"))
    if changed:
        raise UserError(f"{first} and {second}: differ in {', '.join(changed)} and cannot be compared")
    rows = [prepare_rows(read_answer_rows(folder, benchmark.ANSWER_ROW), benchmark) for folder in (first, second)]
    return compare_answers(*rows, benchmark)


def compare_answers(first: list[dict], second: list[dict], benchmark: ModuleType) -> dict[str, dict]:
    """By setting and kind: the rates of two models on the same questions, their paired difference and McNemar's p.

    Raises UserError when the ids differ, or the prompts or ground truths of the same id.
    """
    first, second = ({row["id"]: row for row in rows} for rows in (first, second))
    if set(first) != set(second):
        raise UserError(
            f"{len(set(first) ^ set(second))} questions are in only one of the runs ({min(set(first) ^ set(second))}): "
            "compare answers to the same questions"
        )
    asked = ("prompt", "ground_truth")
    other = [name for name in first if any(first[name].get(key) != second[name].get(key) for key in asked)]
    if other:
        raise UserError(
            f"{len(other)} questions differ between the runs ({other[0]}): compare answers to the same questions, of "
            "one protocol, one seed and the same images"
        )
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for name, row in first.items():
        groups.setdefault(group_of(row), []).append((benchmark.is_correct(row), benchmark.is_correct(second[name])))
    return {name: compare_pairs(pairs) for name, pairs in groups.items()}


def group_of(row: dict) -> str:
    """The name under which an answer row is compared: its setting and whether the needle is present."""
    return f"{row['setting']} {row['kind']}" if "kind" in row else row["setting"]


def compare_pairs(pairs: list[tuple[bool, bool]]) -> dict:
    """Rates, difference and McNemar's test from pairs of (right in the first run, right in the second)."""
    counts = Counter(pairs)
    both, only_a, only_b = counts[True, True], counts[True, False], counts[False, True]
    return {
        "first": rate(both + only_a, len(pairs)),
        "second": rate(both + only_b, len(pairs)),
        "difference": paired_difference(both, only_a, only_b, counts[False, False]),
        "only first": only_a,
        "only second": only_b,
        "p": mcnemar_exact(only_a, only_b),
    }


def compare_over_seeds(compared: list[dict]) -> dict[str, dict]:
    """By setting: the mean rate of each arm over the seeds, and the paired difference."""
    if any(set(groups) != set(compared[0]) for groups in compared):
        raise UserError("the seeds were evaluated in different settings: evaluate all with the same flags")
    over = {}
    for name in compared[0]:
        arms = [[groups[name][arm]["rate"] for groups in compared] for arm in ("first", "second")]
        over[name] = dict(zip(("first", "second"), map(mean_over_seeds, arms), strict=True))
        over[name]["difference"] = paired_over_seeds(*arms)
    return over


# ---- which folders
def pair_folders(first: str, second: str) -> list[tuple[Path, Path]]:
    """Answer folders of both arms, paired by seed if there are several. Raises UserError if their seeds differ."""
    found = [[pattern] if Path(pattern).exists() else sorted(glob.glob(pattern)) for pattern in (first, second)]
    for pattern, paths in zip((first, second), found, strict=True):
        if not paths:
            raise UserError(f"{pattern}: there is no such folder: give a run, a folder of answers, or a quoted pattern")
    runs = [Path(path) for paths in found for path in paths]
    shared = set.intersection(*({file.parent.name for file in run.glob("eval/*/answers.jsonl")} for run in runs))
    shared = {name for name in shared if not name.startswith(NOT_FINAL)}
    arms = [[answer_folder(Path(path), shared) for path in paths] for paths in found]
    if [len(arm) for arm in arms] == [1, 1]:
        return [(arms[0][0], arms[1][0])]
    seeds = [{seed_of(folder): folder for folder in arm} for arm in arms]
    for pattern, arm, of_arm in zip((first, second), arms, seeds, strict=True):
        if len(of_arm) < len(arm):
            raise UserError(f"{pattern}: matches several runs of one seed: give a pattern with one run of each seed")
    if set(seeds[0]) != set(seeds[1]):
        both = " and ".join(str(sorted(s)) for s in seeds)
        raise UserError(f"{first} and {second}: seeds {both} cannot be paired: evaluate the same seeds of both arms")
    return [(seeds[0][seed], seeds[1][seed]) for seed in sorted(seeds[0])]


def answer_folder(path: Path, shared: set[str]) -> Path:
    """`path` itself if it holds answers, else the one evaluation of a run folder, or the only one that is `shared`."""
    if (path / "answers.jsonl").exists():
        return path
    folders = sorted(file.parent for file in path.glob("eval/*/answers.jsonl"))
    if len(folders) > 1 and len(shared) == 1:
        return path / "eval" / next(iter(shared))
    if len(folders) != 1:
        holds = ", ".join(map(str, folders)) or "no answers"
        raise UserError(f"{path}: holds {holds}: give the one folder of answers, or evaluate the run first")
    return folders[0]


class SeededConfig(msgspec.Struct):
    seed: int


class SeededRun(msgspec.Struct):
    """The fields of run.json that pairing needs."""

    config: SeededConfig


def seed_of(folder: Path) -> int:
    """The training seed of the run that was evaluated."""
    for run in folder.parents:
        if (run / "run.json").exists():
            return read_typed(run / "run.json", SeededRun).config.seed
    raise UserError(f"{folder}: is not inside a run folder, so its seed is unknown: compare two folders only")


# ---- lines
def format_comparison(name: str, found: dict) -> str:
    mean, low, high = (100 * found["difference"][key] for key in ("mean", "low", "high"))
    return (
        f"{name:24}{100 * found['first']['rate']:7.1f} ->{100 * found['second']['rate']:6.1f}  {mean:+6.1f} "
        f"[{low:+.1f}, {high:+.1f}]  only first {found['only first']}, only second {found['only second']}, "
        f"McNemar p = {found['p']:.3g}, n = {found['first']['n']}"
    )


def format_seeds(name: str, over: dict) -> str:
    def interval(found: dict) -> str:
        ends = "" if found["low"] is None else f" [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"
        return f"{100 * found['mean']:.1f}{ends}"

    first, second, difference = (interval(over[key]) for key in ("first", "second", "difference"))
    n, p = over["first"]["n"], over["difference"]["p"]
    test = f", p = {p:.3g}" if p is not None else ", the same in every seed" if n >= MIN_SEEDS else ""
    return f"{name:24}{first} -> {second}, difference {difference}{test}, n = {n} seeds"
