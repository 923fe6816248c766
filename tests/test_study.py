"""The study: its plan, its questions, its runs and records."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from runs import wait_for
from simulated_study import ENVIRONMENT

import finetune_diff
import finetune_original
import study
import study_conversion
import study_records
from checkpoint import weights_fingerprint
from differential_attention import DifferentialConfig
from errors import TrainingFailed, UserError
from files import write_json
from haystack import ImagePool, read_pool
from modeling_gemma import PaliGemmaForConditionalGeneration
from study_conversion import Condition
from study_records import Answers, ConversionRecord, analysed_seeds

ROOT = Path(__file__).parent.parent
POOL = ImagePool(read_pool(splits=("train",)))
PILOT = json.loads(study.PLAN.read_text())["A-pilot"]
LOOK_ALIKES = {c: [other for other in POOL.captions if other != c] for c in POOL.captions}


def section(model: Path, **changes) -> dict:
    """A plan of study A that runs in seconds."""
    train = dict(max_steps=3, batch_size=4, shapes=[[1, 2], [4, 2]], group_by_length=True, average_last=0.5)
    train |= dict(eval_samples=2, eval_every=3, save_every=3, keep_checkpoints=1, tracker="none", warmup_steps=1)
    kinds = {"look-alike": dict(distractors="look-alike"), "noise": dict(noise=0.2)}
    shapes = {16: (1, 4), 64: (4, 4)}
    conditions = {
        f"{cells} {kind}": dict(images=images, grid=grid, n=3, **choices)
        for cells, (images, grid) in shapes.items()
        for kind, choices in kinds.items()
    }
    conditions["16 absent"] = dict(images=1, grid=4, n=2, present=False)
    arms = {
        "standard": dict(family="core", seeds=[0, 1]),
        "split": dict(family="core", seeds=[0, 1], flags=dict(lr=1e-2), differential=dict(preset="split")),
        "gate": dict(family="rival", seeds=[0], differential=dict(preset="gate")),
    }
    endpoint = dict(cells=[16, 64], kinds=["look-alike", "noise"])
    plan = dict(model=str(model), weights=weights_fingerprint(model), threads=1)
    plan |= dict(train=train, arms=arms, endpoint=endpoint, conditions=conditions)
    plan |= {key: PILOT[key] for key in ("look_alikes", "look_alikes_sha256")}
    return plan | dict(attention_questions=1, likelihood_questions=2, fingerprint_seed=100) | changes


# ---- questions
def test_questions_are_the_seed_s_and_look_for_every_concept_in_turn():
    conditions = {"16 noise": Condition(1, 4, 250, noise=0.2), "64 look-alike": Condition(4, 4, 5, "look-alike")}
    asked = study_conversion.make_questions(conditions, LOOK_ALIKES, 128, seed=3)
    noise = [q for q in asked if q.setting == "16 noise"]
    assert [q.prompt for q in noise] == [f"answer en where is {POOL.captions[i % 200]}?" for i in range(250)]
    again = study_conversion.make_questions(conditions, LOOK_ALIKES, 128, seed=3)
    other = study_conversion.make_questions(conditions, LOOK_ALIKES, 128, seed=4)
    assert [q.ground_truth for q in again] == [q.ground_truth for q in asked] != [q.ground_truth for q in other]
    image = noise[0].images[0]
    assert image.open().tobytes() == again[0].images[0].open().tobytes() != other[0].images[0].open().tobytes()
    assert len(asked[-1].images) == 4
    places = {q.ground_truth for q in noise}
    assert len(places) == 16


def test_look_alikes_are_the_nearest_captions():
    questions = study_conversion.make_questions({"x": Condition(1, 4, 3, "look-alike")}, LOOK_ALIKES, 128, 0)
    for question, caption in zip(questions, POOL.captions[:3], strict=True):
        shown = {POOL.images[i].caption for row in question.images[0].cells for i in row}
        assert shown == {caption, *LOOK_ALIKES[caption][:15]}


def test_noise_is_as_strong_whatever_the_number_of_cells():
    """It is added at the model's image size: scaling down a larger stitched image would average it out."""
    for grid in (2, 4):
        noisy, plain = (
            study_conversion.make_questions({"x": Condition(1, grid, 1, noise=noise)}, LOOK_ALIKES, 128, 0)[0]
            for noise in (0.05, 0.0)
        )
        images = [np.asarray(q.images[0].open(), np.float64) / 255 for q in (noisy, plain)]
        assert images[0].shape == (128, 128, 3)
        inside = (images[1] > 0.2) & (images[1] < 0.8)  # not clipped
        assert abs((images[0] - images[1])[inside].std() - 0.05) < 0.003


