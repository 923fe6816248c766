"""Scores and intervals by golden cases (needle_evaluation facts; Wilson 1927)."""

import pytest

from haystack import is_exact, wilson


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


@pytest.mark.parametrize(
    ("response", "answer", "exact"),
    [(r, "1, 2, 1", True) for r in ("1, 2, 1", "1, 2, 1.", " 1, 2, 1\n", ".1, 2, 1")]
    + [
        (r, "1, 2, 1", False)
        for r in ("1,2,1", "1,\n2, 1", "(1, 2, 1)", "01, 2, 1", "1, 2", "1, 1, 2", "1, 2, 1, 1", "")
    ]
    + [(r, "-1", True) for r in ("-1", "-1.", "-1\n")]
    + [(r, "-1", False) for r in ("-1, -1, -1", "", "No match", "- 1", "1, 1, 1")],
)
def test_the_strict_rule(response, answer, exact):
    assert is_exact(response, answer) is exact
