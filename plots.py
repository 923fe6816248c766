"""Figures of training, drawn from the files of run folders.

python plots.py runs/original_seed0                  # loss, accuracy, lambda and sample answers of a run
python plots.py runs/original_seed0 runs/diff_seed0  # also the attention of both, side by side
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import safetensors
import safetensors.torch
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from msgspec import Meta
from PIL import Image

from config_fields import QUESTION_TASK
from diagnostics import SAVED_QUESTIONS, needle_share
from errors import UserError, one_line_errors
from files import check_ranges, open_image, reading, resolve_inside
from needle_eval.mmneedle_prompts import ABSENT
from needle_eval.plots import (
    CHANCE,
    COLOURS,
    COLUMNS,
    MARKERS,
    STYLE,
    Curve,
    draw_seeds,
    finish,
    make_panels,
    percent_formatter,
    save,
    wrap_title,
)
from needle_eval.questions import normalise
from needle_eval.statistics import wilson
from run_folder import read_metrics, read_run_record, read_samples

RIGHT, WRONG = COLOURS[0], COLOURS[1]  # colours of answers
# outlines of the needle's cell, and of a wrong cell that was answered
FOUND, MISSED = dict(edgecolor="#56B4E9", linestyle="solid"), dict(edgecolor="#D55E00", linestyle="dashed")
SIGNED_COLOURS = matplotlib.colors.LinearSegmentedColormap.from_list("signed", [COLOURS[0], "white", COLOURS[1]])
DARKEST = 0.75  # opacity of the black overlay where an image gets no attention
CONTRAST = 1.5  # exponent of the opacity between 0 and DARKEST
SHOWN_STEPS = 30  # lines in a panel of lambda by depth
CLIPPED = 0.01  # share of map values outside the colour scale
SMOOTHING = 0.5  # weight of the past in a smoothed loss
SHOWN_SETS = 4  # evaluation sets in answers.png
PANEL, LINE = 2.2, 0.14  # inches: the side of an image, the height of a line of its title
TITLE_WIDTH = 30  # characters
MAX_NAMED_LAYERS = 12  # layers with a name each in a figure of lambda
LAST_FIGURE = "loss.png"  # drawn last: if it exists, all of them do


def draw_run(folder: Path):
    """Draw answers.png, lambda.png, accuracy.png and loss.png into plots/ of a run folder; print what is left out.

    Raises UserError when a file of the run cannot be read or the disk is full.
    """
    lines, samples, record = read_metrics(folder), read_samples(folder), read_run_record(folder)
    title = run_title(folder, record)
    images = [sample for sample in samples if sample.get("image")]
    if not images:
        print(f"{folder / 'samples.jsonl'}: has no images (rows of text alone): answers.png is not drawn")
    with plt.rc_context(STYLE):
        if images:
            save(draw_answers(folder, images, title), folder / "plots" / "answers.png")
        if curves := lambda_curves(lines):
            save(draw_lambda(curves, title), folder / "plots" / "lambda.png")
        if evals := [line for line in lines if line.get("eval")]:
            save(draw_accuracy(evals, chances(samples), title), folder / "plots" / "accuracy.png")
        if any(line.get("loss") is not None for line in lines):
            save(draw_loss(lines, title), folder / "plots" / LAST_FIGURE)


def run_title(folder: Path, record: dict) -> str:
    """A run's folder, arm and seed."""
    return f"{folder.resolve().name} ({record.get('arm')}, seed {record['config'].get('seed')})"


def is_drawn(folder: Path) -> bool:
    """Whether `draw_run` has drawn all figures of a run folder."""
    return (folder / "plots" / LAST_FIGURE).is_file()


