"""Needle in a haystack: captioned images, stitched grids, and the short question.

The task is MMNeedle's (Wang et al., arXiv 2406.11230): M stitched images of N x N cells, a caption, and the question
which cell it describes. "index, row, column" count from 1; "-1" says that no cell does. No torch is imported here.
"""

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
from PIL import Image

from errors import UserError
from files import open_image, read_json

POOL = Path(__file__).parent / "assets" / "haystack-pool" / "pool.parquet"
TEST_BYTES = 51  # of the 256 first bytes that a caption's hash can have: a fifth of captions is for testing
LIGHT = 178  # the darkest level of a light background colour
DRAWN_IMAGES = 4096  # resized images that a pool remembers


@dataclass(frozen=True)
class PoolImage:
    """One captioned image of a pool; `concept` names what several styles draw. `data`: its bytes, or its file."""

    data: bytes | Path
    caption: str
    concept: str
    style: str
    split: str

    def open(self) -> Image.Image:
        """The image, RGBA where it is transparent somewhere, else RGB. Raises UserError for a broken file."""
        image = open_image(self.data, name=f"{self.style}/{self.concept}" if isinstance(self.data, bytes) else None)
        return image.convert("RGBA" if image.has_transparency_data else "RGB")

    def fingerprint(self) -> bytes:
        """Changes with the image or its caption; size and time of a file stand for its contents."""
        data = self.data
        if isinstance(data, Path):
            stat = data.stat()
            data = f"{data.name} {stat.st_size} {stat.st_mtime_ns}".encode()
        return hashlib.sha256(data).digest() + self.caption.encode()


def read_pool(path: str | Path = POOL, splits: tuple[str, ...] | None = None) -> list[PoolImage]:
    """Images of a pool's parquet file, in file order, of the given splits or of all."""
    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "caption", "concept", "style", "split"])
    except (OSError, KeyError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable image pool ({error}); see assets/haystack-pool/README.md") from error
    images = [PoolImage(*row.values()) for row in table.to_pylist()]
    return [image for image in images if splits is None or image.split in splits]


def read_captioned_images(source: str | Path) -> list[PoolImage]:
    """Captioned images of a jsonl file of {image, caption}, paths relative to it, or of a folder: sorted by path.

    A folder holds captions.json, {file name: caption}, or beside every image its caption, cat.txt beside cat.jpg.
    Two images may have one caption: they then are two drawings of one thing. Raises UserError for the first image or
    caption that is missing. A caption's split, "train" or, for a fifth of them, "test", follows from its text alone:
    training and evaluation never share one, and images that are added later move none.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    captions = read_caption_texts(source)
    if not captions:
        raise UserError(f"{source}: no captioned image: give captions.json, a .txt beside each image, or a .jsonl")
    images = []
    for name, caption in sorted(captions.items()):
        if not (folder / name).is_file():
            raise UserError(f"{source}: image {folder / name} does not exist: correct the entry of its caption")
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"{source}: image {name} has no caption: write one or remove the image")
        is_test = hashlib.sha256(caption.strip().encode()).digest()[0] < TEST_BYTES
        images.append(PoolImage(folder / name, caption.strip(), name, source.stem, "test" if is_test else "train"))
    return images


def read_caption_texts(source: Path) -> dict[str, str]:
    """Image path, relative to its folder -> caption."""
    if source.is_dir():
        if (source / "captions.json").is_file():
            return read_json(source / "captions.json")
        files = [file for file in source.rglob("*") if file.suffix.lower() in Image.registered_extensions()]
        texts = {str(file.relative_to(source)): file.with_suffix(".txt") for file in files}
        return {name: read_text(text).strip() for name, text in texts.items() if text.is_file()}
    captions = {}
    for number, line in enumerate(read_text(source).splitlines(), 1):
        try:
            row = json.loads(line)
            captions[row["image"]] = row["caption"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{source}:{number}: not a json object of image and caption: correct the line") from error
    return captions


def read_text(file: Path) -> str:
    """The text of a UTF-8 file. Raises UserError when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): give captions in UTF-8, or a folder of images") from error


