"""The answer of the study and its tables, computed from the plan and the committed records. See also study_figure.py.

Study A fine-tunes a pretrained model with every attention arm and compares endpoint N, the accuracy in finding a
needle among many cells; study C does the same with a language model and codes in text; study B1 trains small decoders
from scratch and compares how many steps they need until they retrieve.
All differences are paired over seeds. In text and tables, differences of accuracy are in percentage points.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy import stats

from errors import UserError
from needle_eval.statistics import (
    ALPHA,
    MIN_SEEDS,
    bootstrap_seeds_and_items,
    d_prime,
    equivalence,
    format_bounds,
    format_interval,
    format_p,
    holm,
    log_rank,
    logistic_threshold,
    mcnemar_exact,
    paired_t,
)
from study_records import (
    ConversionRecord,
    Environment,
    Record,
    SymbolicRecord,
    analysed_seeds,
    endpoint_conditions,
    environment_of,
    hash_plan,
    points,
    record_path,
)

MARGIN = 3.0  # points: the smallest effect of interest and the margin of equivalence
NARROW_MARGIN = 2.0  # a second margin, also reported
HYPOTHESES = (("split", "standard"), ("split", "additive"), ("split", "flipped"))
KINDS = ("look-alike", "noise", "pairs")  # sources of difficulty of conditions with the needle
# B1: the first is the primary contrast, the others form one secondary family
CONTRASTS = (
    ("v1", "double_width_norm"),
    ("v1", "standard"),
    ("double_width", "v1"),
    ("double_width", "standard"),
    ("double_width_norm", "standard"),
    ("v2", "standard"),
)
NO_VALUE = "-"
ARM_COLUMNS = ["arm", "family", "trained parameters", "MFLOPs", "minutes", "seeds", "N", "- standard [95 %]"]
ARM_COLUMNS += ["- additive [95 %]", "Holm p", f"TOST p, ±{MARGIN:g}", "false alarms", "N, second map off", "verdict"]


@dataclass
class Group:
    """The records of one study in one environment."""

    section: dict[str, Any]
    environment: Environment
    records: list[Record]

    def of_arm(self, arm: str) -> dict[int, Record]:
        """The records of an arm by seed, in order; for B1, call it on a group with one number of pairs."""
        found = {record.seed: record for record in self.records if record.arm == arm}
        return {seed: found[seed] for seed in sorted(found)}

    def with_pairs(self, pairs: int) -> "Group":
        """The part of a B1 group that has this number of pairs."""
        return Group(self.section, self.environment, [r for r in self.records if r.pairs == pairs])

    def arms(self) -> list[str]:
        """The arms with records, in the order of the plan."""
        present = {record.arm for record in self.records}
        return [arm for arm in self.section["arms"] if arm in present]

    def is_complete(self, arm: str) -> bool:
        """Whether every planned run of an arm is finished. Its accuracy is shown only then: with a look at every new
        seed, a verdict could be had by stopping at the right time."""
        return not self.missing([arm])

    def missing(self, arms: Iterable[str]) -> int:
        """How many of the planned runs of these arms have no record."""
        return sum(len(set(analysed_seeds(self.section, arm)) - set(self.of_arm(arm))) for arm in arms)


def check_rule(section: dict[str, Any]) -> None:
    """Raise UserError if the rule of decision here is not the one that was planned, and so is in the plan's hash."""
    rule = {"margin": MARGIN, "hypotheses": list(map(list, HYPOTHESES)), "primary": list(CONTRASTS[0])}
    for name, value in rule.items():
        if section.get(name, value) != value:
            raise UserError(f"study.json: plans {name} {section[name]}, study_report.py has {value}: restore it")


