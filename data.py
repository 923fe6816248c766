"""Data sets to examples, examples to batches.

An example is a pure function of (seed, epoch, index): no worker has state, and a run resumes at any batch. Three
sources: haystacks generated from captioned pictures, `jsonl` rows {image, prefix, suffix} as big_vision and maestro use
them, and VQAv2 from its official json files beside a COCO folder, or from a parquet copy on the hub.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from errors import UserError
from files import open_image, read_json
from haystack import ImagePool, needle_prompt, read_captioned_images, read_pool
from processing_paligemma import PaliGemmaProcessor


@dataclass
class Example:
    """Pictures, the prompt, the answer to learn, a name to report, and its place in its source."""

    id: str
    images: list = field(repr=False)
    prefix: str
    suffix: str
    index: int = -1


# ---- sources
@dataclass
class Haystacks:
    """Generated needle questions. `size` is what counts as one epoch; every epoch has haystacks of its own.

    `negatives` is the share of questions whose caption is nowhere in the picture, `cell` the side of a cell in pixels.
    """

    pool: ImagePool
    grids: tuple[int, ...]
    negatives: float
    size: int
    seed: int
    name: str = "train"
    cell: int = 64
    skipped: tuple = ()

    def __len__(self) -> int:
        return self.size

    @property
    def chance(self) -> float | None:
        """Exact accuracy of a guess among the cells, where every question has a needle in one size of grid."""
        return 1 / self.grids[0] ** 2 if len(self.grids) == 1 and not self.negatives else None

    def fingerprint(self) -> str:
        """SHA-256 of what the examples are made of."""
        told = [picture.fingerprint().hex() for picture in self.pool.pictures]
        return digest([told, self.grids, self.negatives, self.size, self.seed, self.name, self.cell])

    def get(self, epoch: int, index: int) -> Example:
        key = f"{self.name}/{self.seed}/{epoch}/{index}"
        rng = random.Random(f"{key}/kind")
        haystack = self.pool.make(key, 1, rng.choice(self.grids), positive=rng.random() >= self.negatives)
        images = [self.pool.stitch(f"{key}/{m}", cells, self.cell) for m, cells in enumerate(haystack.cells)]
        return Example(key, images, needle_prompt(haystack.caption), haystack.answer)


@dataclass
class Rows:
    """Rows of {id, image, prefix, suffix}: `image` a path, or a list of paths for several pictures in one prompt.

    `skipped` names the rows that were left out, with the reason.
    """

    name: str
    rows: list[dict]
    folder: Path
    skipped: list[str] = field(default_factory=list, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 of the rows, not of the pictures: a broken picture may be mended under a run."""
        return digest([[row["image"], row["prefix"], row["suffix"]] for row in self.rows])

    def pictures(self) -> list[list[str]]:
        """The names of every row's pictures."""
        return [paths_of(row) for row in self.rows]

    def get(self, epoch: int, index: int) -> Example:
        row = self.rows[index]
        images = [open_image(self.folder / path, name=f"{row['id']}: {path}") for path in paths_of(row)]
        return Example(row["id"], images, row["prefix"], row["suffix"])

    def text(self, index: int) -> tuple[str, str, int]:
        """Prefix, suffix and number of pictures."""
        row = self.rows[index]
        return row["prefix"], row["suffix"], len(row["image"]) if isinstance(row["image"], list) else 1


def digest(told) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def paths_of(row: dict) -> list[str]:
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


