"""Study B1: the recall task, arms with equal parameters, bit-identical repeated runs, and the pilot's choices."""

import math
from types import SimpleNamespace

import msgspec
import pytest
import torch
from simulated_study import ENVIRONMENT

import study_symbolic
from differential_attention import NoSecondMap, PairedHeads, ProjectedQuery
from errors import UserError
from files import read_json
from study_report import SymbolicRecord
from study_symbolic import (
    ARMS,
    NUM_KEYS,
    NUM_VALUES,
    Config,
    RecallDecoder,
    choose_learning_rate,
    count_parameters,
    draw_batch,
    format_pilot,
    main,
    summarise_pilot,
    train,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- the task
@pytest.mark.parametrize("pairs", [2, 8, 16, 64])
def test_every_answer_is_the_value_that_follows_its_key(pairs):
    tokens, answers = draw_batch(pairs, generator(), batch_size=20)
    assert tokens.shape == (20, 3 * pairs) and answers.shape == (20, pairs)
    for row, expected in zip(tokens.tolist(), answers.tolist(), strict=True):
        keys, values, asked = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], row[2 * pairs :]
        assert len(set(keys)) == len(set(values)) == pairs
        assert set(keys) <= set(range(NUM_KEYS)) and set(values) <= set(range(NUM_KEYS, NUM_KEYS + NUM_VALUES))
        assert sorted(asked) == sorted(keys)
        assert [dict(zip(keys, values, strict=True))[key] for key in asked] == expected


def test_batches_are_fresh_and_follow_from_the_seed():
    ours, same, other = generator(), generator(), generator(1)
    batches = [draw_batch(8, g)[0] for g in (ours, ours, same, other)]
    assert torch.equal(batches[0], batches[2])
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[3])


def test_a_guess_among_the_listed_values_is_right_once_in_n():
    tokens, answers = draw_batch(8, generator(), batch_size=4000)
    for place in range(8):  # the value at one place of the list, for every key
        rate = (tokens[:, 1 + 2 * place, None] == answers).float().mean().item()
        assert rate == pytest.approx(1 / 8, abs=1e-6)  # one of the n keys, in every sample
    first_for_first = (tokens[:, 1] == answers[:, 0]).float().mean().item()
    assert first_for_first == pytest.approx(1 / 8, abs=0.03)  # the order of the questions tells nothing


# ---- the arms
def test_the_arms_have_equal_parameters():
    counts = {name: count_parameters(RecallDecoder(arm, seed=0)) for name, arm in ARMS.items()}
    assert counts == {
        "standard": 98_624,
        "v1": 98_816,  # 4 vectors of 16 and a norm gain of 32 in both layers
        "double_width": 98_624,
        "double_width_norm": 98_688,  # the norm gains
        "v2": 98_496,
    }
    assert max(counts.values()) / min(counts.values()) < 1.004


def test_the_arms_are_what_they_are_called():
    attention = {name: RecallDecoder(arm, seed=0).language_model.layers[1].self_attn for name, arm in ARMS.items()}
    shapes = {name: (a.shape.num_heads, a.shape.num_kv_heads, a.shape.head_dim) for name, a in attention.items()}
    narrow, wide = (4, 4, 16), (2, 2, 32)
    assert shapes == dict(standard=narrow, v1=narrow, double_width=wide, double_width_norm=wide, v2=narrow)
    assert attention["standard"].differential is None and attention["double_width"].differential is None
    v1, norm, v2 = (attention[name].differential for name in ("v1", "double_width_norm", "v2"))
    assert type(v1) is PairedHeads and type(norm) is NoSecondMap and type(v2) is ProjectedQuery
    assert v1.num_out_heads == 2 and v1.norm_gain.shape == norm.norm_gain.shape == (32,)
    assert v1.lambda_init == norm.lambda_init == pytest.approx(0.3555, abs=1e-4)  # layer 1 of the paper's schedule
    assert v2.config.norm == "none" and v2.lambda_token.shape == (4, 64)


def test_arms_start_from_the_same_weights_at_one_seed():
    weights = {name: dict(RecallDecoder(arm, seed=3).named_parameters()) for name, arm in ARMS.items()}
    for name, of_arm in weights.items():
        for key, parameter in of_arm.items():
            other = weights["standard"].get(key)
            if other is not None and other.shape == parameter.shape:
                assert torch.equal(parameter, other), (name, key)
    layer = "language_model.layers.0.self_attn."
    second, first = (weights["v2"][layer + key] for key in ("differential.second_query", "q_proj.weight"))
    assert second.std().item() == pytest.approx(first.std().item(), rel=0.05)
    assert torch.corrcoef(torch.stack((second.flatten(), first.flatten())))[0, 1].abs() < 0.1  # drawn, not copied
    again = dict(RecallDecoder(ARMS["v1"], seed=4).named_parameters())
    assert not torch.equal(again[layer + "q_proj.weight"], weights["v1"][layer + "q_proj.weight"])
    assert not torch.equal(again[layer + "differential.lambda_q1"], weights["v1"][layer + "differential.lambda_q1"])


@pytest.mark.parametrize("arm", ARMS)
def test_an_answer_depends_on_its_key_and_not_on_later_ones(arm):
    model = RecallDecoder(ARMS[arm], seed=0)
    tokens, _ = draw_batch(4, generator(), batch_size=3)
    changed = tokens.clone()
    changed[:, -2] = (changed[:, -2] + 1) % NUM_KEYS
    with torch.no_grad():
        before, after = model(tokens, answers=4), model(changed, answers=4)
    assert before.shape == (3, 4, NUM_KEYS + NUM_VALUES)
    torch.testing.assert_close(before[:, :2], after[:, :2], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 2], after[:, 2], atol=1e-3)


