"""Files: json, atomic writes, folders that appear whole or not at all, manifests with hashes, locks, image files.

No torch is imported here. What the disk refuses becomes a UserError of one line.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

from errors import UserError

MANIFEST = "files.json"  # in a checkpoint: what its files hashed to when they were written
_MENDS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space or raise the limit")
_MENDS |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check the permissions")
LOCK = ".lock"


@contextmanager
def reading(file):
    """Whatever disk or safetensors hold against `file` becomes one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{file}: cannot be read ({reason}): check the path and its permissions") from error
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or corrupt safetensors ({error}): download or copy it again") from error


@contextmanager
def writing(path):
    """A full disk or a missing permission becomes one line that names `path`; other faults pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors gives the system's number in its text only
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in _MENDS:
            raise
        raise UserError(f"{path}: cannot be written ({os.strerror(number)}): {_MENDS[number]}") from error


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path) -> dict:
    """The object in a json file. Raises UserError naming the file: missing, unreadable, not json, not an object."""
    with reading(path):
        raw = Path(path).read_bytes()
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path}: not valid json ({error}): restore or delete it") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a json {type(data).__name__} where an object {{...}} is needed")
    return data


def read_json_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a folder that a script here wrote") from error


def write_json(path, data):
    """Write `data` whole or not at all: beside, fsynced, renamed. Raises UserError when the disk refuses."""
    path, text = Path(path), json.dumps(data, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(folder):
    """Yields an empty folder beside `folder` that takes its place when the block ends well, and vanishes when not.

    An older `folder` stays untouched until then. Raises UserError when the disk is full or a permission lacks.
    """
    folder = Path(folder).resolve()  # a link keeps pointing at the same place
    temporary, aside = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists() and not folder.exists():
            aside.rename(folder)  # an earlier process was killed between the two renames below
        for leftover in (temporary, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _settle(temporary)
            if folder.exists():
                folder.rename(aside)
            temporary.rename(folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            if isinstance(error, UserError):  # nobody asked for the temporary name
                raise UserError(str(error).replace(str(temporary), str(folder))) from error
            raise
        sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)


def write_manifest(folder: Path):
    """Note the SHA-256 of every file under `folder` in its files.json: neither safetensors nor torch would see a
    flipped bit among weights. The last thing to be written into it."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.name != MANIFEST)
    write_json(Path(folder, MANIFEST), {str(file.relative_to(folder)): _sha256(file) for file in files})


def verify_manifest(folder: Path):
    """Raise UserError naming the first file under a sealed `folder` that is gone or is not as it was written."""
    for name, digest in read_json(Path(folder, MANIFEST)).items():
        file = Path(folder, name)
        with reading(file):
            if _sha256(file) != digest:
                raise UserError(f"{file}: damaged, not the bytes that were written: delete {folder}")


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _settle(folder: Path):
    """Everything under `folder` reaches the disk and is as readable as the folder (safetensors writes mode 0600)."""
    for parent, _, names in os.walk(folder):
        for file in (Path(parent, name) for name in names):
            file.chmod(folder.stat().st_mode & 0o666)
            sync(file)
        sync(parent)


def lock(folder: Path):
    """An open file that no other process can lock while this one lives. Raises UserError if one has."""
    file = open(folder / LOCK, "w")  # noqa: SIM115, closed when the process ends
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{folder}: another process is training into it: let it end, or give another --output_dir"
        ) from error
    except OSError:  # some network disks know no locks
        pass
    return file


def open_image(source, name=None):
    """A picture file, or a picture's bytes, to a fully loaded PIL picture (of several frames the first).

    Raises UserError that names the file, or `name`, if it is missing, unreadable, broken, cut short, or larger than
    PIL's limit against decompression bombs.
    """
    name = name or ("picture bytes" if isinstance(source, bytes) else source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot read the picture ({error.strerror})") from error
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: picture too large ({one_line(error)}); scale it down") from error
    except Exception as error:  # PIL's decoders raise whatever a broken file provokes
        reason = "of no known format" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise UserError(f"{name}: broken picture ({reason}); replace or remove it") from error
    return image


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__
