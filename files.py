"""Files: typed JSON, atomic writes of files and folders, manifests, locks, image files.

Does not import torch. File system errors become a one-line UserError.
"""

import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import filelock
import msgspec
import numpy as np
from PIL import Image
from safetensors import SafetensorError

from errors import UserError

MANIFEST = "files.json"  # in a checkpoint: the SHA-256 of each of its files
LOCK = ".lock"
MESSAGE_LENGTH = 300  # maximum number of characters quoted from another library's message
WEIGHT_SUFFIXES = (".safetensors", ".pt")
HASHED_IMAGES = 20_000  # up to this many images of a data set are compared by content
GREY16_TO_GREY8 = 65_535 / 255
INT64 = range(-(1 << 63), 1 << 63)
FIXES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space or raise the limit")
FIXES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check the permissions")

T = TypeVar("T")
PathLike = str | os.PathLike[str]


# ---- file system errors
@contextmanager
def reading(file: PathLike) -> Iterator[None]:
    """Turns a file system or safetensors error inside the block into a UserError that names `file`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{file}: cannot be read ({reason}): check the path and its permissions") from error
    except SafetensorError as error:
        raise UserError(
            f"{file}: truncated or corrupt safetensors ({error!s:.200}): download or copy it again"
        ) from error


@contextmanager
def writing(path: PathLike) -> Iterator[None]:
    """Turns a full disk or a missing permission inside the block into a UserError that names `path`; other errors
    pass through."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        os_error = re.search(r"os error (\d+)", str(error))  # safetensors gives the error number only in its text
        number = int(os_error[1]) if os_error else getattr(error, "errno", None)
        if number not in FIXES:
            raise
        raise UserError(f"{path}: cannot be written ({os.strerror(number)}): {FIXES[number]}") from error


def one_line(error: Exception) -> str:
    """The message of an exception on one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def sync(path: PathLike) -> None:
    """Flush a file or the entries of a folder to disk; on Windows, where folders cannot be opened, only a file."""
    is_windows = sys.platform == "win32"
    if is_windows and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)  # Windows flushes only writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading
def check_regular(path: PathLike) -> None:
    """Raise UserError unless `path` is a regular file or a link to one: a pipe or a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a null byte or a lone surrogate in the name
        raise UserError(f"{str(path)!a}: not a valid path ({error}): correct it") from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file but a pipe, socket or device: give a file")


def read_bytes(path: PathLike) -> bytes:
    """The content of a regular file. Raises UserError if it is missing, unreadable or not a regular file."""
    with reading(path):
        check_regular(path)
        return Path(path).read_bytes()


def read_typed(path: PathLike, type_: type[T], fix: str = "restore the file") -> T:
    """The content of a JSON file as `type_`: a msgspec Struct, a dataclass, `dict[str, int]`, ...

    Raises UserError naming the file and, for a value of the wrong type or out of range, the field.
    """
    return decode_typed(read_bytes(path), type_, path, fix)


def decode_typed(raw: bytes, type_: type[T], name: PathLike, fix: str = "restore the file") -> T:
    """JSON as `type_`; errors as in `read_typed`, with `name` in place of the file."""
    try:
        return msgspec.json.decode(raw, type=type_)
    except msgspec.ValidationError as error:
        raise UserError(f"{name}: {describe(error)}: {fix}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({describe(error)}): {fix}") from error


def describe(error: Exception) -> str:
    """The message of a msgspec error on one line, without backticks."""
    return one_line(error).replace("`", "")[:MESSAGE_LENGTH]