# ---- a run
@pytest.mark.parametrize("arm", ["standard", "v1", "v2"])
def test_a_run_repeats_bit_for_bit_and_a_seed_changes_it(arm):
    runs = [train(arm, seed, 4, 2e-3, 5) for seed in (0, 0, 1)]
    assert runs[0]["losses"] == runs[1]["losses"] and len(runs[0]["losses"]) == 5
    assert runs[0]["losses"] != runs[2]["losses"]


def test_a_run_that_does_not_get_there_is_censored():
    found = train("standard", 0, 8, 2e-3, 4)
    assert (found["steps"], found["censored"], found["status"]) == (4, True, "finished")
    assert found["accuracy"] < 0.2


def test_a_run_ends_when_it_retrieves():
    found = train("double_width", 0, 2, 8e-3, 600)
    assert not found["censored"] and 20 < found["steps"] < 600 and found["accuracy"] >= 0.75
    shorter = train("double_width", 0, 2, 8e-3, found["steps"])
    assert shorter["censored"] and shorter["accuracy"] < 0.75  # one step less is not enough


def test_accuracy_counts_only_when_it_is_smoothed(monkeypatch):
    """A threshold that every batch reaches counts as reached when the window is full, not at the first batch."""
    monkeypatch.setattr(study_symbolic, "SYMBOLIC_THRESHOLD", 0.0)
    found = study_symbolic.train("standard", 0, 4, 1e-3, 100)
    assert found["steps"] == study_symbolic.SMOOTHING_STEPS - 1 and not found["censored"]


def test_a_loss_that_is_not_finite_ends_the_run():
    found = train("standard", 0, 4, 1e30, 500)
    assert found["censored"] and found["steps"] == 500 and "not finite at step" in found["status"]


def test_bad_arguments_are_named(capsys):
    with pytest.raises(UserError, match="arm 'v3' is unknown: choose one of standard, v1"):
        train("v3", 0, 8, 1e-3, 1)
    with pytest.raises(UserError, match="pairs 65: must be 2 to 64"):
        train("v1", 0, 65, 1e-3, 1)
    with pytest.raises(SystemExit):
        main(Config(pairs=(9,)))
    assert "--pairs=9: the pilot has a grid for 8, 16 pairs" in capsys.readouterr().err


def test_a_planned_run_gives_the_fields_of_its_record():
    section = {
        "arms": {arm: {"family": "core", "seeds": [0], "learning_rates": {"4": 3e-3}} for arm in ("standard", "v1")},
        "pairs": [4],
        "max_steps": {"4": 3},
    }
    job = SimpleNamespace(arm="v1", seed=0, pairs=4)
    found = study_symbolic.run(section, job, None)
    assert found["learning_rate"] == 3e-3 and found["max_steps"] == found["steps"] == 3
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in found}
    record = msgspec.convert(found | environment | {"study": "B1", "plan": "ab"}, SymbolicRecord)
    assert (record.arm, record.pairs, record.seed, record.censored) == ("v1", 4, 0, True)
    fingerprint = study_symbolic.measure_fingerprint(section, None)
    assert fingerprint == study_symbolic.measure_fingerprint(section, None) and len(fingerprint) == 16


# ---- the pilot
def made(arm, rate, *steps, pairs=8, limit=1000):
    return [
        dict(arm=arm, pairs=pairs, seed=seed, learning_rate=rate, steps=count, censored=count == limit)
        for seed, count in enumerate(steps)
    ]


def test_the_learning_rate_is_that_of_the_least_mean_log_steps():
    runs = made("v1", 1e-3, 300, 300) + made("v1", 2e-3, 90, 900) + made("v1", 4e-3, 100, 1000)
    assert choose_learning_rate(runs) == 2e-3  # geometric means 300, 285, 316: one censored run costs more
    assert choose_learning_rate(made("v1", 2e-3, 200, 200) + made("v1", 1e-3, 200, 200)) == 1e-3
    runs += made("standard", 1e-3, 400, 500) + made("v1", 1e-3, 40, pairs=16)
    assert summarise_pilot(runs) == {
        "8": {"max_steps": 4500, "learning_rates": {"standard": 1e-3, "v1": 2e-3}},  # the median of 90, 400, 500, 900
        "16": {"max_steps": 400, "learning_rates": {"v1": 1e-3}},
    }
    assert "| v1 | 300, 300 | **90, 900** | 100, >1000 |" in format_pilot(runs)


def test_the_pilot_continues_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_symbolic, "LEARNING_RATES", {4: (1e-3, 2e-3)})
    monkeypatch.setattr(study_symbolic, "PILOT_MAX_STEPS", {4: 2})
    file = tmp_path / "pilot.json"
    threads = torch.get_num_threads()
    try:
        main(Config(arms=("v1",), pairs=(4,), seeds=(100,), output=str(file)))
        first = read_json(file)["runs"]
        assert [run["learning_rate"] for run in first] == [1e-3, 2e-3]
        main(Config(arms=("standard", "v1"), pairs=(4,), seeds=(100,), output=str(file)))
    finally:
        torch.set_num_threads(threads)
    found = read_json(file)
    assert found["runs"][2:] == first and [run["arm"] for run in found["runs"]] == ["standard"] * 2 + ["v1"] * 2
    assert found["chosen"]["4"]["max_steps"] == 20 and "| 4 pairs | 0.001 | 0.002 |" in capsys.readouterr().out
    assert math.isclose(found["runs"][0]["losses"][0], found["runs"][1]["losses"][0])  # the rate acts after it
