"""The README's commands run as they stand, made short by flags."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from differential_attention import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", README, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [re.search(r"python .*", line)[0] for line in lines if "python " in line]


def test_every_command_runs(tmp_path):
    ran = []
    for command in commands():
        if "google/" in command or "benchmarks/" in command:  # needs a licence, a download and a GPU; takes minutes
            continue
        words = command.split("#")[0].replace("runs/", f"{tmp_path}/").replace("boxes.png", f"{tmp_path}/boxes.png")
        arguments = [sys.executable, *re.findall(r'(?:[^\s"]|"[^"]*")+', words)[1:]]
        arguments = [a.replace('"', "") for a in arguments]
        if arguments[1].startswith("finetune"):
            arguments += ["--max_steps=2", "--eval_samples=2", "--batch_size=2", "--eval_batch_size=2"]
            if not any(a.startswith("--output_dir") for a in arguments):
                arm = arguments[1].removeprefix("finetune_").removesuffix(".py")
                preset = re.search(r"--differential.preset=(\w+)", command)
                arm += f"_{preset[1]}" if preset else ""
                arguments.append(f"--output_dir={tmp_path}/{arm}_seed0")
        told = subprocess.run(
            arguments, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"}, timeout=300
        )
        assert told.returncode == 0, f"{command}: {told.stderr}"
        ran.append(arguments[1])
    assert {"finetune_original.py", "finetune_diff.py", "generate.py", "plots.py"} <= set(ran)
    assert (tmp_path / "boxes.png").stat().st_size > 1000


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
