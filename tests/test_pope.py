"""POPE: reader, official parsing rule and metrics, by golden cases (arXiv 2305.10355 and its evaluate.py)."""

import gzip
import json
import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import UserError
from needle_eval.pope import (
    SPLITS,
    format_table,
    is_invalid,
    load_questions,
    parse_pope,
    read_split,
    score,
    write_official,
)
from needle_eval.questions import Question

ROW = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard?", "label": "yes"}


def write(folder, split, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / f"coco_pope_{split}.json"
    path.write_text("\n".join(lines) + "\n")
    return path


def config(folder, **changes):
    return SimpleNamespace(**dict(data=str(folder), image_folder=str(folder), prefix="", samples=0) | changes)


def answers(responses, truths=None, split="random"):
    truths = truths or ["yes", "no"] * (len(responses) // 2)
    return [
        {"id": f"pope/{split}/{i}", "setting": split, "response": r, "ground_truth": t}
        for i, (r, t) in enumerate(zip(responses, truths, strict=True))
    ]


# ---- reading
def test_a_question(tmp_path):
    write(tmp_path, "random", [ROW, ROW | {"question_id": 2, "label": "no"}])
    questions = read_split(tmp_path, Path("coco/val2014"), "random", prefix="answer en ")
    assert questions[0] == Question(
        "pope/random/1",
        "random",
        ("coco/val2014/COCO_val2014_000000310196.jpg",),
        "answer en Is there a snowboard?",
        "yes",
        10,
        {},
    )
    assert [q.ground_truth for q in questions] == ["yes", "no"]
    assert read_split(tmp_path, Path("coco"), "random", limit=1)[0].prompt == ROW["text"]
    json.dumps(asdict(questions[0]))


def test_the_limit_is_per_split_and_gz_is_read(tmp_path):
    for split in SPLITS:
        path = write(tmp_path, split, [ROW | {"question_id": i} for i in range(5)])
        path.with_suffix(".json.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    (tmp_path / ROW["image"]).write_bytes(b"")
    assert [q.setting for q in load_questions(config(tmp_path, samples=2))] == [s for s in SPLITS for _ in range(2)]
    assert len(load_questions(config(tmp_path))) == 15
    (tmp_path / ROW["image"]).unlink()
    with pytest.raises(UserError, match="none of 1 images exists: give their folder by --image_folder"):
        load_questions(config(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", "json:2: not valid JSON"),
        ("[1]", "json:2: Expected object, got array: correct or delete"),
        ({k: v for k, v in ROW.items() if k != "label"}, "json:2: Object missing required field label"),
        (ROW | {"label": "maybe"}, "json:2: Invalid enum value 'maybe' - at \\$.label"),
        (ROW | {"image": 7}, "json:2: Expected str, got int - at \\$.image"),
        (ROW | {"image": "../b.jpg"}, "json:2: image ../b.jpg: is outside the folder x"),
        (ROW | {"image": "/etc/passwd"}, "json:2: image /etc/passwd: is outside the folder x"),
        (ROW, "pope/random/1 is there more than once"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    write(tmp_path, "random", [ROW, row])
    with pytest.raises(UserError, match=message):
        read_split(tmp_path, Path("x"), "random")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match="coco_pope_random.json: cannot be read"):
        read_split(tmp_path, Path("x"), "random")
    write(tmp_path, "random", [])
    with pytest.raises(UserError, match="random.json: holds no question"):
        read_split(tmp_path, Path("x"), "random")
    packed = gzip.compress(b"{}" * 100)
    for broken in (b"plain", packed[:-9], packed[:10] + b"\xff" + packed[11:]):
        (tmp_path / "coco_pope_popular.json.gz").write_bytes(broken)
        with pytest.raises(UserError, match="popular.json.gz: cannot be read"):
            read_split(tmp_path, Path("x"), "popular")


# ---- the official parsing rule
@pytest.mark.parametrize(
    ("response", "read"),
    [(r, "no") for r in ("no", "No", "No.", "no,", " no", "not sure", "There is no dog", "Yes, but not a dog")]
    + [("No dog: none", "no")]
    + [(r, "yes") for r in ("yes", "Yes. There is no dog", "NO", "no!", "no\n", "nope", "None", "Not sure")]
    + [(r, "yes") for r in ("I don't see one", "maybe", "")]
    + [(None, "none")],
)
def test_the_official_parse(response, read):
    assert parse_pope(response) == read


def test_what_is_invalid():
    assert not any(map(is_invalid, ("yes", "No", " YES. ", "no\n", "no.")))
    assert all(map(is_invalid, (None, "", "yes, it is", "no!", "maybe", "no..", "none")))


# ---- scores
def rates(scores, split="random"):
    found = scores[split]
    return [found[k] if k == "f1" else found[k]["rate"] for k in ("accuracy", "precision", "recall", "f1", "yes_ratio")]


def test_constant_answers():
    yes, no = (score(answers([word] * 3000)) for word in ("yes", "no"))
    assert rates(yes) == [0.5, 0.5, 1.0, pytest.approx(2 / 3), 1.0]
    assert rates(no) == [0.5, None, 0.0, None, 0.0]
    assert yes["mean"] == {"splits": 1, "accuracy": 0.5, "f1": pytest.approx(2 / 3)}
    assert no["mean"] == {"splits": 1, "accuracy": 0.5, "f1": None}
    assert no["random"]["precision"] == {"right": 0, "n": 0, "rate": None, "low": 0.0, "high": 1.0}
    for name, scores in (("always yes", yes), ("always no", no)):
        for given in (yes, no):
            baseline = given["random"]["baselines"][name]
            assert baseline == {key: scores["random"][key] for key in baseline}


def test_counts_by_hand():
    truths = ["yes"] * 4 + ["no"] * 6
    found = score(answers(["yes", "Yes.", "perhaps", "no"] + ["no"] * 3 + ["yes", "NO", None], truths))["random"]
    assert (found["accuracy"]["right"], found["n"]) == (6, 10)  # perhaps and NO read as yes, None as neither
    assert (found["precision"]["right"], found["precision"]["n"]) == (3, 5)
    assert (found["recall"]["right"], found["recall"]["n"]) == (3, 4)
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert (found["yes_ratio"]["right"], found["yes_ratio"]["n"]) == (5, 10)
    assert (found["invalid"]["right"], found["broken"]) == (2, 1)


def test_no_answer_at_all_does_not_crash():
    broken = score(answers([None] * 6))
    assert rates(broken) == [0.0, None, 0.0, None, 0.0]
    assert broken["random"]["invalid"]["rate"] == 1.0 and broken["random"]["broken"] == 6
    empty = score([])
    assert empty == {"mean": {"splits": 0, "accuracy": None, "f1": None}}
    no_yes = score(answers(["no", "yes"], ["no", "no"]))
    assert rates(no_yes) == [0.5, 0.0, None, None, 0.5]
    all_wrong = score(answers(["no", "yes"], ["yes", "no"]))
    assert rates(all_wrong) == [0.0, 0.0, 0.0, 0.0, 0.5]
    for scores in (broken, empty, no_yes, all_wrong):
        assert format_table({"x": scores}) and json.dumps(scores)


def test_splits_are_apart_in_the_benchmarks_order():
    rows = answers(["yes", "no"] * 4, split="adversarial") + answers(["yes", "yes"] * 4, split="random")
    scores = score(rows)
    assert list(scores) == ["random", "adversarial", "mean"]
    assert [scores[s]["accuracy"]["rate"] for s in ("random", "adversarial")] == [0.5, 1.0]
    assert scores["mean"] == {"splits": 2, "accuracy": 0.75, "f1": pytest.approx((2 / 3 + 1) / 2)}


def test_the_table():
    lines = format_table({"x": score(answers(["no"] * 8))})[1:]
    assert [" ".join(line.split()) for line in lines] == [
        "POPE n accuracy precision recall F1 yes ratio invalid",
        "random 8 50.00 [21.52, 78.48] - 0.00 - 0.00 0.00",
        "always yes 8 50.00 [21.52, 78.48] 50.00 100.00 66.67 100.00",
        "always no 8 50.00 [21.52, 78.48] - 0.00 - 0.00",
        "mean of 1 50.00 -",
    ]


# ---- the official form
def official_counts(answer_file, labels):
    """evaluate.py of AoiDragon/POPE, transcribed: TP, FP, TN, FN over lines and labels in one order."""
    counts = Counter()
    for line, label in zip(answer_file.read_text().splitlines(), labels, strict=True):
        text = json.loads(line)["answer"]
        if text.find(".") != -1:
            text = text.split(".")[0]
        words = text.replace(",", "").split(" ")
        counts["no" if "No" in words or "not" in words or "no" in words else "yes", label] += 1
    return counts


def test_the_official_script_scores_the_written_answers_alike(tmp_path):
    responses = ["yes", "No.", "no", "maybe", "Yes, but not a dog", "NO", "no, sir", ""]
    rows = [row | {"prompt": "Is there a dog?"} for row in answers(responses)]
    (file,) = write_official(rows, tmp_path / "response", "nano")
    assert file.name == "nano_coco_pope_random.json"
    counts, found = official_counts(file, [row["ground_truth"] for row in rows]), score(rows)["random"]
    assert counts["yes", "yes"] + counts["no", "no"] == found["accuracy"]["right"]
    assert counts["yes", "yes"] == found["recall"]["right"]
    rows[3]["response"] = None
    assert write_official(rows, tmp_path / "other", "nano") == [] and not (tmp_path / "other").exists()


# ---- the released files
@pytest.mark.skipif("POPE_DATA" not in os.environ, reason="POPE_DATA names no folder of the three released files")
def test_the_release():
    folder = Path(os.environ["POPE_DATA"])
    questions = [q for split in SPLITS for q in read_split(folder, Path("val2014"), split)]
    assert len({q.id for q in questions}) == len(questions) == 9000
    first = questions[0]
    assert (first.id, first.prompt, first.ground_truth) == (
        "pope/random/1",
        "Is there a snowboard in the image?",
        "yes",
    )
    assert first.images == ("val2014/COCO_val2014_000000310196.jpg",)
    by_split = {split: [q for q in questions if q.setting == split] for split in SPLITS}
    images = [{q.images for q in part} for part in by_split.values()]
    assert len(images[0]) == 500 and images[0] == images[1] == images[2]
    for part in by_split.values():
        assert (len(part), sum(q.ground_truth == "yes" for q in part)) == (3000, 1500)
    assert [sum("Is there an " in q.prompt for q in part) for part in by_split.values()] == [149, 44, 58]
    rows = [
        {"id": q.id, "setting": q.setting, "response": q.ground_truth, "ground_truth": q.ground_truth}
        for q in questions
    ]
    oracle = score(rows)
    assert oracle["mean"] == {"splits": 3, "accuracy": 1.0, "f1": 1.0}
    for split in SPLITS:
        assert rates({split: oracle[split]["baselines"]["always yes"]}, split) == [0.5, 0.5, 1, pytest.approx(2 / 3), 1]
