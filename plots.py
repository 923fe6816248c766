"""Every figure, drawn from the files of run folders alone.

python plots.py runs/original_seed0        # plots/loss.png and plots/accuracy.png of a run
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import safetensors
import safetensors.torch
import torch
import tyro
from matplotlib.patches import Rectangle

from checkpoint import read_json
from data import make_data
from diagnostics import needle_share
from errors import UserError, one_line_errors
from haystack import normalise
from intervals import wilson

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first

STYLE = {
    "figure.figsize": (6, 3.6),
    "figure.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}
NEEDLE_COLOURS = matplotlib.colors.LinearSegmentedColormap.from_list(
    "needle", ["#F0496E", "#EBB839", "#0CD79F"], bad="0.85"
)
COLOURS = ["#1f5aa6", "#d1495b", "#2e8b57", "#8a5fb0", "#c77d1a", "#4a4a4a"]


def read_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a folder that a script here wrote") from error


def draw_run(folder: str | Path):
    """Loss, held-out accuracy, lambda and sample answers of one run, into its plots/ folder."""
    folder = Path(folder)
    lines, samples = (read_lines(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    config = SimpleNamespace(**read_json(folder / "run.json")["config"])
    (folder / "plots").mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        draw_loss([line for line in lines if "loss" in line], folder / "plots" / "loss.png")
        draw_accuracy([line for line in lines if "eval" in line], folder / "plots" / "accuracy.png")
        draw_lambda(lambda_lines(lines), folder / "plots" / "lambda.png")
        if config.data.partition(":")[0] == "haystack":
            draw_answers(config, samples, folder / "plots" / "answers.png")


def draw_loss(lines: list[dict], path: Path):
    if not lines:
        return
    figure, axes = plt.subplots(layout="constrained")
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.3, linewidth=1)
    smooth, curve = losses[0], []
    for loss in losses:
        smooth = 0.5 * smooth + 0.5 * loss
        curve.append(smooth)
    axes.plot(steps, curve, color=COLOURS[0], linewidth=1.8, label="smoothed")
    axes.set(xlabel="update", ylabel="loss per label token", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def draw_accuracy(lines: list[dict], path: Path):
    """Exact accuracy of each set over training, 95 % Wilson intervals as bars."""
    if not lines:
        return
    figure, axes = plt.subplots(layout="constrained")
    for colour, name in zip(COLOURS, lines[0]["eval"], strict=False):
        steps, rates, lows, highs = [], [], [], []
        for line in lines:
            right, n = line["eval"][name]
            low, high = wilson(right, n)
            steps.append(line["step"])
            rates.append(right / n)
            lows.append(right / n - low)
            highs.append(high - right / n)
        axes.errorbar(steps, rates, yerr=[lows, highs], color=colour, marker="o", markersize=4, capsize=2, label=name)
    axes.set(xlabel="update", ylabel="exact answers", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    plt.close(figure)


def draw_answers(config, samples: list[dict], path: Path):
    """The last answers of the first four sets on their haystacks: the true cell in green, the told one in red if wrong.

    The pictures are made anew: a haystack is a function of its id.
    """
    _, sets = make_data(config)
    last = max(sample["step"] for sample in samples)
    shown = [s for s in samples if s["step"] == last and s["set"] in list(sets)[:4]]
    figure, axes = plt.subplots(
        2, (len(shown) + 1) // 2, figsize=(2.1 * ((len(shown) + 1) // 2), 5), layout="constrained"
    )
    for panel in axes.flat:
        panel.axis("off")
    for panel, sample in zip(axes.T.flat, shown, strict=False):
        source = sets[sample["set"]]
        panel.imshow(source.get(0, int(sample["id"].rsplit("/", 1)[1])).images[0])
        right = normalise(sample["response"]) == sample["answer"]
        told = sample["response"].strip() or "(nothing)"
        panel.set_title(
            f"{sample['prompt'].removeprefix('answer en ')}\n{told}",
            fontsize=8,
            color="#1b7837" if right else "#b2182b",
        )
        outline(panel, sample["answer"], source.cell, "#35d04b")
        if not right:
            outline(panel, normalise(sample["response"]), source.cell, "#e0213a")
    figure.savefig(path)
    plt.close(figure)


def outline(panel, answer: str, cell: int, colour: str):
    """A frame around the cell of an answer "1, row, column"; nothing for any other answer."""
    place = re.fullmatch(r"1, (\d), (\d)", answer)
    if place:
        row, column = int(place[1]) - 1, int(place[2]) - 1
        panel.add_patch(Rectangle((column * cell, row * cell), cell, cell, fill=False, edgecolor=colour, linewidth=3))


def lambda_lines(lines: list[dict]) -> list[dict]:
    """lambda at every logging step, or, where it depends on the token, its mean at every evaluation."""
    logged = [line for line in lines if "lambda" in line]
    means = [
        {"step": line["step"], "lambda": {name: layer["lambda"] for name, layer in line["inside"].items()}}
        for line in lines
        if "inside" in line
    ]
    return logged or means


def draw_lambda(lines: list[dict], path: Path):
    """lambda of every layer over training, early layers dark, late layers light."""
    if not lines:
        return
    figure, axes = plt.subplots(layout="constrained")
    names = list(lines[0]["lambda"])
    for i, name in enumerate(names):
        tower, layer = re.search(r"(language_model|vision_tower).*layers\.(\d+)", name).groups()
        steps, values = [line["step"] for line in lines], [line["lambda"][name] for line in lines]
        colour = plt.cm.viridis(0.9 * i / max(1, len(names) - 1))
        axes.plot(steps, values, color=colour, linewidth=1.6, label=f"{tower.split('_')[0]} layer {layer}")
    axes.set(xlabel="update", ylabel="lambda")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)
    plt.close(figure)


def draw_attention(runs: list[Path], path: Path, token: int = 0):
    """What a token of the answer pays to the picture: a column a haystack, a row a run, the needle's cell outlined.

    Each run shows the decoder layer that pays the needle most over these haystacks. Maps are read from the runs'
    attention.safetensors, as `diagnostics.answer_attention` has them.
    """
    config = SimpleNamespace(**read_json(runs[0] / "run.json")["config"])
    _, sets = make_data(config)
    stored = [read_attention(run) for run in runs]
    if len({tuple(tensors) for tensors in stored}) > 1:
        raise UserError(f"{', '.join(map(str, runs))}: were evaluated on different grids and cannot stand side by side")
    places = [(name, row) for name in stored[0] for row in range(2)]
    shape = 1 + len(runs), len(places)
    figure, axes = plt.subplots(*shape, figsize=(2.3 * shape[1], 2.4 * shape[0]), layout="constrained")
    for panels, (name, row) in zip(axes.T, places, strict=True):
        example = sets[name].get(0, row)
        panels[0].set_title(example.prefix.removeprefix("answer en "), fontsize=9)
        for panel in panels:
            panel.imshow(example.images[0], alpha=1.0 if panel is panels[0] else 0.5)
            panel.axis("off")
            outline(panel, example.suffix, sets[name].cell, "#35d04b")
    for panels, run, tensors in zip(axes[1:], runs, stored, strict=True):
        maps = [square(tensors[name][:, row, token]) for name, row in places]
        shares = []
        for name, row in places:
            place = [int(n) - 1 for n in sets[name].get(0, row).suffix.split(", ")]
            shares.append(needle_share(tensors[name][:, row, token], place, 1, sets[name].grids[0]))
        layer = int(torch.stack(shares).mean(0).argmax())
        arm = read_json(run / "run.json")["arm"]
        for panel, m, share in zip(panels, maps, shares, strict=True):
            side = panel.get_images()[0].get_array().shape[0]
            paid = m[layer].clamp(min=0)
            panel.imshow(paid, cmap="inferno", alpha=0.65, extent=(0, side, side, 0), interpolation="bicubic")
            panel.set_title(f"{arm}, layer {layer}: {share[layer]:.0%} on the needle", fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def read_attention(run: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(run / "attention.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{run / 'attention.safetensors'}: not readable: finish the run, on haystacks, first"
        ) from error


def square(maps: torch.Tensor) -> torch.Tensor:
    """[layers, N] -> [layers, side, side]."""
    side = math.isqrt(maps.shape[-1])
    return maps.unflatten(-1, (side, side))


# ---- evaluations
def draw_haystacks(scores: dict[str, dict], folder: Path):
    """cells.png, exact answers by the needle's cell; with several pictures depths.png, by the needle's picture."""
    found = {name: told["positive"] for name, told in scores.items() if "positive" in told}
    if not found:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        draw_cells(found, folder / "cells.png")
        deep = {name: told for name, told in found.items() if len(told["depths"]) > 1}
        if deep:
            draw_depths(deep, folder / "depths.png")


def draw_cells(found: dict[str, dict], path: Path):
    """One map a setting: a square for every cell of the grid, in it the percentage of its needles that were found."""
    columns = min(4, len(found))
    rows = math.ceil(len(found) / columns)
    size = (3.1 * columns + 0.7, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat[len(found) :]:
        panel.axis("off")
    for panel, (name, told) in zip(axes.flat, found.items(), strict=False):
        side = math.isqrt(len(told["cells"]))
        rates = torch.tensor([cell["rate"] if cell["n"] else math.nan for cell in told["cells"]]).view(side, side)
        image = heat_map(panel, rates)
        panel.set(xlabel="column", ylabel="row", title=f"{name}, n = {told['n']:,}")
    figure.colorbar(image, ax=axes, label="exact answers", format=matplotlib.ticker.PercentFormatter(1.0))
    figure.savefig(path)
    plt.close(figure)


def draw_depths(found: dict[str, dict], path: Path):
    """Which of the pictures holds the needle, downwards, against the setting, to the right."""
    deepest = max(len(told["depths"]) for told in found.values())
    rates = torch.full((deepest, len(found)), math.nan)
    for at, told in enumerate(found.values()):
        for depth, entry in enumerate(told["depths"]):
            rates[depth, at] = math.nan if entry["rate"] is None else entry["rate"]
    figure, panel = plt.subplots(figsize=(1.6 + 1.0 * len(found), 1.2 + 0.34 * deepest), layout="constrained")
    image = heat_map(panel, rates)
    panel.set(xlabel="pictures x cells", ylabel="needle in picture")
    panel.set_xticks(range(len(found)), list(found))
    figure.colorbar(image, ax=panel, label="exact answers", format=matplotlib.ticker.PercentFormatter(1.0))
    figure.savefig(path)
    plt.close(figure)


def heat_map(panel, rates: torch.Tensor):
    """Rates [rows, columns] in the benchmark's colours from 0 to 1, numbers in the cells, grey where there is none."""
    image = panel.imshow(rates.numpy(), cmap=NEEDLE_COLOURS, vmin=0, vmax=1, aspect="auto")
    size = 10 if max(rates.shape) <= 4 else 7
    for (row, column), value in zip(np.ndindex(*rates.shape), rates.flatten().tolist(), strict=True):
        told = "-" if math.isnan(value) else f"{100 * value:.0f}"
        panel.text(column, row, told, ha="center", va="center", fontsize=size, color="black")
    panel.set_yticks(range(rates.shape[0]), range(1, rates.shape[0] + 1))
    panel.set_xticks(range(rates.shape[1]), range(1, rates.shape[1] + 1))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return image


