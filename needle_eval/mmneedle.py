"""MMNeedle (Wang et al., arXiv 2406.11230, NAACL 2025): its released files read, its prompts built, its schema written.

A setting is M pictures of N x N cells and K needles. The release holds stitched pictures, which picture of COCO lies in
which cell, and annotations: rows of pictures, the needle's place and its target. What `build` writes has the same
files and keys, so that one reader serves both. This is not MM-NIAH, which `mm_niah.py` reads.
"""

import gzip
import hashlib
import json
import math
import pickle
import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from boxes import locs_to_boxes
from errors import UserError
from files import atomic_folder, write_json
from haystack import ImagePool, PoolImage, clean, needle_prompt
from needle_eval.questions import Question, check_distinct, normalise
from needle_eval.statistics import mcnemar_exact, paired_bootstrap, rate

ABSENT = "-1"
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
            fields=told | ({"axis": axis} if axis else {}),
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
def build(pool: ImagePool, folder: Path, setting: Setting, samples: int, seed: int, cell: int):
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


def positive(pool: ImagePool, cells: dict, setting: Setting, rng: random.Random):
    """K places whose captions are in one cell each, and what they show."""
    shown = Counter(pool.pictures[index].caption for index in cells.values())
    alone = [place for place, index in cells.items() if shown[pool.pictures[index].caption] == 1]
    if len(alone) < setting.needles:
        raise UserError(f"{setting}: {len(alone)} captions are in one cell alone: use a larger pool or fewer cells")
    places = rng.sample(alone, setting.needles)
    return places, [cells[place] for place in places]


def negative(pool: ImagePool, cells: dict, setting: Setting, rng: random.Random):
    """K captions that no cell shows."""
    shown = {pool.pictures[index].caption for index in cells.values()}
    absent = [caption for caption in pool.captions if caption not in shown]
    if len(absent) < setting.needles:
        raise UserError(f"{setting}: every caption of the pool is shown: use a larger pool or fewer cells")
    targets = [rng.choice(pool.by_caption[caption]) for caption in rng.sample(absent, setting.needles)]
    return [(-1, -1, -1)] * setting.needles, targets


def stitched(pool: ImagePool, folder: Path, setting: Setting, count: int, seed: int, cell: int) -> dict:
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
        with atomic_folder(target) as new:
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


def name_of(picture: PoolImage) -> str:
    """A pool picture's file name in the metadata, where a slash would end it: a/b.png and a-b.png stay two."""
    return f"{picture.style}-{picture.concept}".replace("%", "%25").replace("/", "%2F")


def cache_folder(root: Path, name: str, pictures: list[PoolImage], *numbers) -> Path:
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


# ---- the strict rule
def strict(response: str | None, truth: str, needles: int) -> dict:
    """What the official scorer says of one answer: existence, index, exact; for K > 1 also `first` and `each` needle.

    `each` holds (index, exact) of the answered needles only, as the official pooling has it. Two oddities are kept
    because published figures contain them: an empty answer claims existence on a positive, and "0, 0, 0" has the
    right index on a negative. None, a broken question, is wrong in everything.
    """
    if response is None:
        return {"existence": False, "index": False, "exact": False, "first": (False, False), "each": []}
    answer, absent = normalise(response), set(re.findall(r"\d+", truth)) == {"0"}
    told, true = ([part.strip() for part in text.split("; ")] if needles > 1 else [text] for text in (answer, truth))
    pairs = [(a.split(", ")[0] == t.split(", ")[0], a == t) for a, t in zip(told, true, strict=False)]
    return {
        "existence": (answer in absences(needles)) == absent,
        "index": len(told) == len(true) and all(index for index, _ in pairs),
        "exact": answer == ABSENT if absent else told == true,
        "first": pairs[0],
        "each": pairs,
    }


def absences(needles: int) -> set[str]:
    """Every answer that the official scorer takes for "no needle", once normalised."""
    if needles == 1:
        return {ABSENT}
    one = [ABSENT] * needles
    return {ABSENT, "; ".join(one), ", ".join(one), "".join(one), "; ".join(["-1, -1, -1"] * needles)}


