"""MMNeedle's settings and the prompts of every protocol. Does not import torch."""

from dataclasses import dataclass
from functools import cache
from itertools import product

from errors import UserError
from haystack import clean_caption, needle_prompt

ABSENT = "-1"
PROTOCOLS = {  # protocol -> longest answer, in tokens per needle
    "official": 30,  # the benchmark's prompt, word for word
    "finetuned": 12,  # a short question in PaliGemma's form, answered "1, 2, 1" or "-1"
    "rank": 12,  # the short question; all possible answers are ranked, none is generated: a different metric
    "quadrant": 100,  # two questions about halves of the image (arXiv 2507.15875), 2 x 2 only
    "detect": 40,  # PaliGemma's own task; the answer is the cell that contains the centre of the box
}


SAMPLES = {1: 1000, 2: 100, 5: 100}  # number of needles -> number of positives, and of negatives, in the paper
OTHER_SAMPLES = 100  # for other numbers of needles


@dataclass(frozen=True)
class Setting:
    """M images per question, N x N cells per image, K needles."""

    images: int
    grid: int
    needles: int = 1

    def __str__(self) -> str:
        return f"{self.images}x{self.grid}x{self.grid}" + (f" K={self.needles}" if self.needles > 1 else "")

    @property
    def annotations(self) -> str:
        """The name of the question file in the release."""
        start = f"{self.needles}_" if self.needles > 1 else ""
        return f"{start}annotations_{self.images}_{self.grid}_{self.grid}.json"

    @property
    def default_samples(self) -> int:
        """The number of positives, and of negatives, that the paper evaluates."""
        return SAMPLES.get(self.needles, OTHER_SAMPLES)

    def cells(self) -> list[tuple[int, int, int]]:
        """Every (image, row, column), counted from 0."""
        return list(product(range(self.images), range(self.grid), range(self.grid)))


def make_settings(images: tuple[int, ...], grids: tuple[int, ...], needles: tuple[int, ...]) -> list[Setting]:
    """All combinations except 1 image of 1 x 1 cells, which the benchmark excludes. Raises UserError if none is left,
    and for numbers below 1."""
    shapes = dict.fromkeys(product(images, grids, needles))  # without duplicates
    settings = [Setting(*shape) for shape in shapes if shape[:2] != (1, 1)]
    if not settings or any(min(s.images, s.grid, s.needles) < 1 for s in settings):
        raise UserError(
            f"--images {images} --grids {grids} --needles {needles}: give numbers from 1, and not 1 x 1 alone"
        )
    return settings


def check_protocol(protocol: str, setting: Setting):
    """Raise UserError if a protocol does not support a setting."""
    fits = {
        "quadrant": (setting.images, setting.grid, setting.needles) == (1, 2, 1),
        "detect": (setting.images, setting.needles) == (1, 1),
        "rank": setting.needles == 1,
    }
    if not fits.get(protocol, True):
        takes = {"quadrant": "1 image of 2x2 cells", "detect": "1 image", "rank": "any images"}[protocol]
        raise UserError(
            f"--protocol={protocol} asks {takes} and 1 needle, not {setting}: change --images, --grids, --needles"
        )


def make_prompts(protocol: str, setting: Setting, captions: list[str]) -> dict[str, str]:
    """Axis -> prompt: two prompts for `quadrant`, one under "" for the other protocols."""
    if protocol == "quadrant":
        return quadrant_prompts(captions[0])
    if protocol == "official":
        return {"": official_prompt(setting, captions)}
    if protocol == "detect":
        return {"": f"detect {clean_caption(captions[0])}"}
    return {"": needle_prompt(*captions)}


def official_prompt(setting: Setting, captions: list[str]) -> str:
    """The benchmark's data-protocol prompt, word for word, with the captions unchanged."""
    images = "images" if setting.images > 1 else "image"
    subimages = "subimages" if setting.grid > 1 else "subimage"
    head = (
        f"Given {setting.images} {images} indexed from 1 to {setting.images}, each divided into "
        f"{setting.grid}*{setting.grid} {subimages}, identify the "
    )
    example = "For example, '1, 2, 3' indicates the subimage in the first image, second row, and third column. "
    if setting.needles == 1:
        return (
            f"{head}subimage that best matches the provided caption. Respond with 'index, row, column' and nothing "
            f"else. {example}If no match is found, respond only with '-1'.\nCaption: {captions[0]}"
        )
    form = "; ".join(f"index_{k}, row_{k}, column_{k}" for k in range(1, setting.needles + 1))
    listed = "\n".join(f"Caption_{k}: {caption}" for k, caption in enumerate(captions, 1))
    return (
        f"{head}subimages that best match the provided {setting.needles} captions. Respond in the format: {form}. Only "
        f"provide this information. {example}If no subimage matches a caption, respond with '-1' for that caption.\n"
        f"{listed}"
    )


def quadrant_prompts(caption: str) -> dict[str, str]:
    """The two questions of arXiv 2507.15875's evaluation, word for word: a caption's own full stop is doubled."""
    return {
        "rows": f"Caption: {caption}. Where is the caption? Top or Bottom?",
        "columns": f"Caption: {caption}. Where is the caption? Left or Right?",
    }


@cache
def make_candidates(setting: Setting) -> tuple[str, ...]:
    """All answers that `rank` compares: every cell, then "-1"."""
    return (*(", ".join(str(n + 1) for n in cell) for cell in setting.cells()), ABSENT)
