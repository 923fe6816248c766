"""The folder of an evaluation: its name, what its eval.json says, and whether an interrupted evaluation continues.

eval.json (what was asked, of which model), answers.jsonl, and what report.py makes of them: scores.json, plots/,
response/ in the form of the benchmark's own scorer.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from checkpoint import locate, resolve_run
from errors import UserError
from files import read_json, read_json_lines, write_json
from needle_eval.questions import Question
from processing_paligemma import PaliGemmaProcessor
from run_folder import device_name, git_commit, portable_path, versions

if TYPE_CHECKING:
    from eval_mmnih import Config

COMMON_FLAGS = ("benchmark", "data", "image_folder", "prefix", "samples", "seed")  # what decides any questions
NOT_ASKED = ("attention", "skip_none")  # flags of a benchmark that change no question
COMPARED = ("benchmark", "model", "weights", "questions", "config", "dtype")  # one evaluation has one of each
RENAMED = {"pictures": "image_folder"}  # older eval.json files have the first
DATA_NAME_LENGTH = 40


def slug(name: str) -> str:
    """A model's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name.removeprefix("./").removeprefix("runs/").removeprefix("assets/").strip("/"))


def output_folder(config: "Config", benchmark: ModuleType, model: str) -> Path:
    """eval/ of the run folder that `model` is, or is inside of; runs/eval/MODEL for any other model."""
    if config.output_dir:
        return Path(config.output_dir) / (slug(model) if len(config.model) > 1 else "")
    name = evaluation_name(config, benchmark)
    _, adapter = resolve_run(model)
    if adapter is None:
        return Path("runs/eval") / slug(model) / name
    weights = adapter.parent  # final, best, or a checkpoint
    run = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    if not (run / "run.json").exists():  # an adapter outside any run
        return Path("runs/eval") / slug(model) / name
    return run / "eval" / (name if weights.name == "final" else f"{weights.name}-{name}")


def evaluation_name(config: "Config", benchmark: ModuleType) -> str:
    """The name of the folder: benchmark, protocol, data and split, as far as the benchmark has them."""
    parts = [config.benchmark]
    if "protocol" in benchmark.FLAGS:
        parts += [config.protocol, re.sub(r"[^\w.]+", "_", config.data.rstrip("/"))[-DATA_NAME_LENGTH:]]
        parts += [config.split] if config.split else []
    return "-".join(parts)


# ---- eval.json
def make_record(
    config: "Config",
    benchmark: ModuleType,
    questions: list[Question],
    model: str,
    processor: PaliGemmaProcessor,
    dtype: torch.dtype,
    accelerator: Accelerator,
) -> dict:
    """What eval.json says: benchmark, questions, decoding, model and its weights, versions."""
    asked = [*COMMON_FLAGS, *(flag for flag in benchmark.FLAGS if flag not in NOT_ASKED)]
    return {
        "benchmark": config.benchmark,
        "model": portable_path(model),
        "weights": hash_weights(model),
        "questions": len(questions),
        "config": json.loads(json.dumps({flag: getattr(config, flag) for flag in asked})),
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
    """Changes with the trained weights: adapters by their contents, the base by its files' names, sizes and times."""
    base, adapter = resolve_run(model)
    digest = hashlib.sha256()
    if adapter is not None:
        files = ("adapter_config.json", "adapter_model.safetensors")
        for file in (*(adapter / name for name in files), adapter.parent / "differential.safetensors"):
            digest.update(file.read_bytes() if file.is_file() else b"")
    for file in sorted(locate(base).glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def read_record(folder: Path) -> dict:
    """eval.json of a folder, fields of older files under their names of today."""
    record = read_json(folder / "eval.json")
    if "config" in record:
        record["config"] = {RENAMED.get(key, key): value for key, value in record["config"].items()}
    return record


def changed_fields(old: dict, new: dict, names: tuple[str, ...] = COMPARED) -> list[str]:
    """The names of these fields that differ between two records, those inside "config" after it."""
    changed = [name for name in names if old.get(name) != new.get(name)]
    if "config" in changed:
        ours, theirs = new.get("config", {}), old.get("config", {})
        changed += [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return changed


# ---- the folder
def open_folder(folder: Path, record: dict, overwrite: bool):
    """Make the folder and its eval.json, or check that an interrupted evaluation is the same one.

    Raises UserError where the folder holds another evaluation and `overwrite` is False.
    """
    file = folder / "eval.json"
    if overwrite:
        if file.exists():  # figures and response files may be of settings that are not asked again
            for name in ("response", "plots"):
                shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("answers.jsonl", "eval.json", "scores.json", "attention.json", "comparison.json"):
            (folder / name).unlink(missing_ok=True)
    elif file.exists():
        changed = changed_fields(read_record(folder), record)
        if changed:
            raise UserError(
                f"{folder} holds another evaluation (other {', '.join(changed)}): give another --output_dir, or "
                "start again with --overwrite=True"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}): give another --output_dir") from error
    write_json(file, record)


def read_rows(folder: Path) -> list[dict]:
    """All answer rows of a folder. Raises UserError where some are still missing."""
    if not (folder / "answers.jsonl").is_file():
        raise UserError(f"{folder}: holds no answers.jsonl: give a folder that eval_mmnih.py wrote")
    count, rows = read_record(folder).get("questions"), read_json_lines(folder / "answers.jsonl")
    if count not in (None, len(rows)):
        raise UserError(f"{folder}: {len(rows):,} answers to {count:,} questions: run the evaluation again")
    return rows
