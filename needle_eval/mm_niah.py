"""MM-NIAH: needles in long documents of text and pictures (Wang et al., arXiv 2406.07230; OpenGVLab/MM-NIAH).

Another benchmark than MMNeedle (arXiv 2406.11230), which haystack.py is about. Here are its reader, prompts, scoring
rule and bins. No MM-NIAH score is advertised: most documents are longer than the 8,192 positions of PaliGemma's
decoder, which also takes all pictures before the text.

Context lengths are in tokens, text and pictures together, as the rows tell them; depths are fractions of the document.
"""

import bisect
import json
import re
from collections.abc import Iterable
from pathlib import Path

from errors import UserError
from needle_eval.questions import Question, check_distinct
from needle_eval.statistics import mean_rate

TASKS = ("retrieval-text", "counting-text", "reasoning-text", "retrieval-image", "counting-image", "reasoning-image")
MARK = "<image>"  # where a picture stands in the text
CONTEXT_BINS = (1000, 2000, 4000, 8000, 12000, 16000, 24000, 32000, 40000, 48000, 64000)  # tokens, from here on
DEPTH_BINS = 5


# ---- questions
def read_mm_niah(
    path: str | Path, images: str | Path, tasks: Iterable[str] = TASKS, limit: int | None = None
) -> list[Question]:
    """The first `limit` questions, or all, of {task}.jsonl in the folder `path`, task by task.

    Or `path` is one such file, whose name starts with its task: the released counting-text-easy.jsonl. Pictures are
    looked for below `images`; they are not opened here. Raises UserError naming the file and line of a bad row.
    """
    questions = []
    for task, file in _files(Path(path), tuple(tasks)).items():
        rows = [_question(f"{file}:{n}", task, line, Path(images)) for n, line in _lines(file, limit)]
        if not rows:
            raise UserError(f"{file}: holds no question: take the file from the release, or leave {task} out")
        check_distinct(rows, file)
        questions += rows
    return questions


def _files(path: Path, tasks: tuple[str, ...]) -> dict[str, Path]:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"MM-NIAH has no task {unknown[0]!r}: give some of {', '.join(TASKS)}")
    if not path.is_file():
        return {task: path / f"{task}.jsonl" for task in tasks}
    named = [task for task in tasks if path.name.startswith(task)]
    if not named:
        raise UserError(f"{path}: its name starts with no task of {', '.join(tasks)}: rename it or give its task")
    return {named[0]: path}


def _lines(path: Path, limit: int | None) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}): give a folder of the release, or one of its files"
        ) from error
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()][:limit]


def _question(name: str, task: str, line: str, images: Path) -> Question:
    try:
        row = json.loads(line)
        meta = row["meta"]
        told = {
            "question_id": row["id"],
            "context_length": meta["context_length"],
            "placed_depth": meta["placed_depth"],
        }
        answer = row["answer"]
        if task.startswith("counting") and isinstance(answer, str):
            answer = json.loads(answer)  # some released files have the list as a string
        question, paths = build_question(row)
        depth_bin(told["placed_depth"])  # both raise for what has no bin
        context_bin(told["context_length"])
        prompt = row["context"] + "\n" + question
        files = tuple(str(images / path) for path in paths)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{name}: no MM-NIAH row ({type(error).__name__}: {error}): mend or delete the line") from error
    choices = len(meta.get("choices") or meta.get("choices_image_path") or ())
    if not _answer_fits(task, answer, choices):
        raise UserError(f"{name}: answer {answer!r} is none for {task} with {choices} choices: mend or delete the line")
    if prompt.count(MARK) != len(paths):
        raise UserError(f"{name}: {prompt.count(MARK)} {MARK} marks for {len(paths)} pictures: mend or delete the line")
    told |= {"question": question, "answer": answer}
    tokens = 32 if task.startswith("counting") else 16
    return Question(f"mm-niah/{task}/{row['id']}", task, files, prompt, answer, tokens, told)


