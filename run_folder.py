"""The folder of a run: found or made, compared with what is asked, trimmed to its newest whole checkpoint.

run.json (every hyperparameter, base model, versions, commit, device), metrics.jsonl, samples.jsonl, tensorboard/,
checkpoints/step-*/, best/, final/, plots/.
"""

import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import accelerate
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from checkpoint import hub_revision, resolve_run
from errors import UserError
from files import LOCK, lock_folder, read_json, verify_manifest, write_json, writing

ROOT = Path(__file__).resolve().parent
# a run may continue with these changed: they say how it is watched and fitted into memory, not what it computes
WATCHING = {
    "output_dir",
    "overwrite",
    "eval_only",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "workers",
    "gradient_checkpointing",
    "shard",
    "strict_data",
    "tracker",
    "vision_cache_gb",
    "vision_cache_dir",
}
# why the others cannot change under way; what is in neither list shaped the steps that were made
DATA_ORDER = {"seed", "data", "eval_data", "grids", "negatives", "batch_size", "accumulation", "group_by_length"}
SHAPES = {"model", "base_model", "base_revision", "arm", "lora_rank", "lora_targets", "differential"}


class Stopped(Exception):
    """Somebody asked the run to stop: `number` is the signal's."""

    def __init__(self, number: int):
        self.number = number


@dataclass
class Run:
    """Where a run writes, what it computes on, and what its run.json says."""

    folder: Path
    accelerator: accelerate.Accelerator
    dtype: torch.dtype  # of the frozen base and of autocast
    record: dict
    resume: Path | None = None  # newest whole checkpoint
    metrics: list[dict] = field(default_factory=list)
    start: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)  # what differential attention started from
    tracker: accelerate.tracking.GeneralTracker | None = None  # beside metrics.jsonl, on the main process
    strict: bool = False  # a bad row ends the run
    skipped: set[str] = field(default_factory=set, repr=False)  # rows that could not be used, each named once
    signal: int = 0  # that asked to stop
    lock: object = None  # held while the main process lives

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def say(self, *lines: str):
        if self.is_main:
            tqdm.write("\n".join(lines))

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def log(self, line: dict, file: str = "metrics.jsonl"):
        if self.is_main:
            with writing(self.folder / file), open(self.folder / file, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if file == "metrics.jsonl":
            self.metrics.append(line)

    def track(self, step: int, values: dict):
        """Every number among `values`, nested ones under their path, to TensorBoard or wandb."""
        if self.tracker:
            with writing(self.folder / self.tracker.name):
                self.tracker.log(flat_numbers(values), step=step)

    def skip(self, fault: UserError):
        """Name a row that cannot be used, on the terminal and in skipped.log, and go on without it; or raise it."""
        if self.strict:
            raise fault
        told = " ".join(str(fault).split())
        if told not in self.skipped:
            self.skipped.add(told)
            tqdm.write(f"skipped: {told}")
            if not self.folder.is_dir():  # it is made when nothing can be refused any more
                return
            with writing(self.folder), open(self.folder / "skipped.log", "a", encoding="utf-8") as log:
                log.write(f"{told}\n")  # by the process that met it

    def heed(self):
        """Raise Stopped on every process if any of them was asked to stop: none waits for one that has left."""
        asked = torch.tensor([self.signal], device=self.device)
        number = int(self.accelerator.gather(asked).max())
        if number:
            raise Stopped(number)

    @contextmanager
    def noting_signals(self):
        """SIGTERM and Ctrl-C only make a note for `heed` while the block runs."""

        def note(number, _):
            self.signal = number

        kept = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def leave(self, stopped: Stopped, step: int):
        """End this process by the shell's rule for signals, and say how to go on."""
        name = signal.Signals(stopped.number).name
        self.say(f"stopped by {name} after step {step}; the same command continues {self.folder} from there")
        self.finish()
        raise SystemExit(128 + stopped.number)

    def finish(self):
        if self.tracker:
            self.tracker.finish()
        self.accelerator.end_training()


def flat_numbers(values: dict, prefix: str = "") -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat[prefix + key] = value
    return flat


# ---- the run folder
def open_run(config, arm: str) -> Run | None:
    """Look at the run folder and the device, write nothing yet; None if the run is finished already.

    An unfinished run of the same configuration continues from its newest whole checkpoint, `overwrite` starts anew.
    Raises UserError when the folder holds a run of another configuration.
    """
    check_numbers(config)
    accelerator = make_accelerator()
    base = resolve_run(config.model)[0]
    dtype, why = choose_dtype(config.dtype, accelerator.device)
    record = {
        "arm": arm,
        "base_model": portable_path(base),
        "base_revision": hub_revision(base),
        "config": json.loads(json.dumps(asdict(config))),
        "device": device_name(accelerator.device),
        "dtype": str(dtype),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "commit": git_commit(),
    }
    folder = Path(config.output_dir or f"runs/{arm}_seed{config.seed}")
    run = Run(folder, accelerator, dtype, record, strict=config.strict_data)
    finished = False
    if not config.eval_only and not config.overwrite and (run.folder / "run.json").exists():
        check_same_config(run)
        finished = (run.folder / "final").exists()
        run.resume = None if finished else newest_checkpoint(run)
    if len(set(gather_object([(finished, str(run.resume))]))) > 1:
        raise UserError(f"{run.folder}: not the same on every node: give an --output_dir on a disk that all share")
    if finished:
        run.say(f"{run.folder} is finished: use {run.folder / 'final'}, or start anew with --overwrite=True")
        return None
    run.say(f"arm: {arm}", *(f"  {key}: {value}" for key, value in record["config"].items()))
    run.say(f"device: {record['device']}, {accelerator.num_processes} process(es), {dtype} because {why}")
    return run


def make_accelerator() -> accelerate.Accelerator:
    """One process, or those of torchrun; without CUDA accelerate takes them up only if told to stay on the CPU.

    Autocast is the run's own: a launcher's setting would be a second one, and could be float16.
    """
    on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()
    accelerator = accelerate.Accelerator(cpu=on_cpu, mixed_precision="no")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started and {accelerator.num_processes} found each other: use torchrun"
        )
    return accelerator


