"""Needle in a haystack: picture pools, stitched grids, questions and scores.

The task is MMNeedle's (Wang et al., arXiv 2406.11230): M stitched pictures of N x N cells, a caption, and the question
which cell it describes. "index, row, column" count from 1; "-1" says that no cell does.
"""

import io
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
from PIL import Image

from errors import UserError

POOL = Path(__file__).parent / "assets" / "haystack-pool" / "pool.parquet"


@dataclass(frozen=True)
class Picture:
    """One captioned picture of a pool; `concept` names what several styles draw."""

    data: bytes
    caption: str
    concept: str
    style: str
    split: str

    def open(self) -> Image.Image:
        return Image.open(io.BytesIO(self.data)).convert("RGBA")


def read_pool(path: str | Path = POOL, splits: tuple[str, ...] | None = None) -> list[Picture]:
    """Pictures of a pool's parquet file, in file order, of the given splits or of all."""
    try:
        table = pyarrow.parquet.read_table(path, columns=["image", "caption", "concept", "style", "split"])
    except (OSError, KeyError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: not a readable picture pool ({error}); see assets/haystack-pool/README.md") from error
    pictures = [Picture(*row.values()) for row in table.to_pylist()]
    return [p for p in pictures if splits is None or p.split in splits]


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
    return f"answer en where is {caption}?"


class PicturePool:
    """Captioned pictures, drawn into cells of one size once and kept."""

    def __init__(self, pictures: list[Picture]):
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
        """One grid as an RGB picture, `cell` pixels a cell, row-major, each drawing on a plain colour of its own."""
        rng = random.Random(key)
        grid = len(cells)
        picture = Image.new("RGB", (grid * cell, grid * cell))
        side = cell * 7 // 8
        for row, indices in enumerate(cells):
            for col, index in enumerate(indices):
                x, y = col * cell, row * cell
                least = rng.choice((0, 178))  # any colour or a light one
                picture.paste(tuple(rng.randint(least, 255) for _ in range(3)), (x, y, x + cell, y + cell))
                drawing = self.drawing(index, side)
                picture.paste(drawing, (x + (cell - side) // 2, y + (cell - side) // 2), drawing)
        return picture

    def drawing(self, index: int, side: int) -> Image.Image:
        if (index, side) not in self._drawn:
            self._drawn[index, side] = self.pictures[index].open().resize((side, side), Image.Resampling.LANCZOS)
        return self._drawn[index, side]


# ---- questions
@dataclass(frozen=True)
class Question:
    """One question of a benchmark. `images` are paths of picture files, in prompt order; `truth` as the benchmark
    writes it, json-able; `setting` names what is scored apart; `told` goes into the answer file as it is.

    Its answer is one json object a line: {"id", "setting", "prompt", "response", "ground_truth", "images", "seconds",
    **told}. `response` is None where a picture or the row was broken ("error" says why): wrong, and in every
    denominator. All scores are computed from such rows alone.
    """

    id: str
    setting: str
    images: tuple[str, ...]
    prompt: str
    truth: object
    max_new_tokens: int
    told: dict


# ---- scores
def normalise(response: str) -> str:
    """MMNeedle's normalisation: newlines deleted, blanks and full stops stripped."""
    return response.replace("\n", "").strip().strip(".").strip()


def is_exact(response: str, answer: str) -> bool:
    """MMNeedle's strict exact match for one needle; a negative's answer is "-1". Other answers go by the same rule."""
    return normalise(response) == normalise(answer)
