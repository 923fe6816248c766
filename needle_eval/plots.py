"""Figures of an evaluation, from its scores alone."""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from plots import COLOURS, STYLE

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first

NEEDLE_COLOURS = matplotlib.colors.LinearSegmentedColormap.from_list(
    "needle", ["#F0496E", "#EBB839", "#0CD79F"], bad="0.85"
)


def draw_haystacks(scores: dict[str, dict], folder: Path):
    """cells.png, exact answers by the needle's cell; with several images depths.png, by the needle's image."""
    positives = {name: found["positive"] for name, found in scores.items() if "positive" in found}
    if not positives:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        draw_cells(positives, folder / "cells.png")
        deep = {name: found for name, found in positives.items() if len(found["depths"]) > 1}
        if deep:
            draw_depths(deep, folder / "depths.png")


def draw_cells(positives: dict[str, dict], path: Path):
    """One map a setting: a square for every cell of the grid, in it the percentage of its needles that were found."""
    columns = min(4, len(positives))
    rows = math.ceil(len(positives) / columns)
    size = (3.1 * columns + 0.7, 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat[len(positives) :]:
        panel.axis("off")
    for panel, (name, found) in zip(axes.flat, positives.items(), strict=False):
        side = math.isqrt(len(found["cells"]))
        rates = np.array([cell["rate"] if cell["n"] else math.nan for cell in found["cells"]]).reshape(side, side)
        image = draw_heat_map(panel, rates)
        panel.set(xlabel="column", ylabel="row", title=f"{name}, n = {found['n']:,}")
    figure.colorbar(image, ax=axes, label="exact answers", format=matplotlib.ticker.PercentFormatter(1.0))
    figure.savefig(path)
    plt.close(figure)


def draw_depths(positives: dict[str, dict], path: Path):
    """Which of the images holds the needle, downwards, against the setting, to the right."""
    deepest = max(len(found["depths"]) for found in positives.values())
    rates = np.full((deepest, len(positives)), math.nan)
    for column, found in enumerate(positives.values()):
        for depth, entry in enumerate(found["depths"]):
            rates[depth, column] = math.nan if entry["rate"] is None else entry["rate"]
    figure, panel = plt.subplots(figsize=(1.6 + 1.0 * len(positives), 1.2 + 0.34 * deepest), layout="constrained")
    image = draw_heat_map(panel, rates)
    panel.set(xlabel="images x cells", ylabel="needle in image")
    panel.set_xticks(range(len(positives)), list(positives))
    figure.colorbar(image, ax=panel, label="exact answers", format=matplotlib.ticker.PercentFormatter(1.0))
    figure.savefig(path)
    plt.close(figure)


def draw_heat_map(panel: Axes, rates: np.ndarray) -> AxesImage:
    """Rates [rows, columns] in the benchmark's colours from 0 to 1, numbers in the cells, grey where there is none."""
    image = panel.imshow(rates, cmap=NEEDLE_COLOURS, vmin=0, vmax=1, aspect="auto")
    size = 10 if max(rates.shape) <= 4 else 7
    for (row, column), value in np.ndenumerate(rates):
        text = "-" if math.isnan(value) else f"{100 * value:.0f}"
        panel.text(column, row, text, ha="center", va="center", fontsize=size, color="black")
    panel.set_yticks(range(rates.shape[0]), range(1, rates.shape[0] + 1))
    panel.set_xticks(range(rates.shape[1]), range(1, rates.shape[1] + 1))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return image


def draw_side_by_side(scores_by_model: dict[str, dict], path: Path, title: str):
    """Exact answers, and existence where the caption is absent, by setting for several models: 95 % Wilson intervals,
    dashes at what a uniform guess reaches."""
    kinds = {
        "positive": ("exact", "caption present, exact answers"),
        "negative": ("existence", "caption absent, said so"),
    }
    first = next(iter(scores_by_model.values()))
    settings = [name for name, found in first.items() if "baselines" in found]
    shown = [kind for kind in kinds if any(kind in first[setting] for setting in settings)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        width = (1.4 + 1.1 * len(settings)) * len(shown) + 1.5
        figure, axes = plt.subplots(
            1, len(shown), figsize=(width, 3.4), layout="constrained", squeeze=False, sharey=True
        )
        for panel, kind in zip(axes[0], shown, strict=True):
            metric, panel_title = kinds[kind]
            draw_rates(
                panel,
                {n: [scores[s].get(kind, {}).get(metric) for s in settings] for n, scores in scores_by_model.items()},
            )
            if kind == "positive":
                chance = [first[setting]["baselines"]["uniform"]["exact"] for setting in settings]
                span = [s - 0.38 for s in range(len(settings))], [s + 0.38 for s in range(len(settings))]
                panel.hlines(chance, *span, colors="0.4", linestyles="dashed", linewidth=1, label="uniform guess")
            counts = sorted({first[s][kind]["n"] for s in settings if kind in first[s]})
            panel.set_title(f"{panel_title} (n = {', '.join(f'{n:,}' for n in counts)})", fontsize=9)
            panel.set(xlabel="images x cells", xlim=(-0.5, len(settings) - 0.5), ylim=(-0.02, 1.02))
            panel.set_xticks(range(len(settings)), settings)
            panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        figure.suptitle(title, fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
        figure.savefig(path)
        plt.close(figure)


def draw_rates(panel: Axes, rates_by_model: dict[str, list[dict | None]]):
    """A point with its interval for every rate, models beside each other at every place; None where there is none."""
    step = min(0.16, 0.7 / len(rates_by_model))
    for number, (name, rates) in enumerate(rates_by_model.items()):
        shown = [(place, rate) for place, rate in enumerate(rates) if rate]
        panel.errorbar(
            [place + step * (number - (len(rates_by_model) - 1) / 2) for place, _ in shown],
            [rate["rate"] for _, rate in shown],
            yerr=np.array([[rate["rate"] - rate["low"], rate["high"] - rate["rate"]] for _, rate in shown]).T,
            color=COLOURS[number % len(COLOURS)],
            fmt="o",
            markersize=5,
            capsize=3,
            label=name,
        )
