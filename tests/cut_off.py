"""Child process of test_survival.py: starts one configuration repeatedly and interrupts it.

python tests/cut_off.py CONFIG.json STARTS.json

A start is {folder, action, at, count, copy, change}. `action` is a signal's name, the name and " to all" for a signal
to the run and its data loading processes, or "full" for a full disk. It happens when the run reaches `at` for the
`count`-th time: one of POINTS, or "call", any call that changes the file system inside the run folder. Without `at` it
happens after `count` seconds; without `action` the run is not interrupted. `copy` names a folder that is copied to
`folder` first, `change` overrides fields of Config. Every start is a fork of this process, which has imported
everything and computed nothing.

Prints a list of [exit status, output, calls]. A status below zero is a signal's; calls are listed for starts without an
action.
"""

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import adapters
import machine
import plots
import run_folder
import training
from differential_attention import DifferentialConfig
from errors import one_line_errors
from finetune_diff import Config
from finetune_original import finetune
from modeling_gemma import PaliGemmaForConditionalGeneration

POINTS = {
    "step": (torch.optim.AdamW, "step"),  # gradients exist, the weights are not yet updated
    "checkpoint": (training, "save_trainer_state"),  # the adapter is written, the optimizer is not
    "evaluation": (PaliGemmaForConditionalGeneration, "generate"),
    "log": (run_folder.Run, "log"),
    "figures": (plots, "draw_loss"),
    "data": (training, "print_setup"),  # nothing is written yet
}
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}
WRITERS = [(torch, "save"), (adapters, "save_file"), (safetensors.torch, "save_file")]  # without audit events


def act(action: str):
    if action == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    elif action.endswith(" to all"):
        signal_group(signal.Signals[action.removesuffix(" to all")])
    else:
        os.kill(os.getpid(), signal.Signals[action])


def signal_group(number: int):
    """Send a signal to this process and its children as a launcher does: workers tolerate SIGTERM from their parent."""
    group = os.getpgrp()
    launcher = os.fork()
    if launcher == 0:
        os.setpgid(0, 0)
        os.killpg(group, number)
        os._exit(0)
    os.waitpid(launcher, 0)
    time.sleep(0.5)  # for a worker that ends


def call_before(owner: object, name: str, hook: Callable[[], None]):
    """Make `owner.name` call `hook` first."""
    real = getattr(owner, name)

    def hooked(*args, **kwargs):
        hook()
        return real(*args, **kwargs)

    setattr(owner, name, hooked)


def watch_calls(folder: Path, on_call: Callable[[str], None]):
    """Call `on_call`, with name and path, before every call that changes something in `folder`. TensorBoard's files,
    which a thread writes, are left out."""

    def hook(event: str, args: tuple):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if not (writes or event in CHANGES) or not isinstance(args[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(args[0])
        if event in ("os.remove", "os.rmdir") and args[1] >= 0:  # relative to an open folder, as rmtree deletes
            path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
        path = Path(os.path.abspath(path))
        if path.is_relative_to(folder) and "tensorboard" not in path.parts:
            on_call(f"{event} {path.relative_to(folder)}")

    for owner, name in WRITERS:
        call_before(owner, name, lambda name=name: on_call(name))
    sys.addaudithook(hook)


def child(config: Config, start: dict, pipe: int):
    """Train in this process, which is a fork, and exit."""
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    os.setpgid(0, 0)  # signals to all processes of the run reach no other
    code, calls, folder = 1, [], Path(config.output_dir).resolve()
    reached = 0

    def count(_: str = ""):
        nonlocal reached
        reached += 1
        if reached == start["count"]:
            act(start["action"])

    try:
        if start.get("at") == "call":
            watch_calls(folder, count)
        elif start.get("at"):
            call_before(*POINTS[start["at"]], count)
        elif not start.get("action"):
            watch_calls(folder, calls.append)
        one_line_errors(finetune)(config, "diff", config.differential)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    print("calls:", json.dumps(calls))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(config: Config, start: dict) -> list:
    """[exit status, output, calls] of one start."""
    if start.get("copy"):
        shutil.rmtree(config.output_dir, ignore_errors=True)
        shutil.copytree(Path(config.output_dir).with_name(start["copy"]), config.output_dir)
    read, write = os.pipe()  # not a file, which could not be written on a full disk
    pid = os.fork()
    if pid == 0:
        child(config, start, write)
    os.close(write)
    killer = os.fork() if start.get("action") and not start.get("at") else None
    if killer == 0:
        time.sleep(start["count"])
        os.kill(pid, signal.Signals[start["action"]])
        os._exit(0)
    output, _, calls = os.fdopen(read).read().rpartition("calls: ")
    if killer:
        os.kill(killer, signal.SIGKILL)
        os.waitpid(killer, 0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [status, output, json.loads(calls)] if status >= 0 else [status, output + calls, []]


def main(config: str, starts: str):
    torch.set_num_threads(1)
    machine.versions()  # imports peft and transformers, which otherwise every fork would import
    importlib.import_module("torch.utils.tensorboard")
    fields = json.loads(Path(config).read_text())
    base = Config(**fields | {"differential": DifferentialConfig(**fields["differential"]).resolve()})
    folder, ends = Path(starts).parent, []
    for start in json.loads(Path(starts).read_text()):
        change = start.get("change", {})
        ends.append(run(replace(base, output_dir=str(folder / start["folder"]), **change), start))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
