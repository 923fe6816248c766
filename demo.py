"""Ask models about an image in the browser: answers and attention maps of several runs side by side.

    pip install gradio  # with pillow 12, which it needs
    python demo.py                                                     # runs/original_seed0 and runs/diff_seed0
    python demo.py --models runs/original_seed0 runs/diff_v2_seed0     # any runs, model folders or hub ids

The page is served on localhost only and loads nothing from other hosts.
"""

import io
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import matplotlib.pyplot as plt
import torch
import tyro
from msgspec import Meta
from PIL import Image
from torch import Tensor, nn

import generate
from boxes import locs_to_boxes
from diagnostics import answer_attention, effective_map, first_map, subtracted_map
from differential_attention import differential_modules
from errors import UserError, one_line_errors
from files import check_ranges, one_line, open_image
from haystack import ImagePool, needle_prompt, read_pool
from machine import out_of_memory_as
from models import classes_of
from needle_eval.plots import STYLE
from plots import darken, draw_signed
from processing_paligemma import Processor

if TYPE_CHECKING:
    import gradio

EMBEDDED = "assets/paligemma-nano"
TRAINED = ("runs/original_seed0", "runs/diff_seed0")  # what the two fine-tuning scripts write by default
APPLIED = "A"  # name of the map that is applied to the values
GRIDS = (2, 4)
SAMPLE = Path(__file__).parent / "assets" / "sample"
EXAMPLES = [[str(SAMPLE / "fruit.png"), "detect banana"], [str(SAMPLE / "animals.png"), "answer en where is penguin?"]]
CELL = 128  # side of a cell of a haystack, in pixels
IMAGE_HEIGHT = 360  # height of the image on the page, in pixels


@dataclass
class Config:
    # run folders, model folders or hub ids; empty: original_seed0 and diff_seed0 of runs/, else the included model
    models: tuple[str, ...] = ()
    max_new_tokens: Annotated[int, Meta(ge=1, le=1000)] = 32  # longest answer, in tokens
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU that has it
    port: Annotated[int, Meta(ge=1, le=65535)] = 7860  # port of the web page


@dataclass
class Loaded:
    """A loaded model with its processor and settings."""

    name: str
    model: nn.Module
    processor: Processor
    device: str
    max_new_tokens: int

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.model.model.language_model.layers)


@dataclass
class Answer:
    """A model's answer and the attention maps of its decoder, averaged over heads: name -> [layers, T, rows, columns].

    The first map is the one that is applied to the values. T answer tokens including the end; rows and columns of the
    image tokens.
    """

    text: str
    maps: dict[str, Tensor]


Answered = tuple[Image.Image, str, list[Answer]]  # an image, a prompt, and the answer of each model


def load(config: Config) -> list[Loaded]:
    """The models of the configuration."""
    trained = tuple(name for name in TRAINED if Path(name, "final").is_dir())
    dtype = generate.dtype_on(config.device, config.dtype)
    found = []
    for name in dict.fromkeys(config.models or trained or (EMBEDDED,)):
        model_class, processor_class = classes_of(name)
        with out_of_memory_as("give fewer --models, or --device=cpu"):
            model = model_class.from_pretrained(name, dtype=dtype, device=config.device)
        processor = processor_class.from_pretrained(name)
        found.append(Loaded(name, model.eval(), processor, config.device, config.max_new_tokens))
    return found


@torch.no_grad()
def ask(loaded: Loaded, image: Image.Image, prompt: str) -> Answer:
    """The greedy answer of a model to a prompt about an image, and its attention maps."""
    parts = {APPLIED: effective_map, "A1": first_map, "lambda A2": subtracted_map}
    with out_of_memory_as("give a smaller image, a lower --max_new_tokens, fewer --models, or --device=cpu"):
        batch = move(loaded.processor([[image]], [prompt]), loaded.device)
        ids = loaded.model.generate(**batch, max_new_tokens=loaded.max_new_tokens)
        text = loaded.processor.decode(ids[0, batch["input_ids"].shape[1] :])
        answered = move(loaded.processor([[image]], [prompt], [text]), loaded.device)
        found = answer_attention(loaded.model, answered, tuple(parts.values()))[:, :, 0].float().cpu()
    maps = dict(zip(parts, found.unflatten(-1, loaded.processor.patch_grid(image.size)), strict=True))
    if maps["lambda A2"].any():
        maps["A1 - lambda A2"] = maps["A1"] - maps["lambda A2"]
    else:  # nothing is subtracted
        maps = {APPLIED: maps[APPLIED]}
    return Answer(text, maps)


