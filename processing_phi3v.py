"""Images and strings to tensors and back for Phi-3: the chat layout, and images as a global view with crops.

A row of a batch is padding, `<s>`, `<|user|>`, prompt, `<|end|>`, `<|assistant|>`, then in training answer and
`<|end|>`. Images appear in the prompt as `<|image_1|>`, `<|image_2|>`, ...; each part between these tags is tokenised
separately, with its own `<s>`, as in the released code.

B batch, L sequence, n images in the batch, N image tokens of an image, S side of a crop in pixels.
Source: the image processor and processor of microsoft/Phi-3-vision-128k-instruct and Phi-3.5-vision-instruct.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint import base_folder
from config_fields import DECODER_ALONE_MESSAGE, IGNORED_LABEL, QUESTION_TASK, Positive, TokenId, read_config
from errors import UserError
from files import PathLike, read_json, read_typed
from processing_paligemma import (
    MAX_PIXEL,
    Pixels,
    Processor,
    Row,
    Three,
    quote,
    read_tokenizer,
    to_rgb,
)

TAG = re.compile(r"<\|image_(\d+)\|>")
CHAT_TOKEN = re.compile(r"<\|\w+\|>")
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MERGE = 2  # MERGE x MERGE neighbouring CLIP features become one image token
PHI_STOP_IDS = (32007, 32000)  # <|end|> and <|endoftext|>
PHI_CONFIG_EOS = (2, 32000)  # single ids of end of text in released configs of Phi-3, which are wrong or incomplete
IMAGE_TOKEN_ID = 32044  # <|image|>
PAD_TOKEN_ID = 32000  # <|endoftext|>


# ---- what is read from the files of a model
class VisionFields(msgspec.Struct, frozen=True):
    """The fields of vision_config that the processor needs; defaults as in `ClipVisionConfig`."""

    image_size: Pixels = 336
    patch_size: Pixels = 14


@dataclass
class ModelFields:
    """The fields of config.json that the processor needs; defaults as in `Phi3Config`."""

    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)] = 32064
    eos_token_id: TokenId | Annotated[list[TokenId], msgspec.Meta(min_length=1)] | None = None
    pad_token_id: TokenId | None = None
    image_token_id: TokenId = IMAGE_TOKEN_ID
    chat_start: str = "<|user|>\n"
    chat_end: str = "<|end|>\n<|assistant|>\n"
    vision_config: VisionFields = field(default_factory=VisionFields)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: `eos_token_id`, one or a list. Phi-3's own stop tokens replace its configs' wrong
        2 and incomplete 32000 if the vocabulary has them."""
        if isinstance(self.eos_token_id, list):
            return tuple(self.eos_token_id)
        is_phi3 = self.eos_token_id in PHI_CONFIG_EOS and self.vocab_size > max(PHI_STOP_IDS)
        return PHI_STOP_IDS if self.eos_token_id is None or is_phi3 else (self.eos_token_id,)

    @property
    def padding(self) -> int:
        """The id of the padding token."""
        default = PAD_TOKEN_ID if self.vocab_size > PAD_TOKEN_ID else 0
        return default if self.pad_token_id is None else self.pad_token_id


