"""Data sets to examples, examples to batches.

An example is a pure function of (seed, epoch, index): no worker has state, and a run resumes at any batch. Three
sources: haystacks generated from a picture pool, `jsonl` rows {image, prefix, suffix} as big_vision and maestro use
them, and VQAv2 from its official json files beside a COCO folder, or from a parquet copy on the hub.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from checkpoint import read_json
from errors import UserError
from haystack import PicturePool, needle_prompt, read_pool
from processing_paligemma import PaliGemmaProcessor, open_image


@dataclass
class Example:
    """Pictures, the prompt, the answer to learn, and a name to report."""

    id: str
    images: list = field(repr=False)
    prefix: str
    suffix: str


# ---- sources
@dataclass
class Haystacks:
    """Generated needle questions. `size` is what counts as one epoch; every epoch has haystacks of its own.

    `negatives` is the share of questions whose caption is nowhere in the picture, `cell` the side of a cell in pixels.
    """

    pool: PicturePool
    grids: tuple[int, ...]
    negatives: float
    size: int
    seed: int
    name: str = "train"
    cell: int = 64

    def __len__(self) -> int:
        return self.size

    @property
    def chance(self) -> float | None:
        """Exact accuracy of a guess among the cells, where every question has a needle in one size of grid."""
        return 1 / self.grids[0] ** 2 if len(self.grids) == 1 and not self.negatives else None

    def get(self, epoch: int, index: int) -> Example:
        key = f"{self.name}/{self.seed}/{epoch}/{index}"
        rng = random.Random(f"{key}/kind")
        haystack = self.pool.make(key, 1, rng.choice(self.grids), positive=rng.random() >= self.negatives)
        images = [self.pool.stitch(f"{key}/{m}", cells, self.cell) for m, cells in enumerate(haystack.cells)]
        return Example(key, images, needle_prompt(haystack.caption), haystack.answer)


@dataclass
class Rows:
    """Rows of {image, prefix, suffix}: `image` a path, or a list of paths for several pictures in one prompt."""

    name: str
    rows: list[dict]
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, epoch: int, index: int) -> Example:
        row = self.rows[index]
        paths = row["image"] if isinstance(row["image"], list) else [row["image"]]
        images = [open_image(self.folder / path, name=f"{row['id']}: {path}") for path in paths]
        return Example(row["id"], images, row["prefix"], row["suffix"])

    def text(self, index: int) -> tuple[str, str, int]:
        """Prefix, suffix and number of pictures."""
        row = self.rows[index]
        return row["prefix"], row["suffix"], len(row["image"]) if isinstance(row["image"], list) else 1


def read_jsonl(path: str | Path) -> Rows:
    """Rows of a jsonl file, picture paths relative to its folder. Raises UserError naming the first bad line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a jsonl file of image, prefix and suffix") from error
    rows = [_checked_row(f"{path}:{n}", line, path.parent) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no row: write one json object with image, prefix and suffix a line")
    return Rows(path.name, rows, path.parent)


def _checked_row(name: str, line: str, folder: Path) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{name}: not json ({error}): mend or delete the line") from error
    for key in ("image", "prefix", "suffix"):
        if not isinstance(row, dict) or key not in row:
            raise UserError(f"{name}: has no {key!r}: a row is {{image, prefix, suffix}}")
    paths = row["image"] if isinstance(row["image"], list) else [row["image"]]
    if not paths or not all(isinstance(p, str) and p for p in paths) or not isinstance(row["prefix"], str):
        raise UserError(f"{name}: image must be a path or a list of paths, and prefix a string")
    if not isinstance(row["suffix"], str) or not row["suffix"].strip():
        raise UserError(f"{name}: suffix must be a string that is not empty: it is what the model learns to answer")
    root = folder.resolve()
    for p in paths:
        if not (root / p).resolve().is_relative_to(root):
            raise UserError(f"{name}: picture {p} lies outside {folder}: keep pictures beside the jsonl file")
        if not (root / p).is_file():
            raise UserError(f"{name}: picture {folder / p} does not exist: mend the path or delete the line")
    return row | {"id": name}


def read_vqav2(folder: str | Path, split: str) -> Rows:
    """Official VQAv2 of a folder: v2_OpenEnded_mscoco_{split}2014_questions.json,
    v2_mscoco_{split}2014_annotations.json and the COCO pictures in {split}2014/. Prompt `answer en {question}`, answer
    `multiple_choice_answer`.
    """
    folder = Path(folder)
    questions = _list_of(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", "questions")
    annotations = _list_of(folder / f"v2_mscoco_{split}2014_annotations.json", "annotations")
    answers = {a["question_id"]: a["multiple_choice_answer"] for a in annotations}
    rows = []
    for q in questions:
        if q["question_id"] not in answers:
            raise UserError(f"{folder}: question {q['question_id']} has no annotation: take both files of one release")
        rows.append(
            {
                "id": f"vqav2/{split}/{q['question_id']}",
                "image": f"{split}2014/COCO_{split}2014_{q['image_id']:012d}.jpg",
                "prefix": f"answer en {q['question']}",
                "suffix": answers[q["question_id"]],
            }
        )
    return Rows(f"vqav2-{split}", rows, folder)


def _list_of(path: Path, key: str) -> list[dict]:
    data = read_json(path)
    if not isinstance(data.get(key), list):
        raise UserError(f"{path}: holds no list {key!r}: give VQAv2's official file")
    return data[key]


@dataclass
class HubRows:
    """A parquet VQA data set on the hub, columns image, question, multiple_choice_answer, read through `datasets`."""

    name: str
    rows: object

    def __len__(self) -> int:
        return len(self.rows)

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
        raise UserError(
            f"data set {name!r}, split {split!r}: {error}: give a parquet data set that you may read"
        ) from error
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

    def get(self, epoch: int, index: int) -> Example:
        return self.source.get(epoch, self.indices[index])

    def text(self, index: int) -> tuple[str, str, int]:
        return self.source.text(self.indices[index])


def make_data(config) -> tuple[object, dict[str, object]]:
    """The training source of `config.data` and the evaluation sources by name, the headline one first.

    "haystack": the embedded pool; evaluated on the other style's drawings of the trained concepts, then on absent
    needles, then on concepts never trained. "*.jsonl", "vqav2:FOLDER", "hub:NAME": `config.eval_data` of the same form,
    or where that is empty a seeded tenth held out.
    """
    if config.data == "haystack":
        pools = {split: PicturePool(read_pool(splits=(split,))) for split in ("train", "test_style")}
        unseen = PicturePool([p for p in read_pool(splits=("test_concept",)) if p.style == "noto"])
        n, seed = config.eval_samples, config.seed
        sets = {}
        for kind, pool, share in (
            ("", pools["test_style"], 0.0),
            (" absent", pools["test_style"], 1.0),
            (" unseen concepts", unseen, 0.0),
        ):
            for grid in config.grids:
                name = f"{grid}x{grid}{kind}"
                sets[name] = Haystacks(pool, (grid,), share, n, 0, name=f"test/{name}")  # one test set for every seed
        return Haystacks(pools["train"], config.grids, config.negatives, 1 << 16, seed), sets
    source = _read(config.data, "train")
    if config.eval_data:
        held_out = _read(config.eval_data, "val")
        order = list(range(min(len(held_out), config.eval_samples)))
        return source, {held_out.name: Subset(held_out.name, held_out, order)}
    order = list(range(len(source)))
    random.Random(f"held out/{config.seed}").shuffle(order)
    cut = min(config.eval_samples, max(1, len(source) // 10))
    if len(source) < 2:
        raise UserError(f"{config.data}: one row is too few to hold one out: add rows or give --eval_data")
    return Subset("train", source, order[cut:]), {"held out": Subset("held out", source, order[:cut])}


def _read(spec: str, split: str):
    if spec.endswith(".jsonl"):
        return read_jsonl(spec)
    kind, _, rest = spec.partition(":")
    if kind == "vqav2" and rest:
        return read_vqav2(rest, split)
    if kind == "hub" and rest:
        return read_hub(rest, "validation" if split == "val" else split)
    raise UserError(f"data {spec!r} is unknown: give haystack, a .jsonl file, vqav2:FOLDER or hub:NAME")


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
    """Tokens of every row, pictures included and none opened. Raises UserError for a source that makes its rows up."""
    if not hasattr(source, "text"):
        raise UserError(
            "group_by_length needs rows of a file: questions about haystacks are of one length, leave it off"
        )
    texts = (source.text(index) for index in range(len(source)))
    return [len(processor.encode(prefix, suffix, images)[0]) for prefix, suffix, images in texts]


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
        example.images = []  # not needed any more, and large to send between processes
        return example, row, pixels

    def collate(self, items):
        for item in items:
            if isinstance(item, UserError):
                return item
        examples, rows, pixels = zip(*items, strict=True)
        tensors = self.processor.pad(list(rows), "left")
        return examples, {**tensors, "pixel_values": torch.stack([p for row in pixels for p in row])}


def loader(source, processor: PaliGemmaProcessor, batches, with_suffix: bool, workers: int = 0) -> Iterator:
    """Batches of (examples, tensors), padded left, over `batches` of (epoch, index).

    An evaluation loader has `with_suffix` False: the answer never enters its input. Raises UserError for a bad row.
    """

    fetch = _Fetch(source, processor, with_suffix)
    for batch in DataLoader(fetch, batch_sampler=batches, collate_fn=fetch.collate, num_workers=workers):
        if isinstance(batch, UserError):
            raise batch
        yield batch
