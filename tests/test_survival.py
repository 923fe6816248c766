"""A run that is interrupted, anywhere and in any way, resumes and ends bit-equal to an uninterrupted run."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import cut_off
import pytest
import torch
from runs import without_speed
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
INTERRUPTIONS = {  # of one run, in this order
    "kill in a step": dict(at="step", count=5, action="SIGKILL"),
    "kill in a checkpoint": dict(at="checkpoint", count=1, action="SIGKILL"),
    "kill in an evaluation": dict(at="evaluation", count=13, action="SIGKILL"),
    "SIGTERM in a step": dict(at="step", count=2, action="SIGTERM"),
    "SIGTERM to a run and its worker": dict(at="step", count=1, action="SIGTERM to all", change={"workers": 1}),
    "Ctrl-C in an evaluation": dict(at="evaluation", count=10, action="SIGINT"),
    "full disk in a checkpoint": dict(at="checkpoint", count=1, action="full"),
    "full disk in a log": dict(at="log", count=2, action="full"),
    "full disk in the figures": dict(at="figures", count=1, action="full"),
}


def start(folder: Path, model: Path, starts: list[dict], **change) -> list[tuple[int, str, list[str]]]:
    """(exit status, output, calls) of every start, made by tests/cut_off.py."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model": str(model)} | change))
    (folder / "starts.json").write_text(json.dumps(starts))
    command = [sys.executable, cut_off.__file__, str(folder / "config.json"), str(folder / "starts.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def check_equal(found: Path, expected: Path):
    """All logged numbers, answers, and weights of final/ and best/ are bit-equal; the files are the same."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_speed(found / name) == without_speed(expected / name), name
    files, expected_files = (
        {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and "tensorboard" not in p.parts}
        for folder in (found, expected)
    )
    assert files == expected_files
    weights = [name for name in files if name.suffix == ".safetensors" and name.parts[0] in ("final", "best")]
    assert len(weights) == 4
    for name in weights:
        ours, theirs = load_file(found / name), load_file(expected / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), name


# ---- one run, interrupted in every way
@pytest.fixture(scope="module")
def interrupted(tiny_model, tmp_path_factory) -> tuple[Path, dict]:
    """A folder with the uninterrupted run "whole" and the interrupted run "cut", and how each start of "cut" ended."""
    folder = tmp_path_factory.mktemp("interrupted")
    starts = [dict(folder="whole"), *(dict(folder="cut", **i) for i in INTERRUPTIONS.values()), dict(folder="cut")]
    whole, *ends, last = start(folder, tiny_model, starts)
    assert whole[0] == 0, whole[1]
    return folder, dict(zip(INTERRUPTIONS, ends, strict=True)) | {"last": last}


def test_an_interrupted_run_ends_like_the_uninterrupted_one(interrupted):
    folder, ends = interrupted
    assert ends["last"][0] == 0, ends["last"][1]
    check_equal(folder / "cut", folder / "whole")


@pytest.mark.parametrize("name", [name for name in INTERRUPTIONS if "kill" in name])
def test_a_kill_ends_the_process(interrupted, name):
    assert interrupted[1][name][0] == -9


def test_every_start_continues_from_a_checkpoint(interrupted):
    """The first start begins the run, the second resumes from the first checkpoint, and none goes back."""
    outputs = [output for _, output, _ in interrupted[1].values()]
    found = [output.partition("continues from ")[2].partition("\n")[0][-6:] for output in outputs]
    assert found[:3] == ["", "000003", "000003"]
    trained = found[:-1]  # the last start only draws the figures
    assert trained == sorted(trained) and len(set(trained)) >= 4 and "is finished" in outputs[-1]


@pytest.mark.parametrize(
    ("name", "status", "signal"),
    [
        ("SIGTERM in a step", 143, "SIGTERM"),
        ("SIGTERM to a run and its worker", 143, "SIGTERM"),
        ("Ctrl-C in an evaluation", 130, "SIGINT"),
    ],
)
def test_a_signal_leaves_a_checkpoint_and_a_line_that_says_how_to_continue(interrupted, name, status, signal):
    found, output, _ = interrupted[1][name]
    assert found == status and "Traceback" not in output
    assert f"stopped by {signal}" in output and "run the same command again to continue" in output
    step = int(re.search(r"after step (\d+)", output)[1])
    following = list(interrupted[1].values())[list(INTERRUPTIONS).index(name) + 1][1]
    assert re.search(r"continues from .*step-(\d+)", following)[1] == f"{step:06d}"


@pytest.mark.parametrize("name", [name for name in INTERRUPTIONS if "full" in name])
def test_a_full_disk_is_one_line(interrupted, name):
    status, output, _ = interrupted[1][name]
    assert status == 2 and "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "cannot be written" in line and "free some space" in line


@pytest.mark.parametrize(
    ("point", "change"), [("data", {}), ("evaluation", {"eval_only": True})], ids=["loading", "evaluation alone"]
)
def test_ctrl_c_outside_of_training_is_one_line(tiny_model, tmp_path, point, change):
    ((status, output, _),) = start(
        tmp_path, tiny_model, [dict(folder="run", at=point, count=1, action="SIGINT", change=change)]
    )
    assert status == 130 and "Traceback" not in output and output.splitlines()[-1] == "stopped by SIGINT"
    assert not (tmp_path / "run").exists()


# ---- killed at calls of the file system
SHORT = dict(
    max_steps=2,
    batch_size=2,
    accumulation=1,
    warmup_steps=1,
    grids=(2,),
    eval_samples=1,
    eval_batch_size=1,
    eval_every=1,
    max_new_tokens=1,
    save_every=1,
    differential={"preset": "split"},
)
OVERWRITE = {"overwrite": True}
STATES = {  # what a run finds: the folder that is copied, and its flags
    "no folder": ("nothing", {}),
    "a run before its first checkpoint": ("early", {}),
    "a run with a checkpoint": ("middle", {}),
    "a finished run of other flags": ("other", OVERWRITE),
}
CALLS = {  # before the last call of these names: where folders and files of two starts meet
    "no folder": [
        "open .run.json.tmp",
        "os.rename .run.json.tmp",
        "open samples/0-0.png",
        "os.rename checkpoints/.step-000001.tmp",
        "os.rename .best.tmp",
        "os.rename .final.tmp",
        "open plots/.answers.png.tmp",
        "os.rename plots/.loss.png.tmp",
    ],
    "a run before its first checkpoint": ["os.remove metrics.jsonl", "os.remove run.json", "os.rename .run.json.tmp"],
    "a run with a checkpoint": ["os.rename .metrics.jsonl.tmp", "os.rename .run.json.tmp"],
    "a finished run of other flags": ["os.rmdir final", "os.remove run.json", "os.rename .run.json.tmp"],
}


@pytest.fixture(scope="module")
def states(tiny_model, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A folder with the uninterrupted run "whole" and the folders of STATES, and the calls of a start from each."""
    folder = tmp_path_factory.mktemp("states")
    (folder / "nothing").mkdir()
    kill = dict(action="SIGKILL", at="step")
    starts = [
        dict(folder="whole"),
        dict(folder="early", count=1, **kill),
        dict(folder="middle", count=2, **kill),
        dict(folder="other", change={"lr": 0.01}),
        *(dict(folder="counted", copy=copy, change=change) for copy, change in STATES.values()),
    ]
    ends = start(folder, tiny_model, starts, **SHORT)
    assert [end[0] for end in ends] == [0, -9, -9, 0, 0, 0, 0, 0], ends
    return folder, {state: end[2] for state, end in zip(STATES, ends[4:], strict=True)}


def check_kills(folder: Path, model: Path, kills: list[tuple[str, int]], again: bool = False):
    """Kill a start from a state before its n-th call, with `again` the next start too; then let the run finish."""
    starts = []
    for state, count in kills:
        copy, change = STATES[state]
        killed = dict(folder=f"{copy}-{count}", action="SIGKILL", at="call", count=count, change=change)
        starts += [killed | {"copy": copy}, *([killed] if again else []), dict(folder=killed["folder"], change=change)]
    ends = start(folder, model, starts, **SHORT)
    for i, (state, count) in enumerate(kills):
        first, *_, last = ends[i * (2 + again) : (i + 1) * (2 + again)]
        assert first[0] == -9 and last[0] == 0, f"{state}, call {count}: {last[1]}"
        check_equal(folder / starts[i * (2 + again)]["folder"], folder / "whole")


def test_calls_are_counted(states):
    """All changes that a run makes to the file system are seen, in order."""
    _, calls = states
    fresh = calls["no folder"]
    assert len(fresh) > 100 and fresh[0] == "os.mkdir ." and fresh[-1] == "os.rename plots/.loss.png.tmp"
    for name in ("save", "save_file", "open metrics.jsonl", "os.rename .final.tmp"):
        assert name in fresh
    deleted = [call for call in calls["a finished run of other flags"] if call.startswith("os.remove")]
    assert "os.remove final/adapter/adapter_model.safetensors" in deleted


@pytest.mark.parametrize("state", STATES)
def test_a_kill_at_a_call_of_the_file_system_loses_nothing(states, tiny_model, state):
    folder, calls = states
    last = {name: count for count, name in enumerate(calls[state], 1)}
    check_kills(folder, tiny_model, [(state, last[name]) for name in CALLS[state]])


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("state", STATES)
def test_a_kill_at_every_call_of_the_file_system_loses_nothing(states, tiny_model, state, again):
    folder, calls = states
    check_kills(folder, tiny_model, [(state, count) for count in range(1, len(calls[state]) + 1)], again)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tiny_model, tmp_path):
    rng = random.Random(5)
    kills = [dict(folder="cut", count=rng.uniform(0.3, 4), action="SIGKILL") for _ in range(20)]
    change = dict(max_steps=600, save_every=7, eval_every=20)
    whole, *ends, last = start(tmp_path, tiny_model, [dict(folder="whole"), *kills, dict(folder="cut")], **change)
    assert whole[0] == last[0] == 0, last[1]
    assert [status for status, _, _ in ends].count(-9) == 20
    check_equal(tmp_path / "cut", tmp_path / "whole")
