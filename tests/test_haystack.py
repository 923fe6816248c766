"""Scores by golden cases (needle_evaluation facts)."""

import pytest

from needle_eval.questions import is_exact


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
