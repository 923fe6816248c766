"""Figures of training, drawn from the saved files of run folders alone.

python plots.py runs/original_seed0                  # loss, accuracy, lambda and sample answers of a run
python plots.py runs/original_seed0 runs/diff_seed0  # also the attention of both, side by side
"""

import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import safetensors
import safetensors.torch
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from msgspec import Meta
from PIL import Image

from diagnostics import needle_share
from errors import UserError, one_line_errors
from files import check_ranges, open_image, reading, resolve_inside, writing
from needle_eval.plots import COLOURS, PERCENT, STYLE
from needle_eval.questions import normalise
from needle_eval.statistics import wilson
from run_folder import read_metrics, read_run_record, read_samples

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first

RIGHT, WRONG = "#1b7837", "#b2182b"  # colours of answers
FOUND, MISSED = "#35d04b", "#e0213a"  # colours of cells: the needle's, and another one that was answered
SHOWN_SETS = 4  # evaluation sets in answers.png
ATTENTION_QUESTIONS = 2  # of each grid in attention.png
PANEL, LINE = 2.2, 0.14  # inches: the side of an image, the height of a line of its title
TITLE_WIDTH = 30  # characters
LAST_FIGURE = "loss.png"  # drawn last: if it exists, all of them do


def draw_run(folder: Path):
    """Draw answers.png, lambda.png, accuracy.png and loss.png into plots/ of a run folder and print what was left out.

    Raises UserError when a file of the run cannot be read or the disk is full.
    """
    lines, samples, record = read_metrics(folder), read_samples(folder), read_run_record(folder)
    title = f"{folder.resolve().name} ({record.get('arm')}, seed {record['config'].get('seed')})"
    images = [sample for sample in samples if sample.get("image")]
    if not images:
        print(f"{folder / 'samples.jsonl'}: names no images, as in runs of older versions: answers.png is not drawn")
    with plt.rc_context(STYLE):
        if images:
            save(draw_answers(folder, images, title), folder / "plots" / "answers.png")
        if curves := lambda_curves(lines):
            save(draw_lambda(curves, title), folder / "plots" / "lambda.png")
        if evals := [line for line in lines if line.get("eval")]:
            save(draw_accuracy(evals, title), folder / "plots" / "accuracy.png")
        if updates := [line for line in lines if line.get("loss") is not None]:
            save(draw_loss(updates, title), folder / "plots" / LAST_FIGURE)


def is_drawn(folder: Path) -> bool:
    """Whether `draw_run` has drawn all figures of a run folder."""
    return (folder / "plots" / LAST_FIGURE).is_file()


