"""The folder of a run: found or made, compared with what is asked, trimmed to its newest whole checkpoint.

run.json (every hyperparameter, base model, versions, commit, device), metrics.jsonl, samples.jsonl, tensorboard/,
checkpoints/step-*/, best/, final/, plots/.
"""

import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import accelerate
import torch
from tqdm import tqdm

from checkpoint import read_json, resolve_run, write_json
from errors import UserError

ROOT = Path(__file__).resolve().parent
# a run may continue with these changed: they say how it is watched, not what it computes
WATCHING = {
    "output_dir",
    "overwrite",
    "eval_only",
    "log_every",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "workers",
    "vision_cache_gb",
    "vision_cache_dir",
}


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
            with open(self.folder / file, "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        if file == "metrics.jsonl":
            self.metrics.append(line)


# ---- the run folder
def open_run(config, arm: str) -> Run | None:
    """Look at the run folder and the device, write nothing yet; None if the run is finished already.

    An unfinished run of the same configuration continues from its newest whole checkpoint, `overwrite` starts anew.
    Raises UserError when the folder holds a run of another configuration.
    """
    accelerator = make_accelerator()
    dtype, why = choose_dtype(config.dtype, accelerator.device)
    record = {
        "arm": arm,
        "base_model": portable_path(resolve_run(config.model)[0]),
        "config": json.loads(json.dumps(asdict(config))),
        "device": device_name(accelerator.device),
        "dtype": str(dtype),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "commit": git_commit(),
    }
    run = Run(Path(config.output_dir or f"runs/{arm}_seed{config.seed}"), accelerator, dtype, record)
    check_counts(config)
    if not config.eval_only and not config.overwrite and (run.folder / "run.json").exists():
        check_same_config(run)
        run.resume = newest_checkpoint(run)
        if (run.folder / "final").exists():
            run.say(f"{run.folder} is finished: use {run.folder / 'final'}, or start anew with --overwrite=True")
            return None
    run.say(f"arm: {arm}", *(f"  {key}: {value}" for key, value in record["config"].items()))
    run.say(f"device: {record['device']}, {accelerator.num_processes} process(es), {dtype} because {why}")
    return run


def make_accelerator() -> accelerate.Accelerator:
    """One process, or those of torchrun; without CUDA accelerate takes them up only if told to stay on the CPU."""
    accelerator = accelerate.Accelerator(cpu="LOCAL_RANK" in os.environ and not torch.cuda.is_available())
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started and {accelerator.num_processes} found each other: use torchrun"
        )
    return accelerator


def check_counts(config):
    """Raise UserError for a number that would divide by zero or silently train nothing."""
    names = ("batch_size", "accumulation", "eval_samples", "eval_batch_size", "eval_every", "log_every", "save_every")
    for name in (*names, "keep_checkpoints", "max_new_tokens", "lora_rank"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)}: must be at least 1")
    if config.clip <= 0 or config.lr <= 0:
        raise UserError(f"--clip={config.clip} --lr={config.lr}: must be above 0")


def start_folder(run: Run, steps: int):
    """Make the run folder or take up an interrupted one; called when all that can be refused has been read."""
    if run.is_main:
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            if run.resume is None:
                empty_folder(run.folder)
        except OSError as error:
            raise UserError(f"{run.folder}: cannot be made ({error.strerror}): give another --output_dir") from error
        trim_logs(run.folder, step_of(run.resume), steps)
        write_json(run.folder / "run.json", run.record)
    run.accelerator.wait_for_everyone()


def empty_folder(folder: Path):
    """Delete the contents of a run folder, and of no other; the folder itself may be a link or a mount."""
    entries = list(folder.iterdir())
    if entries and not (folder / "run.json").exists():
        raise UserError(f"{folder} holds files that are no run: give another --output_dir")
    for entry in entries:
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """bfloat16 where the card has it, else float32; never float16, in which Gemma overflows."""
    if wanted != "auto":
        return getattr(torch, wanted), "the configuration says so"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the card computes in bfloat16"
    return torch.float32, f"{device.type} is not known to be fast and safe in bfloat16"


def check_same_config(run: Run):
    stored = read_json(run.folder / "run.json")
    old, new = stored.get("config", {}), run.record["config"]
    changed = [k for k in {**old, **new} if k not in WATCHING and old.get(k) != new.get(k)]
    changed += [k for k in ("arm", "base_model", "processes", "dtype") if stored.get(k) != run.record[k]]
    if changed:
        told = {**{k: stored.get(k) for k in run.record}, **old}, {**run.record, **new}
        differences = ", ".join(f"{k} {told[0].get(k)} -> {told[1].get(k)}" for k in changed)
        raise UserError(
            f"{run.folder} holds a run of another configuration ({differences}): give another --output_dir, "
            "or start anew with --overwrite=True"
        )


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def newest_checkpoint(run: Run) -> Path | None:
    """The last checkpoint that reads; a damaged one is named and passed over for the one before.

    Raises UserError when there are checkpoints and none reads: what they hold is not thrown away unasked.
    """
    folders = sorted((run.folder / "checkpoints").glob("step-*"), reverse=True)
    for folder in folders:
        try:
            read_trainer_state(folder)
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


def trim_logs(folder: Path, first: int, steps: int):
    """Drop what was logged after the checkpoint of step `first`: it happens again, the final evaluation too."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
            kept = "".join(line for line in lines if _stays(line, first, steps))
            (folder / f"{name}.tmp").write_text(kept, encoding="utf-8")
            (folder / f"{name}.tmp").replace(folder / name)


def _stays(line: str, first: int, steps: int) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:  # the process died in the middle of the line
        return False
    return entry["step"] <= first and not (entry["step"] == steps and "loss" not in entry)


def portable_path(base: str) -> str:
    """A folder inside the repository is noted relative to it, so that a run folder can be moved with it."""
    path = Path(base).resolve()
    if not Path(base).is_dir():
        return str(base)
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
