"""Every figure, drawn from the files of run folders alone.

python plots.py runs/original_seed0        # plots/loss.png and plots/accuracy.png of a run
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import safetensors
import safetensors.torch
import torch
import tyro
from matplotlib.patches import Rectangle

from data import make_data
from diagnostics import needle_share
from errors import UserError, one_line_errors
from files import read_json, read_json_lines
from needle_eval.plots import COLOURS, STYLE
from needle_eval.questions import normalise
from needle_eval.statistics import wilson

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  the backend comes first


def draw_run(folder: str | Path):
    """Loss, held-out accuracy, lambda and sample answers of one run, into its plots/ folder."""
    folder = Path(folder)
    lines, samples = (read_json_lines(folder / f"{name}.jsonl") for name in ("metrics", "samples"))
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
