"""MMNeedle (Wang et al., arXiv 2406.11230, NAACL 2025): questions, scores, tables and response files.

A setting is M images of N x N cells and K needles. Questions come from the release (`mmneedle_release.py`) or from
haystacks of other images in its schema (`mmneedle_build.py`); `mmneedle_rules.py` decides when an answer is right.
MM-NIAH is a different benchmark, see `mm_niah.py`. This module does not import torch.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from errors import UserError
from files import write_json
from needle_eval.mmneedle_build import build_haystacks
from needle_eval.mmneedle_prompts import ABSENT, check_protocol, make_settings
from needle_eval.mmneedle_release import read_questions
from needle_eval.mmneedle_rules import cell_of_box, is_well_formed, parse_lenient, prepare_rows, score_strict
from needle_eval.questions import AnswerRow, Question, check_some_image_exists
from needle_eval.statistics import format_rate, mean_of_independent, rate

if TYPE_CHECKING:
    from eval_mmnih import Config

FLAGS = ("seed", "split", "protocol", "images", "grids", "needles", "per_cell", "cell", "attention", "skip_none")
BUILDING_FLAGS = ("seed", "split", "cell")  # apply to generated haystacks, not to the release
NAME_FLAGS = ("protocol", "data", "split")  # flags whose values are always part of an evaluation folder's name
GRIDS, QUADRANT_GRIDS = (2, 4), (2,)  # defaults of --grids
HAS_CELLS, LONG_QUESTIONS_ARE_WRONG = True, False
PLACE_PROTOCOLS = ("finetuned", "official", "rank")  # the answer is a place in text: attention on it can be measured


# ---- questions
def complete_flags(config: "Config") -> dict:
    """The default grids of the protocol where none are given."""
    return {"grids": config.grids or (QUADRANT_GRIDS if config.protocol == "quadrant" else GRIDS)}


def load_questions(config: "Config") -> list[Question]:
    """The questions of all settings, from the release in the folder `config.data` or from generated haystacks.

    Raises UserError for flags that exclude each other, for files that are missing or not the release's, and when none
    of the images exists.
    """
    settings = make_settings(config.images, config.grids, config.needles)
    for setting in settings:
        check_protocol(config.protocol, setting)
    if config.attention and config.protocol not in PLACE_PROTOCOLS:
        raise UserError(f"--attention: needs a protocol that answers a place: {', '.join(PLACE_PROTOCOLS)}")
    if config.attention and 1 not in config.needles:
        raise UserError("--attention: is measured with one needle: add 1 to --needles")
    builds = config.data.partition(":")[0] == "haystack"
    ignored = [flag for flag in BUILDING_FLAGS if getattr(config, flag)]
    if ignored and not builds:
        raise UserError(f"--{ignored[0]}: does not apply to the released files of --data={config.data}: leave it out")
    questions = []
    for setting in settings:
        folder = build_haystacks(config, setting) if builds else Path(config.data)
        questions += read_questions(folder, setting, config.protocol, config.samples, config.per_cell, config.prefix)
    check_some_image_exists(questions, "complete the data folder")
    return questions


# ---- answers
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]
PLACES = r"^(\d{1,4}, \d{1,4}, \d{1,4}(; \d{1,4}, \d{1,4}, \d{1,4})*)?$"  # empty for a broken row without a place


class NeedleAnswer(AnswerRow, kw_only=True):
    """The fields of an answer row that the scores are computed from."""

    ground_truth: Annotated[str, msgspec.Meta(pattern=PLACES)]
    protocol: Literal["finetuned", "official", "rank", "quadrant", "detect"]
    kind: Literal["positive", "negative"]
    shape: tuple[Count, Count, Count]
    row: int
    target: object = None
    caption: Annotated[list[str], msgspec.Meta(min_length=1)] | None = None
    axis: Literal["rows", "columns"] | None = None

    def __post_init__(self):
        needles = self.ground_truth.count(";") + 1
        if (self.ground_truth or self.response is not None) and needles != self.shape[2]:
            raise ValueError(f"ground_truth has {needles} needles, shape {self.shape[2]}")
        if not self.ground_truth and self.response is not None:
            raise ValueError("a response without ground_truth")


ANSWER_ROW = NeedleAnswer


def is_correct(row: dict) -> bool:
    """Whether an answer row is right: a positive by its exact answer, a negative by its existence.

    Each of the two answers of `quadrant` is judged separately.
    """
    if row.get("axis") is not None:
        place = row["ground_truth"].split(", ")[1 if row["axis"] == "rows" else 2]
        words = {"rows": ("top", "bottom"), "columns": ("left", "right")}[row["axis"]]
        return (row["response"] or "").strip().lower() == words[int(place) - 1]
    response = cell_of_box(row) if row["protocol"] == "detect" else row["response"]
    verdict = score_strict(response, row["ground_truth"], row["shape"][2])
    return verdict["exact" if row["kind"] == "positive" else "existence"]


# ---- scores
def score(rows: list[dict]) -> dict[str, dict]:
    """Scores by setting ("1x2x2"), positives and negatives separately; rates with their counts and Wilson intervals."""
    by_setting: dict[str, list[dict]] = {}
    for row in prepare_rows(rows):
        by_setting.setdefault(row["setting"], []).append(row)
    return {name: score_setting(part) for name, part in by_setting.items()}


def score_setting(rows: list[dict]) -> dict:
    """Scores of one setting's positives and negatives, and of the baselines."""
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
    """Scores of either positives or negatives: existence, strict and lenient, and the share of malformed answers."""
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
    if rows[0]["protocol"] != "quadrant":  # `quadrant` offers no way to say "absent"
        scores["existence"] = rate(sum(v["existence"] for v in verdicts), len(rows))
        right = [text is not None and absent == negative for text, absent in zip(meant, says_absent, strict=True)]
        scores["existence, lenient"] = rate(sum(right), len(rows))
    return scores


