"""Read MMNeedle's released files, with type checks, and make questions of any protocol. Does not import torch.

The release holds stitched images, metadata that maps each cell to a COCO image, and annotations: rows with images, the
needle's place and its target. `mmneedle_build.py` writes haystacks of other images with the same files and keys.
"""

import gzip
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from errors import UserError
from files import decode_typed, describe, one_line, read_bytes, resolve_inside
from needle_eval.mmneedle_prompts import PROTOCOLS, Setting, check_protocol, make_candidates, make_prompts
from needle_eval.questions import Question, check_unique_ids

T = TypeVar("T")


# ---- questions
class NeedleRow(msgspec.Struct):
    """A question of the release. Numbers count from 0, -1 is an absent needle; for several needles they are lists."""

    image_ids: list[str]
    index: int | list[int]
    row: int | list[int]
    col: int | list[int]
    target: str | list[str]


def read_questions(
    folder: str | Path, setting: Setting, protocol: str, samples: int = 0, per_cell: int = 0, prefix: str = ""
) -> list[Question]:
    """The first `samples` positives and negatives of a setting (0: the paper's number), as questions of `protocol`.

    With `per_cell`, that many positives of every cell are taken instead. `prefix` is put before every prompt.
    `quadrant` asks positives only, each twice. A row without caption, image or place becomes a question with an error,
    which counts as wrong. Raises UserError for files that are missing or not the release's.
    """
    check_protocol(protocol, setting)
    folder = Path(folder)
    rows, captions = read_release(folder, setting.annotations, list[dict[str, Any]]), read_captions(folder)
    kinds = {"positive": [], "negative": []}
    for number, row in enumerate(rows, 1):
        if type(row.get("id")) is not int or "index" not in row:
            raise UserError(f"{folder}: {setting.annotations}, row {number} has no id or index: download it again")
        kinds["negative" if row["index"] == -1 or row["index"] == [-1] * setting.needles else "positive"].append(row)
    samples = samples or setting.default_samples
    chosen = {kind: rows[:samples] for kind, rows in kinds.items()}
    if per_cell:
        chosen["positive"] = first_per_cell(kinds["positive"], setting, per_cell)
    if protocol == "quadrant":
        chosen["negative"] = []
    questions = [
        question
        for kind, rows in chosen.items()
        for row in rows
        for question in ask(folder, setting, protocol, kind, row, captions, prefix)
    ]
    check_unique_ids(questions, f"{folder}: {setting.annotations}")
    return questions


def ask(
    folder: Path, setting: Setting, protocol: str, kind: str, row: dict[str, Any], captions: dict[str, str], prefix: str
) -> Iterator[Question]:
    """Yields the question of one row, or the two questions of `quadrant`."""
    fields = {
        "benchmark": "mmneedle",
        "protocol": protocol,
        "kind": kind,
        "shape": [setting.images, setting.grid, setting.needles],
        "row": row["id"],
        "target": row.get("target"),
    }
    images, ground_truth, prompts, fault = (), "", {"": ""}, ""
    try:
        typed = msgspec.convert(row, NeedleRow)
        ground_truth = ground_truth_of(typed, setting)
        fields["caption"] = captions_of(typed, captions, setting)
        if len(typed.image_ids) != setting.images:
            raise UserError(f"{len(typed.image_ids)} images where the setting has {setting.images}")
        for path in typed.image_ids:
            resolve_inside(folder, path)
        images = tuple(str(folder / path) for path in typed.image_ids)
        prompts = make_prompts(protocol, setting, fields["caption"])
    except (UserError, msgspec.ValidationError) as error:
        fault = f"{setting.annotations}, id {row['id']}: {describe(error)}: correct the row"
    for axis, prompt in prompts.items():
        yield Question(
            id=f"{setting}/{row['id']}/{axis}" if axis else f"{setting}/{row['id']}",
            setting=str(setting),
            images=images,
            prompt=prefix + prompt,
            ground_truth=ground_truth,
            max_new_tokens=PROTOCOLS[protocol] * setting.needles,
            fields=fields | ({"axis": axis} if axis else {}),
            candidates=make_candidates(setting) if protocol == "rank" else (),
            error=fault,
        )


