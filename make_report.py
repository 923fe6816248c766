"""One-page report on runs: the result with its interval, curves, lambda, attention maps, confusions, failures.

    python make_report.py runs/original_seed0                      # one run
    python make_report.py runs/original_seed? runs/diff_seed?      # two arms over seeds
    python make_report.py runs/original_seed0 runs/diff_seed0 --output=report.html

The page is one HTML file that needs no server and no network. It is made from the files of the run folders and of the
evaluations in them, so run eval_mmnih.py on the runs first; no model is loaded. Unfinished runs are shown but do not
count.
"""

import base64
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image

import plots
from arms import (
    NOT_AN_ARM,
    Arms,
    Measured,
    Run,
    all_runs,
    answer,
    contrasts,
    finished,
    measure_evaluations,
    measure_training,
    read_answers,
    read_arms,
)
from config_fields import QUESTION_TASK
from diagnostics import SAVED_QUESTIONS
from errors import UserError, one_line_errors
from files import open_image, resolve_inside, write_text, writing
from needle_eval.mmneedle_build import CACHE
from needle_eval.mmneedle_prompts import ABSENT
from needle_eval.mmneedle_rules import parse_lenient
from needle_eval.plots import (
    STYLE,
    Curve,
    arm_styles,
    draw_calibration,
    draw_confusion,
    draw_forest,
    draw_needle_share,
)
from needle_eval.questions import normalise
from needle_eval.report import open_record, read_attention
from needle_eval.statistics import (
    MIN_SEEDS,
    calibration_error,
    confidence_bins,
    format_interval,
    format_p,
    holm,
    mean_over_seeds,
)
from run_folder import comparable

GALLERY_SIDE = 256  # maximum side of a gallery image, in pixels
SHOWN_FAILURES = 5  # of each kind
SHOWN_LETTERS = 160  # maximum number of characters shown of a prompt or a response
NONE = "-"


# ---- sections of the page
def section_runs(arms: Arms) -> list[str]:
    """A row for each run, and the hyperparameters in which arms differ."""
    rows = []
    for run in all_runs(arms):
        losses = [line["loss"] for line in run.metrics if line.get("loss") is not None]
        trained = sum(count for count, _ in run.record.get("parameters", {}).values())
        row = [run.arm, str(run.seed), str(run.folder)]
        row.append("finished" if run.is_finished else f"unfinished after {run.step} updates")
        row += [f"{losses[-1]:.4f}" if losses else NONE, f"{trained:,}" if trained else NONE]
        rows.append(row + [str(run.record.get(name) or NONE) for name in ("base_model", "device", "commit")])
    header = ["arm", "seed", "folder", "state", "last loss", "trained parameters", "base model", "device", "commit"]
    lines = table(header, rows)
    first, *others = (comparable(next(iter(of_arm.values())).record) for of_arm in arms.values())
    for arm, other in zip(list(arms)[1:], others, strict=True):
        names = [n for n in dict.fromkeys([*first, *other]) if n not in NOT_AN_ARM and first.get(n) != other.get(n)]
        names = [n for n in names if n != "arm" and not n.startswith("differential")]
        different = [f"{name} ({first.get(name)} and {other.get(name)})" for name in names]
        lines.append(paragraph(f"{next(iter(arms))} and {arm} differ in {', '.join(different) or 'attention alone'}."))
    return lines


def section_difference(measured: Measured, style: dict) -> list[str]:
    """Rates of every arm, then a forest plot and a table for each arm against the first one.

    If the headline has several groups, group "" stands for their mean.
    """
    groups = ["", *measured.groups] if len(measured.headline) > 1 else measured.groups
    titles = {group: title_of(group, measured) for group in groups}
    header = ["questions", "n", "chance, %", *(f"{arm}, % [95 %]" for arm in measured.rates)]
    lines = table(header, [[titles[group], *describe_group(measured, group)] for group in groups], "numbers")
    for found in contrasts(measured):
        shown = {titles[group]: (found.differences[group], found.pooled(group)) for group in groups}
        title = f"{found.arm} minus {found.baseline}"
        figure = draw_forest(shown, style[found.arm]["color"], title, "difference of right answers in points")
        asked = "score interval over its questions" if measured.folders else "no interval"
        text = f"One dot per seed ({asked})"
        if len(found.seeds) > 1:
            text += "; diamond: mean over the seeds"
            text += ", 95 % interval of the paired t test" if len(found.seeds) >= MIN_SEEDS else ""
        lines.append(show(figure, f"{title}, in points. {text}."))
        tests = {group: test for group in groups if (test := found.test(group))}
        headline = "" if "" in groups else measured.headline[0]
        others = [group for group in tests if group != headline]
        adjusted = dict(zip(others, holm([tests[group]["p"] for group in others]), strict=True))
        adjusted[headline] = found.holm_p
        if tests:
            rows = [
                [titles[group], format_interval(test), format_p(test["p"]), format_p(adjusted[group])]
                for group, test in tests.items()
            ]
            lines += table(["questions", f"{title}, points [95 %]", "p", "Holm p"], rows, "numbers")
            text = f'p: paired t test over seeds. Holm p: of "{titles[headline]}" adjusted for the number of arms'
            lines.append(paragraph(f"{text}, of the other rows for their number." if others else f"{text}."))
    return lines


