"""Golden numbers of this repository: the first ten losses of a small default run of either arm at seed 0."""

import json

import pytest

import finetune_diff
from finetune_original import Config, finetune

LOSSES = {
    "original": [8.2447, 7.3636, 7.0627, 5.6741, 4.0749, 3.527, 2.5817, 1.7347, 1.5776, 1.4262],
    "diff": [8.2447, 7.3205, 6.9812, 5.5612, 3.8395, 3.4511, 2.4399, 1.6485, 1.4835, 1.2805],
}
SMALL = dict(max_steps=10, batch_size=8, warmup_steps=3, log_every=1, eval_samples=2, eval_every=99)


@pytest.mark.parametrize("arm", LOSSES)
def test_ten_losses_of_seed_0(arm, tmp_path):
    config_class = Config if arm == "original" else finetune_diff.Config
    config = config_class(**SMALL, output_dir=str(tmp_path / "run"))
    finetune(config, arm, getattr(config, "differential", None))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == pytest.approx(LOSSES[arm], rel=2e-3)  # CPUs round differently