def ground_truth_of(row: NeedleRow, setting: Setting) -> str:
    """The official string: "index, row, column" from 1, "; " between needles; "0, 0, 0" for an absent needle.

    Raises UserError for a wrong number of needles and for a place outside the setting.
    """
    columns = [numbers if isinstance(numbers, list) else [numbers] for numbers in (row.index, row.row, row.col)]
    if {len(numbers) for numbers in columns} != {setting.needles}:
        raise UserError(f"{', '.join(str(len(c)) for c in columns)} numbers for {setting.needles} needles")
    places = list(zip(*columns, strict=True))
    for place in places:
        if place != (-1, -1, -1) and place not in setting.cells():
            raise UserError(f"place {place} is outside {setting}")
    return "; ".join(", ".join(str(n + 1) for n in place) for place in places)


def captions_of(row: NeedleRow, captions: dict[str, str], setting: Setting) -> list[str]:
    """The captions of a row's targets. Raises UserError for a wrong number of targets or a missing caption."""
    targets = row.target if isinstance(row.target, list) else [row.target]
    if len(targets) != setting.needles:
        raise UserError(f"{len(targets)} targets where the setting has {setting.needles} needles")
    missing = [target for target in targets if Path(target).name not in captions]
    if missing:
        raise UserError(f"target {missing[0]} has no caption")
    return [captions[Path(target).name] for target in targets]


def first_per_cell(rows: list[dict], setting: Setting, count: int) -> list[dict]:
    """The first `count` one-needle positives of every cell, in file order."""
    if setting.needles > 1:
        raise UserError(f"--per_cell={count}: {setting} has {setting.needles} needles per question: use --needles=1")
    taken = dict.fromkeys(setting.cells(), 0)
    chosen = []
    for row in rows:
        cell = tuple(row.get(key) for key in ("index", "row", "col"))
        if all(isinstance(n, int) for n in cell) and taken.get(cell, count) < count:
            taken[cell] += 1
            chosen.append(row)
    if min(taken.values()) < count:
        raise UserError(
            f"{setting.annotations}: a cell has {min(taken.values())} positives, not {count}: lower --per_cell, or "
            "raise --samples for generated haystacks"
        )
    return chosen


# ---- files of the release
def find_release(folder: Path, name: str) -> Path | None:
    """The path of a JSON file, plain or gzipped, in metadata_stitched/, annotations_trainval/ or `folder`, or None."""
    places = (folder / "metadata_stitched", folder / "annotations_trainval", folder)
    return next((f for place in places for f in (place / name, place / f"{name}.gz") if f.is_file()), None)


def read_release(folder: Path, name: str, type_: type[T]) -> T:
    """The contents of a JSON file of the release. Raises UserError when it is missing or of another type."""
    file = find_release(folder, name)
    if file is None:
        raise UserError(f"{folder}: has no metadata_stitched/{name}: give MMNeedle's data folder, or other settings")
    data = read_bytes(file)
    try:
        data = gzip.decompress(data) if file.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read ({one_line(error)}): download it again") from error
    return decode_typed(data, type_, file, "download it again")


def read_captions(folder: Path) -> dict[str, str]:
    """File name -> caption: file_to_caption.pkl of the release, or the same as JSON."""
    file = folder / "annotations_trainval" / "file_to_caption.pkl"
    if file.is_file():
        return unpickle_captions(file)
    for name in ("file_to_caption.json", "captions.json"):
        if find_release(folder, name) is not None:
            return read_release(folder, name, dict[str, str])
    raise UserError(f"{file}: not there: download MMNeedle's annotations_trainval")


class PlainUnpickler(pickle.Unpickler):
    """Refuses all classes: dicts and strings need none, and a pickle that names a class could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"names {module}.{name}")


def unpickle_captions(file: Path) -> dict[str, str]:
    """The captions in a pickle of strings. Raises UserError for a pickle with anything else in it."""
    try:
        with open(file, "rb") as stream:
            captions = PlainUnpickler(stream).load()
    except Exception as error:  # a damaged pickle may raise any exception
        raise UserError(f"{file}: refused ({error}): it must hold file names and captions alone") from error
    if not isinstance(captions, dict) or not all(isinstance(c, str) for pair in captions.items() for c in pair):
        raise UserError(f"{file}: holds no file names and captions: download it again")
    return captions