def describe_group(measured: Measured, group: str) -> list[str]:
    """Cells of the table: number of questions, chance, and every arm's mean over seeds with its interval."""
    groups = [group] if group else measured.headline
    known = [measured.chance[name] for name in groups if name in measured.chance]
    chance = f"{100 * statistics.fmean(known):.1f}" if len(known) == len(groups) else NONE
    counts, cells = set(), []
    for of_arm in measured.rates.values():
        rates = [statistics.fmean(found[name]["rate"] for name in groups) for found in of_arm.values()]
        counts |= {sum(found[name]["n"] for name in groups) for found in of_arm.values()}
        over = mean_over_seeds(rates)
        ends = [over["low"], over["high"]]
        if len(rates) == 1 and group:  # for a single run, the Wilson interval over its questions
            (found,) = of_arm.values()
            ends = [found[group]["low"], found[group]["high"]]
        bounds = "" if None in ends else f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
        cells.append(f"{100 * over['mean']:.1f}{bounds}")
    return [", ".join(f"{n:,}" for n in sorted(counts)), chance, *cells]


def title_of(group: str, measured: Measured) -> str:
    """A group's name in words."""
    if not group:
        return f"mean of {len(measured.headline)}" + " with the needle" * (measured.headline != measured.groups)
    return group.replace(" positive", ", needle present").replace(" negative", ", needle absent")


def section_curves(arms: Arms, style: dict) -> list[str]:
    """Curves over training: the loss, and for each evaluation set exact answers, loss and the metric of the runs."""
    losses: dict[str, list[Curve]] = {}
    by_set: dict[str, dict[str, dict[str, list[Curve]]]] = {}  # quantity -> set -> arm
    for run in all_runs(arms):
        logged = [(line["step"], line["loss"]) for line in run.metrics if line.get("loss") is not None]
        if logged:
            losses.setdefault(run.arm, []).append(Curve(*zip(*logged, strict=True), run.is_finished))
        for quantity in ("exact answers", "eval_loss", "metric"):
            for name, points in set_curves(run, quantity).items():
                curve = Curve(*zip(*points, strict=True), run.is_finished)
                by_set.setdefault(quantity, {}).setdefault(name, {}).setdefault(run.arm, []).append(curve)
    chance = plots.chances([sample for run in all_runs(arms) for sample in run.samples])
    lines, band = [], "Line: mean over the seeds; band: from the lowest to the highest seed. "
    if losses:
        lines.append(show(plots.draw_losses(losses, style, "Training loss"), f"{band}Dotted: an unfinished run."))
    metric = next(iter(all_runs(arms))).record["config"].get("metric", "metric")
    titles = {
        "exact answers": ("Exact answers during training", "exact answers", chance),
        "eval_loss": ("Loss of the evaluation sets during training", "loss per label token", None),
        "metric": (f"{metric} during training", metric, {}),
    }
    short = "Between the first and the last evaluation only the first questions of each set are asked."
    for quantity, curves in by_set.items():
        title, label, guess = titles[quantity]
        asked = "Always on the first rows of each set." if quantity == "eval_loss" else short
        lines.append(show(plots.draw_sets(curves, style, title, label, guess), band + asked))
    return lines