def score_positives(rows: list[dict]) -> dict:
    """All scores of positives: those of `score_kind`, index, exact, of single needles, and by place."""
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
            # an unanswered needle counts as wrong; the official pooling leaves it out
            scores[f"individual {name}"] = rate(sum(pair[i] for pair in each), needles * len(rows))
            scores[f"individual {name}, official pooling"] = rate(sum(pair[i] for pair in each), len(each))
    cells = [(row, column) for row in range(grid) for column in range(grid)]
    scores["cells"] = score_places(rows, verdicts, lambda image, row, column: (row, column), cells)
    scores["depths"] = score_places(rows, verdicts, lambda image, row, column: (image,), [(m,) for m in range(images)])
    return scores


def score_places(rows: list[dict], verdicts: list[dict], place_of: Callable, places: list[tuple]) -> list[dict]:
    """Exact answers by place, which is the needle's cell or its image: one entry per place, each needle counted once.

    A broken row without a place is left out.
    """
    right, total = Counter(), Counter()
    for row, verdict in zip(rows, verdicts, strict=True):
        for i, truth in enumerate(row["ground_truth"].split("; ") if row["ground_truth"] else ()):
            place = place_of(*(int(n) - 1 for n in truth.split(", ")))
            total[place] += 1
            right[place] += i < len(verdict["each"]) and verdict["each"][i][1]
    return [{"place": [n + 1 for n in place], **rate(right[place], total[place])} for place in places]


def balanced(one: dict, other: dict) -> dict:
    """The mean of two independent rates."""
    mean, low, high = mean_of_independent([(r["rate"], r["low"], r["high"]) for r in (one, other)])
    return {"rate": mean, "low": low, "high": high, "n": one["n"] + other["n"]}


def score_baselines(positives: list[dict]) -> dict:
    """Rates of three baselines that do not see the image: a uniform guess, the best constant answer to these rows, and
    always "-1"."""
    always = {"existence, positives": 0.0, "existence, negatives": 1.0, "balanced existence": 0.5, "exact": 0.0}
    if not positives:
        return {"always -1": always}
    images, grid, needles = positives[0]["shape"]
    truths = [row["ground_truth"] for row in positives if row["ground_truth"]] or [""]  # a broken row has none
    answer, times = Counter(truths).most_common(1)[0]
    indices = Counter(tuple(place.split(", ")[0] for place in truth.split("; ")) for truth in truths)
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
NOT_SETTINGS = ("attention", "decoding")  # keys that report.py adds to the settings


