"""MM-NIAH: needles in long documents of text and images (Wang et al., arXiv 2406.07230; OpenGVLab/MM-NIAH).

This benchmark differs from MMNeedle (arXiv 2406.11230). The module holds its reader, prompts, scoring rule and bins.
This repository publishes no MM-NIAH scores: most documents are longer than the 8,192 positions of PaliGemma's decoder,
which also takes all images before the text.

Context lengths are in tokens, text and images together, as the rows give them; depths are fractions of the document.
"""

import bisect
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import msgspec

from errors import UserError
from files import decode_typed
from needle_eval.questions import (
    ROW_FIX,
    AnswerRow,
    Question,
    check_inside,
    check_some_image_exists,
    check_unique_ids,
    read_question_rows,
)
from needle_eval.statistics import format_percent, format_rate, mean_rate

if TYPE_CHECKING:
    from eval_mmnih import Config

Task = Literal[
    "retrieval-text", "counting-text", "reasoning-text", "retrieval-image", "counting-image", "reasoning-image"
]
TASKS = get_args(Task)
FLAGS = ("image_folder",)
NAME_FLAGS = ()
HAS_CELLS, LONG_QUESTIONS_ARE_WRONG = False, True
IMAGE_MARK = "<image>"  # placeholder of an image in the text
CONTEXT_BINS = (1000, 2000, 4000, 8000, 12000, 16000, 24000, 32000, 40000, 48000, 64000)  # tokens, lower ends
DEPTH_BINS = 5
MAX_NEW_TOKENS, MAX_NEW_TOKENS_COUNTING = 16, 32
SOURCE = "give a folder of the release, or one of its files"


# ---- questions
def load_questions(config: "Config") -> list[Question]:
    """The first `config.samples` questions (0: all) of each task's {task}.jsonl in the folder `config.data`.

    `config.data` may also be a single file whose name starts with its task, such as counting-text-easy.jsonl. Images
    are below `config.image_folder`, by default the data folder. Prompts are flattened and start with `config.prefix`.
    Raises UserError with the file and line of a bad row, and when none of the images exists.
    """
    if config.data.partition(":")[0] == "haystack":
        raise UserError(f"--benchmark=mm-niah --data={config.data}: give the folder or a file of the released MM-NIAH")
    images = Path(config.image_folder or config.data)
    files = task_files(Path(config.data)).items()
    questions = [
        question for task, file in files for question in read_task(file, task, images, config.prefix, config.samples)
    ]
    check_some_image_exists(questions, "give their folder by --image_folder")
    return questions


def task_files(path: Path) -> dict[str, Path]:
    """Task -> file: all tasks of a folder, or the one task of a single file."""
    if not path.is_file():
        return {task: path / f"{task}.jsonl" for task in TASKS}
    named = [task for task in TASKS if path.name.startswith(task)]
    if not named:
        raise UserError(f"{path}: its name starts with no task of {', '.join(TASKS)}: rename the file")
    return {named[0]: path}


Depth = Annotated[float, msgspec.Meta(ge=0, le=1)]
Length = Annotated[int, msgspec.Meta(ge=0)] | Annotated[float, msgspec.Meta(ge=0)]  # int or float, as in the file


class NiahMeta(msgspec.Struct):
    """The fields of a row that describe its document and its choices."""

    context_length: Length
    placed_depth: Depth | Annotated[list[Depth], msgspec.Meta(min_length=1)]
    choices: list[str] | None = None
    choices_image_path: list[str] | None = None


class NiahRow(msgspec.Struct):
    """One line of a released file."""

    id: int | str
    images_list: list[str]
    context: str
    question: str
    answer: int | str | list[int]
    meta: NiahMeta


def read_task(file: Path, task: str, images: Path, prefix: str = "", limit: int = 0) -> list[Question]:
    """The first `limit` questions (0: all) of a task's file. Images are below `images` and are not opened here.

    Raises UserError with the file and line of a bad row; an image outside `images` makes a row bad.
    """
    rows = read_question_rows(file, NiahRow, limit, f"{SOURCE}; or leave {task} out")
    questions = [make_question(name, task, row, images, prefix) for name, row in rows]
    check_unique_ids(questions, file)
    return questions


def make_question(name: str, task: str, row: NiahRow, images: Path, prefix: str) -> Question:
    """The question of one row; `name` is its file and line."""
    answer, meta = row.answer, row.meta
    if task.startswith("counting") and isinstance(answer, str):  # some released files have the list as a string
        answer = decode_typed(answer.encode("utf-8", "replace"), list[int], f"{name}, answer", ROW_FIX)
    if meta.choices and meta.choices_image_path:
        raise UserError(f"{name}: choices and choices_image_path exclude each other: {ROW_FIX}")
    choices = len(meta.choices or meta.choices_image_path or ())
    if not answer_fits(task, answer, choices):
        raise UserError(f"{name}: answer {answer!r} is none for {task} with {choices} choices: {ROW_FIX}")
    question, paths = build_question(row)
    prompt = f"{row.context}\n{question}"
    if prompt.count(IMAGE_MARK) != len(paths):
        marks = f"{prompt.count(IMAGE_MARK)} {IMAGE_MARK} marks for {len(paths)} images"
        raise UserError(f"{name}: {marks}: {ROW_FIX}")
    check_inside(images, paths, name)
    return Question(
        id=f"mm-niah/{task}/{row.id}",
        setting=task,
        images=tuple(str(images / path) for path in paths),
        prompt=prefix + flatten_prompt(prompt),
        ground_truth=answer,
        max_new_tokens=MAX_NEW_TOKENS_COUNTING if task.startswith("counting") else MAX_NEW_TOKENS,
        fields={
            "question_id": row.id,
            "context_length": meta.context_length,
            "placed_depth": meta.placed_depth,
            "question": question,
            "answer": answer,
        },
    )


def build_question(row: NiahRow) -> tuple[str, list[str]]:
    """A row's question with its choices and the official instruction, and all images of the row in prompt order.

    The official prompt is context, newline, question (get_input in utils/tools.py of OpenGVLab/MM-NIAH).
    """
    choice_images = row.meta.choices_image_path or []
    shown = [IMAGE_MARK] * len(choice_images) if choice_images else row.meta.choices or []
    lines = [row.question, *(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(shown))]
    if shown:
        lines.append("Answer with the option's letter from the given choices directly.")
    else:
        lines.append("Answer the question using a single word or phrase.")
    return "\n".join(lines), row.images_list + choice_images


def flatten_prompt(prompt: str) -> str:
    """A prompt without its `<image>` marks: PaliGemma takes all images, in their order, before the text."""
    return prompt.replace(IMAGE_MARK, "")


def answer_fits(task: str, answer: object, choices: int) -> bool:
    """Whether a ground truth has the type that its task needs: a list of counts, an option's number, or text."""
    if task.startswith("counting"):
        return isinstance(answer, list) and bool(answer) and all(type(count) is int for count in answer)
    if choices:
        return type(answer) is int and 0 <= answer < choices
    return isinstance(answer, str) and bool(answer.strip())


# ---- answers
class NiahAnswer(AnswerRow, kw_only=True):
    """The fields of an answer row that the scores are computed from."""

    setting: Task
    ground_truth: int | Annotated[str, msgspec.Meta(min_length=1)] | Annotated[list[int], msgspec.Meta(min_length=1)]
    context_length: Length
    placed_depth: Depth | Annotated[list[Depth], msgspec.Meta(min_length=1)]
    question_id: int | str
    question: str
    answer: int | str | list[int]


ANSWER_ROW = NiahAnswer


