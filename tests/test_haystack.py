"""What all benchmarks share: exact match by golden cases, the five entry points, and no import of torch."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

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


ROOT = Path(__file__).parent.parent
BENCHMARKS = ("mmneedle", "pope", "mm_niah")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_imports_no_torch(name):
    """Its questions and scores load in a tenth of a second, not in four seconds."""
    code = f"import sys, needle_eval.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_the_five_entry_points(name):
    module = importlib.import_module(f"needle_eval.{name}")
    wanted = {
        "load_questions": ["config"],
        "is_correct": ["row"],
        "score": ["rows"],
        "format_table": ["scores_by_model"],
        "write_official": ["rows", "folder", "model_name"],
    }
    assert {entry: list(inspect.signature(getattr(module, entry)).parameters) for entry in wanted} == wanted


def test_no_other_file_tests_a_benchmark_s_name():
    for file in (ROOT / "eval_mmnih.py", *(ROOT / "needle_eval").glob("*.py")):
        if not file.stem.startswith(BENCHMARKS):
            text = file.read_text()
            for name in ("mmneedle", "pope", "mm-niah"):
                assert f'== "{name}"' not in text and f'!= "{name}"' not in text, file.name
