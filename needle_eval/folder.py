"""The folder of an evaluation: its name, its eval.json, and whether an interrupted evaluation can be resumed.

It holds eval.json (the questions and the model), answers.jsonl, attention.json (with --attention), and what report.py
derives from them: scores.json, plots/, and response/ in the format of the benchmark's own scorer.
"""

import dataclasses
import hashlib
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import torch
from accelerate import Accelerator
from filelock import BaseFileLock

from checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DIFFERENTIAL, locate, resolve_run, weights_fingerprint
from errors import UserError
from files import decode_typed, lock_folder, read_bytes, read_json, write_json, writing
from machine import device_name, git_commit, portable_path, versions
from needle_eval.questions import Question, check_row
from processing_paligemma import Processor

if TYPE_CHECKING:
    from eval_mmnih import Config

COMMON_FLAGS = ("benchmark", "data", "prefix", "samples")  # flags that decide the questions of every benchmark
UNNAMED_FLAGS = ("benchmark", "data", "image_folder")  # not in a folder's name unless in NAME_FLAGS
FLAGS_WITHOUT_QUESTIONS = ("attention", "skip_none")  # flags of a benchmark that do not change its questions
COMPARED = ("benchmark", "model", "weights", "questions", "config", "dtype")  # fixed within an evaluation
SLUG_LENGTH = 120
NAME_LENGTH = 40  # characters of a flag's value in a folder's name


def slug(name: str) -> str:
    """A model's name as part of a file name."""
    name = re.sub(r"[^\w.-]+", "-", name.removeprefix("./").removeprefix("runs/").removeprefix("assets/").strip("/"))
    return name[-SLUG_LENGTH:].lstrip(".-") or "model"  # ".." is a folder, and file names have a maximum length


def output_folder(config: "Config", benchmark: ModuleType, model: str) -> Path:
    """A folder in eval/ of the run that `model` is, or lies in; in runs/eval/MODEL for any other model."""
    if config.output_dir:
        return Path(config.output_dir) / (slug(model) if len(config.model) > 1 else "")
    name = ("knockout-" if config.knockout else "") + evaluation_name(config, benchmark)
    _, adapter = resolve_run(model)
    if adapter is None:
        return Path("runs/eval") / slug(model) / name
    weights = adapter.parent  # final, best, or a checkpoint
    run = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    if not (run / "run.json").exists():  # an adapter outside any run
        return Path("runs/eval") / slug(model) / name
    return run / "eval" / (name if weights.name == "final" else f"{weights.name}-{name}")


def evaluation_name(config: "Config", benchmark: ModuleType) -> str:
    """The benchmark, the values of its NAME_FLAGS, and all other flags that decide questions and are not at default.

    Example: "mmneedle-official-MMNEEDLE-images_1_10". Evaluations with other settings get folders of their own.
    """
    flags = [flag for flag in question_flags(benchmark) if flag not in (*UNNAMED_FLAGS, *benchmark.NAME_FLAGS)]
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.name in flags}
    plain = fill_defaults(dataclasses.replace(config, **defaults), benchmark)  # the same without these flags
    parts = [short_value(getattr(config, flag)) for flag in benchmark.NAME_FLAGS if getattr(config, flag)]
    changed = [flag for flag in flags if getattr(config, flag) != getattr(plain, flag)]
    parts += [f"{flag}_{short_value(getattr(config, flag)).strip('_')}" for flag in changed]
    return "-".join([config.benchmark, *parts])


def fill_defaults(config: "Config", benchmark: ModuleType) -> "Config":
    """The configuration with the benchmark's own defaults for flags that were left empty."""
    return dataclasses.replace(config, **getattr(benchmark, "complete_flags", lambda config: {})(config))


def question_flags(benchmark: ModuleType) -> list[str]:
    """The flags that decide the questions."""
    return [*COMMON_FLAGS, *(flag for flag in benchmark.FLAGS if flag not in FLAGS_WITHOUT_QUESTIONS)]


def short_value(value: object) -> str:
    """A flag's value as part of a folder's name."""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^\w.]+", "_", text.rstrip("/"))[-NAME_LENGTH:]