def read_json(path: PathLike) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError naming the file if it is missing, unreadable or no JSON object."""
    return read_typed(path, dict[str, Any])


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. Raises UserError naming the file and the line."""
    lines = read_bytes(path).splitlines()
    return [decode_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def decode_line(line: bytes, name: str) -> dict[str, Any]:
    # not msgspec: a log may hold NaN, which Python reads and writes but JSON does not allow
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({one_line(error)}): restore the file") from error
    if not isinstance(data, dict):
        raise UserError(f"{name}: Expected object, got {type(data).__name__}: restore the file")
    return data


def open_image(source: PathLike | bytes, name: PathLike | None = None) -> Image.Image:
    """An image file, or the bytes of one, as a fully loaded PIL image (the first frame of several).

    Raises UserError that names the file, or `name`, if it is missing, unreadable, not a regular file, broken,
    truncated, or larger than PIL's limit against decompression bombs.
    """
    name = name or ("image bytes" if isinstance(source, bytes) else source)
    try:
        data = source if isinstance(source, bytes) else read_bytes(source)
    except UserError as error:
        raise UserError(str(error).replace(str(source), str(name), 1)) from error
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{name}: image too large ({one_line(error)}): scale it down") from error
    except Exception as error:  # PIL's decoders raise any exception for a broken file
        # PIL's own message holds the address of the buffer, which differs each time
        reason = "unknown format" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise UserError(f"{name}: broken image ({reason}): replace or remove it") from error
    return image


def grey16_to_grey8(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey, mode I;16 or mode I above 255, scaled to 8 bits, which PIL's `convert` would clip to
    white; any other image as it is."""
    if not image.mode.startswith("I"):
        return image
    grey = np.asarray(image).astype(np.float32)
    scale = GREY16_TO_GREY8 if image.mode != "I" or grey.max() > 255 else 1
    return Image.fromarray((grey / scale).round().clip(0, 255).astype(np.uint8))


def resolve_inside(folder: PathLike, name: PathLike) -> Path:
    """The path of the file `name` in `folder`, links followed. Raises UserError if it is outside the folder.

    The file may be missing. A link loop and a name that no file can have are refused as well.
    """
    try:
        root = Path(folder).resolve()
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(name)!a:.200} in {folder}: not a valid path ({one_line(error):.200})") from error
    if not path.is_relative_to(root):
        raise UserError(f"{name}: is outside the folder {folder}: only files inside it are read")
    return path


# ---- ranges of a configuration
def check_ranges(config: Any, prefix: str = "--") -> None:
    """Check every field of a dataclass and nested ones against its type, such as `Annotated[int, msgspec.Meta(ge=1)]`.

    Floats must be finite and ints fit 64 bits. Raises UserError, such as `--max_steps=-1: expected int >= 1`.
    """
    types = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{flag}.")
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{flag}={number}: expected a finite number")
            if isinstance(number, int) and number not in INT64:
                raise UserError(f"{flag}={number}: expected an integer of at most 64 bits")
        try:
            msgspec.convert(value, types[field.name])
        except msgspec.ValidationError as error:
            choices = literals(types[field.name])
            expected = f"choose from {', '.join(map(str, choices))}" if choices else describe(error)
            raise UserError(f"{flag}={value}: {expected[:1].lower()}{expected[1:]}") from error


def check_no_other_flags(config: Any, flag: str, allowed: Sequence[str] = ()) -> None:
    """Raise UserError for a field of a dataclass that is not at its default, since it has no effect beside `flag`."""
    for field in dataclasses.fields(config):
        if field.name not in (flag, *allowed) and getattr(config, field.name) != field.default:
            raise UserError(f"--{field.name}: does not apply to --{flag}: leave it out")


def literals(hint: Any) -> list:
    """The values that the Literals in a type hint allow."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [value for part in get_args(hint) for value in literals(part)]


# ---- writing
@contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yields the path of a temporary file beside `path`. It is synced and replaces `path` when the block ends, and is
    deleted when the block fails.

    Raises UserError when `path` is a folder, the disk is full or a permission is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder: give the name of a file")
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            remove(temporary)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise


def write_text(path: PathLike, text: str) -> None:
    """Write a text file in UTF-8 atomically; errors as in `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, data: Any) -> None:
    """Write `data` as JSON atomically; errors as in `atomic_file`."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: PathLike) -> Iterator[Path]:
    """Yields an empty folder beside `folder` that replaces it when the block ends, and is deleted when the block fails.

    An older `folder` stays untouched until then. Raises UserError when the disk is full or a permission is missing.
    """
    folder = Path(folder).resolve()  # a link keeps pointing at the same place
    temporary, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not folder.exists():
            old.rename(folder)  # an earlier process was killed between the two renames below
        remove(temporary)
        remove(old)
        temporary.mkdir()
        try:
            yield temporary
            sync_folder(temporary)
            if folder.exists():
                folder.rename(old)
            temporary.rename(folder)
        except BaseException as error:
            remove(temporary)
            if old.exists() and not folder.exists():
                old.rename(folder)
            if isinstance(error, UserError):  # the user knows the final name, not the temporary one
                raise UserError(str(error).replace(str(temporary), str(folder))) from error
            raise
        sync(folder.parent)
        remove(old)


def sync_folder(folder: Path) -> None:
    """Flush all files under `folder` to disk, made as readable as the folder itself (safetensors writes mode 0600)."""
    for parent, _, names in os.walk(folder):
        for file in (Path(parent, name) for name in names):
            file.chmod(folder.stat().st_mode & 0o666)
            sync(file)
        sync(parent)


# ---- manifests
def write_manifest(folder: PathLike) -> None:
    """Write the SHA-256 of every file under `folder` into its files.json, as the last file of the folder.

    Neither safetensors nor torch notices a flipped bit in weights.
    """
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.name != MANIFEST)
    write_json(Path(folder, MANIFEST), {file.relative_to(folder).as_posix(): sha256(file) for file in files})


def verify_manifest(folder: PathLike, suffix: str = "") -> None:
    """Raise UserError naming the first file in the manifest of `folder` that is missing or has changed, or the first
    weight file that is not in the manifest.

    `suffix`: compare only files whose names end in it.
    """
    manifest = read_typed(Path(folder, MANIFEST), dict[str, str], f"delete {folder}")
    for file in sorted(Path(folder).rglob("*")):
        name = file.relative_to(folder).as_posix()
        if name.endswith(WEIGHT_SUFFIXES) and name not in manifest:
            raise UserError(f"{file}: is not in {MANIFEST}, so it was added or the manifest changed: delete {folder}")
    for name, digest in manifest.items():
        resolve_inside(folder, name)
        if not name.endswith(suffix):
            continue
        file = Path(folder, name)
        with reading(file):
            check_regular(file)
            if sha256(file) != digest:
                raise UserError(f"{file}: damaged, not the content that was written: restore it, or delete {folder}")


def sha256(file: Path) -> str:
    """SHA-256 of a file's content in hexadecimal."""
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# ---- locks
def lock_folder(folder: Path) -> filelock.BaseFileLock:
    """Lock `folder` against other processes until the returned lock is released or this process ends.

    A file system without locks is tolerated. Raises UserError if another process holds the lock.
    """
    path = Path(folder).resolve() / LOCK
    # A soft lock, the default where the file system has no locks, would outlive a killed process. A singleton can be
    # acquired again by the process that holds it.
    lock = filelock.FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"{folder}: another process writes into it: wait for it to finish, or give another --output_dir"
        ) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES, errno.EISDIR, errno.EROFS):
            raise UserError(f"{path}: cannot be locked ({error.strerror}): delete it") from error
    return lock
