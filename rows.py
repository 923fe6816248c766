"""Rows of prompts, answers and images, read from files: jsonl with {image, prefix, suffix} or {messages, images},
VQAv2's official json files beside a COCO folder, and parquet datasets.

A bad row is left out and named, or refused with `strict`. Images are opened when a row is used.
"""

import codecs
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
from PIL import Image

from config_fields import QUESTION_TASK
from errors import UserError
from files import HASHED_IMAGES, decode_typed, one_line, open_image, read_bytes, read_typed

IMAGE_PLACE = "<image>"  # marks an image in the text of a conversation
T = TypeVar("T")


@dataclass
class Example:
    """A name for error messages, the images, the prompt, the answer to learn, and the index in the source."""

    id: str
    images: list[Image.Image] = field(repr=False)
    prefix: str
    suffix: str
    index: int = -1


# ---- rows of a file
class VqaAnswer(msgspec.Struct):
    """The answer of one annotator, as VQAv2's files write it."""

    answer: str


class JsonRow(msgspec.Struct):
    """A line of a jsonl file: `image` is a path, a list of paths for several images in one prompt, or null for text
    only, for a decoder without a tower. `answers`: all accepted answers, for --metric. Optional fields may be null."""

    image: str | list[str] | None
    prefix: str
    suffix: str
    answers: list[str | VqaAnswer] | None = None


class ChatPart(msgspec.Struct):
    """A part of a message; an image without a path is the next one of the row's `images`."""

    type: Literal["text", "image"]
    text: str | None = None
    image: str | None = None


class ChatMessage(msgspec.Struct):
    role: Literal["system", "user", "assistant"]
    content: str | list[ChatPart]  # in a string, <image> marks an image


class ChatRow(msgspec.Struct):
    """A conversation in a line of a jsonl file; its last message is the answer to learn."""

    messages: list[ChatMessage]
    images: list[str] | None = None
    answers: list[str | VqaAnswer] | None = None


class Row(msgspec.Struct, frozen=True):
    """A checked row; `id` names it in error messages, image paths are relative to the folder of its source."""

    id: str
    images: tuple[str, ...]
    prefix: str
    suffix: str
    answers: tuple[str, ...] = ()  # all accepted ones, for --metric; empty: only the suffix


