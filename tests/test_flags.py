"""Unusual values in every flag of both arms: refused in one line before anything is loaded, or meaningful."""

import contextlib
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from refusals import refused
from tyro._docstrings import get_field_docstring

import demo
import errors
import eval_mmnih
import export
import finetune_diff
import finetune_original
import generate
import make_report
import plots
import study
from differential_attention import DifferentialConfig
from errors import UserError
from finetune_original import parse_config

ROOT = Path(__file__).parent.parent
NONSENSE = ["nan", "inf", "-inf", "-1", "0", "-0.5", "1.0", "2", "1e30", str(10**20), "1.5", "", "x", "True", "None"]
FLAGS = [(finetune_original.Config, field.name) for field in fields(finetune_original.Config)]
FLAGS += [(finetune_diff.Config, f"differential.{field.name}") for field in fields(DifferentialConfig)]
TEXT = ("model", "data", "eval_data", "vision_cache_dir", "output_dir", "lora_targets")  # checked when it is used
OUT_OF_RANGE = {
    **dict.fromkeys(["max_steps", "batch_size", "accumulation", "eval_samples", "eval_batch_size"], ["-1", "0"]),
    **dict.fromkeys(["eval_every", "log_every", "save_every", "keep_checkpoints", "max_new_tokens"], ["-1", "0"]),
    **dict.fromkeys(["lr", "lora_alpha", "clip"], ["nan", "inf", "-1", "0"]),
    **dict.fromkeys(["epochs", "weight_decay", "vision_cache_gb"], ["nan", "inf", "-1"]),
    **dict.fromkeys(["beta2", "lora_dropout"], ["nan", "-0.1", "1.0"]),
    "negatives": ["nan", "-0.1", "2"],
    "seed": ["-1", "99999999999999999999"],
    "lora_rank": ["-1", "0", "1000000"],
    "warmup_steps": ["-1"],
    "workers": ["-2", "1000000"],
    "grids": ["0", "1000"],
}
DIFFERENTIAL = {
    "lambda_lr": ["-1", "nan", "inf"],
    "lambda_warmup": ["2", "-1", "nan"],
    "lambda_start": ["nan", "2"],
    "rank": ["0", "-1"],
    "noise_ratio": ["0"],
    "lambda_init": ["inf"],
    "adapter_scale": ["nan"],
    "preset": ["v3"],
}


def parse(config_class: type, *flags: str):
    """The configuration of these flags, as in `main`. Raises SystemExit or UserError."""
    config = parse_config(config_class, None, flags)
    if config_class is finetune_diff.Config:
        config = replace(config, differential=config.differential.resolve())
    return config


@pytest.mark.parametrize(("config_class", "name"), FLAGS, ids=[name for _, name in FLAGS])
def test_nonsense_is_refused_in_one_line_or_parsed(config_class, name):
    refusals = 0
    for value in NONSENSE:
        output = io.StringIO()
        try:
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                parse(config_class, f"--{name}={value}")
        except SystemExit as end:
            assert end.code == 2 and "Traceback" not in output.getvalue()
            refusals += 1
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            refusals += 1
    assert refusals >= (0 if name in TEXT else 4)


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused_by_their_flag(name):
    for value in OUT_OF_RANGE[name]:
        with refused(f"--{name}=", "xpected"):
            parse(finetune_original.Config, f"--{name}={value}")


@pytest.mark.parametrize("name", DIFFERENTIAL)
def test_choices_of_differential_attention_out_of_range_are_refused(name):
    for value in DIFFERENTIAL[name]:
        with refused("differential"):
            parse(finetune_diff.Config, f"--differential.{name}={value}")


