"""Ask a model about a picture.

    python generate.py --image=cat.jpg --prompt="caption en"
    python generate.py --model=runs/original_seed0 --image=haystack.png --prompt="answer en where is red apple?"
    python generate.py --image=table.jpg --prompt="detect red apple" --output=boxes.png

The answer goes to standard output; `--model` takes a hub id, a model folder or a run folder.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import tyro
from PIL import ImageDraw

from errors import UserError, one_line_errors
from files import open_image
from modeling_gemma import PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor, locs_to_boxes


@dataclass
class Config:
    image: tuple[str, ...]  # picture file, or several for one prompt
    model: str = "assets/paligemma-nano"  # hub id, model folder, or run folder
    prompt: str = "caption en"  # caption en | detect {thing} | answer en {question} | ...
    output: str = ""  # write the picture here, with the boxes of the answer drawn
    max_new_tokens: int = 64  # longest answer
    temperature: float = 0.0  # 0: the likeliest answer
    top_p: float = 1.0  # sample from the likeliest tokens that reach this probability together
    seed: int = 0  # of sampling
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")  # cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a card that has it


def draw_boxes(image, answer: str, path: str):
    image = image.convert("RGB")
    pen, width = ImageDraw.Draw(image), max(2, image.width // 150)
    for box, label in locs_to_boxes(answer, *image.size):
        pen.rectangle(box, outline=(255, 0, 80), width=width)
        pen.text((box[0] + 2 * width, box[1] + width), label, fill=(255, 0, 80), stroke_width=1, stroke_fill="white")
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({error}): give a .png or .jpg in a folder that exists") from error


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    images = [open_image(path) for path in config.image]
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={config.device}: {str(error).splitlines()[0]}; give cuda, mps or cpu") from error
    bf16 = config.dtype == "bfloat16" or (
        config.dtype == "auto" and config.device.startswith("cuda") and torch.cuda.is_bf16_supported(False)
    )
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        config.model, dtype=torch.bfloat16 if bf16 else torch.float32, device=config.device
    )
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