def group_records(section: dict[str, Any], study: str, records: Sequence[Record]) -> list[Group]:
    """The records of a study, grouped by environment: first those that ran as planned, then replications.

    Runs that an amendment of the plan leaves out are left out. Raises UserError for a record of another plan, for a run
    that is not planned, and for duplicate runs.
    """
    check_rule(section)
    digest, found = hash_plan(section), {}
    for record in records:
        if record.study != study:
            continue
        where = f"{study}/{record_path(record)}"
        if record.plan != digest:
            raise UserError(f"{where}: of plan {record.plan[:12]}, not {digest[:12]}: restore that plan or delete it")
        if record.seed not in section["arms"].get(record.arm, {}).get("seeds", ()):
            raise UserError(f"{where}: arm {record.arm} with seed {record.seed} is not planned: delete it")
        if record.seed not in analysed_seeds(section, record.arm):
            continue
        group = found.setdefault(environment_of(record), {})
        if where in group:
            raise UserError(f"{where}: two records of one run on {record.device}: delete one")
        group[where] = record
    planned = {name: section[name] for name in ("device", "dtype", "threads") if name in section}

    def order(environment: Environment) -> tuple:
        as_planned = all(getattr(environment, name) == value for name, value in planned.items())
        return not as_planned, -len(found[environment]), environment

    return [Group(section, e, [found[e][key] for key in sorted(found[e])]) for e in sorted(found, key=order)]


# ---- study A: measures of one run
def knocked_out(record: ConversionRecord, conditions: Sequence[str]) -> float | None:
    """`points` with the second map switched off; None if this was not measured."""
    if not set(conditions) <= set(record.knockout):
        return None
    return 100 * statistics.fmean(record.knockout[condition].rate() for condition in conditions)


def false_alarms(record: ConversionRecord) -> float | None:
    """Mean rate, in points, at which a cell was named although the caption is absent."""
    rates = [1 - answers.rate() for condition, answers in record.answers.items() if condition.endswith(" absent")]
    return 100 * statistics.fmean(rates) if rates else None


def likelihood(record: ConversionRecord) -> float | None:
    """Mean log-probability of the right answer, in nats, over the conditions of the endpoint; None if not measured."""
    return statistics.fmean(record.log_likelihoods.values()) if record.log_likelihoods else None


def accuracy_by_cells(record: ConversionRecord) -> dict[int, float]:
    """Number of cells -> mean accuracy, a fraction, over the kinds of conditions with the needle."""
    found = {}
    for condition, answers in record.answers.items():
        cells, kind = condition.split(maxsplit=1)
        if kind in KINDS:
            found.setdefault(int(cells), []).append(answers.rate())
    return {cells: statistics.fmean(found[cells]) for cells in sorted(found)}


def slope(record: ConversionRecord) -> float | None:
    """Change of accuracy in points per doubling of the cells, by least squares on log2(cells)."""
    rates = accuracy_by_cells(record)
    if len(rates) < 2:
        return None
    return 100 * float(stats.linregress(np.log2(list(rates)), list(rates.values())).slope)


def cells_at_half(record: ConversionRecord) -> float | None:
    """log2 of the number of cells at which a logistic fit passes 50 %; None if accuracy does not cross 50 %."""
    totals = {}
    for condition, answers in record.answers.items():
        cells, kind = condition.split(maxsplit=1)
        if kind in KINDS:
            right, n = totals.get(int(cells), (0, 0))
            totals[int(cells)] = right + int(answers.bits().sum()), n + answers.n
    if len(totals) < 2:
        return None
    return logistic_threshold([math.log2(cells) for cells in totals], *zip(*totals.values(), strict=True))


def sensitivity(record: ConversionRecord) -> float | None:
    """Mean d' over the numbers of cells that were asked with and without the needle: a hit is the right cell, a false
    alarm is any cell for an absent caption."""
    found = []
    for condition, absent in record.answers.items():
        cells = condition.removesuffix(" absent")
        present = [record.answers[f"{cells} {kind}"] for kind in KINDS if f"{cells} {kind}" in record.answers]
        if condition.endswith(" absent") and present:
            hits, n = sum(int(a.bits().sum()) for a in present), sum(a.n for a in present)
            found.append(d_prime(hits, n, absent.n - int(absent.bits().sum()), absent.n))
    return statistics.fmean(found) if found else None


