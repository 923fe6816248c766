"""What a process computes on: processes, precision, memory, compiled layers, and what run.json and eval.json record
about it."""

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import accelerate
import torch
from torch import nn

from errors import UserError, world_size
from files import MESSAGE_LENGTH, one_line

if TYPE_CHECKING:
    from finetune_original import Config

ROOT = Path(__file__).resolve().parent
TIMEOUT = timedelta(hours=2)  # one process may build haystacks or measure attention while the others wait for it
GPU_WORKERS = 4  # data loading processes per training process on a GPU
LAUNCHER_SETTINGS = {  # environment variables of `accelerate launch` -> the neutral value
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
}


def make_accelerator() -> accelerate.Accelerator:
    """Accelerator for one process or those of torchrun. Raises UserError for launcher settings that alter training."""
    for name, neutral in LAUNCHER_SETTINGS.items():
        if os.environ.get(name, neutral).lower() != neutral:
            raise UserError(f"{name}={os.environ[name]}: unset it: use torchrun, and the flags of this script")
    on_cpu = "LOCAL_RANK" in os.environ and not torch.cuda.is_available()  # accelerate must be asked to use the CPU
    patience = accelerate.InitProcessGroupKwargs(timeout=TIMEOUT)
    # the run does its own autocast
    accelerator = accelerate.Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[patience])
    started = world_size()
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started but {accelerator.num_processes} found each other: use torchrun"
        )
    return accelerator


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, reason): bfloat16 where the GPU supports it, else float32; never float16, in which Gemma overflows."""
    if wanted == "nf4":
        if device.type != "cuda":
            raise UserError("--dtype=nf4: 4-bit weights need a CUDA GPU: use float32 or bfloat16 here")
        return torch.bfloat16, "4-bit weights compute in it"
    if wanted != "auto":
        return getattr(torch, wanted), "the configuration says so"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the GPU supports it"
    return torch.float32, f"bfloat16 is not known to be fast and safe on {device.type}"


def choose_workers(workers: int, device: torch.device) -> int:
    """Number of data loading processes per computing process; -1 means none on a CPU, GPU_WORKERS on a GPU."""
    return workers if workers >= 0 else GPU_WORKERS * (device.type == "cuda")


@contextlib.contextmanager
def out_of_memory_as(advice: str) -> Iterator[None]:
    """Inside the block, running out of GPU memory raises a UserError with this advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU is out of memory: {advice} ({one_line(error)[:MESSAGE_LENGTH]})") from error


# ---- facts for run.json and eval.json
def portable_path(base: str) -> str:
    """A folder inside the repository as a path relative to it, so that a run folder can be moved with it."""
    path = Path(base).resolve()
    if not Path(base).is_dir():
        return str(base).partition("@")[0]  # the revision is recorded separately
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory(device: torch.device) -> str:
    """Peak memory of the GPU, or of this process where the system reports it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on the GPU"
    if sys.platform == "win32":
        return "unknown"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    import peft
    import transformers

    return {m.__name__: m.__version__ for m in (torch, transformers, peft, accelerate)} | {
        "python": platform.python_version()
    }


def git_commit() -> str | None:
    """`git describe` of the repository; None outside of one, as in an installed package."""
    if not (ROOT / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return git.stdout.strip() or None


def compile_layers(model: nn.Module, backend: str = "inductor"):
    """Compile each decoder and vision layer separately, in place. The layers of a tower share their graphs, which
    accept any sequence length."""
    tower = model.model.vision_tower
    for layer in (*model.model.language_model.layers, *(() if tower is None else tower.encoder.layers)):
        layer.compile(dynamic=True, backend=backend)


def without_compiling(config: "Config") -> contextlib.AbstractContextManager:
    """Inside the block, compiled layers run eagerly: an evaluation would trigger recompilation for its KV cache."""
    return torch.compiler.set_stance("force_eager") if config.compile else contextlib.nullcontext()