def test_other_look_alikes_than_the_plan_s_are_refused():
    found = study_conversion.read_look_alikes(PILOT)
    assert len(found) == 200 and all(len(others) == 64 for others in found.values())
    with pytest.raises(UserError, match="look_alikes.json: is not the file that the plan was made with"):
        study_conversion.read_look_alikes(PILOT | {"look_alikes_sha256": "00"})


def test_look_alikes_of_the_included_model_look_alike():
    model = PaliGemmaForConditionalGeneration.from_pretrained(ROOT / "assets" / "paligemma-nano")
    processor = study_conversion.PaliGemmaProcessor.from_pretrained(ROOT / "assets" / "paligemma-nano")
    found = study_conversion.rank_look_alikes(model, processor)
    assert set(found) == set(POOL.captions)
    assert all(caption not in others and len(set(others)) == 199 for caption, others in found.items())
    committed = study_conversion.read_look_alikes(PILOT)
    assert all(found[caption][:3] == others[:3] for caption, others in list(committed.items())[:20])
    assert found["ant"][0] == "spider" and found["taxi"][0] == "police car"


def test_answers_are_packed_one_bit_each():
    rows = [dict(setting="a", response=r, ground_truth="1, 1, 1") for r in ("1, 1, 1", "1, 2, 1", None, "1, 1, 1.")]
    packed = study_conversion.pack_answers([*rows, dict(setting="b", response="-1", ground_truth="-1")], ["a", "b"])
    assert packed == {"a": {"n": 4, "right": "90"}, "b": {"n": 1, "right": "80"}}
    bits = np.unpackbits(np.frombuffer(bytes.fromhex("90"), np.uint8))[:4]
    assert bits.tolist() == [1, 0, 0, 1]


# ---- one run
@pytest.mark.parametrize("arm", ["standard", "split", "gate"])
def test_a_run_leaves_a_record_and_is_not_trained_twice(tiny_model, tmp_path, arm):
    plan = section(tiny_model)
    record = study_conversion.run(plan, study.Job(arm, 0), tmp_path / arm)
    assert record["status"] == "finished" and record["num_concepts"] == 200
    assert {name: answers["n"] for name, answers in record["answers"].items()} == {
        name: condition["n"] for name, condition in plan["conditions"].items()
    }
    assert set(record["log_likelihoods"]) == set(study_records.endpoint_conditions(plan))
    assert all(value < 0 for value in record["log_likelihoods"].values())
    assert len(record["needle_shares"]) == 2 and all(0 < share < 1 for share in record["needle_shares"])
    assert set(record["knockout"]) == (set(study_records.endpoint_conditions(plan)) if arm == "split" else set())
    assert len(record["lambdas"]) == {"standard": 0, "split": 2, "gate": 0}[arm]
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / arm).rglob("*.safetensors")}
    again = study_conversion.run(plan, study.Job(arm, 0), tmp_path / arm)
    assert {**again, "seconds": 0} == {**record, "seconds": 0}
    assert times == {file: file.stat().st_mtime_ns for file in (tmp_path / arm).rglob("*.safetensors")}


def test_the_likelihood_is_that_of_the_right_answer_alone(tiny_model):
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    processor = study_conversion.PaliGemmaProcessor.from_pretrained(tiny_model)
    answerer = study_conversion.Answerer(model, processor, study_conversion.make_accelerator(), torch.float32, 2)
    conditions = {"a": Condition(1, 2, 2), "b": Condition(2, 2, 1, present=False)}
    asked = study_conversion.make_questions(conditions, LOOK_ALIKES, processor.image_size, 0)
    expected = []
    for q in asked:
        batch = processor(images=[[i.open() for i in q.images]], text=[q.prompt], suffix=[q.ground_truth])
        labels = batch.pop("labels")
        with torch.no_grad():
            logs = model.double()(**batch).logits.log_softmax(-1)[:, :-1]
        is_answer = labels[:, 1:] != -100
        expected.append(logs.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0][is_answer].sum().item())
    model.float()
    assert study_conversion.log_likelihood(answerer, asked) == pytest.approx(np.mean(expected), abs=1e-4)


