"""Figures of an evaluation, drawn from its scores."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from files import atomic_file, writing

matplotlib.use("Agg")  # files only, without a display

STYLE = {
    "figure.figsize": (6, 3.6),
    "figure.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 9,
}
# the colour-blind safe palette of Okabe and Ito, each colour with its own marker
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["s", "^", "D", "v", "P", "X", "o"]
# a new formatter for each axis, since it sets its decimals from its axis
percent_formatter = partial(matplotlib.ticker.PercentFormatter, 1.0)
RATE_COLOURS = matplotlib.colormaps["cividis"].with_extremes(bad="0.85")
DARK = 0.45  # cells with rates below it are dark, so their text is white
CHANCE = dict(color="0.4", linestyle="dashed", linewidth=1)  # style of lines at the rate of a uniform guess
MIN_ANSWERS = 5  # answers needed for a point in a calibration figure
TITLE_WIDTH = 48  # characters on a line of a panel's title
COLUMNS = 4  # panels per row


def arm_styles(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of every arm: black circles for the first one, the baseline. Where the colours of the others
    repeat, their markers differ."""
    styles = {}
    for number, name in enumerate(names):
        again, place = divmod(number - 1, len(COLOURS) - 1) if number else (0, -1)
        marker = MARKERS[(place + again) % (len(MARKERS) - 1)] if number else MARKERS[-1]
        styles[name] = dict(color=COLOURS[place], marker=marker)
    return styles