def flatten_config(data: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with the fields of its `text_config`, if it has one, at the top level.

    Raises UserError for a `text_config` that is no object.
    """
    nested = data.get("text_config") or {}
    if not isinstance(nested, dict):
        raise UserError(f"text_config is {nested!r:.80} where an object is expected: restore the file")
    return {**data, **{key: value for key, value in nested.items() if key != "model_type"}}


def read_model_fields(file: Path) -> ModelFields:
    """The fields of a config.json that the processor needs. Raises UserError naming the file and the field."""
    data = read_json(file)
    try:
        data = flatten_config(data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return read_config(ModelFields, {key: value for key, value in data.items() if value is not None}, str(file))


class ImageFields(msgspec.Struct):
    """The image settings of preprocessor_config.json. Defaults: those of Phi-3.5-vision."""

    num_crops: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    image_mean: Annotated[list[float], Three] = msgspec.field(default_factory=lambda: list(CLIP_MEAN))
    image_std: Annotated[list[Positive], Three] = msgspec.field(default_factory=lambda: list(CLIP_STD))


# ---- text
@dataclass(eq=False)
class Phi3Processor(Processor):
    """The tokenizer of a Phi-3 decoder with its chat layout; `Phi3VProcessor` adds images.

    `chat_start` and `chat_end` enclose a prompt; any of `stop_ids` ends an answer, the first is learned. `source`
    names the tokenizer in error messages. Raises UserError if the tokenizer does not have the tokens of the layout.
    """

    answers_boxes: ClassVar[bool] = False  # it has no location tokens
    image_size = num_image_tokens = 0  # no images
    image_token_id = None

    tokenizer: Tokenizer = field(repr=False)  # its repr is the whole vocabulary
    stop_ids: tuple[int, ...] = PHI_STOP_IDS
    pad_token_id: int = PAD_TOKEN_ID
    chat_start: str = "<|user|>\n"
    chat_end: str = "<|end|>\n<|assistant|>\n"
    source: str = "the tokenizer"

    def __post_init__(self):
        super().__post_init__()
        added = self.tokenizer.get_added_tokens_decoder().items()
        # the layout sets these; inside a user's text they would shift images, turns or labels
        self.reserved = {i: token.content for i, token in added if token.special}
        self.skipped = {*self.reserved, *self.stop_ids, self.pad_token_id, IGNORED_LABEL}  # by decode
        for token_id in (*self.stop_ids, self.pad_token_id):
            if self.tokenizer.id_to_token(token_id) is None:
                raise UserError(
                    f"{self.source}: has no token {token_id}, which config.json names: take both from one model"
                )
        self.check_chat_layout()
        frame = self.tokenizer.encode_batch([self.chat_start, self.chat_end], add_special_tokens=False)
        self.frame = Counter(i for part in frame for i in part.ids if i in self.reserved)  # special tokens of a turn

    def check_chat_layout(self) -> None:
        """Raise UserError unless each `<|...|>` of the chat layout is one token and the first of `chat_end` ends an
        answer: other models of model_type phi3, such as Phi-4, have another layout."""
        for name, text in (("chat_start", self.chat_start), ("chat_end", self.chat_end)):
            for token in CHAT_TOKEN.findall(text):
                if self.tokenizer.encode(token, add_special_tokens=False).ids != [self.tokenizer.token_to_id(token)]:
                    raise UserError(
                        f"{self.source}: {token} of {name} is not one token: set {name} in config.json to the chat "
                        "layout of the model"
                    )
        first = CHAT_TOKEN.search(self.chat_end)
        if first and self.tokenizer.token_to_id(first.group()) not in self.stop_ids:
            raise UserError(
                f"{self.source}: {first.group()} of chat_end is not a stop token (eos_token_id gives "
                f"{', '.join(map(str, self.stop_ids))}): set chat_start, chat_end and eos_token_id in config.json to "
                "those of the model"
            )

    @classmethod
    def from_pretrained(cls, path_or_hub_id: PathLike) -> "Phi3Processor":
        """Read tokenizer.json, config.json and the image settings, if any, of a model folder, run folder or hub id.

        Raises UserError for a missing or broken file, and for a tokenizer that does not match the config.
        """
        folder = base_folder(path_or_hub_id)
        config = read_model_fields(folder / "config.json")
        file = folder / "tokenizer.json"
        return cls(
            tokenizer=read_tokenizer(file),
            stop_ids=config.stop_ids,
            pad_token_id=config.padding,
            chat_start=config.chat_start,
            chat_end=config.chat_end,
            source=str(file),
            **cls.image_settings(folder, config),
        )

    @classmethod
    def image_settings(cls, folder: Path, config: ModelFields) -> dict:
        """The image arguments of the class, from the files of a model folder."""
        return {}

    def encode(self, prefix: str, suffix: str | None = None, images: int | Sequence[int] = 0) -> Row:
        """One prompt as (ids, token types): the user's turn, the answer, the first stop token.

        images: the number of image tokens of each image, or a number of images, each counted with the maximum.
        Raises UserError if a string contains a special token, for image tags other than `<|image_1|>`, `<|image_2|>`,
        ... in order, and for images if the model has no tower.
        """
        counts = [self.num_image_tokens] * images if isinstance(images, int) else list(images)
        prompt = self.add_tags(prefix.removeprefix(QUESTION_TASK), len(counts))
        # each part separately, with the <s> that tokenizer.json adds
        parts = [self.tokenizer.encode(part) for part in self.split(self.chat_start + prompt + self.chat_end)]
        written = (zip(part.ids, part.special_tokens_mask, strict=True) for part in parts)
        special = Counter(i for part in written for i, is_added in part if i in self.reserved and not is_added)
        self.check("prompt", prefix, special - self.frame)
        ids = []
        for part, count in zip(parts, (*counts, 0), strict=True):
            ids += part.ids + [self.image_token_id] * count
        answer = []
        if suffix is not None:  # after the newline of the turn, a leading blank has no meaning
            answer = self.tokenizer.encode(suffix.strip(), add_special_tokens=False).ids
            self.check("suffix", suffix, answer)
            answer = [*answer, self.stop_ids[0]]
        return ids + answer, [0] * len(ids) + [1] * len(answer)

    def add_tags(self, prompt: str, num_images: int) -> str:
        """The prompt with a tag for each image. Raises UserError for images: there is no tower."""
        if num_images:
            raise UserError(DECODER_ALONE_MESSAGE)
        return prompt

    def split(self, text: str) -> list[str]:
        """The parts of a text that are tokenised separately."""
        return [text]

    def check(self, role: str, text: str, ids: Iterable[int]) -> None:
        """Raise UserError if the ids of a user's text include a special token."""
        for token_id in ids:
            if token_id in self.reserved:
                token = self.reserved[token_id]
                raise UserError(f"{role} {quote(text.strip())} contains {token}, which the processor sets: remove it")

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """Number of image tokens of an image. Raises UserError: there is no tower."""
        raise UserError(DECODER_ALONE_MESSAGE)

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patches of an image. Raises UserError: there is no tower."""
        raise UserError(DECODER_ALONE_MESSAGE)

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """The model's inputs for one image. Raises UserError: there is no tower."""
        raise UserError(DECODER_ALONE_MESSAGE)


# ---- images
@dataclass(eq=False)
class Phi3VProcessor(Phi3Processor):
    """The processor of Phi-3-vision: an image becomes a global view of S x S pixels and up to `num_crops` crops."""

    image_token_id: int = IMAGE_TOKEN_ID
    crop_size: int = 336  # S
    patch_size: int = 14
    num_crops: int = 4
    image_mean: Sequence[float] = CLIP_MEAN
    image_std: Sequence[float] = CLIP_STD

    def __post_init__(self):
        super().__post_init__()
        self.reserved[self.image_token_id] = "<|image|>"
        self.skipped.add(self.image_token_id)
        self.tokens_per_side = self.crop_size // (MERGE * self.patch_size)  # of a crop
        self.num_image_tokens = self.count_grid_tokens(self.num_crops, 1)  # the maximum
        rows, columns = self.grid((1, 1))
        self.image_size = self.crop_size * columns  # of a square image, in pixels

    @classmethod
    def image_settings(cls, folder: Path, config: ModelFields) -> dict:
        file = folder / "preprocessor_config.json"
        settings = read_typed(file, ImageFields) if file.is_file() else ImageFields()
        vision = config.vision_config
        return msgspec.structs.asdict(settings) | {
            "image_token_id": config.image_token_id,
            "crop_size": vision.image_size,
            "patch_size": vision.patch_size,
        }

    def add_tags(self, prompt: str, num_images: int) -> str:
        """The prompt with a tag for each image: its own tags, or tags put in front. Raises UserError for tags
        other than `<|image_1|>`, `<|image_2|>`, ... once each in order: images go by position, not by number."""
        numbers = [int(number) for number in TAG.findall(prompt)]
        expected = list(range(1, num_images + 1))
        if numbers and numbers != expected:
            raise UserError(
                f"prompt {quote(prompt)} has image tags {numbers}, but there are {num_images} images: write each tag "
                "<|image_1|>, <|image_2|>, ... once, in this order, or none"
            )
        return prompt if numbers else "".join(f"<|image_{number}|>\n" for number in expected) + prompt

    def split(self, text: str) -> list[str]:
        return TAG.split(text)[::2]  # the odd entries are the numbers of the tags

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the crops of an image of this (width, height)."""
        return self.layout(size)[0]

    def layout(self, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """((rows, columns) of crops, (width, height) in pixels to which the image is resized before it is padded).

        As many columns (rows for an upright image) as `num_crops` allows: small images are enlarged. Raises UserError
        for an aspect ratio whose short side would be resized to 0 pixels.
        """
        width, height = size
        if width < height:
            (rows, columns), (new_width, new_height) = self.layout((height, width))
            return (columns, rows), (new_height, new_width)
        ratio = width / height
        columns = 1
        while (columns + 1) * math.ceil((columns + 1) / ratio) <= self.num_crops:
            columns += 1
        new_width = self.crop_size * columns
        new_height = int(new_width / ratio)
        if new_height == 0:
            raise UserError(f"an image of {width} x {height} pixels would be resized to a height of 0: crop it")
        return (math.ceil(new_height / self.crop_size), columns), (new_width, new_height)

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """N: number of image tokens of an image of this (width, height). Raises UserError, see `layout`."""
        return self.count_grid_tokens(*self.grid(size))

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens of all crops of an image of this (width, height), without line ends and global
        view. Raises UserError, see `layout`."""
        rows, columns = self.grid(size)
        return rows * self.tokens_per_side, columns * self.tokens_per_side

    def count_grid_tokens(self, rows: int, columns: int) -> int:
        """N: tokens of the crops and of the global view, one at the end of each of their lines, one between the two."""
        side = self.tokens_per_side
        return (rows * columns + 1) * side**2 + 1 + (rows + 1) * side

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """{"pixel_values" [num_crops + 1, 3, S, S] float32: the global view, the crops row by row, then zeros;
        "image_sizes" [2]: height and width in pixels of the grid of crops}.

        The image is resized and padded with white, a wide image above and below; an upright image is transposed for
        this and transposed back. The global view is made from the padded, normalised pixels. Bit-equal to the released
        code for images without transparency, which is composited onto white here. Raises UserError, see `layout`.
        """
        (rows, columns), resized = self.layout(image.size)
        image, side = to_rgb(image), self.crop_size
        is_upright = image.width < image.height
        if is_upright:
            image, resized = image.transpose(Image.Transpose.TRANSPOSE), resized[::-1]
        image = image.resize(resized, Image.Resampling.BILINEAR)
        canvas = Image.new("RGB", (image.width, math.ceil(image.height / side) * side), "white")
        canvas.paste(image, (0, (canvas.height - image.height) // 2))
        if is_upright:
            canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
        values = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous().float() / MAX_PIXEL
        mean, std = (torch.tensor(list(numbers))[:, None, None] for numbers in (self.image_mean, self.image_std))
        values = (values - mean) / std
        view = F.interpolate(values[None], size=(side, side), mode="bicubic")
        crops = values.unflatten(2, (columns, side)).unflatten(1, (rows, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)
        unused = torch.zeros(self.num_crops - rows * columns, 3, side, side)
        return {
            "pixel_values": torch.cat((view, crops, unused)),
            "image_sizes": torch.tensor([rows * side, columns * side]),
        }
