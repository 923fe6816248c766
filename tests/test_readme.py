"""README.md and docs/ are correct: commands run, flags exist, links resolve, tables equal the committed results."""

import ast
import functools
import importlib.util
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType

import pytest
import tyro

import study
import study_conversion
from differential_attention import LAMBDA_MAX, PRESETS
from needle_eval.statistics import format_interval, format_rate, rate
from study_records import endpoint_conditions, points, read_records
from study_report import core_contrasts, core_verdict, format_parts, group_records, knocked_out, symbolic_contrasts

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES = {"README.md": README} | dict(sorted(PAGES.items()))
RESULTS = ROOT / "benchmarks" / "results"
MAX_README_WORDS = 2300
# commands with one of these need a licence, a download, another machine or minutes
NOT_HERE = re.compile(
    r"study\.py(?! --report)|demo\.py|google/|microsoft/|benchmarks/|/data/|\b[A-Z]{4,}\b|\$|torchrun"
)
# flags of other programs
FOREIGN_FLAGS = {"--help", "--logdir", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}


def blocks(page: str, language: str = "sh") -> list[str]:
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.S | re.M) if name == language]


def commands() -> list[str]:
    """Every command that starts a script of this repository, once each, in the order of the pages."""
    text = "\n".join(block for page in PAGES.values() for block in blocks(page)).replace("\\\n", " ")
    lines = (line.strip() for line in text.splitlines())
    return list(dict.fromkeys(line for line in lines if re.match(r"(python|torchrun) ", line)))


@functools.cache
def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"readme_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def parse(command: str) -> object:
    """The Config that a command line gives. Raises SystemExit for a flag or a value that the script refuses."""
    words = shlex.split(command.replace("$seed", "0"), comments=True)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    config = (tyro.conf.FlagConversionOff,)
    return tyro.cli(load(words[at]).Config, args=words[at + 1 :], config=config, use_underscores=True)


def flags_of(config: type, prefix: str = "--") -> set[str]:
    """Every flag of a Config, nested ones with their dots."""
    found = set()
    for field in fields(config):
        found.add(prefix + field.name)
        nested = getattr(field, "default_factory", None)
        if is_dataclass(nested):
            found |= flags_of(nested, f"{prefix}{field.name}.")
    return found


def test_quick_commands_run(tmp_path):
    """Unchanged, in an empty folder, with a `python` that adds flags to make them short."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "bin").mkdir()
    short = "--max_steps=2 --eval_samples=2 --batch_size=2 --eval_batch_size=2"
    (tmp_path / "bin" / "python").write_text(
        f"""#!/bin/sh
script=$1; shift
case "$script $*" in
  finetune*) set -- "$@" {short} ;;
  *--compare*) ;;
  eval*) set -- "$@" --samples=2 ;;
