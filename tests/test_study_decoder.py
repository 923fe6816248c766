"""Study C: its prompts, its scoring, and one run from training rows to a record."""

import json

import msgspec
import numpy as np
import pytest
import tiny_phi
from simulated_study import ENVIRONMENT

import study
import study_decoder
import study_report
from checkpoint import weights_fingerprint
from errors import UserError
from study_decoder import key_value_prompt
from study_records import Answers, ConversionRecord, hash_plan


@pytest.fixture(scope="module")
def section(tmp_path_factory) -> dict:
    """A plan of study C that runs in seconds."""
    model = tiny_phi.folder(tmp_path_factory.mktemp("phi") / "decoder", vision=False, max_position_embeddings=4096)
    train = dict(max_steps=2, batch_size=2, lr=1e-2, warmup_steps=1, eval_samples=1, eval_every=2, save_every=2)
    arms = {
        "standard": dict(family="core", seeds=[0, 1, 2]),
        "split": dict(family="core", seeds=[0, 1, 2], differential=dict(preset="split")),
        "additive": dict(family="core", seeds=[0, 1, 2], differential=dict(preset="additive")),
    }
    plan = dict(model=str(model), weights=weights_fingerprint(model), threads=1, dtype="bfloat16", arms=arms)
    plan |= dict(train=train | {"tracker": "none", "dtype": "bfloat16"}, train_pairs=3, needles=2, prompts=3)
    return plan | dict(endpoint=dict(cells=[3, 5], kinds=["pairs"]), fingerprint_seed=100)


# ---- prompts
@pytest.mark.parametrize("needles", [1, 2, 4])
def test_a_prompt_holds_the_codes_that_it_asks_for(needles):
    prompt, asked, codes = key_value_prompt(90, "a key", needles)
    *lines, question = prompt.split("\n")
    held = dict(line.removeprefix("The code of the ").removesuffix(".").split(" is ") for line in lines)
    assert list(held.values()) == codes and len(held) == len(set(codes)) == 90
    listed = question.split(" of the ", 1)[1].split("?")[0].replace(" and the ", ", the ").split(", the ")
    assert [held[noun] for noun in listed] == asked and len(set(listed)) == needles
    assert key_value_prompt(90, "a key", needles) != key_value_prompt(90, "another", needles)


def test_every_seed_has_rows_and_questions_of_its_own(section, tmp_path):
    for seed in (0, 1):
        study_decoder.write_training_rows(tmp_path / f"{seed}.jsonl", 3, 2, 5, seed)
    first, second = ([json.loads(line) for line in (tmp_path / f"{s}.jsonl").open()] for s in (0, 1))
    assert len(first) == 5 and not {row["prefix"] for row in first} & {row["prefix"] for row in second}
    asked, others = (study_decoder.make_questions(section, seed) for seed in (0, 1))
    assert [q.setting for q in asked] == ["3 pairs"] * 3 + ["5 pairs"] * 3
    assert len({q.prompt for q in asked + others} | {row["prefix"] for row in first}) == 12 + 5
    assert asked[-1].prompt.count("\n") == 5


def test_a_code_is_right_in_its_place_and_places_come_one_after_another():
    expected = "1111 2222"
    responses = ["1111 2222", "2222 1111", "1111", None, "The codes are 1111, 2222.", "11112222 2222", "1111 22223"]
    rows = [dict(setting="3 pairs", ground_truth=expected, response=response) for response in responses]
    packed = study_decoder.pack_codes(rows, ["3 pairs"])["3 pairs"]
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed["right"]), np.uint8), count=packed["n"])
    assert bits.reshape(2, 7).tolist() == [[1, 0, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0, 0]]


# ---- one run
def test_a_run_leaves_a_record_of_the_study(section, tmp_path):
    found = {
        arm: study_decoder.run(section, study.Job(arm, 0), tmp_path / "C" / arm / "seed00")
        for arm in ("standard", "split")
    }
    for arm, record in found.items():
        record |= ENVIRONMENT | {"study": "C", "plan": hash_plan(section), "arm": arm, "seed": 0}
        record |= {"seconds": 1.0}
        read = msgspec.convert(record, ConversionRecord)
        assert read.status == "finished" and read.answers["5 pairs"].n == 6
        assert bool(read.knockout) == bool(read.lambdas) == (arm == "split")
    assert found["split"]["forward_flops"] > found["standard"]["forward_flops"] > 0
    rows = [(tmp_path / "C" / arm / "seed00.jsonl").read_text() for arm in found]
    assert rows[0] == rows[1] and rows[0].count("\n") == 4
    lines = study_report.format_report({"C": section}, [msgspec.convert(found["split"], ConversionRecord)])
    assert lines[0].startswith("## Study C, exploratory") and "No answer yet: 1 of 9 core runs are finished." in lines


def test_the_fingerprint_is_that_of_the_machine(section, tmp_path):
    first, again = (study_decoder.measure_fingerprint(section, tmp_path / name / "fingerprint") for name in "ab")
    assert first == again and len(first) == 16


def test_a_model_that_is_not_converted_is_named(section, tmp_path):
    with pytest.raises(UserError, match="nothing: there is no model: write it with python benchmarks/smollm2.py"):
        study_decoder.check_model(section | {"model": str(tmp_path / "nothing")})


def test_the_report_answers_with_two_hypotheses(section):
    records = []
    rng = np.random.default_rng(0)
    for arm in section["arms"]:
        for seed in range(3):
            right = rng.random(6) < (0.9 if arm == "split" else 0.4)
            packed = Answers(n=6, right=np.packbits(right).tobytes().hex())
            records.append(ConversionRecord(
                study="C", plan=hash_plan(section), arm=arm, seed=seed, trained_parameters=1,
                num_concepts=3, final_loss=0.1, lambdas=[], answers={"3 pairs": packed, "5 pairs": packed},
                needle_shares=[], knockout={}, log_likelihoods={}, forward_flops=1, **ENVIRONMENT,
            ))  # fmt: skip
    lines = study_report.format_report({"C": section}, records)
    rows = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| split - ")]
    assert rows == ["split - standard", "split - additive"] * 2  # the endpoint and its parts
    assert any("3 seeds" in line and "against additive" in line for line in lines)
