"""MMNeedle (Wang et al., arXiv 2406.11230, NAACL 2025): reading its files, scoring its answers, printing its tables.

A setting is M images of N x N cells and K needles. The release holds stitched images, which COCO image is in which
cell, and annotations: rows of images, the needle's place and its target. `mmneedle_build.py` writes haystacks of other
images with the same files and keys, so that one reader serves both. This is not MM-NIAH, which `mm_niah.py` reads.
No torch is imported here.
"""

import gzip
import json
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from errors import UserError
from files import write_json
from needle_eval.mmneedle_build import build_haystacks
from needle_eval.mmneedle_prompts import (
    ABSENT,
    PROTOCOLS,
    Setting,
    check_protocol,
    make_candidates,
    make_prompts,
    make_settings,
)
from needle_eval.mmneedle_rules import cell_of_box, is_well_formed, parse_lenient, prepare_rows, score_strict
from needle_eval.questions import Question, check_some_image_exists, check_unique_ids
from needle_eval.statistics import rate

if TYPE_CHECKING:
    from eval_mmnih import Config

FLAGS = ("split", "protocol", "images", "grids", "needles", "per_cell", "cell", "attention", "skip_none")
NAME_FLAGS = ("protocol", "data")  # always part of an evaluation folder's name
HAS_CELLS = True  # its scores are drawn as maps of cells, and models side by side
SAMPLES = {1: 1000, 2: 100, 5: 100}  # positives, and negatives, that the paper evaluates, by number of needles
SAMPLES_OTHERWISE = 100
PLACE_PROTOCOLS = ("finetuned", "official", "rank")  # they answer a place in words: attention on it can be measured


# ---- questions
def load_questions(config: "Config") -> list[Question]:
    """The questions of all settings, from the release in the folder `config.data` or from haystacks that are built.

    Raises UserError for flags that do not go together, for files that are missing or not the release's, and when none
    of the images exists.
    """
    settings = make_settings(config.images, config.grids, config.needles)
    for setting in settings:
        check_protocol(config.protocol, setting)
    if config.attention and config.protocol not in PLACE_PROTOCOLS:
        raise UserError(f"--attention: needs a protocol that answers a place: {', '.join(PLACE_PROTOCOLS)}")
    folder = build_haystacks(config, settings) if config.data.partition(":")[0] == "haystack" else Path(config.data)
    questions = [
        question
        for setting in settings
        for question in read_questions(folder, setting, config.protocol, config.samples, config.per_cell, config.prefix)
    ]
    check_some_image_exists(questions, "complete the data folder")
    return questions


def read_questions(
    folder: str | Path, setting: Setting, protocol: str, samples: int = 0, per_cell: int = 0, prefix: str = ""
) -> list[Question]:
    """The first `samples` positives and negatives of a setting (0: the paper's number), asked in `protocol`.

    `per_cell` takes that many positives of every cell instead, `prefix` is put before every prompt. `quadrant` asks
    positives only, each twice. A row without caption, image or place becomes a question with an error, which counts as
    wrong. Raises UserError for files that are missing or not the release's.
    """
    check_protocol(protocol, setting)
    folder = Path(folder)
    rows, captions = read_release(folder, setting.annotations), read_captions(folder)
    kinds = {"positive": [], "negative": []}
    for number, row in enumerate(rows if isinstance(rows, list) else [None], 1):
        if not isinstance(row, dict) or not {"id", "index"} <= set(row):
            raise UserError(f"{folder}: {setting.annotations}, row {number} has no id or index: download it again")
        kinds["negative" if row["index"] == -1 or row["index"] == [-1] * setting.needles else "positive"].append(row)
    samples = samples or SAMPLES.get(setting.needles, SAMPLES_OTHERWISE)
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
    check_unique_ids(questions, f"{folder}: {setting.annotations}")
    return questions