def score_answer(response: str | None, truth: object) -> float:
    """The official score of a response in [0, 1], by the type of the truth; None scores 0.

    A list: the share of its positions that a JSON list has right; extra entries are ignored. An int: 1 if the response
    is the option's letter, or its number counted from 0. A string: 1 if the response contains it as whole words, both
    sides through `vqa_normalise`. By this official rule, kept unchanged, "not a banana" is right for banana, and
    "B, because" is wrong for B (is_correct in calculate_scores.py of OpenGVLab/MM-NIAH).
    """
    if response is None:
        return 0.0
    response = response.strip(".")
    if isinstance(truth, list):
        return score_list(response, truth)
    if isinstance(truth, int):
        return float(read_option(response) == truth)
    words = re.escape(vqa_normalise(truth))
    return float(re.search(rf"\b{words}\b", vqa_normalise(response)) is not None)


def score_list(response: str, truth: list) -> float:
    """The share of positions of `truth` that a JSON list has right; the lists of a JSON object are concatenated."""
    try:
        given = json.loads(response.replace("json", "").replace("```", "").strip())
        if isinstance(given, dict):
            given = sum(given.values(), start=[])
    except (ValueError, TypeError, RecursionError):
        return 0.0
    if not isinstance(given, list):
        return 0.0
    return sum(g == t for g, t in zip(given, truth, strict=False)) / len(truth)


def read_option(response: str) -> int | None:
    """The option, counted from 0, that a response names."""
    if response.isdecimal() and len(response) < 4000:  # Python's int() refuses longer ones
        return int(response)
    text = response.lower().replace("the answer is", "").replace("*", "")
    if "." in text:
        text = text.split(".")[0].replace(",", "")
    text = text.strip()
    if "the camera is moving left" in text:
        return 0
    if "the camera is moving right" in text:
        return 1
    return ord(text) - ord("a") if len(text) == 1 else None


UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen"""
TENS = """twenty thirty forty fifty sixty seventy eighty ninety"""
NUMBERS = {word: str(n) for n, word in enumerate(UNITS.split())} | {
    word: str(10 * n) for n, word in enumerate(TENS.split(), 2)
}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
CONTRACTIONS = {  # restores one missing apostrophe
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this entry reversed
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def vqa_normalise(text: str, numbers: dict[str, str] = NUMBERS) -> str:
    """Normalise an answer as the VQA evaluation does: remove articles, punctuation and capitals, write numbers up to
    twenty and tens as digits, restore apostrophes in contractions (vqaEval.py of GT-Vision-Lab/VQA, MM-NIAH's copy).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text)
    plain = text
    for mark in PUNCTUATION:
        glued = has_thousands or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if glued else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)  # the official code passes a flag, 32, as the count
    words = [numbers.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def context_bin(length: float) -> int | None:
    """The index of a context length's bin: 0 for 1000, 9 for 63,999. None below 1000: the row is dropped."""
    place = bisect.bisect_right(CONTEXT_BINS, length) - 1
    return None if place < 0 else place


def depth_bin(depth: float | list[float]) -> int:
    """The fifth of the document that a needle, or the mean depth of several, falls in. 0.6 falls in 2, as in the
    official code, which divides by 1 / 5."""
    depth = sum(depth) / len(depth) if isinstance(depth, list) else depth
    return min(int(depth / (1 / DEPTH_BINS)), DEPTH_BINS - 1)


# ---- scores
def is_correct(row: dict) -> bool:
    """Whether an answer row has the full official score."""
    return score_answer(row["response"], row["ground_truth"]) == 1


def score(rows: list[dict]) -> dict:
    """Scores of answer rows (`questions.Question`) by the official rule, and the plain mean over the rows.

    Returns {"tasks": {task: {...}}, "overall": ...}, scores in [0, 1]. A task has n, dropped (rows below 1000 tokens,
    which count nowhere), broken (responses of None), "cells" [context bin][depth bin] and "mean", each a
    `statistics.mean_rate`; "by_context" and their mean "official", where a bin's score is the mean of its five depth
    cells and a cell without rows counts 0 (calculate_scores.py of OpenGVLab/MM-NIAH). "overall" is the mean of the
    tasks, None unless all six are present.
    """
    by_task = {}
    for row in rows:
        by_task.setdefault(row["setting"], []).append(row)
    tasks = {task: score_task(by_task[task]) for task in TASKS if task in by_task}
    return {"tasks": tasks, "overall": score_overall(list(tasks.values())) if len(tasks) == len(TASKS) else None}


def score_task(rows: list[dict]) -> dict:
    """Scores of one task's rows, by context bin and depth bin."""
    binned = [row for row in rows if context_bin(row["context_length"]) is not None]
    scores = [[[] for _ in range(DEPTH_BINS)] for _ in CONTEXT_BINS]
    for row in binned:
        value = score_answer(row["response"], row["ground_truth"])
        scores[context_bin(row["context_length"])][depth_bin(row["placed_depth"])].append(value)
    cells = [[mean_rate(cell) for cell in column] for column in scores]
    by_context = [average([cell["rate"] or 0.0 for cell in column]) for column in cells]
    return {
        "n": len(binned),
        "dropped": len(rows) - len(binned),
        "broken": sum(row["response"] is None for row in binned),
        "official": average(by_context),
        "mean": mean_rate([value for column in scores for cell in column for value in cell]),
        "by_context": by_context,
        "cells": cells,
    }


def score_overall(tasks: list[dict]) -> dict:
    """The means of all tasks' scores."""
    by_context = [average(column) for column in zip(*(task["by_context"] for task in tasks), strict=True)]
    rates = [task["mean"]["rate"] for task in tasks]
    return {
        "official": average(by_context),
        "mean": None if None in rates else average(rates),
        "by_context": by_context,
    }


def average(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# ---- what is printed and written
def format_table(scores_by_model: dict[str, dict]) -> list[str]:
    """Lines to print, one block per model, in percent; a context bin without rows is shown as "-" and counts 0."""
    bins = [f"{length // 1000}k" for length in CONTEXT_BINS]
    lines = []
    for model, scores in scores_by_model.items():
        lines += [f"\n{model}", format_line("MM-NIAH", "n", "dropped", "official", "mean over rows", bins)]
        for task, found in scores["tasks"].items():
            mean = found["mean"]
            interval = format_rate(mean)
            filled = [any(cell["n"] for cell in column) for column in found["cells"]]
            contexts = [
                format_percent(value if rows else None) for value, rows in zip(found["by_context"], filled, strict=True)
            ]
            lines.append(
                format_line(task, found["n"], found["dropped"], format_percent(found["official"]), interval, contexts)
            )
        overall = scores["overall"]
        if overall is None:
            lines.append(f"no overall score: {len(scores['tasks'])} of {len(TASKS)} tasks")
        else:
            contexts = [format_percent(value) for value in overall["by_context"]]
            official, mean = format_percent(overall["official"]), format_percent(overall["mean"])
            lines.append(format_line("overall", "", "", official, mean, contexts))
    return lines


def format_line(name: str, n: object, dropped: object, official: str, mean: str, contexts: list[str]) -> str:
    columns = "".join(f"{cell:>6}" for cell in contexts)
    return f"{name:16} {n:>6} {dropped:>8} {official:>9}  {mean:20}{columns}".rstrip()


def write_official(rows: list[dict], folder: Path, model_name: str) -> list[Path]:
    """Write {model}_{task}-val.jsonl for each task, with the names and rows that the official scorer parses.

    A missing response is written as "None", as the official runners do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    columns = ("question_id", "question", "answer", "response", "context_length", "placed_depth")
    files = []
    for task in dict.fromkeys(row["setting"] for row in rows):
        lines = [
            json.dumps({key: "None" if row[key] is None else row[key] for key in columns}) + "\n"
            for row in rows
            if row["setting"] == task
        ]
        files.append(folder / f"{model_name}_{task}-val.jsonl")
        files[-1].write_text("".join(lines), encoding="utf-8")
    return files