# ---- study A: differences over seeds
@dataclass
class Contrast:
    """Arm minus baseline over the seeds that both have, in points of endpoint N unless said otherwise."""

    arm: str
    baseline: str
    seeds: list[int]
    differences: list[float]
    holm_p: float = math.nan  # adjusted within its family

    @property
    def t(self) -> dict:
        """The paired t test with its 95 % interval."""
        return paired_t(self.differences)

    @property
    def t90(self) -> dict:
        """The same with the 90 % interval, which lies inside a margin exactly when TOST rejects at 5 %."""
        return paired_t(self.differences, 0.90)

    @property
    def significant(self) -> bool:
        """Whether Holm's test in its family rejects."""
        return self.holm_p < ALPHA


def contrast(group: Group, a: str, b: str, measure: Callable[[Record], float | None]) -> Contrast | None:
    """The differences of two arms; None if fewer than three seeds have both values."""
    of_a, of_b = group.of_arm(a), group.of_arm(b)
    values = {seed: (measure(of_a[seed]), measure(of_b[seed])) for seed in of_a if seed in of_b}
    pairs = {seed: x - y for seed, (x, y) in values.items() if x is not None and y is not None}
    if len(pairs) < MIN_SEEDS:
        return None
    return Contrast(a, b, list(pairs), list(pairs.values()))


def adjust(contrasts: Sequence[Contrast], untested: int = 0) -> None:
    """Set the Holm-adjusted p values of one family of contrasts; `untested`: members of the family without a test."""
    p_values = [c.t["p"] for c in contrasts]
    for c, p in zip(contrasts, holm(p_values + [1.0] * untested), strict=False):
        c.holm_p = p


def verdict(found: Contrast) -> str:
    """The first of the plan's verdicts that applies to a contrast with its Holm p value."""
    t, t90 = found.t, found.t90
    is_small = max(-t90["low"], t90["high"]) < MARGIN
    if found.significant and t["mean"] < 0:
        return "hurts"
    if found.significant and t["low"] > MARGIN:
        return "helps"
    if found.significant:
        return "helps, less than what matters" if is_small else "helps, size unclear"
    return "no practical difference" if is_small else "undecided"


def core_verdict(hypotheses: Sequence[Contrast]) -> str:
    """The verdict on `split` against standard attention; it credits the subtraction if all three hypotheses help."""
    verdicts = [verdict(hypothesis) for hypothesis in hypotheses]
    is_subtraction = len(verdicts) == len(HYPOTHESES) and set(verdicts) == {"helps"}
    return "helps (and it is the subtraction)" if is_subtraction else verdicts[0]


def hypotheses_of(section: dict[str, Any]) -> list[tuple[str, str]]:
    """The hypotheses whose arms are in the plan: all three in study A."""
    return [pair for pair in HYPOTHESES if set(pair) <= set(section["arms"])]


def core_contrasts(group: Group) -> list[Contrast]:
    """The hypotheses with their Holm p values. Requires that all core runs are finished."""
    measure = partial(points, conditions=endpoint_conditions(group.section))
    found = [contrast(group, a, b, measure) for a, b in hypotheses_of(group.section)]
    adjust(found)
    return found


def secondary_contrasts(group: Group) -> list[Contrast]:
    """Every other arm whose runs are finished against standard: one Holm family."""
    measure = partial(points, conditions=endpoint_conditions(group.section))
    others = [arm for arm in group.arms() if arm not in ("standard", "split") and group.is_complete(arm)]
    found = [c for arm in others if (c := contrast(group, arm, "standard", measure))]
    adjust(found)
    return found


