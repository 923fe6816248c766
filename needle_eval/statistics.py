"""The uncertainty of a measured rate, or of the difference of two: 95 % intervals and tests.

Rates and scores are fractions in [0, 1]. Two sources of variation are kept apart: the choice of questions (`rate`,
`mean_rate`, and for two runs on the same questions `mcnemar_exact`, `paired_difference`), and the training seed
(`mean_over_seeds`, `paired_over_seeds`, `paired_t`, `equivalence`); `bootstrap_seeds_and_items` covers both together.
Questions are treated as independent.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from errors import UserError

CONFIDENCE = 0.95
ALPHA = 0.05  # significance level
BINS = 10  # of confidence
MIN_SEEDS = 3  # seeds needed for an interval: with two it covers nearly all possible rates
ROUNDING = 1e-9  # differences over seeds, in any unit, that differ by no more are treated as equal


# ---- one run
def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson score interval of a rate (Wilson 1927); (0, 1) if there are no samples."""
    if not total:
        return 0.0, 1.0
    interval = stats.binomtest(right, total).proportion_ci(CONFIDENCE, "wilson")
    return float(interval.low), float(interval.high)


def rate(right: int, total: int) -> dict:
    """{"right", "n", "rate", "low", "high"} of a count, with the Wilson interval; for n = 0 the rate is None."""
    low, high = wilson(right, total)
    return {"right": right, "n": total, "rate": right / total if total else None, "low": low, "high": high}


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent; "-" for None."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f}"


def format_rate(found: dict, digits: int = 1) -> str:
    """A `rate` in percent with its interval, as in 25.0 [22.4, 27.8]; "-" if there are no samples."""
    value, low, high = (format_percent(found[key], digits) for key in ("rate", "low", "high"))
    return value if found["rate"] is None else f"{value} [{low}, {high}]"


def format_signed(value: float, digits: int = 1) -> str:
    """A number with its sign, with more digits (up to three) where rounding to 0 would hide it; never -0.0."""
    shown = next((n for n in range(digits, digits + 4) if round(value, n)), digits)
    return f"{round(value, shown) + 0.0:+.{shown}f}"


def format_interval(t: dict, digits: int = 1) -> str:
    """Mean and interval of a t test, as in +0.4 [-1.2, +2.0]."""
    return f"{format_signed(t['mean'], digits)} {format_bounds(t['low'], t['high'], digits)}"


def format_bounds(low: float, high: float, digits: int = 1) -> str:
    """An interval, as in [-1.2, +2.0]."""
    return f"[{format_signed(low, digits)}, {format_signed(high, digits)}]"


def format_p(p: float) -> str:
    """A p value with three decimals; "< .001" below that."""
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"


def mean_rate(scores: Sequence[float]) -> dict:
    """Like `rate`, for scores in [0, 1]; "right" is their sum.

    If the sum is not an integer, the interval spans the Wilson intervals of the integers below and above it. It is wide
    enough, since no scores in [0, 1] vary more than 0/1 scores of the same mean, and unlike a bootstrap interval it has
    a width even if all scores are equal.
    """
    right, total = math.fsum(scores), len(scores)
    low, high = wilson(math.floor(right), total)[0], wilson(math.ceil(right), total)[1]
    return {"right": right, "n": total, "rate": right / total if total else None, "low": low, "high": high}


# ---- two runs over the same questions
def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p value of McNemar's exact test: `only_a` questions were right in run A alone, `only_b` in B alone."""
    discordant = only_a + only_b
    return float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0


def paired_difference(both: int, only_a: int, only_b: int, neither: int) -> dict:
    """{"mean", "low", "high"}: the rate of run B minus that of run A on the same questions, with its score interval.

    The arguments count the questions that both runs, only A, only B, or neither has right. The interval is Newcombe's
    hybrid score interval for paired rates (Statistics in Medicine 17, 1998, 2635, method 10). It has a width even if
    the runs never differ, or differ the same way on every question. It only approximates `mcnemar_exact`, so close to
    p = 0.05 the two can disagree about zero. Raises UserError if there are no questions.
    """
    n = both + only_a + only_b + neither
    if not n:
        raise UserError("no answers to compare: compare two runs of the same questions")
    right_a, right_b = both + only_a, both + only_b
    a, b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n), wilson(right_b, n)
    margins = right_a * (n - right_a) * right_b * (n - right_b)
    covariance = both * neither - only_a * only_b
    if covariance > 0:
        covariance = max(0.0, covariance - n / 2)
    phi = covariance / math.sqrt(margins) if margins else 0.0
    below = (b - low_b) ** 2 - 2 * phi * (b - low_b) * (high_a - a) + (high_a - a) ** 2
    above = (high_b - b) ** 2 - 2 * phi * (high_b - b) * (a - low_a) + (a - low_a) ** 2
    return {"mean": b - a, "low": b - a - math.sqrt(below), "high": b - a + math.sqrt(above)}


