"""The metrics of --metric, which score answers from 0 to 1.

An answer row has "response", "ground_truth" (the suffix of its row) and "answers" (all accepted answers).

exact   the share of exact answers
vqa     VQAv2's accuracy over the answers of ten annotators
anls    average normalised Levenshtein similarity (arXiv 1905.13648) to the closest accepted answer
rouge   F-measure of ROUGE-L with the closest accepted answer
map     COCO's mean average precision at IoU 0.50:0.95 of the boxes in the answers
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Literal

from boxes import LOC_STEPS, locs_to_boxes
from errors import UserError
from needle_eval.mm_niah import NUMBERS, vqa_normalise
from needle_eval.questions import is_exact

Metric = Literal["exact", "vqa", "anls", "rouge", "map"]
PACKAGES = {"anls": "anls", "rouge": "rouge-score", "map": "pycocotools"}  # optional packages on PyPI
ANNOTATORS = 10  # per question in VQAv2
AGREEING = 3  # a response that this many annotators agree with, one left out, is fully right
VQA_NUMBERS = {word: digit for word, digit in NUMBERS.items() if int(digit) <= 10} | {"none": "0"}


def check_installed(metric: Metric) -> None:
    """Raise UserError if the package that computes the metric is missing."""
    package = PACKAGES.get(metric)
    if package and importlib.util.find_spec(package.replace("-", "_")) is None:
        raise UserError(f"--metric={metric}: {package} is not installed: pip install {package}")


def check_answers(metric: Metric, name: str, suffix: str, answers: Sequence[str]) -> None:
    """Raise UserError, starting with `name`, if a row with this suffix and these accepted answers cannot be scored."""
    if metric == "vqa" and len(answers) != ANNOTATORS:
        raise UserError(
            f"{name}: --metric=vqa needs the answers of {ANNOTATORS} annotators, the row has {len(answers)}: give them "
            'as "answers", or use --metric=exact'
        )
    if metric == "map" and not read_boxes(suffix):
        raise UserError(f"{name}: --metric=map needs boxes, <loc....> four times and a label, in every suffix")


def score_answers(metric: Metric, rows: list[dict]) -> float:
    """The metric over answer rows, 0 to 1; 0 without rows."""
    if not rows:
        return 0.0
    if metric == "map":
        return mean_average_precision([(row["response"], row["ground_truth"]) for row in rows])
    if metric == "exact":
        return sum(is_exact(row["response"], row["ground_truth"]) for row in rows) / len(rows)
    score = {"vqa": vqa_accuracy, "anls": anls, "rouge": rouge_l}[metric]
    return sum(score(row["response"], row["answers"]) for row in rows) / len(rows)


def vqa_accuracy(response: str, answers: Sequence[str]) -> float:
    """min(agreeing annotators / 3, 1), averaged over all ways to leave one annotator out.

    If all annotators agree, only the identical response is right; otherwise all texts are normalised first
    (vqaEval.py of GT-Vision-Lab/VQA).
    """
    response, *answers = (text.replace("\t", " ").replace("\n", " ").strip() for text in (response, *answers))
    if len(set(answers)) > 1:
        response, *answers = (vqa_normalise(text, VQA_NUMBERS) for text in (response, *answers))
    matches = [answer == response for answer in answers]
    return sum(min(1, (sum(matches) - match) / AGREEING) for match in matches) / len(matches)


def anls(response: str, answers: Sequence[str]) -> float:
    """1 - edit distance / length of the longer text, for the closest answer; 0 if the ratio is half or more."""
    from anls import anls_score

    return anls_score(response, list(answers))


def rouge_l(response: str, answers: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, for the closest answer."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score_multi(answers, response)["rougeL"].fmeasure


def read_boxes(text: str) -> list[tuple[list[float], str]]:
    """([x, y, width, height], label) of every box in an answer, in steps of its location tokens."""
    found = locs_to_boxes(text, LOC_STEPS, LOC_STEPS)
    return [([x0, y0, x1 - x0, y1 - y0], label.lower()) for (x0, y0, x1, y1), label in found]


def mean_average_precision(pairs: list[tuple[str, str]]) -> float:
    """COCO's AP of (response, answer) texts with boxes. All boxes of a response have the same confidence."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    answered, true = ([read_boxes(text) for text in texts] for texts in zip(*pairs, strict=True))
    labels = sorted({label for boxes in true for _, label in boxes})  # as in COCO, other labels are ignored
    category = {label: number for number, label in enumerate(labels, 1)}

    def annotations(images: list[list[tuple[list[float], str]]]) -> list[dict]:
        boxes = [(image, box, label) for image, found in enumerate(images, 1) for box, label in found]
        return [
            {"id": number, "image_id": image, "category_id": category[label], "bbox": box, "area": box[2] * box[3]}
            | {"iscrowd": 0, "score": 1.0}
            for number, (image, box, label) in enumerate((entry for entry in boxes if entry[2] in category), 1)
        ]

    detections = annotations(answered)
    if not detections:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # it prints tables
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(1, len(pairs) + 1)],
            "annotations": annotations(true),
            "categories": [{"id": number} for number in category.values()],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])
