"""Mutated files of a run folder: the run continues or is refused in one line, without a traceback or a hang."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from runs import interrupt
from test_fuzz_files import places, time_limit

import plots
from errors import UserError
from files import write_manifest
from finetune_original import Config, finetune

COUNT = 40
LIMIT = 60  # seconds of one attempt
CHECKPOINT = "checkpoints/step-000004"
FILES = ["run.json", "metrics.jsonl", "samples.jsonl", "skipped.log", "samples/0-0.png"]
FILES += [f"{CHECKPOINT}/{name}" for name in ("files.json", "trainer.pt", "adapter/adapter_config.json", "run.json")]
NONSENSE = [
    None,
    True,
    -1,
    0,
    3,
    1 << 70,
    1e300,
    float("nan"),
    "",
    "x",
    "\ud800",
    "../..",
    [],
    {},
    [1],
    {"x": 1},
    "y" * 9999,
]


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory) -> Config:
    """A run of six updates that was stopped after four."""
    folder = tmp_path_factory.mktemp("fuzz-runs")
    change = dict(max_steps=6, eval_samples=1, save_every=4, eval_every=2, grids=(2,), tracker="none")
    config = tiny.quick(Config, tiny_model, folder, **change)
    interrupt(config, 4)
    (Path(config.output_dir) / "skipped.log").write_text("a row that was skipped\n")
    return config


def mutate_json(raw: bytes, random_state: random.Random) -> bytes:
    """A JSON object with one value replaced or deleted."""
    data = json.loads(raw)
    *parents, key = random_state.choice(places(data))
    parent = data
    for name in parents:
        parent = parent[name]
    if random_state.random() < 0.2:
        del parent[key]
    else:
        parent[key] = random_state.choice(NONSENSE)
    return json.dumps(data).encode()


def mutate_lines(raw: bytes, random_state: random.Random) -> bytes:
    """A log in which one line has other values or is another JSON value."""
    lines = raw.splitlines()
    row = random_state.randrange(len(lines))
    whole = random_state.random() < 0.5
    nonsense = json.dumps(random_state.choice(NONSENSE)).encode()
    lines[row] = nonsense if whole else mutate_json(lines[row], random_state)
    return b"\n".join(lines) + b"\n"


def mutate_bytes(raw: bytes, random_state: random.Random) -> bytes:
    """A file with some bytes flipped, cut short, or replaced as a whole."""
    kind = random_state.choice(["flip", "flip", "cut", "replace"])
    if kind == "cut":
        return raw[: random_state.randrange(len(raw))]
    if kind == "replace":
        return random_state.choice([b"", b"null", b"[" * 100_000, b"\xff\xfe", b'{"x": "\\ud800"}'])
    data = bytearray(raw)
    for _ in range(random_state.choice([1, 4, 32])):
        data[random_state.randrange(len(data))] = random_state.randrange(256)
    return bytes(data)


def mutate_file(file: Path, random_state: random.Random):
    raw = file.read_bytes()
    kinds = {".json": [mutate_json, mutate_bytes], ".jsonl": [mutate_lines, mutate_bytes]}
    file.write_bytes(random_state.choice(kinds.get(file.suffix, [mutate_bytes]))(raw, random_state))


def fuzz(config: Config, folder: Path, seeds: range) -> dict[str, int]:
    """Outcomes of one mutated file per seed; asserts that each is a finished run or an error of one line."""
    outcomes = {"finished": 0, "refused": 0}
    for seed in seeds:
        random_state = random.Random(seed)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(config.output_dir, folder)
        name = random_state.choice(FILES)
        mutate_file(folder / name, random_state)
        if name.startswith("checkpoints") and "files" not in name and random_state.random() < 0.5:
            write_manifest(folder / CHECKPOINT)  # as a checkpoint of another origin
        try:
            with time_limit(LIMIT):
                finetune(replace(config, output_dir=str(folder)), "original")
                plots.draw_run(folder)
            assert (folder / "final" / "adapter").is_dir()
            outcomes["finished"] += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, f"seed {seed}, {name}: {error}"
            outcomes["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {name}: {type(error).__name__}: {error!s:.300}") from error
    return outcomes


def test_a_run_with_a_mutated_file_continues_or_is_refused_in_one_line(config, tmp_path):
    outcomes = fuzz(config, tmp_path / "run", range(COUNT))
    assert min(outcomes.values()) > COUNT / 10, outcomes


@pytest.mark.slow
def test_many_mutated_run_folders(config, tmp_path):
    print(fuzz(config, tmp_path / "run", range(COUNT, 1000)))
