"""Group run folders into arms over seeds, collect what their evaluations measured, and compare the arms.

Everything is read from the files of the runs; no model is loaded. Differences between arms are tested over seeds;
questions of different seeds are never pooled.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plots
from errors import UserError
from needle_eval.folder import read_answer_rows
from needle_eval.mmneedle_prompts import ABSENT
from needle_eval.plots import Difference
from needle_eval.questions import normalise
from needle_eval.report import NOT_FINAL, compare_folders, group_of, open_record, prepare_rows
from needle_eval.statistics import (
    ALPHA,
    MIN_SEEDS,
    format_p,
    format_signed,
    has_spread,
    holm,
    mean_of_independent,
    mean_over_seeds,
    paired_t,
    rate,
)
from run_folder import RESUMABLE_FIELDS, comparable, read_metrics, read_run_record, read_samples

NOT_AN_ARM = RESUMABLE_FIELDS | {"seed", "differential.seed", "processes"}  # fields that runs of one arm may differ in
TRAINING = "training"  # name of the last evaluation during training


# ---- reading runs
@dataclass
class Run:
    """A run folder."""

    folder: Path
    seed: int
    record: dict[str, Any]
    metrics: list[dict]
    samples: list[dict]
    arm: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether its last weights were saved."""
        return (self.folder / "final" / "run.json").is_file()

    @property
    def is_differential(self) -> bool:
        """Whether it has differential attention."""
        return bool(self.record["config"].get("differential"))

    @property
    def step(self) -> int:
        """The last update that it logged."""
        return max((line["step"] for line in self.metrics), default=0)


Arms = dict[str, dict[int, Run]]  # by arm and seed
Rates = dict[str, dict[int, dict[str, dict]]]  # by arm, seed and group of questions: `statistics.rate`


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not. Raises UserError for a folder that is not a run, or a damaged file."""
    record = read_run_record(folder)
    logs = [
        read(folder) if (folder / name).exists() else []
        for name, read in (("metrics.jsonl", read_metrics), ("samples.jsonl", read_samples))
    ]
    return Run(folder, record["config"].get("seed", 0), record, *logs)


def read_arms(folders: Sequence[Path]) -> Arms:
    """The runs by arm and seed; the baseline, an arm without differential attention, is first.

    Runs with the same arm in run.json but different hyperparameters become different arms, and the differing
    hyperparameters are added to their names. Raises UserError if two runs have the same arm and seed.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    settings = [{k: v for k, v in comparable(run.record).items() if k not in NOT_AN_ARM} for run in runs]
    arms: Arms = {}
    for run, own in sorted(zip(runs, settings, strict=True), key=lambda pair: pair[0].is_differential):
        same = [s for other, s in zip(runs, settings, strict=True) if other.record.get("arm") == run.record.get("arm")]
        different = [name for name in own if any(s.get(name) != own[name] for s in same)]
        run.arm = ", ".join([str(run.record.get("arm")), *(f"{name} {own[name]}" for name in different)])
        if run.seed in arms.setdefault(run.arm, {}):
            raise UserError(
                f"{arms[run.arm][run.seed].folder} and {run.folder}: are the same arm at the same seed: leave one out"
            )
        arms[run.arm][run.seed] = run
    return {arm: dict(sorted(arms[arm].items())) for arm in arms}


def all_runs(arms: Arms) -> list[Run]:
    """Every run, arm by arm."""
    return [run for of_arm in arms.values() for run in of_arm.values()]


def finished(arms: Arms) -> Arms:
    """The arms without their unfinished runs."""
    found = {arm: {seed: run for seed, run in of_arm.items() if run.is_finished} for arm, of_arm in arms.items()}
    return {arm: of_arm for arm, of_arm in found.items() if of_arm}


# ---- measurements
@dataclass
class Measured:
    """Results of one evaluation: a folder in eval/ of every run, or the last evaluation during training."""

    name: str
    rates: Rates
    chance: dict[str, float]  # by group, the rate of a uniform guess
    headline: list[str]  # the groups whose unweighted mean is the headline: those with the needle
    # by arm, seed and group, the difference from the first arm at that seed: {"mean", "low", "high"}, fractions
    differences: dict[str, dict[int, dict[str, dict]]]
    folders: dict[str, dict[int, Path]] = field(default_factory=dict)  # of the evaluation, by arm and seed

    @property
    def groups(self) -> list[str]:
        """The groups of questions, the same in every run."""
        return list(next(iter(next(iter(self.rates.values())).values())))

    def mean(self, arm: str, seed: int) -> float:
        """The headline of a run, a fraction."""
        return statistics.fmean(self.rates[arm][seed][group]["rate"] for group in self.headline)


