"""Needle in a haystack: captioned pictures, stitched grids, questions, and when an answer is exact.

The task is MMNeedle's (Wang et al., arXiv 2406.11230): M stitched pictures of N x N cells, a caption, and the question
which cell it describes. "index, row, column" count from 1; "-1" says that no cell does.
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


@dataclass(frozen=True)
class PoolImage:
    """One captioned picture of a pool; `concept` names what several styles draw. `data`: its bytes, or its file."""

    data: bytes | Path
    caption: str
    concept: str
    style: str
    split: str

    def open(self) -> Image.Image:
        """RGBA where there is something to see through, else RGB. Raises UserError for a broken file."""
        picture = open_image(self.data, name=f"{self.style}/{self.concept}" if isinstance(self.data, bytes) else None)
        return picture.convert("RGBA" if picture.has_transparency_data else "RGB")

    def fingerprint(self) -> bytes:
        """Changes with the picture or its caption; of a file size and time stand for the contents."""
        told = self.data
        if isinstance(told, Path):
            stat = told.stat()
            told = f"{told.name} {stat.st_size} {stat.st_mtime_ns}".encode()
        return hashlib.sha256(told).digest() + self.caption.encode()


def read_pool(path: str | Path = POOL, splits: tuple[str, ...] | None = None) -> list[PoolImage]:
    """Pictures of a pool's parquet file, in file order, of the given splits or of all."""
    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "caption", "concept", "style", "split"])
    except (OSError, KeyError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable picture pool ({error}); see assets/haystack-pool/README.md") from error
    pictures = [PoolImage(*row.values()) for row in table.to_pylist()]
    return [p for p in pictures if splits is None or p.split in splits]


def read_captioned_images(source: str | Path) -> list[PoolImage]:
    """Captioned pictures of a jsonl file of {image, caption}, paths relative to it, or of a folder: sorted by path.

    A folder holds captions.json, {file name: caption}, or beside every picture its caption, cat.txt beside cat.jpg.
    Captions of two pictures may be equal: they then are two drawings of one thing. Raises UserError for the first
    picture or caption that is missing. A caption's split, "train" or, for a fifth of them, "test", follows from its
    text alone: training and evaluation never share one, and a larger folder moves none.
    """
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    captions = _captions_in(source)
    if not captions:
        raise UserError(f"{source}: no captioned picture: give captions.json, a .txt beside each picture, or a .jsonl")
    pictures = []
    for name, caption in sorted(captions.items()):
        if not (folder / name).is_file():
            raise UserError(f"{source}: picture {folder / name} does not exist: mend its caption's entry")
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"{source}: picture {name} has no caption: write one or remove it")
        split = "test" if hashlib.sha256(caption.strip().encode()).digest()[0] < 51 else "train"
        pictures.append(PoolImage(folder / name, caption.strip(), name, source.stem, split))
    return pictures


def _captions_in(source: Path) -> dict[str, str]:
    if source.is_dir():
        if (source / "captions.json").is_file():
            return read_json(source / "captions.json")
        files = [file for file in source.rglob("*") if file.suffix.lower() in Image.registered_extensions()]
        texts = {str(file.relative_to(source)): file.with_suffix(".txt") for file in files}
        return {name: _read_text(text).strip() for name, text in texts.items() if text.is_file()}
    captions = {}
    for number, line in enumerate(_read_text(source).splitlines(), 1):
        try:
            row = json.loads(line)
            captions[row["image"]] = row["caption"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{source}:{number}: not a json object of image and caption: mend the line") from error
    return captions


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}): give captions in UTF-8, or a folder of pictures") from error


# ---- haystacks
@dataclass(frozen=True)
class Haystack:
    """M stitched grids of N x N pool pictures and one caption to find. `cells[m][row][col]` index the pool.

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
    return f"answer en where is {clean(caption)}?"


def clean(caption: str) -> str:
    """A caption on one line, without its last full stop: 5,997 of MMNeedle's have blanks or newlines at an end."""
    return " ".join(caption.split()).rstrip(".")


class ImagePool:
    """Captioned pictures, drawn into cells of one size once and kept, the newest 4,096 of them."""

    def __init__(self, pictures: list[PoolImage]):
        self.pictures = pictures
        self.by_caption: dict[str, list[int]] = {}
        for index, picture in enumerate(pictures):
            self.by_caption.setdefault(picture.caption, []).append(index)
        self.captions = sorted(self.by_caption)
        self._drawn: dict[tuple[int, int], Image.Image] = {}

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
        """One grid as an RGB picture, `cell` pixels a cell, row-major.

        A picture that can be seen through stands on a plain colour of its cell's own, any other fills its cell without
        regard to its aspect, as MMNeedle's do.
        """
        rng = random.Random(key)
        grid = len(cells)
        picture = Image.new("RGB", (grid * cell, grid * cell))
        for row, indices in enumerate(cells):
            for col, index in enumerate(indices):
                x, y = col * cell, row * cell
                least = rng.choice((0, 178))  # any colour or a light one
                picture.paste(tuple(rng.randint(least, 255) for _ in range(3)), (x, y, x + cell, y + cell))
                drawing = self.drawing(index, cell)
                margin = (cell - drawing.width) // 2
                picture.paste(drawing, (x + margin, y + margin), drawing if drawing.mode == "RGBA" else None)
        return picture

    def drawing(self, index: int, cell: int) -> Image.Image:
        """What stands in a cell: RGB of its size, or RGBA with a margin left."""
        if (index, cell) not in self._drawn:
            if len(self._drawn) >= 4096:
                self._drawn.pop(next(iter(self._drawn)))
            picture = self.pictures[index].open()
            side = cell * 7 // 8 if picture.mode == "RGBA" else cell
            self._drawn[index, cell] = picture.resize((side, side), Image.Resampling.LANCZOS)
        return self._drawn[index, cell]


# ---- questions


# ---- scores