@dataclass
class Rows:
    """Rows of a file. `skipped` names the rows that were left out, with the reason."""

    name: str
    rows: list[Row]
    folder: Path
    skipped: list[str] = field(default_factory=list, repr=False)
    counts_for_best: bool = True
    chance: float | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 of the rows, not of the images: a broken image may be repaired during a run."""
        return sha256_of([[row.images, row.prefix, row.suffix] for row in self.rows])

    def id(self, index: int) -> str:
        return self.rows[index].id

    def image_keys(self) -> list[list[str]]:
        """For every row, the keys of its images; images with equal keys are the same, by path or by content."""
        keys = same_images({name for row in self.rows for name in row.images}, self.folder)
        return [[keys[name] for name in row.images] for row in self.rows]

    def get(self, epoch: int, index: int) -> Example:
        row = self.rows[index]
        images = [self.image(index, place) for place in range(len(row.images))]
        return Example(row.id, images, row.prefix, row.suffix)

    def image(self, index: int, place: int) -> Image.Image:
        """One image of a row."""
        row = self.rows[index]
        return open_image(self.folder / row.images[place], name=f"{row.id}: {row.images[place]}")

    def image_name(self, index: int, place: int) -> str:
        """The path of an image: images of one name are the same."""
        return str(self.folder / self.rows[index].images[place])

    def text(self, index: int) -> tuple[str, str, int]:
        """Prefix, suffix and number of images."""
        row = self.rows[index]
        return row.prefix, row.suffix, len(row.images)

    def answers(self, index: int) -> tuple[str, ...]:
        """All accepted answers; the fingerprint leaves them out, since nothing is trained on them."""
        return self.rows[index].answers or (self.rows[index].suffix,)


def sha256_of(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def same_images(names: set[str], folder: Path) -> dict[str, str]:
    """Image name -> key; the keys of one file under several names, and of files of equal content, are equal.

    Contents are compared only among files of equal size, and only for up to HASHED_IMAGES files.
    """
    keys = {name: os.path.realpath(folder / name) for name in names}
    paths = set(keys.values())
    if len(paths) > HASHED_IMAGES:
        return keys
    by_size = defaultdict(list)
    for path in paths:
        try:
            by_size[os.stat(path).st_size].append(path)
        except OSError:  # missing: reported when the row is read
            continue
    digests = {}
    for path in (path for group in by_size.values() if len(group) > 1 for path in group):
        try:
            digests[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError:
            continue
    return {name: digests.get(path, path) for name, path in keys.items()}


def read_jsonl(path: str | Path, strict: bool = True) -> Rows:
    """Rows of a jsonl file, image paths relative to its folder. A bad row is left out and named in `skipped`.

    Raises UserError for a file that cannot be read or is mostly bad rows, and with `strict` for the first bad row.
    """
    path = Path(path)
    lines = read_bytes(path).removeprefix(codecs.BOM_UTF8).splitlines()
    files = FileIndex(path.parent)
    numbered = ((f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip())
    rows, skipped = filter_rows(lambda item: check_json_row(*item, files), numbered, strict)
    if not rows:
        raise UserError(f"{path}: has no rows: write one JSON object with image, prefix and suffix per line")
    return Rows(path.name, rows, path.parent, skipped)


def filter_rows(check: Callable[[T], Row], items: Iterable[T], strict: bool) -> tuple[list[Row], list[str]]:
    """(the rows that `check` returns, the messages of the UserErrors that it raises).

    Raises the first error with `strict`, and UserError if bad rows outnumber good ones: then the file as a whole is
    wrong.
    """
    rows, faults = [], []
    for item in items:
        try:
            rows.append(check(item))
        except UserError as error:
            if strict:
                raise
            faults.append(str(error))
    if len(faults) > len(rows):
        raise UserError(f"{len(faults)} of {len(faults) + len(rows)} rows are bad, the first: {faults[0]}")
    return rows, faults


def check_json_row(name: str, line: bytes, files: "FileIndex") -> Row:
    """Parse a line. Raises UserError, starting with `name`, unless it is a valid row whose images exist."""
    if is_chat(line):
        row = read_chat(name, decode_typed(line, ChatRow, name, "a row is {messages, images}"))
    else:
        row = decode_typed(line, JsonRow, name, "a row is {image, prefix, suffix}")
    images = row.image if isinstance(row.image, list) else [] if row.image is None else [row.image]
    if row.image == [] or not all(images):
        raise UserError(f"{name}: image must be a path or a list of paths")
    if not row.suffix.strip():
        raise UserError(f"{name}: suffix is empty, but it is what the model learns to answer")
    for image in images:
        files.check(image, name)
    answers = tuple(entry if isinstance(entry, str) else entry.answer for entry in row.answers or ())
    return Row(name, tuple(images), row.prefix, row.suffix, answers)


def is_chat(line: bytes) -> bool:
    """Whether a line has the key of a conversation; False if it is not JSON."""
    try:
        return b'"messages"' in line and "messages" in msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False


def read_chat(name: str, chat: ChatRow) -> JsonRow:
    """A conversation as one prompt and its answer: the messages before the last, one per line, and the last message.

    All images come before the prompt, in their order. Raises UserError, starting with `name`, if the last message is
    not the assistant's after one from a user, or if the numbers of images and of their places differ.
    """
    roles = [message.role for message in chat.messages]
    if roles[-1:] != ["assistant"] or "user" not in roles[:-1]:
        raise UserError(f"{name}: messages must end with one of the assistant, after one of the user")
    texts, places, paths = [], 0, []
    for message in chat.messages:
        parts = message.content
        if isinstance(parts, str):
            places += parts.count(IMAGE_PLACE)
            texts.append(parts.replace(IMAGE_PLACE, "").strip())
        else:
            images = [part for part in parts if part.type == "image"]
            places += len(images)
            paths += [part.image for part in images if part.image is not None]
            texts.append("\n".join((part.text or "").strip() for part in parts if part.type == "text"))
    if paths and chat.images:
        raise UserError(f"{name}: images are given twice: as `images`, or in the messages")
    images = paths or chat.images or []
    if places and places != len(images):
        raise UserError(f"{name}: messages have places for {places} images, but there are {len(images)}")
    prefix = "\n".join(text for text in texts[:-1] if text)
    return JsonRow(images or None, prefix, texts[-1], chat.answers)


class FileIndex:
    """The files in a folder and below it; every directory is listed once."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder.resolve()
        self.names_in = cache(self._names_in)

    def _names_in(self, directory: str) -> set[str]:
        """Names of the regular files, not links, in a directory; empty if it is missing or outside the folder."""
        try:
            path = (self.root / directory).resolve()
            if not path.is_relative_to(self.root):
                return set()
            return {entry.name for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)}
        except (OSError, RuntimeError, ValueError):  # RuntimeError: a link loop
            return set()

    def check(self, image: str, name: str) -> None:
        """Raise UserError, starting with `name`, unless the path is a file inside the folder."""
        directory, file = os.path.split(image)
        if file in self.names_in(directory):
            return
        try:
            path = (self.root / image).resolve()
            is_inside, exists = path.is_relative_to(self.root), path.is_file()
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{name}: image {image!a:.200} is not a valid path ({one_line(error):.200})") from error
        if not is_inside:
            raise UserError(f"{name}: image {image:.200} is outside {self.folder}: keep images inside it")
        if not exists:
            raise UserError(f"{name}: image {self.folder / image} does not exist: correct the path or delete the row")