def move(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The batch, moved to a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


# ---- figures
def draw(image: Image.Image, answers: list[Answer], layer: int, token: int) -> list[Image.Image]:
    """For each answer the image with its boxes, darkened where the applied map is low, and below it the signed maps.

    All maps share one colour scale. A model with fewer layers or tokens shows its last one.
    """
    shown = [select(answer, layer, token) for answer in answers]
    limit = max(float(m.abs().max()) for maps in shown for m in maps.values())
    return [draw_answer(image, answer, maps, limit) for answer, maps in zip(answers, shown, strict=True)]


def select(answer: Answer, layer: int, token: int) -> dict[str, Tensor]:
    """name -> map [rows, columns] of one layer and token."""
    return {name: maps[min(layer, len(maps) - 1), min(token, maps.shape[1] - 1)] for name, maps in answer.maps.items()}


def draw_answer(image: Image.Image, answer: Answer, maps: dict[str, Tensor], limit: float) -> Image.Image:
    """The figure of one answer. For standard attention the only map below the image is the applied one."""
    signed = {name: m for name, m in maps.items() if name != APPLIED} or maps
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, panels = plt.subplot_mosaic("000;123", figsize=(5.4, 6.6), layout="constrained", height_ratios=(2.6, 1))
        for panel in panels.values():
            panel.axis("off")
        panels["0"].imshow(generate.mark_boxes(image, answer.text))
        darken(panels["0"], maps[APPLIED])
        for place, (name, m) in zip("123", signed.items(), strict=False):
            drawn = draw_signed(panels[place], m, limit)
            panels[place].set_title(name, fontsize=9)
        below = [panels[place] for place in "123"]
        bar = figure.colorbar(drawn, ax=below, location="bottom", label="attention on a patch", aspect=40)
        bar.outline.set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    plt.close(figure)
    return Image.open(data)


def describe(image: Image.Image, prompt: str, text: str) -> str:
    """The text of an answer, with the number of boxes if it has any or should have some."""
    boxes = len(locs_to_boxes(text, *image.size))
    shown = text.strip() or "(empty)"
    if boxes or prompt.startswith(("detect ", "segment ")):
        shown += f"\n{boxes or 'no'} {'box' if boxes == 1 else 'boxes'}"
    return shown


def make_haystack(pool: ImagePool, grid: int) -> tuple[Image.Image, str, str]:
    """A random haystack of grid x grid drawings, its prompt, and where the needle is."""
    key = str(random.random())
    haystack = pool.make(key, images=1, grid=grid, positive=True)
    image = pool.stitch(f"{key}/0", haystack.cells[0], CELL)
    return image, needle_prompt(*haystack.captions), f"Right for the new haystack: {haystack.answer}"


# ---- the page
def build_app(gradio: ModuleType, models: list[Loaded]) -> "gradio.Blocks":
    """The page: an image and a prompt on the left, a column for every model on the right."""
    pool = ImagePool(read_pool(splits=("test_style",)))
    layers = max(loaded.layers for loaded in models)
    last_token = max(loaded.max_new_tokens for loaded in models)  # the end comes after so many tokens
    first = make_haystack(pool, GRIDS[0])

    def answer(path: str | None, prompt: str) -> Answered:
        if path is None:
            raise gradio.Error("give an image first")
        try:
            image = open_image(path)
            return image, prompt, [ask(loaded, image, prompt) for loaded in models]
        except UserError as error:  # a broken image, or a prompt that the processor refuses
            raise gradio.Error(str(error)) from error

    def show(answered: Answered | None, layer: int, token: int) -> list:
        if answered is None:
            return [None] * (2 * len(models))
        image, prompt, answers = answered
        texts = [describe(image, prompt, answer.text) for answer in answers]
        figures = draw(image, answers, int(layer), int(token))
        return [value for pair in zip(texts, figures, strict=True) for value in pair]

    with gradio.Blocks(title="Differential attention", analytics_enabled=False) as app:
        gradio.Markdown("# Where does the answer look?")
        answered = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                # the file itself, which keeps its transparency and orientation, as generate.py reads it
                image = gradio.Image(
                    first[0], label="image", type="filepath", image_mode=None, format="png", height=IMAGE_HEIGHT
                )
                prompt = gradio.Textbox(first[1], label="prompt")
                ask_button = gradio.Button("Ask", variant="primary")
                grid = gradio.Radio(GRIDS, value=GRIDS[0], label="cells along a side of a new haystack")
                new_button = gradio.Button("New haystack")
                truth = gradio.Markdown(first[2])
                layer = gradio.Slider(0, layers - 1, value=layers // 2, step=1, label="decoder layer")
                token = gradio.Slider(0, last_token, value=0, step=1, label="token of the answer")
                gradio.Examples(EXAMPLES, [image, prompt])
            outputs = []
            for loaded in models:
                with gradio.Column(scale=2, min_width=320):
                    kind = "differential" if differential_modules(loaded.model) else "standard"
                    gradio.Markdown(f"### {loaded.name}\n{kind} attention")
                    outputs.append(gradio.Textbox(label="answer", lines=2))
                    outputs.append(gradio.Image(show_label=False, type="pil", buttons=["fullscreen"]))
        shown = [answered, layer, token]
        gradio.on([ask_button.click, prompt.submit], answer, [image, prompt], answered).then(show, shown, outputs)
        gradio.on([layer.release, token.release], show, shown, outputs)
        new_button.click(lambda side: make_haystack(pool, int(side)), grid, [image, prompt, truth]).then(
            answer, [image, prompt], answered
        ).then(show, shown, outputs)
        app.load(answer, [image, prompt], answered).then(show, shown, outputs)
    return app


@one_line_errors
def main() -> None:
    config = tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    check_ranges(config)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio would otherwise report which of its functions are used
    try:
        import gradio
    except ImportError as error:
        raise UserError("gradio is not installed: pip install gradio") from error
    app = build_app(gradio, load(config))
    theme = gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        app.launch(server_name="127.0.0.1", server_port=config.port, theme=theme, footer_links=[])
    except OSError as error:
        raise UserError(f"--port={config.port}: {one_line(error)}: give another port") from error


if __name__ == "__main__":
    main()
