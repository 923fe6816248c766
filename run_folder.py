"""The folder of a run: its state, whether it can continue, and its logs.

run.json (hyperparameters, base model, versions, commit, device), metrics.jsonl, samples.jsonl, samples/ (images of the
samples), skipped.log (rows that were left out), tensorboard/, checkpoints/step-*/, best/, final/, attention.safetensors
and signed_maps.safetensors (see training.py), plots/, eval/ (evaluations by eval_mmnih.py).
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import accelerate
import filelock
import msgspec
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from checkpoint import ADAPTER_CONFIG, hub_revision, resolve_run, weights_fingerprint
from errors import UserError
from files import (
    LOCK,
    MESSAGE_LENGTH,
    check_ranges,
    describe,
    lock_folder,
    one_line,
    read_bytes,
    read_json,
    read_json_lines,
    read_typed,
    reading,
    remove,
    verify_manifest,
    write_json,
    write_text,
    writing,
)
from machine import choose_dtype, device_name, git_commit, make_accelerator, portable_path, versions
from tracking import Tracker

if TYPE_CHECKING:
    from data import Source
    from finetune_original import Config

Natural = Annotated[int, msgspec.Meta(ge=0)]
TEMPORARY_FILES = {".run.json.tmp"}  # files that a run killed before it wrote run.json may leave
# fields that may change when a run continues: they affect what is logged and saved, not what is computed
RESUMABLE_FIELDS = {
    "output_dir",
    "overwrite",
    "eval_only",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "workers",
    "gradient_checkpointing",
    "compile",
    "shard",
    "strict_data",
    "tracker",
    "vision_cache_gb",
    "vision_cache_dir",
}
# why other fields cannot change; fields in none of these sets affected the steps made so far
DATA_ORDER = {"seed", "data", "eval_data", "grids", "shapes", "recolour", "negatives", "batch_size", "accumulation"}
DATA_ORDER |= {"group_by_length"}
HAYSTACK_FIELDS = ("grids", "shapes", "recolour", "negatives")  # apply to generated data only
EVALUATION = {"eval_every", "eval_samples", "eval_batch_size", "max_new_tokens", "metric", "patience"}
LENGTH = {"max_steps", "epochs"}  # a finished run may continue with a larger value
RECORDED = ("arm", "base_model", "base_revision", "base_weights", "processes", "dtype")  # besides the configuration
NOT_COMPARED = {"arm", "differential", "processes", *RESUMABLE_FIELDS}  # where a run and its baseline may differ
SAVED_SHAPES = {
    "model",
    "base_model",
    "base_revision",
    "base_weights",
    "arm",
    "lora_rank",
    "lora_targets",
    "use_dora",
    "train_vision",
    "train_projector",
    "differential",
}


class Stopped(Exception):
    """A signal asked the run to stop."""

    def __init__(self, number: int):
        self.number = number


@dataclass
class Run:
    """Where a run writes, what it computes on, and what its run.json says."""

    folder: Path
    accelerator: accelerate.Accelerator
    dtype: torch.dtype  # of the frozen base and of autocast
    record: dict[str, Any]
    finished: bool = False  # there is nothing left to train
    resume: Path | None = None  # the checkpoint that it continues from
    found: "FolderState | None" = None  # the folder as it was when the run was opened
    repeats_evaluation: bool = False  # at the checkpoint's step, whose log lines are dropped
    started: bool = False  # the folder belongs to this run, which may write there
    metrics: list[dict] = field(default_factory=list)
    initial_differential: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # values before training
    tracker: Tracker | None = None  # in addition to metrics.jsonl, on the main process
    strict: bool = False  # a bad row ends the run
    skipped: set[str] = field(default_factory=set, repr=False)  # why rows were left out
    signal: int = 0  # the signal that asked to stop
    lock: filelock.BaseFileLock | None = None  # held until the main process ends

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def arm(self) -> str:
        return self.record["arm"]

    @property
    def extended_at(self) -> list[int]:
        """The steps after which the run was finished and then extended."""
        return [start["step"] for start in self.record.get("starts", []) if start["extended"]]

    def print(self, *lines: str):
        """Print on the main process, above the progress bar."""
        if self.is_main and lines:
            tqdm.write("\n".join(lines))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def log(self, line: dict, file: str = "metrics.jsonl"):
        """Append a line to a log file in the folder."""
        if self.is_main:
            with writing(self.folder / file), open(self.folder / file, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if file == "metrics.jsonl":
            self.metrics.append(line)

    def track(self, step: int, values: dict):
        """Log every number in `values` to TensorBoard or wandb, nested ones under their path."""
        if self.tracker:
            self.tracker.log(step, values)

    def track_sample(self, place: int, sample: dict):
        """Log an answer (a line of samples.jsonl) to TensorBoard."""
        if self.tracker:
            self.tracker.log_sample(place, sample)

    def skip(self, error: UserError):
        """Report a row that cannot be used, once, on the terminal and in skipped.log; with `strict` raise the error."""
        if self.strict:
            raise error
        reason = one_line(error)
        if reason in self.skipped:
            return
        self.skipped.add(reason)
        tqdm.write(f"skipped: {reason}")
        if self.started:  # rows that are skipped earlier are logged when the run starts
            with writing(self.folder), open(self.folder / "skipped.log", "a", encoding="utf-8") as log:
                log.write(f"{reason}\n")  # written by the process that found the row

    def raise_if_stopped(self):
        """Raise Stopped on every process if any of them got a signal, so that none waits for one that has left."""
        number = self.signal
        if self.accelerator.num_processes > 1:
            number = int(self.accelerator.gather(torch.tensor([number], device=self.device)).max())
        if number:
            raise Stopped(number)

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Inside the block, SIGTERM and Ctrl-C are only recorded for `raise_if_stopped`."""

        def note(number: int, _):
            self.signal = number

        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def exit_after_signal(self, stopped: Stopped, step: int):
        """End this process with the shell's exit code for the signal, and print how to continue."""
        name = signal.Signals(stopped.number).name
        self.print(f"stopped by {name} after step {step}; run the same command again to continue {self.folder}")
        self.finish()
        raise SystemExit(128 + stopped.number)

    def finish(self):
        """Close the tracker and the process group."""
        if self.tracker:
            self.tracker.finish()
        self.accelerator.end_training()