def mean_of_independent(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(estimate, low, high) of the unweighted mean of independent estimates, by MOVER (Zou and Donner 2008)."""
    mean = statistics.fmean(estimate for estimate, _, _ in estimates)
    below = math.hypot(*(estimate - low for estimate, low, _ in estimates)) / len(estimates)
    above = math.hypot(*(high - estimate for estimate, _, high in estimates)) / len(estimates)
    return mean, mean - below, mean + above


# ---- several seeds
def mean_over_seeds(rates: Sequence[float]) -> dict:
    """{"n", "mean", "low", "high"} over the seeds of one arm: Student's t interval, clipped to [0, 1].

    The interval is None for fewer than `MIN_SEEDS` seeds, and the mean is None without seeds.
    """
    n = len(rates)
    mean = statistics.fmean(rates) if n else None
    if n < MIN_SEEDS:
        return {"n": n, "mean": mean, "low": None, "high": None}
    spread = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(rates) / math.sqrt(n)
    return {"n": n, "mean": mean, "low": max(0.0, mean - spread), "high": min(1.0, mean + spread)}


def paired_over_seeds(a_rates: Sequence[float], b_rates: Sequence[float]) -> dict:
    """{"n", "mean", "low", "high", "p"} of b - a, seed by seed: `paired_t` with the interval clipped to [-1, 1].

    Interval and p are None for fewer than `MIN_SEEDS` seeds, and if all differences are equal: without a spread over
    the seeds there is nothing to test against. Raises UserError if the arms have different numbers of seeds.
    """
    if len(a_rates) != len(b_rates):
        raise UserError(f"{len(a_rates)} and {len(b_rates)} seeds cannot be paired: give the same seeds of both arms")
    differences = [b - a for a, b in zip(a_rates, b_rates, strict=True)]
    n = len(differences)
    if n < MIN_SEEDS or not has_spread(differences):
        return {"n": n, "mean": statistics.fmean(differences), "low": None, "high": None, "p": None}
    test = paired_t(differences)
    return {"n": n, "mean": test["mean"], "low": max(-1.0, test["low"]), "high": min(1.0, test["high"]), "p": test["p"]}


# ---- differences over seeds, in any unit
def has_spread(differences: Sequence[float]) -> bool:
    """Whether differences vary by more than rounding error: without a spread there is no t test."""
    return max(differences) - min(differences) > ROUNDING


def paired_t(differences: Sequence[float], confidence: float = CONFIDENCE) -> dict:
    """{"n", "mean", "sd", "low", "high", "p"} of paired differences: Student's t, two-sided, not clipped.

    Raises UserError for fewer than `MIN_SEEDS` differences. If all are equal, the interval has no width.
    """
    n = len(differences)
    if n < MIN_SEEDS:
        raise UserError(f"{n} paired seeds: a t test needs at least {MIN_SEEDS}")
    mean, sd = statistics.fmean(differences), statistics.stdev(differences)
    if not has_spread(differences):
        return {"n": n, "mean": mean, "sd": 0.0, "low": mean, "high": mean, "p": float(abs(mean) <= ROUNDING)}
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(confidence)
    return {"n": n, "mean": mean, "sd": sd, "low": float(low), "high": float(high), "p": float(test.pvalue)}


def equivalence(differences: Sequence[float], margin: float) -> float:
    """p value of two one-sided t tests (TOST, Schuirmann 1987) that the mean difference lies within +-`margin`.

    It is below 0.05 exactly when the 90 % interval of `paired_t` lies inside +-`margin`.
    """
    if not has_spread(differences):
        return float(abs(differences[0]) >= margin)
    above = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, margin, alternative="less").pvalue
    return float(max(above, below))


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for multiple testing, in the same order (Holm 1979): below alpha where Holm's test rejects."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def bootstrap_seeds_and_items(
    differences: np.ndarray, counts: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a mean difference, from a bootstrap over both seeds and items.

    `differences` [conditions, seeds, items] are sums over the questions about an item, `counts` [conditions, items]
    the numbers of these questions. The estimate is the unweighted mean over conditions of (sum of differences) /
    (number of questions); each resample uses one draw of seeds and one of items for all conditions. The interval is
    conservative if both matter (Owen 2007, "The pigeonhole bootstrap").
    """
    _, seeds, items = differences.shape
    generator = np.random.default_rng(seed)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples).astype(float)
    item_weights = generator.multinomial(items, np.full(items, 1 / items), resamples).astype(float)
    estimates = np.zeros(resamples)
    for of_condition, asked in zip(differences, counts, strict=True):
        sums = ((seed_weights @ of_condition) * item_weights).sum(1)
        estimates += sums / (seeds * (item_weights @ asked)) / len(differences)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


