"""Needle in a haystack: captioned images, stitched grids, and the short question.

The task is MMNeedle's (Wang et al., arXiv 2406.11230): M stitched images of N x N cells, a caption, and the question
which cell it describes. The answer is "index, row, column", counted from 1, or "-1" for none. Does not import torch.
"""

import codecs
import hashlib
import os
import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import pyarrow.parquet
from PIL import Image

from config_fields import QUESTION_TASK
from errors import UserError
from files import (
    HASHED_IMAGES,
    decode_typed,
    grey16_to_grey8,
    open_image,
    read_bytes,
    read_typed,
    reading,
    resolve_inside,
)

POOL_CELL, OWN_CELL = 64, 256  # side of a cell in pixels, for the included images and for your own
POOL = Path(__file__).parent / "assets" / "haystack-pool" / "pool.parquet"
TEST_SHARE = 5  # one in five captions of your own images is for testing
TEST_BYTES = 256 // TEST_SHARE  # captions whose hash starts with a byte below this are for testing
MARGIN = 1 / 16  # fraction of a cell left free on each side of a transparent image
LIGHT = 178  # the darkest level of a light background colour
RESIZED_BYTES = 256 << 20  # of resized images that a pool caches
SATURATION = 0.5, 1.5  # range of the random factor on the difference from grey in training
GAIN_STD, BRIGHTNESS_STD = 0.15, 0.1  # of the random colours in training, for channels in 0..1


@dataclass(frozen=True)
class PoolImage:
    """One captioned image of a pool; `concept` names what it shows, in any style. `data`: its bytes, or its file."""

    data: bytes | Path
    caption: str
    concept: str
    style: str
    split: str

    def open(self) -> Image.Image:
        """The image, RGBA if any of it is transparent, else RGB. Raises UserError for a broken file."""
        image = open_image(self.data, name=f"{self.style}/{self.concept}" if isinstance(self.data, bytes) else None)
        return grey16_to_grey8(image).convert("RGBA" if image.has_transparency_data else "RGB")

    def fingerprint(self, with_contents: bool = True) -> bytes:
        """Bytes that change with the image or its caption, and for a file with its name; without its contents, its size
        stands for them."""
        data = self.data
        if isinstance(data, Path):
            with reading(data):
                size = data.stat().st_size
            contents = hashlib.sha256(read_bytes(data)).hexdigest() if with_contents else ""
            data = f"{self.concept} {size} {contents}".encode()
        return hashlib.sha256(data).digest() + self.caption.encode()


