"""MM-NIAH: reader, prompts, the official scoring rule and bins by golden cases.

The golden cases come from the official is_correct and get_input (OpenGVLab/MM-NIAH, arXiv 2406.07230).
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import UserError
from needle_eval.mm_niah import (
    CONTRACTIONS,
    TASKS,
    context_bin,
    depth_bin,
    format_table,
    load_questions,
    read_task,
    score,
    score_answer,
    vqa_normalise,
    write_official,
)

META = {"placed_depth": [0.2, 0.6], "context_length": 1023, "choices": None, "choices_image_path": None}
ROW = {
    "id": 3,
    "images_list": ["a.jpg", "b.jpg"],
    "context": "One.\n<image>\nTwo. <image>",
    "question": "Which tree?",
    "answer": "oak",
    "meta": META,
}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def config(data, **changes):
    return SimpleNamespace(**dict(data=str(data), image_folder="", prefix="", samples=0) | changes)


def read_one(tmp_path, row, task="retrieval-text"):
    return read_task(write(tmp_path / f"{task}.jsonl", row), task, Path("images"))[0]


# ---- reading
def test_an_open_question(tmp_path):
    question = read_one(tmp_path, ROW)
    assert (question.id, question.setting, question.max_new_tokens) == (
        "mm-niah/retrieval-text/3",
        "retrieval-text",
        16,
    )
    asked = "Which tree?\nAnswer the question using a single word or phrase."
    assert question.prompt == f"One.\n\nTwo. \n{asked}"
    assert question.images == ("images/a.jpg", "images/b.jpg") and question.ground_truth == "oak"
    assert question.fields == {
        "question_id": 3,
        "context_length": 1023,
        "placed_depth": [0.2, 0.6],
        "question": asked,
        "answer": "oak",
    }
    json.dumps(asdict(question))


def test_choices_of_text(tmp_path):
    row = ROW | {"answer": 1, "meta": META | {"choices": ["left", "right"]}}
    question = read_one(tmp_path, row, "reasoning-image")
    assert question.prompt.endswith(
        "\nWhich tree?\nA. left\nB. right\nAnswer with the option's letter from the given choices directly."
    )
    assert question.ground_truth == 1 and len(question.images) == 2


def test_choices_of_images(tmp_path):
    row = ROW | {"answer": 0, "meta": META | {"choices_image_path": ["c.jpg", "d.jpg"]}}
    question = read_one(tmp_path, row, "retrieval-image")
    assert question.prompt.endswith(
        "\nWhich tree?\nA. \nB. \nAnswer with the option's letter from the given choices directly."
    )
    assert question.images == tuple(f"images/{name}.jpg" for name in "abcd")


def test_counts_may_be_a_string(tmp_path):
    for answer in ([1, 3, 2], "[1, 3, 2]"):
        question = read_one(tmp_path, ROW | {"answer": answer}, "counting-text")
        assert question.ground_truth == question.fields["answer"] == [1, 3, 2] and question.max_new_tokens == 32


def test_a_folder_or_a_file_and_the_limit_is_per_task(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    for task in TASKS:
        answer = [1] if task.startswith("counting") else "oak"
        write(tmp_path / f"{task}.jsonl", *(ROW | {"id": i, "answer": answer} for i in range(3)))
    questions = load_questions(config(tmp_path, samples=2, prefix="hm "))
    assert [q.setting for q in questions] == [task for task in TASKS for _ in range(2)]
    assert questions[0].prompt.startswith("hm One.\n\nTwo")
    easy = (tmp_path / "counting-text.jsonl").rename(tmp_path / "counting-text-easy.jsonl")
    assert len(load_questions(config(easy, image_folder=str(tmp_path)))) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "jsonl:1: not valid JSON"),
        ("[]", "jsonl:1: Expected object, got array"),
        ({k: v for k, v in ROW.items() if k != "meta"}, "missing required field meta"),
        (ROW | {"images_list": ["a.jpg"]}, "jsonl:1: 2 <image> marks for 1 images"),
        (ROW | {"question": "Which <image>?"}, "jsonl:1: 3 <image> marks for 2 images"),
        (ROW | {"images_list": [1, 2]}, r"Expected str, got int - at \$.images_list"),
        (ROW | {"context": None}, r"Expected str, got null - at \$.context"),
        (ROW | {"images_list": ["a.jpg", "../b.jpg"]}, "jsonl:1: image ../b.jpg: is outside the folder images"),
        (ROW | {"answer": 1}, "answer 1 is none for retrieval-text with 0 choices"),
        (ROW | {"answer": ""}, "answer '' is none"),
        (ROW | {"answer": 2, "meta": META | {"choices": ["a", "b"]}}, "answer 2 is none for retrieval-text with 2"),
        (ROW | {"meta": META | {"choices": ["a"], "choices_image_path": ["b"]}}, "exclude each other"),
        (ROW | {"meta": META | {"placed_depth": 1.2}}, r"Expected float <= 1.0 - at \$.meta.placed_depth"),
        (ROW | {"meta": META | {"placed_depth": []}}, "Expected array of length >= 1"),
        (ROW | {"meta": META | {"context_length": "long"}}, r"got str - at \$.meta.context_length"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        read_one(tmp_path, row)


def test_other_faults_are_named(tmp_path):
    with pytest.raises(UserError, match=r"Expected int, got str - at \$.answer\[1\]"):
        read_one(tmp_path, ROW | {"answer": [1, "two"]}, "counting-text")
    with pytest.raises(UserError, match=r"answer \[\] is none for counting-image"):
        read_one(tmp_path, ROW | {"answer": []}, "counting-image")
    with pytest.raises(UserError, match="retrieval-text.jsonl: cannot be read"):
        load_questions(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="mine.jsonl: its name starts with no task of"):
        load_questions(config(write(tmp_path / "mine.jsonl", ROW)))
    with pytest.raises(UserError, match="mm-niah/retrieval-text/3 is there more than once"):
        load_questions(config(write(tmp_path / "retrieval-text.jsonl", ROW, ROW)))
    with pytest.raises(UserError, match="retrieval-text.jsonl: holds no question"):
        load_questions(config(write(tmp_path / "retrieval-text.jsonl")))


# ---- the official scoring rule
@pytest.mark.parametrize(
    ("truth", "response", "score"),
    [(1, r, 1) for r in ("B", "b", "B.", "1", "The answer is B.", "**B**", "B. cat", "the camera is moving right")]
    + [(0, "The camera is moving left.", 1), (1, "the camera is moving left", 0)]
    + [(1, r, 0) for r in ("(B)", "Answer: B", "B, because", "2", "None", "", None, "²", "1" * 5000)]
    + [("banana", r, 1) for r in ("A banana.", "not a banana", "BANANA", "one\nbanana")]
    + [("three", "3", 1), ("3", "There are three", 1), ("ice-cream", "ice cream", 1), ("12", "twelve", 1)]
    + [("banana", "Bananas", 0), ("Region C", "C", 0), ("compass", "", 0), ("compass", None, 0)]
    + [([1, 3, 2], "[1,3,2,9]", 1), ([1, 3, 2], " [1, 3, 2].", 1)]
    + [([1, 3, 2], r, 2 / 3) for r in ("[1,3]", "```json\n[1, 0, 2]\n```", '{"little_penguin":[1,3,5]}')]
    + [([1, 3, 2], r, 0) for r in ("1,3,2", '{"a":1}', '["1","3","2"]', "", None, "7", "[" * 100_000)],
)
def test_the_official_rule(truth, response, score):
    assert score_answer(response, truth) == score


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The ice-cream,  a cone!", "ice cream cone"),
        ("well - known / or/other", "well known orother"),  # a mark beside a blank anywhere is deleted everywhere
        ("1,000 cats (big-ones)", "1000 cats bigones"),  # so are all marks where digits hold a comma
        ("0.5 m. of it...", "0.5 m of it"),
        ("dont couldntve couldn'tve wouldnt", "don't couldntve couldn't've wouldn't"),
        ("somebody'd", "somebodyd"),
        ("x" + "." * 40, "x" + "." * 8),  # no more than 32 full stops go
        ("An A the Twenty seventeen", "20 17"),
    ],
)
def test_the_vqa_normalisation(text, normal):
    assert vqa_normalise(text) == normal


def test_the_contractions_are_the_official_ones():
    """The digest is of the official table without entries in capitals or unchanged, which never have an effect."""
    assert len(CONTRACTIONS) == 114
    lines = "\n".join(f"{wrong} {right}" for wrong, right in sorted(CONTRACTIONS.items()))
    digest = "f2c800b1132e79302dd72686ce8bba16120f1873f98a85561222e89317336e7a"
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


# ---- bins
@pytest.mark.parametrize(
    ("length", "place"),
    [(650, None), (999, None), (1000, 0), (1999, 0), (2000, 1), (63999, 9), (64000, 10), (72000, 10)],
)
def test_context_bins(length, place):
    assert context_bin(length) == place


@pytest.mark.parametrize(
    ("depth", "place"),
    [(0, 0), (0.2, 1), (0.4, 2), (0.6, 2), (0.8, 4), (0.99, 4), (1.0, 4), ([0.1, 0.5], 1), ([1.0], 4)],
)
def test_depth_bins(depth, place):
    assert depth_bin(depth) == place
    assert depth_bin(1 - 2**-53) == 4


# ---- scores
def table(scores):
    return format_table({"x": scores})[1:]


def answer(task, response, truth="oak", length=1500, depth=0.1):
    fields = {"question_id": 7, "question": "Which?", "answer": truth, "context_length": length, "placed_depth": depth}
    return {"id": f"mm-niah/{task}/7", "setting": task, "response": response, "ground_truth": truth, **fields}


def test_empty_cells_count_nothing_officially():
    rows = [
        answer("retrieval-text", "oak"),
        answer("retrieval-text", "elm"),
        answer("retrieval-text", "oak", depth=0.9),
        answer("retrieval-text", None, length=2000),
        answer("retrieval-text", "oak", length=999),
    ]
    scores = score(rows)
    found = scores["tasks"]["retrieval-text"]
    assert (found["n"], found["dropped"], found["broken"]) == (4, 1, 1)
    assert found["by_context"] == [pytest.approx(1.5 / 5)] + [0.0] * 10
    assert found["official"] == pytest.approx(0.3 / 11)
    assert (found["mean"]["right"], found["mean"]["n"]) == (2, 4)
    assert [found["cells"][0][d]["rate"] for d in range(5)] == [0.5, None, None, None, 1.0]
    assert found["cells"][1][0]["rate"] == 0.0
    assert scores["overall"] is None and json.dumps(scores)


def test_overall_needs_all_six_tasks():
    rows = [answer(task, "oak") for task in TASKS[:5]] + [answer(TASKS[5], "B", truth=0)]
    overall = score(rows)["overall"]
    assert overall["by_context"][0] == pytest.approx(5 / 6 / 5)
    assert overall["official"] == pytest.approx(5 / 6 / 5 / 11) and overall["mean"] == pytest.approx(5 / 6)
    five = score(rows[:5])
    assert five["overall"] is None
    assert table(five)[-1] == "no overall score: 5 of 6 tasks"
    short = score([*rows[:5], answer(TASKS[5], "A", truth=0, length=10)])
    assert short["overall"]["mean"] is None and table(short)[-1].split()[:2] == ["overall", "1.5"]


def test_soft_scores_and_no_rows():
    counted = score([answer("counting-text", "[1, 3]", truth=[1, 3, 2, 2])])["tasks"]["counting-text"]
    assert counted["mean"]["rate"] == counted["cells"][0][0]["rate"] == 0.5
    assert score([]) == {"tasks": {}, "overall": None}
    assert table(score([]))


def test_the_table():
    line = table(score([answer("reasoning-text", "oak"), answer("reasoning-text", "elm", length=4000)]))[1]
    assert line.split()[:4] == ["reasoning-text", "2", "0", "1.8"] and "50.0 [9.5, 90.5]" in line
    assert line.split()[-11:] == ["20.0", "-", "0.0"] + ["-"] * 8


# ---- the official form
def test_what_the_official_scorer_reads(tmp_path):
    rows = [answer("retrieval-text", "oak"), answer("retrieval-text", None), answer("counting-text", "[1]", [1])]
    files = write_official(rows, tmp_path / "response", "nano_diff")
    assert [file.name for file in files] == [f"nano_diff_{task}-text-val.jsonl" for task in ("retrieval", "counting")]
    lines = [json.loads(line) for line in files[0].read_text().splitlines()]
    assert lines[0] == {
        "question_id": 7,
        "question": "Which?",
        "answer": "oak",
        "response": "oak",
        "context_length": 1500,
        "placed_depth": 0.1,
    }
    assert lines[1]["response"] == "None" and len(lines) == 2


# ---- a perfect model and one that never answers
def test_an_oracle_scores_all_and_a_silent_model_nothing(tmp_path):
    choices = {"choices": ["a", "b"]}
    for task in TASKS:
        truth = [2, 3] if task.startswith("counting") else 1 if task.endswith("image") else "oak"
        meta = META | (choices if truth == 1 else {})
        depths = [ROW | {"id": i, "answer": truth, "meta": meta | {"placed_depth": i / 5}} for i in range(5)]
        write(tmp_path / f"{task}.jsonl", *depths)
    (tmp_path / "a.jpg").write_bytes(b"")
    questions = load_questions(config(tmp_path))
    said = [q.ground_truth if isinstance(q.ground_truth, str) else json.dumps(q.ground_truth) for q in questions]
    rows = [
        {"id": q.id, "setting": q.setting, "response": r, "ground_truth": q.ground_truth} | q.fields
        for q, r in zip(questions, said, strict=True)
    ]
    oracle, silent = score(rows), score([row | {"response": None} for row in rows])
    assert oracle["overall"]["mean"] == 1.0 and silent["overall"]["mean"] == 0.0
    assert oracle["tasks"]["retrieval-text"]["by_context"][0] > 0.5 and silent["tasks"]["retrieval-text"]["broken"] == 5