# ---- curves of one run
def draw_loss(lines: list[dict], title: str) -> Figure:
    """Loss of the logged updates, raw and smoothed, and the mean loss of the evaluation sets where it was measured."""
    figure, axes = plt.subplots(layout="constrained")
    updates = [line for line in lines if line.get("loss") is not None]
    steps, losses = [line["step"] for line in updates], [line["loss"] for line in updates]
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.35, linewidth=1, label="each logged update")
    axes.plot(steps, smooth(losses), color=COLOURS[0], linewidth=1.8, label="smoothed")
    held_out = [(line["step"], fmean(line["eval_loss"].values())) for line in lines if line.get("eval_loss")]
    if held_out:
        style = dict(color=COLOURS[1], marker=MARKERS[1], markersize=4, linewidth=1.4)
        axes.plot(*zip(*held_out, strict=True), **style, label="evaluation sets, mean")
    axes.set(title=wrap_title(title, 80), xlabel="update", ylabel="loss per label token", yscale="log")
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def smooth(losses: list[float]) -> list[float]:
    """The exponential moving average of losses."""
    average, curve = losses[0], []
    for loss in losses:
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        curve.append(average)
    return curve


def chances(samples: list[dict]) -> dict[str, float]:
    """Evaluation set -> rate of a uniform guess of the cell, for haystacks of one image whose needle is present."""
    return {s["set"]: 1 / s["grid"] ** 2 for s in samples if s.get("grid") and normalise(s["answer"]) != ABSENT}


def accuracy_curves(lines: list[dict]) -> dict[str, list[tuple[int, int, int]]]:
    """{set: [(step, right answers, questions)]} of every evaluation."""
    curves: dict[str, list[tuple[int, int, int]]] = {}
    for line in lines:
        for name, counts in (line.get("eval") or {}).items():
            curves.setdefault(name, []).append((line["step"], *counts))
    return curves