def test_a_second_map_costs_one_more_product_of_queries_and_keys(tiny_model):
    question = study_conversion.make_questions({"a": Condition(1, 2, 1)}, LOOK_ALIKES, 56, 0)[0]
    configs = [finetune_original.Config(model=str(tiny_model))]
    for preset in ("sharpen", "split"):
        differential = DifferentialConfig(preset=preset)
        configs.append(finetune_diff.Config(model=str(tiny_model), differential=differential))
    images = [image.open() for image in question.images]
    standard, sharpen, split = (study_conversion.count_flops(config, images, question.prompt) for config in configs)
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    processor = study_conversion.PaliGemmaProcessor.from_pretrained(tiny_model)
    length = len(processor.encode(question.prompt)[0])
    text, rank = model.config.text_config, DifferentialConfig(preset="split").resolve().rank
    width = text.num_attention_heads * text.head_dim
    each_layer = 2 * length * length * width + 2 * length * rank * (text.hidden_size + width)
    assert sharpen == standard and split - standard == text.num_hidden_layers * each_layer


def test_the_knocked_out_answers_are_those_without_lambda(tiny_model, tmp_path, monkeypatch):
    real, lambdas = study_conversion.answer_questions, []

    def answer(answerer, questions, **more):
        lambdas.append(max(map(abs, study_conversion.lambda_values(answerer.model).values())))
        return real(answerer, questions, **more)

    monkeypatch.setattr(study_conversion, "answer_questions", answer)
    study_conversion.run(section(tiny_model), study.Job("split", 0), tmp_path / "split")
    assert len(lambdas) == 2 and lambdas[0] > 0.4 and lambdas[1] == 0


def test_other_weights_than_the_plan_s_are_refused(tiny_model, tmp_path):
    plan = section(tiny_model, weights="0123")
    with pytest.raises(UserError, match="the plan is for 0123: restore them"):
        study_conversion.run(plan, study.Job("standard", 0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arms_differ_in_the_plan_s_flags_alone(tiny_model, tmp_path):
    plan = section(tiny_model)
    standard, split = (study_conversion.make_config(plan, arm, 1, tmp_path) for arm in ("standard", "split"))
    assert split.differential.preset == "split" and split.differential.seed == 1
    assert {k for k, v in vars(standard).items() if getattr(split, k) != v} == {"lr"}
    assert standard.shapes == ((1, 2), (4, 2)) and standard.seed == 1


def test_a_failed_run_is_asked_at_its_last_checkpoint(tiny_model, tmp_path):
    plan = section(tiny_model)
    plan["arms"]["dead"] = dict(family="extra", seeds=[0], differential=dict(preset="split", lambda_lr=1e-60))
    record = study_conversion.run(plan, study.Job("dead", 0), tmp_path / "dead")
    assert "did not learn" in record["status"] and record["answers"]["16 noise"]["n"] == 3
    assert record["final_loss"] is None


def test_a_run_whose_loss_is_not_finite_is_a_result_and_other_faults_are_not(tiny_model, tmp_path, monkeypatch):
    config = study_conversion.make_config(section(tiny_model), "standard", 0, tmp_path)

    def fail(error):
        def finetune(*_):
            raise error

        monkeypatch.setattr(study_conversion.finetune_original, "finetune", finetune)

    fail(TrainingFailed("q_proj is not finite after step 3"))
    assert study_conversion.train(config, "standard") == (config.model, "q_proj is not finite after step 3")
    fail(UserError("runs/loss-test: no space left"))
    with pytest.raises(UserError, match="no space left"):
        study_conversion.train(config, "standard")


def test_the_fingerprint_is_that_of_the_first_ten_losses(tiny_model, tmp_path):
    plan = section(tiny_model)
    first = study_conversion.measure_fingerprint(plan, tmp_path / "a")
    assert first == study_conversion.measure_fingerprint(plan, tmp_path / "b")
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 10 and first == study_records.fingerprint_of(losses)
    assert study_records.fingerprint_of([*losses[:9], losses[9] + 1e-7]) != first


def test_the_pilot_s_grid_is_the_mean_of_the_four_conditions(tiny_model):
    plan = section(tiny_model)
    answers = {"16 look-alike": "f0", "16 noise": "80", "64 look-alike": "00", "64 noise": "c0"}
    answers = {name: Answers(4, right) for name, right in answers.items()}
    record = make_record(plan, "split", 7, answers=answers, final_loss=0.25, lambdas=[0.4, 0.6])
    failed = make_record(plan, "split", 8, answers=answers, final_loss=None, lambdas=[])
    records = {study.Job("split", 7): record, study.Job("split", 8): failed}
    lines = study_conversion.format_pilot(plan, records)
    assert lines[2:] == ["| split | 43.8 | 43.8 | 43.8 | 0.2500 | 0.400 to 0.600 |"]


def make_record(plan: dict, arm: str, seed: int, **fields) -> ConversionRecord:
    fields = dict(answers={}, final_loss=None, lambdas=[]) | fields
    return ConversionRecord(
        study="A", plan=study_records.hash_plan(plan), arm=arm, seed=seed, trained_parameters=1, num_concepts=1,
        needle_shares=[], knockout={}, **(ENVIRONMENT | {"seconds": 60.0}), **fields,
    )  # fmt: skip


# ---- the plan
def test_jobs_are_ordered_so_that_arms_stay_level(tiny_model):
    jobs = study.list_jobs(section(tiny_model))
    assert [(job.arm, job.seed) for job in jobs] == [
        ("standard", 0), ("split", 0), ("standard", 1), ("split", 1), ("gate", 0),
    ]  # fmt: skip
    assert study.list_jobs(section(tiny_model), ("split",), (1,)) == [study.Job("split", 1)]
    with pytest.raises(UserError, match="--arms: the plan has no v9: choose from standard, split, gate"):
        study.list_jobs(section(tiny_model), ("v9",))
    with pytest.raises(UserError, match=r"--seeds: the plan, as amended, has no 9: choose from \[0, 1\]"):
        study.list_jobs(section(tiny_model), seeds=(9,))


@pytest.mark.parametrize("name", json.loads(study.PLAN.read_text()))
def test_every_section_of_the_plan_lists_its_runs_and_their_flags(name, tmp_path):
    plan = study.read_section(name)
    jobs = study.list_jobs(plan)
    seeds = sum(len(analysed_seeds(plan, arm)) for arm in plan["arms"])
    assert len(set(jobs)) == len(jobs) == seeds * (len(plan["pairs"]) if name == "B1" else 1)
    if name == "C":
        assert {job.seed for job in jobs} == {0, 1, 2, 3} and plan["arms"]["split"]["seeds"] == list(range(8))
        with pytest.raises(UserError, match="--seeds: the plan, as amended, has no 4"):
            study.list_jobs(plan, seeds=(4,))
    assert len(study.format_status(plan, {}, jobs=2)) == 1 + len(plan["arms"])
    if name != "B1":
        configs = [study_conversion.make_config(plan, job.arm, job.seed, tmp_path) for job in jobs]
        assert [config.seed for config in configs] == [job.seed for job in jobs]


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("report", "--records=results/study-x"),
        ("report", "--arms=split"),
        ("status", "--seeds=1"),
        ("calibrate", "--jobs=3"),
    ],
)
def test_a_flag_without_effect_is_refused(flag, other, monkeypatch, capsys):
    value = "runs/x" if flag == "calibrate" else "True"
    monkeypatch.setattr(sys, "argv", ["study.py", f"--{flag}={value}", other])
    with pytest.raises(SystemExit) as exit_:
        study.main()
    assert exit_.value.code == 2 and f"does not apply to --{flag}: leave it out" in capsys.readouterr().err


