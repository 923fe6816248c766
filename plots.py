"""Every figure, drawn from the files of run folders alone.

python plots.py runs/original_seed0        # plots/loss.png and plots/accuracy.png of a run
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import tyro
from matplotlib.patches import Rectangle

from checkpoint import read_json
from data import make_data
from errors import UserError, one_line_errors
from haystack import normalise, wilson

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


def read_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): give a run folder") from error


def draw_run(folder: str | Path):
    """Loss, held-out accuracy and sample answers of one run, into its plots/ folder."""
    folder = Path(folder)
    lines, samples = (read_lines(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
    config = SimpleNamespace(**read_json(folder / "run.json")["config"])
    (folder / "plots").mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        draw_loss([line for line in lines if "loss" in line], folder / "plots" / "loss.png")
        draw_accuracy([line for line in lines if "eval" in line], folder / "plots" / "accuracy.png")
        if config.data == "haystack":
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