def bootstrap(group: Group, found: Contrast) -> tuple[float, float]:
    """95 % interval of a contrast of endpoint N in points, from resampling both seeds and items: the needle's concepts
    in study A, prompts in study C."""
    conditions, of_a, of_b = endpoint_conditions(group.section), group.of_arm(found.arm), group.of_arm(found.baseline)
    concepts = {record.num_concepts for record in (*of_a.values(), *of_b.values())}
    if len(concepts) > 1:
        arms = f"{found.arm} and {found.baseline}"
        raise UserError(f"records of {arms}: num_concepts is {sorted(concepts)}: delete those of one")
    items = concepts.pop()
    sums, counts = [], []
    for condition in conditions:
        n = of_a[found.seeds[0]].answers[condition].n
        concept = np.arange(n) % items
        rows = []
        for seed in found.seeds:
            difference = of_a[seed].answers[condition].bits().astype(float) - of_b[seed].answers[condition].bits()
            rows.append(np.bincount(concept, difference, items))
        sums.append(rows)
        counts.append(np.bincount(concept, minlength=items))
    low, high = bootstrap_seeds_and_items(np.array(sums), np.array(counts))
    return 100 * low, 100 * high


def core_arms(section: dict[str, Any]) -> list[str]:
    """The arms whose runs must all be finished before any difference is shown."""
    return [arm for arm, planned in section["arms"].items() if planned["family"] == "core"]


def unit_of(section: dict[str, Any]) -> str:
    """What the numbers in the names of the conditions count."""
    return "pairs" if section["endpoint"]["kinds"] == ["pairs"] else "cells"


# reported with two decimals
FINE_ENDPOINTS = ("d'", "points per doubling", "log2 of the number at 50 %", "log-likelihood of the answer")


def secondary_endpoints(group: Group) -> dict[str, Callable[[Record], float | None]]:
    """Name -> measure of every secondary endpoint that the records have."""
    conditions = sorted({c for record in group.records for c in record.answers}, key=condition_order)
    measures = {c: partial(points, conditions=[c]) for c in conditions if not c.endswith(" absent")}
    measures["false alarms"] = false_alarms
    measures["d'"] = sensitivity
    measures["points per doubling"] = slope
    measures["log2 of the number at 50 %"] = cells_at_half
    measures["log-likelihood of the answer"] = likelihood
    measures["attention on the needle"] = partial(needle_share, layer=group.section.get("attention_layer"))
    return measures


def needle_share(record: ConversionRecord, layer: int | None) -> float | None:
    """The needle's share of the attention, in points, in the plan's `attention_layer`; None without one."""
    return None if layer is None or layer >= len(record.needle_shares) else 100 * record.needle_shares[layer]


def condition_order(condition: str) -> tuple[int, str]:
    """Sort key: the number of cells, then the kind."""
    cells, kind = condition.split(maxsplit=1)
    return int(cells), kind


# ---- study B1
def log_steps(record: SymbolicRecord) -> float:
    """ln(steps); a censored run counts with its step limit."""
    return math.log(record.steps)


def symbolic_contrasts(group: Group) -> dict[int, list[Contrast]]:
    """Number of pairs -> contrasts of ln(steps). The primary contrasts are one Holm family, all others another."""
    found = {}
    for pairs in sorted({record.pairs for record in group.records}):
        part = group.with_pairs(pairs)
        found[pairs] = [c for a, b in CONTRASTS if (c := contrast(part, a, b, log_steps))]
    flat = [c for of_pairs in found.values() for c in of_pairs]
    adjust([c for c in flat if (c.arm, c.baseline) == CONTRASTS[0]])
    adjust([c for c in flat if (c.arm, c.baseline) != CONTRASTS[0]])
    return found


def steps_verdict(found: Contrast) -> str:
    """Whether arm a needs fewer or more steps than b."""
    if not found.significant:
        return "undecided"
    return "fewer steps" if found.t["mean"] < 0 else "more steps"