def set_curves(run: Run, quantity: str) -> dict[str, list[tuple[int, float]]]:
    """{evaluation set: [(step, value)]} of one quantity of a run; {} where it was not logged."""
    if quantity == "exact answers":
        curves = plots.accuracy_curves(run.metrics)
        return {name: [(step, right / n) for step, right, n in points] for name, points in curves.items()}
    found: dict[str, list[tuple[int, float]]] = {}
    for line in run.metrics:
        for name, value in (line.get(quantity) or {}).items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def section_lambda(arms: Arms) -> list[str]:
    """lambda of every layer, from the start of training to the end."""
    curves = {}
    for arm, of_arm in arms.items():
        found = [c for run in of_arm.values() if run.is_finished and (c := plots.lambda_curves(run.metrics))]
        if found:
            curves[arm] = found
    if not curves:
        return []
    text = "One line for every logged update, early ones dark; dashed: the start; large points: the end."
    return [show(plots.draw_lambda_by_depth(curves, "lambda by depth over training"), text)]


def section_maps(arms: Arms, notes: list[str]) -> list[str]:
    """Signed attention maps of the first finished seed of every differential arm."""
    done, lines = finished(arms), []
    standard = [run for run in all_runs(done) if not run.is_differential]
    for arm, of_arm in done.items():
        for run in list(of_arm.values())[:1]:
            if not run.is_differential or not (run.folder / "attention.safetensors").exists():
                continue
            if not (run.folder / "signed_maps.safetensors").exists():
                notes.append(f"{run.folder}: stores no second map: its preset subtracts none, or memory ran out")
                continue
            same = [other.folder for other in standard if other.seed == run.seed]
            title = f"Attention of the answer on the image: {arm}, seed {run.seed}"
            try:
                figure = plots.draw_signed_maps(run.folder, same[0] if same else None, title)
            except UserError as error:
                notes.append(str(error))
                continue
            text = (
                "First token of the answer, heads averaged, in the layer of each run that attends most to the needle "
                "(outlined). One scale of colours: blue is negative, white is zero. "
                "Presets that keep the size of the output divide the difference by 1 - lambda."
            )
            lines.append(show(figure, text))
    return lines


def section_share(arms: Arms, measured: Sequence[Measured], style: dict, notes: list[str]) -> list[str]:
    """The needle's share of the attention by layer: from an evaluation that measured it, else from the stored maps."""
    shares: dict[str, dict[str, list]] = {}
    even: dict[str, float] = {}
    for found in measured:
        stored = [
            (arm, read_attention(f / "attention.json"))
            for arm, folders in found.folders.items()
            for f in folders.values()
        ]
        if not stored or not all(attention for _, attention in stored):
            continue
        for arm, attention in stored:
            for setting, values in attention.items():
                shares.setdefault(setting, {}).setdefault(arm, []).append(values["share"])
                even[setting] = values["even"]
        n = ", ".join(sorted({str(v["n"]) for _, attention in stored for v in attention.values()}, key=int))
        source = f"evaluation {found.name}, n = {n} questions per seed and setting"
        break
    else:
        for run in all_runs(finished(arms)):
            if not (run.folder / "attention.safetensors").exists():
                continue
            try:
                attention = plots.read_attention_of_one_image(run.folder)
                for name, share, grid in plots.needle_shares(run.folder, attention):
                    shares.setdefault(name, {}).setdefault(run.arm, []).append(share)
                    even[name] = 1 / grid**2
            except UserError as error:
                notes.append(str(error))
        source = f"{SAVED_QUESTIONS} stored questions of each set, first token of the answer"
    if not shares:
        return []
    figure = draw_needle_share(shares, even, style, "Share of the attention on the needle, by layer")
    return [show(figure, f"Of the attention that the answer pays to the images ({source}), heads averaged.")]


def section_confusion(measured: Sequence[Measured]) -> list[str]:
    """Confusion matrices of answered and true cells, for every evaluation with one needle in one image."""
    lines = []
    for found in measured:
        matrices: dict[str, dict[str, list[np.ndarray]]] = {}
        for arm, of_arm in found.folders.items():
            for folder in of_arm.values():
                by_setting: dict[str, list[dict]] = {}
                for row in read_answers(folder)[0]:
                    images, _, needles = row.get("shape", (0, 0, 0))
                    if images == needles == 1 and row["ground_truth"]:
                        by_setting.setdefault(row["setting"], []).append(row)
                for setting, rows in by_setting.items():
                    matrices.setdefault(setting, {}).setdefault(arm, []).append(confusion(rows))
        for setting, of_arms in matrices.items():
            means = {arm: nan_mean(seeds) for arm, seeds in of_arms.items()}
            grid = math.isqrt(len(next(iter(means.values()))) - 1)
            figure = draw_confusion(means, grid, f"{setting}: answered against true cells")
            text = (
                f"Evaluation {found.name}; every row sums to 100 %, mean over the seeds. On the diagonal: right, also "
                "in a form that does not count as exact."
            )
            lines.append(show(figure, text))
    return lines


