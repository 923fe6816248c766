"""How sure a measured rate, or a difference of two, is: 95 % intervals and exact tests.

Rates and scores are fractions of 1. Two kinds of chance are kept apart: which questions were asked (`rate`,
`mean_rate`, and over the same questions `mcnemar_exact`, `paired_difference`), and which seed a model was trained with
(`mean_over_seeds`, `paired_over_seeds`). Questions are taken as independent.
"""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

from errors import UserError

CONFIDENCE = 0.95
MIN_SEEDS = 3  # of an interval over seeds: with two it covers nearly every possible rate


# ---- one run
def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson score interval of a rate (Wilson 1927); (0, 1) for no sample."""
    if not total:
        return 0.0, 1.0
    interval = stats.binomtest(right, total).proportion_ci(CONFIDENCE, "wilson")
    return float(interval.low), float(interval.high)


def rate(right: int, total: int) -> dict:
    """{"right", "n", "rate", "low", "high"} of a count, with its Wilson interval; for n = 0 the rate is None."""
    low, high = wilson(right, total)
    return {"right": right, "n": total, "rate": right / total if total else None, "low": low, "high": high}


def mean_rate(scores: Sequence[float]) -> dict:
    """As `rate`, for scores within [0, 1]; "right" is their sum.

    Where the sum is no whole number, the interval is that of the two counts beside it, each end the wider one. None
    varies more than 0/1 scores of the same mean, so it is wide enough, and unlike a bootstrap's it has a width where
    all scores are equal.
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

    The arguments count the questions that both runs, one or none of them have right. The interval is Newcombe's hybrid
    score interval for paired rates (Statistics in Medicine 17, 1998, 2635, method 10). It has a width also where the
    runs differ nowhere, or everywhere alike. It approximates what `mcnemar_exact` computes, so close to p = 0.05 one
    of them can exclude zero alone. Raises UserError where there is no question.
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


# ---- several seeds
def mean_over_seeds(rates: Sequence[float], lowest: float = 0.0) -> dict:
    """{"n", "mean", "low", "high"} over the seeds of one arm: Student's t interval, cut off at `lowest` and 1.

    The interval is None for fewer than `MIN_SEEDS` seeds, the mean for none.
    """
    n = len(rates)
    mean = statistics.fmean(rates) if n else None
    if n < MIN_SEEDS:
        return {"n": n, "mean": mean, "low": None, "high": None}
    spread = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(rates) / math.sqrt(n)
    return {"n": n, "mean": mean, "low": max(lowest, mean - spread), "high": min(1.0, mean + spread)}


def paired_over_seeds(a_rates: Sequence[float], b_rates: Sequence[float]) -> dict:
    """`mean_over_seeds` of b - a, seed by seed, and "p": the two-sided p value of the paired t test.

    Interval and p are None for fewer than `MIN_SEEDS` seeds. Raises UserError where the arms have not the same number.
    """
    if len(a_rates) != len(b_rates):
        raise UserError(f"{len(a_rates)} and {len(b_rates)} seeds cannot be paired: give the same seeds of both arms")
    differences = [b - a for a, b in zip(a_rates, b_rates, strict=True)]
    over, n = mean_over_seeds(differences, lowest=-1.0), len(differences)
    if n < MIN_SEEDS:
        return over | {"p": None}
    if max(differences) == min(differences):  # t is infinite, or 0 / 0
        return over | {"p": float(over["mean"] == 0)}
    t = over["mean"] / (statistics.stdev(differences) / math.sqrt(n))
    return over | {"p": 2 * float(stats.t.sf(abs(t), n - 1))}
