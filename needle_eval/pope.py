"""POPE: does a model see objects that are not there? (Li et al., arXiv 2305.10355; AoiDragon/POPE)

Yes/no questions about COCO val2014 images in three splits. Question files and images are read from disk; nothing is
downloaded. Unlike MMNeedle, it has no haystacks: each question is about one image.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import msgspec

from errors import UserError
from needle_eval.questions import (
    AnswerRow,
    Question,
    check_inside,
    check_some_image_exists,
    check_unique_ids,
    read_question_rows,
)
from needle_eval.statistics import format_percent, format_rate, rate

if TYPE_CHECKING:
    from eval_mmnih import Config

Split = Literal["random", "popular", "adversarial"]
SPLITS = get_args(Split)
FLAGS = ("image_folder",)
NAME_FLAGS = ()
HAS_CELLS, LONG_QUESTIONS_ARE_WRONG = False, False
MAX_NEW_TOKENS = 10
DIGITS = 2  # after the decimal point of percentages, as in the paper
SOURCE = "use that of AoiDragon/POPE, output/coco"


# ---- questions
def load_questions(config: "Config") -> list[Question]:
    """The first `config.samples` questions (0: all) of each split, with images in `config.image_folder`.

    Raises UserError with the file and line of a bad row, and when none of the images exists.
    """
    if config.data.partition(":")[0] == "haystack" or not config.image_folder:
        raise UserError("POPE needs --data, the folder of its files, and --image_folder, that of COCO val2014")
    folder, images = Path(config.data), Path(config.image_folder)
    questions = [q for split in SPLITS for q in read_split(folder, images, split, config.prefix, config.samples)]
    check_some_image_exists(questions, "give their folder by --image_folder")
    return questions


class PopeRow(msgspec.Struct):
    """One line of a released file."""

    question_id: int | str
    image: Annotated[str, msgspec.Meta(min_length=1)]
    text: Annotated[str, msgspec.Meta(min_length=1)]
    label: Literal["yes", "no"]


def read_split(folder: Path, images: Path, split: str, prefix: str = "", limit: int = 0) -> list[Question]:
    """The first `limit` questions (0: all) of coco_pope_{split}.json in `folder`, or of the same file with .gz.

    The file holds one JSON object per line. `prefix` goes before each text. Images are in the folder `images` and are
    not opened here. Raises UserError with the file and line of a bad row; an image outside `images` makes a row bad.
    """
    path = folder / f"coco_pope_{split}.json"
    packed = path.with_suffix(".json.gz")
    if packed.is_file() and not path.is_file():
        path = packed
    questions = []
    for name, row in read_question_rows(path, PopeRow, limit, SOURCE):
        check_inside(images, [row.image], name)
        questions.append(
            Question(
                id=f"pope/{split}/{row.question_id}",
                setting=split,
                images=(str(images / row.image),),
                prompt=prefix + row.text,
                ground_truth=row.label,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        )
    check_unique_ids(questions, path)
    return questions


# ---- answers
class PopeAnswer(AnswerRow, kw_only=True):
    """The fields of an answer row that the scores are computed from."""

    setting: Split
    ground_truth: Literal["yes", "no"]
    prompt: str


ANSWER_ROW = PopeAnswer


def parse_pope(response: str | None) -> str:
    """The official rule (evaluate.py of AoiDragon/POPE): cut the response at the first full stop, drop commas, split
    at spaces; "no" if one of the words is No, not or no, else "yes". None gives "none", which is never right.
    """
    if response is None:
        return "none"
    words = response.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def is_invalid(response: str | None) -> bool:
    """Whether a response is not yes or no, ignoring case, surrounding whitespace and one full stop at the end."""
    return response is None or response.strip().removesuffix(".").strip().lower() not in ("yes", "no")


def is_correct(row: dict) -> bool:
    """Whether an answer row is right by the official rule."""
    return parse_pope(row["response"]) == row["ground_truth"]


# ---- scores
def score(rows: list[dict]) -> dict:
    """Scores of answer rows (`questions.Question`): {split: {...}, "mean": {...}}, in [0, 1], with yes as the positive.

    A split has n; accuracy, precision, recall, yes_ratio (of the predictions) and invalid (`is_invalid`), each a
    `statistics.rate` with its counts; f1, broken (responses of None), and under "baselines" the same metrics of the
    constant answers. Undefined values are None, such as precision and f1 where no answer is yes. The six questions of
    an image are treated as independent, so the intervals are a little narrow. "mean" is over the splits present.
    """
    by_split = {}
    for row in rows:
        by_split.setdefault(row["setting"], []).append(row)
    scores = {split: score_split(by_split[split]) for split in SPLITS if split in by_split}
    accuracies, f1s = [s["accuracy"]["rate"] for s in scores.values()], [s["f1"] for s in scores.values()]
    mean = {
        "splits": len(scores),
        "accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
        "f1": sum(f1s) / len(f1s) if f1s and None not in f1s else None,
    }
    return scores | {"mean": mean}


def score_split(rows: list[dict]) -> dict:
    """Metrics of one split, and of the two constant answers."""
    truths = [row["ground_truth"] for row in rows]
    responses = [row["response"] for row in rows]
    return metrics(truths, [parse_pope(response) for response in responses]) | {
        "invalid": rate(sum(map(is_invalid, responses)), len(rows)),
        "broken": responses.count(None),
        "baselines": {f"always {word}": metrics(truths, [word] * len(rows)) for word in ("yes", "no")},
    }


def metrics(truths: list[str], predictions: list[str]) -> dict:
    """POPE's five metrics with their counts."""
    n, yes, said_yes = len(truths), truths.count("yes"), predictions.count("yes")
    pairs = Counter(zip(truths, predictions, strict=True))
    found = pairs["yes", "yes"]
    return {
        "n": n,
        "accuracy": rate(found + pairs["no", "no"], n),
        "precision": rate(found, said_yes),
        "recall": rate(found, yes),
        "f1": 2 * found / (said_yes + yes) if said_yes and yes else None,
        "yes_ratio": rate(said_yes, n),
    }


# ---- what is printed and written
def format_table(scores_by_model: dict[str, dict]) -> list[str]:
    """Lines to print, one block per model: percentages, the accuracy with its 95 % interval, "-" for undefined."""
    lines = []
    for model, scores in scores_by_model.items():
        lines += [
            f"\n{model}",
            format_line("POPE", "n", "accuracy", "precision", "recall", "F1", "yes ratio", "invalid"),
        ]
        for split in (name for name in SPLITS if name in scores):
            lines.append(format_metrics(split, scores[split]))
            lines += [format_metrics(f"  {name}", found) for name, found in scores[split]["baselines"].items()]
        mean = scores["mean"]
        name = f"mean of {mean['splits']}"
        lines.append(
            format_line(name, "", format_percent(mean["accuracy"], DIGITS), "", "", format_percent(mean["f1"], DIGITS))
        )
    return lines


def format_metrics(name: str, found: dict) -> str:
    accuracy = found["accuracy"]
    interval = format_rate(accuracy, DIGITS)
    rates = [found["precision"]["rate"], found["recall"]["rate"], found["f1"], found["yes_ratio"]["rate"]]
    if "invalid" in found:  # a constant answer has none
        rates.append(found["invalid"]["rate"])
    return format_line(name, str(found["n"]), interval, *(format_percent(value, DIGITS) for value in rates))


def format_line(name: str, n: str, accuracy: str, *others: str) -> str:
    return f"{name:12} {n:>6}  {accuracy:23}{''.join(f'{cell:>10}' for cell in others)}".rstrip()


def write_official(rows: list[dict], folder: Path, model_name: str) -> list[Path]:
    """Write {model}_coco_pope_{split}.json for each split: one {"question", "answer"} per line, in question order.

    The official evaluate.py pairs lines with labels by their order and cannot skip a line or count it as wrong, so a
    split with broken questions gets no file.
    """
    files = []
    for split in SPLITS:
        part = [row for row in rows if row["setting"] == split]
        if part and all(row["response"] is not None for row in part):
            lines = [json.dumps({"question": row["prompt"], "answer": row["response"]}) + "\n" for row in part]
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{model_name}_coco_pope_{split}.json")
            files[-1].write_text("".join(lines), encoding="utf-8")
    return files
