"""Helpers of the file tests: one-line errors, a process without privileges, a child process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import files
from errors import UserError


@contextmanager
def refused(*parts: object) -> Iterator[None]:
    """The block must raise a one-line UserError that contains every part."""
    with pytest.raises(UserError) as caught:
        yield
    line = str(caught.value)
    assert "\n" not in line
    for part in parts:
        assert str(part) in line, f"{part!r} not in {line!r}"


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Run the block as a user who is not root, since root can read and write everything; `folder` stays accessible."""
    if os.geteuid():
        yield
        return
    chain = [path for path in (folder, *folder.parents) if not path.stat().st_mode & 0o005]
    modes = {path: path.stat().st_mode for path in chain}
    for path in chain:
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


def child(code: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run Python code, or a file that ends in .py, with the modules of the repository and of the tests."""
    paths = os.pathsep.join([str(Path(files.__file__).parent), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *([code] if code.endswith(".py") else ["-c", code]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