def format_table(scores_by_model: dict[str, dict]) -> list[str]:
    """Scores of models side by side, in percent with 95 % Wilson intervals, baselines last.

    Where answers were ranked ("decoding"), exactness is a different metric and is labelled "ranked".
    """
    lines = []
    first = next(iter(scores_by_model.values()))
    ranked = first.get("decoding") == "ranked"
    head = "".join(f"{name[-24:]:>26}" for name in scores_by_model) + f"{'uniform':>10}{'constant':>10}{'all -1':>8}"
    for setting in (name for name in first if name not in NOT_SETTINGS):
        lines.append(f"\n{setting:32}{head}")
        for kind, metrics in METRICS.items():
            columns = [scores.get(setting, {}).get(kind) for scores in scores_by_model.values()]
            if columns[0] is None:
                continue
            lines.append(f"{TITLES[kind]}, n = {columns[0]['n']:,}")
            for metric in (*metrics, "format failures"):
                if metric in columns[0]:
                    title = "ranked " * (ranked and "exact" in metric) + metric
                    cells = "".join(f"{format_rate(column[metric]) if column else '-':>26}" for column in columns)
                    lines.append(f"  {title:30}{cells}{format_baselines(first[setting]['baselines'], kind, metric)}")
            broken = [column["broken"] if column else "-" for column in columns]
            if any(count not in (0, "-") for count in broken):
                lines.append(f"  {'broken, counted wrong':30}" + "".join(f"{count:>26}" for count in broken))
        if "balanced existence" in first[setting]:
            rates = [scores.get(setting, {}).get("balanced existence") for scores in scores_by_model.values()]
            cells = [format_rate(rate) if rate else "-" for rate in rates]
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
    """The three baselines that do not see the image, where they have a rate of this metric."""
    metric = metric.removesuffix(", lenient")
    if metric == "existence":  # the guess and the constant answer name a cell
        rates, always = ([1.0, 1.0], 0.0) if kind == "positive" else ([0.0, 0.0], 1.0)
    else:
        rates = [baselines.get(name, {}).get(metric) for name in ("uniform", "best constant")]
        always = None if None in rates else 0.0
    cells = zip((*rates, always), (10, 10, 8), strict=True)
    return "".join(f"{'' if r is None else f'{100 * r:.1f}':>{width}}" for r, width in cells)


def describe(config: "Config", image_size: int, num_image_tokens: int) -> list[str]:
    """Lines about the protocol and the size of a cell as the model sees it, in pixels and in patches."""
    patches = math.isqrt(num_image_tokens)
    is_grid = patches**2 == num_image_tokens  # not for the image tokens of Phi-3-vision
    cells = ", ".join(
        f"{n}x{n}: {image_size // n} px" + f", {patches / n:g} patches" * is_grid for n in config.grids if image_size
    )
    lines = [f"protocol {config.protocol}; a cell's side: {cells}"]
    if max(config.images) > 1 and is_grid:
        lines.append("several images per prompt: PaliGemma's pretraining shows one")
    return lines


# ---- response files
def file_names(target: object) -> object:
    """A target, or the targets of several needles, without the folders of the release's annotations (val2014/)."""
    if isinstance(target, list):
        return [file_names(one) for one in target]
    return Path(target).name if isinstance(target, str) else target  # a broken row may hold anything


def write_official(rows: list[dict], folder: Path, model_name: str) -> list[Path]:
    """Write the files that the benchmark's own scorer reads: {folder}/COCO_val2014_{first}_{last}/....json.

    The scorer splits the file name at "_" and takes "needles" in it as the sign of several needles, so both are
    replaced in the model's name.
    """
    version = re.sub(r"[^A-Za-z0-9.-]+", "-", model_name).strip("-.") or "model"
    version = re.sub("needles", "needle", version, flags=re.IGNORECASE)
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
                "target_path": file_names(row.get("target")),
                "caption": (row.get("caption") or [None])[0] if needles == 1 else row.get("caption"),
            }
            for row in group
        ]
        files.append(part / f"paligemma_{version}_{images}_{grid}_{grid}{more}.json")
        write_json(files[-1], entries)
    return files
