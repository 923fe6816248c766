"""The notebook under examples/ runs from top to bottom."""

import ast
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT

NOTEBOOK = ROOT / "examples" / "needle.ipynb"
MINUTES = 10


def code_cells() -> list[str]:
    """The source of every code cell."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def make_checkout(folder: Path) -> Path:
    """A folder with the repository's scripts and its own runs/."""
    folder.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "needle_eval", ROOT / "assets"):
        (folder / path.name).symlink_to(path)
    return folder


def test_the_notebook_is_plain_python_and_its_imports_exist():
    cells = code_cells()
    assert len(cells) > 5
    for source in cells:
        for node in ast.walk(ast.parse(source)):  # a magic or a shell command would not parse
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(importlib.util.find_spec(name) for name in names), names


def test_what_comes_before_training_runs(tmp_path):
    """The task, the model, and that the second map initially changes nothing."""
    cells = code_cells()
    training = next(number for number, source in enumerate(cells) if "finetune_original.py" in source)
    printed = run("\n".join(cells[:training]), tmp_path)
    assert "where is" in printed and "equal logits: True, lambda 0.50" in printed


@pytest.mark.slow
def test_the_notebook_runs_in_ten_minutes_of_one_core(tmp_path):
    """CPU time is measured, since other work on the machine takes time as well."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("\n".join(code_cells()), tmp_path, 6 * MINUTES * 60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MINUTES * 60
    assert "1 seed cannot show a difference" in done
    page = (tmp_path / "checkout" / "runs" / "example" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "Attention maps" in page


def run(code: str, folder: Path, seconds: int = 300) -> str:
    """What code prints in a checkout of its own."""
    checkout = make_checkout(folder / "checkout")
    (folder / "code.py").write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(folder / "code.py")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout
