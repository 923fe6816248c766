"""The installed package: one folder of its own, the public names, the assets, the commands; other operating systems."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from refusals import child
from runs import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

USE = """
import sys
sys.path[:] = [sys.argv[1], *(p for p in sys.path if p not in sys.argv[2:])]
import multimodal_diff
from multimodal_diff import finetune_diff, generate, eval_mmnih, export, plots
local = {name.partition(".")[0] for name in sys.modules} & {"data", "models", "errors", "training", "needle_eval"}
assert not local, local
assert multimodal_diff.__file__.startswith(sys.argv[1]), multimodal_diff.__file__
for name in multimodal_diff.__all__:
    assert getattr(multimodal_diff, name).__class__, name
model_class, processor_class = multimodal_diff.classes_of("assets/paligemma-nano")
model = model_class.from_pretrained("assets/paligemma-nano", differential="split")
processor = processor_class.from_pretrained("assets/paligemma-nano")
from PIL import Image
batch = processor([Image.new("RGB", (64, 64))], ["detect banana"])
ids = model.generate(**batch, max_new_tokens=2)
assert ids.shape[0] == 1 and multimodal_diff.differential_config(model).preset == "split"
from multimodal_diff.haystack import read_pool
print(len(read_pool()))
"""

WITHOUT_POSIX = """
import importlib, sys
import transformers
transformers.AttentionInterface  # transformers asks for the platform, not for these modules
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None  # importing it fails, as on Windows
for name in sys.argv[1:]:
    importlib.import_module(name)
import machine, torch
sys.platform = "win32"
print(machine.peak_memory(torch.device("cpu")))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """What a wheel contains, made by the build step of setup.py."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    folder = tmp_path_factory.mktemp("package")
    build = ["setup.py", "-q", "build_py", f"--build-lib={folder}", "egg_info", f"--egg-base={folder}"]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_package_is_one_folder_that_works_anywhere(built, tmp_path, monkeypatch):
    assert {path.name for path in built.iterdir()} == {"multimodal_diff", "multimodal_diff.egg-info"}
    monkeypatch.chdir(tmp_path)
    done = child(USE, built, ROOT, ROOT / "tests")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500


def test_the_licences_of_the_images_are_in_the_package_and_no_compiled_code(built):
    licences = ROOT / "assets" / "haystack-pool" / "LICENSES"
    names = [str(file.relative_to(ROOT)) for file in licences.rglob("*") if file.is_file()]
    assert names and all((built / "multimodal_diff" / name).is_file() for name in names)
    assert not list((built / "multimodal_diff").rglob("*.pyc"))


def test_every_command_is_a_main_of_the_package(built):
    commands = (built / "multimodal_diff.egg-info" / "entry_points.txt").read_text()
    for name, target in PROJECT["scripts"].items():
        assert f"{name} = {target}" in commands
        module, _, function = target.partition(":")
        text = (built / Path(*module.split("."))).with_suffix(".py").read_text()
        assert re.search(rf"^def {function}\(", text, re.M)
    assert not entry_points(group="console_scripts", name="data")


def test_the_pins_are_inside_the_ranges_of_the_package():
    lines = (ROOT / "requirements.txt").read_text().split() + (ROOT / "requirements-dev.txt").read_text().split()
    pins = dict(line.split("==") for line in lines if "==" in line)
    ranges = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["metrics"]]
    for requirement in map(Requirement, ranges):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == {
        line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()
    }


def test_the_study_stays_in_the_checkout():
    code = """
import sys
sys.argv[1:] = ["-q", "--version"]
import setup
print(*(file.name for file in setup.SOURCES))
"""
    names = child(code).stdout.split()
    assert "training.py" in names and not [name for name in names if name.startswith("study") or name == "setup.py"]


def test_all_modules_import_without_the_modules_that_windows_lacks():
    names = sorted(file.stem for file in ROOT.glob("*.py") if file.stem != "setup")
    names += [f"needle_eval.{file.stem}" for file in ROOT.glob("needle_eval/*.py")]
    done = child(WITHOUT_POSIX, *names)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "unknown"


def test_an_editable_install_is_refused():
    code = """
import sys
sys.argv[1:] = ["-q", "--version"]
import setup
from setuptools.dist import Distribution
command = setup.BuildPackage(Distribution())
command.editable_mode = True
command.run()
"""
    done = child(code)
    assert done.returncode == 1 and "an editable install is not supported" in done.stderr


def test_an_import_that_the_build_does_not_know_is_refused(tmp_path):
    code = r"""
import sys
sys.argv[1:] = ["-q", "--version"]
import setup
assert setup.rewrite_imports("from data import x\nimport training\n    import dataclasses\n") == (
    "from multimodal_diff.data import x\nfrom multimodal_diff import training\n    import dataclasses\n"
)
assert "from multimodal_diff import PaliGemma" in setup.rewrite_imports(open("multimodal_diff.py").read())
setup.check_imports("from multimodal_diff.data import x\nimport dataclasses", "a.py")
setup.check_imports("import os, training", "a.py")
"""
    done = child(code)
    assert done.returncode == 1 and "a.py, line 1" in done.stderr
