"""Golden numbers of this repository: the first ten losses of a small default run at seed 0."""

import json

import pytest

from finetune_original import Config, finetune

LOSSES = [8.2447, 7.3636, 7.0627, 5.6741, 4.0749, 3.527, 2.5817, 1.7347, 1.5776, 1.4262]


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
