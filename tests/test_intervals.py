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
    paired_difference,
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


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [  # both, only the second, only the first, neither
        ((36, 12, 2, 0), 0.0569, 0.3404),  # Newcombe (1998), the examples of his table
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((18, 14, 0, 18), 0.1441, 0.3963),
        ((0, 29, 1, 0), 0.6666, 0.9882),
        ((59, 6, 16, 80), -0.1186, -0.0046),  # Fagerland, Lydersen and Laake (2017), complete response
        ((1, 1, 7, 12), -0.507, -0.026),  # and airway hyper-responsiveness
    ],
)
def test_published_intervals_of_paired_rates(counts, low, high):
    both, only_b, only_a, neither = counts
    found = paired_difference(both, only_a, only_b, neither)
    digits = 3 if len(str(low)) < 7 and counts[0] == 1 else 4
    assert (round(found["low"], digits), round(found["high"], digits)) == (low, high)
    assert found["mean"] == pytest.approx((only_b - only_a) / sum(counts))
    other = paired_difference(both, only_b, only_a, neither)
    assert (other["low"], other["high"]) == pytest.approx((-found["high"], -found["low"]))


def test_the_interval_agrees_with_the_test_beside_it():
    few = paired_difference(53, 4, 0, 43)  # four discordant pairs, all one way
    assert mcnemar_exact(4, 0) == 0.125 and few["low"] < 0 < few["high"]
    none = paired_difference(60, 0, 0, 40)
    assert none["mean"] == 0 and none["low"] < -0.01 and none["high"] > 0.01, "no discordant pair is no certainty"
    for right in (0, 50):  # all right or all wrong in both
        same = paired_difference(right, 0, 0, 50 - right)
        assert same["low"] < 0 < same["high"]
    for only_a in range(0, 12):
        for only_b in range(0, 12):
            found = paired_difference(40, only_a, only_b, 40)
            assert -1 <= found["low"] <= found["mean"] <= found["high"] <= 1
            p = mcnemar_exact(only_a, only_b)
            excludes = found["low"] > 0 or found["high"] < 0
            assert excludes <= (p < 0.11) and (p < 0.02) <= excludes, (only_a, only_b, p)


def test_the_interval_covers_the_truth():
    """95 % intervals of a known difference: held 95 times in a hundred, not 90 and not always."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(600):
        a = rng.random(200) < 0.4
        b = np.where(rng.random(200) < 0.7, a, rng.random(200) < 0.6)  # mean .46, correlated with a
        both, only_a, only_b = (int(part.sum()) for part in (a & b, a & ~b, ~a & b))
        found = paired_difference(both, only_a, only_b, 200 - both - only_a - only_b)
        held += found["low"] <= 0.06 <= found["high"]
    assert 0.92 <= held / 600 <= 0.98


def test_what_cannot_be_paired():
    with pytest.raises(UserError, match="no answers to compare"):
        paired_difference(0, 0, 0, 0)
    with pytest.raises(UserError, match="2 and 1 seeds"):
        paired_over_seeds([0.1, 0.2], [0.1])


@pytest.mark.parametrize(
    ("df", "t"), [(2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_seeds_have_student_s_interval(df, t):
    rates = [0.5 + 0.01 * (-1) ** i for i in range(df + 1)]
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
    """Student's sleep data (1908), ten pairs: difference 1.58, t = 4.0621, p = .00283, interval .7001 to 2.4599; here
    all a tenth of it, since rates differ by 1 at most."""
    a = [hours / 10 for hours in (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)]
    b = [hours / 10 for hours in (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)]
    over = paired_over_seeds(a, b)
    assert over["mean"] == pytest.approx(0.158) and over["p"] == pytest.approx(0.002833, abs=1e-6)
    assert (over["low"], over["high"]) == (pytest.approx(0.07001, abs=1e-5), pytest.approx(0.24599, abs=1e-5))
    assert paired_over_seeds(b, a)["p"] == over["p"]
    three = paired_over_seeds([0.1, 0.2, 0.3], [0.2, 0.4, 0.6])  # differences .1 .2 .3: t = 2 sqrt 3, even df
    assert three["p"] == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired_over_seeds([0.1, 0.2, 0.4], [0.1, 0.2, 0.4])["p"] == 1.0  # no difference at all
    assert paired_over_seeds([0.0, 0.25, 0.5], [0.5, 0.75, 1.0])["p"] == 0.0  # the same difference in every seed


def test_few_seeds_have_no_interval_and_none_leaves_what_a_rate_can_be():
    for rates in ([0.1], [0.1, 0.9]):
        over = paired_over_seeds(rates, rates[::-1])
        assert over["n"] == len(rates) and over["low"] is over["high"] is over["p"] is None
    wide = mean_over_seeds([0.0, 0.9, 1.0])
    assert (wide["low"], wide["high"]) == (0.0, 1.0)
    difference = paired_over_seeds([0.9, 0.1, 0.5], [0.1, 0.9, 0.9])
    assert -1 <= difference["low"] < 0 < difference["high"] <= 1
