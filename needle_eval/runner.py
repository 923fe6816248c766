"""Questions in, answers out: batches, pictures encoded once, one line an answer, and a run that continues.

Nothing here knows a benchmark: a `haystack.Question` has pictures, a prompt and the longest answer, and its answer row
is scored elsewhere. The batches are fixed before the first answer and every process takes its share of them, so that a
run that was cut off, or several processes, give the answers of one run.
"""

import json
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from errors import UserError
from files import open_image, writing
from modeling_vlm import KVCache
from needle_eval.questions import Question
from processing_paligemma import PaliGemmaProcessor

KEPT_BYTES = 2 << 30  # of picture features, on the model's device


@dataclass
class Answerer:
    """A model, its processor and how answers are made: `candidates`, by setting, are weighed instead of generating."""

    model: torch.nn.Module
    processor: PaliGemmaProcessor
    accelerator: Accelerator
    dtype: torch.dtype
    batch_size: int = 32
    workers: int = 0
    candidates: dict[str, list[str]] | None = None


# ---- the plan
def mark_too_long(questions: list[Question], processor: PaliGemmaProcessor, limit: int) -> list[Question]:
    """The questions, those that with their longest answer do not fit `limit` positions marked as broken."""
    marked = []
    for question in questions:
        try:
            prompt = processor.encode(question.prompt, None, len(question.images))[0]
        except UserError:  # named when its turn comes
            prompt = []
        need = len(prompt) + question.max_new_tokens
        if need > limit:
            fault = (
                f"{len(question.images)} pictures of {processor.num_image_tokens:,} tokens ({processor.image_size} px),"
                f" text and {question.max_new_tokens} to answer need {need:,} positions, the model has {limit:,}: take "
                "fewer pictures or a model of lower resolution"
            )
            question = replace(question, fields={**question.fields, "error": fault})
        marked.append(question)
    return marked


