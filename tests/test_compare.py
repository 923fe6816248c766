"""benchmarks/compare.py and benchmarks/gpu.py at tiny size: tables print, losses and tokens agree. The times mean
nothing here.
"""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def compare():
    return load("compare")


@pytest.fixture(scope="module")
def gpu(compare):
    return load("gpu")


def test_the_table_of_the_cpu(compare, tmp_path, monkeypatch, capsys):
    threads, real = torch.get_num_threads(), compare.fresh_process
    started = []

    def fresh_process(arguments):  # only one of each kind, since each imports transformers
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


def test_unequal_losses_are_refused(compare):
    with pytest.raises(AssertionError, match="losses differ"):
        compare.check_losses({"a": 1.0, "b": 1.1}, 0.05)


def test_kept_features_that_are_ignored_are_refused(compare):
    """transformers 5.17 ignores them silently."""
    hf = compare.mid_size(compare.Config(size="tiny"))
    batch = compare.make_batch(hf, torch.float32, 2, 8, 8)
    model = compare.hf_model(hf, torch.float32)
    features = compare.our_model(hf, model.state_dict()).model.image_features(batch["pixel_values"])
    compare.make_tuned_loss(model, batch, features)
    with pytest.raises(AssertionError, match="ignores mm_encoder_outputs"):
        compare.make_tuned_loss(lambda mm_encoder_outputs, **more: model(**more, **pixels(batch)), batch, features)


def pixels(batch: dict) -> dict:
    return {"pixel_values": batch["pixel_values"]}


# ---- benchmarks/gpu.py
def run_gpu(gpu, monkeypatch, folder: Path, *flags: str) -> dict:
    """The results of a command line, with a CPU as the device."""
    output = folder / "rows.json"
    size = ["--device=cpu", "--size=tiny", "--rounds=1", "--warmups=0", f"--output={output}"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *size, *flags])
    gpu.main()
    return json.loads(output.read_text())


def test_the_sections_of_the_gpu_benchmark_run(gpu, monkeypatch, tmp_path):
    sections = ["ceilings", "backends", "steps_224", "decode", "profiles", "kernels", "steps_gemma2"]
    result = run_gpu(gpu, monkeypatch, tmp_path, "--sections", *sections)
    assert not result["faults"] and list(result["seconds"]) == sections
    rows = result["rows"]
    for kind in ("uniform", "ragged"):
        for name in ("HF-default", "HF-default, autocast", "HF-tuned", "ours", "ours, vision", "split"):
            assert rows[f"step, 224 px, {kind}: {name}"]["ms"] > 0
        assert rows[f"step, 224 px, {kind}: split / ours"]["ratio"] > 0
    assert rows["step, PaliGemma 2, 448 px, ragged: split / ours"]["ratio"] > 0
    assert sum(name.startswith("decode, batch 8") for name in rows) == 7 + 4
    assert all("flash" in op for op in rows["SDPA backend: Gemma, no mask"]["ops"])
    assert rows["attention, 24 keys, soft-cap: maps"]["taken"]


@pytest.mark.slow
def test_the_other_sections_of_the_gpu_benchmark_run(gpu, monkeypatch, tmp_path):
    """Scripts in their own processes: a run that is killed and resumed, answers, the training section."""
    patient = {name: (gpu.SECTIONS[name][0], 600) for name in ("resume", "answers", "train_3b")}
    monkeypatch.setattr(gpu, "SECTIONS", patient)
    result = run_gpu(gpu, monkeypatch, tmp_path, "--seconds=1500")
    assert not result["faults"]
    assert result["rows"]["included model, killed / whole"]["largest_loss_difference"] == 0
    assert "random 3b: export.py" in result["rows"]


def test_a_section_that_fails_or_takes_too_long_loses_no_rows(gpu, monkeypatch, tmp_path):
    def rows(config):
        yield "a", {"ms": 1}
        raise ValueError("broken")

    def slow(config):
        yield "b", {"ms": 2}
        time.sleep(60)

    monkeypatch.setattr(gpu, "SECTIONS", {"one": (rows, 9), "two": (slow, 0.5), "three": (rows, 9)})
    result = run_gpu(gpu, monkeypatch, tmp_path)
    assert result["rows"] == {"a": {"ms": 1}, "b": {"ms": 2}}
    faults = [result["faults"][name].splitlines()[-1] for name in ("one", "two", "three")]
    assert faults[0] == faults[2] == "ValueError: broken" and "TimeoutError" in faults[1]
    result = run_gpu(gpu, monkeypatch, tmp_path, "--seconds=1")
    assert not result["rows"] and all("left out" in fault for fault in result["faults"].values())


def test_rows_of_a_ragged_batch_end_together(gpu):
    batch = gpu.make_step_batch(gpu.paligemma_3b(gpu.Config(size="tiny")), "cpu", ragged=True)
    starts = batch["attention_mask"].argmax(1)
    assert len(set(starts.tolist())) > 4 and starts.min() == 0
    assert bool((batch["attention_mask"][:, -1] == 1).all()) and (batch["labels"] != -100).sum(1).unique().numel() > 3


def test_the_flops_of_a_step_are_those_of_the_arithmetic(gpu):
    """26.2 TFLOP at 224 px, 8 x (256 + 64 + 64), vision features kept (LoRA, 0.2 of them, is not counted); the tower,
    413 M parameters in its layers, on 8 x 256 patches: 1.75 TFLOP."""
    hf = gpu.paligemma_3b(gpu.Config())
    batch = dict(input_ids=torch.empty(8, 384), labels=torch.full((8, 384), -100))
    batch["labels"][:, -64:] = 1
    assert gpu.step_flops(hf, batch, with_vision=False) == pytest.approx(26.0e12, rel=0.02)
    assert gpu.tower_flops(hf, 8) == pytest.approx(1.75e12, rel=0.03)