def test_records_of_another_plan_are_refused(tiny_model, tmp_path):
    plan = section(tiny_model)
    job = study.Job("split", 1)
    job.record(tmp_path).parent.mkdir()
    write_json(job.record(tmp_path), msgspec.to_builtins(make_record(plan, "split", 1)))
    found = study.read_records(tmp_path, "A", plan)
    assert list(found) == [job]
    lines = study.format_status(plan, found, jobs=2)
    assert lines[2].split() == ["split", "core", "1", "1"]
    assert lines[-1] == "4 runs of about 1.0 min: 0.0 h with 2 at a time"
    reordered = dict(reversed(plan.items()))
    assert study.read_records(tmp_path, "A", reordered)
    with pytest.raises(UserError, match="seed01.json: of another plan"):
        study.read_records(tmp_path, "A", plan | {"attention_questions": 5})


def test_a_study_does_not_continue_where_the_same_run_gives_other_numbers(tiny_model, tmp_path, monkeypatch):
    plan, job = section(tiny_model), study.Job("standard", 0)
    outputs = iter(("ab12", "cd34"))  # of the process that measures the fingerprint; ENVIRONMENT has ab12
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=next(outputs)))
    found = {job: make_record(plan, "standard", 0)}
    study.run_jobs("A", plan, tmp_path, [], found, study.Config())
    with pytest.raises(
        UserError, match="1 records have the fingerprint ab12, this machine has cd34.*--records=results/study-"
    ):
        study.run_jobs("A", plan, tmp_path, [], found, study.Config())


def test_a_plan_must_be_committed_before_it_is_run():
    with pytest.raises(UserError, match="commit the plan before it is run"):
        study.check_committed("A", {"never": "committed"})


