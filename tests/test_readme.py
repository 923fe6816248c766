"""The README's commands run as they stand, made short by flags."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import tyro

from differential_attention import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.search(r"python .*", line)[0] for line in lines if "python " in line]


def test_every_command_runs(tmp_path):
    """In a folder of their own, so that no run of the user's is met."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    ran = []
    for command in commands():
        if any(part in command for part in ("google/", "benchmarks/", "$")):  # licences, GPUs, data; minutes
            continue
        words = [word.replace('"', "") for word in re.findall(r'(?:[^\s"]|"[^"]*")+', command.split("#")[0])]
        if words[1].startswith("finetune"):
            words += ["--max_steps=2", "--eval_samples=2", "--batch_size=2", "--eval_batch_size=2"]
        if words[1].startswith("eval"):
            words += ["--samples=2"]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        told = subprocess.run(
            [sys.executable, str(ROOT / words[1]), *words[2:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert told.returncode == 0, f"{command}: {told.stderr}"
        ran.append(words[1])
    scripts = {"finetune_original.py", "finetune_diff.py", "eval_mmnih.py", "generate.py", "plots.py", "export.py"}
    assert scripts <= set(ran)
    assert (tmp_path / "boxes.png").stat().st_size > 1000


def test_flags_of_the_commands_that_need_a_gpu_or_several_processes_are_known():
    lines = [
        line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.replace("\\\n", " ").splitlines()
    ]
    found = [
        match
        for line in lines
        if (match := re.search(r"(finetune_\w+|eval_mmnih)\.py (--.*)", line)) and "$" not in line
    ]
    assert len([match for match in found if "google/" in match[0]]) == 7
    for script, flags in (match.groups() for match in found):
        assert tyro.cli(
            importlib.import_module(script).Config,
            args=flags.partition("#")[0].split(),
            config=(tyro.conf.FlagConversionOff,),
            use_underscores=True,
        )


def test_the_sweep_starts_every_seed_of_either_arm_once(tmp_path):
    """The loop as it stands, `python` noting what it is asked for."""
    (block,) = [block for block in re.findall(r"```\n(.*?)```", README, re.S) if "for seed in" in block]
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", block], check=True, env=environment, cwd=tmp_path)
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    configs = [
        tyro.cli(importlib.import_module(script.removesuffix(".py")).Config, args=flags, use_underscores=True)
        for script, *flags in asked
    ]
    assert [config.seed for config in configs] == [0, 0, 1, 1, 2, 2]
    assert len({config.output_dir for config in configs}) == 6


def test_the_files_it_names_exist():
    for name in re.findall(r"`((?:tests/|benchmarks/|assets/)?[\w/-]+\.(?:py|txt))`", README):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_table_of_presets_is_the_code_s():
    """Formula and exactness are the table's, parameters and time those that the benchmark saved."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "presets.json").read_text())["presets"]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|no) \| ([\d,]+) \| ([\d.-]+) \|$", README, re.M)
    assert [row[0] for row in rows] == list(PRESETS)
    for name, formula, exact, parameters, time in rows:
        told = measured[name]
        assert (formula, exact == "yes") == (PRESETS[name].formula, PRESETS[name].exact)
        assert int(parameters.replace(",", "")) == told["parameters"]
        assert time == (f"{told['time']:.2f}" if "time" in told else "-")


def test_ci_runs_the_command_of_the_readme():
    command = "pip install -r requirements-dev.txt && pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()
