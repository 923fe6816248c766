"""A question of a benchmark, reading question files, and when an answer is exact. No torch is imported here."""

import gzip
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from errors import UserError
from files import open_image


class OpenableImage(Protocol):
    """An image that is made when it is needed. Hashable: equal references are opened and encoded once. `str` of it
    names it in answer rows and messages."""

    def open(self) -> Image.Image:
        """The image. Raises UserError where it is missing or broken."""


ImageReference = str | OpenableImage  # a string is the path of an image file


@dataclass(frozen=True)
class Question:
    """One question of a benchmark: what is shown, what is asked, and what the answer should be.

    `images` in the order of the prompt. `setting` names the group that is scored together. `ground_truth` as the
    benchmark writes it, json-able. `candidates`: if given, the likeliest of them is the answer and none is generated.
    `error` says why the question cannot be asked.

    Its answer is one json object: {"id", "setting", "prompt", "response", "ground_truth", "images", "seconds",
    **fields}. `response` is None where an image or the row was broken ("error" says why): such an answer is wrong and
    stays in every denominator. All scores are computed from such rows alone.
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
    """The image that a reference names. Raises UserError where it is missing or broken."""
    return open_image(image) if isinstance(image, str) else image.open()


def check_some_image_exists(questions: list[Question], fix: str):
    """Raise UserError when none of the image files exists. Single missing files are reported with their answers."""
    paths = {image for question in questions for image in question.images if isinstance(image, str)}
    if paths and not any(Path(path).is_file() for path in paths):
        raise UserError(f"{min(paths)}: none of {len(paths):,} images exists: {fix}")


# ---- question files
def read_lines(path: Path, limit: int, fix: str) -> list[tuple[str, str]]:
    """The first `limit` lines (0: all) of a text file, plain or .gz, blank ones left out, as ("path:number", line).

    Raises UserError with `fix` at its end when the file cannot be read.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {fix}") from error
    lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return lines[: limit or None]


def check_unique_ids(questions: list[Question], source: str | Path):
    """Raise UserError when two questions of `source`, a file, have one id."""
    repeated = [name for name, times in Counter(question.id for question in questions).items() if times > 1]
    if repeated:
        raise UserError(f"{source}: the id {repeated[0]} is there more than once: ids must be unique, correct the file")


# ---- answers
def normalise(response: str) -> str:
    """MMNeedle's normalisation: newlines deleted, blanks and full stops stripped."""
    return response.replace("\n", "").strip().strip(".").strip()


def is_exact(response: str, answer: str) -> bool:
    """MMNeedle's strict exact match for one needle; a negative's answer is "-1". Other answers go by the same rule."""
    return normalise(response) == normalise(answer)
