"""Mutated files of an evaluation: each is used, or refused in one line that names it.

The larger run, with 2,000 files, is marked slow.
"""

import gzip
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from test_mm_niah import META, ROW

from errors import UserError
from haystack import ImagePool, read_captioned_images, read_pool
from needle_eval import mm_niah, mmneedle, pope
from needle_eval.mmneedle_build import write_haystacks
from needle_eval.mmneedle_prompts import Setting
from needle_eval.report import compare, report
from needle_eval.runner import make_row, read_answers

VALUES = [None, True, -1, 0, 10**30, 1.5, "", " ", "a" * 3000, "\x00", "\ud800", "<image>", [], [[]], {}, [1], [-1]]
VALUES += ["/etc/hostname", "../a.png", float("nan"), float("inf"), "1, 1, 1", ["a.png"] * 50, "0, 0, 0; 0, 0, 0"]
SECONDS = 60  # time limit for one file


def mutate(rng: random.Random, text: str) -> bytes:
    """A file of JSON or JSON lines with one value changed, removed or renamed, or with some bytes changed."""
    lines = text.splitlines() if text.startswith('{"') and "\n" in text.strip() else [text]
    at = rng.randrange(len(lines))
    kind = rng.randrange(7)
    if kind <= 3:
        data = json.loads(lines[at])
        holder = data
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = rng.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and rng.random() < 0.7:
                holder = holder[key]
                continue
            break
        if kind <= 1:
            holder[key] = rng.choice(VALUES)
        elif kind == 2 or not isinstance(holder, dict):
            del holder[key]
        else:
            holder[key + "x"] = holder.pop(key)
        lines[at] = json.dumps(data)
    elif kind == 4:
        lines[at] = rng.choice(["null", "[]", "{}", "7", "[" * 100_000, '"\\ud800"', "", "\x00"])
    raw = bytearray("\n".join([*lines, ""]).encode("utf-8", "surrogatepass"))
    if kind == 5:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    if kind == 6:
        del raw[rng.randrange(len(raw)) :]
    return bytes(raw)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Question files and finished evaluations of the three benchmarks, and captioned images."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for name in "abcd":
        Image.new("RGB", (8, 8), "red").save(f"images/{name}.jpg")
    write_haystacks(ImagePool(read_pool(splits=("test_style",))[:30]), Path("release"), Setting(1, 2), 3, 0, 8)
    for split in pope.SPLITS:
        row = {"image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
        lines = [json.dumps(row | {"question_id": i, "label": ["yes", "no"][i % 2]}) for i in range(3)]
        Path(f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n")
    Path("niah").mkdir()
    for task in mm_niah.TASKS:
        meta = META | ({"choices": ["a", "b"]} if task.endswith("image") and "counting" not in task else {})
        answer = [1, 2] if "counting" in task else 1 if meta["choices"] else "oak"
        rows = [ROW | {"id": i, "answer": answer, "meta": meta} for i in range(2)]
        Path(f"niah/{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine").mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), "blue").save(f"mine/{i}.png")
    Path("mine/captions.json").write_text(json.dumps({f"{i}.png": f"thing {i}" for i in range(3)}))
    lines = [json.dumps({"image": f"{i}.png", "caption": "x"}) + "\n" for i in range(3)]
    Path("mine/rows.jsonl").write_text("".join(lines))
    for name in ("mmneedle", "pope", "mm-niah"):
        questions = load(name)
        for arm in ("first", "second"):
            place = Path(f"{name}-{arm}")
            place.mkdir()
            rows = [make_row(q, q.ground_truth if isinstance(q.ground_truth, str) else "1", 0.1) for q in questions]
            (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            record = {"benchmark": name, "model": arm, "weights": "x", "questions": len(rows), "decoding": "greedy"}
            asked = {"data": "haystack", "prefix": ""} | ({"protocol": "official"} if name == "mmneedle" else {})
            (place / "eval.json").write_text(json.dumps(record | {"config": asked}))
            if name == "mmneedle":
                measured = {"1x2x2": {"n": 2, "even": 0.25, "share": [0.1, 0.2]}}
                (place / "attention.json").write_text(json.dumps(measured))
    return tmp_path


def load(name: str):
    config = SimpleNamespace(prefix="", samples=0, per_cell=0, attention=0, images=(1,), grids=(2,), needles=(1,))
    config.seed = config.cell = 0
    config.split = ""
    if name == "mmneedle":
        config.data, config.protocol = "release", "official"
        return mmneedle.load_questions(config)
    config.data, config.image_folder = (".", "images") if name == "pope" else ("niah", "images")
    return (pope if name == "pope" else mm_niah).load_questions(config)


def uses() -> dict[str, list]:
    """File -> the functions that read it."""
    reading = {f"coco_pope_{split}.json": [lambda: load("pope")] for split in pope.SPLITS}
    reading |= {f"niah/{task}.jsonl": [lambda: load("mm-niah")] for task in mm_niah.TASKS}
    reading["release/metadata_stitched/annotations_1_2_2.json"] = [lambda: load("mmneedle")]
    reading["release/annotations_trainval/file_to_caption.json"] = [lambda: load("mmneedle")]
    reading["mine/captions.json"] = [lambda: read_captioned_images("mine")]
    reading["mine/rows.jsonl"] = [lambda: read_captioned_images("mine/rows.jsonl")]
    for name in ("mmneedle", "pope", "mm-niah"):
        place = Path(f"{name}-first")
        scoring = [
            lambda place=place: report([place], False, Path("comparisons")),
            lambda name=name: compare(f"{name}-first", f"{name}-second", Path("comparisons")),
        ]
        resuming = [lambda name=name, place=place: read_answers(place / "answers.jsonl", load(name))]
        reading[f"{place}/answers.jsonl"] = scoring + resuming
        reading[f"{place}/eval.json"] = scoring
    reading["mmneedle-first/attention.json"] = [lambda: report([Path("mmneedle-first")], False, Path("comparisons"))]
    return reading


def mutate_and_use(folder: Path, seed: int, count: int, monkeypatch) -> dict[str, int]:
    from needle_eval import plots

    for name in ("draw_haystacks", "draw_side_by_side"):  # figures are drawn from the scores, and take the time
        monkeypatch.setattr(plots, name, lambda *_: None)
    rng, reading, outcomes = random.Random(seed), uses(), {"used": 0, "refused": 0}
    for _ in range(count):
        name = rng.choice(list(reading))
        file = Path(name)
        whole = file.read_bytes()
        file.write_bytes(mutate(rng, whole.decode()))
        for use in reading[name]:
            began = time.monotonic()
            try:
                use()
                outcomes["used"] += 1
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 5000
                outcomes["refused"] += 1
            except Exception as error:
                raise AssertionError(f"{name}: {file.read_bytes()[:2000]!r}") from error
            assert time.monotonic() - began < SECONDS, name
        file.write_bytes(whole)
    return outcomes


def test_a_hundred_mutated_files_are_used_or_refused_in_one_line(folder, monkeypatch):
    outcomes = mutate_and_use(folder, seed=0, count=100, monkeypatch=monkeypatch)
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.slow
def test_two_thousand_mutated_files_are_used_or_refused_in_one_line(folder, monkeypatch):
    outcomes = mutate_and_use(folder, seed=1, count=2000, monkeypatch=monkeypatch)
    assert min(outcomes.values()) > 400, outcomes


def test_a_damaged_gz_is_refused_in_one_line(folder):
    packed = gzip.compress(Path("coco_pope_random.json").read_bytes())
    Path("coco_pope_random.json").unlink()
    rng = random.Random(0)
    for _ in range(50):
        raw = bytearray(packed)
        raw[rng.randrange(len(raw))] = rng.randrange(256)
        Path("coco_pope_random.json.gz").write_bytes(bytes(raw[: rng.choice((len(raw), rng.randrange(len(raw))))]))
        try:
            load("pope")
        except UserError as error:
            assert "coco_pope_random.json.gz" in str(error)
