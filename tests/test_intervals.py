"""Intervals and tests against textbook values, exact small cases and simulation."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from errors import UserError
from needle_eval.report import format_seeds
from needle_eval.statistics import (
    bootstrap_seeds_and_items,
    calibration_error,
    confidence_bins,
    d_prime,
    equivalence,
    holm,
    log_rank,
    logistic_threshold,
    mcnemar_exact,
    mean_over_seeds,
    mean_rate,
    paired_difference,
    paired_over_seeds,
    paired_t,
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
    """95 % intervals of a known difference cover it in about 95 % of cases, not 90 % and not always."""
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


def test_equal_differences_of_all_seeds_have_no_interval_and_no_p_value():
    """Without a spread over the seeds there is no t test; rounding of rates does not count as spread."""
    one_more = ([26 / 40, 30 / 40, 22 / 40], [27 / 40, 31 / 40, 23 / 40])  # questions of 40, one more in every seed
    for a, b in (one_more, ([0.1, 0.2, 0.4], [0.1, 0.2, 0.4]), ([0.0, 0.25, 0.5], [0.5, 0.75, 1.0])):
        over = paired_over_seeds(a, b)
        assert over["mean"] == pytest.approx(b[0] - a[0]) and over["n"] == 3
        assert over["low"] is over["high"] is over["p"] is None
    line = format_seeds("2x2", {"first": mean_over_seeds(a), "second": mean_over_seeds(b), "difference": over})
    assert "the same in every seed, n = 3 seeds" in line and "p =" not in line


def test_few_seeds_have_no_interval_and_none_leaves_what_a_rate_can_be():
    for rates in ([0.1], [0.1, 0.9]):
        over = paired_over_seeds(rates, rates[::-1])
        assert over["n"] == len(rates) and over["low"] is over["high"] is over["p"] is None
    wide = mean_over_seeds([0.0, 0.9, 1.0])
    assert (wide["low"], wide["high"]) == (0.0, 1.0)
    difference = paired_over_seeds([0.9, 0.1, 0.5], [0.1, 0.9, 0.9])
    assert -1 <= difference["low"] < 0 < difference["high"] <= 1


# ---- differences over seeds, in any unit
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]  # Student 1908: hours of sleep gained, drug 2 over drug 1


def test_paired_t_of_student_s_sleep_data():
    found = paired_t(SLEEP)  # R's t.test(extra ~ group, paired = TRUE)
    assert found["n"] == 10 and found["mean"] == pytest.approx(1.58) and found["sd"] == pytest.approx(1.2299955)
    assert (found["low"], found["high"]) == pytest.approx((0.7001142, 2.4598858))
    assert found["p"] == pytest.approx(0.002832890, abs=1e-8)
    a, b = np.random.default_rng(0).normal(size=(2, 12)) * 40
    test = stats.ttest_rel(a, b)
    found = paired_t(a - b, 0.9)
    assert (found["p"], found["low"], found["high"]) == pytest.approx((test.pvalue, *test.confidence_interval(0.9)))


def test_paired_t_of_equal_differences_and_of_too_few():
    assert paired_t([2.0] * 4) == {"n": 4, "mean": 2.0, "sd": 0.0, "low": 2.0, "high": 2.0, "p": 0.0}
    assert paired_t([0.0] * 4)["p"] == 1.0
    with pytest.raises(UserError, match="2 paired seeds"):
        paired_t([1.0, 2.0])


def test_equivalence_is_the_90_percent_interval_inside_the_margin():
    rng = np.random.default_rng(1)
    outcomes = set()
    for mean in (-2.0, 0.0, 1.0, 2.0):
        for _ in range(15):
            differences = rng.normal(mean, 3, 12)
            interval = paired_t(differences, 0.90)
            inside = interval["low"] > -3 and interval["high"] < 3
            assert (equivalence(differences, 3) < 0.05) == inside
            outcomes.add(inside)
    assert outcomes == {True, False}
    t = (3 - 1.58) / (1.2299955 / math.sqrt(10))  # the side that is closer to the margin
    assert equivalence(SLEEP, 3) == pytest.approx(stats.t.sf(t, 9), rel=1e-6)
    assert (equivalence([1.0] * 3, 3), equivalence([3.0] * 3, 3)) == (0.0, 1.0)


def test_power_of_the_plan():
    # reference: 12 seeds, SD 3.06: 3 points are seen at alpha .0167 with .71, TOST +-3 of a true 0 holds with .87
    rng, n = np.random.default_rng(2), 1000
    seen = sum(paired_t(rng.normal(3, 3.06, 12))["p"] < 0.05 / 3 for _ in range(n)) / n
    held = sum(equivalence(rng.normal(0, 3.06, 12), 3) < 0.05 for _ in range(n)) / n
    assert abs(seen - 0.71) < 0.04 and abs(held - 0.87) < 0.03


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [  # R's p.adjust(p, "holm")
        ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),
        ([0.04, 0.001, 0.02], [0.04, 0.003, 0.04]),
        ([0.6, 0.9], [1.0, 1.0]),
        ([0.03], [0.03]),
        ([], []),
    ],
)
def test_holm(p, adjusted):
    assert holm(p) == pytest.approx(adjusted)


def test_the_bootstrap_resamples_seeds_and_items():
    rng = np.random.default_rng(3)
    of_seeds = rng.normal(1, 2, 12)
    expected = stats.bootstrap((of_seeds,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    found = bootstrap_seeds_and_items(of_seeds[None, :, None], np.ones((1, 1)), 20_000)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.06)  # one item: over seeds alone
    of_items = rng.normal(1, 2, 30)
    expected = stats.bootstrap((of_items,), np.mean, n_resamples=20_000, method="percentile", rng=rng)
    found = bootstrap_seeds_and_items(of_items[None, None, :], np.ones((1, 30)), 20_000)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.06)  # one seed: over items alone
    both = of_seeds[:, None] + of_items[None, :] - 1
    low, high = bootstrap_seeds_and_items(both[None], np.ones((1, 30)), 20_000)
    assert high - low > found[1] - found[0]
    # conditions have equal weight for any number of questions: the means 1 and 0 give 0.5
    unequal = np.stack([np.full((4, 5), 3.0), np.zeros((4, 5))])
    assert bootstrap_seeds_and_items(unequal, np.array([[3] * 5, [50] * 5]), 50) == pytest.approx((0.5, 0.5))


def test_log_rank_of_the_leukaemia_trial():
    # Freireich et al. 1963, weeks in remission: chi-square 16.79, p = 4.17e-5 (R's survdiff)
    drug = [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    censored = [False] * 9 + [True] * 12
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    assert log_rank(drug, censored, placebo, [False] * 21) == pytest.approx(4.17e-5, rel=0.01)
    assert log_rank([5, 5], [True, True], [5, 5], [True, True]) == 1.0


# ---- detection and thresholds
def test_d_prime():
    assert d_prime(80_000, 100_000, 20_000, 100_000) == pytest.approx(2 * 0.8416212, abs=1e-3)  # z(.8) - z(.2)
    assert d_prime(50, 100, 50, 100) == pytest.approx(0)
    assert d_prime(9, 10, 1, 10) == pytest.approx(stats.norm.ppf(9.5 / 11) - stats.norm.ppf(1.5 / 11))
    assert math.isfinite(d_prime(10, 10, 0, 10))


def test_logistic_threshold_finds_the_planted_level():
    levels = np.array([2.0, 4.0, 5.0, 6.0])
    counts = 1000 / (1 + np.exp(1.3 * (levels - 4.7)))  # the expected counts, whose likelihood peaks at the truth
    assert logistic_threshold(levels, counts, [1000] * 4) == pytest.approx(4.7, abs=1e-3)
    assert logistic_threshold(levels, [900, 800, 700, 600], [1000] * 4) is None
    assert logistic_threshold(levels, [450, 520, 490, 480], [1000] * 4) is None  # the fit crosses outside
    assert 4 < logistic_threshold(levels, [10, 10, 0, 0], [10] * 4) < 5  # separated counts: a step between 4 and 5


def test_bins_of_confidence_and_their_error():
    bins = confidence_bins([0.05, 0.95, 1.0, 0.95, 0.85], [False, True, True, False, True])
    assert [found["n"] for found in bins] == [1, 0, 0, 0, 0, 0, 0, 0, 1, 3]
    assert bins[1] == {"n": 0, "confidence": None, "rate": None}
    assert bins[9]["confidence"] == pytest.approx(2.9 / 3) and bins[9]["rate"] == pytest.approx(2 / 3)
    assert calibration_error(bins) == pytest.approx((0.05 + 3 * 0.3 + 0.15) / 5)
    sure = confidence_bins([1.0] * 8, [True] * 8)
    assert calibration_error(sure) == 0
