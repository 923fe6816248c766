"""Figures of training: drawn only from saved files, and written completely or not at all."""

import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import safetensors.torch
import tiny
from matplotlib import cbook
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from refusals import refused
from runs import ROOT

import plots
from differential_attention import DifferentialConfig
from errors import UserError
from finetune_diff import Config
from finetune_original import finetune

NAMES = ["accuracy.png", "answers.png", "lambda.png", "loss.png"]


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plots")
    config = tiny.quick(
        Config, tiny_model, folder, max_steps=4, eval_every=2, differential=DifferentialConfig().resolve()
    )
    finetune(config, "diff", config.differential)
    original = replace(config, output_dir=str(folder / "original"))
    finetune(original, "original")
    return config


@pytest.fixture
def run(config, tmp_path) -> Path:
    """A copy of a finished differential run without its figures."""
    shutil.copytree(config.output_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "plots")
    return tmp_path / "run"


@pytest.fixture
def figures(monkeypatch) -> dict:
    """The saved figures by file name, with the texts of their titles."""
    found = {}
    real = plots.save

    def save(figure, path):
        titles = [figure.get_suptitle(), *(panel.get_title() for panel in figure.axes)]
        found[path.name] = (figure, [title for title in titles if title])
        real(figure, path)

    monkeypatch.setattr(plots, "save", save)
    return found


def edit_samples(run: Path, edit):
    """Change every line of samples.jsonl."""
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    (run / "samples.jsonl").write_text("".join(json.dumps(edit(line)) + "\n" for line in lines))


def test_a_dollar_in_a_prompt_is_a_dollar(run, figures):
    """Not the start of a formula, which may be broken; log axes keep their formulas."""
    edit_samples(run, lambda line: line | {"prompt": "growth from $5 (10%) to $6?", "response": "$1"})
    plots.draw_run(run)
    titles = [" ".join(title.split()) for title in figures["answers.png"][1]]
    assert any(r"\$5 (10%) to \$6? \$1 (wrong)" in title for title in titles), titles
    assert not [title for title in titles if cbook.is_math_text(title)]
    figure = figures["loss.png"][0]
    figure.canvas.draw()
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels(which="both")]
    assert all(cbook.is_math_text(text) for text in ticks if "$" in text)


