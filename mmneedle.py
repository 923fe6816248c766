"""MMNeedle (Wang et al., arXiv 2406.11230, NAACL 2025): its released files read, its prompts built, its schema written.

A setting is M pictures of N x N cells and K needles. The release holds stitched pictures, which picture of COCO lies in
which cell, and annotations: rows of pictures, the needle's place and its target. What `build` writes has the same
files and keys, so that one reader serves both. This is not MM-NIAH, which `mm_niah.py` reads.
"""

import gzip
import hashlib
import json
import pickle
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from checkpoint import whole_or_nothing, write_json
from errors import UserError
from haystack import Picture, PicturePool, Question, check_distinct, clean, needle_prompt

PROTOCOLS = {  # and the longest answer, in tokens a needle
    "official": 30,  # the benchmark's prompt, word for word
    "finetuned": 12,  # a short question in PaliGemma's form, answered "1, 2, 1" or "-1"
    "rank": 12,  # the short question; every possible answer is weighed, none generated: a metric of its own
    "quadrant": 100,  # two questions about halves (arXiv 2507.15875), 2 x 2 only
    "detect": 40,  # PaliGemma's own task; the cell is where the box has its centre
}
ROWS = {1: 1000, 2: 100, 5: 100}  # positives, and negatives, that the paper evaluates, by number of needles
NEGATIVES_FROM = 5000  # ids below are positives
BUILDER = 2  # raise it when `build` would write other bytes: older caches are then left alone


@dataclass(frozen=True)
class Setting:
    """M pictures a question, N x N cells a picture, K needles."""

    images: int
    grid: int
    needles: int = 1

    def __str__(self) -> str:
        return f"{self.images}x{self.grid}x{self.grid}" + (f" K={self.needles}" if self.needles > 1 else "")

    @property
    def annotations(self) -> str:
        start = f"{self.needles}_" if self.needles > 1 else ""
        return f"{start}annotations_{self.images}_{self.grid}_{self.grid}.json"

    def cells(self) -> list[tuple[int, int, int]]:
        """Every (picture, row, column), counted from 0."""
        return list(product(range(self.images), range(self.grid), range(self.grid)))


def settings(images, grids, needles) -> list[Setting]:
    """All combinations but one cell alone, which the benchmark leaves out. Raises UserError when nothing is left."""
    shapes = dict.fromkeys(product(images, grids, needles))  # a number given twice is one setting
    found = [Setting(*shape) for shape in shapes if shape[:2] != (1, 1)]
    if not found or any(min(s.images, s.grid, s.needles) < 1 for s in found):
        raise UserError(
            f"--images {images} --grids {grids} --needles {needles}: give numbers from 1, and not 1 x 1 alone"
        )
    return found


# ---- prompts
def official_prompt(setting: Setting, captions: list[str]) -> str:
    """The benchmark's data-protocol prompt, word for word; captions stand in it as the release has them."""
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


def short_prompt(captions: list[str]) -> str:
    """The question of `needle_prompt`, several captions joined with "; "."""
    return needle_prompt("; ".join(clean(caption) for caption in captions))


def quadrant_prompts(caption: str) -> dict[str, str]:
    """The two questions of arXiv 2507.15875's evaluation, word for word: a caption's own full stop makes two."""
    return {
        "rows": f"Caption: {caption}. Where is the caption? Top or Bottom?",
        "columns": f"Caption: {caption}. Where is the caption? Left or Right?",
    }