def read_jsonl(path: str | Path, strict: bool = True) -> Rows:
    """Rows of a jsonl file, picture paths relative to its folder. A bad row is left out and named in `skipped`.

    Raises UserError for a file that cannot be read, for one that is mostly bad rows, and if `strict` for the first.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}): give a jsonl file of image, prefix and suffix") from error
    listing = _Listing(path.parent)
    named = ((f"{path}:{n}", line) for n, line in enumerate(lines, 1) if line.strip())
    rows, skipped = sift(lambda row: _checked_row(*row, listing), named, strict)
    if not rows:
        raise UserError(f"{path}: holds no row: write one json object with image, prefix and suffix a line")
    return Rows(path.name, rows, path.parent, skipped)


def sift(check: Callable, items: Iterable, strict: bool) -> tuple[list[dict], list[str]]:
    """`check` every item: (the rows that it gives, the faults that it raises). Raises UserError at the first fault if
    `strict`, and where faults outnumber rows: then it is not the rows that are wrong."""
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


def _checked_row(name: str, line: bytes, listing: "_Listing") -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{name}: not json ({error}): mend or delete the line") from error
    for key in ("image", "prefix", "suffix"):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{name}: has no {key!r}: a row is {{image, prefix, suffix}}")
    paths = paths_of(row)
    if not paths or not all(isinstance(p, str) and p for p in paths) or not isinstance(row["prefix"], str):
        raise UserError(f"{name}: image must be a path or a list of paths, and prefix a string")
    if not isinstance(row["suffix"], str) or not row["suffix"].strip():
        raise UserError(f"{name}: suffix must be a string that is not empty: it is what the model learns to answer")
    for p in paths:
        if fault := listing.fault(p):
            raise UserError(f"{name}: picture {fault}")
    return {"id": name} | {key: row[key] for key in ("image", "prefix", "suffix")}


class _Listing:
    """What files lie in a folder and below it; every directory is looked at once."""

    def __init__(self, folder: Path):
        self.folder, self.root = folder, folder.resolve()
        self.files = cache(self._files)

    def _files(self, parent: str) -> dict[str, bool]:
        """Names in a directory -> is it a link; {} for a directory that is not there or outside."""
        directory = (self.root / parent).resolve()
        if not directory.is_relative_to(self.root) or not directory.is_dir():
            return {}
        return {entry.name: entry.is_symlink() for entry in os.scandir(directory) if entry.is_file()}

    def fault(self, path: str) -> str | None:
        """What is wrong with a picture's path, or None."""
        parent, name = os.path.split(path)
        link = self.files(parent).get(name)
        if link is False:
            return None
        try:
            if not (self.root / path).resolve().is_relative_to(self.root):
                return f"{path} lies outside {self.folder}: keep pictures in it"
            exists = link or (self.root / path).is_file()
        except (OSError, ValueError) as error:  # a name that no disk takes
            return f"{path!r} cannot be a path ({error}): mend it"
        return None if exists else f"{self.folder / path} does not exist: mend the path or delete the line"