def save(figure: Figure, path: Path):
    """Write a figure completely or not at all, and close it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(temporary, format="png")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        plt.close(figure)


# ---- curves of one run
def draw_loss(lines: list[dict], title: str) -> Figure:
    """Loss of the logged updates, as it is and smoothed."""
    figure, axes = plt.subplots(layout="constrained")
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.3, linewidth=1)
    average, curve = losses[0], []
    for loss in losses:
        average = 0.5 * average + 0.5 * loss
        curve.append(average)
    axes.plot(steps, curve, color=COLOURS[0], linewidth=1.8, label="smoothed")
    axes.set(title=title, xlabel="update", ylabel="loss per label token", yscale="log")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def draw_accuracy(lines: list[dict], title: str) -> Figure:
    """Exact accuracy of each set over training, from before the first update, with 95 % Wilson intervals."""
    figure, axes = plt.subplots(layout="constrained")
    for number, name in enumerate(lines[0]["eval"]):
        line_style = ("-", "--", ":")[number // len(COLOURS) % 3]
        style = dict(color=COLOURS[number % len(COLOURS)], linestyle=line_style, marker="o", markersize=4, capsize=2)
        steps, rates, below, above = [], [], [], []
        for line in lines:
            if name in line["eval"]:
                right, n = line["eval"][name]
                low, high = wilson(right, n)
                steps.append(line["step"])
                rates.append(right / n)
                below.append(right / n - low)
                above.append(high - right / n)
        axes.errorbar(steps, rates, yerr=[below, above], label=name, **style)
    axes.set(title=title, xlabel="update", ylabel="exact answers", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PERCENT)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def lambda_curves(lines: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """{layer: [(step, lambda)]}: the start, then every logged update. Where lambda depends on the token and is not
    logged, its mean at every evaluation."""
    measured = [
        (line["step"], {n: m["lambda"] for n, m in line["inside"].items()}) for line in lines if "inside" in line
    ]
    logged = [(line["step"], line["lambda"]) for line in lines if "lambda" in line]
    points = [*(point for point in measured if point[0] == 0), *logged] if logged else measured
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, values in points:
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def draw_lambda(curves: dict[str, list[tuple[int, float]]], title: str) -> Figure:
    """lambda of every layer over training, early layers dark, late layers light."""
    figure, axes = plt.subplots(layout="constrained")
    for i, (name, points) in enumerate(curves.items()):
        colour = plt.cm.viridis(0.9 * i / max(1, len(curves) - 1))
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=short_layer_name(name))
    axes.set(title=title, xlabel="update", ylabel="lambda")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def short_layer_name(name: str) -> str:
    """ "language layer 3" for a module of that layer."""
    match = re.search(r"(language|vision).*layers\.(\d+)", name)
    return f"{match[1]} layer {match[2]}" if match else name


# ---- images with answers
def draw_answers(folder: Path, samples: list[dict], title: str) -> Figure:
    """The last answers of the first sets on their images, a column a set. In haystacks the needle's cell is outlined
    in green, and a wrong answer's cell in red."""
    last = max(sample["step"] for sample in samples)
    by_set: dict[str, list[dict]] = {}
    for sample in samples:
        if sample["step"] == last:
            by_set.setdefault(sample["set"], []).append(sample)
    shown = list(by_set.items())[:SHOWN_SETS]
    rows = max(len(answers) for _, answers in shown)
    titles = [[answer_title(sample) for sample in answers] for _, answers in shown]
    lines = max(text.count("\n") + 1 for column in titles for text in column)
    size = PANEL * len(shown), (PANEL + LINE * lines) * rows + 0.6
    figure, axes = plt.subplots(rows, len(shown), figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat:
        panel.axis("off")
    for panels, (name, answers), texts in zip(axes.T, shown, titles, strict=True):
        for panel, sample, text in zip(panels, answers, texts, strict=False):
            is_right = normalise(sample["response"]) == normalise(sample["answer"])
            panel.imshow(read_sample_image(folder, sample))
            panel.set_title(text, fontsize=8, color=RIGHT if is_right else WRONG)
            outline_cell(panel, sample["answer"], sample.get("grid"), FOUND)
            if not is_right:
                outline_cell(panel, normalise(sample["response"]), sample.get("grid"), MISSED)
        panels[-1].annotate(
            name, (0.5, 0), (0, -10), "axes fraction", "offset points", fontsize=8, ha="center", va="top"
        )
    figure.suptitle(f"{title}, update {last}", fontsize=9)
    return figure


def answer_title(sample: dict) -> str:
    """Prompt and response, wrapped."""
    prompt = textwrap.fill(sample["prompt"].removeprefix("answer en "), TITLE_WIDTH)
    return f"{prompt}\n{textwrap.fill(sample['response'].strip() or '(empty)', TITLE_WIDTH)}"


def read_sample_image(folder: Path, sample: dict) -> Image.Image:
    """The image of a line of samples.jsonl, which is in the run folder."""
    return open_image(resolve_inside(folder, sample["image"]))


def outline_cell(panel: Axes, answer: str, grid: int | None, colour: str):
    """Frame the cell of an answer "1, row, column" in a haystack; nothing for other answers and other images."""
    match = re.fullmatch(r"1, (\d{1,3}), (\d{1,3})", answer)
    if match and grid:
        height, width = panel.get_images()[0].get_array().shape[:2]
        cell_height, cell_width = height / grid, width / grid
        corner = (int(match[2]) - 1) * cell_width, (int(match[1]) - 1) * cell_height
        panel.add_patch(Rectangle(corner, cell_width, cell_height, fill=False, edgecolor=colour, linewidth=3))


# ---- attention of several runs
def draw_attention(runs: list[Path], token: int) -> Figure:
    """Attention of one token of the answer to the image: a column a haystack, a row a run, the needle's cell outlined.

    Each run shows the decoder layer with the most attention on the needle over these haystacks. The maps are those of
    `diagnostics.answer_attention` in the runs' attention.safetensors. Raises UserError for runs without them, and for
    runs that were evaluated on different questions.
    """
    stored = [read_attention(run) for run in runs]
    questions = [attention_questions(run, list(maps)) for run, maps in zip(runs, stored, strict=True)]
    if any([sample["id"] for sample in found] != [sample["id"] for sample in questions[0]] for found in questions):
        raise UserError(
            f"{', '.join(map(str, runs))}: were evaluated on different questions: compare runs of one --data"
        )
    answer_tokens = min(maps.shape[2] for tensors in stored for maps in tensors.values())
    if token >= answer_tokens:
        raise UserError(f"--token={token}: expected less than {answer_tokens}, the tokens of the answers")
    shape = 1 + len(runs), len(questions[0])
    figure, axes = plt.subplots(*shape, figsize=(2.3 * shape[1], 2.4 * shape[0]), layout="constrained", squeeze=False)
    for panels, sample in zip(axes.T, questions[0], strict=True):
        image = read_sample_image(runs[0], sample)
        panels[0].set_title(textwrap.fill(sample["prompt"].removeprefix("answer en "), TITLE_WIDTH), fontsize=9)
        for panel in panels:
            panel.imshow(image, alpha=1.0 if panel is panels[0] else 0.5)
            panel.axis("off")
            outline_cell(panel, sample["answer"], sample["grid"], FOUND)
    for panels, run, tensors, samples in zip(axes[1:], runs, stored, questions, strict=True):
        maps = [tensors[sample["set"]][:, i % ATTENTION_QUESTIONS, token] for i, sample in enumerate(samples)]
        shares = [share_on_needle(m, sample) for m, sample in zip(maps, samples, strict=True)]  # of each layer
        layer = int(torch.stack(shares).mean(0).argmax())
        for panel, m, share in zip(panels, maps, shares, strict=True):
            height, width = panel.get_images()[0].get_array().shape[:2]
            attention = square(m)[layer].clamp(min=0)
            panel.imshow(attention, cmap="inferno", alpha=0.65, extent=(0, width, height, 0), interpolation="bicubic")
            panel.set_title(f"{run.resolve().name}, layer {layer}:\n{share[layer]:.0%} on the needle", fontsize=8)
    return figure


def read_attention(run: Path) -> dict[str, torch.Tensor]:
    """{evaluation set: [layers, questions, answer tokens, image tokens]} of a finished run."""
    file = run / "attention.safetensors"
    if not file.exists():
        raise UserError(f"{file}: missing: finish the run, with haystack data, first")
    with reading(file):
        tensors = safetensors.torch.load_file(file)
    if any(maps.ndim != 4 or maps.shape[1] < ATTENTION_QUESTIONS for maps in tensors.values()):
        raise UserError(f"{file}: holds other tensors than a run saves: restore it")
    return tensors


def attention_questions(run: Path, sets: list[str]) -> list[dict]:
    """The first questions of these evaluation sets, whose attention is saved, from samples.jsonl."""
    samples = read_samples(run)
    last = max((sample["step"] for sample in samples), default=0)
    found = []
    for name in sets:
        of_set = [s for s in samples if s["step"] == last and s["set"] == name and s.get("image") and s.get("grid")]
        found += of_set[:ATTENTION_QUESTIONS]
    if len(found) < ATTENTION_QUESTIONS * len(sets):
        raise UserError(f"{run / 'samples.jsonl'}: does not name the images of {', '.join(sets)}: run it again")
    return found


def share_on_needle(maps: torch.Tensor, sample: dict) -> torch.Tensor:
    """Share of the attention [layers, image tokens] on the cell of a sample's needle: [layers]."""
    needle = tuple(int(number) - 1 for number in sample["answer"].split(", "))
    return needle_share(maps, needle, 1, sample["grid"])


def square(maps: torch.Tensor) -> torch.Tensor:
    """[layers, N] -> [layers, side, side]."""
    side = math.isqrt(maps.shape[-1])
    return maps.unflatten(-1, (side, side))


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders; with several, their attention side by side as well
    token: Annotated[int, Meta(ge=0)] = 0  # token of the answer whose attention is drawn


@one_line_errors
def main():
    config = tyro.cli(Config, description=__doc__)
    check_ranges(config)
    if not config.runs:
        raise UserError("names no run: give run folders, as in python plots.py runs/original_seed0")
    runs = [Path(run) for run in config.runs]
    for run in runs:
        draw_run(run)
        print(run / "plots")
    without_images = [run for run in runs if not any(sample.get("image") for sample in read_samples(run))]
    if len(runs) > 1 and without_images:
        print(f"{without_images[0] / 'samples.jsonl'}: names no images: attention.png is not drawn")
    elif len(runs) > 1:
        with plt.rc_context(STYLE):
            path = runs[-1] / "plots" / "attention.png"
            save(draw_attention(runs, config.token), path)
            print(path)


if __name__ == "__main__":
    main()