def measure_training(arms: Arms) -> Measured | None:
    """The last evaluation during training of the finished runs, on the sets that all of them have."""
    last: Rates = {}
    for run in all_runs(finished(arms)):
        ended = {name: points[-1][1:] for name, points in plots.accuracy_curves(run.metrics).items()}
        last.setdefault(run.arm, {})[run.seed] = {name: rate(*counts) for name, counts in ended.items()}
    every = [groups for of_arm in last.values() for groups in of_arm.values()]
    shared = [name for name in (every[0] if every else ()) if all(name in groups for groups in every)]
    if not shared:
        return None
    samples = [sample for run in all_runs(arms) for sample in run.samples]
    absent = {s["set"] for s in samples if normalise(s["answer"]) == ABSENT}
    headline = [name for name in shared if name not in absent] or shared
    rates = {arm: {s: {n: groups[n] for n in shared} for s, groups in seeds.items()} for arm, seeds in last.items()}

    def subtract(arm: str, seed: int, baseline: str) -> dict[str, dict]:
        ours, theirs = rates[arm][seed], rates[baseline][seed]
        return {n: {"mean": ours[n]["rate"] - theirs[n]["rate"], "low": None, "high": None} for n in shared}

    return Measured(TRAINING, rates, plots.chances(samples), headline, compare_with_first(rates, subtract))


def compare_with_first(
    of_runs: dict[str, dict[int, Any]], subtract: Callable[[str, int, str], dict[str, dict]]
) -> dict[str, dict[int, dict[str, dict]]]:
    """`subtract(arm, seed, first arm)` for every arm but the first, at the seeds that it shares with the first one."""
    first, *others = of_runs
    return {
        arm: {seed: subtract(arm, seed, first) for seed in of_runs[arm] if seed in of_runs[first]} for arm in others
    }


def measure_evaluations(arms: Arms, notes: list[str]) -> list[Measured]:
    """Every evaluation that all finished runs have. Adds to `notes` which evaluations were left out and why."""
    runs = all_runs(finished(arms))
    names = dict.fromkeys(file.parent.name for run in runs for file in sorted(run.folder.glob("eval/*/eval.json")))
    found = []
    for name in names:
        lacking = [run.folder for run in runs if not (run.folder / "eval" / name / "answers.jsonl").exists()]
        if lacking:
            notes.append(f"evaluation {name}: {', '.join(map(str, lacking))} has none")
            continue
        folders = {
            arm: {s: run.folder / "eval" / name for s, run in runs.items()} for arm, runs in finished(arms).items()
        }
        try:
            found.append(measure_evaluation(name, folders))
        except UserError as error:
            notes.append(str(error))
    return sorted(found, key=rank_of_evaluation)


def measure_evaluation(name: str, folders: dict[str, dict[int, Path]]) -> Measured:
    """The rates of one evaluation. Raises UserError for incomplete answers, and for answers to different questions."""
    rates: Rates = {}
    chance: dict[str, float] = {}
    for arm, of_arm in folders.items():
        for seed, folder in of_arm.items():
            rows, benchmark = read_answers(folder)
            right: dict[str, list[bool]] = {}
            for row in rows:
                right.setdefault(group_of(row), []).append(benchmark.is_correct(row))
                if row.get("kind") == "positive":
                    images, grid, needles = row["shape"]
                    chance[group_of(row)] = (images * grid**2) ** -needles
            rates.setdefault(arm, {})[seed] = {group: rate(sum(bits), len(bits)) for group, bits in right.items()}
    every = [list(groups) for of_arm in rates.values() for groups in of_arm.values()]
    if not every[0] or any(set(groups) != set(every[0]) for groups in every):
        raise UserError(f"evaluation {name}: the runs answer different settings: evaluate all with the same flags")
    headline = [group for group in every[0] if not group.endswith(" negative")] or every[0]

    def subtract(arm: str, seed: int, baseline: str) -> dict[str, dict]:
        compared = compare_folders(folders[baseline][seed], folders[arm][seed])
        return {group: of_group["difference"] for group, of_group in compared.items()}

    return Measured(name, rates, chance, headline, compare_with_first(folders, subtract), folders)


def read_answers(folder: Path) -> tuple[list[dict], Any]:
    """The answer rows of an evaluation, in the form used for scoring, and its benchmark."""
    _, benchmark = open_record(folder)
    return prepare_rows(read_answer_rows(folder, benchmark.ANSWER_ROW), benchmark), benchmark


def rank_of_evaluation(measured: Measured) -> tuple[bool, bool, bool, str]:
    """Sort key that puts the main evaluation first: generated answers before ranked ones, which are a different
    metric; final/ before best/, which was chosen on test rows, and before checkpoints and knocked-out models; the
    protocol of training before others."""
    folder = next(iter(next(iter(measured.folders.values())).values()))
    record, _ = open_record(folder)
    is_final = not measured.name.startswith(NOT_FINAL)
    return record["decoding"] == "ranked", not is_final, record["config"].get("protocol") != "finetuned", measured.name


# ---- one arm against the baseline
@dataclass
class Contrast:
    """Arm minus baseline, seed by seed, in percentage points; group "" is the headline, the mean of its groups."""

    arm: str
    baseline: str
    seeds: list[int]
    differences: dict[str, list[Difference]]  # by group, one per seed
    holm_p: float | None = None  # of the headline, adjusted for the number of arms

    def test(self, group: str) -> dict | None:
        """The paired t test over the seeds; None for fewer than three, and if all differences are equal: without a
        spread over the seeds there is nothing to test against."""
        values = [found.mean for found in self.differences[group]]
        return paired_t(values) if len(values) >= MIN_SEEDS and has_spread(values) else None

    def pooled(self, group: str) -> Difference:
        """The mean over the seeds, with its 95 % interval if there is a `test`."""
        test = self.test(group)
        mean = statistics.fmean(found.mean for found in self.differences[group])
        return Difference("all seeds", mean, *((test["low"], test["high"]) if test else (None, None)))