def read_vqav2(folder: str | Path, split: str, strict: bool = True) -> Rows:
    """Official VQAv2 of a folder: v2_OpenEnded_mscoco_{split}2014_questions.json,
    v2_mscoco_{split}2014_annotations.json and the COCO pictures in {split}2014/. Prompt `answer en {question}`, answer
    `multiple_choice_answer`. Bad rows as in `read_jsonl`.
    """
    folder = Path(folder)
    questions = _list_of(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", "questions")
    annotations = _list_of(folder / f"v2_mscoco_{split}2014_annotations.json", "annotations")
    answers = {a.get("question_id"): a.get("multiple_choice_answer") for a in annotations}
    listing = _Listing(folder)

    def check(q: dict) -> dict:
        number, picture = q.get("question_id"), q.get("image_id")
        name = f"vqav2/{split}/{number}"
        if not isinstance(picture, int) or not isinstance(q.get("question"), str):
            raise UserError(f"{name}: has no image_id or no question: take the official file")
        if not answers.get(number):
            raise UserError(f"{folder}: question {number} has no annotation: take both files of one release")
        image = f"{split}2014/COCO_{split}2014_{picture:012d}.jpg"
        if fault := listing.fault(image):
            raise UserError(f"{name}: picture {fault}")
        return {"id": name, "image": image, "prefix": f"answer en {q['question']}", "suffix": answers[number]}

    rows, skipped = sift(check, questions, strict)
    if not rows:
        raise UserError(f"{folder}: holds no question of {split}2014: give VQAv2's official files")
    return Rows(f"vqav2-{split}", rows, folder, skipped)


def _list_of(path: Path, key: str) -> list[dict]:
    data = read_json(path)
    if not isinstance(data.get(key), list) or not all(isinstance(entry, dict) for entry in data[key]):
        raise UserError(f"{path}: holds no list {key!r}: give VQAv2's official file")
    return data[key]


@dataclass
class HubRows:
    """A parquet VQA data set on the hub, columns image, question, multiple_choice_answer and, to hold pictures out,
    image_id; read through `datasets`."""

    name: str
    rows: object
    skipped: tuple = ()  # its rows are looked at when they are needed

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """SHA-256 of the questions and answers."""
        return digest([list(self.rows["question"]), list(self.rows["multiple_choice_answer"])])

    def pictures(self) -> list[list]:
        if "image_id" not in self.rows.column_names:
            raise UserError(f"data set {self.name!r} has no image_id to hold pictures out by: give --eval_data")
        return [[picture] for picture in self.rows["image_id"]]

    def get(self, epoch: int, index: int) -> Example:
        name = f"{self.name}/{index}"
        try:
            row = self.rows[index]
        except Exception as error:  # `datasets` decodes the picture here, and PIL raises whatever it provokes
            raise UserError(f"{name}: broken row ({' '.join(str(error).split())}): take another copy") from error
        if row["image"] is None or not row["multiple_choice_answer"]:
            raise UserError(f"{name}: has no picture or no answer: take another copy")
        return Example(name, [row["image"]], f"answer en {row['question']}", row["multiple_choice_answer"])

    def text(self, index: int) -> tuple[str, str, int]:
        row = self.rows.select_columns(["question", "multiple_choice_answer"])[index]
        return f"answer en {row['question']}", row["multiple_choice_answer"] or "", 1


def read_hub(name: str, split: str) -> HubRows:
    """A data set's split. Data sets that bring code are refused by `datasets`; nothing here trusts remote code."""
    import datasets  # a second of import that most runs do not need

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets raises a different class for every way to fail
        reason = " ".join(str(error).split())
        raise UserError(f"data set {name!r}, split {split!r}: {reason}: give a parquet data set to read") from error
    missing = {"image", "question", "multiple_choice_answer"} - set(rows.column_names)
    if missing:
        raise UserError(f"data set {name!r} has no column {sorted(missing)}: it has {sorted(rows.column_names)}")
    return HubRows(name, rows)


@dataclass
class Subset:
    """Some rows of a source, under a name of their own."""

    name: str
    source: object
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def skipped(self) -> list[str]:
        return self.source.skipped

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), self.indices])

    def get(self, epoch: int, index: int) -> Example:
        return self.source.get(epoch, self.indices[index])

    def text(self, index: int) -> tuple[str, str, int]:
        return self.source.text(self.indices[index])


def make_data(config) -> tuple[object, dict[str, object]]:
    """The training source of `config.data` and the evaluation sources by name, the headline one first.

    "haystack": the embedded pool, "haystack:PICTURES": pictures of one's own. "*.jsonl", "vqav2:FOLDER", "hub:NAME":
    `config.eval_data` of the same form, or where that is empty a seeded tenth held out.
    """
    kind, _, pictures = config.data.partition(":")
    if kind == "haystack":
        return make_haystacks(config, pictures)
    source = _read(config.data, "train", config.strict_data)
    if config.eval_data:
        held_out = _read(config.eval_data, "val", config.strict_data)
        order = list(range(min(len(held_out), config.eval_samples)))
        return source, {held_out.name: Subset(held_out.name, held_out, order)}
    train, held, name = hold_out(source, config)
    return Subset("train", source, train), {name: Subset(name, source, held)}