# ---- text
def format_ratio(log_ratio: float) -> str:
    """A ratio, given as its logarithm, as the percentage by which it differs from 1."""
    return f"{round(100 * math.expm1(log_ratio)) + 0:+d} %"


def format_percent_interval(t: dict) -> str:
    """Mean and interval of a t test on logarithms, as in -6 % [-10 %, -2 %]."""
    return f"{format_ratio(t['mean'])} [{format_ratio(t['low'])}, {format_ratio(t['high'])}]"


def mean_text(values: Iterable[float | None]) -> str:
    """The mean of those values that are not None, or a dash."""
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.1f}" if known else NO_VALUE


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


WOULD_CHANGE = {
    "hurts": "a replication whose interval includes zero",
    "helps (and it is the subtraction)": "a replication whose interval reaches below {margin} points",
    "helps": "a replication whose interval reaches below {margin} points; not all controls are beaten by as much",
    "helps, less than what matters": "a harder endpoint or a larger model on which the gain exceeds {margin} points",
    "helps, size unclear": "more seeds, which would show whether the gain exceeds {margin} points",
    "no practical difference": "an interval outside ±{margin} points on another endpoint or a larger model",
    "undecided": "more seeds, since the interval allows both no difference and one that matters",
}


def answer(group: Group) -> str:
    """The answer of study A or C in one sentence: difference, interval, verdict, and what would change it."""
    core = core_arms(group.section)
    missing = group.missing(core)
    if missing:
        planned = sum(len(analysed_seeds(group.section, arm)) for arm in core)
        return f"No answer yet: {planned - missing} of {planned} core runs are finished."
    first, *others = hypotheses = core_contrasts(group)
    found = core_verdict(hypotheses)
    controls = " and ".join(f"{format_interval(other.t)} against {other.baseline}" for other in others)
    needles = "codes" if unit_of(group.section) == "pairs" else "needles"
    return (
        f"Fitted into the pretrained model, differential attention (split) changes the share of {needles} found by "
        f"{format_interval(first.t)} points against standard attention (95 % interval, {first.t['n']} seeds, Holm p "
        f"{format_p(first.holm_p)}; {controls}): **{found}**. What would change this answer: "
        f"{WOULD_CHANGE[found].format(margin=f'{MARGIN:g}')}."
    )


def symbolic_answer(group: Group) -> str:
    """The answer of study B1 in one sentence."""
    planned = planned_symbolic(group.section)
    if len(group.records) < planned:
        return f"No answer yet: {len(group.records)} of {planned} runs are finished."
    contrasts = symbolic_contrasts(group)
    primary = " and ".join(
        f"{format_percent_interval(of_pairs[0].t)} with {pairs} pairs ({steps_verdict(of_pairs[0])})"
        for pairs, of_pairs in contrasts.items()
    )
    names = ("double_width", "v1")
    width = [next(c for c in of_pairs if (c.arm, c.baseline) == names) for of_pairs in contrasts.values()]
    verdicts = {steps_verdict(c) for c in width}
    claim = {"fewer steps": "confirmed", "more steps": "refuted"}.get(verdicts.pop(), "undecided")
    claim = claim if not verdicts else "undecided: the numbers of pairs differ"
    return (
        "Trained from scratch, against its control without subtraction (half the heads, double width, the same head "
        f"norm), V1 changes the number of steps until it retrieves by {primary}. That double width without the norm is "
        f"faster than V1 is {claim} (steps against V1: {', '.join(format_percent_interval(c.t) for c in width)})."
    )


def planned_symbolic(section: dict[str, Any]) -> int:
    """Number of planned runs of study B1."""
    return sum(len(analysed_seeds(section, arm)) for arm in section["arms"]) * len(section["pairs"])


