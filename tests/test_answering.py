"""Answering questions: the plan, images encoded once, broken images, ranking against a full forward pass, resuming."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from errors import UserError
from files import open_image
from haystack import ImagePool, read_pool
from modeling_gemma import PaliGemmaForConditionalGeneration
from needle_eval.mmneedle import is_correct
from needle_eval.mmneedle_build import write_haystacks
from needle_eval.mmneedle_prompts import Setting, make_candidates
from needle_eval.mmneedle_release import read_questions
from needle_eval.questions import Question
from needle_eval.runner import Answerer, answer_batches, answer_questions, mark_too_long, plan_batches, plan_images
from processing_paligemma import PaliGemmaProcessor


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    pool, questions = ImagePool(read_pool(splits=("test_style",))), []
    for setting in (Setting(1, 2), Setting(3, 2)):
        folder = tmp_path_factory.mktemp("haystacks")
        write_haystacks(pool, folder, setting, samples=6, seed=0, cell=16)
        questions += read_questions(folder, setting, "finetuned", samples=6)
    return questions


@pytest.fixture
def answerer(tiny_model):
    model, processor = (c.from_pretrained(tiny_model) for c in (PaliGemmaForConditionalGeneration, PaliGemmaProcessor))
    with torch.no_grad():  # random weights of the usual size give the same answer to every question
        for name, p in model.named_parameters():
            p.mul_(8 if p.ndim > 1 and "embed" not in name else 1)
    return Answerer(model, processor, Accelerator(cpu=True), torch.float32, batch_size=4)


def timeless(rows) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_batches_hold_every_question_once(questions):
    broken = [replace(questions[0], id="broken", error="lost")]
    batches = plan_batches(questions + broken, size=5)
    assert Counter(q.id for batch in batches for q in batch) == Counter(q.id for q in questions)
    assert all(len({(q.setting, len(q.images)) for q in batch}) == 1 and len(batch) <= 5 for batch in batches)
    for batch in batches:
        assert [len(q.prompt) for q in batch] == sorted(len(q.prompt) for q in batch)
    assert plan_batches(questions[::-1], 5) != [] and plan_batches([], 5) == []


@pytest.mark.parametrize("capacity", [0, 1, 3, 1000])
def test_every_image_is_there_when_it_is_needed(questions, capacity):
    batches = plan_batches(questions, size=4)
    kept, encoded = set(), 0
    for batch, (new, dropped) in zip(batches, plan_images(batches, capacity), strict=True):
        assert not kept & set(new)
        kept |= set(new)
        encoded += len(new)
        wanted = {path for q in batch for path in q.images}
        assert wanted <= kept
        kept -= set(dropped)
        assert len(kept) <= max(capacity, len(wanted))
    assert not kept, "nothing stays after its last use"
    images = {path for q in questions for path in q.images}
    assert encoded == len(images) if capacity == 1000 else encoded > len(images)


def test_answers_are_those_of_processor_and_generate(answerer, questions, tmp_path):
    rows = answer_questions(answerer, questions, tmp_path / "answers.jsonl", is_correct)
    assert [row["id"] for row in rows] == [q.id for q in questions]
    for question, row in zip(questions, rows, strict=True):
        batch = answerer.processor([[open_image(path) for path in question.images]], [question.prompt])
        ids = answerer.model.generate(**batch, max_new_tokens=question.max_new_tokens)
        assert row["response"] == answerer.processor.decode(ids[0, batch["input_ids"].shape[1] :])
        assert row["prompt"] == question.prompt and row["ground_truth"] == question.ground_truth and row["seconds"] > 0
    assert len({row["response"] for row in rows}) > 3, "a model that always says the same would prove little"


def test_the_vision_tower_sees_every_image_once(answerer, questions, monkeypatch):
    seen = []
    encode = answerer.model.model.image_features
    monkeypatch.setattr(
        answerer.model.model,
        "image_features",
        lambda pixel_values: seen.append(len(pixel_values)) or encode(pixel_values),
    )
    list(answer_batches(answerer, plan_batches(questions, 4)))
    assert sum(seen) == len({path for q in questions for path in q.images})


def test_a_kept_graph_serves_the_batches_of_one_call_only(answerer, questions, monkeypatch):
    """Between two calls the model may change in ways that a recorded graph does not follow, as with `knock_out`."""
    seen, real = [], answerer.model.generate
    monkeypatch.setattr(answerer.model, "generate", lambda *a, **k: seen.append(k["graphs"]) or real(*a, **k))
    answer_questions(answerer, questions)
    batches = len(seen)
    answer_questions(answerer, questions)
    first, second = set(map(id, seen[:batches])), set(map(id, seen[batches:]))
    assert batches > 1 and len(first) == len(second) == 1 and first != second


def test_a_broken_image_costs_its_own_questions_alone(answerer, questions, tmp_path):
    whole = answer_questions(answerer, questions, tmp_path / "whole.jsonl", is_correct)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    images = questions[0].images
    changed = [replace(q, images=tuple(str(bad) if p == images[0] else p for p in q.images)) for q in questions]
    changed[3] = replace(changed[3], prompt="<image> in the text")
    rows = answer_questions(answerer, changed, tmp_path / "answers.jsonl", is_correct)
    hit = {i for i, q in enumerate(changed) if str(bad) in q.images} | {3}
    assert len(hit) >= 3, "a positive, a negative, and the prompt"
    for i, (row, before) in enumerate(zip(rows, whole, strict=True)):
        if i in hit:
            assert row["response"] is None and ("bad.png" in row["error"] or "<image>" in row["error"])
        else:
            assert row["response"] == before["response"]


def test_ranking_is_the_likelihood_of_a_full_forward_pass(answerer, questions, tmp_path):
    """Mean log-probability of the answer's tokens and `<eos>`, with prompt and candidate in one row and no cache."""
    asked = questions[::5]
    options = {str(s): make_candidates(s) for s in (Setting(1, 2), Setting(3, 2))}
    asked = [replace(q, candidates=options[q.setting]) for q in asked]
    rows = answer_questions(answerer, asked, tmp_path / "answers.jsonl", is_correct)
    for question, row in zip(asked, rows, strict=True):
        images, result, log_likelihood = [open_image(path) for path in question.images], {}, {}
        for text in question.candidates:
            batch = answerer.processor([images], [question.prompt], [text])
            with torch.no_grad():
                result[text] = -answerer.model(**batch).loss.item()
            log_likelihood[text] = result[text] * int((batch["labels"] != -100).sum())
        assert row["response"] == max(result, key=result.get)
        weights = {text: math.exp(value) for text, value in log_likelihood.items()}
        assert row["confidence"] == pytest.approx(weights[row["response"]] / sum(weights.values()), rel=1e-3)
    assert len({row["response"] for row in rows}) > 1