# ---- haystacks
@dataclass(frozen=True)
class Haystack:
    """M stitched grids of N x N pool images and one caption to find. `cells[m][row][column]` index the pool.

    `needle` is (image, row, column), counted from 0, or None when no cell shows the caption.
    """

    cells: tuple[tuple[tuple[int, ...], ...], ...]
    needle: tuple[int, int, int] | None
    caption: str

    @property
    def answer(self) -> str:
        """MMNeedle's answer: "index, row, column" counted from 1, or "-1"."""
        return "-1" if self.needle is None else ", ".join(str(i + 1) for i in self.needle)


def needle_prompt(caption: str) -> str:
    """The short question of the `finetuned` protocol, in the form of PaliGemma's question answering."""
    return f"answer en where is {clean_caption(caption)}?"


def clean_caption(caption: str) -> str:
    """A caption on one line, without its last full stop: 5,997 of MMNeedle's have blanks or newlines at an end."""
    return " ".join(caption.split()).rstrip(".")


class ImagePool:
    """Captioned images, from which haystacks are made. Resized images are remembered, the newest `DRAWN_IMAGES`."""

    def __init__(self, images: list[PoolImage]):
        self.images = images
        self.by_caption: dict[str, list[int]] = {}
        for index, image in enumerate(images):
            self.by_caption.setdefault(image.caption, []).append(index)
        self.captions = sorted(self.by_caption)
        self._resized: dict[tuple[int, int], Image.Image] = {}

    def make(self, key: str, images: int, grid: int, positive: bool) -> Haystack:
        """The haystack of a key: the same key and pool give the same one, in any process. Captions do not repeat."""
        rng = random.Random(key)
        cells = images * grid * grid
        if cells + 1 > len(self.captions):
            raise UserError(
                f"{images} x {grid} x {grid} cells and a needle outside need {cells + 1} captions, the pool has "
                f"{len(self.captions)}: use fewer cells or a larger pool"
            )
        *inside, outside = rng.sample(self.captions, cells + 1)
        drawn = [rng.choice(self.by_caption[caption]) for caption in inside]
        place = rng.randrange(cells)
        shape = tuple(
            tuple(tuple(drawn[(m * grid + row) * grid :][:grid]) for row in range(grid)) for m in range(images)
        )
        needle = (place // grid**2, place // grid % grid, place % grid) if positive else None
        return Haystack(shape, needle, inside[place] if positive else outside)

    def stitch(self, key: str, cells: tuple[tuple[int, ...], ...], cell: int) -> Image.Image:
        """One grid as an RGB image, `cell` pixels a cell, row-major.

        A transparent image stands on a plain colour of its cell's own, any other fills its cell without regard to its
        aspect ratio, as MMNeedle's do.
        """
        rng = random.Random(key)
        grid = len(cells)
        stitched = Image.new("RGB", (grid * cell, grid * cell))
        for row, indices in enumerate(cells):
            for column, index in enumerate(indices):
                x, y = column * cell, row * cell
                darkest = rng.choice((0, LIGHT))  # any colour or a light one
                stitched.paste(tuple(rng.randint(darkest, 255) for _ in range(3)), (x, y, x + cell, y + cell))
                image = self.resized(index, cell)
                margin = (cell - image.width) // 2
                stitched.paste(image, (x + margin, y + margin), image if image.mode == "RGBA" else None)
        return stitched

    def resized(self, index: int, cell: int) -> Image.Image:
        """The image of an index as it stands in a cell: RGB of the cell's size, or RGBA that leaves a margin."""
        if (index, cell) not in self._resized:
            if len(self._resized) >= DRAWN_IMAGES:
                self._resized.pop(next(iter(self._resized)))
            image = self.images[index].open()
            side = cell * 7 // 8 if image.mode == "RGBA" else cell
            self._resized[index, cell] = image.resize((side, side), Image.Resampling.LANCZOS)
        return self._resized[index, cell]
