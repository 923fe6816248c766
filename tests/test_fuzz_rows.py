"""Mutated rows of every kind of dataset: each is used, or skipped with one line that names it."""

import json
import random

import pytest
from PIL import Image
from test_data import parquet, vqav2

from data import loader
from errors import UserError
from processing_paligemma import PaliGemmaProcessor
from rows import Rows, read_hub, read_jsonl, read_vqav2

VALUES = [
    None,
    True,
    -1,
    10**30,
    1.5,
    "",
    " ",
    "a" * 3000,
    "\x00",
    "\ud800",
    "<image>",
    "\u202e",
    [],
    [[]],
    {},
    [1],
    "/etc/hostname",
]
VALUES += ["../a.png", "a.png/", "loop", "http://localhost:9/a.png", ["a.png"] * 50, {"bytes": "x"}, float("nan")]


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8), "red").save(data / "a.png")
    (data / "broken.png").write_bytes((data / "a.png").read_bytes()[:50])
    (data / "loop").symlink_to(data / "loop")
    return data


def mutate(rng: random.Random, row: dict) -> bytes:
    """A row as a JSON line with a field changed, removed, renamed or added, or with a byte of the line changed."""
    row, key = dict(row), rng.choice(list(row))
    kind = rng.randrange(5)
    if kind == 0:
        row[key] = rng.choice(VALUES)
    elif kind == 1:
        del row[key]
    elif kind == 2:
        row[key.upper()] = row.pop(key)
    elif kind == 3:
        row[rng.choice(["id", "extra", key])] = rng.choice(VALUES)
    line = bytearray(json.dumps(row).encode())
    if kind == 4:
        for _ in range(rng.randint(1, 3)):
            line[rng.randrange(len(line))] = rng.randrange(256)
    return bytes(line).replace(b"\n", b" ")


def check_source(source: Rows, processor: PaliGemmaProcessor, name: str) -> int:
    """Check that every row is used or named. Returns how many are used."""
    faults = []
    keys = [[(0, index)] for index in range(len(source))]
    used = sum(len(examples) for examples, _ in loader(source, processor, keys, True, 0, faults.append, max_length=128))
    messages = [*map(str, faults), *source.skipped]
    assert used + len(faults) == len(source)
    assert all(name in message and "\n" not in message and len(message) < 1000 for message in messages), messages
    return used


@pytest.mark.parametrize("seed", range(2))
def test_mutated_rows_of_a_jsonl_file(folder, tiny_model, seed):
    rng, processor = random.Random(seed), PaliGemmaProcessor.from_pretrained(tiny_model)
    good = {"image": "a.png", "prefix": "what is it?", "suffix": "red"}
    lines = [json.dumps(good).encode()] * 100 + [mutate(rng, good) for _ in range(100)]
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    source = read_jsonl(folder / "rows.jsonl", strict=False)
    assert len(source) + len(source.skipped) <= 200
    assert check_source(source, processor, "rows.jsonl:") >= 100


def test_mutated_questions_of_vqav2(tmp_path, tiny_model):
    rng, processor = random.Random(2), PaliGemmaProcessor.from_pretrained(tiny_model)
    folder = vqav2(tmp_path / "vqa", images=10, questions=10)
    file = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions = json.loads(file.read_text())["questions"]
    good = [json.dumps(question).encode() for question in questions]
    for _ in range(50):
        at = rng.randrange(len(good))
        raw = mutate(rng, questions[at])
        lines = [raw if place == at else line for place, line in enumerate(good)]
        file.write_bytes(b'{"questions": [' + b", ".join(lines) + b"]}")
        try:
            source = read_vqav2(folder, "train", strict=False)
        except UserError as error:  # a broken byte may break the whole file
            assert file.name in str(error) and "\n" not in str(error)
        else:
            assert check_source(source, processor, "v") >= 99


@pytest.mark.parametrize("seed", range(3))
def test_mutated_cells_of_a_parquet_file(tmp_path, tiny_model, monkeypatch, seed):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rng, processor = random.Random(seed), PaliGemmaProcessor.from_pretrained(tiny_model)
    texts = ["a", None, "", "<image>", "a " * 500, "\u202e"]
    columns = {key: [rng.choice(texts) for _ in range(20)] for key in ("question", "multiple_choice_answer")}
    source = read_hub(str(parquet(tmp_path / "set", images=10, **columns)), "train")
    check_source(source, processor, f"{tmp_path / 'set'}/")