# ---- the release
def read_questions(
    folder: str | Path, setting: Setting, protocol: str, samples: int = 0, per_cell: int = 0, prefix: str = ""
) -> list[Question]:
    """The first `samples` positives and negatives of a setting (0: the paper's number), asked in `protocol`.

    `per_cell` takes so many positives of every cell instead, `prefix` is put before every prompt. `quadrant` asks
    positives only, each twice. A row without caption, picture or place becomes a question with told["error"], which
    counts as wrong. Raises UserError for files that are not there or are none of the release's.
    """
    check_protocol(protocol, setting)
    folder = Path(folder)
    rows, captions = read_release(folder, setting.annotations), read_captions(folder)
    kinds = {"positive": [], "negative": []}
    for at, row in enumerate(rows if isinstance(rows, list) else [None]):
        if not isinstance(row, dict) or not {"id", "index"} <= set(row):
            raise UserError(f"{folder}: {setting.annotations}, row {at + 1} has no id or index: download it again")
        kinds["negative" if row["index"] == -1 or row["index"] == [-1] * setting.needles else "positive"].append(row)
    samples = samples or ROWS.get(setting.needles, 100)
    chosen = {kind: rows[:samples] for kind, rows in kinds.items()}
    if per_cell:
        chosen["positive"] = first_per_cell(kinds["positive"], setting, per_cell)
    if protocol == "quadrant":
        chosen["negative"] = []
    questions = [
        question
        for kind, rows in chosen.items()
        for row in rows
        for question in ask(folder, setting, protocol, kind, row, captions, prefix)
    ]
    check_distinct(questions, f"{folder}: {setting.annotations}")
    return questions


def check_protocol(protocol: str, setting: Setting):
    """Raise UserError where a protocol cannot ask what a setting wants."""
    fits = {
        "quadrant": (setting.images, setting.grid, setting.needles) == (1, 2, 1),
        "detect": (setting.images, setting.needles) == (1, 1),
        "rank": setting.needles == 1,
    }
    if not fits.get(protocol, True):
        wants = {"quadrant": "1 picture of 2x2 cells", "detect": "1 picture", "rank": "any pictures"}[protocol]
        raise UserError(
            f"--protocol={protocol} asks {wants} and 1 needle, not {setting}: change --images, --grids, --needles"
        )


def ask(folder: Path, setting: Setting, protocol: str, kind: str, row: dict, captions: dict, prefix: str):
    """The question of one row, or the two of `quadrant`."""
    told = {
        "benchmark": "mmneedle",
        "protocol": protocol,
        "kind": kind,
        "shape": [setting.images, setting.grid, setting.needles],
        "row": row["id"],
        "target": row.get("target"),
    }
    name, images, truth = f"{setting}/{row['id']}", (), ""
    texts = {"": ""}
    try:
        truth = ground_truth(row, setting)
        told["caption"] = found = captions_of(row, captions, setting)
        images = tuple(str(folder / path) for path in row["image_ids"])
        if len(images) != setting.images:
            raise ValueError(f"{len(images)} pictures where the setting has {setting.images}")
        texts = prompts(protocol, setting, found)
    except (KeyError, TypeError, ValueError) as error:
        told["error"] = f"{setting.annotations}, id {row['id']}: {type(error).__name__} {error}: mend the row"
    for axis, text in texts.items():
        yield Question(
            id=f"{name}/{axis}" if axis else name,
            setting=str(setting),
            images=images,
            prompt=prefix + text,
            truth=truth,
            max_new_tokens=PROTOCOLS[protocol] * setting.needles,
            told=told | ({"axis": axis} if axis else {}),
        )


def prompts(protocol: str, setting: Setting, captions: list[str]) -> dict[str, str]:
    """What is asked, by axis for `quadrant` and under "" elsewhere."""
    if protocol == "quadrant":
        return quadrant_prompts(captions[0])
    if protocol == "official":
        return {"": official_prompt(setting, captions)}
    if protocol == "detect":
        return {"": f"detect {clean(captions[0])}"}
    return {"": short_prompt(captions)}


def candidates(setting: Setting) -> list[str]:
    """Every answer that `rank` weighs: all cells, then "-1"."""
    return [", ".join(str(n + 1) for n in cell) for cell in setting.cells()] + ["-1"]


def ground_truth(row: dict, setting: Setting) -> str:
    """The official string: "index, row, column" from 1, "; " between needles; a negative reads "0, 0, 0"."""
    places = [row[key] if isinstance(row[key], list) else [row[key]] for key in ("index", "row", "col")]
    needles = list(zip(*places, strict=True))
    if len(needles) != setting.needles:
        raise ValueError(f"{len(needles)} needles where the setting has {setting.needles}")
    for place in needles:
        if place != (-1, -1, -1) and place not in setting.cells():
            raise ValueError(f"place {place} lies outside {setting}")
    return "; ".join(", ".join(str(n + 1) for n in place) for place in needles)


