"""Study A: one run of an arm on the included model, and the questions of endpoint N. Started by study.py.

Endpoint N asks in which cell a drawing is, in the drawing styles that the model was trained on. The difficulty comes
from the number of cells (16 in one image, 32 in two; 64 in four are asked too but do not count), and from either
distractors that look like the needle or pixel noise. Every seed has its own questions, the same in all arms; the needle
of question i of every condition is concept i modulo the number of concepts.
"""

import hashlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import finetune_diff
import finetune_original
from checkpoint import weights_fingerprint
from config_fields import IGNORED_LABEL
from diagnostics import lambda_values
from differential_attention import DifferentialConfig, differential_modules, knock_out
from errors import TrainingFailed, UserError
from files import read_bytes, read_json, read_typed
from haystack import ImagePool, add_noise, needle_prompt, read_pool
from machine import make_accelerator
from modeling_gemma import PaliGemmaForConditionalGeneration
from modeling_vlm import VisionLanguageModel
from models import classes_of
from needle_eval.needle_attention import measure_needle_attention
from needle_eval.questions import Question, is_exact, open_reference
from needle_eval.runner import Answerer, answer_questions
from processing_paligemma import PaliGemmaProcessor
from run_folder import find_checkpoints, read_metrics
from study_records import ConversionRecord, Job, endpoint_conditions, fingerprint_of, points