def build_question(row: dict) -> tuple[str, list[str]]:
    """A row's question with its choices and the official instruction, and all its pictures in prompt order.

    The prompt is context, newline, question (get_input in utils/tools.py of OpenGVLab/MM-NIAH). Raises ValueError for
    choices of both kinds.
    """
    meta, images = row["meta"], list(row["images_list"])
    choices, pictures = meta.get("choices"), meta.get("choices_image_path")
    if choices and pictures:
        raise ValueError("choices and choices_image_path exclude each other")
    shown = [MARK] * len(pictures) if pictures else choices or []
    lines = [row["question"], *(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(shown))]
    if shown:
        lines.append("Answer with the option's letter from the given choices directly.")
    else:
        lines.append("Answer the question using a single word or phrase.")
    return "\n".join(lines), images + list(pictures or [])


def _answer_fits(task: str, answer: object, choices: int) -> bool:
    if task.startswith("counting"):
        return isinstance(answer, list) and bool(answer) and all(type(count) is int for count in answer)
    if choices:
        return type(answer) is int and 0 <= answer < choices
    return isinstance(answer, str) and bool(answer.strip())


def flatten_prompt(prompt: str) -> str:
    """A prompt without its `<image>` marks: PaliGemma takes all pictures, in their order, before the text."""
    return prompt.replace(MARK, "")


# ---- scores
def score_answer(response: str | None, truth: object) -> float:
    """The official score of a response in [0, 1], by the type of the truth; None scores 0.

    A list: the share of positions that match, in json; more entries are free. An int: the option's letter, or its
    number from 0. A string: found as whole words, both sides through `vqa_normalise`. So "not a banana" is right for
    banana, and "B, because" wrong for B: the rule is kept as it is (is_correct in calculate_scores.py of
    OpenGVLab/MM-NIAH).
    """
    if response is None:
        return 0.0
    response = response.strip(".")
    if isinstance(truth, list):
        return _score_list(response, truth)
    if isinstance(truth, int):
        return float(_option(response) == truth)
    words = re.escape(vqa_normalise(truth))
    return float(re.search(rf"\b{words}\b", vqa_normalise(response)) is not None)


def _score_list(response: str, truth: list) -> float:
    try:
        given = json.loads(response.replace("json", "").replace("```", "").strip())
        if isinstance(given, dict):
            given = sum(given.values(), start=[])
    except (ValueError, TypeError, RecursionError):
        return 0.0
    if not isinstance(given, list):
        return 0.0
    return sum(g == t for g, t in zip(given, truth, strict=False)) / len(truth)


