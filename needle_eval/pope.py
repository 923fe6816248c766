"""POPE: does a model see objects that are not there? (Li et al., arXiv 2305.10355; AoiDragon/POPE)

Yes/no questions over COCO val2014 pictures in three splits. The files and the pictures are read from disk, none is
downloaded. Another benchmark than MMNeedle, and not a haystack: one picture, one question.
"""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from errors import UserError
from needle_eval.questions import Question, check_distinct
from needle_eval.statistics import rate

SPLITS = ("random", "popular", "adversarial")


# ---- questions
def read_pope(
    folder: str | Path,
    images: str | Path,
    splits: Iterable[str] = SPLITS,
    prefix: str = "",
    limit: int | None = None,
) -> list[Question]:
    """The first `limit` questions, or all, of every split: coco_pope_{split}.json in `folder`, or the same with .gz.

    The files hold one json object a line: {"question_id", "image", "text", "label"}. `prefix` goes before the text of
    each question. Pictures lie in `images`; they are not opened here. Raises UserError naming the file and line.
    """
    questions = []
    for split in splits:
        path = _file_of(Path(folder), split)
        rows = [_question(f"{path}:{n}", split, line, Path(images), prefix) for n, line in _lines(path, limit)]
        if not rows:
            raise UserError(f"{path}: holds no question: take the file from AoiDragon/POPE, output/coco")
        check_distinct(rows, path)
        questions += rows
    return questions


def _file_of(folder: Path, split: str) -> Path:
    if split not in SPLITS:
        raise UserError(f"POPE has no split {split!r}: give some of {', '.join(SPLITS)}")
    plain = folder / f"coco_pope_{split}.json"
    packed = plain.with_suffix(".json.gz")
    return packed if packed.is_file() and not plain.is_file() else plain


def _lines(path: Path, limit: int | None) -> list[tuple[int, str]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): take it from AoiDragon/POPE, output/coco") from error
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()][:limit]


def _question(name: str, split: str, line: str, images: Path, prefix: str) -> Question:
    try:
        row = json.loads(line)
        number, image, text, label = (row[key] for key in ("question_id", "image", "text", "label"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: no row of question_id, image, text, label ({error}): mend or delete it") from error
    if label not in ("yes", "no") or not (isinstance(image, str) and image and isinstance(text, str) and text):
        raise UserError(f"{name}: image and text must be strings, and label yes or no: mend or delete the line")
    return Question(f"pope/{split}/{number}", split, (str(images / image),), prefix + text, label, 10, {})


# ---- answers
def parse_pope(response: str | None) -> str:
    """The official reading (evaluate.py of AoiDragon/POPE): "no" if No, not or no is a word, split at blanks, of what
    stands before the first full stop, commas dropped; else "yes". No response at all is "none", and never right.
    """
    if response is None:
        return "none"
    words = response.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def is_invalid(response: str | None) -> bool:
    """Whether a response is anything but yes or no, whatever its case, blanks around it and one full stop after it."""
    return response is None or response.strip().removesuffix(".").strip().lower() not in ("yes", "no")


# ---- scores
def score_pope(rows: Iterable[dict]) -> dict:
    """Scores of answer rows (`haystack.Question`): {split: {...}, "mean": {...}}, fractions of 1, yes as the positive.

    A split has n, accuracy, precision, recall, yes_ratio (of the predictions), invalid (`is_invalid`), each as
    `intervals.rate` with its counts, f1, broken (responses of None), and under "baselines" the same metrics of the
    constant answers. What is undefined is None, as precision and f1 are where no answer is yes. The six questions of a
    picture are taken as independent, so that the intervals are a little narrow. "mean" is over the splits present.
    Raises UserError for a row that is no answer to a POPE question.
    """
    by_split = {}
    for row in rows:
        if row["setting"] not in SPLITS or row["ground_truth"] not in ("yes", "no"):
            raise UserError(f"{row['id']}: no answer to a POPE question: give the answers file of a POPE run")
        by_split.setdefault(row["setting"], []).append(row)
    scores = {split: _score_split(by_split[split]) for split in SPLITS if split in by_split}
    return scores | {"mean": _mean(list(scores.values()))}


def _score_split(rows: list[dict]) -> dict:
    truths = [row["ground_truth"] for row in rows]
    responses = [row["response"] for row in rows]
    return _metrics(truths, [parse_pope(response) for response in responses]) | {
        "invalid": rate(sum(map(is_invalid, responses)), len(rows)),
        "broken": responses.count(None),
        "baselines": {f"always {word}": _metrics(truths, [word] * len(rows)) for word in ("yes", "no")},
    }


def _metrics(truths: list[str], predictions: list[str]) -> dict:
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


def _mean(splits: list[dict]) -> dict:
    accuracies = [scores["accuracy"]["rate"] for scores in splits]
    f1s = [scores["f1"] for scores in splits]
    return {
        "splits": len(splits),
        "accuracy": sum(accuracies) / len(splits) if splits else None,
        "f1": sum(f1s) / len(splits) if splits and None not in f1s else None,
    }


def pope_table(scores: dict) -> list[str]:
    """Lines to print of `score_pope`'s scores, in percent, the accuracy with its 95 % interval, "-" for undefined."""
    lines = [_line("POPE", "n", "accuracy", "precision", "recall", "F1", "yes ratio", "invalid")]
    for split in [name for name in scores if name != "mean"]:
        lines.append(_metrics_line(split, scores[split]))
        lines += [_metrics_line(f"  {name}", metrics) for name, metrics in scores[split]["baselines"].items()]
    mean = scores["mean"]
    return [*lines, _line(f"mean of {mean['splits']}", "", _percent(mean["accuracy"]), "", "", _percent(mean["f1"]))]


def _metrics_line(name: str, metrics: dict) -> str:
    accuracy = metrics["accuracy"]
    interval = f"{_percent(accuracy['rate'])} [{_percent(accuracy['low'])}, {_percent(accuracy['high'])}]"
    rates = [metrics["precision"]["rate"], metrics["recall"]["rate"], metrics["f1"], metrics["yes_ratio"]["rate"]]
    if "invalid" in metrics:  # a constant answer has none
        rates.append(metrics["invalid"]["rate"])
    return _line(name, str(metrics["n"]), interval, *map(_percent, rates))


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f}"


def _line(name: str, n: str, accuracy: str, *others: str) -> str:
    return f"{name:12} {n:>6}  {accuracy:23}{''.join(f'{cell:>10}' for cell in others)}".rstrip()