esac
exec {sys.executable} {ROOT}/"$script" "$@"
"""
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    quick = [command for command in commands() if not NOT_HERE.search(command)]

    def run(commands: list[str]):
        for command in commands:
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300
            )
            assert done.returncode == 0, f"{command}: {done.stderr}"

    def starting_with(*scripts: str) -> list[str]:
        return [command for command in quick if command.split()[1].startswith(scripts)]

    # two at a time; evaluations one after the other, since they write into the same folders
    trained, evaluated = starting_with("finetune"), starting_with("eval")
    others = [command for command in quick if command not in trained + evaluated]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [[command] for command in trained]))
        list(pool.map(run, [evaluated, others]))
    scripts = {"finetune_original.py", "finetune_diff.py", "eval_mmnih.py", "generate.py", "plots.py", "export.py"}
    scripts |= {"study.py", "make_report.py"}
    assert scripts == {command.split()[1] for command in quick}
    assert (tmp_path / "boxes.png").stat().st_size > 1000
    assert (tmp_path / "runs" / "diff_seed0" / "final" / "differential.safetensors").exists()


@pytest.mark.parametrize("command", [c for c in commands() if NOT_HERE.search(c)])
def test_flags_of_the_other_commands_are_valid(command):
    parse(command)


def test_flags_in_the_text_exist():
    scripts = ("finetune_diff.py", "eval_mmnih.py", "generate.py", "export.py", "study.py", "demo.py")
    scripts += ("benchmarks/compare.py", "assets/pretrain.py")
    known = FOREIGN_FLAGS.union(*(flags_of(load(script).Config) for script in scripts))
    for name, page in PAGES.items():
        text = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
        mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text))
        assert mentioned <= known, f"{name}: {mentioned - known}"


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if "for seed in" in page])
def test_a_sweep_trains_every_seed_of_both_arms_once(name, tmp_path):
    """The unchanged loop, with a `python` that records its arguments."""
    (block,) = [block for block in blocks(PAGES[name]) if "for seed in" in block]
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/recorded\n')
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", block], check=True, env=environment, cwd=tmp_path)
    recorded = [line for line in (tmp_path / "recorded").read_text().splitlines() if line.startswith("finetune")]
    configs = [parse(f"python {line}") for line in recorded]
    assert [config.seed for config in configs] == [0, 0, 1, 1, 2, 2]
    assert [line.split()[0] for line in recorded] == ["finetune_original.py", "finetune_diff.py"] * 3
    folders = [config.output_dir for config in configs]
    assert len(set(folders)) == 6 or not any(folders)  # by default, arm and seed name the folder


def test_the_readme_is_short():
    assert len(README.split()) <= MAX_README_WORDS


def test_files_and_links_exist():
    for name, page in PAGES.items():
        for file in re.findall(r"`((?:tests/|benchmarks/|assets/|needle_eval/|docs/)[\w/.-]+|\w+\.py)`", page):
            assert (ROOT / file).exists(), f"{name}: {file}"
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page):
            path, _, anchor = target.partition("#")
            linked = (ROOT / name).parent / path if path else ROOT / name
            assert linked.exists(), f"{name}: {target}"
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}, target


def test_every_page_is_linked_from_the_readme():
    assert {name for name in PAGES if name != "README.md"} <= set(re.findall(r"\]\((docs/[\w.]+)\)", README))


def repository_map() -> dict[str, list[Path]]:
    """The README's map, in its order: a top-level module, or `needle_eval`, and the files of its entry."""
    (tree,) = [block for block in blocks(README, "") if block.startswith("errors.py")]
    found = {}
    for indent, names in re.findall(r"^( *)((?:[\w*]+\.py(?:, )?)+)  ", tree, re.M):
        for name in names.split(", "):
            folder, module = (ROOT / "needle_eval", "needle_eval") if indent else (ROOT, Path(name).stem)
            found.setdefault(module, []).extend(folder.glob(name))
    return found