# ---- the lenient reading
def lenient(response: str | None, needles: int = 1) -> str | None:
    """The answer meant: per needle the next -1 or the next three integers; None if the text does not hold K of them.

    One leading -1 stands for all needles where nothing else follows.
    """
    text = re.sub(r"<\w+>", " ", response or "")  # location tokens are no numbers
    numbers = re.findall(r"(?<!\w)-\d+|\d+", text)  # "1-2-1" and "row-2" have no minus
    if numbers and (set(numbers) == {ABSENT} or normalise(response) in absences(needles)):
        return "; ".join([ABSENT] * needles)
    found = []
    while numbers and len(found) < needles:
        size = 1 if numbers[0] == ABSENT else 3
        if len(numbers) < size:
            break
        found.append(", ".join(str(int(n)) for n in numbers[:size]))
        numbers = numbers[size:]
    return "; ".join(found) if len(found) == needles else None


def well_formed(response: str, needles: int = 1) -> bool:
    """Whether an answer has the form that was asked for, right or wrong."""
    one = r"(-1|\d+, \d+, \d+)"
    answer = normalise(response)
    return answer in absences(needles) or bool(re.fullmatch("; ".join([one] * needles), answer))


# ---- answers of other protocols, brought into the same form
def answers(rows: list[dict]) -> list[dict]:
    """Rows of any protocol as rows whose `response` the rules above can read: one row a needle question."""
    rows = merge_quadrants(rows) if any(row["protocol"] == "quadrant" for row in rows) else rows
    return [row | {"response": boxed(row)} if row["protocol"] == "detect" else row for row in rows]


def boxed(row: dict) -> str | None:
    """`detect`: the cell that holds the centre of the first box; no answer at all is "-1"; other text stays."""
    response, grid = row["response"], row["shape"][1]
    if response is None:
        return None
    if not response.strip():
        return ABSENT
    boxes = locs_to_boxes(response, grid, grid)
    if not boxes:
        return response
    x0, y0, x1, y1 = boxes[0][0]
    row_at, col_at = (min(int((low + high) / 2), grid - 1) + 1 for low, high in ((y0, y1), (x0, x1)))
    return f"1, {row_at}, {col_at}"


def merge_quadrants(rows: list[dict]) -> list[dict]:
    """`quadrant`: the two answers of a picture as one, row and column, for every model alike (arXiv 2507.15875)."""
    pairs: dict[str, dict] = {}
    for row in rows:
        name = row["id"].rpartition("/")[0] if "axis" in row else row["id"]  # a broken row is asked nothing
        pairs.setdefault(name, {})[row.get("axis")] = row
    merged = []
    for name, pair in pairs.items():
        told = [(pair[axis]["response"] if axis in pair else None) for axis in ("rows", "columns")]
        words = [text if text is None else text.strip().lower() for text in told]
        places = [{"top": 1, "bottom": 2}.get(words[0]), {"left": 1, "right": 2}.get(words[1])]
        response = f"1, {places[0]}, {places[1]}" if all(places) else " | ".join(map(str, told))
        merged.append(next(iter(pair.values())) | {"id": name, "response": None if None in told else response})
    return merged


# ---- scores
def score(rows: list[dict], skip_none: bool = False) -> dict[str, dict]:
    """Scores by setting ("1x2x2"), positives and negatives apart, every rate with its count and Wilson interval.

    `skip_none` leaves broken questions out of the denominators, as the official scorer does.
    """
    rows = [row for row in answers(rows) if not (skip_none and row["response"] is None)]
    settings = dict.fromkeys(row["setting"] for row in rows)
    return {name: score_setting([row for row in rows if row["setting"] == name]) for name in settings}


def score_setting(rows: list[dict]) -> dict:
    positives, negatives = ([row for row in rows if row["kind"] == kind] for kind in ("positive", "negative"))
    found = {"baselines": baselines(positives)}
    if positives:
        found["positive"] = score_positives(positives)
    if negatives:
        found["negative"] = score_kind(negatives)
    if positives and negatives:
        found["balanced existence"] = balanced(found["positive"]["existence"], found["negative"]["existence"])
    return found


def score_kind(rows: list[dict]) -> dict:
    """Existence, strict and lenient, and what could not be read, of positives or of negatives."""
    needles, wanted = rows[0]["shape"][2], rows[0]["kind"] == "negative"
    judged = [strict(row["response"], row["ground_truth"], needles) for row in rows]
    meant = [lenient(row["response"], needles) for row in rows]
    says_absent = [text is not None and set(text.split("; ")) == {ABSENT} for text in meant]
    heard = [row["response"] for row in rows if row["response"] is not None]
    scores = {
        "n": len(rows),
        "broken": len(rows) - len(heard),
        "format failures": rate(sum(not well_formed(text, needles) for text in heard), len(rows)),
    }
    if rows[0]["protocol"] != "quadrant":  # which offers no way to say "absent"
        scores["existence"] = rate(sum(j["existence"] for j in judged), len(rows))
        told = [text is not None and absent == wanted for text, absent in zip(meant, says_absent, strict=True)]
        scores["existence, lenient"] = rate(sum(told), len(rows))
    return scores