def test_the_committed_plans_name_real_arms_and_conditions(tmp_path):
    for name, plan in json.loads(study.PLAN.read_text()).items():
        if not name.startswith("A"):
            continue
        for arm, choices in plan["arms"].items():
            config = study_conversion.make_config(plan, arm, choices["seeds"][0], tmp_path)
            study_conversion.finetune_original.check_config(config)
        conditions = {c: study_conversion.msgspec.convert(v, Condition) for c, v in plan["conditions"].items()}
        assert set(study_records.endpoint_conditions(plan)) <= set(conditions)
        assert plan["weights"] == weights_fingerprint(ROOT / plan["model"])
        for seed in {seed for choices in plan["arms"].values() for seed in choices["seeds"]}:
            assert (seed in (100, 101)) == name.endswith("-pilot")  # pilot seeds are never used again


def test_the_committed_report_and_figures_are_what_the_records_give(tmp_path, capsys):
    """Byte for byte, with the pinned versions of matplotlib and pillow."""
    study.write_report(tmp_path)
    for name in ("report.md", "figure.png", "summary.png"):
        assert (tmp_path / name).read_bytes() == (study.RECORDS / name).read_bytes(), name
    assert capsys.readouterr().out.encode() == (study.RECORDS / "report.md").read_bytes()


STUB = """
import signal, sys, time
from pathlib import Path

run = next(a for a in sys.argv if a.startswith("--run=")).removeprefix("--run=")
if run == "fingerprint":
    print("ab12")
elif run.startswith("flipped"):
    sys.exit("no memory")
elif run.startswith("standard"):
    Path("records/standard").mkdir(parents=True, exist_ok=True)
    Path(f"records/{run}.json").touch()
else:
    signal.signal(signal.SIGTERM, lambda *_: (Path("stopped").touch(), sys.exit()))
    Path("started").touch()
    time.sleep(600)
"""
RUN_STUB = """
import sys
from pathlib import Path

import study

study.ROOT, study.POLL_SECONDS = Path.cwd(), 0.05
jobs = [study.Job(arm, 0) for arm in sys.argv[1:]]
study.run_jobs("A", {"threads": 1}, Path("records"), jobs, {}, study.Config(jobs=1))
"""


def start_jobs(folder: Path, *arms: str) -> subprocess.Popen:
    """`run_jobs` with these arms, in a process of its own; the runs are those of STUB."""
    (folder / "study.py").write_text(STUB)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", RUN_STUB, *arms]  # -P: its study.py is not that of the folder
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_study_stops_its_runs(tmp_path, number):
    process = start_jobs(tmp_path, "split")
    try:
        wait_for(tmp_path / "started", process)
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number and (tmp_path / "stopped").exists()


def test_a_run_that_fails_is_named_and_the_others_still_run(tmp_path):
    process = start_jobs(tmp_path, "flipped", "standard")
    _, error = process.communicate(timeout=60)
    assert "UserError: 1 runs failed; the last lines of" in error and "flipped/seed00.log say why" in error
    assert (tmp_path / "records" / "standard" / "seed00.json").exists()
    assert "no memory" in next(tmp_path.rglob("flipped/seed00.log")).read_text()


@pytest.mark.slow
def test_a_study_that_is_stopped_loses_only_the_runs_in_flight(tiny_model, tmp_path):
    """`python study.py` in its own repository, stopped twice, then finished: the records of an undisturbed study."""
    for name in ("a", "b"):
        shutil.copytree(ROOT, tmp_path / name, ignore=shutil.ignore_patterns(".git", "runs", "tests", "docs"))
        shutil.rmtree(tmp_path / name / "results" / "study" / "A", ignore_errors=True)
        (tmp_path / name / "study.json").write_text(json.dumps({"A": section(tiny_model)}))
        git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
        for command in (["init", "-q"], ["add", "study.json"], ["commit", "-qm", "plan"]):
            subprocess.run([*git, *command], cwd=tmp_path / name, check=True)
    command = [sys.executable, "study.py", "--jobs=1"]
    for seconds in (25, 35):
        process = subprocess.Popen(command, cwd=tmp_path / "a")
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        process.wait()
    for name in ("a", "b"):
        subprocess.run(command, cwd=tmp_path / name, check=True)
    records = {}
    for name in ("a", "b"):
        folder = tmp_path / name / "results" / "study" / "A"
        records[name] = {file.relative_to(folder): json.loads(file.read_text()) for file in folder.rglob("*.json")}
    assert len(records["b"]) == 5
    for file, record in records["b"].items():
        assert replace_time(records["a"][file]) == replace_time(record)


def replace_time(record: dict) -> dict:
    return {key: value for key, value in record.items() if key not in ("seconds", "commit")}