def contrasts(measured: Measured) -> list[Contrast]:
    """Every arm against the first one, over the seeds that both have; p values of headlines adjusted by Holm."""
    first = next(iter(measured.rates))
    found = []
    for arm, of_seeds in measured.differences.items():
        differences: dict[str, list[Difference]] = {}
        for seed, of_groups in of_seeds.items():
            label = f"seed {seed}"
            points = {group: to_points(label, difference) for group, difference in of_groups.items()}
            points[""] = average(label, [points[group] for group in measured.headline])
            for group, difference in points.items():
                differences.setdefault(group, []).append(difference)
        if of_seeds:
            found.append(Contrast(arm, first, list(of_seeds), differences))
    tested = [contrast for contrast in found if contrast.test("")]
    for contrast, p in zip(tested, holm([contrast.test("")["p"] for contrast in tested]), strict=True):
        contrast.holm_p = p
    return found


def to_points(label: str, difference: dict) -> Difference:
    """A difference of fractions in percentage points."""
    ends = (None if difference[end] is None else 100 * difference[end] for end in ("low", "high"))
    return Difference(label, 100 * difference["mean"], *ends)


def average(label: str, parts: Sequence[Difference]) -> Difference:
    """The mean of independent differences, with its interval if all of them have one."""
    if any(part.low is None for part in parts):
        return Difference(label, statistics.fmean(part.mean for part in parts), None, None)
    return Difference(label, *mean_of_independent([(part.mean, part.low, part.high) for part in parts]))


# ---- the answer
def answer(arms: Arms, measured: Measured | None) -> str:
    """The result of the runs in text, one sentence for each arm against the first, with its interval."""
    runs = all_runs(arms)
    if measured is None:
        done = sum(run.is_finished for run in runs)
        return f"No answer yet: {done} of {len(runs)} runs are finished and evaluated."
    compared = contrasts(measured)
    if not compared:
        arm = next(iter(measured.rates))
        return f"{describe_arm(measured, arm)}; there is no second arm at the same seeds to compare it with."
    return " ".join(describe_contrast(measured, found) for found in compared)


def describe_arm(measured: Measured, arm: str) -> str:
    """The headline of one arm: the mean over its seeds with its interval, or the rate of its only run."""
    seeds = list(measured.rates[arm])
    over = mean_over_seeds([measured.mean(arm, seed) for seed in seeds])
    text = f"{arm} answers {percent(over['mean'])} of {headline_text(measured)}"
    if over["low"] is not None:
        text += f" (95 % interval {percent(over['low'])} to {percent(over['high'])}, {over['n']} seeds)"
    else:
        text += f" ({'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))})"
    known = [measured.chance[group] for group in measured.headline if group in measured.chance]
    return text + (f", where a uniform guess reaches {percent(statistics.fmean(known))}" if known else "")


def describe_contrast(measured: Measured, found: Contrast) -> str:
    """The difference of two arms, its interval, and what follows from it."""
    test, pooled, seeds = found.test(""), found.pooled(""), found.differences[""]
    first, second = (
        percent(statistics.fmean(measured.mean(arm, s) for s in found.seeds)) for arm in (found.baseline, found.arm)
    )
    text = f"{found.arm} answers {second} and {found.baseline} {first} of {headline_text(measured)}: "
    text += f"{format_signed(pooled.mean)} points"
    if test is None:
        if len(seeds) == 1 and seeds[0].low is not None:
            low, high = format_signed(seeds[0].low), format_signed(seeds[0].high)
            text += f" (95 % interval {low} to {high} over the questions of this seed)"
        if len(seeds) >= MIN_SEEDS:
            return f"{text} in each of {len(seeds)} seeds, which leaves no spread to test against."
        return f"{text}; {len(seeds)} seed{'s' * (len(seeds) > 1)} cannot show a difference, {MIN_SEEDS} are needed."
    p = f"p {'' if test['p'] < 0.001 else '= '}{format_p(test['p'])}"
    if found.holm_p != test["p"]:
        p += f", {format_p(found.holm_p)} by Holm's method over the arms"
    low, high = format_signed(test["low"]), format_signed(test["high"])
    text += f" (95 % interval {low} to {high}, paired t test over {test['n']} seeds, {p})"
    if found.holm_p >= ALPHA:
        return f"{text}: no difference is shown."
    return f"{text}: {found.arm} is {'better' if test['mean'] > 0 else 'worse'}."


def headline_text(measured: Measured) -> str:
    """What the headline counts."""
    count = len(measured.headline)
    where = "the runs' last evaluation" if measured.name == TRAINING else f"evaluation {measured.name}"
    mean = "" if count == 1 else f", mean of {count} settings"
    return f"the questions right ({where}{mean})"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