def format_report(
    plan: dict[str, dict[str, Any]], records: Sequence[Record], replications: Sequence[Record] = ()
) -> list[str]:
    """The report as lines of markdown: all studies, with replications and other environments under their own headings.

    `plan` holds sections of study.json: {"A": section, "B1": section, "C": section}. Raises UserError for records of
    another plan.
    """
    lines = []
    for study, title, write in (
        ("A", "Study A: fitted into a pretrained model", format_conversion),
        ("B1", "Study B1: trained from scratch", format_symbolic),
        ("C", "Study C, exploratory: fitted into a pretrained language model", format_conversion),
    ):
        if study not in plan:
            continue
        groups = group_records(plan[study], study, records)
        if not groups:
            lines += [f"## {title}", "", "No run is finished.", ""]
        for number, group in enumerate(groups + group_records(plan[study], study, replications)):
            where, hours = group.environment, sum(r.seconds for r in group.records) / 3600
            is_main = number == 0 and bool(groups)
            lines += [f"## {title}" if is_main else f"## {title}, replication on {where.device}", ""]
            lines.append(
                f"Plan `{hash_plan(plan[study])[:12]}`; {len(group.records)} runs on {where.device}, {where.dtype}, "
                f"{where.threads} thread(s) per run, fingerprint `{where.fingerprint[:12]}`; {hours:.1f} hours of wall "
                "time in total."
            )
            amendment = plan[study].get("amendment")
            if amendment and is_main:
                lines += ["", f"Amended to seeds {', '.join(map(str, amendment['seeds']))}: {amendment['reason']}"]
            lines += ["", *write(group), ""]
    return lines


def format_conversion(group: Group) -> list[str]:
    """Study A or C: the answer, the hypotheses, a row for every arm, the secondary endpoints."""
    lines = [answer(group), ""]
    if group.missing(core_arms(group.section)):
        return lines + format_spread(group)
    hypotheses, secondary, unit = core_contrasts(group), secondary_contrasts(group), unit_of(group.section)
    lines += ["Endpoint N, points. Primary hypotheses:", "", *format_hypotheses(group, hypotheses), ""]
    lines += [
        f"Descriptive, chosen after the result and not corrected: the parts of the endpoint by number of {unit}:",
        "",
    ]
    lines += [*format_parts(group), ""]
    lines += [
        "All arms. The verdicts of all but split are secondary, one Holm family against standard. An arm's accuracy is "
        "shown when all its seeds are finished:",
        "",
    ]
    lines += [*format_arms(group, hypotheses, secondary), ""]
    lines += ["Secondary endpoints, points unless named otherwise; Holm over each column:", ""]
    lines += [*format_secondary(group), ""]
    test = "no test, since codes of one prompt are dependent" if unit == "pairs" else "McNemar's exact test"
    lines += [f"Descriptive, per seed: questions of the endpoint that only one arm answers ({test}):", ""]
    return lines + format_seeds(group, *HYPOTHESES[0])


def format_spread(group: Group) -> list[str]:
    """The table before all core runs are finished: standard deviations of the arms, no means and no differences."""
    measure = partial(points, conditions=endpoint_conditions(group.section))
    rows = []
    for arm, planned in group.section["arms"].items():
        values = [measure(record) for record in group.of_arm(arm).values()]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else NO_VALUE
        rows.append([arm, planned["family"], f"{len(values)} of {len(analysed_seeds(group.section, arm))}", spread])
    return table(["arm", "family", "runs", "SD of N over seeds"], rows)