def ask(
    folder: Path, setting: Setting, protocol: str, kind: str, row: dict, captions: dict, prefix: str
) -> Iterator[Question]:
    """The question of one row, or the two of `quadrant`."""
    fields = {
        "benchmark": "mmneedle",
        "protocol": protocol,
        "kind": kind,
        "shape": [setting.images, setting.grid, setting.needles],
        "row": row["id"],
        "target": row.get("target"),
    }
    images, ground_truth, prompts, fault = (), "", {"": ""}, ""
    try:
        ground_truth = ground_truth_of(row, setting)
        fields["caption"] = captions_of(row, captions, setting)
        images = tuple(str(folder / path) for path in row["image_ids"])
        if len(images) != setting.images:
            raise ValueError(f"{len(images)} images where the setting has {setting.images}")
        prompts = make_prompts(protocol, setting, fields["caption"])
    except (KeyError, TypeError, ValueError) as error:
        fault = f"{setting.annotations}, id {row['id']}: {type(error).__name__} {error}: correct the row"
    for axis, prompt in prompts.items():
        yield Question(
            id=f"{setting}/{row['id']}/{axis}" if axis else f"{setting}/{row['id']}",
            setting=str(setting),
            images=images,
            prompt=prefix + prompt,
            ground_truth=ground_truth,
            max_new_tokens=PROTOCOLS[protocol] * setting.needles,
            fields=fields | ({"axis": axis} if axis else {}),
            candidates=make_candidates(setting) if protocol == "rank" else (),
            error=fault,
        )


def ground_truth_of(row: dict, setting: Setting) -> str:
    """The official string: "index, row, column" from 1, "; " between needles; a negative reads "0, 0, 0"."""
    columns = [row[key] if isinstance(row[key], list) else [row[key]] for key in ("index", "row", "col")]
    needles = list(zip(*columns, strict=True))
    if len(needles) != setting.needles:
        raise ValueError(f"{len(needles)} needles where the setting has {setting.needles}")
    for place in needles:
        if place != (-1, -1, -1) and place not in setting.cells():
            raise ValueError(f"place {place} is outside {setting}")
    return "; ".join(", ".join(str(n + 1) for n in place) for place in needles)


def captions_of(row: dict, captions: dict, setting: Setting) -> list[str]:
    """The captions of a row's targets."""
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


# ---- files of the release
def read_release(folder: Path, name: str) -> object:
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


class PlainUnpickler(pickle.Unpickler):
    """Refuses every class: dicts and strings need none, and a pickle that names one could run code."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"names {module}.{name}")


def unpickle_captions(file: Path) -> dict[str, str]:
    """The captions in a pickle of strings. Raises UserError for a pickle that holds or asks for anything else."""
    try:
        with open(file, "rb") as stream:
            captions = PlainUnpickler(stream).load()
    except Exception as error:  # a damaged pickle raises anything
        raise UserError(f"{file}: refused ({error}): it must hold file names and captions alone") from error
    if not isinstance(captions, dict) or not all(isinstance(c, str) for pair in captions.items() for c in pair):
        raise UserError(f"{file}: holds no file names and captions: download it again")
    return captions


# ---- answers
def is_correct(row: dict) -> bool:
    """Whether an answer row is right: a positive by its exact answer, a negative by its existence.

    One of the two answers of `quadrant` is right or wrong by itself.
    """
    if "axis" in row:
        place = row["ground_truth"].split(", ")[1 if row["axis"] == "rows" else 2]
        words = {"rows": ("top", "bottom"), "columns": ("left", "right")}[row["axis"]]
        return (row["response"] or "").strip().lower() == words[int(place) - 1]
    response = cell_of_box(row) if row["protocol"] == "detect" else row["response"]
    verdict = score_strict(response, row["ground_truth"], row["shape"][2])
    return verdict["exact" if row["kind"] == "positive" else "existence"]


# ---- scores
def score(rows: list[dict]) -> dict[str, dict]:
    """Scores by setting ("1x2x2"), positives and negatives apart, every rate with its count and Wilson interval."""
    by_setting: dict[str, list[dict]] = {}
    for row in prepare_rows(rows):
        by_setting.setdefault(row["setting"], []).append(row)
    return {name: score_setting(part) for name, part in by_setting.items()}


def score_setting(rows: list[dict]) -> dict:
    """Scores of one setting's positives and negatives, those of the baselines beside them."""
    positives, negatives = ([row for row in rows if row["kind"] == kind] for kind in ("positive", "negative"))
    scores = {"baselines": score_baselines(positives)}
    if positives:
        scores["positive"] = score_positives(positives)
    if negatives:
        scores["negative"] = score_kind(negatives)
    if positives and negatives:
        scores["balanced existence"] = balanced(scores["positive"]["existence"], scores["negative"]["existence"])
    return scores


