"""The figures of the study, drawn from the plan and the committed records."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from needle_eval.plots import CHANCE, STYLE, make_panels, percent_formatter, save
from needle_eval.statistics import mean_over_seeds
from study_records import SYMBOLIC_THRESHOLD, Record, endpoint_conditions, points
from study_report import (
    MARGIN,
    Group,
    condition_order,
    contrast,
    core_arms,
    core_contrasts,
    group_records,
    knocked_out,
    needle_share,
    planned_symbolic,
    secondary_contrasts,
)

# the colour-blind safe palette of Okabe and Ito, with a marker for each arm
ARM_STYLES = {
    "standard": ("#000000", "o"),
    "split": ("#0072B2", "s"),
    "additive": ("#E69F00", "^"),
    "flipped": ("#D55E00", "v"),
    "v1": ("#0072B2", "s"),
    "double_width": ("#E69F00", "^"),
    "double_width_norm": ("#D55E00", "v"),
    "v2": ("#009E73", "D"),
}
OTHER_STYLE = ("#009E73", "D")
LABELS = {
    "double_width": "double width",
    "double_width_norm": "double width, norm",
    "v1": "V1",
    "v2": "V2",
}
SURVIVAL_ARMS = ("standard", "v1", "double_width_norm")
PANEL_SIZE = (4.5, 3.8)  # inches
ROW_HEIGHT = 0.7  # of a condition, where rows are 1 apart
NOTE = dict(ha="center", va="center", color="0.5", fontsize=9, wrap=True)
FIGURE_STYLE = STYLE | {"figure.dpi": 200, "axes.titlesize": 10, "axes.titleweight": "bold",
                        "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 8}  # fmt: skip


def arm_style(arm: str) -> dict[str, str]:
    """Colour and marker of an arm."""
    colour, marker = ARM_STYLES.get(arm, OTHER_STYLE)
    return dict(color=colour, marker=marker)


def first_group(plan: dict[str, dict[str, Any]], study: str, records: Sequence[Record]) -> Group | None:
    """The runs of a study in its planned environment; None if there are none."""
    groups = group_records(plan[study], study, records) if study in plan else []
    return groups[0] if groups else None


def draw_forest(panel: Axes, group: Group) -> None:
    """A row for each arm against standard: dots are seeds, the bar is the 95 % interval; open diamonds: against
    additive."""
    measure = partial(points, conditions=endpoint_conditions(group.section))
    found = {c.arm: c for c in (core_contrasts(group)[0], *secondary_contrasts(group))}
    arms = [arm for arm in group.arms() if arm in found]
    panel.axvspan(-MARGIN, MARGIN, color="0.93", zorder=0)
    panel.axvline(0, color="0.4", linewidth=1, zorder=1)
    for row, arm in enumerate(arms):
        t, colour = found[arm].t, arm_style(arm)["color"]
        panel.plot(found[arm].differences, np.full(t["n"], row + 0.2), ".", color=colour, alpha=0.35, markersize=5)
        panel.plot([t["low"], t["high"]], [row, row], color=colour, linewidth=2.2, solid_capstyle="butt")
        panel.plot(t["mean"], row, **arm_style(arm), markersize=6)
        against = contrast(group, arm, "additive", measure) if arm != "additive" else None
        if against:
            t = against.t
            panel.plot([t["low"], t["high"]], [row - 0.22] * 2, color="0.55", linewidth=1)
            panel.plot(t["mean"], row - 0.22, "d", color="0.45", markerfacecolor="white", markersize=4.5)
    families = [group.section["arms"][arm]["family"] for arm in arms]
    for row in range(1, len(arms)):
        if families[row] != families[row - 1]:
            panel.axhline(row - 0.5, color="0.8", linewidth=0.8)
    panel.set_yticks(range(len(arms)), arms)
    panel.set(ylim=(len(arms) - 0.4, -0.6))
    panel.set_xlabel(
        f"difference in points, 95 % intervals; dots: seeds\nopen diamonds: against additive; band: ±{MARGIN:g}"
    )
    panel.grid(axis="y", visible=False)


def draw_conditions(panel: Axes, group: Group) -> None:
    """A row for each condition with the needle: mean accuracy of the core arms, with the 95 % interval over seeds."""
    records = [record for arm in core_arms(group.section) for record in group.of_arm(arm).values()]
    asked = set.intersection(*(set(record.answers) for record in records))
    conditions = sorted((c for c in asked if not c.endswith(" absent")), key=condition_order)
    arms = core_arms(group.section)
    for number, arm in enumerate(arms):
        rows = np.arange(len(conditions)) + ROW_HEIGHT * ((number + 0.5) / len(arms) - 0.5)
        over = [
            mean_over_seeds([record.answers[c].rate() for record in group.of_arm(arm).values()]) for c in conditions
        ]
        panel.hlines(
            rows, [o["low"] for o in over], [o["high"] for o in over], color=arm_style(arm)["color"], linewidth=1.6
        )
        panel.plot([o["mean"] for o in over], rows, **arm_style(arm), markersize=4.5, linestyle="none", label=arm)
    chance = [1 / condition_order(condition)[0] for condition in conditions]
    panel.vlines(chance, *(np.arange(len(conditions)) + side * ROW_HEIGHT / 2 for side in (-1, 1)), **CHANCE)
    panel.set_yticks(range(len(conditions)), conditions)
    for label, condition in zip(panel.get_yticklabels(), conditions, strict=True):
        label.set_fontweight("bold" if condition in endpoint_conditions(group.section) else "normal")
    panel.set(ylim=(len(conditions) - 0.4, -0.6), xlim=(-0.02, 1.02))
    panel.set_xlabel("exact answers, 95 % intervals over seeds\nbold: endpoint N; dashed: chance")
    panel.xaxis.set_major_formatter(percent_formatter())
    panel.grid(axis="y", visible=False)
    panel.legend(loc="best")


def draw_survival(panel: Axes, group: Group) -> None:
    """Share of the runs still below 75 % accuracy, by steps; a line style for each number of pairs."""
    numbers = sorted({record.pairs for record in group.records})
    for pairs, style in zip(numbers, ("solid", "dashed", "dotted"), strict=False):
        for arm in SURVIVAL_ARMS:
            records = list(group.with_pairs(pairs).of_arm(arm).values())
            steps = stats.CensoredData.right_censored([r.steps for r in records], [r.censored for r in records])
            curve = stats.ecdf(steps).sf
            label = LABELS.get(arm, arm) if pairs == numbers[0] else None
            panel.step([1, *curve.quantiles], [1, *curve.probabilities], where="post", color=arm_style(arm)["color"],
                       linestyle=style, linewidth=1.6, label=label)  # fmt: skip
        panel.plot([], [], color="0.4", linestyle=style, linewidth=1.6, label=f"{pairs} pairs")
    steps = [record.steps for record in group.records if record.arm in SURVIVAL_ARMS]
    panel.set_xscale("log")
    panel.set(xlabel="steps", xlim=(min(steps) / 3, max(steps) * 1.1))
    panel.set(ylabel=f"runs below {SYMBOLIC_THRESHOLD:.0%} accuracy", ylim=(-0.02, 1.04))
    panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    panel.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    panel.yaxis.set_major_formatter(percent_formatter())
    panel.legend(loc="lower left")


def draw_share(panel: Axes, group: Group) -> None:
    """Accuracy against attention on the needle, a point for each seed of the core arms; an open marker below it shows
    the accuracy without the second map."""
    conditions, layer = endpoint_conditions(group.section), group.section.get("attention_layer")
    runs = [(arm, record) for arm in core_arms(group.section) for record in group.of_arm(arm).values()]
    runs = [(arm, record) for arm, record in runs if needle_share(record, layer) is not None]
    for arm in dict.fromkeys(arm for arm, _ in runs):
        found = [record for name, record in runs if name == arm]
        shares = [needle_share(record, layer) / 100 for record in found]
        rates = [points(record, conditions) / 100 for record in found]
        panel.plot(shares, rates, **arm_style(arm), markersize=5, alpha=0.8, linestyle="none", label=arm)
        for x, y, record in zip(shares, rates, found, strict=True):
            if (without := knocked_out(record, conditions)) is not None:
                panel.plot([x, x], [y, without / 100], color=arm_style(arm)["color"], alpha=0.25, linewidth=0.8)
                panel.plot(x, without / 100, **arm_style(arm), markersize=4, alpha=0.8, markerfacecolor="white")
    panel.set_xlabel(
        f"attention on the needle in layer {layer}; points: seeds\nopen: the same run, second map switched off"
    )
    panel.set_ylabel("endpoint N")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(matplotlib.ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(percent_formatter(decimals=0))
    panel.legend()


PANELS = (  # study, title, function that draws it
    ("A", "Pretrained: needles found, against standard", draw_forest),
    ("A", "Accuracy by cells and difficulty", draw_conditions),
    ("B1", "From scratch: runs that do not yet retrieve", draw_survival),
    ("A", "Attention on the needle and accuracy", draw_share),
)
SUMMARY_PANELS = (PANELS[0], PANELS[2])


def draw_figures(plan: dict[str, dict[str, Any]], records: Sequence[Record], folder: Path) -> None:
    """Draw studies A and B1: figure.png with every panel and summary.png with the main result of each.

    A study with unfinished runs has no panel, and replications are not drawn. The same records and versions give the
    same bytes.
    """
    groups = {study: first_group(plan, study, records) for study in ("A", "B1")}
    if groups["A"] and groups["A"].missing(core_arms(groups["A"].section)):
        groups["A"] = None
    if groups["B1"] and len(groups["B1"].records) < planned_symbolic(groups["B1"].section):
        groups["B1"] = None
    for name, panels in (("figure.png", PANELS), ("summary.png", SUMMARY_PANELS)):
        draw_panels([(title, draw, groups[study]) for study, title, draw in panels if groups[study]], folder / name)


def draw_panels(panels: Sequence[tuple[str, Callable[[Axes, Group], None], Group]], path: Path) -> None:
    """Draw (title, function, runs) for each panel, two in a row, as a PNG."""
    with plt.rc_context(FIGURE_STYLE):
        figure, axes = make_panels(max(1, len(panels)), *PANEL_SIZE, columns=2)
        for letter, panel, (title, draw, group) in zip("abcd", axes, panels, strict=False):
            panel.set_title(f"{letter}  {title}" if len(panels) > 1 else title)
            draw(panel, group)
        if not panels:
            axes[0].text(0.5, 0.5, "no study is finished", transform=axes[0].transAxes, **NOTE)
        save(figure, path)