def confusion(rows: Sequence[dict]) -> np.ndarray:
    """Confusion matrix [truth, answer] of one grid: cells row by row, then absent; the last column is any other answer.

    Each row holds shares of the answers to this truth; NaN for a truth that was never asked.
    """
    grid = rows[0]["shape"][1]
    places = [f"1, {row}, {column}" for row in range(1, grid + 1) for column in range(1, grid + 1)]
    column_of = {place: number for number, place in enumerate([*places, ABSENT])}
    counts = np.zeros((grid**2 + 1, grid**2 + 2))
    for row in rows:
        truth = row["ground_truth"] if row["kind"] == "positive" else ABSENT
        counts[column_of[truth], column_of.get(parse_lenient(row["response"]), grid**2 + 1)] += 1
    totals = counts.sum(1, keepdims=True)
    return np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)


def nan_mean(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over matrices of each entry, ignoring NaN."""
    stacked = np.stack(matrices)
    known = ~np.isnan(stacked)
    counts = known.sum(0)
    return np.divide(np.nansum(stacked, 0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def section_calibration(measured: Sequence[Measured], style: dict) -> list[str]:
    """Calibration curves of the evaluations whose answers were ranked."""
    lines = []
    for found in measured:
        bins: dict[str, list[list[dict]]] = {}
        for arm, of_arm in found.folders.items():
            for folder in of_arm.values():
                rows, benchmark = read_answers(folder)
                rows = [row for row in rows if row.get("confidence") is not None]
                if rows:
                    right = [benchmark.is_correct(row) for row in rows]
                    bins.setdefault(arm, []).append(confidence_bins([row["confidence"] for row in rows], right))
        if bins:
            errors = {arm: mean_over_seeds([calibration_error(seed) for seed in seeds]) for arm, seeds in bins.items()}
            shown = "; ".join(f"{arm} {100 * over['mean']:.1f}" for arm, over in errors.items())
            figure = draw_calibration(bins, style, f"Calibration: {found.name}")
            text = (
                "Confidence: the probability of the chosen answer, given that the answer is one of the candidates. "
                f"A line for each seed. Expected calibration error in points, mean over the seeds: {shown}."
            )
            lines.append(show(figure, text))
    return lines


# ---- failures
def section_failures(arms: Arms, measured: Sequence[Measured], style: dict) -> list[str]:
    """Questions that an arm gets wrong, with images: of the first evaluation that has some, else of stored samples."""
    for found in measured:
        if found.folders:
            lines = failures_of_evaluation(found, style)
            if lines:
                return lines
    return failures_of_samples(finished(arms), style)


def failures_of_evaluation(found: Measured, style: dict) -> list[str]:
    """Questions on which arms disagree at the first seed that all have, then those that all get wrong."""
    shared = sorted(set.intersection(*(set(of_arm) for of_arm in found.folders.values())))
    if not shared:
        return []
    seed, by_id, verdicts = shared[0], {}, {}
    for arm, of_arm in found.folders.items():
        rows, benchmark = read_answers(of_arm[seed])
        for row in rows:
            by_id.setdefault(row["id"], {})[arm] = row
            verdicts.setdefault(row["id"], {})[arm] = benchmark.is_correct(row)
    record = open_record(next(iter(found.folders.values()))[seed])[0]
    roots = [CACHE, *(Path(record["config"][key]) for key in ("data", "image_folder") if record["config"].get(key))]
    kinds: dict[str, list[str]] = {}
    for name, of_question in verdicts.items():
        if not all(of_question.values()):
            right = [arm for arm, is_right in of_question.items() if is_right]
            kinds.setdefault(f"right only in {', '.join(right)}" if right else "wrong in every arm", []).append(name)
    lines = [paragraph(f"Evaluation {found.name}, seed {seed}; the first questions of each kind.")]
    total, has_image = len(verdicts), False
    for kind, names in sorted(kinds.items(), key=lambda pair: pair[0] == "wrong in every arm"):
        lines.append(f"<h3>{escape(kind)}: {len(names):,} of {total:,} questions</h3>")
        cards = []
        for name in names[:SHOWN_FAILURES]:
            rows = by_id[name]
            row = next(iter(rows.values()))
            grid = row["shape"][1] if "shape" in row and tuple(row["shape"][::2]) == (1, 1) else None
            answers = {arm: (of_arm["response"], verdicts[name][arm]) for arm, of_arm in rows.items()}
            truth = str(row["ground_truth"]) if row.get("kind") != "negative" else ABSENT
            image = read_image(row["images"][0], roots) if len(row["images"]) == 1 else None
            has_image = has_image or image is not None
            cards.append(card(image, row["prompt"], truth, answers, grid, style))
        lines += ['<div class="gallery">', *cards, "</div>"]
    return lines if has_image or not any(row["images"] for rows in by_id.values() for row in rows.values()) else []


def failures_of_samples(arms: Arms, style: dict) -> list[str]:
    """Wrong answers among the samples that the runs of the first seed stored."""
    cards = []
    for of_arm in arms.values():
        run = next(iter(of_arm.values()))
        last = max((sample["step"] for sample in run.samples), default=0)
        wrong = [
            sample
            for sample in run.samples
            if sample["step"] == last and normalise(sample["response"]) != normalise(sample["answer"])
        ]
        for sample in wrong[:SHOWN_FAILURES]:
            image = read_image(str(run.folder / sample["image"]), [run.folder]) if sample.get("image") else None
            answers = {run.arm: (sample["response"], False)}
            cards.append(card(image, sample["prompt"], sample["answer"], answers, sample.get("grid"), style))
    if not cards:
        return []
    text = "Wrong answers among the samples that the first seed of every arm stored at its last evaluation."
    return [paragraph(text), '<div class="gallery">', *cards, "</div>"]


def read_image(name: str, roots: Sequence[Path]) -> Image.Image | None:
    """An image from one of these folders; None if it is elsewhere, missing or broken."""
    for root in roots:
        try:
            return open_image(resolve_inside(root, Path(name).resolve()))
        except (UserError, ValueError, OSError):
            continue
    return None


def card(
    image: Image.Image | None,
    prompt: str,
    truth: str,
    answers: dict[str, tuple[str | None, bool]],
    grid: int | None,
    style: dict,
) -> str:
    """An HTML figure of a question: its image with the needle's cell and the cells of wrong answers, and text below."""
    lines = ["<figure>"]
    if image is not None:
        image = image.convert("RGB")
        image.thumbnail((GALLERY_SIDE, GALLERY_SIDE))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=88)
        lines.append(f'<div class="image"><img src="{data_uri(data.getvalue(), "jpeg")}" alt="{escape(clip(prompt))}">')
        wrong = {arm: response for arm, (response, is_right) in answers.items() if not is_right}
        boxes = [cell_box(truth, grid, "needle", "")]
        for arm, response in wrong.items():
            named = parse_lenient(response) or ""
            if named != truth:  # the right cell in a form that does not count has its outline already
                boxes.append(cell_box(named, grid, "missed", style[arm]["color"]))
        lines += [*filter(None, boxes), "</div>"]
    lines += [f"<figcaption>{escape(clip(prompt.removeprefix(QUESTION_TASK)))}<br>expected: {escape(truth)}"]
    for arm, (response, is_right) in answers.items():
        mark = "right" if is_right else "wrong"
        shown = "no answer" if response is None else response.strip() or "(empty)"
        swatch = f'<span class="swatch" style="background:{style[arm]["color"]}"></span>'
        lines.append(f'<br>{swatch}{escape(arm)}: <span class="{mark}">{escape(clip(shown))}</span> ({mark})')
    return "\n".join([*lines, "</figcaption></figure>"])


