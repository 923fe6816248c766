"""How sure a measured rate, or a difference of two, is: 95 % intervals and exact tests.

Rates and scores are fractions of 1. Two kinds of chance are kept apart: which questions were asked (`rate`,
`mean_rate`, and over the same questions `mcnemar_exact`, `paired_bootstrap`), and which seed a model was trained with
(`mean_over_seeds`, `paired_over_seeds`). Questions are taken as independent.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from errors import UserError


# ---- one run
def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a rate, 95 % by default (Wilson 1927); (0, 1) for no sample."""
    if not total:
        return 0.0, 1.0
    rate = right / total
    centre = rate + z * z / (2 * total)
    spread = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    low, high = ((centre + side) / (1 + z * z / total) for side in (-spread, spread))
    return max(0.0, min(low, rate)), min(1.0, max(high, rate))  # rounding must not leave the rate outside


def rate(right: int, total: int) -> dict:
    """{"right", "n", "rate", "low", "high"} of a count, with its Wilson interval; for n = 0 the rate is None."""
    low, high = wilson(right, total)
    return {"right": right, "n": total, "rate": right / total if total else None, "low": low, "high": high}


def mean_rate(scores: Sequence[float]) -> dict:
    """As `rate`, for scores within [0, 1]; "right" is their sum.

    None varies more than 0/1 scores of the same mean, so Wilson's interval is wide enough, and unlike a bootstrap's it
    keeps a width where all scores are equal.
    """
    return rate(math.fsum(scores), len(scores))


# ---- two runs over the same questions
def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p value of McNemar's exact test: `only_a` questions were right in run A alone, `only_b` in B alone.

    Twice the smaller tail of Binomial(only_a + only_b, 1/2), at most 1; in whole numbers until the last division.
    """
    n, few = only_a + only_b, min(only_a, only_b)
    term = tail = 1  # choose(n, 0)
    for i in range(few):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


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
    step = max(1, 1_000_000 // len(values))  # at most 8 MB at a time
    means = [  # drawing n of the questions is drawing how often each value comes
        rng.multinomial(n, counts / n, size=min(step, samples - start)) @ values / n
        for start in range(0, samples, step)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
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
    spread = t_quantile(n - 1) * statistics.stdev(rates) / math.sqrt(n)
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
    error = statistics.stdev(differences) / math.sqrt(n)
    return over | {"p": _outside(math.atan2(abs(over["mean"]), error * math.sqrt(n - 1)), n - 1)}


def t_quantile(df: int, inside: float = 0.95) -> float:
    """The t with P(|T| <= t) = `inside` for Student's t of `df` degrees of freedom: 12.706 for df = 1."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halvings, to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, df) > 1 - inside else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _outside(angle: float, df: int) -> float:
    """P(|T| > t) for angle = atan(t / sqrt(df)), so that an infinite t is pi / 2.

    For whole df the incomplete beta integral is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, terms = (cosine if odd else 1.0), []
    for k in range(2 + odd, df + 1, 2):
        terms.append(term)
        term *= cosine * cosine * (k - 1) / k
    inside = sine * math.fsum(terms)
    return max(0.0, 1 - (2 / math.pi * (angle + inside) if odd else inside))