def draw_side_by_side(by_name: dict[str, dict], path: Path, what: str):
    """Exact answers, and existence where the caption is absent, by setting for several models: 95 % Wilson intervals,
    dashes at what a uniform guess reaches. `what` was asked stands above."""
    kinds = {
        "positive": ("exact", "caption present, exact answers"),
        "negative": ("existence", "caption absent, said so"),
    }
    first = next(iter(by_name.values()))
    settings = [name for name in first if name != "attention"]
    shown = [kind for kind in kinds if any(kind in first[setting] for setting in settings)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        width = (1.4 + 1.1 * len(settings)) * len(shown) + 1.5
        figure, axes = plt.subplots(
            1, len(shown), figsize=(width, 3.4), layout="constrained", squeeze=False, sharey=True
        )
        for panel, kind in zip(axes[0], shown, strict=True):
            metric, title = kinds[kind]
            draw_rates(
                panel,
                {name: [scores[s].get(kind, {}).get(metric) for s in settings] for name, scores in by_name.items()},
            )
            if kind == "positive":
                chance = [first[setting]["baselines"]["uniform"]["exact"] for setting in settings]
                span = [s - 0.38 for s in range(len(settings))], [s + 0.38 for s in range(len(settings))]
                panel.hlines(chance, *span, colors="0.4", linestyles="dashed", linewidth=1, label="uniform guess")
            counts = sorted({first[s][kind]["n"] for s in settings if kind in first[s]})
            panel.set_title(f"{title} (n = {', '.join(f'{n:,}' for n in counts)})", fontsize=9)
            panel.set(xlabel="pictures x cells", xlim=(-0.5, len(settings) - 0.5), ylim=(-0.02, 1.02))
            panel.set_xticks(range(len(settings)), settings)
            panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        figure.suptitle(what, fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
        figure.savefig(path)
        plt.close(figure)


def draw_rates(panel, by_name: dict[str, list[dict | None]]):
    """A point with its interval for every rate, models beside each other at every place; None where there is none."""
    step = min(0.16, 0.7 / len(by_name))
    for at, (name, rates) in enumerate(by_name.items()):
        told = [(place, rate) for place, rate in enumerate(rates) if rate]
        panel.errorbar(
            [place + step * (at - (len(by_name) - 1) / 2) for place, _ in told],
            [rate["rate"] for _, rate in told],
            yerr=np.array([[rate["rate"] - rate["low"], rate["high"] - rate["rate"]] for _, rate in told]).T,
            color=COLOURS[at % len(COLOURS)],
            fmt="o",
            markersize=5,
            capsize=3,
            label=name,
        )


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders; with several, their attention side by side as well
    token: int = 0  # which token of the answer pays the attention


@one_line_errors
def main():
    config = tyro.cli(Config)
    runs = [Path(run) for run in config.runs]
    for run in runs:
        draw_run(run)
        print(run / "plots")
    if len(runs) > 1:
        with plt.rc_context(STYLE):
            draw_attention(runs, runs[-1] / "plots" / "attention.png", config.token)


if __name__ == "__main__":
    main()
