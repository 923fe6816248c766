"""Evaluation during training: held-out rows as questions, exact answers, losses, and the samples that a run saves.

The answers come from the runner of needle_eval, as in eval_mmnih.py.
"""

from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from adapters import gathered
from data import Haystacks, Source, encode_row, loader
from diagnostics import SAVED_QUESTIONS
from errors import UserError
from files import writing
from machine import choose_workers, out_of_memory_as, without_compiling
from metrics import check_answers, score_answers
from needle_eval.questions import Question, is_exact
from needle_eval.runner import Answerer, answer_questions
from needle_eval.statistics import format_rate, rate
from processing_paligemma import Processor, to_rgb
from run_folder import Run

if TYPE_CHECKING:
    from finetune_original import Config

SHORT_EVALUATION_BATCHES = 2  # batches of each set in the evaluations between the first and the last
SAMPLE_SIDE = 512  # maximum side in pixels of an image in samples/


def max_length(model: nn.Module) -> int:
    """Maximum sequence length of `model` in tokens, image tokens included."""
    return model.config.text_config.max_position_embeddings


def prompt_limit(config: "Config", model: nn.Module) -> int:
    """Maximum prompt length in tokens that leaves room for an answer of `max_new_tokens`."""
    return max_length(model) - config.max_new_tokens


@dataclass(frozen=True)
class SourceImage:
    """An image of a row, opened on demand. Images of one name are equal, so that the runner encodes them once."""

    source: Source = field(compare=False)
    row: int = field(compare=False)
    place: int = field(compare=False)  # index among the images of the row
    name: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "name", self.source.image_name(self.row, self.place))

    def open(self) -> Image.Image:
        return self.source.image(self.row, self.place)

    def __str__(self) -> str:
        return f"{self.source.id(self.row)}/{self.place}"


class Score(NamedTuple):
    """Answers to an evaluation set."""

    correct: int  # exact answers
    n: int
    rows: list[dict]  # as `answer_questions` returns them


@dataclass
class Evaluation:
    """The evaluation sets of a run, and the model that answers them."""

    run: Run
    config: "Config"
    model: nn.Module
    processor: Processor
    sets: dict[str, Source]
    questions: dict[str, list[Question]]  # the rows of every set
    probe: list[dict[str, Tensor]] = field(default_factory=list)  # prompts on which both maps are measured

    @property
    def short_count(self) -> int:
        """Number of questions per set in the evaluations between the first and the last; `best/` is chosen by them."""
        return SHORT_EVALUATION_BATCHES * self.config.eval_batch_size


def make_evaluation(
    run: Run, config: "Config", model: nn.Module, processor: Processor, eval_sets: dict[str, Source]
) -> Evaluation:
    """The evaluation of a run, without a probe. Raises UserError for a row that --metric cannot score."""
    questions = make_questions(config, model, processor, eval_sets)
    return Evaluation(run, config, model, processor, eval_sets, questions)


def make_questions(
    config: "Config", model: nn.Module, processor: Processor, eval_sets: dict[str, Source]
) -> dict[str, list[Question]]:
    """The rows of every evaluation set as questions for the evaluation runner; a row that is too long carries an error.

    Raises UserError for a row that --metric cannot score.
    """
    questions: dict[str, list[Question]] = {}
    for name, source in eval_sets.items():
        questions[name] = []
        for row in range(len(source)):
            prefix, suffix, n_images = source.text(row)
            error = ""
            try:
                encode_row(processor, source.id(row), prefix, None, n_images, prompt_limit(config, model))
            except UserError as fault:
                error = str(fault)
            images = tuple(SourceImage(source, row, place) for place in range(n_images))
            fields = dict(setting=name, images=images, prompt=prefix, ground_truth=suffix)
            if config.metric != "exact":
                answers = source.answers(row)
                check_answers(config.metric, source.id(row), suffix, answers)
                fields["fields"] = {"answers": answers}  # copied into the answer row
            question = Question(id=source.id(row), max_new_tokens=config.max_new_tokens, error=error, **fields)
            questions[name].append(question)
    return questions


def evaluate(evaluation: Evaluation, count: int | None = None) -> dict[str, Score]:
    """The score of each evaluation set, on its first `count` questions or on all.

    Answers are greedy and scored by MMNeedle's strict rule. A row that cannot be used is reported and not counted
    (eval_mmnih.py counts it as wrong).
    Raises Stopped, and UserError for a set without a usable row.
    """
    run, config, model = evaluation.run, evaluation.config, evaluation.model
    workers = choose_workers(config.workers, run.device)
    answerer = Answerer(model, evaluation.processor, run.accelerator, run.dtype, config.eval_batch_size, workers)
    asked = {name: questions[:count] for name, questions in evaluation.questions.items()}
    with gathered(model), without_compiling(config), out_of_memory_as("lower --eval_batch_size"):
        answers = iter(answer_questions(answerer, sum(asked.values(), []), raise_if_stopped=run.raise_if_stopped))
    scores = {}
    for name, questions in asked.items():
        rows = list(islice(answers, len(questions)))
        answered = [row for row in rows if "error" not in row]
        for row in rows:
            if "error" in row and (run.is_main or run.strict):
                is_named = row["id"] in row["error"]
                run.skip(UserError(row["error"] if is_named else f"{row['id']}: {row['error']}"))
        if not answered:
            raise UserError(f"{name}: none of its {len(rows)} rows can be used: check its images")
        correct = sum(is_exact(row["response"], row["ground_truth"]) for row in answered)
        scores[name] = Score(correct, len(answered), answered)
    return scores