def score_kind(rows: list[dict]) -> dict:
    """Existence, strict and lenient, and what could not be read, of positives or of negatives."""
    needles, negative = rows[0]["shape"][2], rows[0]["kind"] == "negative"
    verdicts = [score_strict(row["response"], row["ground_truth"], needles) for row in rows]
    meant = [parse_lenient(row["response"], needles) for row in rows]
    says_absent = [text is not None and set(text.split("; ")) == {ABSENT} for text in meant]
    responses = [row["response"] for row in rows if row["response"] is not None]
    scores = {
        "n": len(rows),
        "broken": len(rows) - len(responses),
        "format failures": rate(sum(not is_well_formed(text, needles) for text in responses), len(rows)),
    }
    if rows[0]["protocol"] != "quadrant":  # which offers no way to say "absent"
        scores["existence"] = rate(sum(v["existence"] for v in verdicts), len(rows))
        right = [text is not None and absent == negative for text, absent in zip(meant, says_absent, strict=True)]
        scores["existence, lenient"] = rate(sum(right), len(rows))
    return scores


def score_positives(rows: list[dict]) -> dict:
    """All scores of positives: those of `score_kind`, index, exact, single needles, and by place."""
    images, grid, needles = rows[0]["shape"]
    verdicts = [score_strict(row["response"], row["ground_truth"], needles) for row in rows]
    scores = score_kind(rows)
    for name in ("index", "exact"):
        scores[name] = rate(sum(v[name] for v in verdicts), len(rows))
    lenient = sum(parse_lenient(row["response"], needles) == row["ground_truth"] for row in rows)
    scores["exact, lenient"] = rate(lenient, len(rows))
    if needles > 1:
        each = [pair for v in verdicts for pair in v["each"]]
        for i, name in enumerate(("index", "exact")):
            scores[f"first {name}"] = rate(sum(v["first"][i] for v in verdicts), len(rows))
            # a needle that was not answered is charged; the official pooling is over the answered ones
            scores[f"individual {name}"] = rate(sum(pair[i] for pair in each), needles * len(rows))
            scores[f"individual {name}, official pooling"] = rate(sum(pair[i] for pair in each), len(each))
    cells = [(row, column) for row in range(grid) for column in range(grid)]
    scores["cells"] = score_places(rows, verdicts, lambda image, row, column: (row, column), cells)
    scores["depths"] = score_places(rows, verdicts, lambda image, row, column: (image,), [(m,) for m in range(images)])
    return scores


def score_places(rows: list[dict], verdicts: list[dict], place_of: Callable, places: list[tuple]) -> list[dict]:
    """Exact answers by place, the needle's cell or its image: one entry a place, each needle counted once.

    A broken row that names no place is in none of them.
    """
    right, total = Counter(), Counter()
    for row, verdict in zip(rows, verdicts, strict=True):
        for i, truth in enumerate(row["ground_truth"].split("; ") if row["ground_truth"] else ()):
            place = place_of(*(int(n) - 1 for n in truth.split(", ")))
            total[place] += 1
            right[place] += i < len(verdict["each"]) and verdict["each"][i][1]
    return [{"place": [n + 1 for n in place], **rate(right[place], total[place])} for place in places]


def balanced(one: dict, other: dict) -> dict:
    """The mean of two independent rates; its interval from theirs (Zou and Donner 2008, MOVER)."""
    mean = (one["rate"] + other["rate"]) / 2
    below, above = (math.hypot(*(r["rate"] - r[end] for r in (one, other))) / 2 for end in ("low", "high"))
    return {"rate": mean, "low": mean - below, "high": mean + above, "n": one["n"] + other["n"]}


def score_baselines(positives: list[dict]) -> dict:
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
NOT_SETTINGS = ("attention", "decoding")  # what report.py puts beside the settings


