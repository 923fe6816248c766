"""Datasets to examples, and examples to batches.

An example is a pure function of (seed, epoch, index): workers have no state, and a run can resume at any batch.
Sources: haystacks made of captioned images, jsonl rows of {image, prefix, suffix} or of {messages, images}, VQAv2 from
its official json files and a COCO folder, and a parquet copy of it on the hub. Every source has `name`, `skipped` (why
rows were left out), `counts_for_best` (whether `best/` may be chosen by it), `chance` (exact accuracy of a guess, or
None), `fingerprint()`, `get(epoch, index)`, and `id(index)` and `text(index)` of epoch 0, which open no image.
"""

import hashlib
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import msgspec
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from errors import UserError
from files import decode_typed, one_line, open_image, read_bytes, read_typed
from haystack import (
    OWN_CELL,
    POOL_CELL,
    TEST_SHARE,
    Haystack,
    ImagePool,
    PoolImage,
    needle_prompt,
    read_captioned_images,
    read_split,
)
from processing_paligemma import Processor, stack_inputs

if TYPE_CHECKING:
    from finetune_original import Config

HAYSTACKS_PER_EPOCH = 1 << 16  # size of an epoch of generated data
HELD_OUT_SHARE = 0.1  # fraction of the rows held out without --eval_data
HASHED_IMAGES = 20_000  # up to this many images, files of equal size are compared by content
EPOCH_SEED_STRIDE = 1_000_003  # neighbouring seeds shuffle their epochs differently
IMAGE_PLACE = "<image>"  # marks an image in the text of a conversation
BUCKET = 50  # number of batches sorted by length together
T = TypeVar("T")


@dataclass
class Example:
    """A name for error messages, the images, the prompt, the answer to learn, and the index in the source."""

    id: str
    images: list[Image.Image] = field(repr=False)
    prefix: str
    suffix: str
    index: int = -1


# ---- haystacks
@dataclass
class Haystacks:
    """Generated needle questions, new ones in every epoch.

    `shapes`: (images, cells per side), one drawn for each question; `size`: examples per epoch; `negatives`:
    share of questions whose caption is in no cell; `cell`: side of a cell in pixels; `recolour`: random colours.
    """

    pool: ImagePool
    shapes: tuple[tuple[int, int], ...]
    negatives: float
    size: int
    seed: int
    name: str = "train"
    cell: int = POOL_CELL
    counts_for_best: bool = True
    skipped: tuple[str, ...] = ()
    recolour: bool = False

    def __len__(self) -> int:
        return self.size

    @property
    def chance(self) -> float | None:
        """Exact accuracy of guessing a cell; None if needles may be absent or haystacks differ in shape."""
        images, grid = self.shapes[0]
        return 1 / (images * grid**2) if len(self.shapes) == 1 and not self.negatives else None

    def fingerprint(self) -> str:
        """SHA-256 of the images and settings that determine the examples."""
        images = [image.fingerprint().hex() for image in self.pool.images]
        settings = [self.shapes, self.negatives, self.size, self.seed, self.name, self.cell, self.recolour]
        return sha256_of([images, *settings])

    def id(self, index: int, epoch: int = 0) -> str:
        return f"{self.name}/{self.seed}/{epoch}/{index}"

    def get(self, epoch: int, index: int) -> Example:
        key = self.id(index, epoch)
        haystack = self.make_haystack(epoch, index)
        images = [
            self.pool.stitch(f"{key}/{m}", cells, self.cell, self.recolour) for m, cells in enumerate(haystack.cells)
        ]
        return Example(key, images, needle_prompt(*haystack.captions), haystack.answer)

    def text(self, index: int) -> tuple[str, str, int]:
        """Prompt, answer and number of images, in epoch 0."""
        haystack = self.make_haystack(0, index)
        return needle_prompt(*haystack.captions), haystack.answer, len(haystack.cells)

    def make_haystack(self, epoch: int, index: int) -> Haystack:
        (images, grid), positive = self.kind(index)
        return self.pool.make(self.id(index, epoch), images, grid, positive)

    def kind(self, index: int) -> tuple[tuple[int, int], bool]:
        """The shape of a question, and whether its needle is present: the same in every epoch."""
        rng = random.Random(f"{self.id(index)}/kind")
        return rng.choice(self.shapes), rng.random() >= self.negatives