def test_help_groups_the_flags_and_describes_each(capsys, monkeypatch):
    """Every flag once, under the title of its section of Config, with its comment."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse(finetune_diff.Config, "--help")
    lines = [line.strip("│╭╮─ ") for line in capsys.readouterr().out.splitlines()]  # a terminal has boxes
    titles = [f"{title} options" for title in ("model", "data", "optimisation", "evaluation", "differential")]
    places = [lines.index(title) for title in titles]
    assert places == sorted(places)
    flags = [line.split()[0] for line in lines if line.startswith("--")]
    for field in fields(finetune_original.Config):
        assert flags.count(f"--{field.name}") == 1, field.name
    ends = [*places[1:], len(lines)]
    for name, title in (("lora_rank", 0), ("workers", 1), ("lr", 2), ("patience", 3), ("differential.preset", 4)):
        assert any(line.startswith(f"--{name} ") for line in lines[places[title] : ends[title]]), name
    assert "rank of the low-rank updates" in " ".join(lines)


SCRIPTS = (demo, eval_mmnih, export, finetune_diff, finetune_original, generate, make_report, plots, study)


def descriptions(config_class: type) -> Iterator[tuple[str, str | None]]:
    """Yields (name, comment as --help shows it) of every field of a Config, those of nested ones too."""
    for field in fields(config_class):
        yield field.name, get_field_docstring(config_class, field.name, ())
        if is_dataclass(field.type):
            yield from descriptions(field.type)


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.__name__ for script in SCRIPTS])
def test_help_describes_every_flag(script):
    found = dict(descriptions(script.Config))
    assert found and [name for name, comment in found.items() if not comment] == []


def test_haystacks_need_a_size_of_grid():
    with refused("--grids"):
        parse(finetune_original.Config, "--grids")


def test_shapes_beside_grids_and_evaluation_on_training_rows_are_refused(tmp_path):
    with refused("--shapes --grids", "use one of the two"):
        parse(finetune_original.Config, "--shapes", "1", "2", "--grids", "4")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    rows = f"{tmp_path}/rows.jsonl"
    for data, eval_data in ((rows, rows), (rows, f"{tmp_path}/link.jsonl"), ("hub:a/b@val", "hub:a/b@val")):
        with refused(f"--eval_data={eval_data}: would evaluate on training rows"):
            parse(finetune_original.Config, f"--data={data}", f"--eval_data={eval_data}")
    for flags in (("vqav2:x", "vqav2:x"), ("hub:a/b", "hub:a/b"), (rows, f"{tmp_path}/other.jsonl")):
        parse(finetune_original.Config, f"--data={flags[0]}", f"--eval_data={flags[1]}")
    parse(finetune_original.Config, f"--data={rows}", f"--eval_data={rows}", "--eval_only=True")  # nothing trains


def test_the_home_folder_is_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    flags = ["--data=vqav2:~/vqa", "--eval_data=~/rows.jsonl", "--vision_cache_dir=~/cache", "--output_dir=~/run"]
    config = parse(finetune_original.Config, *flags)
    assert (config.data, config.eval_data) == ("vqav2:/home/me/vqa", "/home/me/rows.jsonl")
    assert (config.vision_cache_dir, config.output_dir) == ("/home/me/cache", "/home/me/run")
    assert parse(finetune_original.Config, "--data=haystack:~/cats").data == "haystack:/home/me/cats"
    assert parse(finetune_original.Config).output_dir == ""


def test_help_names_every_preset_and_no_section_of_the_source(capsys, monkeypatch):
    from differential_attention import PRESETS

    for script in (finetune_original, finetune_diff):
        monkeypatch.setattr("sys.argv", [script.__name__, "--help"])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "# ---" not in text and "│ ---" not in text
    assert all(f" {name} " in text for name in PRESETS)


def test_the_seed_of_differential_attention_is_that_of_the_run(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["finetune_diff.py", "--differential.seed=3"])
    with pytest.raises(SystemExit) as end:
        finetune_diff.main()
    assert end.value.code == 2 and "--differential.seed: is set by --seed" in capsys.readouterr().err


def test_an_error_does_not_wait_for_a_job_that_has_ended_or_was_started_wrongly(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        unused = str(closed.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for size, port in (("2", unused), ("2", "x"), ("2", "99999"), ("x", "1")):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("MASTER_PORT", port)
        began = time.monotonic()
        assert errors.failed_before() == 0
        assert time.monotonic() - began < 6
    assert errors.world_size() == 1


def test_a_reader_of_the_output_that_leaves_early_ends_a_script_without_a_traceback(tmp_path):
    """As in `| head`: the pipe is closed before the script writes more than it holds."""
    script = "from errors import one_line_errors\none_line_errors(lambda: print('line\\n' * 100_000))()"
    command = f'{sys.executable} -c "{script}" 2> {tmp_path}/stderr | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (141, "line\n")
    assert (tmp_path / "stderr").read_text() == ""
    script = "import socket\nfrom errors import one_line_errors\n"
    script += "def main():\n    a, b = socket.socketpair()\n    b.close()\n    a.send(b'x')\none_line_errors(main)()"
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert other.returncode == 1 and "BrokenPipeError" in other.stderr  # not a matter of the output
