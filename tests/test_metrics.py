"""The metrics of --metric against values from the official code and from their formulas, and in a run."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from refusals import refused
from runs import ROOT, logged
from test_data import vqav2

import metrics
from finetune_original import Config, finetune
from run_folder import check_config

SAMPLE = ROOT / "assets" / "sample"


def rows_of(pairs: list[tuple[str, str]]) -> list[dict]:
    return [{"response": response, "ground_truth": answer, "answers": [answer]} for response, answer in pairs]


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [  # of vqaEval.py of GT-Vision-Lab/VQA at a013f00, run under Python 3
        ("none yes", ["1,000", *["wow?"] * 5, "1,000", "1,000", "none yes", "wow?"], 0.3),
        ("red", ["don't yes", "a 2", "don't yes", "don't yes", "a 2", "red", "red", "a 2", "a 2", "don't don't"], 0.6),
        ("a twelve", [*["twelve don't", "red b\n"] * 3, *["a twelve"] * 3, "yes"], 0.9),
        ("0", [*["none"] * 4, "0", "0", *[" tv"] * 4], 1.0),
        ("\tq", ["dont x-ray"] * 5 + ["red. yes"] * 5, 0.0),
        ("Yes", ["yes"] * 10, 0.0),  # if all agree, nothing is normalised
        ("yes\n", ["yes"] * 10, 1.0),
    ],
)
def test_vqa_is_the_official_rule(response, answers, expected):
    assert metrics.vqa_accuracy(response, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "answers", "expected"),
    [("Red  Car", ["red cart"], 7 / 8), ("red", ["blue", "rid"], 2 / 3), ("re", ["blue"], 0.0), ("", ["x"], 0.0)],
)
def test_anls_is_one_minus_the_edit_distance_of_the_closest_answer(response, answers, expected):
    pytest.importorskip("anls", reason="anls is not installed")
    assert metrics.anls(response, answers) == pytest.approx(expected)


def test_rouge_is_the_longest_common_subsequence_of_the_closest_answer():
    pytest.importorskip("rouge_score", reason="rouge-score is not installed")
    # 3 words in common: precision 3 / 4, recall 3 / 3
    assert metrics.rouge_l("a cat sat down", ["dogs", "A cat sat."]) == pytest.approx(2 * 0.75 / 1.75)
    assert metrics.score_answers("rouge", rows_of([("a b", "a b"), ("x", "a b")])) == 0.5


def test_map_needs_boxes_in_the_suffix_which_it_scores():
    boxes = "<loc0000><loc0000><loc0512><loc0512> cat"
    metrics.check_answers("map", "row", boxes, ("cat",))
    with refused("row", "--metric=map needs boxes"):
        metrics.check_answers("map", "row", "cat", (boxes,))


def test_map_averages_over_labels_and_thresholds():
    """A box of IoU 0.72 counts at five of COCO's ten thresholds; a label that is never found has precision 0."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    true = "<loc0000><loc0000><loc0100><loc0100> cat"
    near = "<loc0000><loc0000><loc0100><loc0072> Cat"
    assert metrics.score_answers("map", rows_of([(true, true)])) == pytest.approx(1.0)
    assert metrics.score_answers("map", rows_of([(near, true)])) == pytest.approx(0.5)
    two = f"{true} ; <loc0500><loc0500><loc0600><loc0600> dog"
    assert metrics.score_answers("map", rows_of([(near, two)])) == pytest.approx(0.25)
    assert metrics.score_answers("map", rows_of([(true, true), ("no box", true)])) == pytest.approx(0.5, abs=0.01)
    assert metrics.score_answers("map", rows_of([("no box", true)])) == 0.0


def test_a_missing_package_is_named(monkeypatch):
    for metric, package in metrics.PACKAGES.items():
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with refused(f"--metric={metric}", f"pip install {package}"):
            finetune(Config(data="x.jsonl", metric=metric), "original")
    with refused("--metric=vqa", "haystacks"):
        check_config(Config(metric="vqa"))


def test_a_run_is_scored_logged_and_ranked_by_the_metric(tiny_model, tmp_path, monkeypatch, capsys):
    """best/ follows the metric: the answer at step 2 is not an exact match either, but closer."""
    shutil.copytree(SAMPLE, tmp_path / "rows")
    row = {"image": "fruit.png", "prefix": "answer en which?", "suffix": "red apple"}
    data = tmp_path / "rows" / "answers.jsonl"
    data.write_text(json.dumps(row | {"answers": ["red apple"] * 6 + [{"answer": "apple"}] * 4}) + "\n")
    config = tiny.quick(Config, tiny_model, tmp_path, max_steps=4, eval_every=2)
    config = replace(config, data=str(SAMPLE / "rows.jsonl"), eval_data=str(data), batch_size=2)
    responses = iter(["pear", "an apple", "Pear", "pear"])

    def answer(answerer, questions, **_):
        response = next(responses)
        return [
            {"id": q.id, "prompt": q.prompt, "response": response, "ground_truth": q.ground_truth, **q.fields}
            for q in questions
        ]

    monkeypatch.setattr("evaluation.answer_questions", answer)
    finetune(replace(config, metric="vqa"), "original")
    assert logged(config, "metric") == [(step, {"answers.jsonl": value}) for step, value in ((0, 0), (2, 1), (4, 0))]
    assert [scores["answers.jsonl"] for _, scores in logged(config, "eval")] == [[0, 1]] * 3
    assert json.loads((Path(config.output_dir) / "best" / "run.json").read_text())["step"] == 2
    assert "answers.jsonl, vqa" in capsys.readouterr().out


def test_rows_that_a_metric_cannot_score_are_named(tiny_model, tmp_path):
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    config = tiny.quick(Config, tiny_model, tmp_path, data=str(SAMPLE / "rows.jsonl"), eval_only=True)
    config = replace(config, eval_data=config.data)
    with refused("rows.jsonl:", "10 annotators"):
        finetune(replace(config, metric="vqa"), "original")
    with refused("rows.jsonl:", "needs boxes"):
        finetune(replace(config, metric="map"), "original")


def test_vqav2_brings_the_answers_of_its_annotators(tmp_path):
    from data import read_source

    vqav2(tmp_path / "vqa", "val", images=2)
    file = tmp_path / "vqa" / "v2_mscoco_val2014_annotations.json"
    stored = json.loads(file.read_text())
    for annotation in stored["annotations"]:
        annotation["answers"] = [{"answer": f"a{n}", "answer_id": n} for n in range(10)]
    file.write_text(json.dumps(stored))
    ten = read_source(f"vqav2:{tmp_path / 'vqa'}", "val", True)
    for annotation in stored["annotations"]:
        del annotation["answers"]
    file.write_text(json.dumps(stored))
    one = read_source(f"vqav2:{tmp_path / 'vqa'}", "val", True)
    assert one.answers(0) == (one.text(0)[1],) and ten.answers(0) == tuple(f"a{n}" for n in range(10))
    assert one.fingerprint() == ten.fingerprint()  # nothing is trained on them
