"""Every figure, drawn from the files of run folders alone.

python plots.py runs/original_seed0        # plots/loss.png and plots/accuracy.png of a run
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

from errors import UserError, one_line_errors
from haystack import wilson

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
COLOURS = ["#1f5aa6", "#d1495b", "#2e8b57", "#8a5fb0", "#c77d1a", "#4a4a4a"]


def read_metrics(folder: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: cannot be read ({error}): give a run folder") from error


def draw_run(folder: str | Path):
    """Loss and held-out accuracy of one run, into its plots/ folder."""
    folder = Path(folder)
    lines = read_metrics(folder)
    (folder / "plots").mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        draw_loss([line for line in lines if "loss" in line], folder / "plots" / "loss.png")
        draw_accuracy([line for line in lines if "eval" in line], folder / "plots" / "accuracy.png")


def draw_loss(lines: list[dict], path: Path):
    if not lines:
        return
    figure, axes = plt.subplots(layout="constrained")
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.3, linewidth=1)
    smooth, curve = losses[0], []
    for loss in losses:
        smooth = 0.8 * smooth + 0.2 * loss
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


@dataclass
class Config:
    run: tyro.conf.Positional[str]  # run folder


@one_line_errors
def main():
    folder = tyro.cli(Config).run
    draw_run(folder)
    print(f"{folder}/plots")


if __name__ == "__main__":
    main()