def plan_batches(questions: list[Question], size: int) -> list[list[Question]]:
    """Batches within a setting, sorted by the length of the prompt so that little is padded; broken questions aside.

    A function of the questions alone: ties stay in order.
    """

    def kind(question: Question) -> tuple:
        return question.setting, len(question.images), question.max_new_tokens

    whole = sorted((q for q in questions if "error" not in q.fields), key=lambda q: (*kind(q), len(q.prompt)))
    groups = [list(group) for _, group in groupby(whole, key=kind)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def plan_pictures(batches: list[list[Question]], capacity: int) -> list[tuple[list[str], list[str]]]:
    """For every batch the pictures to encode first, and those to forget after it: the `capacity` last used are kept."""
    kept: OrderedDict[str, None] = OrderedDict()
    plan = []
    for batch in batches:
        wanted = dict.fromkeys(path for question in batch for path in question.images)
        new = [path for path in wanted if path not in kept]
        kept |= dict.fromkeys(new)
        for path in wanted:
            kept.move_to_end(path)
        dropped = [kept.popitem(last=False)[0] for _ in range(len(kept) - max(capacity, len(wanted)))]
        plan.append((new, dropped))
    return plan


# ---- the run
def answer(answerer: Answerer, questions: list[Question], file: Path, judge) -> list[dict]:
    """Answer what `file` does not hold yet, a line at a time, and return all rows in the order of the questions.

    `judge` tells of a row whether it is right, for the progress bar. A broken picture or prompt gives a row with
    "error" and response None, and is tried again when the run is. Raises UserError when `file` holds answers to other
    questions.
    """
    main = answerer.accelerator.is_main_process
    with answerer.accelerator.main_process_first():
        rows = read_answers(file, questions, mend=main)
    rows = {name: row for name, row in rows.items() if "error" not in row}
    answerer.accelerator.wait_for_everyone()  # all plan from the same file, before anybody writes
    batches = [b for b in plan_batches(questions, answerer.batch_size) if any(q.id not in rows for q in b)]
    broken = [row_of(q, None, 0.0) for q in questions if "error" in q.fields and q.id not in rows]
    log = Log(file, rows, len(questions), judge) if main else None
    if main:
        log.write(broken)
    world, rank = answerer.accelerator.num_processes, answerer.accelerator.process_index
    rounds = -(-len(batches) // world)
    answered = answer_batches(answerer, batches[rank::world])  # neighbours cost alike
    bf16 = answerer.dtype == torch.bfloat16
    with torch.inference_mode(), torch.autocast(answerer.accelerator.device.type, torch.bfloat16, enabled=bf16):
        for _ in range(rounds):
            told = gather_object(next(answered, []))
            if main:
                log.write([row for row in told if row["id"] not in rows])
    if main:
        log.close(questions)
    answerer.accelerator.wait_for_everyone()
    return list(read_answers(file, questions).values())


def answer_batches(answerer: Answerer, batches: list[list[Question]]):
    """Yield the rows of every batch; a picture is read and encoded once while it is kept."""
    config = answerer.model.config
    width = config.text_config.hidden_size * torch.finfo(answerer.dtype).bits // 8
    plan = plan_pictures(batches, KEPT_BYTES // (answerer.processor.num_image_tokens * width))
    fetched = DataLoader(
        _Pictures([new for new, _ in plan], answerer.processor),
        batch_size=None,
        num_workers=min(answerer.workers, len(batches)),
    )
    kept: dict[str, Tensor | str] = {}  # features, or what is wrong with the picture
    for batch, (_, dropped), (pixels, faults) in zip(batches, plan, fetched, strict=True):
        began = time.perf_counter()
        kept |= faults | encode_pictures(answerer, pixels)
        yield answer_batch(answerer, batch, kept, began)
        for path in dropped:
            del kept[path]


class _Pictures(torch.utils.data.Dataset):
    """What a loader's worker does: the pixels of a batch's new pictures, or what is wrong with them, by path."""

    def __init__(self, paths: list[list[str]], processor: PaliGemmaProcessor):
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        pixels, faults = {}, {}
        for path in self.paths[at]:
            try:
                pixels[path] = self.processor.pixels(open_image(path))
            except UserError as error:
                faults[path] = str(error)
        return pixels, faults


@torch.no_grad()
def encode_pictures(answerer: Answerer, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Path -> projected features [N, C]."""
    if not pixels:
        return {}
    device, parts = answerer.accelerator.device, torch.stack(list(pixels.values())).split(answerer.batch_size)
    features = torch.cat([answerer.model.model.image_features(part.to(device)) for part in parts])
    return dict(zip(pixels, features, strict=True))


def answer_batch(answerer: Answerer, batch: list[Question], kept: dict, began: float) -> list[dict]:
    rows, told, good = [], {}, []
    for question in batch:
        faults = [kept[path] for path in question.images if isinstance(kept[path], str)]
        try:
            if faults:
                raise UserError(faults[0])
            rows.append(answerer.processor.encode(question.prompt, None, len(question.images)))
            good.append(question)
        except UserError as error:
            told[question.id] = row_of(question, None, 0.0) | {"error": str(error)}
    if good:
        features = torch.stack([kept[path] for question in good for path in question.images])
        device = features.device
        tensors = {key: tensor.to(device) for key, tensor in answerer.processor.pad(rows).items()}
        if answerer.candidates:
            texts = rank(answerer, tensors, features, answerer.candidates[good[0].setting])
        else:
            ids = answerer.model.generate(
                **tensors, pixel_values=None, image_features=features, max_new_tokens=good[0].max_new_tokens
            )
            texts = answerer.processor.batch_decode(ids[:, tensors["input_ids"].shape[1] :])
        seconds = (time.perf_counter() - began) / len(good)
        told |= {q.id: row_of(q, text, seconds) for q, text in zip(good, texts, strict=True)}
    return [told[question.id] for question in batch]


@torch.no_grad()
def rank(answerer: Answerer, tensors: dict, features: Tensor, candidates: list[str]) -> list[str]:
    """The likeliest of `candidates` for each prompt [B, L], by mean log-probability of its tokens and `<eos>`.

    The mean, since "-1" is shorter than a cell and a sum would favour it. One pass over the prompts fills the cache,
    then each prompt meets the candidates in batches.
    """
    model, language = answerer.model, answerer.model.model.language_model
    count, length = tensors["input_ids"].shape
    ids, held = candidate_tensors(answerer.processor, candidates, features.device)
    mask, positions = model.model.mask(tensors["attention_mask"]), model.model.positions(tensors["attention_mask"])
    x = model.model.embed(tensors["input_ids"], features)
    cache = KVCache(language, count, length, x.dtype, x.device)
    first = model.head(language(x, positions, mask, cache, rows=1)[:, -1]).float().log_softmax(-1)  # [B, V]
    best = []
    for row in range(count):
        told = torch.cat(
            [continuations(model, cache, tensors["attention_mask"][row], row, part) for part in ids.split(64)]
        )
        total = first[row][ids[:, 0]] + (told * held[:, 1:]).sum(1)
        best.append(candidates[int((total / held.sum(1)).argmax())])
    return best


def continuations(model, cache: KVCache, prompt: Tensor, row: int, ids: Tensor) -> Tensor:
    """Log-probabilities [A, T - 1] of the second and later tokens of ids [A, T], after the cached prompt of one row;
    `prompt` [L] is its attention mask."""
    language, (count, width), length = model.model.language_model, ids.shape, cache.length
    wide = KVCache(language, count, length + width, cache.keys[0].dtype, ids.device)
    for mine, theirs in ((wide.keys, cache.keys), (wide.values, cache.values)):
        for new, old in zip(mine, theirs, strict=True):
            new[:, :, :length] = old[row]
    wide.length = length
    valid = torch.cat((prompt.expand(count, -1), torch.ones_like(ids)), dim=1)
    types = torch.zeros_like(valid)
    types[:, length:] = 1
    mask, positions = model.model.mask(valid, types), model.model.positions(valid)[:, length:]
    hidden = language(language.embed(ids), positions, mask, wide)
    return model.head(hidden[:, :-1]).float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def candidate_tensors(processor: PaliGemmaProcessor, candidates: list[str], device) -> tuple[Tensor, Tensor]:
    """Ids [A, T] of the answers and their `<eos>`, padded on the right, and 1.0 where they count."""
    rows = [processor.encode("", text, num_images=0) for text in candidates]
    rows = [[i for i, is_answer in zip(*row, strict=True) if is_answer] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [processor.pad_token_id] * (width - len(row)) for row in rows], device=device)
    held = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], device=device)
    return ids, held


# ---- the file
def row_of(question: Question, response: str | None, seconds: float) -> dict:
    return {
        "id": question.id,
        "setting": question.setting,
        "prompt": question.prompt,
        "response": response,
        "ground_truth": question.truth,
        "images": list(question.images),
        "seconds": round(seconds, 4),
        **question.fields,
    }


def read_answers(file: Path, questions: list[Question], mend: bool = False) -> dict[str, dict]:
    """The rows of a file by id, in the order of the questions.

    `mend` cuts a last line off that a killed process left unfinished. Raises UserError when the file answers other
    questions, prompts or pictures: it is another run's.
    """
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        if mend:
            file.write_text("".join(lines), encoding="utf-8")
    asked = {q.id: (q.prompt, list(q.images), q.truth) for q in questions}  # other haystacks may share the prompt
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            same = asked.get(row["id"]) == (row["prompt"], row["images"], row["ground_truth"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}:{number}: no answer row ({error}): delete the line or the file") from error
        if not same:
            raise UserError(
                f"{file}:{number}: answers another question ({row['id']}): give another --output_dir, or "
                "answer anew with --overwrite=True"
            )
        found[row["id"]] = row
    return {question.id: found[question.id] for question in questions if question.id in found}


class Log:
    """The answers file and the progress bar."""

    def __init__(self, file: Path, rows: dict, total: int, judge):
        self.file, self.rows, self.judge = file, rows, judge
        self.right = sum(judge(row) for row in rows.values())
        self.bar = tqdm(total=total, initial=len(rows), desc=file.parent.name, unit="answer")

    def write(self, rows: list[dict]):
        with writing(self.file), open(self.file, "a", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row) + "\n")
                self.rows[row["id"]] = row
                self.right += self.judge(row)
        self.bar.update(len(rows))
        self.bar.set_postfix(right=f"{self.right / max(1, len(self.rows)):.1%}")

    def close(self, questions: list[Question]):
        """The file anew, whole and in the order of the questions."""
        self.bar.close()
        text = "".join(json.dumps(self.rows[question.id]) + "\n" for question in questions)
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        with writing(self.file):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.file)