def test_lambda_of_many_layers_fits_into_its_figures(tmp_path):
    """Of 32 decoder layers and 27 of a tower: a colour bar instead of their names."""
    names = [f"model.language_model.layers.{i}.self_attn.differential" for i in range(32)]
    names += [f"model.vision_tower.encoder.layers.{i}.self_attn.differential" for i in range(27)]
    curves = {name: [(0, 0.5), (10, 0.5 + i / 200)] for i, name in enumerate(names)}
    with plt.rc_context(plots.STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.draw_lambda(curves, "many")
        assert len(figure.axes) == 2 and figure.axes[1].get_ylim() == (0, 58)
        plots.save(figure, tmp_path / "lambda.png")
        figure = plots.draw_lambda_by_depth({"diff": [curves]}, "many")
        assert len(figure.axes[0].get_xticks()) <= 12
        plots.save(figure, tmp_path / "depth.png")


def test_all_figures_come_from_the_run_folder_alone(run, figures):
    """No data is made and no model is loaded."""
    assert not re.search(r"^(from|import) (data|haystack|models|modeling\w*) ", (ROOT / "plots.py").read_text(), re.M)
    plots.draw_run(run)
    assert sorted(path.name for path in (run / "plots").iterdir()) == NAMES and plots.is_drawn(run)
    for _, titles in figures.values():
        assert titles[0].startswith("run (diff, seed 0)")
    accuracy, _ = figures["accuracy.png"]
    assert list(accuracy.axes[0].lines[0].get_xdata()) == [0, 2, 4]
    loss, _ = figures["loss.png"]
    assert list(loss.axes[0].lines[2].get_xdata()) == [0, 2, 4]  # of the evaluation sets, from before the first update
    curve, _ = figures["lambda.png"]
    assert list(curve.axes[0].lines[0].get_xdata()) == [0, 1, 2, 3, 4]
    assert curve.axes[0].lines[0].get_ydata()[0] == 0.5


def test_sample_images_are_the_images_of_the_questions(config, run):
    from data import make_data

    _, sets = make_data(config)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert len({sample["image"] for sample in samples}) == 2 * len(sets)
    for sample in samples:
        row = int(sample["id"].rsplit("/", 1)[1])
        example = sets[sample["set"]].get(0, row)
        assert (example.prefix, example.suffix) == (sample["prompt"], sample["answer"])
        saved = Image.open(run / sample["image"])
        assert saved.tobytes() == example.images[0].convert("RGB").tobytes()
        assert saved.width == sample["grid"] * 64


def test_cells_of_answers_are_outlined(run, figures):
    """The needle's cell, and for a wrong answer the answered cell."""

    def answer(line: dict) -> dict:
        return line | {"answer": "1, 2, 1", "response": "1, 2, 1" if line["id"].endswith("/0") else "1, 1, 2"}

    edit_samples(run, answer)
    plots.draw_run(run)
    figure, _ = figures["answers.png"]
    panels = [axes for axes in figure.axes if axes.get_images()]
    outlines = [[(p.get_xy(), p.get_edgecolor()[:3]) for p in axes.patches] for axes in panels]
    found, missed = (plt.matplotlib.colors.to_rgb(style["edgecolor"]) for style in (plots.FOUND, plots.MISSED))
    assert outlines[0] == [((0, 64), found)]  # a grid of 2 x 2 cells of 64 pixels
    assert sorted(len(o) for o in outlines) == [1] * 4 + [2] * 4
    assert [((0, 64), found), ((64, 0), missed)] in outlines


def test_long_captions_wrap_and_neither_overlap_nor_leave_the_figure(run, figures):
    words = "a very long caption of a photograph that was taken early in the morning " * 4
    edit_samples(run, lambda line: line | {"prompt": f"answer en where is {words}?", "response": words})
    plots.draw_run(run)
    figure, _ = figures["answers.png"]
    canvas = FigureCanvasAgg(figure)
    renderer, (width, height) = canvas.get_renderer(), canvas.get_width_height()
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    boxes += [axes.get_window_extent(renderer) for axes in figure.axes if axes.get_images()]
    assert len(boxes) == 16
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_runs_without_images_or_without_haystacks_say_what_is_not_drawn(run, capsys, monkeypatch):
    """Rows of text alone have neither images nor attention, rows with images no attention."""
    monkeypatch.setattr("sys.argv", ["plots.py", str(run), str(run)])
    (run / "attention.safetensors").unlink()
    plots.main()
    printed = capsys.readouterr().out
    assert "attention.png is not drawn" in printed and "answers.png" not in printed
    assert sorted(path.name for path in (run / "plots").iterdir()) == NAMES
    shutil.rmtree(run / "plots")
    edit_samples(run, lambda line: {key: value for key, value in line.items() if key not in ("image", "grid")})
    plots.main()
    printed = capsys.readouterr().out
    assert "text alone" in printed and "answers.png is not drawn" in printed and "attention.png is not drawn" in printed
    assert sorted(path.name for path in (run / "plots").iterdir()) == [n for n in NAMES if n != "answers.png"]


def test_attention_of_one_question_or_of_several_images_alone_is_refused_by_its_reason(run, capsys, monkeypatch):
    file = run / "attention.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: maps[:, :1].contiguous() for name, maps in tensors.items()}, file)
    with refused(file, "fewer than 2 questions", "--eval_samples"):
        plots.draw_attention([run], 0)
    safetensors.torch.save_file(tensors, file)
    edit_samples(run, lambda line: line | {"grid": None})
    with refused(run, "several images"):
        plots.draw_attention([run], 0)
    monkeypatch.setattr("sys.argv", ["plots.py", str(run), str(run)])
    plots.main()
    assert "attention.png is not drawn" in capsys.readouterr().out


def test_answers_to_other_data_are_drawn_with_their_images(config, tmp_path):
    """Several images of one question are side by side."""
    rows = [json.loads(line) for line in (ROOT / "assets" / "sample" / "rows.jsonl").read_text().splitlines()]
    shutil.copytree(ROOT / "assets" / "sample", tmp_path / "rows")
    images = [row["image"] for row in rows[:2] if isinstance(row["image"], str)]
    pair = {"image": images, "prefix": "caption en", "suffix": "two"}
    (tmp_path / "rows" / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(4)))
    data, pairs = (str(tmp_path / "rows" / f"{name}.jsonl") for name in ("rows", "pairs"))
    config = replace(config, data=data, eval_data=pairs, output_dir=str(tmp_path / "pairs"))
    finetune(config, "diff", config.differential)
    with Image.open(tmp_path / "pairs" / "samples" / "0-0.png") as joined:
        sizes = [Image.open(tmp_path / "rows" / image).size for image in images]
        assert joined.width == sum(min(w, plots_side(w, h)) for w, h in sizes)
    assert (tmp_path / "pairs" / "plots" / "answers.png").exists()