# ---- opening a run
def open_run(config: "Config", arm: str) -> Run:
    """Check the configuration, the device and the run folder; nothing is written yet.

    An unfinished run with the same configuration continues from its newest complete checkpoint, and so does a finished
    one if it is to be longer; `overwrite` starts over. Raises UserError when the folder holds a run with another
    configuration.
    """
    check_config(config)
    accelerator = make_accelerator()
    dtype, reason = choose_dtype(config.dtype, accelerator.device)
    record = make_record(config, arm, accelerator, dtype)
    folder = Path(config.output_dir or f"runs/{arm}_seed{config.seed}")
    run = Run(folder, accelerator, dtype, record, strict=config.strict_data)
    if not config.eval_only:
        check_model_outside(config.model, folder)
        run.found = read_folder_state(folder)
    is_extended = decide_resume(run)
    if len(set(gather_object([(run.finished, str(run.resume))]))) > 1:
        raise UserError(f"{run.folder}: differs between nodes: give an --output_dir on a disk that all of them share")
    if run.finished:
        run.print(f"{run.folder} is finished: use {run.folder / 'final'}, or start again with --overwrite=True")
        return run
    if is_extended:
        check_last_checkpoint(run)
        run.print(
            f"{folder} was finished after {step_of(run.resume)} updates and goes on from there; its learning rate is "
            "from now on that of the longer run, so it rises and falls to zero again"
        )
    run.print(f"arm: {arm}", *(f"  {key}: {value}" for key, value in record["config"].items()))
    run.print(f"device: {record['device']}, {accelerator.num_processes} process(es), {dtype} because {reason}")
    return run


