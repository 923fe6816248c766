"""Mutated files of a model, a run and its adapter: each loads and answers or is refused in one line, without a hang."""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import checkpoint
from adapters import new_lora, save_differential, save_lora
from errors import UserError
from files import write_json
from finetune_original import Config
from modeling_gemma import PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor

COUNT = 150
LIMIT = 20  # seconds of one attempt
JSON_FILES = (
    "base/config.json",
    "base/preprocessor_config.json",
    "base/tokenizer.json",
    "base/model.safetensors.index.json",
    "run/final/adapter/adapter_config.json",
    "run/final/run.json",
)
TENSOR_FILES = (
    "base/model-00001-of-00008.safetensors",
    "run/final/adapter/adapter_model.safetensors",
    "run/final/differential.safetensors",
)
NONSENSE = [None, True, -1, 0, 1, 2, 3, 1 << 31, 10**30, 1e30, 1e-30, -0.5, "", "x", "nan", "../..", "\x00", [], {}]
NONSENSE += [[1], ["x"], {"x": 1}, "y" * 10_000, r"(\w+\w+)+x", [[[[[]]]]]]

REPLACEMENTS = [b"", b"null", b"7", b"\xff\xfe", b'{"x": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000]


class Hang(BaseException):
    """Not an Exception, which code under test may catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_):
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> Path:
    """A base model in shards and a run of it with LoRA and differential attention."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_model, folder / "base")
    (folder / "base" / "model.safetensors").unlink()
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    checkpoint.save_weights(model.state_dict(), folder / "base", max_shard_size="20KB")
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder / "base", differential="v2")
    adapted = new_lora(Config(), model)
    save_lora(adapted, folder / "run/final/adapter")
    save_differential(adapted, folder / "run/final")
    write_json(folder / "run/final/run.json", {"arm": "diff", "base_model": str(folder / "base"), "config": {}})
    return folder


def paths(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value of a JSON document, of long lists only the first ones."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in list(items)[:60]:
        yield (*path, key)
        yield from paths(value, (*path, key))


def mutate_json(raw: bytes, random_state: random.Random) -> bytes:
    """One to three values replaced or removed."""
    data = json.loads(raw)
    for _ in range(random_state.randint(1, 3)):
        *parents, key = random_state.choice(list(paths(data)))
        place = data
        for parent in parents:
            place = place[parent]
        if random_state.random() < 0.2:
            del place[key]
        else:
            place[key] = random_state.choice(NONSENSE)
        if not data:
            break
    return json.dumps(data).encode()


def mutate_bytes(raw: bytes, random_state: random.Random) -> bytes:
    """Bytes flipped near the start, cut off, doubled, or replaced by something else."""
    kind = random_state.choice(["flip", "flip", "flip", "cut", "append", "replace"])
    if kind == "flip":
        data = bytearray(raw)
        for _ in range(random_state.choice([1, 1, 4, 32])):
            data[random_state.randrange(min(len(data), 4096))] = random_state.randrange(256)
        return bytes(data)
    if kind == "cut":
        return raw[: random_state.randrange(len(raw))]
    if kind == "append":
        return raw + raw[: random_state.randrange(64)]
    return random_state.choice(
        [b"", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"x": "\\ud800"}', b"7"]
    )


def mutate_header(raw: bytes, random_state: random.Random) -> bytes:
    """The JSON header of a safetensors file mutated, its length corrected."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if "config" in header.get("__metadata__", {}) and random_state.random() < 0.7:
        key = random_state.choice(["config", "config", "progress"])
        text = header["__metadata__"][key].encode()
        text = mutate_json(text, random_state) if key == "config" else random_state.choice(NONSENSE)
        header["__metadata__"][key] = text.decode() if isinstance(text, bytes) else json.dumps(text)
        new = json.dumps(header).encode()
    else:
        new = mutate_json(json.dumps(header).encode(), random_state)
    return len(new).to_bytes(8, "little") + new + raw[8 + length :]


def attempt(folder: Path) -> str | None:
    """The error line of loading the run and answering with it; None where it answers."""
    torch.manual_seed(0)
    try:
        processor = PaliGemmaProcessor.from_pretrained(folder / "run")
        model = PaliGemmaForConditionalGeneration.from_pretrained(folder / "run")
        batch = processor([Image.new("RGB", (8, 8))], ["caption en"])
        processor.batch_decode(model.generate(**batch, max_new_tokens=2))
    except UserError as error:
        return str(error)
    return None


def fuzz(whole: Path, folder: Path, seeds: range) -> dict[str, int]:
    """Outcomes of one mutation per seed; asserts that each is an answer or an error of one line."""
    shutil.copytree(whole, folder)
    record = json.loads((folder / "run/final/run.json").read_bytes()) | {"base_model": str(folder / "base")}
    write_json(folder / "run/final/run.json", record)
    assert attempt(folder) is None
    outcomes = {"answered": 0, "refused": 0}
    for seed in seeds:
        random_state = random.Random(seed)
        name = random_state.choice(JSON_FILES + TENSOR_FILES)
        mutations = [mutate_json if name in JSON_FILES else mutate_header, mutate_bytes]
        file = folder / name
        raw = file.read_bytes()
        mutated = random_state.choices(mutations, [3, 1])[0](raw, random_state)
        file.write_bytes(mutated)
        try:
            with time_limit(LIMIT):
                line = attempt(folder)
        except (Hang, Exception) as error:
            raise AssertionError(f"seed {seed}, {name}: {type(error).__name__}: {error!s:.300}") from error
        finally:
            file.write_bytes(raw)
        assert line is None or ("\n" not in line and len(line) < 1000), f"seed {seed}, {name}: {line!r}"
        outcomes["answered" if line is None else "refused"] += 1
    assert attempt(folder) is None  # nothing but the mutated file was written
    return outcomes


def test_mutated_files_load_or_are_refused_in_one_line(whole, tmp_path):
    outcomes = fuzz(whole, tmp_path / "copy", range(COUNT))
    assert outcomes["refused"] > COUNT / 4 and outcomes["answered"] > COUNT / 20, outcomes


@pytest.mark.slow
def test_many_mutated_files(whole, tmp_path):
    print(fuzz(whole, tmp_path / "copy", range(COUNT, 2000)))