def format_hypotheses(group: Group, hypotheses: Sequence[Contrast]) -> list[str]:
    """A row for each of the hypotheses."""
    measure = partial(points, conditions=endpoint_conditions(group.section))
    rows = []
    for found in hypotheses:
        low, high = bootstrap(group, found)
        t, t90 = found.t, found.t90
        values = [[measure(group.of_arm(arm)[seed]) for seed in found.seeds] for arm in (found.arm, found.baseline)]
        rows.append([
            f"{found.arm} - {found.baseline}", str(t["n"]), format_interval(t), format_bounds(t90["low"], t90["high"]),
            format_bounds(low, high), f"{t['sd']:.2f}", correlation(*values), format_p(t["p"]), format_p(found.holm_p),
            *(format_p(equivalence(found.differences, margin)) for margin in (MARGIN, NARROW_MARGIN)), verdict(found),
        ])  # fmt: skip
    header = ["hypothesis", "seeds", "difference [95 %]", "90 %", "bootstrap over seeds and items", "SD", "r", "p"]
    header += ["Holm p", f"TOST p, ±{MARGIN:g}", f"TOST p, ±{NARROW_MARGIN:g}", "verdict"]
    return table(header, rows)


def format_parts(group: Group) -> list[str]:
    """A row for each hypothesis: its difference in the conditions of the endpoint with each number of cells."""
    conditions, sizes = endpoint_conditions(group.section), group.section["endpoint"]["cells"]
    parts = [partial(points, conditions=[c for c in conditions if condition_order(c)[0] == size]) for size in sizes]
    rows = [
        [f"{a} - {b}", *(format_interval(contrast(group, a, b, part).t) for part in parts)]
        for a, b in hypotheses_of(group.section)
    ]
    return table(["difference [95 %]", *(f"{size} {unit_of(group.section)}" for size in sizes)], rows)


def correlation(a: Sequence[float], b: Sequence[float]) -> str:
    """Pearson's r of two arms over seeds; near 0, pairing by seed does not make their difference more certain."""
    if min(a) == max(a) or min(b) == max(b):
        return NO_VALUE
    return f"{stats.pearsonr(a, b).statistic:.2f}"


def format_arms(group: Group, hypotheses: Sequence[Contrast], secondary: Sequence[Contrast]) -> list[str]:
    """A row for every arm."""
    conditions = endpoint_conditions(group.section)
    measure = partial(points, conditions=conditions)
    found = {c.arm: c for c in (*hypotheses[:1], *secondary)}
    rows = []
    for arm in group.arms():
        records = list(group.of_arm(arm).values())
        planned = group.section["arms"][arm]
        row = [arm, planned["family"], f"{records[0].trained_parameters:,}"]
        row += [f"{records[0].forward_flops / 1e6:,.0f}", mean_text(r.seconds / 60 for r in records)]
        row += [f"{len(records)} of {len(analysed_seeds(group.section, arm))}"]
        if not group.is_complete(arm):
            rows.append([*row, *[NO_VALUE] * (len(ARM_COLUMNS) - len(row))])
            continue
        row += [mean_text(measure(r) for r in records)]
        against = contrast(group, arm, "additive", measure) if arm not in ("standard", "additive") else None
        versus = found.get(arm)
        row += [format_interval(versus.t) if versus else NO_VALUE, format_interval(against.t) if against else NO_VALUE]
        tests = [versus.holm_p, equivalence(versus.differences, MARGIN)] if versus else []
        row += [format_p(p) for p in tests] or [NO_VALUE, NO_VALUE]
        row += [mean_text(map(false_alarms, records)), mean_text(knocked_out(r, conditions) for r in records)]
        shown = NO_VALUE
        if versus:
            shown = core_verdict(hypotheses) if arm == "split" else verdict(versus)
        rows.append([*row, shown])
    return table(ARM_COLUMNS, rows)