def draw_accuracy(lines: list[dict], chance: dict[str, float], title: str) -> Figure:
    """Exact accuracy of each set over training, from before the first update, with 95 % Wilson intervals.

    Sets with the same rate of a uniform guess (a dashed line) share a panel, and so do the sets without one.
    """
    curves = accuracy_curves(lines)
    levels = sorted({chance.get(name, 0.0) for name in curves}, reverse=True)
    figure, panels = make_panels(len(levels), 3.0 if len(levels) > 1 else 6, 3.6, columns=3, sharey=True)
    for panel, level in zip(panels, levels, strict=True):
        names = [name for name in curves if chance.get(name, 0.0) == level]
        for number, name in enumerate(names):
            line_style = ("-", "--", ":")[number // len(COLOURS) % 3]
            marker = MARKERS[number % len(MARKERS)]
            style = dict(color=COLOURS[number % len(COLOURS)], linestyle=line_style, marker=marker, markersize=4)
            rates = [right / n for _, right, n in curves[name]]
            ends = [wilson(right, n) for _, right, n in curves[name]]
            below = [rate - low for rate, (low, _) in zip(rates, ends, strict=True)]
            above = [high - rate for rate, (_, high) in zip(rates, ends, strict=True)]
            steps = [step for step, *_ in curves[name]]
            panel.errorbar(steps, rates, yerr=[below, above], label=name, capsize=2, linewidth=1.4, **style)
        if level:
            panel.axhline(level, **CHANCE, label="uniform guess")
        panel.set(xlabel="update", ylim=(-0.02, 1.02))
        panel.yaxis.set_major_formatter(percent_formatter())
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    panels[0].set_ylabel("exact answers")
    figure.suptitle(wrap_title(title, 40 * min(3, len(levels)) + 20), fontsize=10)
    return figure


def lambda_curves(lines: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """{layer: [(step, lambda)]}: the start, then every logged update. If lambda depends on the token and is not
    logged, its mean at every evaluation; {} for a method without lambda."""
    measured = [
        (line["step"], {n: m["lambda"] for n, m in line["inside"].items() if "lambda" in m})
        for line in lines
        if "inside" in line
    ]
    logged = [(line["step"], line["lambda"]) for line in lines if "lambda" in line]
    points = [*(point for point in measured if point[0] == 0), *logged] if logged else measured
    curves: dict[str, list[tuple[int, float]]] = {}
    for step, values in points:
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def draw_lambda(curves: dict[str, list[tuple[int, float]]], title: str) -> Figure:
    """lambda of every layer over training, early layers dark, late layers light; a colour bar replaces the names of
    more than MAX_NAMED_LAYERS."""
    figure, axes = plt.subplots(layout="constrained")
    scale = plt.Normalize(0, max(1, len(curves) - 1) / 0.9)  # the lightest colours are hard to see
    is_named = len(curves) <= MAX_NAMED_LAYERS
    for i, (name, points) in enumerate(curves.items()):
        label = short_layer_name(name) if is_named else None
        axes.plot(*zip(*points, strict=True), color=plt.cm.cividis(scale(i)), linewidth=1.6, label=label)
    if not is_named:
        kinds = dict.fromkeys(short_layer_name(name).rpartition(" ")[0] for name in curves)
        bar = figure.colorbar(plt.cm.ScalarMappable(scale, "cividis"), ax=axes, label=f"{', then '.join(kinds)}")
        bar.ax.set_ylim(0, len(curves) - 1)
        bar.outline.set_visible(False)
    starts = {points[0][1] for points in curves.values() if points[0][0] == 0}
    if len(starts) == 1:
        axes.axhline(*starts, **CHANCE, label="start")
    axes.set(title=wrap_title(title, 80), xlabel="update", ylabel="lambda")
    axes.set_xlim(left=0)
    if axes.get_legend_handles_labels()[1]:
        place = dict(loc="center left", bbox_to_anchor=(1.0, 0.5)) if is_named else dict(loc="best")
        axes.legend(frameon=False, fontsize=8, **place)
    return figure


def short_layer_name(name: str) -> str:
    """The layer of a module, as in "language layer 3"."""
    match = re.search(r"(language|vision).*layers\.(\d+)", name)
    return f"{match[1]} layer {match[2]}" if match else name


# ---- images with answers
def draw_answers(folder: Path, samples: list[dict], title: str) -> Figure:
    """The last answers of the first sets with their images, one column per set. In haystacks the needle's cell has a
    solid outline, and a wrong answer's cell a dashed one."""
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
    legend = [
        Rectangle((0, 0), 1, 1, fill=False, linewidth=2, label=label, **style)
        for style, label in ((FOUND, "needle"), (MISSED, "wrong answer"))
    ]
    if any(sample.get("grid") for _, answers in shown for sample in answers):
        figure.legend(handles=legend, frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(wrap_title(f"{title}, update {last}", 30 * len(shown)), fontsize=10)
    return figure


def answer_title(sample: dict) -> str:
    """Prompt and response, wrapped, and whether the response is right."""
    prompt = wrap_title(sample["prompt"].removeprefix(QUESTION_TASK), TITLE_WIDTH)
    verdict = "right" if normalise(sample["response"]) == normalise(sample["answer"]) else "wrong"
    response = f"{sample['response'].strip() or '(empty)'} ({verdict})"
    return f"{prompt}\n{wrap_title(response, TITLE_WIDTH)}"


def read_sample_image(folder: Path, sample: dict) -> Image.Image:
    """The image of a line of samples.jsonl, read from the run folder."""
    return open_image(resolve_inside(folder, sample["image"]))


def outline_cell(panel: Axes, answer: str, grid: int | None, style: dict[str, str]):
    """Outline the cell of an answer "1, row, column" in a haystack; other answers and images are left as they are."""
    match = re.fullmatch(r"1, (\d{1,3}), (\d{1,3})", answer)
    if match and grid:
        height, width = panel.get_images()[0].get_array().shape[:2]
        cell_height, cell_width = height / grid, width / grid
        corner = (int(match[2]) - 1) * cell_width, (int(match[1]) - 1) * cell_height
        panel.add_patch(Rectangle(corner, cell_width, cell_height, fill=False, linewidth=3, **style))


# ---- attention of several runs
def draw_attention(runs: list[Path], token: int) -> Figure:
    """Attention of one answer token to the image: one column per haystack, one row per run, the needle's cell outlined.

    For each run, the decoder layer with the most attention on the needle over these haystacks is shown. The maps are
    those of `diagnostics.answer_attention` in the runs' attention.safetensors. Raises UserError for runs without maps,
    and for runs that were evaluated on different questions.
    """
    stored = [read_attention_of_one_image(run) for run in runs]
    questions = [attention_questions(run, list(maps)) for run, maps in zip(runs, stored, strict=True)]
    if any([sample["id"] for sample in found] != [sample["id"] for sample in questions[0]] for found in questions):
        raise UserError(
            f"{', '.join(map(str, runs))}: were evaluated on different questions: compare runs of one --data"
        )
    answer_tokens = min(maps.shape[2] for tensors in stored for maps in tensors.values())
    if token >= answer_tokens:
        raise UserError(f"--token={token}: expected a number below {answer_tokens}, the tokens of the answers")
    shape = 1 + len(runs), len(questions[0])
    figure, axes = plt.subplots(*shape, figsize=(2.3 * shape[1], 2.4 * shape[0]), layout="constrained", squeeze=False)
    for panels, sample in zip(axes.T, questions[0], strict=True):
        image = read_sample_image(runs[0], sample)
        panels[0].set_title(wrap_title(sample["prompt"].removeprefix(QUESTION_TASK), TITLE_WIDTH), fontsize=9)
        for panel in panels:
            panel.imshow(image)
            panel.axis("off")
            outline_cell(panel, sample["answer"], sample["grid"], FOUND)
    for panels, run, tensors, samples in zip(axes[1:], runs, stored, questions, strict=True):
        maps = maps_of_samples(tensors, samples, token)
        layer = needle_layer(maps, samples)
        for panel, m, sample in zip(panels, maps, samples, strict=True):
            darken(panel, square(m)[layer])
            share = share_on_needle(m, sample)[layer]
            panel.set_title(f"{run.resolve().name}, layer {layer}:\n{share:.0%} on the needle", fontsize=8)
    names = ", ".join(run_title(run, read_run_record(run)) for run in runs)
    title = f"Attention over the image, token {token} of the answer. {names}"
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(wrap_title(title, 32 * shape[1]), fontsize=10)
    return figure


def darken(panel: Axes, attention: torch.Tensor):
    """Darken the image of a panel where a map [side, side] is low, so that it stays bright where the map is high."""
    height, width = panel.get_images()[0].get_array().shape[:2]
    light = attention.clamp(min=0).numpy()
    shade = DARKEST * (1 - light / light.max()) ** CONTRAST if light.max() > 0 else np.full_like(light, DARKEST)
    extent = (0, width, height, 0)
    panel.imshow(np.zeros_like(light), cmap="gray", alpha=shade, extent=extent, interpolation="bicubic")


def read_attention(run: Path) -> dict[str, torch.Tensor]:
    """{evaluation set: [layers, questions, answer tokens, image tokens]} of a finished run."""
    if reason := why_no_attention(run):
        raise UserError(reason)
    file = run / "attention.safetensors"
    with reading(file):
        tensors = safetensors.torch.load_file(file)
    if any(maps.ndim != 4 for maps in tensors.values()):
        raise UserError(f"{file}: holds other tensors than a run saves: restore it")
    if any(maps.shape[1] < SAVED_QUESTIONS for maps in tensors.values()):
        raise UserError(
            f"{file}: has fewer than {SAVED_QUESTIONS} questions of each set: give --eval_samples of {SAVED_QUESTIONS} "
            "or more"
        )
    return tensors


def why_no_attention(run: Path) -> str:
    """Why the attention of a run cannot be drawn; "" if it can."""
    file = run / "attention.safetensors"
    if not file.exists():
        return f"{file}: missing: finish the run, with haystack data, first"
    if not any(sample.get("grid") for sample in read_samples(run)):
        return f"{run}: attention on haystacks of several images is not drawn"
    return ""


def read_attention_of_one_image(run: Path) -> dict[str, torch.Tensor]:
    """`read_attention` of the sets whose haystacks are single images, so that the needle's cell is known."""
    names = {sample["set"] for sample in read_samples(run) if sample.get("grid")}
    return {name: maps for name, maps in read_attention(run).items() if name in names}


def attention_questions(run: Path, sets: list[str]) -> list[dict]:
    """The rows of samples.jsonl whose attention is saved: the first questions of these evaluation sets."""
    samples = read_samples(run)
    last = max((sample["step"] for sample in samples), default=0)
    found = []
    for name in sets:
        of_set = [s for s in samples if s["step"] == last and s["set"] == name and s.get("image") and s.get("grid")]
        found += of_set[:SAVED_QUESTIONS]
    if len(found) < SAVED_QUESTIONS * len(sets):
        raise UserError(f"{run / 'samples.jsonl'}: does not name the images of {', '.join(sets)}: run it again")
    return found


def maps_of_samples(tensors: dict[str, torch.Tensor], samples: list[dict], token: int = 0) -> list[torch.Tensor]:
    """The maps [..., layers, image tokens] of every sample at one token of its answer.

    `samples` are those of `attention_questions`: SAVED_QUESTIONS of every set, set by set, so that sample i is question
    i % SAVED_QUESTIONS of its set.
    """
    return [tensors[sample["set"]][..., i % SAVED_QUESTIONS, token, :] for i, sample in enumerate(samples)]


def needle_layer(maps: list[torch.Tensor], samples: list[dict]) -> int:
    """The layer whose maps [layers, image tokens] have the most attention on the needles of these samples."""
    shares = [share_on_needle(m, sample) for m, sample in zip(maps, samples, strict=True)]
    return int(torch.stack(shares).mean(0).argmax())


def needle_shares(run: Path, attention: dict[str, torch.Tensor]) -> list[tuple[str, list[float], int]]:
    """(evaluation set, the needle's share of the attention by layer, grid) of every set: mean over its questions, at
    the first token of the answer."""
    samples = attention_questions(run, list(attention))
    found = []
    for name, maps in attention.items():
        of_set = [sample for sample in samples if sample["set"] == name]
        shares = [share_on_needle(maps[:, i, 0], sample) for i, sample in enumerate(of_set)]
        found.append((name, torch.stack(shares).mean(0).tolist(), of_set[0]["grid"]))
    return found


def share_on_needle(maps: torch.Tensor, sample: dict) -> torch.Tensor:
    """Share of the attention [layers, image tokens] on the cell of a sample's needle: [layers]."""
    needle = tuple(int(number) - 1 for number in sample["answer"].split(", "))
    return needle_share(maps, needle, 1, sample["grid"])


def square(maps: torch.Tensor) -> torch.Tensor:
    """[layers, N] -> [layers, side, side]."""
    side = math.isqrt(maps.shape[-1])
    return maps.unflatten(-1, (side, side))


# ---- several runs of several arms
Style = dict[str, dict[str, str]]  # colour and marker by arm, as `arm_styles` gives them


def draw_losses(curves: dict[str, list[Curve]], style: Style, title: str) -> Figure:
    """Smoothed loss of every arm: the mean over its seeds, and a band from the lowest to the highest."""
    figure, panel = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for arm, of_seeds in curves.items():
        smoothed = [curve._replace(y=smooth(curve.y)) for curve in of_seeds]
        draw_seeds(panel, smoothed, style[arm] | {"marker": ""}, arm)
    panel.set(xlabel="update", ylabel="loss per label token, smoothed", yscale="log")
    panel.set_xlim(left=0)
    finish(figure, panel, title, 90)
    return figure


def draw_sets(
    curves: dict[str, dict[str, list[Curve]]], style: Style, title: str, label: str, chance: dict[str, float] | None
) -> Figure:
    """A panel for each evaluation set: a quantity of every arm over training, as in `draw_losses`.

    With `chance`, by set, the quantity is a rate on an axis from 0 to 100 %; with None it is on a logarithmic axis.
    """
    figure, panels = make_panels(len(curves), 2.5, 2.3, sharey=True, sharex=True)
    for panel, (name, of_set) in zip(panels, curves.items(), strict=True):
        for arm, of_seeds in of_set.items():
            draw_seeds(panel, of_seeds, style[arm], arm)
        if chance and name in chance:
            panel.axhline(chance[name], **CHANCE, label="uniform guess")
        panel.set_title(wrap_title(name, 32), fontsize=9)
        panel.set(xlabel="update")
        if chance is None:
            panel.set_yscale("log")
        else:
            panel.set_ylim(-0.02, 1.02)
            panel.yaxis.set_major_formatter(percent_formatter())
    for panel in panels[::COLUMNS]:
        panel.set_ylabel(label)
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    finish(figure, fullest, title, 32 * min(COLUMNS, len(curves)))
    return figure


def draw_lambda_by_depth(curves: dict[str, list[dict[str, list[tuple[int, float]]]]], title: str) -> Figure:
    """A panel for each arm: lambda by layer, averaged over the seeds, with a line for each of about `SHOWN_STEPS`
    logged updates from the start (dashed) to the end. `curves` are those of `lambda_curves`, by arm and seed."""
    figure, panels = make_panels(len(curves), 3.6 if len(curves) > 1 else 6.4, 3.3, columns=3)
    last = max(points[-1][0] for seeds in curves.values() for layers in seeds for points in layers.values())
    scale = plt.Normalize(0, last)
    for panel, (arm, seeds) in zip(panels, curves.items(), strict=True):
        by_seed = [[dict(points) for points in layers.values()] for layers in seeds]
        steps = sorted(set.intersection(*(set(points) for layers in by_seed for points in layers)))
        means = {
            step: [sum(x[step] for x in layer) / len(seeds) for layer in zip(*by_seed, strict=True)] for step in steps
        }
        for step in {*steps[:: math.ceil(len(steps) / SHOWN_STEPS)], steps[-1]}:
            size = 6 if step == steps[-1] else 2.5
            panel.plot(means[step], color=plt.cm.cividis(scale(step)), linewidth=1.2, marker="o", markersize=size)
        panel.plot(means[steps[0]], color="black", linestyle="dashed", linewidth=1.4, zorder=5, label="start")
        names = [short_layer_name(name) for name in seeds[0]]
        shown = range(0, len(names), math.ceil(len(names) / MAX_NAMED_LAYERS))
        panel.set_xticks(shown, [names[i].rpartition(" ")[2] for i in shown], fontsize=8)
        kinds = dict.fromkeys(name.rpartition(" ")[0] for name in names)
        panel.set(xlabel=", then ".join(kinds), ylabel="lambda")
        panel.set_title(wrap_title(f"{arm}, mean of {len(seeds)} seeds" if len(seeds) > 1 else arm, 40), fontsize=9)
    mappable = plt.cm.ScalarMappable(scale, "cividis")
    figure.colorbar(mappable, ax=panels, label="update").outline.set_visible(False)
    finish(figure, panels[0], title, 40 * min(3, len(curves)) + 20)
    return figure


def draw_signed_maps(run: Path, baseline: Path | None, title: str) -> Figure:
    """A row for each stored haystack: the image, the map of the standard run, and A1, lambda A2 and their difference of
    the differential run. All maps share one colour scale, white at 0. Each run shows the layer that attends most to the
    needle, at the first token of the answer, averaged over heads. Raises UserError as `draw_attention` does."""
    parts = read_signed_maps(run)
    attention = {name: maps for name, maps in read_attention_of_one_image(run).items() if name in parts}
    samples = attention_questions(run, list(attention))
    columns = {
        "A1": lambda m: m[0],
        "lambda A2": lambda m: m[1],
        "A1 - lambda A2": lambda m: m[0] - m[1],
    }
    layer = needle_layer(maps_of_samples(attention, samples), samples)
    maps = [[square(column(pair))[layer] for column in columns.values()] for pair in maps_of_samples(parts, samples)]
    heads = [f"{name}\nlayer {layer}" for name in columns]
    if baseline is not None:
        theirs = read_attention_of_one_image(baseline)
        if [s["id"] for s in attention_questions(baseline, list(theirs))] == [s["id"] for s in samples]:
            standard = maps_of_samples(theirs, samples)
            of_layer = needle_layer(standard, samples)
            heads.insert(0, f"standard, A\nlayer {of_layer}")
            for row, m in zip(maps, standard, strict=True):
                row.insert(0, square(m)[of_layer])
    limit = float(torch.cat([m.abs().flatten() for row in maps for m in row]).quantile(1 - CLIPPED))
    shape = len(samples), 1 + len(heads)
    size = 1.85 * shape[1] + 0.8, 2.0 * shape[0] + 0.8
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    for panels, sample, row in zip(axes, samples, maps, strict=True):
        image = read_sample_image(run, sample)
        panels[0].imshow(image)
        panels[0].set_title(wrap_title(sample["prompt"].removeprefix(QUESTION_TASK), 26), fontsize=8)
        outline_cell(panels[0], sample["answer"], sample["grid"], FOUND)
        for panel, m in zip(panels[1:], row, strict=True):
            shown = draw_signed(panel, m, limit)
            outline_cell(panel, sample["answer"], sample["grid"], dict(edgecolor="black", linestyle="solid"))
        for panel in panels:
            panel.set(xticks=[], yticks=[])
            panel.grid(visible=False)
    for panel, head in zip(axes[0, 1:], heads, strict=True):
        panel.set_title(head, fontsize=9)
    bar = figure.colorbar(shown, ax=axes, label="attention on a patch", shrink=0.6, extend="both")
    bar.outline.set_visible(False)
    figure.suptitle(wrap_title(title, 16 * shape[1]), fontsize=10)
    return figure


def draw_signed(panel: Axes, m: torch.Tensor, limit: float) -> AxesImage:
    """Draw a map [rows, columns] with a colour scale from -limit to limit, white at 0."""
    rows, columns = m.shape
    return panel.imshow(m.numpy(), cmap=SIGNED_COLOURS, vmin=-limit, vmax=limit, extent=(0, columns, rows, 0))


def read_signed_maps(run: Path) -> dict[str, torch.Tensor]:
    """{evaluation set: A1 and lambda A2 [2, layers, questions, answer tokens, image tokens]} of a finished run."""
    file = run / "signed_maps.safetensors"
    with reading(file):
        tensors = safetensors.torch.load_file(file)
    if any(maps.ndim != 5 or len(maps) != 2 for maps in tensors.values()):
        raise UserError(f"{file}: holds other tensors than a run saves: restore it")
    return tensors


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders; of several, the attention is also drawn side by side
    token: Annotated[int, Meta(ge=0)] = 0  # token of the answer whose attention is drawn


@one_line_errors
def main():
    config = tyro.cli(Config, description=__doc__)
    check_ranges(config)
    if not config.runs:
        raise UserError("give at least one run folder, as in python plots.py runs/original_seed0")
    runs = [Path(run) for run in config.runs]
    for run in runs:
        draw_run(run)
        print(run / "plots")
    reasons = [reason for run in runs if (reason := why_no_attention(run))]
    if len(runs) > 1 and reasons:
        print(f"attention.png is not drawn: {reasons[0]}")
    elif len(runs) > 1:
        with plt.rc_context(STYLE):
            path = runs[-1] / "plots" / "attention.png"
            save(draw_attention(runs, config.token), path)
            print(path)


if __name__ == "__main__":
    main()