def test_a_run_that_was_cut_off_continues_to_the_same_file(answerer, questions, tmp_path):
    file, cut = tmp_path / "answers.jsonl", tmp_path / "cut.jsonl"
    whole = answer_questions(answerer, questions, file, is_correct)
    lines = [json.dumps(row) for row in whole[4:9]]
    cut.write_text("\n".join(lines) + "\n" + json.dumps(whole[0])[:40])  # killed in the middle of a line
    asked = []
    generate = answerer.model.generate
    answerer.model.generate = lambda **batch: asked.append(len(batch["input_ids"])) or generate(**batch)
    rows = answer_questions(answerer, questions, cut, is_correct)
    assert timeless(rows) == timeless(whole) and sum(asked) < len(questions) + 4
    assert timeless(map(json.loads, cut.read_text().splitlines())) == timeless(whole)
    asked.clear()
    answer_questions(answerer, questions, cut, is_correct)
    assert not asked, "a finished run answers nothing again"


def test_answers_to_other_questions_are_refused(answerer, questions, tmp_path):
    file = tmp_path / "answers.jsonl"
    answer_questions(answerer, questions[:2], file, is_correct)
    with pytest.raises(UserError, match="answers another question"):
        answer_questions(answerer, [replace(q, prompt=q.prompt + "?") for q in questions[:2]], file, is_correct)
    with pytest.raises(UserError, match="answers another question"):  # the same prompt about another image
        answer_questions(answerer, [replace(q, images=("other.png",)) for q in questions[:2]], file, is_correct)
    file.write_text("{}\n")
    with pytest.raises(UserError, match=r"answers.jsonl:1: Object missing required field id: delete the line"):
        answer_questions(answerer, questions[:2], file, is_correct)


def test_what_does_not_fit_the_model_is_marked_with_the_numbers(answerer, questions):
    marked = mark_too_long(questions, answerer.processor, limit=50)
    long = [q for q in marked if q.error]
    assert {q.setting for q in long} == {"3x2x2"} and len(long) == 12
    assert "3 images of 16 tokens (32 px), text and 12 to answer need" in long[0].error
    assert "the model has 50" in long[0].error
    assert mark_too_long(questions, answerer.processor, limit=500) == questions


@dataclass(frozen=True)
class DrawnImage:
    """An image that is not a file, as in training's own evaluation."""

    colour: str

    def open(self) -> Image.Image:
        if self.colour == "broken":
            raise UserError("drawn: cannot be drawn")
        return Image.new("RGB", (40, 30), self.colour)

    def __str__(self) -> str:
        return f"drawn/{self.colour}"


def test_images_need_no_file_and_answers_need_none_either(answerer, tmp_path):
    colours = ("red", "blue", "broken", "red")
    drawn = [Question(str(i), "set", (DrawnImage(c),), "where is it?", "1", 5) for i, c in enumerate(colours)]
    rows = answer_questions(answerer, drawn)
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"] and rows[0]["images"] == ["drawn/red"]
    assert rows[2]["response"] is None and rows[2]["error"] == "drawn: cannot be drawn"
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    stored = answer_questions(answerer, [replace(drawn[0], images=(str(tmp_path / "red.png"),))])
    assert rows[0]["response"] == rows[3]["response"] == stored[0]["response"]
    assert not answer_questions(answerer, [])


def test_answering_stops_between_batches_and_keeps_what_it_has(answerer, questions, tmp_path):
    calls = []

    def stop_at_the_third():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    file = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_questions(answerer, questions, file, raise_if_stopped=stop_at_the_third)
    assert len(file.read_text().splitlines()) == 8, "two batches of four"
    assert len(answer_questions(answerer, questions, file)) == len(questions)