CELL = 64  # side in pixels of a drawing's cell, before the image is scaled to the model's size
MAX_NEW_TOKENS = 12
BATCH_SIZE = 64  # questions per batch


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The haystacks of one set of questions."""

    images: int
    grid: int  # cells per side of each image
    n: int  # number of questions
    distractors: str = "random"  # or "look-alike": the captions nearest to the needle's
    noise: float = 0.0  # standard deviation of the pixel noise, where 1 is the range of a channel
    present: bool = True  # the needle is in one of the cells
    style: str = "train"  # split of the pool


# ---- questions
@dataclass(frozen=True)
class StitchedImage:
    """One image of a question, drawn when it is needed."""

    pool: ImagePool
    key: str
    cells: tuple[tuple[int, ...], ...]
    side: int  # of the model's images in pixels; noise is added at this size, so that resizing does not average it out
    noise: float

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StitchedImage) and self.key == other.key

    def open(self) -> Image.Image:
        image = self.pool.stitch(self.key, self.cells, CELL)
        image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)  # as the processor does
        return add_noise(image, f"{self.key}/noise", self.noise) if self.noise else image

    def __str__(self) -> str:
        return self.key


def read_look_alikes(section: dict) -> dict[str, list[str]]:
    """Caption -> the other captions, nearest first, as `rank_look_alikes` found them.

    Raises UserError if the file is not the one that the plan was made with.
    """
    file = Path(__file__).parent / section["look_alikes"]
    if hashlib.sha256(read_bytes(file)).hexdigest() != section["look_alikes_sha256"]:
        raise UserError(f"{file}: is not the file that the plan was made with: restore it")
    return read_typed(file, dict[str, list[str]], "restore it")


@torch.inference_mode()
def rank_look_alikes(model: PaliGemmaForConditionalGeneration, processor: PaliGemmaProcessor) -> dict[str, list[str]]:
    """For every training caption the others, by decreasing cosine similarity of mean features of the frozen tower.

    Each drawing fills one image, on the same background; a caption's features are the mean over its drawings.
    """
    pool = ImagePool(read_pool(splits=("train",)))
    features = []
    for caption in pool.captions:
        drawings = [pool.stitch("look-alikes", ((index,),), CELL) for index in pool.by_caption[caption]]
        pixels = torch.stack([processor.pixels(drawing) for drawing in drawings])
        features.append(model.model.vision_tower(pixels).mean((0, 1)))
    matrix = torch.stack(features).double()
    matrix = torch.nn.functional.normalize(matrix - matrix.mean(0), dim=-1)
    order = (matrix @ matrix.T).fill_diagonal_(-torch.inf).argsort(dim=-1, descending=True)[:, :-1]
    return {c: [pool.captions[i] for i in row] for c, row in zip(pool.captions, order.tolist(), strict=True)}


def make_questions(
    conditions: dict[str, Condition], look_alikes: dict[str, list[str]], side: int, seed: int
) -> list[Question]:
    """The questions of one seed, for a model whose images are `side` pixels wide."""
    pools = {
        style: ImagePool(read_pool(splits=(style,))) for style in {condition.style for condition in conditions.values()}
    }
    questions = []
    for name, condition in conditions.items():
        pool = pools[condition.style]
        for i in range(condition.n):
            key = f"study/{seed}/{name}/{i}"
            caption = pool.captions[i % len(pool.captions)]
            if condition.distractors == "look-alike":
                others = look_alikes[caption]
            else:
                others = [other for other in pool.captions if other != caption]
                random.Random(f"{key}/distractors").shuffle(others)
            haystack = pool.add_distractors(key, caption, others, condition.images, condition.grid, condition.present)
            images = tuple(
                StitchedImage(pool, f"{key}/{m}", cells, side, condition.noise)
                for m, cells in enumerate(haystack.cells)
            )
            kind = "positive" if condition.present else "negative"
            fields = {"shape": (condition.images, condition.grid, 1), "kind": kind}
            prompt = needle_prompt(caption)
            questions.append(
                Question(key, name, images, prompt, haystack.answer, max_new_tokens=MAX_NEW_TOKENS, fields=fields)
            )
    return questions


def pack_answers(rows: list[dict], names: list[str]) -> dict[str, dict[str, Any]]:
    """Condition -> {"n", "right"}: one bit per question in order, numpy.packbits as hexadecimal digits."""
    packed = {}
    for name in names:
        right = [row["response"] is not None and is_exact(row["response"], row["ground_truth"])
                 for row in rows if row["setting"] == name]  # fmt: skip
        packed[name] = pack_bits(right)
    return packed


def pack_bits(right: Sequence[bool]) -> dict[str, Any]:
    """{"n", "right"}, see `pack_answers`."""
    return {"n": len(right), "right": np.packbits(np.array(right, bool)).tobytes().hex()}


# ---- one run
def make_config(section: dict, arm: str, seed: int, folder: Path) -> finetune_original.Config:
    """The configuration of a run: the section's flags, overridden by the arm's."""
    flags = section["train"] | section["arms"][arm].get("flags", {})
    flags |= dict(seed=seed, output_dir=str(folder), model=section["model"])
    if "shapes" in flags:
        flags["shapes"] = tuple(tuple(shape) for shape in flags["shapes"])
    choices = section["arms"][arm].get("differential")
    if choices is None:
        return finetune_original.Config(**flags)
    differential = replace(DifferentialConfig.from_dict(choices).resolve(), seed=seed)
    return finetune_diff.Config(**flags, differential=differential)


def train(config: finetune_original.Config, arm: str) -> tuple[str, str]:
    """Fine-tune, unless the run is already finished. Returns (the model to evaluate, "finished" or the failure).

    A run fails if its lambda did not learn or its loss was not finite; its last checkpoint is evaluated instead.
    """
    folder = Path(config.output_dir)
    try:
        finetune_original.finetune(config, arm, getattr(config, "differential", None))
        return str(folder), "finished"
    except TrainingFailed as error:
        checkpoints = find_checkpoints(folder)
        return str(checkpoints[-1]) if checkpoints else config.model, str(error)


def run(section: dict, job: Job, folder: Path) -> dict[str, Any]:
    """Train an arm at one seed and ask it the seed's questions. Returns the fields of its record that result."""
    arm, seed = job.arm, job.seed
    conditions = {name: msgspec.convert(c, Condition) for name, c in section["conditions"].items()}
    look_alikes = read_look_alikes(section)
    processor = PaliGemmaProcessor.from_pretrained(section["model"])
    questions = make_questions(conditions, look_alikes, processor.image_size, seed)
    config = make_config(section, arm, seed, folder)
    check_weights(section)
    name, status = train(config, arm)

    began = time.perf_counter()
    accelerator = make_accelerator()
    model = PaliGemmaForConditionalGeneration.from_pretrained(name, torch.float32, accelerator.device)
    answerer = Answerer(model, processor, accelerator, torch.float32, BATCH_SIZE)
    rows = answer_questions(answerer, questions, progress=f"{arm} seed {seed}")
    names = endpoint_conditions(section)
    asked = [question for question in questions if question.setting in names]
    attention = measure_needle_attention(answerer, asked, section["attention_questions"])
    shares = [attention[condition]["share"] for condition in names]
    likelihoods = {
        condition: log_likelihood(
            answerer, [q for q in questions if q.setting == condition][: section["likelihood_questions"]]
        )
        for condition in (names if section.get("likelihood_questions") else ())
    }
    record = describe_training(model, folder, status) | {
        "num_concepts": len(look_alikes),
        "answers": pack_answers(rows, list(conditions)),
        "needle_shares": [float(share) for share in np.mean(shares, axis=0)],
        "log_likelihoods": likelihoods,
        "forward_flops": count_flops(config, [image.open() for image in questions[0].images], questions[0].prompt),
        "knockout": {},
    }
    if has_lambda(model):
        knock_out(model)
        asked = [question for question in questions if question.setting in names]
        record["knockout"] = pack_answers(answer_questions(answerer, asked), names)
    return record | {"seconds": round(training_seconds(folder) + time.perf_counter() - began, 1)}


def training_seconds(folder: Path) -> float:
    """Training time in seconds, over all starts of a run; 0 for a failed run, which has no final/run.json."""
    end = folder / "final" / "run.json"
    return read_json(end)["seconds"] if end.exists() else 0.0


def describe_training(model: VisionLanguageModel, folder: Path, status: str) -> dict[str, Any]:
    """The fields of a record that follow from a trained model and its run folder."""
    losses = [line["loss"] for line in read_metrics(folder) if "loss" in line]
    trained = read_json(folder / "run.json")["parameters"]
    return {
        "status": status,
        "trained_parameters": sum(count for count, _ in trained.values()),
        "final_loss": losses[-1] if losses and status == "finished" else None,
        "lambdas": list(lambda_values(model).values()),
    }


