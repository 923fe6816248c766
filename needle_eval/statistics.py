"""How sure a measured rate, or a difference of two, is: 95 % intervals and exact tests.

Rates and scores are fractions of 1. Two kinds of chance are kept apart: which questions were asked (`rate`,
`mean_rate`, and over the same questions `mcnemar_exact`, `paired_bootstrap`), and which seed a model was trained with
(`mean_over_seeds`, `paired_over_seeds`). Questions are taken as independent.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
from scipy import stats

from errors import UserError

CONFIDENCE = 0.95
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
BOOTSTRAP_CELLS = 1_000_000  # numbers drawn at once: 8 MB


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


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], samples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(difference, low, high) of mean(b) - mean(a): a[i] and b[i] are the scores of two runs on one question.

    Percentile bootstrap over questions. The interval has no width where all pairs differ alike, as where none does:
    read `mcnemar_exact` beside it. Raises UserError for lists of unequal length and for empty ones.
    """
    if len(a) != len(b) or not len(a):
        raise UserError(f"{len(a)} and {len(b)} answers cannot be paired: compare two runs of the same questions")
    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    values, counts = np.unique(differences, return_counts=True)
    rng, n = np.random.default_rng(seed), len(differences)
    step = max(1, BOOTSTRAP_CELLS // len(values))
    means = [  # drawing n of the questions is drawing how often each value comes
        rng.multinomial(n, counts / n, size=min(step, samples - start)) @ values / n
        for start in range(0, samples, step)
    ]
    low, high = np.quantile(np.concatenate(means), TAILS)
    return float(differences.mean()), float(low), float(high)


# ---- several seeds
def mean_over_seeds(rates: Sequence[float]) -> dict:
    """{"n", "mean", "low", "high"} over the seeds of one arm: Student's t interval, which may leave [0, 1].

    One seed has no interval (None), no seed no mean either.
    """
    n = len(rates)
    mean = statistics.fmean(rates) if n else None
    if n < 2:
        return {"n": n, "mean": mean, "low": None, "high": None}
    spread = float(stats.t.ppf(TAILS[1], n - 1)) * statistics.stdev(rates) / math.sqrt(n)
    return {"n": n, "mean": mean, "low": mean - spread, "high": mean + spread}


def paired_over_seeds(a_rates: Sequence[float], b_rates: Sequence[float]) -> dict:
    """`mean_over_seeds` of b - a, seed by seed, and "p": the two-sided p value of the paired t test, None for one seed.

    Raises UserError where the arms have not the same number of seeds.
    """
    if len(a_rates) != len(b_rates):
        raise UserError(f"{len(a_rates)} and {len(b_rates)} seeds cannot be paired: give the same seeds of both arms")
    differences = [b - a for a, b in zip(a_rates, b_rates, strict=True)]
    over, n = mean_over_seeds(differences), len(differences)
    if n < 2:
        return over | {"p": None}
    if max(differences) == min(differences):  # t is infinite, or 0 / 0
        return over | {"p": float(over["mean"] == 0)}
    t = over["mean"] / (statistics.stdev(differences) / math.sqrt(n))
    return over | {"p": 2 * float(stats.t.sf(abs(t), n - 1))}