def captions_of(row: dict, captions: dict, setting: Setting) -> list[str]:
    targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
    if len(targets) != setting.needles:
        raise ValueError(f"{len(targets)} targets where the setting has {setting.needles} needles")
    return [captions[Path(target).name] for target in targets]


def first_per_cell(rows: list[dict], setting: Setting, count: int) -> list[dict]:
    """The first `count` one-needle positives of every cell, in file order."""
    if setting.needles > 1:
        raise UserError(f"--per_cell={count}: {setting} has {setting.needles} needles a question: use --needles=1")
    taken = dict.fromkeys(setting.cells(), 0)
    chosen = []
    for row in rows:
        cell = (row["index"], row.get("row"), row.get("col"))
        if taken.get(cell, count) < count:
            taken[cell] += 1
            chosen.append(row)
    if min(taken.values()) < count:
        raise UserError(
            f"{setting.annotations}: a cell has {min(taken.values())} positives, not {count}: lower --per_cell"
        )
    return chosen


def read_release(folder: Path, name: str):
    """A json file of the release: in metadata_stitched/, annotations_trainval/ or `folder` itself, plain or gzipped."""
    for place in (folder / "metadata_stitched", folder / "annotations_trainval", folder):
        for file, opened in ((place / name, open), (place / f"{name}.gz", gzip.open)):
            if file.is_file():
                try:
                    with opened(file, "rt", encoding="utf-8") as stream:
                        return json.load(stream)
                except (OSError, EOFError, ValueError) as error:
                    raise UserError(f"{file}: cannot be read ({error}): download it again") from error
    raise UserError(f"{folder}: has no metadata_stitched/{name}: give the folder of MMNeedle's data, or other settings")


def read_captions(folder: Path) -> dict[str, str]:
    """File name -> caption: file_to_caption.pkl of the release, or the same as json."""
    file = folder / "annotations_trainval" / "file_to_caption.pkl"
    if file.is_file():
        return unpickle_captions(file)
    for name in ("file_to_caption.json", "captions.json"):
        try:
            return read_release(folder, name)
        except UserError:
            if (folder / name).is_file() or (folder / f"{name}.gz").is_file():
                raise
    raise UserError(f"{file}: not there: download MMNeedle's annotations_trainval")


