"""Answer questions in batches: each image is encoded once, each answer is a row, and an interrupted run is resumed.

This module is benchmark-agnostic: a `Question` has images, a prompt and the length of its longest answer, and answers
are scored elsewhere. The evaluation script writes answers to a file, training keeps them in memory. All batches are
planned before the first answer and every process answers its share of them, so resumed runs and runs on several
processes give the same answers as an uninterrupted run on one.
"""

import json
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import ignore_signals
from errors import UserError
from files import decode_typed, read_bytes, write_text, writing
from modeling_vlm import GraphCache
from needle_eval.questions import ImageReference, Question, open_reference
from needle_eval.ranking import rank_candidates
from processing_paligemma import Processor
from vision_cache import FeatureStore

FEATURE_BYTES = 2 << 30  # maximum size of the image features kept on the model's device


@dataclass
class Answerer:
    """A model, its processor, and how its answers are computed."""

    model: torch.nn.Module
    processor: Processor
    accelerator: Accelerator
    dtype: torch.dtype  # bfloat16: under autocast
    batch_size: int = 32  # questions answered at once
    workers: int = 0  # processes that load images


def answer_questions(
    answerer: Answerer,
    questions: list[Question],
    file: Path | None = None,
    is_correct: Callable[[dict], bool] | None = None,
    raise_if_stopped: Callable[[], None] = lambda: None,
    progress: str | None = None,
) -> list[dict]:
    """One answer row for each question, in the order of the questions, the same list on every process.

    With `file`, every row is written as soon as it is computed, and rows that are already in the file are kept. If a
    row of a batch is missing, the whole batch is computed again, so that its padding and rounding are the same.
    `is_correct` and `progress`, a title, are for the progress bar; without a title there is none. `raise_if_stopped` is
    called before every batch, equally often on every process, and may raise to end the run. A broken image or prompt
    gives a row with "error" and the response None, which is tried again when the run is resumed. Raises UserError when
    `file` holds answers to other questions.
    """
    accelerator = answerer.accelerator
    answerer.model.eval()
    rows = {}
    if file is not None:
        with accelerator.main_process_first():
            rows = read_answers(file, questions, cut_last_line=accelerator.is_main_process)
        accelerator.wait_for_everyone()  # all processes plan from the same file before the main process writes to it
    batches = [b for b in plan_batches(questions, answerer.batch_size) if any(q.id not in rows for q in b)]
    # neighbouring batches, which take about equally long, go to different processes
    answers = answer_batches(answerer, batches[accelerator.process_index :: accelerator.num_processes])
    rounds = math.ceil(len(batches) / accelerator.num_processes)
    bf16 = answerer.dtype == torch.bfloat16
    main_file = file if accelerator.is_main_process else None
    hidden = progress is None or not accelerator.is_main_process
    with tqdm(total=len(questions), initial=len(rows), desc=progress, unit="answer", disable=hidden) as bar:
        log = AnswerLog(rows, main_file, bar, is_correct)  # adds to `rows`
        log.add([make_row(q, None, 0.0) for q in questions if q.error and q.id not in rows])
        with torch.inference_mode(), torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            for _ in range(rounds):
                raise_if_stopped()
                log.add([row for row in gather_object(next(answers, [])) if row["id"] not in rows])
    if main_file is not None:
        write_answers(main_file, [rows[question.id] for question in questions])
    accelerator.wait_for_everyone()
    return [rows[question.id] for question in questions]