# ---- eval.json
def make_record(
    config: "Config",
    benchmark: ModuleType,
    questions: list[Question],
    model: str,
    processor: Processor,
    dtype: torch.dtype,
    accelerator: Accelerator,
) -> dict:
    """The contents of eval.json: benchmark, questions, decoding, model and its weights, versions."""
    return {
        "benchmark": config.benchmark,
        "model": portable_path(model),
        "weights": hash_weights(model) + (", lambda 0" if config.knockout else ""),
        "knockout": config.knockout,
        "questions": len(questions),
        "config": json.loads(json.dumps({flag: getattr(config, flag) for flag in question_flags(benchmark)})),
        "decoding": "ranked" if questions[0].candidates else "greedy",
        "image_size": processor.image_size,
        "image_tokens": processor.num_image_tokens,
        "dtype": str(dtype),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "commit": git_commit(),
    }


def hash_weights(model: str) -> str:
    """A hash of the weights: of the contents of adapter files, and of the base model's `weights_fingerprint`."""
    base, adapter = resolve_run(model)
    digest = hashlib.sha256()
    if adapter is not None:
        differential = [folder / DIFFERENTIAL for folder in (adapter, adapter.parent)]  # the first: of the bridge
        for file in (adapter / ADAPTER_CONFIG, adapter / ADAPTER_WEIGHTS, *differential):
            digest.update(file.read_bytes() if file.is_file() else b"")
    digest.update(weights_fingerprint(locate(base)).encode())
    return digest.hexdigest()[:16]


class AskedConfig(msgspec.Struct):
    """The fields of the configuration in eval.json that a table needs; only MMNeedle has a protocol."""

    data: str = ""
    prefix: str = ""
    protocol: str = ""


class Record(msgspec.Struct):
    """The fields of eval.json that scoring and comparing need."""

    benchmark: str
    model: str = ""
    knockout: bool = False
    questions: Annotated[int, msgspec.Meta(ge=0)] | None = None
    config: AskedConfig = msgspec.field(default_factory=AskedConfig)
    decoding: Literal["greedy", "ranked"] = "greedy"


def read_record(folder: Path) -> dict[str, Any]:
    """eval.json of a folder. Raises UserError for fields of the wrong type."""
    file = folder / "eval.json"
    record = read_json(file)
    fields = msgspec.to_builtins(decode_typed(read_bytes(file), Record, file, "give a folder that eval_mmnih.py wrote"))
    return fields | record


def changed_fields(old: dict, new: dict, names: tuple[str, ...] = COMPARED) -> list[str]:
    """The names of the fields that differ between two records; "config" is followed by the names that differ in it."""
    changed = [name for name in names if old.get(name) != new.get(name)]
    if "config" in changed:
        ours, theirs = new.get("config", {}), old.get("config", {})
        changed += [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return changed


# ---- the folder
def open_folder(folder: Path, record: dict, overwrite: bool) -> BaseFileLock:
    """Make the folder and its eval.json, or check that it holds the same evaluation, interrupted. Returns its lock.

    Raises UserError if the folder holds another evaluation and `overwrite` is False, or if another process is writing
    to it.
    """
    file = folder / "eval.json"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
        if overwrite:
            if file.exists():  # figures and response files may belong to settings that this evaluation lacks
                for name in ("response", "plots"):
                    shutil.rmtree(folder / name, ignore_errors=True)
            for name in ("answers.jsonl", "eval.json", "scores.json", "attention.json"):
                (folder / name).unlink(missing_ok=True)
    if file.exists():
        changed = changed_fields(read_record(folder), record)
        if changed:
            raise UserError(
                f"{folder} has another evaluation (other {', '.join(changed)}): give another --output_dir, or "
                "start again with --overwrite=True"
            )
    else:
        write_json(file, record)
    return lock


def read_answer_rows(folder: Path, row_type: type) -> list[dict[str, Any]]:
    """All answer rows of a folder, checked against the benchmark's `AnswerRow`.

    Raises UserError if answers are missing or duplicated, and, with the line number, for a row of the wrong type.
    """
    file = folder / "answers.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: holds no answers.jsonl: give a folder that eval_mmnih.py wrote")
    count, rows = read_record(folder)["questions"], []
    for number, line in enumerate(read_bytes(file).splitlines(), 1):
        rows.append(decode_typed(line, dict[str, Any], f"{file}:{number}", "delete the line"))
        check_row(rows[-1], row_type, f"{file}:{number}")
    if count not in (None, len(rows)):
        raise UserError(f"{folder}: {len(rows):,} answers to {count:,} questions: run the evaluation again")
    ids = Counter(row["id"] for row in rows)
    if len(ids) < len(rows):
        raise UserError(f"{file}: {ids.most_common(1)[0][0]} is answered more than once: delete the file")
    return rows
