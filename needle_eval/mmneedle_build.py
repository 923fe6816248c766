"""Haystacks of captioned images in the files and keys of MMNeedle's release, built once. No torch is imported here."""

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from errors import UserError
from files import atomic_folder, write_json
from haystack import ImagePool, PoolImage, read_captioned_images, read_pool
from needle_eval.mmneedle_prompts import Setting

if TYPE_CHECKING:
    from eval_mmnih import Config

CACHE = Path("runs/haystacks")
NEGATIVES_FROM = 5000  # ids below are positives
BUILDER = 2  # raise it when `build` would write other bytes: older caches are then left alone


def build_haystacks(config: "Config", settings: list[Setting]) -> Path:
    """The folder of haystacks that `config` asks for, in the release's schema; what is not there yet is built.

    Evaluations that start together build it once, one of them at a time.
    """
    source = config.data.partition(":")[2]
    split = config.split or ("test" if source else "test_style")
    images = [image for image in (read_captioned_images(source) if source else read_pool()) if image.split == split]
    if not source and split == "test_concept":
        images = [image for image in images if image.style == "noto"]  # never trained, as in test_style
    if not images:
        raise UserError(f"--split={split}: {config.data} has no such images")
    cell, samples = config.cell or (256 if source else 64), config.samples or 1000
    name = f"{Path(source).resolve().stem if source else 'embedded'}-{split}"
    folder = cache_folder(CACHE, name, images, config.seed, samples, cell)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        pool = ImagePool(images)
        for setting in settings:
            build(pool, folder, setting, samples, config.seed, cell)
    return folder


def build(pool: ImagePool, folder: Path, setting: Setting, samples: int, seed: int, cell: int):
    """Write `samples` positives and as many negatives into `folder`, in the release's files; what is there stays.

    `cell` is the side of a cell in pixels. The same pool and numbers give the same bytes. With one image a question
    every stitched image serves one positive and one negative, several are drawn for every question. A needle's caption
    is in no second cell, a negative's in none. Raises UserError when the pool has too few captions.
    """
    if samples > NEGATIVES_FROM:
        raise UserError(f"--samples={samples}: at most {NEGATIVES_FROM}, where the ids of negatives begin")
    if setting.images > samples:
        raise UserError(f"--samples={samples}: {setting} needs at least {setting.images} stitched images")
    grids = write_stitched(pool, folder, setting, samples, seed, cell)
    file = folder / "metadata_stitched" / setting.annotations
    if file.exists():
        return
    names = [name_of(image) for image in pool.images]
    captions = {name: image.caption for name, image in zip(names, pool.images, strict=True)}
    write_json(folder / "annotations_trainval" / "file_to_caption.json", captions)
    order = list(grids)
    random.Random(f"{seed}/{setting}/order").shuffle(order)
    rows = []
    for start in (0, NEGATIVES_FROM):
        for at in range(samples):
            rng = random.Random(f"{seed}/{setting}/{start + at}")
            images = [order[at]] if setting.images == 1 else rng.sample(order, setting.images)
            cells = {place: grids[images[place[0]]][place[1]][place[2]] for place in setting.cells()}
            places, targets = (choose_negative if start else choose_positive)(pool, cells, setting, rng)
            row = {"id": start + at, "image_ids": [f"{stitched_folder(setting)}/{name}" for name in images]}
            columns = [list(values) for values in (*zip(*places, strict=True), [names[t] for t in targets])]
            if setting.needles == 1:
                columns = [values[0] for values in columns]
            rows.append(row | dict(zip(("index", "row", "col", "target"), columns, strict=True)))
    write_json(file, rows)


def choose_positive(pool: ImagePool, cells: dict, setting: Setting, rng: random.Random) -> tuple[list, list]:
    """K places whose captions are in one cell each, and what they show."""
    shown = Counter(pool.images[index].caption for index in cells.values())
    alone = [place for place, index in cells.items() if shown[pool.images[index].caption] == 1]
    if len(alone) < setting.needles:
        raise UserError(f"{setting}: {len(alone)} captions are in one cell alone: use a larger pool or fewer cells")
    places = rng.sample(alone, setting.needles)
    return places, [cells[place] for place in places]


def choose_negative(pool: ImagePool, cells: dict, setting: Setting, rng: random.Random) -> tuple[list, list]:
    """K captions that no cell shows."""
    shown = {pool.images[index].caption for index in cells.values()}
    absent = [caption for caption in pool.captions if caption not in shown]
    if len(absent) < setting.needles:
        raise UserError(f"{setting}: every caption of the pool is shown: use a larger pool or fewer cells")
    targets = [rng.choice(pool.by_caption[caption]) for caption in rng.sample(absent, setting.needles)]
    return [(-1, -1, -1)] * setting.needles, targets


def write_stitched(pool: ImagePool, folder: Path, setting: Setting, count: int, seed: int, cell: int) -> dict:
    """Stitched image -> its cells, rows of pool indices; images and metadata are written where they are missing."""
    grid = setting.grid
    if grid**2 + 1 > len(pool.captions):
        raise UserError(
            f"{grid}x{grid} cells need {grid**2 + 1} captions, the pool has {len(pool.captions)}: use a larger one"
        )
    cells = {}
    for i in range(count):
        rng = random.Random(f"{seed}/{grid}/{i}")
        drawn = [rng.choice(pool.by_caption[caption]) for caption in rng.sample(pool.captions, grid**2)]
        cells[f"stitched_{i:04}.png"] = tuple(tuple(drawn[row * grid :][:grid]) for row in range(grid))
    target = folder / stitched_folder(setting)
    if not target.exists():
        with atomic_folder(target) as new:
            for name, rows in cells.items():
                pool.stitch(f"{seed}/{grid}/{name}", rows, cell).save(new / name)
    metadata = {
        name: {
            f"{row}_{col}": name_of(pool.images[index])
            for row, line in enumerate(rows)
            for col, index in enumerate(line)
        }
        for name, rows in cells.items()
    }
    (folder / "annotations_trainval").mkdir(exist_ok=True)
    (folder / "metadata_stitched").mkdir(exist_ok=True)
    write_json(folder / "metadata_stitched" / f"{grid}_{grid}.json", metadata)
    return cells


def stitched_folder(setting: Setting) -> str:
    return f"images_stitched/{setting.grid}_{setting.grid}"


def name_of(image: PoolImage) -> str:
    """The file name of a pool image in the metadata, without slashes: a/b.png and a-b.png stay two."""
    return f"{image.style}-{image.concept}".replace("%", "%25").replace("/", "%2F")


def cache_folder(root: Path, name: str, images: list[PoolImage], *numbers) -> Path:
    """The folder of the haystacks of these images and numbers: other images or numbers, another folder."""
    digest = hashlib.sha256(repr((BUILDER, numbers)).encode())
    for image in images:
        digest.update(image.fingerprint())
    return root / f"{name}-{digest.hexdigest()[:12]}"