def clip(text: str) -> str:
    """Text, truncated if it is long: prompts of some benchmarks are whole documents."""
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]} ..."


def cell_box(place: str, grid: int | None, kind: str, colour: str) -> str:
    """The outline of the cell "1, row, column" over an image of grid x grid cells; "" for anything else."""
    numbers = place.split(", ")
    if not grid or len(numbers) != 3 or not all(1 <= int(number) <= grid for number in numbers[1:]):
        return ""
    row, column = int(numbers[1]) - 1, int(numbers[2]) - 1
    side = 100 / grid
    border = f"border-color:{colour};" if colour else ""
    where = f"left:{column * side:.4g}%;top:{row * side:.4g}%;width:{side:.4g}%;height:{side:.4g}%"
    return f'<span class="{kind}" style="{border}{where}"></span>'


# ---- the page
CSS = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid #ccc; padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; }
a { color: #0072B2; }
.answer { font-size: 1.15rem; border-left: 4px solid #0072B2; background: #f3f7fa; padding: .75rem 1rem; }
figure { margin: 1.25rem 0; }
figure > img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: .875rem; color: #444; overflow-wrap: anywhere; max-width: 48rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
.numbers td + td { white-space: nowrap; }
th { border-bottom-color: #888; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.25rem; }
.gallery figure { margin: 0; }
.image { position: relative; }
.image img { display: block; width: 100%; height: auto; }
.image span { position: absolute; box-sizing: border-box; }
.needle { border: 3px solid #56B4E9; outline: 1px solid #fff; outline-offset: -4px; }
.missed { border: 3px dashed #D55E00; }
.swatch { display: inline-block; width: .7em; height: .7em; margin-right: .35em; }
.right { color: #00527f; font-weight: 600; }
.wrong { color: #a34700; font-weight: 600; }
@media print { body { max-width: none; } figure, tr { break-inside: avoid; } }
"""


def make_page(folders: Sequence[Path]) -> str:
    """The page about these run folders. Raises UserError for a folder that is not a run, and for damaged files."""
    arms, notes = read_arms(folders), []
    style = arm_styles(arms)
    evaluations = measure_evaluations(arms, notes)
    trained = measure_training(arms)
    measured = [*evaluations, *([trained] if trained else [])]
    with plt.rc_context(STYLE):
        sections = {"Runs": section_runs(arms)}
        for found in measured:
            title = "Last evaluation of training" if found is trained else f"Evaluation {found.name}"
            sections[title] = section_difference(found, style)
        sections |= {
            "Training": section_curves(arms, style),
            "lambda": section_lambda(arms),
            "Attention maps": section_maps(arms, notes),
            "Attention on the needle": section_share(arms, evaluations, style, notes),
            "Confusion": section_confusion(evaluations),
            "Calibration": section_calibration(evaluations, style),
            "Failures": section_failures(arms, measured, style),
        }
    if notes:
        sections["Left out"] = ["<ul>", *(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes)), "</ul>"]
    shown = {title: lines for title, lines in sections.items() if lines}
    title = ", ".join(arms)
    links = [f'<li><a href="#{anchor(name)}">{escape(name)}</a></li>' for name in shown]
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="answer">{escape(answer(arms, measured[0] if measured else None))}</p>',
    ]
    body += ["<nav><ul>", *links, "</ul></nav>"]
    for name, lines in shown.items():
        body += [f'<section id="{anchor(name)}">', f"<h2>{escape(name)}</h2>", *lines, "</section>"]
    head = ["<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">']
    head += ['<meta name="viewport" content="width=device-width, initial-scale=1">', f"<title>{escape(title)}</title>"]
    return "\n".join([*head, f"<style>{CSS}</style>", "</head>", "<body>", *body, "</body>", "</html>", ""])


def anchor(name: str) -> str:
    """The HTML id of a section."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "text") -> list[str]:
    """An HTML table with a header row."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return [
        f'<div class="scroll"><table class="{kind}">',
        f"<thead><tr>{head}</tr></thead>",
        "<tbody>",
        *body,
        "</tbody></table></div>",
    ]


def show(figure: Figure, caption: str) -> str:
    """A figure as an embedded PNG with its caption. Closes the figure."""
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    width = round(figure.get_figwidth() * 96)  # in CSS pixels, so that text has its nominal size
    plt.close(figure)
    image = f'<img src="{data_uri(data.getvalue(), "png")}" width="{width}" alt="{escape(caption)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of an image as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass
class Config:
    runs: tyro.conf.Positional[tuple[str, ...]]  # run folders, of any arms and seeds
    output: str = "runs/report.html"  # HTML file to write


@one_line_errors
def main():
    config = tyro.cli(Config, description=__doc__)
    if not config.runs:
        raise UserError("give at least one run folder, as in python make_report.py runs/original_seed0")
    page, output = make_page([Path(run) for run in config.runs]), Path(config.output)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    print(output)


if __name__ == "__main__":
    main()
