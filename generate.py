"""Ask a model about an image.

    python generate.py --image=cat.jpg --prompt="caption en"
    python generate.py --model=runs/original_seed0 --image=haystack.png --prompt="answer en where is red apple?"
    python generate.py --image=table.jpg --prompt="detect red apple" --output=boxes.png

Prints the answer. `--model` is a hub id, a model folder or a run folder.
"""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro
from msgspec import Meta
from PIL import Image, ImageDraw, ImageFont

from boxes import locs_to_boxes
from errors import UserError, one_line_errors
from files import check_ranges, open_image
from machine import choose_dtype, out_of_memory_as
from models import classes_of
from processing_paligemma import to_rgb

BOX_COLOR = (255, 0, 80)


@dataclass
class Config:
    image: tuple[str, ...] = ()  # image file, or several for one prompt
    model: str = "assets/paligemma-nano"  # hub id, model folder or run folder
    prompt: str = "caption en"  # caption en | detect {thing} | answer en {question} | ...
    output: str = ""  # image file to write, with the boxes of the answer drawn
    max_new_tokens: Annotated[int, Meta(ge=1)] = 64  # maximum number of tokens of the answer
    temperature: Annotated[float, Meta(ge=0)] = 0.0  # sampling temperature; 0: greedy decoding
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0  # sample from the most probable tokens that sum to this probability
    seed: int = 0  # sampling seed
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU that supports it


def mark_boxes(image: Image.Image, answer: str) -> Image.Image:
    """A copy of the image with the boxes and labels of a detection answer; lines and labels scale with the image."""
    image = to_rgb(image).copy()
    side = max(image.size)
    draw, width = ImageDraw.Draw(image), max(1, side // 200)
    font = ImageFont.load_default(size=max(10, side // 25))
    for box, label in locs_to_boxes(answer, *image.size):
        draw.rectangle(box, outline=BOX_COLOR, width=width)
        stroke = max(1, width // 2)
        _, _, right, bottom = draw.textbbox((0, 0), label, font=font, stroke_width=stroke)
        # in the box's upper left corner, moved as far as needed to fit in the image
        x, y = min(box[0] + 2 * width, image.width - right), min(box[1] + width, image.height - bottom)
        place = (max(0, x), max(0, y))
        draw.text(place, label, fill=BOX_COLOR, font=font, stroke_width=stroke, stroke_fill="white")
    return image


def draw_boxes(image: Image.Image, answer: str, path: str) -> None:
    """Write the image with the boxes of an answer, see `mark_boxes`; print a note if the answer has none.

    Raises UserError if it cannot be written.
    """
    if not locs_to_boxes(answer, *image.size):
        print(f"{path}: the answer has no boxes, the image is written without marks", file=sys.stderr)
    try:
        mark_boxes(image, answer).save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}): give a .png or .jpg in a folder that exists") from error


def dtype_on(device: str, wanted: str) -> torch.dtype:
    """The dtype for a model on a device. Raises UserError for a device that is not available."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={device}: {str(error).splitlines()[0]}; give cuda, mps or cpu") from error
    return choose_dtype(wanted, torch.device(device))[0]


@one_line_errors
def main() -> None:
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    check_ranges(config)
    images = [open_image(path) for path in config.image]
    dtype = dtype_on(config.device, config.dtype)
    model_class, processor_class = classes_of(config.model)
    processor = processor_class.from_pretrained(config.model)
    if config.output and not (images and processor.answers_boxes):
        raise UserError(f"--output: needs an image and a model that answers boxes, not {config.model}: leave it out")
    if config.output and len(images) > 1:
        raise UserError(f"--output: draws boxes on one image, not on {len(images)}: leave it out")
    with out_of_memory_as("give fewer or smaller images, a lower --max_new_tokens, or --device=cpu"):
        model = model_class.from_pretrained(config.model, dtype=dtype, device=config.device)
        batch = {key: tensor.to(config.device) for key, tensor in processor([images], [config.prompt]).items()}
        ids = model.generate(
            **batch,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            generator=torch.Generator(config.device).manual_seed(config.seed),
        )
    answer = processor.decode(ids[0, batch["input_ids"].shape[1] :])
    print(answer)
    if config.output:
        draw_boxes(images[0], answer, config.output)


if __name__ == "__main__":
    main()