def score_positives(rows: list[dict]) -> dict:
    images, grid, needles = rows[0]["shape"]
    judged = [strict(row["response"], row["ground_truth"], needles) for row in rows]
    meant = [lenient(row["response"], needles) for row in rows]
    scores = score_kind(rows)
    for name in ("index", "exact"):
        scores[name] = rate(sum(j[name] for j in judged), len(rows))
    scores["exact, lenient"] = rate(sum(is_meant(row, text) for row, text in zip(rows, meant, strict=True)), len(rows))
    if needles > 1:
        each = [pair for j in judged for pair in j["each"]]
        for at, name in enumerate(("index", "exact")):
            scores[f"first {name}"] = rate(sum(j["first"][at] for j in judged), len(rows))
            # a needle that was not answered is charged; the official pooling is over the answered ones
            scores[f"individual {name}"] = rate(sum(pair[at] for pair in each), needles * len(rows))
            scores[f"individual {name}, official pooling"] = rate(sum(pair[at] for pair in each), len(each))
    scores["cells"] = places(rows, judged, lambda m, r, c: (r, c), [(r, c) for r in range(grid) for c in range(grid)])
    scores["depths"] = places(rows, judged, lambda m, r, c: (m,), [(m,) for m in range(images)])
    return scores


def is_meant(row: dict, meant: str | None) -> bool:
    return meant == row["ground_truth"]


def places(rows: list[dict], judged: list[dict], key, every: list[tuple]) -> list[dict]:
    """Exact answers by place, the needle's cell or its picture: one entry a place, each needle counted once.

    A broken row that names no place is in none of them.
    """
    right, total = Counter(), Counter()
    for row, verdict in zip(rows, judged, strict=True):
        if not row["ground_truth"]:
            continue
        for at, truth in enumerate(row["ground_truth"].split("; ")):
            place = key(*(int(n) - 1 for n in truth.split(", ")))
            total[place] += 1
            right[place] += at < len(verdict["each"]) and verdict["each"][at][1]
    return [{"place": [n + 1 for n in place], **rate(right[place], total[place])} for place in every]


def balanced(one: dict, other: dict) -> dict:
    """The mean of two independent rates; its interval from theirs (Zou and Donner 2008, MOVER)."""
    mean = (one["rate"] + other["rate"]) / 2
    below, above = (math.hypot(*(r["rate"] - r[end] for r in (one, other))) / 2 for end in ("low", "high"))
    return {"rate": mean, "low": mean - below, "high": mean + above, "n": one["n"] + other["n"]}


def baselines(positives: list[dict]) -> dict:
    """Rates of three answerers without eyes: a uniform guess, the best constant on these rows, and always "-1"."""
    always = {"existence, positives": 0.0, "existence, negatives": 1.0, "balanced existence": 0.5, "exact": 0.0}
    if not positives:
        return {"always -1": always}
    images, grid, needles = positives[0]["shape"]
    answer, times = Counter(row["ground_truth"] for row in positives).most_common(1)[0]
    indices = Counter(tuple(t.split(", ")[0] for t in row["ground_truth"].split("; ")) for row in positives)
    return {
        "uniform": {"exact": (images * grid**2) ** -needles, "index": images**-needles},
        "best constant": {
            "answer": answer,
            "exact": times / len(positives),
            "index": indices.most_common(1)[0][1] / len(positives),
        },
        "always -1": always,
    }


# ---- two runs against each other
def compare(first: list[dict], second: list[dict], judge) -> dict[str, dict]:
    """The same questions answered by two models: by setting and kind both rates, the paired difference, McNemar's p.

    `judge` says of a row whether it is right. Raises UserError when the ids differ, or what was asked under one id.
    """
    first, second = ({row["id"]: row for row in rows} for rows in (first, second))
    if set(first) != set(second):
        raise UserError(
            f"{len(set(first) ^ set(second))} questions are in one run alone ({min(set(first) ^ set(second))}): "
            "compare answers to the same questions"
        )
    asked = ("prompt", "ground_truth")
    other = [name for name in first if any(first[name].get(key) != second[name].get(key) for key in asked)]
    if other:
        raise UserError(
            f"{len(other)} questions differ between the runs ({other[0]}): compare answers to the same questions, of "
            "one protocol, one seed and the same pictures"
        )
    groups: dict[str, list] = {}
    for name, row in first.items():
        group = f"{row['setting']} {row['kind']}" if "kind" in row else row["setting"]
        groups.setdefault(group, []).append((judge(row), judge(second[name])))
    found = {}
    for name, pairs in groups.items():
        a, b = ([int(pair[i]) for pair in pairs] for i in (0, 1))
        difference, low, high = paired_bootstrap(a, b)
        only_a, only_b = (sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs))
        found[name] = {
            "first": rate(sum(a), len(a)),
            "second": rate(sum(b), len(b)),
            "difference": {"mean": difference, "low": low, "high": high},
            "only first": only_a,
            "only second": only_b,
            "p": mcnemar_exact(only_a, only_b),
        }
    return found