def make_haystacks(config, source: str) -> tuple[Haystacks, dict[str, Haystacks]]:
    """Haystacks to train on; to evaluate, needles that are there, then absent ones, in each size of grid.

    The embedded pool is evaluated on the other style's drawings of the trained concepts, then on concepts never
    trained. Pictures of `source`, a folder or a jsonl file, on a fifth of the captions, which are never trained.
    """
    if source:
        pictures, cell = read_captioned_images(source), 256
        train, test = ([p for p in pictures if p.split == split] for split in ("train", "test"))
        kinds = [("", test, 0.0), (" absent", test, 1.0)]
    else:
        train, test, cell = read_pool(splits=("train",)), read_pool(splits=("test_style",)), 64
        unseen = [p for p in read_pool(splits=("test_concept",)) if p.style == "noto"]
        kinds = [("", test, 0.0), (" absent", test, 1.0), (" unseen concepts", unseen, 0.0)]
    n, sets = config.eval_samples, {}
    for kind, pictures, share in kinds:
        pool = ImagePool(pictures)
        for grid in config.grids:
            name = f"{grid}x{grid}{kind}"  # one test set for every seed
            sets[name] = Haystacks(pool, (grid,), share, n, 0, name=f"test/{name}", cell=cell)
    return Haystacks(ImagePool(train), config.grids, config.negatives, 1 << 16, config.seed, cell=cell), sets