def check_numbers(config):
    """Raise UserError for a number that would divide by zero or silently train nothing, and for a missing tracker."""
    names = ("batch_size", "accumulation", "eval_samples", "eval_batch_size", "eval_every", "log_every", "save_every")
    for name in (*names, "keep_checkpoints", "max_new_tokens", "lora_rank"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)}: must be at least 1")
    if config.clip <= 0 or config.lr <= 0:
        raise UserError(f"--clip={config.clip} --lr={config.lr}: must be above 0")
    if config.shard and config.dtype == "nf4":
        raise UserError("--shard=True --dtype=nf4: layers in 4 bits are not cut: use one of the two")
    if config.shard and (config.vision_cache_gb or config.vision_cache_dir):  # a process that misses would gather alone
        raise UserError("--shard=True --vision_cache_gb: a tower in shares is run by all together: use one of the two")
    if config.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--tracker=wandb: wandb is not installed: pip install wandb, or leave the flag out")


def start_folder(run: Run, faults: list[str]):
    """Make the run folder or take up an interrupted one; called when all that can be refused has been read.

    `faults`: what is wrong with the rows that were left out, all noted in skipped.log.
    """
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            run.lock = lock_folder(run.folder)
            if run.resume is None:
                empty_folder(run.folder)
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be made ({error.strerror}): give another --output_dir") from error
        for torn in run.folder.glob("checkpoints/.*.tmp"):  # its process died in the middle
            shutil.rmtree(torn)
        trim_logs(run.folder, step_of(run.resume))
        write_json(run.folder / "run.json", run.record)
        note_skipped(run, faults)
    run.accelerator.wait_for_everyone()
    if run.resume:
        log = run.folder / "metrics.jsonl"
        if not log.exists():
            raise UserError(f"{log}: is gone, and with it what this run measured: start anew with --overwrite=True")
        run.metrics = [json.loads(line) for line in log.read_text().splitlines()]
        run.say(f"continues from {run.resume}")


def note_skipped(run: Run, faults: list[str]):
    """Count the rows that were left out and name the first; skipped.log names all, also those met before a kill."""
    faults, file = list(dict.fromkeys(" ".join(fault.split()) for fault in faults)), run.folder / "skipped.log"
    if faults:
        run.say(f"{len(faults)} rows cannot be used and are left out, all named in {file}:", *faults[:3])
    earlier = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    run.skipped |= {*faults, *earlier}
    if run.skipped:
        with writing(file):
            file.write_text("".join(f"{fault}\n" for fault in sorted(run.skipped)), encoding="utf-8")


def start_tracker(run: Run, config):
    """TensorBoard inside the run folder, or wandb by name. Only a copy: metrics.jsonl is what everything reads."""
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if not run.is_main or config.tracker == "none":
        return
    if config.tracker == "tensorboard":
        run.tracker = TensorBoardTracker("tensorboard", run.folder, purge_step=step_of(run.resume) + 1)
    else:
        name = run.folder.resolve().name  # the id too: a run that continues goes on there
        run.tracker = WandBTracker("diff-transformer", name=name, id=name, resume="allow", config=run.record["config"])
    run.tracker.start()