def make_panels(
    count: int, width: float, height: float, columns: int = COLUMNS, **options
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, each of this size in inches, row by row, at most `columns` per row."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = width * columns, height * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for panel in axes.flat[count:]:
        panel.axis("off")
    return figure, list(axes.flat[:count])


def save(figure: Figure, path: Path):
    """Write a figure as PNG, completely or not at all, and close it."""
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            # by default matplotlib writes its version into the file
            figure.savefig(temporary, format="png", metadata={"Software": None})
    finally:
        plt.close(figure)


def draw_haystacks(scores: dict[str, dict], folder: Path, title: str):
    """Draw cells.png, the share of needles found by cell, and with several images depths.png, by image."""
    positives = {name: found["positive"] for name, found in scores.items() if "positive" in found}
    if not positives:
        return
    with plt.rc_context(STYLE | {"axes.grid": False}):
        draw_cells(positives, folder / "cells.png", title)
        deep = {name: found for name, found in positives.items() if len(found["depths"]) > 1}
        if deep:
            draw_depths(deep, folder / "depths.png", title)


def draw_cells(positives: dict[str, dict], path: Path, title: str):
    """One map per setting, with a square for every cell of the grid that shows the percentage of its needles found."""
    figure, panels = make_panels(len(positives), 3.1, 3.1)
    for panel, (name, found) in zip(panels, positives.items(), strict=True):
        side = math.isqrt(len(found["cells"]))
        rates = np.array([cell["rate"] if cell["n"] else math.nan for cell in found["cells"]]).reshape(side, side)
        image = draw_heat_map(panel, rates)
        panel.set(xlabel="column", ylabel="row")
        panel.set_title(cells_title(name, found), fontsize=9)
    bar = figure.colorbar(image, ax=panels, label=needles_label(positives), format=percent_formatter())
    bar.outline.set_visible(False)
    figure.suptitle(wrap_title(title, 38 * min(COLUMNS, len(positives))), fontsize=9)
    save(figure, path)


def wrap_title(text: str, width: int = TITLE_WIDTH) -> str:
    """A title, wrapped to lines of at most `width` characters; long names are split. A $ is a dollar, not the start of
    a formula."""
    return textwrap.fill(text, width).replace("$", r"\$")


def cells_title(name: str, found: dict) -> str:
    """The setting, and how many needles its map counts, which is more than the questions where they have several."""
    needles = sum(cell["n"] for cell in found["cells"])
    more = f"{needles:,} needles in {found['n']:,} questions"
    return f"{name}\n" + (more if needles > found["n"] else f"n = {needles:,}")


def needles_label(positives: dict[str, dict]) -> str:
    """What the maps show: exact answers for one needle per question, single needles for several."""
    several = any("individual exact" in found for found in positives.values())
    return "needles found, each counted for itself" if several else "exact answers"


def draw_depths(positives: dict[str, dict], path: Path, title: str):
    """Draw rates with the image that holds the needle on the vertical axis and the setting on the horizontal one."""
    deepest = max(len(found["depths"]) for found in positives.values())
    rates = np.full((deepest, len(positives)), math.nan)
    for column, found in enumerate(positives.values()):
        for depth, entry in enumerate(found["depths"]):
            rates[depth, column] = math.nan if entry["rate"] is None else entry["rate"]
    size = (1.9 + 1.0 * len(positives), max(3.4, 1.6 + 0.34 * deepest))
    figure, panel = plt.subplots(figsize=size, layout="constrained")
    image = draw_heat_map(panel, rates)
    panel.set(xlabel="images x cells", ylabel="needle in image")
    panel.set_xticks(range(len(positives)), list(positives))
    bar = figure.colorbar(image, ax=panel, label=needles_label(positives), format=percent_formatter())
    bar.outline.set_visible(False)
    figure.suptitle(wrap_title(title, round(12 * size[0])), fontsize=9)
    save(figure, path)


def draw_heat_map(panel: Axes, rates: np.ndarray) -> AxesImage:
    """Rates [rows, columns] as colours from 0 to 1, with percentages in the cells; cells without a rate are grey."""
    image = panel.imshow(rates, cmap=RATE_COLOURS, vmin=0, vmax=1, aspect="auto")
    size = 10 if max(rates.shape) <= 4 else 7
    for (row, column), value in np.ndenumerate(rates):
        text = "-" if math.isnan(value) else f"{100 * value:.0f}"
        colour = "white" if value < DARK else "black"
        panel.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    panel.set_yticks(range(rates.shape[0]), range(1, rates.shape[0] + 1))
    panel.set_xticks(range(rates.shape[1]), range(1, rates.shape[1] + 1))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return image


def draw_side_by_side(scores_by_model: dict[str, dict], path: Path, title: str):
    """Exact answers, and existence where the caption is absent, by setting for several models, with 95 % Wilson
    intervals and dashed lines at the rate of a uniform guess."""
    kinds = {
        "positive": ("exact", "caption present, exact answers"),
        "negative": ("existence", "caption absent, said so"),
    }
    first = next(iter(scores_by_model.values()))
    settings = [name for name, found in first.items() if "baselines" in found]
    shown = [kind for kind in kinds if any(kind in first[setting] for setting in settings)]
    if not shown:  # no answer is scored
        return
    with plt.rc_context(STYLE):
        width = (1.4 + 1.1 * len(settings)) * len(shown) + 1.5
        figure, axes = plt.subplots(
            1, len(shown), figsize=(width, 3.4), layout="constrained", squeeze=False, sharey=True
        )
        for panel, kind in zip(axes[0], shown, strict=True):
            metric, panel_title = kinds[kind]
            draw_rates(
                panel,
                {
                    name: [scores.get(s, {}).get(kind, {}).get(metric) for s in settings]
                    for name, scores in scores_by_model.items()
                },
            )
            if kind == "positive":
                chance = [first[s]["baselines"].get("uniform", {}).get("exact", math.nan) for s in settings]
                span = [s - 0.38 for s in range(len(settings))], [s + 0.38 for s in range(len(settings))]
                panel.hlines(chance, *span, **CHANCE, label="uniform guess")
            counts = sorted({first[s][kind]["n"] for s in settings if kind in first[s]})
            panel.set_title(f"{panel_title}\nn = {', '.join(f'{n:,}' for n in counts)}", fontsize=9)
            panel.set(xlabel="images x cells", xlim=(-0.5, len(settings) - 0.5), ylim=(-0.02, 1.02))
            panel.set_xticks(range(len(settings)), settings)
            panel.yaxis.set_major_formatter(percent_formatter())
        finish(figure, axes[0, 0], title, round(13 * width))
        save(figure, path)


def draw_rates(panel: Axes, rates_by_model: dict[str, list[dict | None]]):
    """A point with its interval for every rate, models side by side at every place; no point where a rate is None."""
    step = min(0.16, 0.7 / len(rates_by_model))
    for number, (name, rates) in enumerate(rates_by_model.items()):
        shown = [(place, rate) for place, rate in enumerate(rates) if rate]
        panel.errorbar(
            [place + step * (number - (len(rates_by_model) - 1) / 2) for place, _ in shown],
            [rate["rate"] for _, rate in shown],
            yerr=np.array([[rate["rate"] - rate["low"], rate["high"] - rate["rate"]] for _, rate in shown]).T,
            color=COLOURS[number % len(COLOURS)],
            fmt=MARKERS[number % len(MARKERS)],
            markersize=5,
            capsize=3,
            label=name,
        )


# ---- figures of several runs
class Difference(NamedTuple):
    """A row of a forest plot, in percentage points; `low` and `high` are None if no interval is known."""

    label: str
    mean: float
    low: float | None
    high: float | None


def draw_forest(groups: dict[str, tuple[list[Difference], Difference]], colour: str, title: str, axis: str) -> Figure:
    """A panel for each group: a row per seed with the interval over its questions, then the mean of several seeds."""
    longest = max(len(seeds) + (len(seeds) > 1) for seeds, _ in groups.values())
    figure, panels = make_panels(len(groups), 2.7, 1.0 + 0.24 * longest, columns=3, sharex=True)
    for panel, (name, (seeds, pooled)) in zip(panels, groups.items(), strict=True):
        panel.axvline(0, color="0.3", linewidth=1, zorder=1)
        rows = [*seeds, pooled] if len(seeds) > 1 else seeds
        for row, found in enumerate(rows):
            is_pooled = found is pooled
            width, marker, size = (2.6, "D", 7) if is_pooled else (1.2, "o", 4)
            shade = colour if is_pooled else "0.45"
            if found.low is not None:
                panel.plot([found.low, found.high], [row, row], color=shade, linewidth=width, solid_capstyle="butt")
            panel.plot(found.mean, row, marker, color=shade, markersize=size)
        if len(seeds) > 1:
            panel.axhspan(len(seeds) - 0.5, len(seeds) + 0.5, color="0.95", zorder=0)
        panel.set_yticks(range(len(rows)), [found.label for found in rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(labelbottom=True)
        panel.grid(axis="y", visible=False)
        panel.set_title(wrap_title(name, 36), fontsize=9)
    figure.suptitle(wrap_title(title, 40 * min(3, len(groups))), fontsize=10)
    figure.supxlabel(wrap_title(axis, 40 * min(3, len(groups))), fontsize=9)
    return figure


def draw_confusion(shares: dict[str, np.ndarray], grid: int, title: str) -> Figure:
    """A panel for each arm: the confusion matrix [truth, answer] as shares of the answers to each truth. Cells come
    row by row, then absent needles and "-1"; the last column counts all other answers."""
    cells = [f"{row},{column}" for row in range(1, grid + 1) for column in range(1, grid + 1)]
    side = 3.9 if grid > 2 else 3.1
    figure, panels = make_panels(len(shares), side, side * 0.95, columns=3)
    for panel, (arm, matrix) in zip(panels, shares.items(), strict=True):
        image = panel.imshow(matrix, cmap=RATE_COLOURS, vmin=0, vmax=1)
        every = 1 if grid <= 4 else grid  # ticks at the first cell of each row
        for axis, labels in ((panel.xaxis, [*cells, "absent", "other"]), (panel.yaxis, [*cells, "absent"])):
            places = [i for i in range(len(labels)) if i >= grid**2 or i % every == 0]
            axis.set_ticks(places, [labels[i] for i in places], fontsize=8 if grid <= 2 else 7)
        panel.tick_params(axis="x", rotation=90)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.grid(visible=False)
        for (row, column), value in np.ndenumerate(matrix):
            if grid <= 2 and not math.isnan(value):
                colour = "white" if value < DARK else "black"
                panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        for place in range(grid, grid**2 + 1, grid):  # rows of the grid
            panel.axhline(place - 0.5, color="white", linewidth=0.8)
            panel.axvline(place - 0.5, color="white", linewidth=0.8)
        panel.set(xlabel="answered cell (row,column)", ylabel="needle's cell")
        panel.set_title(arm, fontsize=9)
    bar = figure.colorbar(image, ax=panels, label="share of the answers", format=percent_formatter(), shrink=0.8)
    bar.outline.set_visible(False)
    figure.suptitle(wrap_title(title, 40 * min(3, len(shares))), fontsize=10)
    return figure


def draw_calibration(bins: dict[str, list[list[dict]]], style: dict[str, dict[str, str]], title: str) -> Figure:
    """Share of right answers against confidence, one line for every seed of an arm, and the number of answers per bin.

    Bins with fewer than `MIN_ANSWERS` answers have no point. `bins` are those of `statistics.confidence_bins`, by arm
    and seed.
    """
    figure, (panel, counts) = plt.subplots(
        2, 1, figsize=(5.6, 4.8), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    panel.plot([0, 1], [0, 1], color="0.4", linestyle="dashed", linewidth=1, label="calibrated")
    for number, arm in enumerate(bins):
        look = style[arm]
        for i, of_seed in enumerate(bins[arm]):
            shown = [found for found in of_seed if found["n"] >= MIN_ANSWERS]
            points = [found["confidence"] for found in shown], [found["rate"] for found in shown]
            panel.plot(*points, **look, linewidth=1.2, markersize=4, alpha=0.8, label=arm if i == 0 else None)
        edges = np.linspace(0, 1, len(bins[arm][0]) + 1)
        mean = np.mean([[found["n"] for found in of_seed] for of_seed in bins[arm]], axis=0)
        width = (edges[1] - edges[0]) * 0.8 / len(bins)
        counts.bar(edges[:-1] + edges[1] * 0.1 + width * (number + 0.5), mean, width, color=look["color"])
    panel.set(ylabel="right answers", ylim=(-0.02, 1.02), xlim=(0, 1))
    counts.set(xlabel="confidence", ylabel="answers per seed")
    panel.yaxis.set_major_formatter(percent_formatter())
    counts.xaxis.set_major_formatter(percent_formatter())
    panel.legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle(wrap_title(title, 70), fontsize=10)
    return figure


def draw_needle_share(
    shares: dict[str, dict[str, list[Sequence[float]]]],
    even: dict[str, float],
    style: dict[str, dict[str, str]],
    title: str,
) -> Figure:
    """A panel for each setting: the needle's share of the attention by layer, mean and band over the seeds of an arm.
    The dashed line is the share under uniform attention."""
    figure, panels = make_panels(len(shares), 3.0, 2.7, sharey=True)
    for panel, (setting, of_setting) in zip(panels, shares.items(), strict=True):
        panel.axhline(even[setting], **CHANCE, label="even attention")
        for arm, of_seeds in of_setting.items():
            draw_seeds(panel, [Curve(range(len(share)), share) for share in of_seeds], style[arm], arm)
        panel.set_title(wrap_title(setting, 30), fontsize=9)
        panel.set(xlabel="decoder layer")
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(percent_formatter())
        panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    panels[0].set_ylabel("on the needle")
    finish(figure, panels[0], title, 38 * min(COLUMNS, len(shares)))
    return figure


class Curve(NamedTuple):
    """A quantity of one run; unfinished runs are drawn separately."""

    x: Sequence[float]
    y: Sequence[float]
    is_finished: bool = True


def draw_seeds(panel: Axes, curves: Sequence[Curve], look: dict[str, str], label: str):
    """The mean of the finished runs at the x that all of them have, and a band from the lowest to the highest run.

    An unfinished run is a thin dotted line.
    """
    for number, curve in enumerate(curve for curve in curves if not curve.is_finished):
        name = f"{label}, unfinished" if number == 0 else None
        panel.plot(curve.x, curve.y, color=look["color"], linestyle="dotted", linewidth=1.2, label=name)
    points = [dict(zip(curve.x, curve.y, strict=True)) for curve in curves if curve.is_finished]
    if not points:
        return
    shared = sorted(set.intersection(*map(set, points)))
    values = np.array([[curve[x] for x in shared] for curve in points])  # [seeds, x]
    label = f"{label} ({len(points)} seeds)" if len(points) > 1 else label
    panel.plot(shared, values.mean(0), **look, markersize=3.5, linewidth=1.6, label=label)
    if len(points) > 1:
        panel.fill_between(shared, values.min(0), values.max(0), color=look["color"], alpha=0.18, linewidth=0)


def finish(figure: Figure, panel: Axes, title: str, width: int):
    """Add the figure's title, and one legend below all panels with the entries of `panel`."""
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, min(len(labels), width // (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside lower center", ncols=columns)
    figure.suptitle(wrap_title(title, width), fontsize=10)