def hold_out(source, config) -> tuple[list[int], list[int], str]:
    """Indices to train on and to evaluate on, a seeded tenth, and its name.

    Rows that share a picture stay together, unless so many hang together that nothing else is left: the name says so.
    """
    order = list(range(len(source)))
    random.Random(f"held out/{config.seed}").shuffle(order)
    cut = min(config.eval_samples, max(1, len(source) // 10))
    if len(source) < 2:
        raise UserError(f"{config.data}: one row is too few to hold one out: add rows or give --eval_data")
    groups: dict[int, list[int]] = {}
    of = connected(source.pictures())
    for index in order:
        groups.setdefault(of[index], []).append(index)
    held: set[int] = set()
    for group in groups.values():
        if len(held) + len(group) <= cut:
            held |= set(group)
    smallest = min(groups.values(), key=len)
    if not held and 2 * len(smallest) <= len(source):
        held = set(smallest)
    name = "held out" if held else "held out, pictures shared with training"
    held = held or set(order[:cut])
    return [i for i in order if i not in held], [i for i in order if i in held], name


def connected(pictures: list[list]) -> list[int]:
    """For each row the number of its group; rows are in one group that share a picture, directly or through others."""
    leader = list(range(len(pictures)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    first: dict = {}
    for row, names in enumerate(pictures):
        for picture in names:
            leader[find(row)] = find(first.setdefault(picture, row))
    return [find(row) for row in range(len(pictures))]


def _read(spec: str, split: str, strict: bool):
    if spec.endswith(".jsonl"):
        return read_jsonl(spec, strict)
    kind, _, rest = spec.partition(":")
    if kind == "vqav2" and rest:
        return read_vqav2(rest, split, strict)
    if kind == "hub" and rest:
        return read_hub(rest, "validation" if split == "val" else split)
    raise UserError(
        f"data {spec!r} is unknown: give haystack, haystack:PICTURES, a .jsonl file, vqav2:FOLDER or hub:NAME"
    )


# ---- batches
POOL = 50  # batches among which rows of like length are put together


def batch_order(
    size: int, batch: int, seed: int, start: int = 0, lengths: list[int] | None = None
) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (epoch, index): every epoch a seeded permutation, the last short batch of one kept.

    `start` skips that many batches, so that a resumed run sees what the uninterrupted one would have seen. With the
    `lengths` of all rows, rows of like length share a batch: less padding, another order.
    """
    per_epoch = -(-size // batch)
    epoch = start // per_epoch
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(size, generator=generator).tolist()
        batches = [order[b * batch : (b + 1) * batch] for b in range(per_epoch)]
        if lengths is not None:
            batches = grouped(order, batch, lengths, generator)
        first = start % per_epoch if epoch == start // per_epoch else 0
        for rows in batches[first:]:
            yield [(epoch, index) for index in rows]
        epoch += 1


def grouped(order: list[int], batch: int, lengths: list[int], generator: torch.Generator) -> list[list[int]]:
    """Batches of like length: stretches of the order are sorted by length and cut, and the batches shuffled, so that
    neither epochs nor the course of one are alike."""
    batches = []
    for start in range(0, len(order), POOL * batch):
        rows = sorted(order[start : start + POOL * batch], key=lambda index: lengths[index])
        batches += [rows[b : b + batch] for b in range(0, len(rows), batch)]
    return [batches[b] for b in torch.randperm(len(batches), generator=generator).tolist()]


def text_lengths(source, processor: PaliGemmaProcessor) -> list[int]:
    """Tokens of every row, pictures included and none opened; 0 for a row that is left out when its turn comes.

    Raises UserError for a source that makes its rows up.
    """
    if not hasattr(source, "text"):
        raise UserError(
            "group_by_length needs rows of a file: questions about haystacks are of one length, leave it off"
        )

    def length(prefix: str, suffix: str, images: int) -> int:
        try:
            return len(processor.encode(prefix, suffix, images)[0])
        except UserError:
            return 0

    return [length(*source.text(index)) for index in range(len(source))]


class _Fetch(torch.utils.data.Dataset):
    """What a loader's worker runs: one example, tokenised, its pictures as pixels; or what is wrong with it."""

    def __init__(self, source, processor: PaliGemmaProcessor, with_suffix: bool):
        self.source, self.processor, self.with_suffix = source, processor, with_suffix

    def __getitem__(self, key: tuple[int, int]):
        try:
            example = self.source.get(*key)
            pixels = [self.processor.pixels(image) for image in example.images]
            row = self.processor.encode(example.prefix, example.suffix if self.with_suffix else None, len(pixels))
        except UserError as error:  # raised in a worker, it would arrive wrapped in a traceback
            return error
        example.index = key[1]
        example.images = []  # not needed any more, and large to send between processes
        return example, row, pixels

    def collate(self, items):
        """(examples, tensors, faults); with no row that can be used, another one stands in and there is no example."""
        good = [item for item in items if not isinstance(item, UserError)]
        faults = [item for item in items if isinstance(item, UserError)]
        used = good or self.stand_in()
        if not used:
            return (), None, faults
        examples, rows, pixels = zip(*used, strict=True)
        tensors = self.processor.pad(list(rows))
        tensors["pixel_values"] = torch.stack([p for row in pixels for p in row])
        return examples if good else (), tensors, faults

    def stand_in(self) -> list:
        """The source's first row that can be used, if any."""
        items = (self[0, index] for index in range(len(self.source)))
        return list(islice((item for item in items if not isinstance(item, UserError)), 1))


def loader(
    source, processor: PaliGemmaProcessor, batches, with_suffix: bool, workers: int = 0, skip: Callable | None = None
) -> Iterator:
    """Batches of (examples, tensors), padded left, over `batches` of (epoch, index).

    An evaluation loader has `with_suffix` False: the answer never enters its input. A bad row is handed to `skip` as a
    UserError and left out; without `skip` it is raised. Of an empty batch, and of one that lost all its rows, the
    tensors are a stand-in's and `examples` is empty: it is there for the shapes alone and must count nothing.
    """

    fetch = _Fetch(source, processor, with_suffix)
    for examples, tensors, faults in DataLoader(
        fetch,
        batch_sampler=batches,
        collate_fn=fetch.collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    ):
        for fault in faults:
            if skip is None:
                raise fault
            skip(fault)
        if tensors is None:
            raise UserError(f"{source.name}: none of its {len(source)} rows can be used: look at its pictures")
        yield examples, tensors