@torch.inference_mode()
def log_likelihood(answerer: Answerer, questions: Sequence[Question]) -> float:
    """Mean over the questions of the log-probability, in nats, of the right answer and `<eos>`."""
    total = 0.0
    for start in range(0, len(questions), BATCH_SIZE):
        asked = questions[start : start + BATCH_SIZE]
        images = [[open_reference(image) for image in question.images] for question in asked]
        answers = [question.ground_truth for question in asked]
        batch = answerer.processor(images=images, text=[question.prompt for question in asked], suffix=answers)
        batch = {key: tensor.to(answerer.accelerator.device) for key, tensor in batch.items()}
        loss = answerer.model(**batch).loss.item()  # the mean over all tokens of the answers
        total -= loss * int((batch["labels"] != IGNORED_LABEL).sum())
    return total / len(questions)


def count_flops(config: finetune_original.Config, images: list[Image.Image], prompt: str) -> int:
    """Forward FLOPs of the base model with the arm's attention on one prompt.

    LoRA is not counted; it is the same in all arms.
    """
    model_class, processor_class = classes_of(config.model)
    model = model_class.from_pretrained(config.model, differential=getattr(config, "differential", None))
    batch = processor_class.from_pretrained(config.model)([images] if images else None, [prompt])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(**batch)
    return counter.get_total_flops()


def check_weights(section: dict):
    """Raise UserError unless the base model has the weights that the plan was made for."""
    found = weights_fingerprint(section["model"])
    if found != section["weights"]:
        raise UserError(f"{section['model']}: has weights {found}, the plan is for {section['weights']}: restore them")


def has_lambda(model: VisionLanguageModel) -> bool:
    """Whether a model has differential attention with a lambda that can be set to 0."""
    modules = differential_modules(model).values()
    return bool(modules) and all(module.has_lambda for module in modules)


# ---- the pilot
def format_pilot(section: dict, records: dict[Job, ConversionRecord]) -> list[str]:
    """The grid as a markdown table: endpoint N of every seed and its mean, the last loss, and the final lambdas."""
    seeds = sorted({job.seed for job in records})
    lines = ["| arm | " + " | ".join(f"N, seed {seed}" for seed in seeds) + " | mean N | last loss | lambda |"]
    lines.append("|---|" + "---|" * (len(seeds) + 3))
    for arm in section["arms"]:
        found = {job.seed: record for job, record in records.items() if job.arm == arm}
        if found:
            scores = {seed: points(record, endpoint_conditions(section)) for seed, record in found.items()}
            cells = [f"{scores[seed]:.1f}" if seed in scores else "-" for seed in seeds]
            losses = [record.final_loss for record in found.values() if record.final_loss is not None]
            loss = f"{np.mean(losses):.4f}" if losses else "-"
            lambdas = [value for record in found.values() for value in record.lambdas]
            ends = f"{min(lambdas):.3f} to {max(lambdas):.3f}" if lambdas else "-"
            mean = np.mean(list(scores.values()))
            lines.append(f"| {arm} | {' | '.join(cells)} | {mean:.1f} | {loss} | {ends} |")
    return lines


def calibrate(section: dict, name: str, seed: int, noises: Sequence[float]):
    """Print the accuracy of a trained model by cells, distractors and noise, used to choose the difficulty."""
    accelerator = make_accelerator()
    model = PaliGemmaForConditionalGeneration.from_pretrained(name, torch.float32, accelerator.device)
    processor = PaliGemmaProcessor.from_pretrained(name)
    answerer = Answerer(model, processor, accelerator, torch.float32, BATCH_SIZE)
    look_alikes = read_look_alikes(section)
    shapes, n = {16: (1, 4), 32: (2, 4), 64: (4, 4)}, len(look_alikes)
    print(f"{'':20}" + "".join(f"{noise:>8}" for noise in noises))
    for cells, (images, grid) in shapes.items():
        for distractors in ("look-alike", "random"):
            rates = []
            for noise in noises:
                conditions = {f"{cells}": Condition(images, grid, n, distractors, noise)}
                rows = answer_questions(answerer, make_questions(conditions, look_alikes, processor.image_size, seed))
                rates.append(sum(is_exact(row["response"], row["ground_truth"]) for row in rows) / n)
            print(f"{f'{cells} {distractors}':20}" + "".join(f"{100 * rate:8.1f}" for rate in rates), flush=True)


def measure_fingerprint(section: dict, folder: Path, steps: int = 10) -> str:
    """`fingerprint_of` the first losses of the standard arm at the first pilot seed, trained into `folder`."""
    config = make_config(section, next(iter(section["arms"])), section["fingerprint_seed"], folder)
    config = replace(config, max_steps=steps, log_every=1, save_every=steps, eval_samples=1, overwrite=True)
    train(config, "fingerprint")
    return fingerprint_of([line["loss"] for line in read_metrics(folder) if "loss" in line])