def check_model_outside(model: str, folder: Path):
    """Raise UserError if `--model` is inside the run folder, which starting a run may empty."""
    for path in resolve_run(model):
        if path is not None and os.path.exists(path) and Path(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--model={model} is inside --output_dir={folder}: give another --output_dir")


def make_record(config: "Config", arm: str, accelerator: accelerate.Accelerator, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of run.json before the run starts."""
    base = resolve_run(config.model)[0]
    return {
        "arm": arm,
        "base_model": portable_path(base),
        "base_revision": hub_revision(base),
        "base_weights": weights_fingerprint(base) if os.path.isdir(base) else None,
        "config": json.loads(json.dumps(asdict(config))),
        "device": device_name(accelerator.device),
        "dtype": str(dtype),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "commit": git_commit(),
    }


def decide_resume(run: Run) -> bool:
    """Set `finished` and `resume` of a run from the folder that was found, and add this start and the id to its record.
    Returns whether a finished run is to be extended."""
    is_extended, stored = False, {}
    if run.found and run.found.record is not None and not run.record["config"]["overwrite"]:
        stored = read_run_record(run.folder)
        if has_weights(run):
            is_extended = check_same_config(run, stored)
            run.finished = run.found.finished and not is_extended
            run.resume = None if run.finished else newest_checkpoint(run)
            run.repeats_evaluation = run.resume is not None and was_evaluated(run.folder, step_of(run.resume))
        elif comparable(stored) != comparable(run.record):
            run.print(f"{run.folder}: has saved no weights yet, so it starts again with these flags")
            stored = {}
    start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step_of(run.resume)}
    start |= {"extended": is_extended} | {key: run.record[key] for key in ("processes", "device", "versions", "commit")}
    run.record["starts"] = [*stored.get("starts", []), start]
    run.record["id"] = stored.get("id", run.folder.resolve().name if stored else uuid.uuid4().hex)
    return is_extended


def has_weights(run: Run) -> bool:
    """Whether the run folder holds weights, which must not be deleted for another configuration unless requested."""
    return bool(run.found.checkpoints) or any((run.folder / name).exists() for name in ("best", "final"))


class FolderState(NamedTuple):
    """What decides whether a run starts, continues or is finished; compared again once its folder is locked."""

    record: bytes | None  # run.json
    checkpoints: list[str]
    finished: bool


def read_folder_state(folder: Path) -> FolderState:
    """The state of a run folder, which may be missing."""
    file = folder / "run.json"
    with reading(file):
        record = read_bytes(file) if file.exists() else None
    return FolderState(
        record, [checkpoint.name for checkpoint in find_checkpoints(folder)], is_finished(folder, record)
    )


class Length(msgspec.Struct):
    """The length of training in the configuration of a run.json."""

    max_steps: int | None = None
    epochs: float | None = None


class RunLength(msgspec.Struct):
    """The part of a run.json that holds the length of training."""

    config: Length


def is_finished(folder: Path, record: bytes | None) -> bool:
    """Whether final/ has the length that run.json asks for; `record` is the content of run.json. While a run is being
    extended, final/ still belongs to the shorter run. A damaged run.json is reported later, when it is compared."""
    final = folder / "final"
    if not (final / "adapter" / ADAPTER_CONFIG).is_file():  # the file that `checkpoint.resolve_run` checks too
        return False
    if record is None or not (final / "run.json").is_file():
        return True
    try:
        asked, made = (msgspec.json.decode(raw, type=RunLength) for raw in (record, read_bytes(final / "run.json")))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True
    return asked == made


def check_config(config: "Config"):
    """Raise UserError for values out of range, combinations that do not work, and a missing tracker."""
    check_ranges(config)
    if config.shard and config.dtype == "nf4":
        raise UserError("--shard=True --dtype=nf4: 4-bit layers cannot be sharded: use one of the two")
    if config.shard and "full" in (config.train_vision, config.train_projector):
        raise UserError("--shard=True --train_vision=full, --train_projector=full: only LoRA trains on a sharded base")
    if config.shard and (config.vision_cache_gb or config.vision_cache_dir):  # a process with a miss would gather alone
        raise UserError("--shard=True --vision_cache_gb: all processes must run a sharded tower: use one of the two")
    if config.metric != "exact" and config.data.partition(":")[0] == "haystack":
        raise UserError(f"--metric={config.metric}: haystacks are scored by exact answers: leave it out")
    if config.vision_lr is not None and config.train_vision == "no":
        raise UserError("--vision_lr: the vision tower does not train: add --train_vision=lora")
    if config.projector_lr is not None and config.train_projector == "no":
        raise UserError("--projector_lr: the projector does not train: add --train_projector=lora")
    if config.data.partition(":")[0] != "haystack":
        defaults = {field.name: field.default for field in fields(config)}
        for name in HAYSTACK_FIELDS:
            if getattr(config, name) != defaults[name]:
                raise UserError(f"--{name}: applies to haystacks only, --data={config.data} has none: leave it out")
    if config.shapes and config.grids != type(config).grids:
        raise UserError("--shapes --grids: shapes give the cells of every haystack: use one of the two")
    if config.eval_data and not config.eval_only and names_same_rows(config.data, config.eval_data):
        raise UserError(
            f"--eval_data={config.eval_data}: would evaluate on training rows: leave it out to hold out a tenth, or "
            "give other rows"
        )
    if config.patience and config.average_last:  # the number of updates is not known in advance
        raise UserError("--patience --average_last: training may stop before the average begins: use one of the two")
    if config.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--tracker=wandb: wandb is not installed: pip install wandb, or leave the flag out")


def names_same_rows(data: str, eval_data: str) -> bool:
    """Whether `--data` and `--eval_data` name the same jsonl file or the same split of a dataset on the hub. For other
    forms, equal values name the split of training and that of validation."""
    if data.endswith(".jsonl") and eval_data.endswith(".jsonl"):
        return os.path.realpath(data) == os.path.realpath(eval_data)
    return data == eval_data and data.startswith("hub:") and "@" in data


def start_folder(run: Run, faults: list[str]):
    """Create the run folder, or continue in it; called after all checks of the configuration and the data.

    `faults`: why rows were left out; all are written to skipped.log.
    """
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.lock = lock_folder(run.folder)
            if not run.record["config"]["overwrite"] and read_folder_state(run.folder) != run.found:
                raise UserError(f"{run.folder}: another process trained into it meanwhile: start the command again")
            if run.resume is None:
                empty_folder(run.folder)
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be made ({error.strerror}): give another --output_dir") from error
        for leftover in (*run.folder.glob(".*.tmp"), *run.folder.glob("checkpoints/.*.tmp")):  # of a killed process
            remove(leftover)
        trim_logs(run.folder, step_of(run.resume))
        write_json(run.folder / "run.json", run.record)
        log_skipped(run, faults)
    run.accelerator.wait_for_everyone()
    run.started = True
    if run.resume:
        if not (run.folder / "metrics.jsonl").exists():
            raise UserError(
                f"{run.folder / 'metrics.jsonl'}: missing, and with it the measurements so far: restore it, or start "
                "again with --overwrite=True"
            )
        run.metrics = read_metrics(run.folder)
        run.print(f"continues from {run.resume}")


def empty_folder(folder: Path):
    """Delete the contents of a run folder, which may be a link. Raises UserError for any other folder with files.

    run.json is deleted last, so that a kill at any moment leaves either a run folder or an empty one.
    """
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK]
    is_run = any(entry.name == "run.json" for entry in entries)
    if not is_run and any(entry.name not in TEMPORARY_FILES for entry in entries):
        raise UserError(f"{folder}: has files but is not a run: give another --output_dir")
    for entry in sorted(entries, key=lambda entry: entry.name == "run.json"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)  # not `remove`, which ignores errors: an old checkpoint must not survive
        else:
            entry.unlink()


def log_skipped(run: Run, faults: list[str]):
    """Print how many rows were left out and the first few; skipped.log lists all, those from before a kill included."""
    faults, file = list(dict.fromkeys(" ".join(fault.split()) for fault in faults)), run.folder / "skipped.log"
    if faults:
        run.print(f"{len(faults)} rows cannot be used and are left out, all listed in {file}:", *faults[:3])
    earlier = read_bytes(file).decode("utf-8", errors="replace").splitlines() if file.exists() else []
    run.skipped |= {*faults, *earlier}
    if run.skipped:
        write_text(file, "".join(f"{reason}\n" for reason in sorted(run.skipped)))


def start_tracker(run: Run, config: "Config", eval_sets: Iterable[str]):
    """Start TensorBoard in the run folder, or wandb, on the main process.

    TensorBoard's table of hyperparameters also shows the last scores on `eval_sets`, the names of the sets.
    """
    if run.is_main and config.tracker != "none":
        run.tracker = Tracker(config.tracker, run.folder, step_of(run.resume) + 1, run.record)
        scores = [f"{kind}/{name}" for name in eval_sets for kind in (config.metric, "eval_loss")]
        run.tracker.log_hyperparameters(comparable(run.record), scores)


# ---- comparing a run with what is asked
class Start(msgspec.Struct):
    """One start of the command; `step` is that of the checkpoint that it continued from."""

    step: Natural
    extended: bool


class RunRecord(msgspec.Struct):
    """The fields of run.json that are read back."""

    config: dict[str, Any]
    arm: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    base_weights: str | None = None
    dtype: str | None = None
    processes: int | None = None
    data: dict[str, dict[str, Any]] = {}
    starts: list[Start] = []
    id: str = ""  # for trackers


def read_run_record(folder: Path) -> dict[str, Any]:
    """The run.json of a folder. Raises UserError for a field of the wrong type."""
    file = folder / "run.json"
    read_typed(file, RunRecord, "restore it, or pass --overwrite=True")
    return read_json(file)


def check_same_config(run: Run, stored: dict[str, Any]) -> bool:
    """Print what changed since the run with this run.json began; returns whether a finished run is to be extended.

    Raises UserError with the reason if the run cannot continue with these changes.
    """
    old, new = comparable(stored), comparable(run.record)
    changed = {k: f"{k} {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)}
    grown = {k for k in LENGTH & set(changed) if type(old.get(k)) in (int, float) and new[k] > old[k]}
    is_extended = run.found.finished and bool(grown)
    allowed = {"processes", *RESUMABLE_FIELDS, *(grown if is_extended else ())}
    allowed -= {"eval_every"} if new.get("patience") else set()  # --patience counts evaluations
    refused = {k: change for k, change in changed.items() if k not in allowed}
    if refused:
        reasons = {"order of the data": DATA_ORDER, "shapes of what is saved": SAVED_SHAPES}
        reasons |= {"which answers choose best/": EVALUATION}
        lines = []
        for reason, names in reasons.items():
            lines += [f"{reason}: {change}" for k, change in refused.items() if k.partition(".")[0] in names]
        known = DATA_ORDER | SAVED_SHAPES | EVALUATION
        lines += [f"steps made so far: {change}" for k, change in refused.items() if k.partition(".")[0] not in known]
        raise UserError(
            f"{run.folder} holds a run of another configuration ({'; '.join(lines)}): give another --output_dir, "
            "or start again with --overwrite=True"
        )
    run.print(*(f"changed since: {text}" for k, text in changed.items() if k not in ("output_dir", "overwrite")))
    return is_extended


def check_last_checkpoint(run: Run):
    """Raise UserError if a finished run lacks the checkpoint of its last update or ended with averaged weights."""
    last = read_typed(run.folder / "final" / "run.json", LogLine).step
    if step_of(run.resume) != last:
        raise UserError(
            f"{run.folder}: its checkpoint of step {last} is missing or damaged, so it cannot be extended: restore it, "
            "or start again with --overwrite=True"
        )
    if run.record["config"]["average_last"]:
        raise UserError(f"{run.folder}: --average_last ended it with a mean of weights, so it cannot be extended")


def comparable(record: dict) -> dict:
    """The configuration in a run.json, with nested fields under dotted names, and the other fields in RECORDED."""
    flat = {}
    for key, value in record.get("config", {}).items():
        nested = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{k}": v for k, v in nested} or {key: value}
    return flat | {k: record.get(k) for k in RECORDED}


def differing_fields(record: dict, other: dict) -> list[str]:
    """The fields, attention apart, in which two run.json differ: hyperparameters, base model, data."""

    def compared(record: dict) -> dict:
        flat = {k: v for k, v in comparable(record).items() if k.partition(".")[0] not in NOT_COMPARED}
        return flat | {f"contents of {name}": hashes for name, hashes in record.get("data", {}).items()}

    ours, theirs = compared(record), compared(other)
    return [k for k in {**ours, **theirs} if ours.get(k) != theirs.get(k)]


def check_same_data(run: Run, sources: dict[str, "Source"]):
    """Record the hashes of the data. Raises UserError if they differ from those at the start of the run, since the rows
    would come in a different order."""
    run.record["data"] = {name: {"rows": len(s), "sha256": s.fingerprint()} for name, s in sources.items()}
    config = run.record["config"]
    if len(set(gather_object([json.dumps(run.record["data"])]))) > 1:
        raise UserError(f"{config['data']}: differs between processes: give all of them the same files")
    is_haystack = config["data"].partition(":")[0] == "haystack"
    compared = "captions and images" if is_haystack else "prompts, answers and names of images"
    stored = read_run_record(run.folder).get("data", {}) if run.resume else run.record["data"]
    for name, found in run.record["data"].items():
        if stored.get(name) != found:
            data, rows = config["data"], stored.get(name, {}).get("rows")
            if name != "train" and config["eval_data"]:
                data = config["eval_data"]
            raise UserError(
                f"{run.folder}: {data} has changed since this run began ({name}: {rows} rows then, {found['rows']} "
                f"now; compared by {compared}): restore it, or start again with --overwrite=True"
            )


# ---- checkpoints and logs
class TrainerState(msgspec.Struct):
    """trainer.pt: the state of the loop."""

    step: Natural
    best: float
    stale: Natural  # evaluations since the best one
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    optimizer: dict[str, Any]
    average: dict[str, Any] = {}  # filled once --average_last begins, see training.update_average
    averaged: Natural = 0


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [
        path
        for path in (folder / "checkpoints").glob("step-*")
        if path.is_dir() and re.fullmatch(r"step-\d{1,18}", path.name)
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def newest_checkpoint(run: Run) -> Path | None:
    """The newest checkpoint whose files match its manifest; damaged ones are reported and skipped.

    Raises UserError when there are checkpoints but all are damaged: they are only deleted on request.
    """
    folders = find_checkpoints(run.folder)[::-1]
    for folder in folders:
        try:
            verify_manifest(folder)
            return folder
        except UserError as error:
            run.print(f"skipped: {error}")
    if folders:
        raise UserError(f"{run.folder}: no checkpoint can be read: restore one, or start again with --overwrite=True")
    return None


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """{"step", "best", "stale", "seconds", "optimizer"} of a checkpoint, and {"average", "averaged"} if weights are
    averaged.

    Raises UserError for a damaged file.
    """
    file = checkpoint / "trainer.pt"
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
        checked = msgspec.convert(state, TrainerState)
    except Exception as error:  # a damaged zip or pickle may raise anything
        raise UserError(
            f"{file}: damaged or missing ({one_line(error)[:MESSAGE_LENGTH]}): delete {checkpoint}"
        ) from error
    if checked.step != step_of(checkpoint):
        raise UserError(f"{file}: of step {checked.step}, not of {checkpoint.name}: delete {checkpoint}")
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any], checkpoint: Path):
    """`optimizer.load_state_dict` after comparing names, shapes and dtypes: a mismatch would corrupt memory.

    Raises UserError where they differ.
    """
    try:
        groups = list(zip(optimizer.param_groups, stored["param_groups"], strict=True))
        for group, stored_group in groups:
            for parameter, number in zip(group["params"], stored_group["params"], strict=True):
                check_moments(parameter, stored["state"].get(number, {}))
        optimizer.load_state_dict(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{checkpoint / 'trainer.pt'}: the optimizer state does not fit this model ({one_line(error)}): "
            f"delete {checkpoint}"
        ) from error


def check_moments(parameter: torch.Tensor, moments: dict[str, torch.Tensor]):
    """Raise ValueError unless these can be AdamW's moments of a parameter; {} before its first update."""
    if moments and set(moments) != {"step", "exp_avg", "exp_avg_sq"}:
        raise ValueError(f"it has {', '.join(sorted(map(str, moments)))}")
    for name, tensor in moments.items():
        shape = torch.Size() if name == "step" else parameter.shape
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, the parameter {tuple(parameter.shape)}")


class LogLine(msgspec.Struct):
    """The field that every line of metrics.jsonl and samples.jsonl has."""

    step: Natural


class MetricsLine(LogLine, rename={"lambda_": "lambda"}):
    """A line of metrics.jsonl, for an update or an evaluation. Other fields are not read back."""

    loss: float | None = None
    eval: dict[str, tuple[Natural, Natural]] | None = None  # by set: right answers, n
    eval_loss: dict[str, float] | None = None  # by set: mean per label token
    metric: dict[str, float] | None = None  # by set: --metric, unless it is exact
    lambda_: dict[str, float] | None = None
    inside: dict[str, dict[str, float]] | None = None

    def __post_init__(self):
        for name, (right, n) in (self.eval or {}).items():
            if not 0 < n >= right:
                raise ValueError(f"{name}: {right} right answers of {n}")


class SampleLine(LogLine):
    """A line of samples.jsonl: one answer of an evaluation, and where its image is."""

    set: str
    id: str
    prompt: str
    answer: str
    response: str
    image: str | None = None  # relative to the run folder
    grid: int | None = None  # the image is a haystack of grid x grid cells


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl. Raises UserError, naming the line, for a value of the wrong type."""
    return read_log(folder / "metrics.jsonl", MetricsLine)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl. Raises UserError, naming the line, for a value of the wrong type."""
    return read_log(folder / "samples.jsonl", SampleLine)


def read_log(file: Path, type_: type[LogLine]) -> list[dict[str, Any]]:
    lines = read_json_lines(file)
    for number, line in enumerate(lines, 1):
        try:
            msgspec.convert(line, type_)
            json.dumps(line, ensure_ascii=False).encode()  # a lone surrogate can be neither printed nor drawn
        except ValueError as error:
            raise UserError(f"{file}, line {number}: {describe(error)}: correct or delete the line") from error
    return lines


def trim_logs(folder: Path, first_step: int):
    """Drop what was logged after the checkpoint of `first_step`, and the evaluation at that step: both are repeated."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        file = folder / name
        if file.exists():
            lines = read_bytes(file).decode("utf-8", errors="replace").splitlines(keepends=True)
            write_text(file, "".join(line for line in lines if is_kept(line, first_step)))


def was_evaluated(folder: Path, step: int) -> bool:
    """Whether metrics.jsonl has an evaluation at this step; `trim_logs` drops it."""
    file = folder / "metrics.jsonl"
    lines = read_bytes(file).decode("utf-8", errors="replace").splitlines(keepends=True) if file.exists() else []
    return any(step_and_kind(line) == (step, "evaluation") for line in lines)


def is_kept(line: str, first_step: int) -> bool:
    """Whether a log line is complete and comes before the point where the run continues."""
    found = step_and_kind(line)
    return found is not None and (found[0] < first_step or found == (first_step, "update"))


def step_and_kind(line: str) -> tuple[int, str] | None:
    """The step of a log line and what it logs, "update" or "evaluation"; None for an incomplete or damaged line."""
    try:
        entry = json.loads(line)
        step = msgspec.convert(entry, LogLine).step
    except (ValueError, RecursionError):  # the process was killed while it wrote the line
        return None
    return (step, "update" if "loss" in entry else "evaluation") if line.endswith("\n") else None