def read_pool(splits: tuple[str, ...] | None = None) -> list[PoolImage]:
    """The included images, in file order, of the given splits or of all."""
    try:
        table = pyarrow.parquet.read_table(POOL, columns=["image", "caption", "concept", "style", "split"])
    except (OSError, KeyError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{POOL}: not a readable image pool ({error}); see assets/haystack-pool/README.md") from error
    images = [PoolImage(*row.values()) for row in table.to_pylist()]
    return [image for image in images if splits is None or image.split in splits]


def read_split(source: str, split: str) -> list[PoolImage]:
    """The images of one split of `source`, a folder or a jsonl file, or of the included pool if it is empty.

    The included concepts that are never trained on come in style `noto` only, like the split test_style.
    """
    images = [image for image in (read_captioned_images(source) if source else read_pool()) if image.split == split]
    if not source and split == "test_concept":
        images = [image for image in images if image.style == "noto"]
    return images


def read_captioned_images(source: str | Path) -> list[PoolImage]:
    """Captioned images of a folder, or of a jsonl file of {image, caption} with paths relative to it, sorted by path.

    A folder holds captions.json, {file name: caption}, or a text file with the caption beside every image, cat.txt for
    cat.jpg. Captions are cleaned by `clean_caption`; two images with the same caption are two drawings of one thing. A
    caption's split, "train" or, for a fifth of them, "test", depends only on its text: training and evaluation never
    share a caption, and adding images does not move any. Raises UserError for the first image or caption that is
    missing.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    captions = read_caption_texts(source)
    if not captions:
        raise UserError(f"{source}: no captioned image: give captions.json, a .txt beside each image, or a .jsonl")
    images = []
    for name, caption in sorted(captions.items()):
        try:
            resolve_inside(folder, name)
        except UserError as error:
            raise UserError(f"{source}: image {error}") from error
        if not os.path.isfile(folder / name):  # False also for a name that no file can have
            raise UserError(f"{source}: image {folder / name} does not exist: correct the entry of its caption")
        caption = clean_caption(caption)  # what the prompt asks for: captions that differ only in blanks are one
        if not caption:
            raise UserError(f"{source}: image {name} has no caption: write one or remove the image")
        is_test = hashlib.sha256(caption.encode()).digest()[0] < TEST_BYTES
        images.append(PoolImage(folder / name, caption, name, source.stem, "test" if is_test else "train"))
    return images


def captions_needed(test: int) -> int:
    """Number of different captions of which, with a probability of 95 %, at least `test` are for testing."""
    from scipy.stats import nbinom  # takes a second to import, for a message only

    return test + int(nbinom.ppf(0.95, test, TEST_BYTES / 256))


class CaptionRow(msgspec.Struct):
    """One line of a jsonl file of captioned images."""

    image: Annotated[str, msgspec.Meta(min_length=1)]
    caption: str


def read_caption_texts(source: Path) -> dict[str, str]:
    """Image path, relative to its folder -> caption."""
    if source.is_dir():
        if (source / "captions.json").is_file():
            return read_typed(source / "captions.json", dict[str, str], "give {file name: caption}")
        files = [file for file in source.rglob("*") if file.suffix.lower() in Image.registered_extensions()]
        texts = {str(file.relative_to(source)): file.with_suffix(".txt") for file in files}
        return {name: read_text(text).strip() for name, text in texts.items() if text.is_file()}
    captions = {}
    for number, line in enumerate(read_bytes(source).removeprefix(codecs.BOM_UTF8).splitlines(), 1):
        if line.strip():
            row = decode_typed(line, CaptionRow, f"{source}:{number}", "give {image, caption} on every line")
            if row.image in captions:
                raise UserError(f"{source}:{number}: {row.image} has a caption already: delete one of the lines")
            captions[row.image] = row.caption
    return captions


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises UserError when it cannot be read."""
    try:
        return read_bytes(file).decode("utf-8-sig")  # without the mark that Windows puts at the start
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read ({error}): give captions in UTF-8") from error


# ---- haystacks
@dataclass(frozen=True)
class Haystack:
    """M stitched grids of N x N pool images, and K captions to find. `cells[m][row][column]` index the pool.

    `needles` are K places (image, row, column), counted from 0, or empty if no cell shows the captions. `targets`
    index the K pool images that the captions describe.
    """

    cells: tuple[tuple[tuple[int, ...], ...], ...]
    needles: tuple[tuple[int, int, int], ...]
    targets: tuple[int, ...]
    captions: tuple[str, ...]

    @property
    def answer(self) -> str:
        """MMNeedle's answer: "index, row, column" counted from 1, "; " between needles, or "-1"."""
        return "; ".join(", ".join(str(i + 1) for i in place) for place in self.needles) or "-1"


def arrange(indices: list[int], images: int, grid: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """`Haystack.cells`: pool indices, image by image and row by row, as M grids of N x N."""
    rows = [tuple(indices[start : start + grid]) for start in range(0, images * grid**2, grid)]
    return tuple(tuple(rows[m * grid : (m + 1) * grid]) for m in range(images))


def needle_prompt(*captions: str) -> str:
    """The short question of the `finetuned` protocol, in the form of PaliGemma's question answering."""
    return f"{QUESTION_TASK}where is {'; '.join(map(clean_caption, captions))}?"


def clean_caption(caption: str) -> str:
    """A caption on one line, without its last full stop; 5,997 of MMNeedle's begin or end with blanks or newlines."""
    return " ".join(caption.split()).rstrip(".")


class ImagePool:
    """Captioned images from which haystacks are made. The newest resized images are cached."""

    def __init__(self, images: list[PoolImage]):
        self.images = images
        self.by_caption: dict[str, list[int]] = {}
        for index, image in enumerate(images):
            self.by_caption.setdefault(image.caption, []).append(index)
        self.captions = sorted(self.by_caption)
        self._resized: dict[tuple[int, int], Image.Image] = {}

    @cached_property
    def fingerprints(self) -> list[str]:
        """A fingerprint of each image; files of up to HASHED_IMAGES images are compared by content."""
        with_contents = len(self.images) <= HASHED_IMAGES
        return [image.fingerprint(with_contents).hex() for image in self.images]

    def make(self, key: str, images: int, grid: int, positive: bool, needles: int = 1) -> Haystack:
        """The haystack of a key, for training and for evaluation: the same key, pool and arguments give the same one in
        any process.

        Captions do not repeat within an image, and a needle's caption is in no other cell of any image. The positive
        and the negative haystack of a key have the same cells. Raises UserError when the pool has too few captions.
        """
        if grid**2 + needles > len(self.captions):
            raise UserError(
                f"{grid} x {grid} cells and {needles} absent captions need {grid**2 + needles} captions, the pool has "
                f"{len(self.captions)}: use fewer cells or a larger pool"
            )
        rng = random.Random(key)
        drawn = rng.sample(self.captions, grid**2 + needles)
        shown, absent = drawn[: grid**2], drawn[grid**2 :]
        others = [caption for caption in self.captions if caption not in absent]
        for _ in range(images - 1):
            shown += rng.sample(others, grid**2)
        indices = [rng.choice(self.by_caption[caption]) for caption in shown]
        places = [(m, row, column) for m in range(images) for row in range(grid) for column in range(grid)]
        cells = arrange(indices, images, grid)
        times = Counter(shown)
        unique = [i for i, caption in enumerate(shown) if times[caption] == 1]
        if len(unique) < needles:
            raise UserError(
                f"{images} x {grid} x {grid} cells: {len(unique)} captions are in one cell alone, {needles} needed: "
                "use fewer cells or a larger pool"
            )
        chosen = rng.sample(unique, needles)
        if positive:
            found, targets = tuple(places[i] for i in chosen), tuple(indices[i] for i in chosen)
        else:
            found, targets = (), tuple(rng.choice(self.by_caption[caption]) for caption in absent)
        return Haystack(cells, found, targets, tuple(self.images[i].caption for i in targets))

    def add_distractors(
        self, key: str, caption: str, others: list[str], images: int, grid: int, positive: bool
    ) -> Haystack:
        """A haystack with `caption` hidden among its distractors `others`, in random order; if `positive` is False,
        without `caption`.

        No caption is in two cells. Raises UserError when there are fewer captions than cells.
        """
        rng = random.Random(key)
        count = images * grid**2
        shown = [caption, *others][not positive :][:count]
        if len(shown) < count:
            raise UserError(f"{key}: {count} cells, but {len(shown)} captions to fill them: give more distractors")
        rng.shuffle(shown)
        indices = [rng.choice(self.by_caption[name]) for name in shown]
        target = rng.choice(self.by_caption[caption])
        cells = arrange(indices, images, grid)
        needles = ()
        if positive:
            place = shown.index(caption)
            target = indices[place]
            needles = ((place // grid**2, place // grid % grid, place % grid),)
        return Haystack(cells, needles, (target,), (caption,))

    def stitch(self, key: str, cells: tuple[tuple[int, ...], ...], cell: int, recolour: bool = False) -> Image.Image:
        """One grid as an RGB image, with cells of `cell` x `cell` pixels.

        A transparent image is drawn on a random plain colour, any other is stretched to fill its cell, as in MMNeedle.
        With `recolour` every image is drawn in random colours, see `recolour_image`.
        """
        rng = random.Random(key)
        colours = random.Random(f"{key}/colours")
        grid = len(cells)
        stitched = Image.new("RGB", (grid * cell, grid * cell))
        for row, indices in enumerate(cells):
            for column, index in enumerate(indices):
                x, y = column * cell, row * cell
                darkest = rng.choice((0, LIGHT))  # any colour or a light one
                stitched.paste(tuple(rng.randint(darkest, 255) for _ in range(3)), (x, y, x + cell, y + cell))
                image = self.resized(index, cell)
                if recolour:
                    image = recolour_image(image, colours)
                margin = (cell - image.width) // 2
                stitched.paste(image, (x + margin, y + margin), image if image.mode == "RGBA" else None)
        return stitched

    def resized(self, index: int, cell: int) -> Image.Image:
        """The image of a pool index as drawn in a cell: RGB of the cell's size, or RGBA that leaves a margin."""
        if (index, cell) not in self._resized:
            if len(self._resized) >= RESIZED_BYTES // (4 * cell * cell):
                self._resized.pop(next(iter(self._resized)))
            image = self.images[index].open()
            side = int(cell * (1 - 2 * MARGIN)) if image.mode == "RGBA" else cell
            self._resized[index, cell] = image.resize((side, side), Image.Resampling.LANCZOS)
        return self._resized[index, cell]


def recolour_image(image: Image.Image, rng: random.Random) -> Image.Image:
    """An RGB or RGBA image with random saturation (0.5 to 1.5), channel gains and brightness; transparency stays.

    The augmentation that the included model was pretrained with.
    """
    pixels = np.asarray(image, np.float32) / 255
    colour = pixels[..., :3]
    grey = colour.mean(-1, keepdims=True)
    gain = np.array([rng.gauss(1, GAIN_STD) for _ in range(3)], np.float32)
    colour = (grey + rng.uniform(*SATURATION) * (colour - grey)) * gain + rng.gauss(0, BRIGHTNESS_STD)
    colour = (colour.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.concatenate((colour, np.asarray(image)[..., 3:]), axis=-1), image.mode)


def add_noise(image: Image.Image, key: str, std: float) -> Image.Image:
    """An RGB image plus Gaussian noise of standard deviation `std`, for channels in 0..1; clipped."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    pixels = np.asarray(image, np.float32) / 255
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, np.float32)
    return Image.fromarray(((pixels + std * noise).clip(0, 1) * 255).round().astype(np.uint8))