@torch.inference_mode()
def evaluation_losses(evaluation: Evaluation) -> dict[str, float]:
    """Mean loss per label token of each evaluation set, on its first `evaluation.short_count` rows.

    These rows are the same at every evaluation, so that the losses form a curve. A row that cannot be used is left out.
    Raises Stopped, and UserError for a set without a usable row.
    """
    run, config, model = evaluation.run, evaluation.config, evaluation.model
    model.eval()
    rank, world, size = run.accelerator.process_index, run.accelerator.num_processes, config.eval_batch_size
    losses = {}
    for name, source in evaluation.sets.items():
        run.raise_if_stopped()
        first = enumerate(evaluation.questions[name][: evaluation.short_count])
        rows = [(0, row) for row, question in first if not question.error][rank::world]
        total = torch.zeros(2, device=run.device)  # summed loss of the label tokens, their number
        batches = loader(
            source,
            evaluation.processor,
            [rows[start : start + size] for start in range(0, len(rows), size)],
            with_suffix=True,
            workers=choose_workers(config.workers, run.device),
            skip=run.skip,
            max_length=max_length(model),
        )
        with gathered(model), out_of_memory_as("lower --eval_batch_size"):
            for examples, batch in batches:
                plan = model.model.plan(**batch).to(run.device)  # made before the tensors leave the CPU
                batch = {key: tensor.to(run.device, non_blocking=True) for key, tensor in batch.items()}
                with run.autocast():
                    loss = model(**batch, plan=plan).loss
                labels = plan.label_count * bool(examples)  # a batch without examples has the tensors of another row
                total += torch.stack((loss * labels, torch.full_like(loss, labels)))
        loss, labels = run.accelerator.reduce(total, "sum").tolist()
        if not labels:
            raise UserError(f"{name}: none of its first rows can be used: check its images and answers")
        losses[name] = loss / labels
    return losses


def print_scores(run: Run, config: "Config", scores: dict[str, Score]):
    """Print the exact accuracy of every evaluation set, and --metric if it is another."""
    for name, score in scores.items():
        line = f"{name:28}{format_rate(rate(score.correct, score.n)):>22}  n = {score.n}"
        if config.metric != "exact":
            line += f"  {config.metric} {100 * score_answers(config.metric, score.rows):.1f}"
        run.print(line)


def log_samples(evaluation: Evaluation, step: int, scores: dict[str, Score]):
    """Write the first answers of every set to samples.jsonl and their images to samples/."""
    run = evaluation.run
    for number, (name, score) in enumerate(scores.items()):
        asked = {question.id: question for question in evaluation.questions[name]}
        for place, row in enumerate(score.rows[:SAVED_QUESTIONS]):
            image = f"samples/{number}-{place}.png" if asked[row["id"]].images else ""
            save_sample_image(run, asked[row["id"]], run.folder / image)
            sample = {"step": step, "set": name, "id": row["id"], "prompt": row["prompt"]}
            sample |= {"answer": row["ground_truth"], "response": row["response"], "image": image}
            run.log(sample | haystack_grid(evaluation.sets[name]), "samples.jsonl")
            run.track_sample(place, sample)


def save_sample_image(run: Run, question: Question, file: Path):
    """Write the images of a question, scaled down and side by side, for plots.py."""
    if not run.is_main or not question.images:
        return
    images = [to_rgb(image.open()) for image in question.images]
    for image in images:
        image.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
    joined = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        joined.paste(image, (left, 0))
        left += image.width
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        joined.save(file)


def haystack_grid(source: Source) -> dict[str, int]:
    """{"grid": cells per side} for haystacks of one image, read by plots.py; {} for other data."""
    is_one_image = isinstance(source, Haystacks) and source.shapes[0][0] == 1
    return {"grid": source.shapes[0][1]} if is_one_image else {}


def headline_rate(evaluation: Evaluation, scores: dict[str, Score]) -> float:
    """The score that `best/` is chosen by: --metric on the first batches of the sets that count for it.

    The rows are the same at every evaluation. They belong to the test sets, so report `final/`, not `best/`.
    """
    rows = []
    for name, score in scores.items():
        if evaluation.sets[name].counts_for_best:
            first = {question.id for question in evaluation.questions[name][: evaluation.short_count]}
            rows += [row for row in score.rows if row["id"] in first]
    return score_answers(evaluation.config.metric, rows)