# ---- VQAv2
class VqaQuestion(msgspec.Struct):
    question_id: int
    image_id: int
    question: str


class VqaAnnotation(msgspec.Struct):
    question_id: int
    multiple_choice_answer: str
    answers: list[VqaAnswer] = []


class VqaQuestions(msgspec.Struct):
    questions: list[msgspec.Raw]


class VqaAnnotations(msgspec.Struct):
    annotations: list[VqaAnnotation]


def read_vqav2(folder: str | Path, split: str, strict: bool = True) -> Rows:
    """Official VQAv2 files in a folder: v2_OpenEnded_mscoco_{split}2014_questions.json,
    v2_mscoco_{split}2014_annotations.json and the COCO images in {split}2014/.

    The prompt is `answer en {question}`, the answer `multiple_choice_answer`. Bad rows are treated as in `read_jsonl`.
    """
    folder, fix = Path(folder), "give VQAv2's official file"
    questions_file = folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json"
    questions = read_typed(questions_file, VqaQuestions, fix).questions
    annotations = read_typed(folder / f"v2_mscoco_{split}2014_annotations.json", VqaAnnotations, fix).annotations
    annotation_of = {annotation.question_id: annotation for annotation in annotations}
    files = FileIndex(folder)

    def check(item: tuple[int, msgspec.Raw]) -> Row:
        place, raw = item
        question = decode_typed(bytes(raw), VqaQuestion, f"{questions_file}: question {place}", fix)
        name = f"vqav2/{split}/{question.question_id}"
        annotation = annotation_of.get(question.question_id)
        if annotation is None or not annotation.multiple_choice_answer.strip():
            raise UserError(f"{name}: question {question.question_id} has no annotation: use files of one release")
        image = f"{split}2014/COCO_{split}2014_{question.image_id:012d}.jpg"
        files.check(image, name)
        answers = tuple(answer.answer for answer in annotation.answers)
        prefix, suffix = QUESTION_TASK + question.question, annotation.multiple_choice_answer
        return Row(name, (image,), prefix, suffix, answers)

    rows, skipped = filter_rows(check, enumerate(questions, 1), strict)
    if not rows:
        raise UserError(f"{folder}: has no questions for {split}2014: give VQAv2's official files")
    return Rows(f"vqav2-{split}", rows, folder, skipped)


