"""A run that is cut off, anywhere and in any way, ends as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import cut_off
import pytest
import torch
from safetensors.torch import load_file

CONFIG = dict(
    max_steps=14,
    batch_size=4,
    accumulation=2,
    warmup_steps=6,
    lora_dropout=0.3,
    eval_samples=3,
    eval_batch_size=4,
    eval_every=4,
    max_new_tokens=3,
    log_every=1,
    save_every=3,
    differential={"preset": "split", "lambda_warmup": 0.5},
)
ACTS = {  # in the order in which they meet one run
    "kill in a step": dict(place="step", after=5, deed="SIGKILL"),
    "kill in a checkpoint": dict(place="checkpoint", after=1, deed="SIGKILL"),
    "kill in an evaluation": dict(place="evaluation", after=13, deed="SIGKILL"),
    "terminate": dict(place="step", after=2, deed="SIGTERM"),
    "Ctrl-C in an evaluation": dict(place="evaluation", after=10, deed="SIGINT"),
    "full disk in a checkpoint": dict(place="checkpoint", after=1, deed="full"),
    "full disk in a log": dict(place="log", after=2, deed="full"),
}


def run(folder: Path, model, plans: list[dict], **change) -> list:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model": str(model)} | change))
    (folder / "plans.json").write_text(json.dumps(plans))
    command = [sys.executable, cut_off.__file__, str(folder / "config.json"), str(folder / "plans.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


def lines(file: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in file.read_text().splitlines()]


def check_equal(found: Path, expected: Path):
    """Every logged number, every answer, and the weights of final/ and best/, bit for bit."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(found / name) == lines(expected / name)
    weights = sorted(p.relative_to(expected) for part in ("final", "best") for p in (expected / part).rglob("*.saf*"))
    assert len(weights) == 4
    for name in weights:
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.fixture(scope="module")
def story(tiny_model, tmp_path_factory):
    """The uninterrupted run, and one to which everything happens: (their folder, what every start of that one said)."""
    folder = tmp_path_factory.mktemp("story")
    plans = [{"folder": "whole"}, *({"folder": "cut", **act} for act in ACTS.values()), {"folder": "cut"}]
    whole, *starts, last = run(folder, tiny_model, plans)
    assert whole[0] == 0, whole[1]
    return folder, dict(zip(ACTS, starts, strict=True)) | {"last": last}


def test_nothing_is_lost(story):
    folder, starts = story
    assert starts["last"][0] == 0, starts["last"][1]
    check_equal(folder / "cut", folder / "whole")


@pytest.mark.parametrize("act", [act for act in ACTS if "kill" in act])
def test_a_killed_run_was_killed(story, act):
    assert story[1][act][0] == -9


def test_every_start_went_on_from_a_checkpoint(story):
    """The first starts anew, the second at the first checkpoint, and none falls behind the one before."""
    found = [out.partition("continues from ")[2].partition("\n")[0][-6:] for _, out in story[1].values()]
    assert found[:3] == ["", "000003", "000003"] and found == sorted(found) and len(set(found)) >= 4


@pytest.mark.parametrize(
    ("act", "status", "signal"), [("terminate", 143, "SIGTERM"), ("Ctrl-C in an evaluation", 130, "SIGINT")]
)
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_and_says_how_to_go_on(story, act, status, signal):
    found, out = story[1][act]
    assert found == status and "Traceback" not in out
    assert f"stopped by {signal}" in out and "the same command continues" in out


@pytest.mark.parametrize("act", [act for act in ACTS if "full" in act])
def test_a_full_disk_is_one_line(story, act):
    status, out = story[1][act]
    assert status == 2 and "Traceback" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in line and "free some space" in line


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tiny_model, tmp_path):
    rng = random.Random(5)
    kills = [{"folder": "cut", "after": rng.uniform(0.3, 4), "deed": "SIGKILL"} for _ in range(20)]
    change = dict(max_steps=600, save_every=7, eval_every=20)
    whole, *starts, last = run(tmp_path, tiny_model, [{"folder": "whole"}, *kills, {"folder": "cut"}], **change)
    assert whole[0] == last[0] == 0, last[1]
    assert [start[0] for start in starts].count(-9) == 20
    check_equal(tmp_path / "cut", tmp_path / "whole")