def empty_folder(folder: Path):
    """Delete the contents of a run folder, and of no other; the folder itself may be a link or a mount."""
    entries = [entry for entry in folder.iterdir() if entry.name != LOCK]
    if entries and not (folder / "run.json").exists():
        raise UserError(f"{folder} holds files that are no run: give another --output_dir")
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the card has it, else float32; never float16, in which Gemma overflows."""
    if wanted == "nf4":
        if device.type != "cuda":
            raise UserError("--dtype=nf4: 4-bit weights need a CUDA card: use float32 or bfloat16 here")
        return torch.bfloat16, "4-bit weights compute in it"
    if wanted != "auto":
        return getattr(torch, wanted), "the configuration says so"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the card computes in bfloat16"
    return torch.float32, f"{device.type} is not known to be fast and safe in bfloat16"


def check_same_config(run: Run):
    """Say what was changed since the run began; UserError if a run cannot continue with it, with the reason."""
    stored = read_json(run.folder / "run.json")
    old, new = comparable(stored), comparable(run.record)
    changed = {k: f"{k} {old.get(k)} -> {new.get(k)}" for k in {**old, **new} if old.get(k) != new.get(k)}
    reasons = {"order of the data": DATA_ORDER, "shapes of what is saved": SHAPES}
    refused = {k: told for k, told in changed.items() if k not in WATCHING and k != "processes"}
    if refused:
        told = []
        for reason, names in reasons.items():
            told += [f"{reason}: {text}" for k, text in refused.items() if k.partition(".")[0] in names]
        known = DATA_ORDER | SHAPES
        told += [f"steps made so far: {text}" for k, text in refused.items() if k.partition(".")[0] not in known]
        raise UserError(
            f"{run.folder} holds a run of another configuration ({'; '.join(told)}): give another --output_dir, "
            "or start anew with --overwrite=True"
        )
    run.say(*(f"changed since: {told}" for k, told in changed.items() if k not in ("output_dir", "overwrite")))


def comparable(record: dict) -> dict:
    """The configuration of a run.json, nested fields under dotted names, and what stands beside it."""
    flat = {}
    for key, value in record.get("config", {}).items():
        nested = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{k}": v for k, v in nested} or {key: value}
    return flat | {k: record.get(k) for k in ("arm", "base_model", "base_revision", "processes", "dtype")}


def check_same_data(run: Run, sources: dict):
    """Note what the data is; UserError if it is not what the run began with: its rows would come in another order."""
    run.record["data"] = {name: {"rows": len(s), "sha256": s.fingerprint()} for name, s in sources.items()}
    if len(set(gather_object([json.dumps(run.record["data"])]))) > 1:
        raise UserError(f"{run.record['config']['data']}: not the same on every process: give them all the same files")
    stored = read_json(run.folder / "run.json").get("data", {}) if run.resume else run.record["data"]
    for name, told in run.record["data"].items():
        if stored.get(name) != told:
            was = stored.get(name, {}).get("rows")
            raise UserError(
                f"{run.folder}: {run.record['config']['data']} has changed since this run began ({name}: {was} rows "
                f"then, {told['rows']} now, contents compared): restore it, or start anew with --overwrite=True"
            )


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def newest_checkpoint(run: Run) -> Path | None:
    """The last checkpoint that is as it was written; a damaged one is named and passed over for the one before.

    Raises UserError when there are checkpoints and none is whole: what they hold is not thrown away unasked.
    """
    folders = sorted((run.folder / "checkpoints").glob("step-*"), key=step_of, reverse=True)
    for folder in folders:
        try:
            verify_manifest(folder)
            return folder
        except UserError as error:
            run.say(f"skipped: {error}")
    if folders:
        raise UserError(f"{run.folder}: no checkpoint can be read; mend them, or start anew with --overwrite=True")
    return None


def read_trainer_state(checkpoint: Path) -> dict:
    try:
        return torch.load(checkpoint / "trainer.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged zip or pickle raises anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint / 'trainer.pt'}: damaged or missing ({reason}): delete {checkpoint}") from error


def trim_logs(folder: Path, first: int):
    """Drop what was logged after the checkpoint of step `first`, and the evaluation at it: they happen again."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            lines = (folder / name).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = "".join(line for line in lines if _stays(line, first))
            with writing(folder / name):
                (folder / f"{name}.tmp").write_text(kept, encoding="utf-8")
                (folder / f"{name}.tmp").replace(folder / name)


def _stays(line: str, first: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:  # the process died in the middle of the line
        return False
    return entry["step"] < first or (entry["step"] == first and "loss" in entry)


def portable_path(base: str) -> str:
    """A folder inside the repository is noted relative to it, so that a run folder can be moved with it."""
    path = Path(base).resolve()
    if not Path(base).is_dir():
        return str(base).partition("@")[0]  # the revision is noted beside
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    import peft
    import transformers

    return {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)} | {
        "python": platform.python_version()
    }


def git_commit() -> str | None:
    try:
        git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return git.stdout.strip() or None
