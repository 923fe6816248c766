"""Files: typed reading, ranges of flags, confinement, atomic writes, locks, images, and files that are not regular."""

import dataclasses
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import filelock._unix
import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from refusals import child, refused

import checkpoint
import files
from checkpoint import SINGLE
from errors import UserError
from files import open_image

LINEAR = "linear.weight"

# ---- json and atomic writes


def test_json(tmp_path):
    path = tmp_path / "run.json"
    files.write_json(path, {"b": 1, "a": {"é": [1.5, None]}})
    assert files.read_json(path) == {"b": 1, "a": {"é": [1.5, None]}}
    text = path.read_text()
    assert text.startswith('{\n  "b": 1,') and text.endswith("}\n")
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert path.read_text() == text
    for content, reason in ((b"{", "not valid JSON"), (b"\xff\xfe\x00", "not valid JSON"), (b"[1]", "got array")):
        path.write_bytes(content)
        with refused(path, reason):
            files.read_json(path)
    with refused(tmp_path / "none.json", "No such file"):
        files.read_json(tmp_path / "none.json")
    with refused(tmp_path, "Is a directory"):
        files.read_json(tmp_path)


def test_interrupted_json_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    files.write_json(path, {"old": 1})

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"new": 1})
    assert files.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["run.json"]


def test_whole_or_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with files.atomic_folder(folder) as inside:
        assert inside.parent == folder.parent and not folder.exists()
        checkpoint.save_weights({LINEAR: torch.zeros(2, 2)}, inside / "adapter")
    assert (folder / "adapter" / SINGLE).stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
    with files.atomic_folder(folder) as inside:
        (inside / "new").touch()
        assert (folder / "adapter").exists()
    assert os.listdir(folder) == ["new"] and os.listdir(folder.parent) == ["b"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, FileNotFoundError])
def test_a_crash_leaves_the_old_folder(tmp_path, fault):
    with files.atomic_folder(tmp_path / "final") as inside:
        (inside / "old").touch()
    with pytest.raises(fault), files.atomic_folder(tmp_path / "final") as inside:
        (inside / "new").touch()
        raise fault
    assert os.listdir(tmp_path) == ["final"] and os.listdir(tmp_path / "final") == ["old"]


def test_a_crash_between_the_renames(tmp_path, monkeypatch):
    with files.atomic_folder(tmp_path / "final") as inside:
        (inside / "old").touch()
    rename = Path.rename

    def failing(path, target):
        if path.name.endswith(".tmp"):
            raise RuntimeError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "final"):
        pass
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["final"] and os.listdir(tmp_path / "final") == ["old"]

    (tmp_path / "final").rename(tmp_path / ".final.old")  # what a kill there leaves behind
    (tmp_path / ".final.tmp").mkdir()
    with pytest.raises(RuntimeError), files.atomic_folder(tmp_path / "final"):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["final"] and os.listdir(tmp_path / "final") == ["old"]


FULL_DISK = """
import resource, sys, torch, checkpoint, files
from errors import UserError
root = sys.argv[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def weights(folder): checkpoint.save_weights({"w": torch.zeros(100_000)}, folder)
def whole():
    with files.atomic_folder(root + "/final") as inside:
        weights(inside)
def plain():
    with files.atomic_folder(root + "/final") as inside:
        (inside / "log").write_bytes(bytes(200_000))
for write in (lambda: files.write_json(root + "/run.json", ["x" * 200_000]), whole, plain,
              lambda: weights(root + "/bare")):
    try:
        write()
    except UserError as error:
        print(error)
"""


def test_disk_full(tmp_path):
    files.write_json(tmp_path / "run.json", {"old": 1})
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").touch()
    result = child(FULL_DISK, tmp_path)
    assert result.returncode == 0, result.stderr
    named = [tmp_path / "run.json", tmp_path / "final", tmp_path / "final", tmp_path / "bare"]
    for line, path in zip(result.stdout.splitlines(), named, strict=True):
        assert line.startswith(f"{path}: cannot be written (File too large): free some space")
    assert files.read_json(tmp_path / "run.json") == {"old": 1}
    assert os.listdir(tmp_path / "final") == ["old"]
    assert sorted(os.listdir(tmp_path)) == ["bare", "final", "run.json"]
    assert os.listdir(tmp_path / "bare") == []