# ---- rows of a file
class VqaAnswer(msgspec.Struct):
    """The answer of one annotator, as VQAv2's files write it."""

    answer: str


class JsonRow(msgspec.Struct):
    """A line of a jsonl file: `image` is a path, a list of paths for several images in one prompt, or null for text
    only, for a decoder without a tower. `answers`: all accepted answers, for --metric."""

    image: str | list[str] | None
    prefix: str
    suffix: str
    answers: list[str | VqaAnswer] = []


class ChatPart(msgspec.Struct):
    """A part of a message; an image without a path is the next one of the row's `images`."""

    type: Literal["text", "image"]
    text: str = ""
    image: str | None = None


class ChatMessage(msgspec.Struct):
    role: Literal["system", "user", "assistant"]
    content: str | list[ChatPart]  # in a string, <image> marks an image


class ChatRow(msgspec.Struct):
    """A conversation in a line of a jsonl file; its last message is the answer to learn."""

    messages: list[ChatMessage]
    images: list[str] = []
    answers: list[str | VqaAnswer] = []


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
        images = [open_image(self.folder / name, name=f"{row.id}: {name}") for name in row.images]
        return Example(row.id, images, row.prefix, row.suffix)

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
    lines = read_bytes(path).splitlines()
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
    answers = tuple(entry if isinstance(entry, str) else entry.answer for entry in row.answers)
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
            texts.append("\n".join(part.text.strip() for part in parts if part.type == "text"))
    if paths and chat.images:
        raise UserError(f"{name}: images are given twice: as `images`, or in the messages")
    images = paths or chat.images
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
        prefix, suffix = f"answer en {question.question}", annotation.multiple_choice_answer
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
    skipped: tuple[str, ...] = ()
    counts_for_best: bool = True
    chance: float | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 of the questions and answers."""
        return sha256_of([list(self.rows["question"]), list(self.rows["multiple_choice_answer"])])

    def id(self, index: int) -> str:
        return f"{self.name}/{index}"

    def image_keys(self) -> list[list[str]]:
        """For every row, the key of its image, in a list."""
        if "image_id" not in self.rows.column_names:
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
        return Example(name, [stored_image(row["image"], name)], f"answer en {question}", answer)

    def text(self, index: int) -> tuple[str, str, int]:
        """Prefix, suffix and number of images."""
        row = self.rows.select_columns(["question", "multiple_choice_answer"])[index]
        return f"answer en {row['question']}", row["multiple_choice_answer"] or "", 1

    def answers(self, index: int) -> tuple[str, ...]:
        """All accepted answers: the column `answers`, of texts or of VQAv2's {answer, ...}, or if it is missing or
        empty, only `multiple_choice_answer`."""
        has_column = "answers" in self.rows.column_names
        stored = self.rows.select_columns(["answers"])[index]["answers"] if has_column else None
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


def read_hub(name: str, split: str) -> HubRows:
    """A split of a dataset on the hub or in a folder. `datasets` refuses datasets that bring code.

    Raises UserError for a dataset that cannot be read or lacks a column.
    """
    import datasets  # the import takes a second, and most runs do not need it

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
    return HubRows(name, rows)


# ---- training and evaluation sources
@dataclass
class Subset:
    """Some rows of a source, under their own name."""

    name: str
    source: Rows | HubRows
    indices: list[int]
    counts_for_best: bool = True
    chance: float | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def skipped(self) -> list[str]:
        return self.source.skipped

    def fingerprint(self) -> str:
        return sha256_of([self.source.fingerprint(), self.indices])

    def id(self, index: int) -> str:
        return self.source.id(self.indices[index])

    def get(self, epoch: int, index: int) -> Example:
        return self.source.get(epoch, self.indices[index])

    def text(self, index: int) -> tuple[str, str, int]:
        """Prefix, suffix and number of images."""
        return self.source.text(self.indices[index])

    def answers(self, index: int) -> tuple[str, ...]:
        """All accepted answers."""
        return self.source.answers(self.indices[index])


Source = Haystacks | Rows | HubRows | Subset


def make_data(config: "Config") -> tuple[Source, dict[str, Source]]:
    """The training source of `config.data`, and the evaluation sources by name, the headline one first.

    "haystack": the embedded pool; "haystack:IMAGES": your own images; "*.jsonl", "vqav2:FOLDER", "hub:NAME":
    evaluated on `config.eval_data`, one of the same three forms, or if that is empty, on a seeded tenth held out.
    """
    kind, _, images = config.data.partition(":")
    if kind == "haystack":
        if config.eval_data:
            raise UserError(f"--eval_data={config.eval_data}: haystack data has test sets of its own: leave it out")
        return make_haystacks(config, images)
    if config.eval_data.partition(":")[0] == "haystack":
        raise UserError(
            f"--eval_data={config.eval_data}: rows are evaluated on rows: give a .jsonl file, vqav2:FOLDER or hub:NAME"
        )
    source = read_source(config.data, "train", config.strict_data)
    if config.eval_data:
        held_out = read_source(config.eval_data, "val", config.strict_data)
        order = list(range(min(len(held_out), config.eval_samples)))
        return source, {held_out.name: Subset(held_out.name, held_out, order)}
    train, held, name = hold_out(source, config)
    return Subset("train", source, train), {name: Subset(name, source, held)}


def read_source(spec: str, split: str, strict: bool) -> Rows | HubRows:
    """The rows that a value of --data names. Raises UserError for an unknown form."""
    if spec.endswith(".jsonl"):
        return read_jsonl(spec, strict)
    kind, _, rest = spec.partition(":")
    if kind == "vqav2" and rest:
        return read_vqav2(rest, split, strict)
    if kind == "hub" and rest:
        return read_hub(rest, "validation" if split == "val" else split)
    raise UserError(
        f"data {spec!r} is unknown: give haystack, haystack:IMAGES, a .jsonl file, vqav2:FOLDER or hub:NAME"
    )


def make_haystacks(config: "Config", own: str) -> tuple[Haystacks, dict[str, Haystacks]]:
    """Haystacks for training, and evaluation sets with present and with absent needles for each grid size.

    The embedded pool is evaluated on the drawing styles of training, on a style that is never trained on, and on
    concepts that are never trained on; images of `own`, a folder or a jsonl file, on the fifth of their captions that
    is never trained on.
    """
    shapes = config.shapes or tuple((1, grid) for grid in config.grids)
    if own:
        images, cell = read_captioned_images(own), OWN_CELL
        train, test = ([image for image in images if image.split == split] for split in ("train", "test"))
        check_captions(own, train, test, max(grid for _, grid in shapes))
        kinds = [("", test, 0.0, True), (" absent", test, 1.0, False)]
    else:
        cell, splits = POOL_CELL, ("train", "test_style", "test_concept")
        train, test, unseen = (read_split("", split) for split in splits)
        kinds = [(" trained styles", train, 0.0, False), (" unseen style", test, 0.0, True)]
        kinds += [(" unseen style, absent", test, 1.0, False), (" unseen concepts", unseen, 0.0, False)]
    size, sets = config.eval_samples, {}
    for kind, images, negatives, counts_for_best in kinds:
        pool = ImagePool(images)
        for shape in shapes:
            name = f"{shape[0]} of " * (shape[0] > 1) + f"{shape[1]}x{shape[1]}{kind}"
            sets[name] = Haystacks(  # seed 0: the same test sets for every training seed
                pool, (shape,), negatives, size, 0, f"test/{name}", cell, counts_for_best
            )
    source = Haystacks(
        ImagePool(train),
        shapes,
        config.negatives,
        HAYSTACKS_PER_EPOCH,
        config.seed,
        cell=cell,
        recolour=config.recolour,
    )
    return source, sets


def check_captions(own: str, train: list[PoolImage], test: list[PoolImage], grid: int) -> None:
    """Raise UserError unless both splits have a caption for every cell of the largest grid, plus one."""
    counts = [len({image.caption for image in images}) for images in (train, test)]
    need = grid * grid + 1
    if min(counts) < need:
        raise UserError(
            f"haystack:{own}: {sum(counts)} captions, of which {counts[1]} are kept for testing, but {grid} x {grid} "
            f"cells and an absent needle need {need} in training and {need} in testing: give about "
            f"{TEST_SHARE * need} captions, or smaller --grids"
        )


def hold_out(source: Rows | HubRows, config: "Config") -> tuple[list[int], list[int], str]:
    """Indices to train on, indices to evaluate on (a seeded tenth), and a name for the latter.

    Rows that share an image stay together, unless too many rows are connected; the name then says so.
    """
    order = list(range(len(source)))
    random.Random(f"held out/{config.seed}").shuffle(order)
    count = min(config.eval_samples, max(1, int(len(source) * HELD_OUT_SHARE)))
    if len(source) < 2:
        raise UserError(f"{config.data}: one row is too few to hold one out: add rows or give --eval_data")
    groups: dict[int, list[int]] = {}
    group_of = group_by_image(source.image_keys())
    for index in order:
        groups.setdefault(group_of[index], []).append(index)
    held: set[int] = set()
    for group in groups.values():
        if len(held) + len(group) <= count:
            held |= set(group)
    smallest = min(groups.values(), key=len)
    if not held and 2 * len(smallest) <= len(source):
        held = set(smallest)
    name = "held out" if held else "held out, images shared with training"
    held = held or set(order[:count])
    return [i for i in order if i not in held], [i for i in order if i in held], name


def group_by_image(keys: list[list[str]]) -> list[int]:
    """For every row, the number of its group: rows that share an image, directly or through other rows."""
    import networkx  # a dependency of torch; the import takes 0.2 s

    graph = networkx.Graph()
    for row, row_keys in enumerate(keys):
        graph.add_node(row)
        graph.add_edges_from((row, key) for key in row_keys)
    group_of = [0] * len(keys)
    for number, component in enumerate(networkx.connected_components(graph)):
        for node in component:
            if isinstance(node, int):  # the others are images
                group_of[node] = number
    return group_of


# ---- batches
def batch_order(
    size: int, batch: int, seed: int, start: int = 0, lengths: list[int] | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, index): every epoch is a seeded permutation, and its short last batch is kept.

    `start` skips that many batches, so that a resumed run sees the same batches as an uninterrupted one. With the
    `lengths` of all rows, rows of similar length share a batch: less padding, a different order.
    """
    per_epoch = -(-size // batch)
    epoch = start // per_epoch
    while True:
        generator = torch.Generator().manual_seed(seed * EPOCH_SEED_STRIDE + epoch)
        order = torch.randperm(size, generator=generator).tolist()
        batches = [order[b * batch : (b + 1) * batch] for b in range(per_epoch)]
        if lengths is not None:
            batches = batch_by_length(order, batch, lengths, generator)
        first = start % per_epoch if epoch == start // per_epoch else 0
        for rows in batches[first:]:
            yield [(epoch, index) for index in rows]
        epoch += 1


def batch_by_length(order: list[int], batch: int, lengths: list[int], generator: torch.Generator) -> list[list[int]]:
    """Batches of rows of similar length: sorts each chunk of BUCKET x batch rows of the permutation by length, cuts it
    into batches and shuffles all batches."""
    batches = []
    for start in range(0, len(order), BUCKET * batch):
        rows = sorted(order[start : start + BUCKET * batch], key=lambda index: lengths[index])
        batches += [rows[b : b + batch] for b in range(0, len(rows), batch)]
    return [batches[b] for b in torch.randperm(len(batches), generator=generator).tolist()]


def text_lengths(source: Source, processor: Processor) -> list[int]:
    """Number of tokens of every row, images included but not opened; 0 for a row that will be left out. For haystacks
    only the image tokens, whose number varies much more than the length of the questions."""
    if isinstance(source, Haystacks):
        return [source.kind(index)[0][0] * processor.num_image_tokens for index in range(len(source))]

    def length(prefix: str, suffix: str, images: int) -> int:
        try:
            return len(processor.encode(prefix, suffix, images)[0])
        except UserError:
            return 0

    return [length(*source.text(index)) for index in range(len(source))]


@lru_cache(maxsize=4)
def longest_token(processor: Processor) -> int:
    """Number of characters in the longest token: a text of n characters has at least n / longest_token tokens."""
    return max(map(len, processor.tokenizer.get_vocab()))


def encode_row(
    processor: Processor,
    name: str,
    prefix: str,
    suffix: str | None,
    images: int | list[int],
    max_length: int | None,
) -> tuple[list[int], list[int]]:
    """Ids and token types of a row. `images`: the number of images, or the number of tokens of each image.

    Raises UserError, starting with the row's name, for text that the processor refuses and for more than `max_length`
    tokens.
    """
    characters = len(prefix) + len(suffix or "")
    too_long = f"{name}: more tokens than the {max_length} that fit the model: shorten the row"
    if max_length is not None and characters > max_length * longest_token(processor):
        raise UserError(too_long)  # tokenising megabytes would take seconds
    try:
        encoded = processor.encode(prefix, suffix, images)
    except UserError as error:
        raise error if name in str(error) else UserError(f"{name}: {error}") from error
    if max_length is not None and len(encoded[0]) > max_length:
        raise UserError(f"{too_long} ({len(encoded[0])} tokens)")
    return encoded


class Fetch(Dataset):
    """The dataset of `loader`: tokenised examples with their images as pixels, or the UserError of a bad row."""

    def __init__(self, source: Source, processor: Processor, with_suffix: bool, max_length: int | None):
        self.source, self.processor, self.with_suffix, self.max_length = source, processor, with_suffix, max_length

    def __getitem__(self, key: tuple[int, int]) -> tuple | UserError:
        try:
            example = self.source.get(*key)
            example.index = key[1]
            suffix = example.suffix if self.with_suffix else None
            tokens = [self.processor.count_image_tokens(image.size) for image in example.images]
            encoded = encode_row(self.processor, example.id, example.prefix, suffix, tokens, self.max_length)
            pixels = [self.processor.image_inputs(image) for image in example.images]
        except UserError as error:  # raised in a worker, it would arrive wrapped in a traceback
            return UserError(without_address(error))
        example.images = []  # not needed any more, and large to send between processes
        return example, encoded, pixels

    def collate(self, items: list) -> tuple[tuple[Example, ...], dict[str, Tensor] | None, list[UserError]]:
        """(examples, tensors, errors). If no row can be used, the tensors are those of some other row and
        `examples` is empty."""
        good = [item for item in items if not isinstance(item, UserError)]
        errors = [item for item in items if isinstance(item, UserError)]
        used = good or self.find_usable()
        if not used:
            return (), None, errors
        examples, encoded, pixels = zip(*used, strict=True)
        tensors = self.processor.pad(list(encoded))
        tensors |= stack_inputs([image for row in pixels for image in row])
        return examples if good else (), tensors, errors

    def find_usable(self) -> list:
        """The first row of the source that can be used, if any."""
        items = (self[0, index] for index in range(len(self.source)))
        return list(islice((item for item in items if not isinstance(item, UserError)), 1))


def loader(
    source: Source,
    processor: Processor,
    batches: Iterable[list[tuple[int, int]]],
    with_suffix: bool,
    workers: int = 0,
    skip: Callable[[UserError], None] | None = None,
    max_length: int | None = None,
) -> Iterator[tuple[tuple[Example, ...], dict[str, Tensor]]]:
    """Yields (examples, tensors padded on the left) for each of the `batches` of (epoch, index).

    Without `with_suffix` the answer never enters the input. A bad row, or one of more than `max_length` tokens, is
    passed to `skip` as a UserError and left out; without `skip` it is raised. For an empty batch, and for one that lost
    all its rows, the tensors are those of some other row and `examples` is empty: such a batch keeps the processes in
    step and must get weight 0.
    """
    fetch = Fetch(source, processor, with_suffix, max_length)
    for examples, tensors, errors in DataLoader(
        fetch,
        batch_sampler=batches,
        collate_fn=fetch.collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    ):
        for error in errors:
            if skip is None:
                raise error
            skip(error)
        if tensors is None:
            raise UserError(f"{source.name}: none of its {len(source)} rows can be used: check its images")
        yield examples, tensors