def imports_of(file: Path) -> set[str]:
    """Top-level names that a file imports, at module level or in a function, except those for type checkers."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


def test_the_repository_map_lists_every_module():
    mapped = [path for paths in repository_map().values() for path in paths]
    assert sorted(mapped) == sorted([*ROOT.glob("*.py"), *(ROOT / "needle_eval").glob("*.py")])


def test_a_module_imports_only_from_modules_above_it():
    entries = repository_map()
    order = list(entries)
    backward = {
        (name, other)
        for at, name in enumerate(order)
        for file in entries[name]
        for other in imports_of(file) & set(order[at + 1 :])
    }
    assert not backward


def test_the_table_of_presets_is_the_code_s():
    """Formula and exactness are those of PRESETS, parameters and time those that benchmarks/presets.py measured."""
    measured = json.loads((RESULTS / "presets.json").read_text())["presets"]
    page = PAGES["docs/differential_attention.md"]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|no) \| ([\d,]+) \| ([\d.-]+) \|$", page, re.M)
    assert [row[0] for row in rows] == list(PRESETS)
    for name, formula, exact, parameters, time in rows:
        expected = measured[name]
        assert (formula, exact == "yes") == (PRESETS[name].formula, PRESETS[name].exact)
        assert int(parameters.replace(",", "")) == expected["parameters"]
        assert time == (f"{expected['time']:.2f}" if "time" in expected else "-")


def test_the_speed_table_is_what_was_measured():
    rows = json.loads((RESULTS / "compare_cpu.json").read_text())["rows"]
    assert "\n".join(load("benchmarks/compare.py").summary(rows)) in PAGES["docs/speed.md"]
    answers = json.loads((RESULTS / "answers.json").read_text())
    untuned, lora = (answers[f"answers per second, {kind}"]["ratio"] for kind in ("untuned", "with LoRA"))
    assert f"{untuned:.1f} x the answers per second" in PAGES["docs/speed.md"]
    assert f"{lora:.1f} x under a LoRA adapter" in PAGES["docs/speed.md"]


def test_the_tables_of_the_gpu_are_what_was_measured():
    summary = load("benchmarks/gpu.py").summary
    rows = json.loads((RESULTS / "gpu_h100.json").read_text())["rows"]
    assert "\n".join(summary(rows)) in PAGES["docs/speed.md"]
    rows = json.loads((RESULTS / "gpu_h200.json").read_text())["rows"]
    steps = summary(rows)[: summary(rows).index("")]
    assert len(steps) == 2 + 4 and "\n".join(steps) in PAGES["docs/speed.md"]
    text = " ".join(PAGES["docs/speed.md"].split())
    for name, place in (("ours, compiled / ours", "not compiled"), ("split, compiled / split", "for `split`")):
        found = rows[f"step, 224 px, ragged: {name}"]
        low, high = found["quartiles"]
        assert any(f"{place} {found['ratio']:.2f} [{more}{low:.2f}, {high:.2f}]" in text for more in ("", "quartiles "))


def test_the_results_of_study_c_are_those_of_its_records():
    lines = (ROOT / "results" / "study" / "report.md").read_text().split("## Study C", 1)[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    differences = {row[0]: row[2] for row in cells if row[0].startswith("split - ") and row[1] == "4"}
    text = " ".join(PAGES["docs/study.md"].split("## Result of C", 1)[1].split())
    assert len(differences) == 3 and all(value in text for value in differences.values())
    for page in ("docs/smollm2.md", "docs/limits.md", "README.md"):
        assert differences["split - standard"] in " ".join(PAGES[page].split())
    section = study.read_section("C")
    records = study.read_records(ROOT / "results" / "study" / "C", "C", section)
    for arm in section["arms"]:
        found = [record for job, record in records.items() if job.arm == arm]
        rates = [
            100 * statistics.fmean(record.answers[condition].rate() for record in found)
            for condition in endpoint_conditions(section)
        ]
        row = " | ".join(f"{value:.1f}" for value in (statistics.fmean(rates), *rates))
        assert len(found) == 4 and f"| `{arm}` | {row} |" in PAGES["docs/study.md"]
    without = next(row[12] for row in cells if row[0] == "split" and len(row) > 12)
    assert f"N falls from 76.3 to {without}" in text


def test_the_speeds_in_the_readme_are_what_was_measured():
    text = " ".join(README.split())
    cpu = json.loads((RESULTS / "compare_cpu.json").read_text())["rows"]
    step = "step, vocabulary 257,216, float32: ours / HF-"
    tuned, untuned = (cpu[step + kind]["ratio"] for kind in ("tuned", "default"))
    assert f"{tuned:.2f} x the time of a tuned transformers + peft" in text
    assert f"{untuned:.2f} x that of an untuned one" in text
    gpu = json.loads((RESULTS / "gpu_h100.json").read_text())["rows"]
    step = "step, 224 px, ragged: "
    with_vision, cached = (gpu[step + side]["ms"] for side in ("ours, vision", "ours"))
    ratio = gpu[step + "ours, vision / HF-default, autocast"]["ratio"]
    assert f"takes {with_vision:.0f} ms, {ratio:.2f} x the time of transformers + peft under autocast" in text
    more = 100 * (gpu[step + "split / ours"]["ratio"] - 1)
    assert f"it takes {cached:.0f} ms, and `split` {more:.0f} % longer" in text


def test_the_answer_is_that_of_the_records():
    section = study.read_section("A")
    (group,) = group_records(section, "A", read_records(ROOT / "results" / "study" / "A", "A"))
    hypotheses = core_contrasts(group)
    assert core_verdict(hypotheses) == "helps (and it is the subtraction)"
    parts = format_parts(group)
    assert parts[0] == "| difference [95 %] | 16 cells | 32 cells |"
    names = "`standard`", "`additive` (no second map)", "`flipped` (second map added)"
    for name, hypothesis, row in zip(names, hypotheses, parts[2:], strict=True):
        assert f"| {name} | {format_interval(hypothesis.t)} | {row.split(' | ', 1)[1]}" in README
    first, *controls = (hypothesis.t for hypothesis in hypotheses)
    text = " ".join(README.split())
    assert f"finds {first['mean']:.1f} points more needles than standard attention" in text
    assert f"(95 % interval {first['low']:.1f} to {first['high']:.1f}, {first['n']} seeds)" in text
    assert {f"{t['mean']:.1f}" for t in controls} == {"6.7"} and "6.7 more than either of two controls" in text
    lambdas = [value for record in group.of_arm("split").values() for value in record.lambdas]
    assert f"ends between {min(lambdas):.2f} and {max(lambdas):.2f}" in text
    page = " ".join(PAGES["docs/study.md"].split())
    assert all(f"{format_interval(hypothesis.t)}" in page for hypothesis in hypotheses)
    assert f"from {min(hypotheses[0].differences):.1f} to {max(hypotheses[0].differences):.1f} points" in page
    flipped = [value for record in group.of_arm("flipped").values() for value in record.lambdas]
    at_bound = sum(value <= -LAMBDA_MAX + 1e-6 for value in flipped)
    assert f"at its bound of {LAMBDA_MAX} in {at_bound} of {len(flipped)} cases" in page
    by_layer = list(zip(*(record.lambdas for record in group.of_arm("split").values()), strict=True))
    gammas = [statistics.fmean(value / (1 - value) for value in layer) for layer in by_layer]
    assert f"gamma, {min(gammas):.1f} to {max(gammas):.1f} (means of the layers)" in page
    first_layer, last_layer = statistics.fmean(by_layer[0]), statistics.fmean(by_layer[-1])
    assert f"from 0.5 to {first_layer:.2f} in the first layer and {last_layer:.2f} in the last" in page
    for arm in ("split", "flipped"):
        records, conditions = group.of_arm(arm).values(), endpoint_conditions(section)
        with_map, without = (statistics.fmean(f(r, conditions) for r in records) for f in (points, knocked_out))
        assert f"from {with_map:.1f} to {without:.1f}" in page


def test_the_differences_of_study_b1_are_those_of_its_records():
    section = json.loads((ROOT / "study.json").read_text())["B1"]
    (group,) = group_records(section, "B1", read_records(ROOT / "results" / "study" / "B1", "B1"))
    found = {(c.arm, c.baseline, pairs): c.t for pairs, of_pairs in symbolic_contrasts(group).items() for c in of_pairs}

    def cell(a: str, b: str, pairs: int) -> str:
        mean, low, high = (round(100 * math.expm1(found[a, b, pairs][key])) for key in ("mean", "low", "high"))
        return f"{f'{mean:+d}' if mean else 0} % [{low}, {high}]"

    rows = {
        "V1 against standard": ("v1", "standard"),
        "the control against standard": ("double_width_norm", "standard"),
        "V1 against the control": ("v1", "double_width_norm"),
    }
    for name, (a, b) in rows.items():
        assert f"| {name} | {cell(a, b, 8)} | {cell(a, b, 16)} |" in PAGES["docs/study.md"]
    for name in ("v1", "double_width_norm"):
        assert f"{-round(100 * math.expm1(found[name, 'standard', 8]['mean']))} % fewer" in " ".join(README.split())
    text = " ".join(PAGES["docs/study.md"].split())
    for a, b in (("v1", "standard"), ("v1", "double_width_norm"), ("double_width", "v1")):
        assert all(cell(a, b, pairs).removeprefix("-") in text for pairs in (8, 16)), (a, b)


def test_the_grid_of_the_pilot_is_that_of_its_records():
    section = study.read_section("A-pilot")
    records = study.read_records(ROOT / "results" / "study" / "A-pilot", "A-pilot", section)
    lines = study_conversion.format_pilot(section, records)
    assert "\n".join(lines[2:]) in PAGES["docs/study.md"]


def test_the_tables_of_smollm2_are_what_was_measured():
    measured, page = json.loads((RESULTS / "smollm2.json").read_text()), PAGES["docs/smollm2.md"]
    for name, found in measured["presets"].items():
        if "perplexity" in found and name != "standard":
            assert f"| `{name}` | {found['perplexity']:,.1f} |" in page
    assert f"| standard attention | {measured['presets']['standard']['perplexity']:.1f} |" in page
    for pairs, found in measured["needle"].items():
        cells = (found["tokens"], found["right"], found["listed"], found["questions"])
        assert f"| {pairs} | {' | '.join(f'{n:,}' for n in cells)} |" in page


def test_the_files_that_tests_ask_for_are_documented():
    code = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    names = set(re.findall(r"environ(?:\.get\(|\[)\"([A-Z0-9]+_(?:DATA|TOKENIZER|GGUF))\"", code))
    assert len(names) == 5 and all(f"`{name}`" in PAGES["docs/tests.md"] for name in names)


@pytest.mark.parametrize(("name", "page"), [("launches", "docs/speed.md"), ("memory", "docs/memory.md")])
def test_the_counted_tables_are_those_of_the_results(name, page):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    assert "\n".join(load(f"benchmarks/{name}.py").table(rows)) in PAGES[page]


def test_the_loading_table_is_what_was_measured():
    measured = json.loads((RESULTS / "full_size.json").read_text())
    for name, side in (("here", "ours"), ("transformers", "transformers")):
        bf16, fp32 = measured[f"{side} bfloat16"], measured[f"{side} float32"]
        cells = [f"{m['import_and_load_seconds']:.1f} s | {m['total_peak_gb']:.1f} GB" for m in (bf16, fp32)]
        assert f"| {name} | {' | '.join(cells)} |" in PAGES["docs/memory.md"]


def test_the_table_of_tests_names_every_test_file():
    named = set(re.findall(r"`tests/(test_\w+\.py)`", PAGES["docs/tests.md"]))
    assert named == {path.name for path in (ROOT / "tests").glob("test_*.py")}


def test_ci_runs_the_command_of_the_readme():
    command = "pip install -r requirements-dev.txt && pytest"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(("model", "page"), [("paligemma-nano", "docs/evaluation.md"), ("phi-nano", "docs/phi3.md")])
def test_the_accuracies_of_the_included_models_are_those_of_their_runs(model, page):
    measured = json.loads((RESULTS / "quick_start.json").read_text())[model]["runs"]
    rows = re.findall(r"^\| (\d) x \d, ([\w ,]+) \| [\d.]+ \| (.*) \|$", PAGES[page], re.M)
    assert len(rows) == 8
    for side, images, cells in rows:
        name = f"{side}x{side} {images}"
        expected = [format_rate(rate(*run["after"][name])) for run in measured.values()]
        if model == "paligemma-nano":
            expected.insert(0, format_rate(rate(*measured["original_seed0"]["before"][name])))
        assert cells.split(" | ") == expected