# ---- the plan
def plan_batches(questions: list[Question], size: int) -> list[list[Question]]:
    """Batches within a setting, sorted by prompt length to reduce padding, without broken questions.

    Deterministic: questions of equal length keep their order.
    """

    def group_of(question: Question) -> tuple:
        return question.setting, len(question.images), question.max_new_tokens, question.candidates

    usable = sorted((q for q in questions if not q.error), key=lambda q: (*group_of(q), len(q.prompt)))
    groups = [list(group) for _, group in groupby(usable, key=group_of)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def plan_images(
    batches: list[list[Question]], capacity: int
) -> list[tuple[list[ImageReference], list[ImageReference]]]:
    """For every batch, the images to load before it and to drop after it: those that no later batch needs, and the
    least recently used ones beyond `capacity` images."""
    held: OrderedDict[ImageReference, None] = OrderedDict()
    last_use = {image: i for i, batch in enumerate(batches) for question in batch for image in question.images}
    plan = []
    for i, batch in enumerate(batches):
        needed = dict.fromkeys(image for question in batch for image in question.images)
        new = [image for image in needed if image not in held]
        held |= dict.fromkeys(new)
        for image in needed:
            held.move_to_end(image)
        dropped = [image for image in needed if last_use[image] == i]
        for image in dropped:
            del held[image]
        dropped += [held.popitem(last=False)[0] for _ in range(len(held) - capacity)]
        plan.append((new, dropped))
    return plan


def mark_too_long(questions: list[Question], processor: Processor, limit: int) -> list[Question]:
    """The questions, with an error set where the prompt and the longest answer do not fit `limit` positions."""
    marked = []
    for question in questions:
        try:
            prompt = processor.encode(question.prompt, None, len(question.images))[0]
        except UserError:  # its answer row has the error
            prompt = []
        needed = len(prompt) + question.max_new_tokens
        if needed > limit:
            fault = (
                f"{len(question.images)} images of {processor.num_image_tokens:,} tokens ({processor.image_size} px),"
                f" text and {question.max_new_tokens} to answer need {needed:,} positions, the model has {limit:,}: "
                "take fewer images or a model of lower resolution"
            )
            question = replace(question, error=fault)
        marked.append(question)
    return marked


# ---- answers
def answer_batches(answerer: Answerer, batches: list[list[Question]]) -> Iterator[list[dict]]:
    """Yield the rows of every batch; an image is not opened or encoded again while its features are stored."""
    width = answerer.model.config.text_config.hidden_size * torch.finfo(answerer.dtype).bits // 8
    plan = plan_images(batches, FEATURE_BYTES // max(1, answerer.processor.num_image_tokens * width))
    loader = DataLoader(
        OpenedImages([new for new, _ in plan], answerer.processor),
        batch_size=None,
        num_workers=min(answerer.workers, len(batches)),
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    store, graphs = FeatureStore(answerer.model), GraphCache()
    faults: dict[ImageReference, str] = {}
    for batch, (new, dropped), opened in zip(batches, plan, loader, strict=True):
        started = time.perf_counter()
        faults |= {image: fault for image, fault in zip(new, opened, strict=True) if isinstance(fault, str)}
        pixels = {image: inputs for image, inputs in zip(new, opened, strict=True) if not isinstance(inputs, str)}
        if pixels:
            store.encode(list(pixels), pixels, answerer.batch_size)
        yield answer_batch(answerer, batch, store, graphs, faults, started)
        store.forget(dropped)


class OpenedImages(Dataset):
    """Item i holds, for every new image of batch i, the model's inputs or an error message."""

    def __init__(self, images: list[list[ImageReference]], processor: Processor):
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[dict[str, Tensor] | str]:
        return [self.open(image) for image in self.images[index]]

    def open(self, image: ImageReference) -> dict[str, Tensor] | str:
        try:
            return self.processor.image_inputs(open_reference(image))
        except UserError as error:
            return str(error)


def answer_batch(
    answerer: Answerer,
    batch: list[Question],
    store: FeatureStore,
    graphs: GraphCache,
    faults: dict[ImageReference, str],
    started: float,
) -> list[dict]:
    """The rows of one batch. `started` is the time at which encoding of its images began, for "seconds" of a row."""
    good, encoded, rows = [], [], {}
    for question in batch:
        try:
            for image in question.images:
                if image in faults:
                    raise UserError(faults[image])
            tokens = [len(store.find(image)) for image in question.images]
            encoded.append(answerer.processor.encode(question.prompt, None, tokens))
            good.append(question)
        except UserError as error:
            rows[question.id] = make_row(replace(question, error=str(error)), None, 0.0)
    if good:
        images = [image for question in good for image in question.images]
        features = store.encode(images, {}) if images else None
        device, tensors = answerer.model.lm_head.weight.device, answerer.processor.pad(encoded)
        plan = answerer.model.model.plan(**tensors).to(device)  # made before the tensors leave the CPU
        tensors = {key: tensor.to(device, non_blocking=True) for key, tensor in tensors.items()}
        if good[0].candidates:
            answers = rank_candidates(answerer.model, answerer.processor, tensors, plan, features, good[0].candidates)
        else:
            ids = answerer.model.generate(
                **tensors,
                pixel_values=None,
                image_features=features,
                max_new_tokens=good[0].max_new_tokens,
                plan=plan,
                graphs=graphs,
            )
            texts = answerer.processor.batch_decode(ids[:, tensors["input_ids"].shape[1] :])
            answers = [(text, None) for text in texts]
        seconds = (time.perf_counter() - started) / len(good)
        for question, (text, confidence) in zip(good, answers, strict=True):
            rows[question.id] = make_row(question, text, seconds, confidence)
    return [rows[question.id] for question in batch]


def make_row(question: Question, response: str | None, seconds: float, confidence: float | None = None) -> dict:
    """The answer row of a question; `confidence` is given if candidates were ranked."""
    row = {
        "id": question.id,
        "setting": question.setting,
        "prompt": question.prompt,
        "response": response,
        "ground_truth": question.ground_truth,
        "images": [str(image) for image in question.images],
        "seconds": round(seconds, 4),
        **question.fields,
    }
    row |= {} if confidence is None else {"confidence": round(confidence, 6)}
    return row | ({"error": question.error} if question.error else {})


# ---- the file
class StoredAnswer(msgspec.Struct):
    """The fields of a stored answer that are compared or read; the others follow from the question."""

    id: str
    prompt: str
    images: list[str]
    ground_truth: Any
    response: str | None
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    confidence: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    error: str = ""


def read_answers(file: Path, questions: list[Question], cut_last_line: bool = False) -> dict[str, dict]:
    """The rows of a file by id, in the order of the questions; answers with an error are left out.

    A last line that a killed process left unfinished is ignored, and deleted with `cut_last_line`. Raises UserError
    when the file answers other questions: other ids, prompts, images or ground truths.
    """
    if not file.exists():
        return {}
    lines = read_bytes(file).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        if cut_last_line:
            file.write_bytes(b"".join(lines))
    asked = {question.id: question for question in questions}
    found = {}
    for number, line in enumerate(lines, 1):
        stored = decode_typed(line, StoredAnswer, f"{file}:{number}", "delete the line or the file")
        question = asked.get(stored.id)
        if question is None or (stored.prompt, stored.images, stored.ground_truth) != (
            question.prompt,
            [str(image) for image in question.images],
            question.ground_truth,
        ):
            raise UserError(
                f"{file}:{number}: answers another question ({stored.id}): give another --output_dir, or "
                "start again with --overwrite=True"
            )
        if not stored.error:
            found[stored.id] = make_row(question, stored.response, stored.seconds, stored.confidence)
    return {question.id: found[question.id] for question in questions if question.id in found}


def write_answers(file: Path, rows: list[dict]):
    """Rewrite the whole file in order."""
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


class AnswerLog:
    """Adds answer rows to `rows`, to the file, if any, and to the progress bar."""

    def __init__(self, rows: dict[str, dict], file: Path | None, bar: tqdm, is_correct: Callable[[dict], bool] | None):
        self.rows, self.file, self.bar, self.is_correct = rows, file, bar, is_correct
        self.correct = 0
        self.count(list(rows.values()))

    def add(self, rows: list[dict]):
        self.rows.update({row["id"]: row for row in rows})
        if self.file is not None:
            with writing(self.file), open(self.file, "a", encoding="utf-8") as out:
                out.write("".join(json.dumps(row) + "\n" for row in rows))
        self.bar.update(len(rows))
        self.count(rows)

    def count(self, rows: list[dict]):
        if self.is_correct is not None and not self.bar.disable:
            self.correct += sum(map(self.is_correct, rows))
            self.bar.set_postfix(right=f"{self.correct / max(1, len(self.rows)):.1%}")
