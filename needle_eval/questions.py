"""Benchmark questions: their type, reading question files, and exact match of answers. Does not import torch."""

import gzip
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
from PIL import Image

from errors import UserError
from files import decode_typed, describe, one_line, open_image, read_bytes, resolve_inside

T = TypeVar("T")
ROW_FIX = "correct or delete the line"


class OpenableImage(Protocol):
    """An image that is made when it is needed. It is hashable, and equal references are opened and encoded once. Its
    `str` is its name in answer rows and messages."""

    def open(self) -> Image.Image:
        """The image. Raises UserError if it is missing or broken."""


ImageReference = str | OpenableImage  # a string is the path of an image file


@dataclass(frozen=True)
class Question:
    """One question of a benchmark: images, prompt, and the right answer.

    `images` are in the order of the prompt. `setting` names the group of questions that is scored together.
    `ground_truth` is in the benchmark's own form and JSON-serialisable. If `candidates` are given, the most likely of
    them is the answer and no text is generated. `error` says why the question cannot be asked.

    Its answer row is a JSON object: {"id", "setting", "prompt", "response", "ground_truth", "images", "seconds",
    **fields}. `response` is None where an image or the row was broken ("error" says why): such an answer is wrong and
    stays in every denominator. All scores are computed from these rows alone.
    """

    id: str
    setting: str
    images: tuple[ImageReference, ...]
    prompt: str
    ground_truth: object
    max_new_tokens: int
    fields: dict = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    error: str = ""


# ---- images
def open_reference(image: ImageReference) -> Image.Image:
    """Open the image of a reference. Raises UserError if it is missing or broken."""
    return open_image(image) if isinstance(image, str) else image.open()


def check_some_image_exists(questions: list[Question], fix: str):
    """Raise UserError when none of the image files exists. If only some are missing, their answer rows report it."""
    paths = {image for question in questions for image in question.images if isinstance(image, str)}
    if paths and not any(map(os.path.isfile, paths)):  # isfile is also False for an invalid file name
        raise UserError(f"{min(paths)}: none of {len(paths):,} images exists: {fix}")


def check_inside(folder: Path, names: list[str], source: str):
    """Raise UserError, prefixed with `source`, if a file name leads outside `folder`, also through a symbolic link."""
    for name in names:
        try:
            resolve_inside(folder, name)
        except UserError as error:
            raise UserError(f"{source}: image {error}") from error


# ---- question files
def read_question_rows(path: Path, type_: type[T], limit: int, fix: str) -> list[tuple[str, T]]:
    """The first `limit` rows (0: all) of a JSON lines file, plain or .gz, as ("path:number", row of `type_`).

    Blank lines are skipped. Raises UserError, ending in `fix`, when the file cannot be read or holds no row, and with
    the line number for a row of another type.
    """
    data = read_bytes(path)
    try:
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).split(b"\n")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}): {fix}") from error
    numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{path}: holds no question: {fix}")
    return [(name, decode_typed(line, type_, name, ROW_FIX)) for name, line in numbered[: limit or None]]


def check_unique_ids(questions: list[Question], source: str | Path):
    """Raise UserError when two questions of the file `source` have the same id."""
    repeated = [name for name, times in Counter(question.id for question in questions).items() if times > 1]
    if repeated:
        raise UserError(f"{source}: the id {repeated[0]} is there more than once: ids must be unique, correct the file")


# ---- answers
class AnswerRow(msgspec.Struct, kw_only=True):
    """The fields of every answer row; a benchmark adds those that its scores need."""

    id: str
    setting: str
    response: str | None
    error: str = ""


def check_row(row: dict[str, Any], row_type: type[AnswerRow], name: str):
    """Raise UserError, prefixed with `name`, if an answer row lacks a field or a field has the wrong type."""
    try:
        msgspec.convert(row, row_type)
    except msgspec.ValidationError as error:
        raise UserError(f"{name}: no answer to this benchmark ({describe(error)}): delete the line") from error


def normalise(response: str) -> str:
    """MMNeedle's normalisation: delete newlines, strip whitespace and full stops."""
    return response.replace("\n", "").strip().strip(".").strip()


def is_exact(response: str, answer: str) -> bool:
    """MMNeedle's strict exact match for one needle, where a negative's answer is "-1"; used for other text as well."""
    return normalise(response) == normalise(answer)