def test_a_file_appears_whole_or_not_at_all_and_a_folder_is_none(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["page.html"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for folder in (".", "..", "runs"):
        with refused(f"{folder}: is a folder: give the name of a file"):
            files.write_text(folder, "")
    assert sorted(os.listdir(tmp_path)) == ["page.html", "runs"]


def test_a_leftover_of_another_kind_is_replaced(tmp_path):
    """A folder at the temporary path of write_json, and a file at that of atomic_folder."""
    (tmp_path / ".run.json.tmp").mkdir()
    (tmp_path / ".final.tmp").touch()
    (tmp_path / ".final.old").symlink_to(tmp_path)
    files.write_json(tmp_path / "run.json", {})
    with files.atomic_folder(tmp_path / "final") as inside:
        (inside / "new").touch()
    assert sorted(os.listdir(tmp_path)) == ["final", "run.json"]


# ---- typed reading


class Record(msgspec.Struct):
    step: Annotated[int, msgspec.Meta(ge=0)]
    rate: float = 0.0
    names: list[str] = []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"step": "3"}', "Expected int, got str - at $.step"),
        (b'{"step": -1}', "Expected int >= 0 - at $.step"),
        (b'{"step": 1.5}', "Expected int, got float - at $.step"),
        (b'{"step": true}', "Expected int, got bool - at $.step"),
        (b'{"names": []}', "missing required field step"),
        (b'{"step": 1, "names": ["a", 1]}', "Expected str, got int - at $.names[1]"),
        (b'{"step": 1, "rate": 1e999}', "Number out of range - at $.rate"),
        (b'{"step": 1, "rate": NaN}', "not valid JSON"),
        (b'{"step": 1, "names": ["\\ud800"]}', "not valid JSON"),
        (b'{"step": 1, "more": ' + b"[" * 100_000, "not valid JSON"),
        (b'{"step": 1, "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON"),
        (b'\xff\xfe{"step": 1}', "not valid JSON"),
        (b"[1]", "Expected object, got array"),
        (b"null", "Expected object, got null"),
        (b"", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_types_and_ranges_of_json(tmp_path, content, reason):
    file = tmp_path / "state.json"
    file.write_bytes(content)
    with refused(f"{file}: ", reason, ": restore the file"):
        files.read_typed(file, Record)
    with refused("row 7: ", reason):
        files.decode_typed(content, Record, "row 7")


def test_typed_values_are_returned(tmp_path):
    (tmp_path / "state.json").write_text('{"step": 3, "rate": 1, "unknown": null}')
    assert files.read_typed(tmp_path / "state.json", Record) == Record(3, 1.0)


def test_the_sentence_of_a_wrong_type(tmp_path):
    (tmp_path / "state.json").write_text('{"step": "3"}')
    with pytest.raises(UserError) as caught:
        files.read_typed(tmp_path / "state.json", Record)
    assert str(caught.value) == f"{tmp_path}/state.json: Expected int, got str - at $.step: restore the file"


def test_lines_of_json(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"loss": NaN}\n{"step": 1}\n')
    assert [list(line) for line in files.read_json_lines(log)] == [["loss"], ["step"]]
    for line in ("null", "3", "[1]", "{", "[" * 100_000):
        log.write_text('{"step": 1}\n' + line + "\n")
        with refused(f"{log}, line 2: "):
            files.read_json_lines(log)


# ---- ranges of flags


@dataclasses.dataclass
class Inner:
    rank: Annotated[int, msgspec.Meta(ge=1)] | None = None


@dataclasses.dataclass
class Flags:
    max_steps: Annotated[int, msgspec.Meta(ge=1)] = 1
    lr: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    momentum: float = 0.9
    seed: int = 0
    grids: tuple[Annotated[int, msgspec.Meta(ge=2)], ...] = (2, 4)
    name: str = "x"
    inner: Inner | None = None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": -1}, "--max_steps=-1: expected int >= 1"),
        ({"lr": float("nan")}, "--lr=nan: expected a finite number"),
        ({"lr": float("inf")}, "--lr=inf: expected a finite number"),
        ({"lr": 0}, "--lr=0: expected float > 0.0"),
        ({"momentum": float("-inf")}, "--momentum=-inf: expected a finite number"),
        ({"seed": 10**20}, f"--seed={10**20}: expected an integer of at most 64 bits"),
        ({"max_steps": 10**20}, f"--max_steps={10**20}: expected an integer of at most 64 bits"),
        ({"grids": (2, 1)}, "--grids=(2, 1): expected int >= 2 - at $[1]"),
        ({"inner": Inner(0)}, "--inner.rank=0: expected int >= 1"),
    ],
)
def test_ranges_of_flags(changes, message):
    files.check_ranges(Flags(inner=Inner(3)))
    files.check_ranges(Flags(lr=1, seed=-(2**63)))
    with pytest.raises(UserError) as caught:
        files.check_ranges(Flags(**changes))
    assert str(caught.value) == message


# ---- confinement


def test_a_path_stays_inside_its_folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("sub/a.png")
    (folder / "out").symlink_to(tmp_path)
    for name in ("sub/a.png", "./sub/a.png", "sub/../sub/a.png", "link", str(folder / "sub/a.png")):
        assert files.resolve_inside(folder, name) == (folder / "sub/a.png").resolve()
    for name in ("../b.png", "sub/../../b.png", "/etc/passwd", "out/b.png", "x" * 300 + "/../../../b.png"):
        with refused(name[:40]):
            files.resolve_inside(folder, name)
    for name in ("loop", "a\0b", "\ud800"):
        with refused("not a valid path"):
            files.resolve_inside(folder, name)
    (tmp_path / "alias").symlink_to(folder)
    assert files.resolve_inside(tmp_path / "alias", "sub") == (folder / "sub").resolve()


# ---- files that are not regular

OPEN = """
import sys, pathlib, checkpoint, files
from errors import UserError
path = pathlib.Path(sys.argv[1])
def weights():
    with checkpoint.open_safetensors(path):
        pass
for read in (lambda: files.read_json(path), lambda: files.read_typed(path, dict), lambda: files.open_image(path),
             lambda: files.read_json_lines(path), weights):
    try:
        read()
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "long", "folder", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_without_a_hang(tmp_path, kind):
    path = tmp_path / "x"
    if kind.endswith("fifo"):
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to("fifo")
    elif kind == "loop":
        path.symlink_to("x")
    elif kind == "folder":
        path.mkdir()
    path = {"fifo": tmp_path / "fifo", "device": Path("/dev/zero"), "long": tmp_path / ("x" * 300)}.get(kind, path)
    result = child(OPEN, path, timeout=60)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 5, result.stderr
    assert all(str(path) in line for line in lines), lines


# ---- manifests


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/adapter_model.safetensors", "trainer.pt"])
def test_weights_that_a_manifest_leaves_out_are_refused(tmp_path, name):
    """A deleted entry would hide a flipped bit."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"weights")
    files.write_manifest(tmp_path)
    manifest = files.read_json(tmp_path / files.MANIFEST)
    del manifest[name]
    files.write_json(tmp_path / files.MANIFEST, manifest)
    with pytest.raises(UserError, match="is not in files.json"):
        files.verify_manifest(tmp_path, suffix=".safetensors")


def test_a_manifest_is_verified(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b").write_text("b")
    files.write_manifest(tmp_path)
    files.verify_manifest(tmp_path)
    (tmp_path / "sub/b").write_text("c")
    with refused(tmp_path / "sub/b", "damaged"):
        files.verify_manifest(tmp_path)
    (tmp_path / "sub/b").unlink()
    with refused(tmp_path / "sub/b", "No such file"):
        files.verify_manifest(tmp_path)
    for content, reason in (('{"a": 1}', "got int"), ("[]", "got array"), ('{"../x": ""}', "outside")):
        (tmp_path / "files.json").write_text(content)
        with refused(reason):
            files.verify_manifest(tmp_path)


# ---- locks

HOLD = """
import sys, time, pathlib, files
lock = files.lock_folder(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_lock_ends_with_its_process(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parent)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, env=environment)
    try:
        assert holder.stdout.readline() == b"locked\n"
        start = time.monotonic()
        with refused(tmp_path, "another process writes into it"):
            files.lock_folder(tmp_path)
        assert time.monotonic() - start < 2
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        held = files.lock_folder(tmp_path)
        assert files.lock_folder(tmp_path) is held  # by the same process
    finally:
        holder.kill()
        holder.stdout.close()


def test_a_lock_does_not_truncate_through_a_link(tmp_path):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("all of it")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(thesis)
    with refused(tmp_path / "run/.lock"):
        files.lock_folder(tmp_path / "run")
    assert thesis.read_text() == "all of it"


def test_a_file_system_without_locks_is_tolerated(tmp_path, monkeypatch):
    def missing(_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(filelock._unix, "lock_fd_nonblocking", missing)
    files.lock_folder(tmp_path)
    files.lock_folder(tmp_path)


# ---- images


def noise(mode="RGB", width=37, height=23, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)


def fault(*args, **kwargs) -> str:
    """The one line of the UserError that open_image raises."""
    with pytest.raises(UserError) as caught:
        open_image(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jpeg():
    buffer = io.BytesIO()
    noise(width=200, height=200).save(buffer, "JPEG")
    return buffer.getvalue()


def test_open_image_loads_paths_and_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    image = open_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").unlink()  # nothing is read later
    assert image.mode == "RGB" and image.size == (200, 200)
    assert image.tobytes() == open_image(jpeg()).tobytes()


@pytest.mark.parametrize("content", [b"", b"no image", jpeg()[:2000], noise().tobytes()])
def test_broken_images_are_named(tmp_path, content):
    path = tmp_path / "cow.jpg"
    path.write_bytes(content)
    assert fault(str(path)).startswith(f"{path}: broken image (")
    assert fault(content, name="pool.parquet row 7").startswith("pool.parquet row 7: broken image (")


def test_truncated_png_is_named():
    buffer = io.BytesIO()
    noise(width=200, height=200).save(buffer, "PNG")
    assert "broken image" in fault(buffer.getvalue()[:5000])


def test_missing_image_and_folder_are_named(tmp_path):
    assert "cow.jpg: cannot be read (No such file" in fault(tmp_path / "cow.jpg")
    assert fault(tmp_path).startswith(f"{tmp_path}: cannot be read")


def test_huge_image_is_named(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "too large" in fault(jpeg(), name="bomb.jpg")