# ---- a parquet dataset
@dataclass
class HubRows:
    """A parquet VQA dataset on the hub, read through `datasets`: columns image, question, multiple_choice_answer and,
    for holding out images, image_id. Rows are checked when they are read."""

    name: str
    rows: object  # a datasets.Dataset
    by_row: bool = False  # without image_id, hold out by row
    skipped: tuple[str, ...] = ()
    counts_for_best: bool = True
    chance: float | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def texts(self) -> object:
        """The rows without their images, which would be read with them."""
        return self.rows.select_columns(["question", "multiple_choice_answer"])

    @cached_property
    def accepted(self) -> object | None:
        """The column `answers` alone, if there is one."""
        return self.rows.select_columns(["answers"]) if "answers" in self.rows.column_names else None

    def fingerprint(self) -> str:
        """SHA-256 of the questions and answers."""
        return sha256_of([list(self.rows["question"]), list(self.rows["multiple_choice_answer"])])

    def id(self, index: int) -> str:
        return f"{self.name}/{index}"

    def image_keys(self) -> list[list[str]]:
        """For every row, the key of its image, in a list; the row itself if it has no image_id and `by_row` is set."""
        if "image_id" not in self.rows.column_names:
            if self.by_row:
                return [[str(row)] for row in range(len(self))]
            raise UserError(f"dataset {self.name!r} has no image_id to hold images out by: give --eval_data")
        return [[str(image)] for image in self.rows["image_id"]]

    def get(self, epoch: int, index: int) -> Example:
        name = self.id(index)
        try:
            row = self.rows[index]
        except Exception as error:  # `datasets` and pyarrow may raise anything for a broken file
            raise UserError(f"{name}: broken row ({without_address(error)}): use another copy") from error
        question, answer = row["question"], row["multiple_choice_answer"]
        if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
            raise UserError(f"{name}: question and multiple_choice_answer must be strings, the answer not empty")
        return Example(name, [stored_image(row["image"], name)], QUESTION_TASK + question, answer)

    def image(self, index: int, place: int) -> Image.Image:
        """The image of a row; `place` is 0."""
        return self.get(0, index).images[place]

    def image_name(self, index: int, place: int) -> str:
        """A name of the image of a row."""
        return self.id(index)

    def text(self, index: int) -> tuple[str, str, int]:
        """Prefix, suffix and number of images."""
        row = self.texts[index]
        return f"{QUESTION_TASK}{row['question']}", row["multiple_choice_answer"] or "", 1

    def answers(self, index: int) -> tuple[str, ...]:
        """All accepted answers: the column `answers`, of texts or of VQAv2's {answer, ...}, or if it is missing or
        empty, only `multiple_choice_answer`."""
        stored = self.accepted[index]["answers"] if self.accepted is not None else None
        answers = tuple(str(entry["answer"] if isinstance(entry, dict) else entry) for entry in stored or ())
        return answers or (self.text(index)[1],)


def stored_image(value: object, name: str) -> Image.Image:
    """The image in a parquet cell: bytes, or a struct with `bytes`. A path is never opened."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise UserError(f"{name}: has no image bytes (paths in a dataset are not opened): use another copy")
    return open_image(value, name=f"{name}: image")


def without_address(error: Exception) -> str:
    """The message of an exception on one line, without memory addresses, which differ from one run to the next."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", one_line(error))


def read_hub(spec: str, split: str) -> HubRows:
    """A split of a dataset NAME on the hub or in a folder: `split`, or that of NAME@SPLIT, whose rows without image_id
    are held out by row. `datasets` refuses datasets that bring code.

    Raises UserError for a dataset that cannot be read or lacks a column.
    """
    import datasets  # the import takes a second, and most runs do not need it

    name, _, own = (spec, "", "") if os.path.exists(spec) else spec.partition("@")
    split = own or split
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises a different class for each kind of failure
        raise UserError(f"dataset {name!r}, split {split!r}: {one_line(error)}: give a parquet dataset") from error
    missing = {"image", "question", "multiple_choice_answer"} - set(rows.column_names)
    if missing:
        raise UserError(f"dataset {name!r} has no column {sorted(missing)}: it has {sorted(rows.column_names)}")
    if not len(rows):
        raise UserError(f"dataset {name!r}, split {split!r}: has no rows: give another")
    if isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))  # decoding would open paths and URLs
    return HubRows(name, rows, by_row=bool(own))