def format_secondary(group: Group) -> list[str]:
    """A row for each secondary endpoint, a column for each hypothesis; a star if Holm's p is below 0.05.

    An endpoint that some seeds lack is not tested, since which seeds lack it depends on the result; it stays in the
    family.
    """
    measures = secondary_endpoints(group)
    columns = []
    for arm, baseline in hypotheses_of(group.section):
        seeds = group.of_arm(arm).keys() & group.of_arm(baseline).keys()
        found = {name: c for name, measure in measures.items() if (c := contrast(group, arm, baseline, measure))}
        complete = {name: c for name, c in found.items() if len(c.seeds) == len(seeds)}
        adjust(list(complete.values()), untested=len(found) - len(complete))
        columns.append({name: f"{NO_VALUE} ({len(c.seeds)} of {len(seeds)} seeds)" for name, c in found.items()})
        for name, c in complete.items():
            digits = 2 if name in FINE_ENDPOINTS else 1
            columns[-1][name] = format_interval(c.t, digits) + " *" * c.significant
    rows = [
        [name, *(column.get(name, NO_VALUE) for column in columns)]
        for name in measures
        if any(name in column for column in columns)
    ]
    return table(["endpoint", *(f"{arm} - {baseline}" for arm, baseline in hypotheses_of(group.section))], rows)


def format_seeds(group: Group, a: str, b: str) -> list[str]:
    """A row for each seed: how many questions of the endpoint only one arm gets right, and McNemar's exact p where the
    questions are independent."""
    conditions, of_a, of_b = endpoint_conditions(group.section), group.of_arm(a), group.of_arm(b)
    rows = []
    for seed in (seed for seed in of_a if seed in of_b):
        right_a, right_b = (
            np.concatenate([arm[seed].answers[condition].bits() for condition in conditions]) for arm in (of_a, of_b)
        )
        only_a, only_b = int((right_a > right_b).sum()), int((right_b > right_a).sum())
        p = NO_VALUE if unit_of(group.section) == "pairs" else format_p(mcnemar_exact(only_a, only_b))
        rows.append([str(seed), str(len(right_a)), *map(str, (right_a.sum(), right_b.sum(), only_a, only_b)), p])
    return table(["seed", "questions", f"{a} right", f"{b} right", f"only {a}", f"only {b}", "p"], rows)


def format_symbolic(group: Group) -> list[str]:
    """Study B1: the answer, steps of every arm, the contrasts."""
    lines = [symbolic_answer(group), ""]
    is_complete = len(group.records) == planned_symbolic(group.section)
    rows = []
    for pairs in sorted({record.pairs for record in group.records}):
        for arm in group.arms():
            records = list(group.with_pairs(pairs).of_arm(arm).values())
            if not records:
                continue
            steps = [record.steps for record in records]
            spread = f"{statistics.stdev(map(math.log, steps)):.3f}" if len(steps) > 1 else NO_VALUE
            row = [str(pairs), arm, f"{records[0].trained_parameters:,}", f"{records[0].learning_rate:g}"]
            row += [f"{len(records)} of {len(analysed_seeds(group.section, arm))}"]
            row += [f"{statistics.median(steps):g}", str(sum(r.censored for r in records))] if is_complete else []
            rows.append([*row, spread])
    header = ["pairs", "arm", "parameters", "learning rate", "seeds"]
    header += ["median steps", "censored"] if is_complete else []
    lines += table([*header, "SD of ln(steps)"], rows)
    if not is_complete:
        return lines
    lines += ["", "Steps of the first arm against the second; the first contrast is primary, the others secondary:", ""]
    rows = []
    for pairs, contrasts in symbolic_contrasts(group).items():
        part = group.with_pairs(pairs)
        for found in contrasts:
            both = [[part.of_arm(arm)[seed] for seed in found.seeds] for arm in (found.arm, found.baseline)]
            survival = [field for arm in both for field in ([r.steps for r in arm], [r.censored for r in arm])]
            row = [str(pairs), f"{found.arm} - {found.baseline}", str(found.t["n"]), format_percent_interval(found.t)]
            row += [format_p(p) for p in (found.t["p"], found.holm_p, log_rank(*survival))]
            rows.append([*row, steps_verdict(found)])
    header = ["pairs", "contrast", "seeds", "steps [95 %]", "p", "Holm p", "log-rank p", "verdict"]
    return lines + table(header, rows)