def _option(response: str) -> int | None:
    """The option, counted from 0, that a response names."""
    if response.isdecimal() and len(response) < 4000:  # Python refuses to read longer ones
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
CONTRACTIONS = {  # a form that lacks one apostrophe gets it back
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, letter in enumerate(word) if letter == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def vqa_normalise(text: str) -> str:
    """An answer as the VQA evaluation compares it: no articles, punctuation or capitals, numbers to twenty and tens as
    digits, apostrophes put back into contractions (vqaEval.py of GT-Vision-Lab/VQA, in MM-NIAH's copy).
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_thousands = re.search(r"\d,\d", text)
    plain = text
    for mark in PUNCTUATION:
        glued = has_thousands or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if glued else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=32)  # the official code passes a flag, 32, where the count belongs
    words = [NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def context_bin(length: float) -> int | None:
    """The place of a context length in CONTEXT_BINS: 1000 is in 0, 63,999 in 9. None below 1000: the row is dropped."""
    place = bisect.bisect_right(CONTEXT_BINS, length) - 1
    return None if place < 0 else place


def depth_bin(depth: float | list[float]) -> int:
    """The fifth of the document that a needle, or the mean of several, is in; 0.6 is in 2, as the official division has
    it. Raises ValueError outside [0, 1]."""
    depth = sum(depth) / len(depth) if isinstance(depth, list) else depth
    if not 0 <= depth <= 1:
        raise ValueError(f"placed_depth {depth} lies outside [0, 1]")
    return min(int(depth / (1 / DEPTH_BINS)), DEPTH_BINS - 1)


def score_mm_niah(rows: Iterable[dict]) -> dict:
    """Scores of answer rows (`haystack.Question`) by the official rule, and beside it the plain mean over the rows.

    {"tasks": {task: {...}}, "overall": ...}, fractions of 1. A task has n, dropped (rows below 1000 tokens, in no
    score), broken (responses of None), "cells" [context bin][depth bin] and "mean", each as `intervals.mean_rate`;
    "by_context" and their mean "official", where a bin's score is the mean of its five depth cells and a cell without
    rows counts 0 (calculate_scores.py of OpenGVLab/MM-NIAH). "overall" is the mean of the tasks, None unless all six
    are there. Raises UserError for a row that is no answer to an MM-NIAH question.
    """
    by_task = {}
    for row in rows:
        if row["setting"] not in TASKS or not {"context_length", "placed_depth"} <= row.keys():
            raise UserError(f"{row['id']}: no answer to an MM-NIAH question: give the answers file of an MM-NIAH run")
        by_task.setdefault(row["setting"], []).append(row)
    tasks = {task: _score_task(by_task[task]) for task in TASKS if task in by_task}
    return {"tasks": tasks, "overall": _overall(list(tasks.values())) if len(tasks) == len(TASKS) else None}


def _score_task(rows: list[dict]) -> dict:
    kept = [row for row in rows if context_bin(row["context_length"]) is not None]
    scores = [[[] for _ in range(DEPTH_BINS)] for _ in CONTEXT_BINS]
    for row in kept:
        score = score_answer(row["response"], row["ground_truth"])
        scores[context_bin(row["context_length"])][depth_bin(row["placed_depth"])].append(score)
    cells = [[mean_rate(cell) for cell in column] for column in scores]
    by_context = [_mean([cell["rate"] or 0.0 for cell in column]) for column in cells]
    return {
        "n": len(kept),
        "dropped": len(rows) - len(kept),
        "broken": sum(row["response"] is None for row in kept),
        "official": _mean(by_context),
        "mean": mean_rate([score for column in scores for cell in column for score in cell]),
        "by_context": by_context,
        "cells": cells,
    }


def _overall(tasks: list[dict]) -> dict:
    by_context = [_mean(column) for column in zip(*(task["by_context"] for task in tasks), strict=True)]
    rates = [task["mean"]["rate"] for task in tasks]
    return {
        "official": _mean(by_context),
        "mean": None if None in rates else _mean(rates),
        "by_context": by_context,
    }


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def mm_niah_table(scores: dict) -> list[str]:
    """Lines to print of `score_mm_niah`'s scores, in percent; a context bin without rows reads "-" and counts 0."""
    bins = [f"{length // 1000}k" for length in CONTEXT_BINS]
    lines = [_line("MM-NIAH", "n", "dropped", "official", "mean over rows", bins)]
    for task, found in scores["tasks"].items():
        mean = found["mean"]
        interval = f"{_percent(mean['rate'])} [{_percent(mean['low'])}, {_percent(mean['high'])}]"
        filled = [any(cell["n"] for cell in column) for column in found["cells"]]
        contexts = [_percent(score if rows else None) for score, rows in zip(found["by_context"], filled, strict=True)]
        lines.append(_line(task, found["n"], found["dropped"], _percent(found["official"]), interval, contexts))
    overall = scores["overall"]
    if overall is None:
        return [*lines, f"no overall score: {len(scores['tasks'])} of {len(TASKS)} tasks"]
    contexts = [_percent(score) for score in overall["by_context"]]
    return [*lines, _line("overall", "", "", _percent(overall["official"]), _percent(overall["mean"]), contexts)]


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}"


def _line(name: str, n: object, dropped: object, official: str, mean: str, contexts: list[str]) -> str:
    columns = "".join(f"{cell:>6}" for cell in contexts)
    return f"{name:16} {n:>6} {dropped:>8} {official:>9}  {mean:20}{columns}".rstrip()


# ---- answers in the official form
def output_name(model: str, task: str, split: str) -> str:
    """The file name that the official scorer takes apart. `split`: val, test, rag-val or rag-test."""
    if task not in TASKS or split not in ("val", "test", "rag-val", "rag-test") or "/" in model:
        raise UserError(f"{model}_{task}-{split}: needs a model without a slash, a task, and val or test as the split")
    return f"{model}_{task}-{split}.jsonl"


def output_rows(rows: Iterable[dict]) -> list[dict]:
    """Answer rows of one task as the official scorer reads them. No response is written "None", as its runners do."""
    kept = ("question_id", "question", "answer", "response", "context_length", "placed_depth")
    return [{key: "None" if row[key] is None else row[key] for key in kept} for row in rows]