def log_rank(
    a_steps: Sequence[float], a_censored: Sequence[bool], b_steps: Sequence[float], b_censored: Sequence[bool]
) -> float:
    """Two-sided p value of the log-rank test of two groups; a censored value is the last step without the event."""
    a = stats.CensoredData.right_censored(a_steps, a_censored)
    b = stats.CensoredData.right_censored(b_steps, b_censored)
    if a.num_censored() + b.num_censored() == len(a) + len(b):  # no event at all
        return 1.0
    return float(stats.logrank(a, b).pvalue)


# ---- detection and thresholds
def d_prime(hits: float, n_present: int, false_alarms: float, n_absent: int) -> float:
    """z(hit rate) - z(false alarm rate) from counts, with the log-linear correction that keeps rates away from 0 and 1
    (Hautus 1995)."""
    hit_rate, false_rate = (hits + 0.5) / (n_present + 1), (false_alarms + 0.5) / (n_absent + 1)
    return float(stats.norm.ppf(hit_rate) - stats.norm.ppf(false_rate))


def logistic_threshold(levels: Sequence[float], right: Sequence[int], total: Sequence[int]) -> float | None:
    """The level at which a logistic curve, fitted to counts by maximum likelihood, passes 50 %.

    None where the level would be extrapolated: without rates on both sides of 50 %, and outside of the levels.
    """
    rates = [r / n for r, n in zip(right, total, strict=True)]
    if not min(rates) < 0.5 < max(rates):
        return None
    x, hits, n = np.asarray(levels, float), np.asarray(right, float), np.asarray(total, float)
    centre, scale = x.mean(), x.std()
    x = (x - centre) / scale

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] + parameters[1] * x
        return float((n * np.logaddexp(0, logits) - hits * logits).sum() / n.sum())

    # bounds, because counts that a step function separates have no finite slope
    intercept, slope = optimize.minimize(loss, (0.0, 0.0), bounds=[(-50, 50)] * 2).x
    threshold = float(centre - scale * intercept / slope)
    return threshold if min(levels) <= threshold <= max(levels) else None


# ---- calibration
def confidence_bins(confidences: Sequence[float], right: Sequence[bool]) -> list[dict]:
    """{"n", "confidence", "rate"} of the answers in each of ten equal bins of [0, 1]; means, None in empty bins."""
    found = [[] for _ in range(BINS)]
    for confidence, is_right in zip(confidences, right, strict=True):
        found[min(int(confidence * BINS), BINS - 1)].append((confidence, is_right))
    described = []
    for part in found:
        confidence, rate_ = map(statistics.fmean, zip(*part, strict=True)) if part else (None, None)
        described.append({"n": len(part), "confidence": confidence, "rate": rate_})
    return described


def calibration_error(bins: Sequence[dict]) -> float:
    """Expected calibration error: mean |rate - confidence| of the bins, weighted by their counts (Naeini 2015)."""
    total = sum(found["n"] for found in bins)
    return sum(found["n"] * abs(found["rate"] - found["confidence"]) for found in bins if found["n"]) / total