def plots_side(width: int, height: int) -> int:
    from evaluation import SAMPLE_SIDE

    return round(width * min(1, SAMPLE_SIDE / max(width, height)))


def test_attention_of_two_runs(config, run, figures, capsys, monkeypatch):
    original = Path(config.output_dir).parent / "original"
    monkeypatch.setattr("sys.argv", ["plots.py", str(original), str(run)])
    plots.main()
    assert f"{run / 'plots' / 'attention.png'}" in capsys.readouterr().out  # where it is
    _, titles = figures["attention.png"]
    assert sum("original, layer" in title for title in titles) == sum("run, layer" in title for title in titles) == 4


def test_attention_that_cannot_be_compared_is_refused(config, run):
    other = run.with_name("other")
    shutil.copytree(run, other)
    edit_samples(other, lambda line: line | {"id": f"{line['id']}0"})
    with refused("different questions"):
        plots.draw_attention([run, other], 0)
    with refused("--token=99"):
        plots.draw_attention([run], 99)
    (other / "attention.safetensors").write_bytes(b"rubbish")
    with refused(other / "attention.safetensors"):
        plots.draw_attention([other], 0)
    (other / "attention.safetensors").unlink()
    with refused(other / "attention.safetensors", "missing"):
        plots.draw_attention([other], 0)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize(
    "line",
    [
        "null",
        "7",
        "[]",
        "{",
        '{"step": "x"}',
        '{"step": 1, "lambda": 3, "set": 1}',
        '{"step": 1, "\\ud800": 1, "set": 1}',
        '{"step": 1, "set": 1, "eval": {"2x2": [3, 1]}}',
        '{"step": 1, "set": 1, "eval": {"2x2": [0, 0]}}',
    ],
)
def test_damaged_logs_are_named(run, name, line):
    with open(run / name, "a") as log:
        log.write(line + "\n")
    with refused(f"{run / name}, line"):
        plots.draw_run(run)


@pytest.mark.parametrize("image", ["../other.png", "/etc/passwd", "samples/missing.png", "samples"])
def test_an_image_outside_of_the_run_is_not_opened(run, image):
    Image.new("RGB", (8, 8)).save(run.parent / "other.png")
    edit_samples(run, lambda line: line | {"image": image})
    with pytest.raises(UserError):
        plots.draw_run(run)
    assert not plots.is_drawn(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with refused(tmp_path / "metrics.jsonl"):
        plots.draw_run(tmp_path)


def test_haystacks_of_several_images_are_left_out_of_the_attention(run, figures):
    """Their samples name no grid: the cell of the needle is not known."""
    sets = sorted(plots.read_attention(run))
    edit_samples(run, lambda line: line | ({"grid": None} if line["set"] == sets[0] else {}))
    assert sorted(plots.read_attention_of_one_image(run)) == sets[1:]
    plots.draw_attention([run], 0)
