"""Golden numbers of this repository: the first ten losses of a small default run at seed 0."""

import json

import pytest

from finetune_original import Config, finetune

LOSSES = [4.6878, 3.3414, 2.3877, 1.9016, 1.1834, 1.1502, 0.9891, 0.5916, 0.6296, 1.0799]


def test_ten_losses_of_seed_0(tmp_path):
    config = Config(
        max_steps=10,
        batch_size=8,
        warmup_steps=3,
        log_every=1,
        eval_samples=2,
        eval_every=99,
        output_dir=str(tmp_path / "run"),
    )
    finetune(config, "original")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(
        LOSSES, rel=2e-3
    )  # CPUs round differently
