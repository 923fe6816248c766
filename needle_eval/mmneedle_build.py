"""Build haystacks of captioned images with the files and keys of MMNeedle's release. Does not import torch."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from tqdm import tqdm

from errors import UserError
from files import atomic_folder, verify_manifest, write_json, write_manifest, writing
from haystack import OWN_CELL, POOL_CELL, Haystack, ImagePool, PoolImage, captions_needed, read_split
from needle_eval.mmneedle_prompts import Setting

if TYPE_CHECKING:
    from eval_mmnih import Config

CACHE = Path("runs/haystacks")
NEGATIVES_FROM = 5000  # the first id of negatives; positives have lower ones
BUILDER = 3  # version of the written bytes: after a change, new folders are built and older ones ignored


def build_haystacks(config: "Config", setting: Setting) -> Path:
    """The folder with the haystacks of a setting that `config` asks for; they are built if it does not exist.

    A folder whose files have changed is built again. Evaluations that start at the same time build it once.
    """
    source = config.data.partition(":")[2]
    split = config.split or ("test" if source else "test_style")
    images = read_split(source, split)
    if not images:
        raise UserError(f"--split={split}: {source or 'the included pool'} has no such images")
    cell, samples = config.cell or (OWN_CELL if source else POOL_CELL), config.samples or setting.default_samples
    if samples > NEGATIVES_FROM:
        raise UserError(f"--samples={samples}: at most {NEGATIVES_FROM}, where the ids of negatives begin")
    check_captions(config.data, split, images, setting)
    digest, pool = hashlib.sha256(repr((BUILDER, str(setting), config.seed, samples, cell)).encode()), ImagePool(images)
    for fingerprint in pool.fingerprints:
        digest.update(bytes.fromhex(fingerprint))
    shape = f"{setting.images}x{setting.grid}x{setting.grid}" + (f"_{setting.needles}" if setting.needles > 1 else "")
    name = f"{Path(source).resolve().stem if source else 'included'}-{split}-{shape}-{digest.hexdigest()[:12]}"
    folder = CACHE / name
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f".{name}.lock", fallback_to_soft=False):
        if not is_complete(folder):
            with atomic_folder(folder) as new:
                write_haystacks(pool, new, setting, samples, config.seed, cell)
                write_manifest(new)
    return folder


def check_captions(data: str, split: str, images: list[PoolImage], setting: Setting):
    """Raise UserError unless the images have a different caption for every cell of a grid and one more per needle."""
    count, needed = len({image.caption for image in images}), setting.grid**2 + setting.needles
    if count < needed:
        own = data.partition(":")[2] and split == "test"
        more = f"about {captions_needed(needed)} captions, a fifth of them is for testing" if own else "more captions"
        raise UserError(
            f"{data}: {setting.grid} x {setting.grid} cells and {setting.needles} absent captions need {needed} "
            f"captions, split {split} has {count}: give {more}, or smaller --grids"
        )


def is_complete(folder: Path) -> bool:
    """Whether the folder exists and none of its files has changed since it was built."""
    if not folder.exists():
        return False
    try:
        verify_manifest(folder)
        return True
    except UserError:
        print(f"{folder}: its files have changed since they were built: built again", flush=True)
        return False


def write_haystacks(pool: ImagePool, folder: Path, setting: Setting, samples: int, seed: int, cell: int):
    """Write `samples` positives, and as many negatives on the same stitched images, with the release's files and keys.

    `cell` is the side of a cell in pixels. The same pool and arguments give the same bytes. Raises UserError when the
    pool has too few captions.
    """
    names = [name_of(image) for image in pool.images]
    stitched_folder = Path("images_stitched", f"{setting.grid}_{setting.grid}")
    for path in (stitched_folder, Path("metadata_stitched"), Path("annotations_trainval")):
        (folder / path).mkdir(parents=True)
    positives, negatives, metadata = [], [], {}
    for number in tqdm(range(samples), desc=f"build {setting}", unit="haystack"):
        key = f"{seed}/{setting}/{number}"
        paths = []
        for rows, id_, positive in ((positives, number, True), (negatives, NEGATIVES_FROM + number, False)):
            haystack = pool.make(key, setting.images, setting.grid, positive, setting.needles)
            if positive:  # the negative has the same cells
                for m, cells in enumerate(haystack.cells):
                    path = stitched_folder / f"stitched_{number:04}{f'_{m}' if setting.images > 1 else ''}.png"
                    pool.stitch(f"{key}/{m}", cells, cell).save(folder / path)
                    paths.append(path.as_posix())
                    metadata[path.name] = {
                        f"{row}_{column}": names[index]
                        for row, line in enumerate(cells)
                        for column, index in enumerate(line)
                    }
            rows.append({"id": id_, "image_ids": paths} | annotate(haystack, setting, names))
    write_json(folder / "metadata_stitched" / f"{setting.grid}_{setting.grid}.json", metadata)
    write_json(folder / "metadata_stitched" / setting.annotations, positives + negatives)
    captions = {name: image.caption for name, image in zip(names, pool.images, strict=True)}
    write_json(folder / "annotations_trainval" / "file_to_caption.json", captions)


def annotate(haystack: Haystack, setting: Setting, names: list[str]) -> dict:
    """The needles of a haystack as the release writes them: lists for several needles, -1 for absent ones."""
    places = haystack.needles or [(-1, -1, -1)] * setting.needles
    index, row, column = (list(numbers) for numbers in zip(*places, strict=True))
    columns = {"index": index, "row": row, "col": column, "target": [names[i] for i in haystack.targets]}
    return columns if setting.needles > 1 else {key: values[0] for key, values in columns.items()}


def name_of(image: PoolImage) -> str:
    """The file name of a pool image in the metadata. Slashes are escaped, so a/b.png and a-b.png stay distinct."""
    return f"{image.style}-{image.concept}".replace("%", "%25").replace("/", "%2F")
