"""Datasets to examples, and examples to batches.

An example is a pure function of (seed, epoch, index): workers have no state, and a run can resume at any batch.
Sources: haystacks made of captioned images, jsonl rows of {image, prefix, suffix} or of {messages, images}, VQAv2 from
its official json files and a COCO folder, and a parquet copy of it on the hub. Every source has

    name                      of an evaluation set, or "train"
    skipped                   why rows were left out
    counts_for_best           whether `best/` may be chosen by it
    chance                    exact accuracy of a guess, or None
    fingerprint()             SHA-256 of what the examples are made of
    get(epoch, index)         an example

and of epoch 0, all but the first without opening an image,

    image(index, place)       one image of a row
    image_name(index, place)  its name: images of one name are the same
    id(index)                 name of the row in messages and logs
    text(index)               prompt, answer, number of images
    answers(index)            all accepted answers, for --metric; not of haystacks
"""

import random
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from errors import UserError
from haystack import (
    OWN_CELL,
    POOL_CELL,
    Haystack,
    ImagePool,
    captions_needed,
    needle_prompt,
    read_captioned_images,
    read_split,
)
from processing_paligemma import Processor, stack_inputs
from rows import Example, HubRows, Rows, read_hub, read_jsonl, read_vqav2, sha256_of, without_address

if TYPE_CHECKING:
    from finetune_original import Config

HAYSTACKS_PER_EPOCH = 1 << 16  # size of an epoch of generated data
HELD_OUT_SHARE = 0.1  # fraction of the rows held out without --eval_data
EPOCH_SEED_STRIDE = 1_000_003  # neighbouring seeds shuffle their epochs differently
BUCKET = 50  # number of batches sorted by length together


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
        settings = [self.shapes, self.negatives, self.size, self.seed, self.name, self.cell, self.recolour]
        return sha256_of([self.pool.fingerprints, *settings])

    def id(self, index: int, epoch: int = 0) -> str:
        return f"{self.name}/{self.seed}/{epoch}/{index}"

    def get(self, epoch: int, index: int) -> Example:
        key = self.id(index, epoch)
        haystack = self.make_haystack(epoch, index)
        images = [self.draw(key, haystack, place) for place in range(len(haystack.cells))]
        return Example(key, images, needle_prompt(*haystack.captions), haystack.answer)

    def image(self, index: int, place: int) -> Image.Image:
        """One image of a question, in epoch 0."""
        return self.draw(self.id(index), self.make_haystack(0, index), place)

    def image_name(self, index: int, place: int) -> str:
        """A name of one image of a question, in epoch 0."""
        return f"{self.id(index)}/{place}"

    def draw(self, key: str, haystack: Haystack, place: int) -> Image.Image:
        return self.pool.stitch(f"{key}/{place}", haystack.cells[place], self.cell, self.recolour)

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

    def image(self, index: int, place: int) -> Image.Image:
        """One image of a row."""
        return self.source.image(self.indices[index], place)

    def image_name(self, index: int, place: int) -> str:
        """The name of one image of a row."""
        return self.source.image_name(self.indices[index], place)

    def text(self, index: int) -> tuple[str, str, int]:
        """Prefix, suffix and number of images."""
        return self.source.text(self.indices[index])

    def answers(self, index: int) -> tuple[str, ...]:
        """All accepted answers."""
        return self.source.answers(self.indices[index])


Source = Haystacks | Rows | HubRows | Subset


def make_data(config: "Config") -> tuple[Source, dict[str, Source]]:
    """The training source of `config.data`, and the evaluation sources by name, the headline one first.

    "haystack": the included pool; "haystack:IMAGES": your own images; "*.jsonl", "vqav2:FOLDER", "hub:NAME",
    "hub:NAME@SPLIT": evaluated on `config.eval_data`, of one of these forms, or if that is empty, on a tenth held out.
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
        order = shuffled_rows(held_out)[: config.eval_samples]
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

    The included pool is evaluated on the drawing styles of training, on a style that is never trained on, and on
    concepts that are never trained on; images of `own`, a folder or a jsonl file, on the fifth of their captions that
    is never trained on.
    """
    shapes = config.shapes or tuple((1, grid) for grid in config.grids)
    if own:
        images, cell = read_captioned_images(own), OWN_CELL
        splits = ([image for image in images if image.split == split] for split in ("train", "test"))
        train, test = map(ImagePool, splits)
        check_captions(own, train, test, max(grid for _, grid in shapes))
        kinds = [("", test, 0.0, True), (" absent", test, 1.0, False)]
    else:
        cell, splits = POOL_CELL, ("train", "test_style", "test_concept")
        train, test, unseen = (ImagePool(read_split("", split)) for split in splits)
        kinds = [(" trained styles", train, 0.0, False), (" unseen style", test, 0.0, True)]
        kinds += [(" unseen style, absent", test, 1.0, False), (" unseen concepts", unseen, 0.0, False)]
    size, sets = config.eval_samples, {}
    for kind, pool, negatives, counts_for_best in kinds:
        for shape in shapes:
            name = f"{shape[0]} of " * (shape[0] > 1) + f"{shape[1]}x{shape[1]}{kind}"
            sets[name] = Haystacks(  # seed 0: the same test sets for every training seed
                pool, (shape,), negatives, size, 0, f"test/{name}", cell, counts_for_best
            )
    source = Haystacks(
        train,
        shapes,
        config.negatives,
        HAYSTACKS_PER_EPOCH,
        config.seed,
        cell=cell,
        recolour=config.recolour,
    )
    return source, sets


def check_captions(own: str, train: ImagePool, test: ImagePool, grid: int) -> None:
    """Raise UserError unless both splits have a caption for every cell of the largest grid, plus one."""
    counts = [len(pool.captions) for pool in (train, test)]
    need = grid * grid + 1
    if min(counts) < need:
        raise UserError(
            f"haystack:{own}: {sum(counts)} captions, of which {counts[1]} are kept for testing, but {grid} x {grid} "
            f"cells and an absent needle need {need} in training and {need} in testing: give about "
            f"{captions_needed(need)} captions, or smaller --grids"
        )


def hold_out(source: Rows | HubRows, config: "Config") -> tuple[list[int], list[int], str]:
    """Indices to train on, indices to evaluate on, and a name for the latter.

    A tenth of the rows is held out, and the first `config.eval_samples` of them are evaluated. Which ones depends only
    on the rows, so no other run, whatever its seed, has trained on them. Rows that share an image stay together, unless
    too many rows are connected; the name then says so.
    """
    order = shuffled_rows(source)
    count = max(1, int(len(source) * HELD_OUT_SHARE))
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
    return [i for i in order if i not in held], [i for i in order if i in held][: config.eval_samples], name


def shuffled_rows(source: Rows | HubRows) -> list[int]:
    """All row indices in an order that depends only on their number, so that the first ones are not those of a sorted
    file."""
    order = list(range(len(source)))
    random.Random("held out").shuffle(order)
    return order


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


def ignore_signals(worker: int):
    """For `worker_init_fn`: a data loading process ignores SIGTERM and Ctrl-C, which a launcher or a terminal sends to
    all processes; the main process stops after a checkpoint, and its workers with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


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
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    ):
        for error in errors:
            if skip is None:
                raise error
            skip(error)
        if tensors is None:
            raise UserError(f"{source.name}: none of its {len(source)} rows can be used: check its images")
        yield examples, tensors