class _Plain(pickle.Unpickler):
    """Dicts and strings need no class; a pickle that names one could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"names {module}.{name}")


def unpickle_captions(file: Path) -> dict[str, str]:
    try:
        with open(file, "rb") as stream:
            captions = _Plain(stream).load()
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{file}: refused ({error}): it must hold file names and captions alone") from error
    if not isinstance(captions, dict) or not all(isinstance(c, str) for pair in captions.items() for c in pair):
        raise UserError(f"{file}: holds no file names and captions: download it again")
    return captions


# ---- haystacks in the same schema
def build(pool: PicturePool, folder: Path, setting: Setting, samples: int, seed: int, cell: int):
    """Write `samples` positives and as many negatives into `folder`, in the release's files; what is there stays.

    `cell` is the side of a cell in pixels. The same pool and numbers give the same bytes. With one picture a question
    every stitched picture serves one positive and one negative, several are drawn anew for every question. A
    needle's caption is in no second cell, a negative's in none. Raises UserError when the pool has too few captions.
    """
    if samples > NEGATIVES_FROM:
        raise UserError(f"--samples={samples}: at most {NEGATIVES_FROM}, where the ids of negatives begin")
    if setting.images > samples:
        raise UserError(f"--samples={samples}: {setting} needs at least {setting.images} stitched pictures")
    grids = stitched(pool, folder, setting, samples, seed, cell)
    file = folder / "metadata_stitched" / setting.annotations
    if file.exists():
        return
    names = [name_of(picture) for picture in pool.pictures]
    captions = {name: picture.caption for name, picture in zip(names, pool.pictures, strict=True)}
    write_json(folder / "annotations_trainval" / "file_to_caption.json", captions)
    order = list(grids)
    random.Random(f"{seed}/{setting}/order").shuffle(order)
    rows = []
    for start in (0, NEGATIVES_FROM):
        for at in range(samples):
            rng = random.Random(f"{seed}/{setting}/{start + at}")
            images = [order[at]] if setting.images == 1 else rng.sample(order, setting.images)
            cells = {place: grids[images[place[0]]][place[1]][place[2]] for place in setting.cells()}
            places, targets = (negative if start else positive)(pool, cells, setting, rng)
            row = {"id": start + at, "image_ids": [f"{stitched_folder(setting)}/{name}" for name in images]}
            columns = [list(values) for values in (*zip(*places, strict=True), [names[t] for t in targets])]
            if setting.needles == 1:
                columns = [values[0] for values in columns]
            rows.append(row | dict(zip(("index", "row", "col", "target"), columns, strict=True)))
    write_json(file, rows)


def positive(pool: PicturePool, cells: dict, setting: Setting, rng: random.Random):
    """K places whose captions are in one cell each, and what they show."""
    shown = Counter(pool.pictures[index].caption for index in cells.values())
    alone = [place for place, index in cells.items() if shown[pool.pictures[index].caption] == 1]
    if len(alone) < setting.needles:
        raise UserError(f"{setting}: {len(alone)} captions are in one cell alone: use a larger pool or fewer cells")
    places = rng.sample(alone, setting.needles)
    return places, [cells[place] for place in places]


def negative(pool: PicturePool, cells: dict, setting: Setting, rng: random.Random):
    """K captions that no cell shows."""
    shown = {pool.pictures[index].caption for index in cells.values()}
    absent = [caption for caption in pool.captions if caption not in shown]
    if len(absent) < setting.needles:
        raise UserError(f"{setting}: every caption of the pool is shown: use a larger pool or fewer cells")
    targets = [rng.choice(pool.by_caption[caption]) for caption in rng.sample(absent, setting.needles)]
    return [(-1, -1, -1)] * setting.needles, targets


def stitched(pool: PicturePool, folder: Path, setting: Setting, count: int, seed: int, cell: int) -> dict:
    """Stitched picture -> its cells, rows of pool indices; pictures and metadata are written where they are not yet."""
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
        with whole_or_nothing(target) as new:
            for name, rows in cells.items():
                pool.stitch(f"{seed}/{grid}/{name}", rows, cell).save(new / name)
    metadata = {
        name: {
            f"{row}_{col}": name_of(pool.pictures[index])
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


def name_of(picture: Picture) -> str:
    """A pool picture's file name in the metadata, where a slash would end it: a/b.png and a-b.png stay two."""
    return f"{picture.style}-{picture.concept}".replace("%", "%25").replace("/", "%2F")


def cache_folder(root: Path, name: str, pictures: list[Picture], *numbers) -> Path:
    """Where the haystacks of these pictures and numbers lie: other pictures or numbers, another folder."""
    digest = hashlib.sha256(repr((BUILDER, numbers)).encode())
    for picture in pictures:
        digest.update(picture.fingerprint())
    return root / f"{name}-{digest.hexdigest()[:12]}"


# ---- response files
def write_responses(rows: list[dict], folder: Path, model: str):
    """Answers in the files that the benchmark's own scorer reads: {folder}/COCO_val2014_{first}_{last}/....json.

    `rows` in the form of `scoring.answers`. The scorer splits the file name at "_": the model's name loses its own.
    """
    version = re.sub(r"[^A-Za-z0-9.-]+", "-", model).strip("-.") or "model"
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((*row["shape"], row["kind"]), []).append(row)
    for (images, grid, needles, _), group in groups.items():
        more = f"_needles_{needles}" if needles > 1 else ""
        place = folder / f"COCO_val2014_{group[0]['row']}_{group[0]['row'] + len(group) - 1}"
        place.mkdir(parents=True, exist_ok=True)
        write_json(
            place / f"paligemma_{version}_{images}_{grid}_{grid}{more}.json",
            [
                {
                    "id": row["row"],
                    "response": row["response"],
                    "ground_truth": row["ground_truth"],
                    "target_path": row["target"],
                    "caption": row.get("caption", [None])[0] if needles == 1 else row.get("caption"),
                }
                for row in group
            ],
        )
