"""Child process of test_survival.py: trains the same configuration again and again and cuts it off as told.

python tests/cut_off.py CONFIG.json PLAN.json

A plan is a list of runs {folder, place, after, deed}: at the `after`-th time that a run reaches `place` (one of PLACES)
the deed happens: a signal's name, or "full", a disk that takes no more. Without a place it happens after so many
seconds; without a deed the run may end. Every run is a fork of this process, which has imported everything and computed
nothing. Prints a list of [exit status, what was printed]; a status below zero is a signal's.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import run_folder
import training
from differential_attention import DifferentialConfig
from errors import one_line_errors
from finetune_diff import Config
from finetune_original import finetune
from modeling_gemma import PaliGemmaForConditionalGeneration

PLACES = {
    "step": (torch.optim.AdamW, "step"),  # gradients are there, weights not yet moved
    "checkpoint": (training, "save_state"),  # the adapter is written, the optimizer not
    "write_manifest": (training, "write_manifest"),
    "best": (training, "save_differential"),
    "evaluation": (PaliGemmaForConditionalGeneration, "generate"),
    "log": (run_folder.Run, "log"),
}


def do(deed: str):
    if deed == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
    else:
        os.kill(os.getpid(), signal.Signals[deed])


def wait_in(place: str, after: int, deed: str):
    owner, name = PLACES[place]
    real, count = getattr(owner, name), 0

    def reached(*args, **kwargs):
        nonlocal count
        count += 1
        if count == after:
            do(deed)
        return real(*args, **kwargs)

    setattr(owner, name, reached)


def child(config: Config, plan: dict, pipe: int):
    """Train in this process, which is a fork, and leave it."""
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    code = 1
    try:
        if plan.get("place"):
            wait_in(plan["place"], plan["after"], plan["deed"])
        one_line_errors(finetune)(config, "diff", config.differential)
        code = 0
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cut_off(config: Config, plan: dict) -> list:
    read, write = os.pipe()  # not a file: a full disk would take no word either
    pid = os.fork()
    if pid == 0:
        child(config, plan, write)
    os.close(write)
    killer = os.fork() if plan.get("deed") and not plan.get("place") else None
    if killer == 0:
        time.sleep(plan["after"])
        os.kill(pid, signal.Signals[plan["deed"]])
        os._exit(0)
    told = os.fdopen(read).read()
    if killer:
        os.kill(killer, signal.SIGKILL)
        os.waitpid(killer, 0)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told]


def main(config: str, plans: str):
    torch.set_num_threads(1)
    fields = json.loads(Path(config).read_text())
    base = Config(**fields | {"differential": DifferentialConfig(**fields["differential"])})
    folder, ends = Path(plans).parent, []
    for plan in json.loads(Path(plans).read_text()):
        config = replace(base, output_dir=str(folder / plan["folder"]), **plan.get("change", {}))
        ends.append(cut_off(config, plan))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