def judge(row: dict) -> bool:
    """What a row is compared by: the exact answer of a positive, the existence of a negative. One half of `quadrant`
    is right by itself."""
    if row["protocol"] == "quadrant" and "axis" in row and row["id"].endswith(row["axis"]):
        place = int(row["ground_truth"].split(", ")[1 if row["axis"] == "rows" else 2]) - 1
        words = {"rows": ("top", "bottom"), "columns": ("left", "right")}[row["axis"]]
        return (row["response"] or "").strip().lower() == words[place]
    response = boxed(row) if row["protocol"] == "detect" else row["response"]
    verdict = strict(response, row["ground_truth"], row["shape"][2])
    return verdict["exact" if row["kind"] == "positive" else "existence"]


# ---- what is printed
METRICS = {
    "positive": (
        "exact",
        "exact, lenient",
        "index",
        "existence",
        "existence, lenient",
        "first exact",
        "individual exact",
    ),
    "negative": ("existence", "existence, lenient"),
}
TITLES = {"positive": "caption present", "negative": "caption absent"}


def table(by_name: dict[str, dict], ranked: bool = False) -> list[str]:
    """Scores of models side by side, percent with 95 % Wilson intervals, baselines last.

    `ranked` answers were chosen among all possible ones: their exactness is another metric and is named so.
    """
    lines = []
    first = next(iter(by_name.values()))
    head = "".join(f"{name[-24:]:>26}" for name in by_name) + f"{'uniform':>10}{'constant':>10}{'all -1':>8}"
    for setting in (name for name in first if name != "attention"):
        lines.append(f"\n{setting:32}{head}")
        for kind, metrics in METRICS.items():
            told = [scores[setting].get(kind) for scores in by_name.values()]
            if told[0] is None:
                continue
            lines.append(f"{TITLES[kind]}, n = {told[0]['n']:,}")
            for metric in (*metrics, "format failures"):
                if metric in told[0]:
                    guesses = guessed(first[setting]["baselines"], kind, metric)
                    lines.append(
                        f"  {'ranked ' * (ranked and 'exact' in metric) + metric:30}"
                        + "".join(f"{percent(t[metric]):>26}" for t in told)
                        + guesses
                    )
            if any(t["broken"] for t in told):
                lines.append(f"  {'broken, counted wrong':30}" + "".join(f"{t['broken']:>26}" for t in told))
        if "balanced existence" in first[setting]:
            told = [percent(scores[setting]["balanced existence"]) for scores in by_name.values()]
            lines.append(f"{'balanced existence':32}" + "".join(f"{t:>26}" for t in told) + f"{'50.0':>28}")
    for name, scores in by_name.items():
        for setting, found in scores.get("attention", {}).items():
            shares = " ".join(f"{100 * share:.1f}" for share in found["share"])
            lines.append(
                f"\n{name} {setting}: attention on the needle's patches, percent of the pictures', by layer: {shares} "
                f"(even: {100 * found['even']:.1f}, n = {found['n']})"
            )
    return lines


def guessed(baselines: dict, kind: str, metric: str) -> str:
    """The three answerers without eyes, where they have a rate of this metric."""
    metric = metric.removesuffix(", lenient")
    if metric == "existence":  # a guess and a constant name a cell
        rates, always = ([1.0, 1.0], 0.0) if kind == "positive" else ([0.0, 0.0], 1.0)
    else:
        rates = [baselines.get(name, {}).get(metric) for name in ("uniform", "best constant")]
        always = None if None in rates else 0.0
    cells = zip((*rates, always), (10, 10, 8), strict=True)
    return "".join(f"{'' if r is None else f'{100 * r:.1f}':>{width}}" for r, width in cells)


def percent(told: dict) -> str:
    if told["rate"] is None:
        return "-"
    return f"{100 * told['rate']:.1f} [{100 * told['low']:.1f}, {100 * told['high']:.1f}]"
