"""benchmarks/compare.py in miniature: both tables print, losses and tokens agree. Its numbers mean nothing here."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare"] = module
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_cpu(compare, tmp_path, monkeypatch, capsys):
    threads, real = torch.get_num_threads(), compare.fresh_process
    started = []

    def fresh_process(arguments):  # one of each kind: every one imports transformers
        kind = (arguments[0], "modeling_gemma" in arguments or "--child=ours" in arguments)
        started.append(kind)
        return real(arguments) if kind[1] and started.count(kind) == 1 else "2.0" if "-c" not in arguments else "[1, 2]"

    monkeypatch.setattr(compare, "fresh_process", fresh_process)
    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["compare.py", "--size=tiny", "--rounds=2", f"--output={output}"])
    try:
        compare.main()
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 4 * 3 + 2 * 3 + 4 * 2 + 1 + 2 * 2 + 2
    assert all(math.isfinite(row["ratio"]) for row in rows.values())
    assert all(name in capsys.readouterr().out for name in list(rows)[-1:])


def test_the_table_of_the_gpu(compare):
    """Its code, on a CPU."""
    rows = dict(compare.cuda_rows(compare.Config(size="tiny", rounds=1)))
    assert len(rows) == (2 + 1 + 4) + (1 + 2) + 2
    assert all(compare.line(name, row).startswith(f"| {name} |") for name, row in rows.items())


def test_unequal_losses_are_refused(compare):
    with pytest.raises(AssertionError, match="losses differ"):
        compare.check_losses({"a": torch.tensor(1.0), "b": torch.tensor(1.1)}, 0.05)


def test_the_flops_of_a_step_are_those_of_the_arithmetic(compare):
    """26.2 TFLOP at 224 px, 8 x (256 + 64 + 64), vision features kept (LoRA, 0.2 of them, is not counted)."""
    hf = compare.paligemma_3b(compare.Config())
    batch = dict(input_ids=torch.empty(8, 384), labels=torch.full((8, 384), -100))
    batch["labels"][:, -64:] = 1
    assert compare.step_flops(hf, batch) == pytest.approx(26.0e12, rel=0.02)
