"""Intervals and tests against textbook values, exact small cases and simulation."""

import math
import statistics

import numpy as np
import pytest

from errors import UserError
from needle_eval.statistics import (
    mcnemar_exact,
    mean_over_seeds,
    mean_rate,
    paired_bootstrap,
    paired_over_seeds,
    rate,
    wilson,
)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (0, 1000, 0.00, 0.38),
        (16, 1000, 0.99, 2.58),
        (63, 1000, 4.95, 7.98),
        (250, 1000, 22.42, 27.78),
        (500, 1000, 46.91, 53.09),
        (970, 1000, 95.75, 97.89),
        (1000, 1000, 99.62, 100),
        (50, 200, 19.51, 31.43),
        (4, 16, 10.18, 49.50),
        (8, 16, 28.00, 72.00),
        (5, 10, 23.66, 76.34),
        (1, 1, 20.65, 100),
    ],
)
def test_wilson_intervals(right, total, low, high):
    assert [round(100 * bound, 2) for bound in wilson(right, total)] == [low, high]


def test_wilson_holds_the_rate():
    assert wilson(0, 0) == (0.0, 1.0)
    for total in range(1, 60):
        for right in range(total + 1):
            low, high = wilson(right, total)
            assert 0 <= low <= right / total <= high <= 1


def test_rates():
    assert rate(0, 0) == {"right": 0, "n": 0, "rate": None, "low": 0.0, "high": 1.0}
    low, high = wilson(63, 1000)
    assert rate(63, 1000) == {"right": 63, "n": 1000, "rate": 0.063, "low": low, "high": high}
    assert mean_rate([1, 0, 0, 1]) == rate(2, 4) and mean_rate([]) == rate(0, 0)
    soft = mean_rate([0.5, 0.25])
    assert soft["rate"] == 0.375 and (soft["low"], soft["high"]) == (wilson(0, 2)[0], wilson(1, 2)[1])


def test_soft_scores_are_covered():
    rng = np.random.default_rng(0)
    held = 0
    for scores in rng.choice([0, 1 / 3, 2 / 3, 1], p=[0.4, 0.3, 0.2, 0.1], size=(400, 50)):
        found = mean_rate(scores.tolist())
        held += found["low"] <= 1 / 3 <= found["high"]
    assert held >= 0.95 * 400


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (3, 3, 1.0),
        (0, 1, 1.0),
        (0, 5, 2 / 32),
        (1, 9, 22 / 1024),
        (9, 1, 22 / 1024),
        (5, 15, 0.04138947),  # 2 P(Binomial(20, 1/2) <= 5), tables
        (10, 20, 0.09873715),
    ],
)
def test_mcnemar(only_a, only_b, p):
    assert mcnemar_exact(only_a, only_b) == pytest.approx(p, rel=1e-6)


def test_mcnemar_of_many_questions():
    total = sum(math.comb(2_000, i) for i in range(951))
    assert mcnemar_exact(950, 1_050) == pytest.approx(2 * total / 2**2_000, rel=1e-9) == pytest.approx(0.0269, abs=1e-4)
    assert mcnemar_exact(5_000, 5_000) == 1.0
    assert mcnemar_exact(0, 10_000) == 0.0


def test_bootstrap_is_of_pairs_and_repeats_itself():
    a, b = [0] * 60 + [1] * 40, [0] * 50 + [1] * 50
    difference, low, high = paired_bootstrap(a, b)
    assert difference == pytest.approx(0.1) and (low, high) == (pytest.approx(0.05, abs=0.011), 0.16)
    assert paired_bootstrap(a, b) == (difference, low, high)
    soft = np.random.default_rng(0).random((2, 50))
    assert paired_bootstrap(*soft) == paired_bootstrap(*soft) != paired_bootstrap(*soft, seed=1)
    unpaired = paired_bootstrap(a, b[::-1])
    assert unpaired[0] == pytest.approx(0.1) and unpaired[1] < -0.05  # same means, other pairs
    assert paired_bootstrap(b, a)[0] == pytest.approx(-0.1)


def test_bootstrap_covers_the_truth():
    """95 % intervals of a known difference: held 95 times in a hundred, not 90 and not always."""
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(600):
        a = rng.random(200) < 0.4
        b = np.where(rng.random(200) < 0.7, a, rng.random(200) < 0.6)  # mean .46, in step with a
        _, low, high = paired_bootstrap(a, b, samples=1000, seed=trial)
        held += low <= 0.06 <= high
    assert 0.92 <= held / 600 <= 0.975


def test_bootstrap_of_soft_scores_agrees_with_drawing_indices():
    rng = np.random.default_rng(2)
    a, b = rng.random(10_000), rng.random(10_000)  # every difference another value: the most memory
    drawn = [np.mean((b - a)[rng.integers(0, 10_000, 10_000)]) for _ in range(400)]
    _, low, high = paired_bootstrap(a, b, samples=400)
    assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.002)


def test_what_cannot_be_paired():
    for a, b in (([], []), ([1], [1, 0])):
        with pytest.raises(UserError, match="cannot be paired"):
            paired_bootstrap(a, b)
    with pytest.raises(UserError, match="2 and 1 seeds"):
        paired_over_seeds([0.1, 0.2], [0.1])


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_seeds_have_student_s_interval(df, t):
    rates = [0.5 + 0.1 * (-1) ** i for i in range(df + 1)]
    over = mean_over_seeds(rates)
    spread = statistics.stdev(rates) / math.sqrt(df + 1)
    assert (over["high"] - over["mean"]) / spread == pytest.approx(t, abs=5e-4)


def test_seeds():
    over = mean_over_seeds([0.5, 0.6, 0.7])  # sd .1
    assert over["n"] == 3 and over["mean"] == pytest.approx(0.6)
    assert over["high"] - 0.6 == pytest.approx(4.302653 * 0.1 / math.sqrt(3)) == pytest.approx(0.6 - over["low"])
    assert mean_over_seeds([0.5]) == {"n": 1, "mean": 0.5, "low": None, "high": None}
    assert mean_over_seeds([]) == {"n": 0, "mean": None, "low": None, "high": None}


def test_paired_seeds():
    """Student's sleep data (1908), ten pairs: difference 1.58, t = 4.0621, p = .00283, interval .7001 to 2.4599."""
    a = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    b = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    over = paired_over_seeds(a, b)
    assert over["mean"] == pytest.approx(1.58) and over["p"] == pytest.approx(0.002833, abs=1e-6)
    assert (over["low"], over["high"]) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))
    assert paired_over_seeds(b, a)["p"] == over["p"]
    three = paired_over_seeds([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])  # differences .1 .2 .3: t = 2 sqrt 3, even df
    assert three["p"] == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_over_seeds([0.1], [0.2])["p"] is None
    assert paired_over_seeds([0.1, 0.2], [0.1, 0.2])["p"] == 1.0  # no difference at all
    assert paired_over_seeds([0.0, 0.25], [0.5, 0.75])["p"] == 0.0  # the same difference in every seed