def format_table(scores_by_model: dict[str, dict]) -> list[str]:
    """Scores of models side by side, percent with 95 % Wilson intervals, baselines last.

    Where answers were ranked ("decoding"), their exactness is another metric and is named so.
    """
    lines = []
    first = next(iter(scores_by_model.values()))
    ranked = first.get("decoding") == "ranked"
    head = "".join(f"{name[-24:]:>26}" for name in scores_by_model) + f"{'uniform':>10}{'constant':>10}{'all -1':>8}"
    for setting in (name for name in first if name not in NOT_SETTINGS):
        lines.append(f"\n{setting:32}{head}")
        for kind, metrics in METRICS.items():
            columns = [scores[setting].get(kind) for scores in scores_by_model.values()]
            if columns[0] is None:
                continue
            lines.append(f"{TITLES[kind]}, n = {columns[0]['n']:,}")
            for metric in (*metrics, "format failures"):
                if metric in columns[0]:
                    title = "ranked " * (ranked and "exact" in metric) + metric
                    cells = "".join(f"{percent(column[metric]):>26}" for column in columns)
                    lines.append(f"  {title:30}{cells}{format_baselines(first[setting]['baselines'], kind, metric)}")
            if any(column["broken"] for column in columns):
                lines.append(f"  {'broken, counted wrong':30}" + "".join(f"{c['broken']:>26}" for c in columns))
        if "balanced existence" in first[setting]:
            cells = [percent(scores[setting]["balanced existence"]) for scores in scores_by_model.values()]
            lines.append(f"{'balanced existence':32}" + "".join(f"{cell:>26}" for cell in cells) + f"{'50.0':>28}")
    for name, scores in scores_by_model.items():
        for setting, found in scores.get("attention", {}).items():
            shares = " ".join(f"{100 * share:.1f}" for share in found["share"])
            lines.append(
                f"\n{name} {setting}: attention on the needle's patches, percent of the images', by layer: {shares} "
                f"(even: {100 * found['even']:.1f}, n = {found['n']})"
            )
    return lines


def format_baselines(baselines: dict, kind: str, metric: str) -> str:
    """The three answerers without eyes, where they have a rate of this metric."""
    metric = metric.removesuffix(", lenient")
    if metric == "existence":  # a guess and a constant name a cell
        rates, always = ([1.0, 1.0], 0.0) if kind == "positive" else ([0.0, 0.0], 1.0)
    else:
        rates = [baselines.get(name, {}).get(metric) for name in ("uniform", "best constant")]
        always = None if None in rates else 0.0
    cells = zip((*rates, always), (10, 10, 8), strict=True)
    return "".join(f"{'' if r is None else f'{100 * r:.1f}':>{width}}" for r, width in cells)


def percent(found: dict) -> str:
    """A rate and its interval in percent."""
    if found["rate"] is None:
        return "-"
    return f"{100 * found['rate']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def describe(config: "Config", image_size: int, num_image_tokens: int) -> list[str]:
    """Lines about the protocol and the size of a cell in the model's eyes: in pixels and in patches."""
    patches = math.isqrt(num_image_tokens)
    cells = ", ".join(f"{n}x{n}: {image_size // n} px, {patches / n:g} patches" for n in config.grids)
    lines = [f"protocol {config.protocol}; a cell's side: {cells}"]
    if max(config.images) > 1:
        lines.append("several images a prompt: the base models saw one, so this is outside their pre-training")
    return lines


# ---- response files
def write_official(rows: list[dict], folder: Path, model_name: str) -> list[Path]:
    """Answers in the files that the benchmark's own scorer reads: {folder}/COCO_val2014_{first}_{last}/....json.

    The scorer splits the file name at "_": the model's name loses its own.
    """
    version = re.sub(r"[^A-Za-z0-9.-]+", "-", model_name).strip("-.") or "model"
    groups: dict[tuple, list[dict]] = {}
    for row in prepare_rows(rows):
        groups.setdefault((*row["shape"], row["kind"]), []).append(row)
    files = []
    for (images, grid, needles, _), group in groups.items():
        more = f"_needles_{needles}" if needles > 1 else ""
        part = folder / f"COCO_val2014_{group[0]['row']}_{group[0]['row'] + len(group) - 1}"
        part.mkdir(parents=True, exist_ok=True)
        entries = [
            {
                "id": row["row"],
                "response": row["response"],
                "ground_truth": row["ground_truth"],
                "target_path": row["target"],
                "caption": row.get("caption", [None])[0] if needles == 1 else row.get("caption"),
            }
            for row in group
        ]
        files.append(part / f"paligemma_{version}_{images}_{grid}_{grid}{more}.json")
        write_json(files[-1], entries)
    return files
