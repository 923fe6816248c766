"""Helpers of the training tests: short runs, their logs and files, scripts as child processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

import training
from finetune_original import Config, finetune

ROOT = Path(__file__).parent.parent


def logged(config: Config, key: str = "loss") -> list[tuple[int, Any]]:
    """(step, value) of every line of metrics.jsonl that has `key`."""
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def without_speed(file: Path) -> list[dict]:
    """The lines of a log without the fields that differ between two equal runs."""
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in file.read_text().splitlines()]


def saved_lora(config: Config, folder: str = "final") -> dict[str, Tensor]:
    return safetensors.torch.load_file(Path(config.output_dir) / folder / "adapter" / "adapter_model.safetensors")


def saved_differential(config: Config, folder: str = "final") -> dict[str, Tensor]:
    return safetensors.torch.load_file(Path(config.output_dir) / folder / "differential.safetensors")


def interrupt(config: Config, step: int, arm: str = "original", differential=None):
    """Train, and send SIGTERM during update number `step`."""
    real = training.learning_rate_at

    def stop(config: Config, done: int, steps: int) -> float:
        if done == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, done, steps)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(training, "learning_rate_at", stop)
        finetune(config, arm, differential)
    assert caught.value.code == 128 + signal.SIGTERM


def crash(config: Config, step: int, arm: str = "original", differential=None):
    """Train, and raise an exception during the update after `step`, without a checkpoint at that step."""

    def fail(config: Config, done: int, steps: int) -> float:
        if done == step:
            raise KeyboardInterrupt
        return real(config, done, steps)

    real = training.learning_rate_at
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "learning_rate_at", fail)
        finetune(config, arm, differential)


def flags_of(config: Config) -> list[str]:
    """The command line of a configuration."""
    defaults = Config()
    names = [field.name for field in fields(Config)]
    return [f"--{name}={getattr(config, name)}" for name in names if getattr(config, name) != getattr(defaults, name)]


def start(*arguments: str, **kwargs) -> subprocess.Popen:
    """Start Python with these arguments in the repository, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes, **kwargs)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 300):
    """Wait until a running process has made `path`."""
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()[1]
        time.sleep(0.02)
