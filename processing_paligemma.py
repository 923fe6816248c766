"""Images and strings to tensors and back: the sequence layout of PaliGemma and its labels.

A row of a batch is, from left to right: padding, `<image>` x N M, `<bos>`, prefix and newline, then in training suffix
and `<eos>`. Tokenizer, PIL, numpy and torch are used directly, without transformers.

B batch, L sequence, n images in the batch, M images of one prompt, N image tokens per image, S side of the image in
pixels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from boxes import LOC_TOKENS
from checkpoint import base_folder
from config_fields import IGNORED_LABEL, PALIGEMMA_IMAGE_TOKEN_ID, Positive, TokenId
from errors import UserError
from files import PathLike, grey16_to_grey8, one_line, read_bytes, read_typed

ANSWER_TOKEN = re.compile(r"<loc\d{4}>|<seg\d{3}>")
MAX_PIXEL = 255  # of an 8-bit channel
MAX_QUOTE = 60  # characters of a user's text in an error message

Pixels = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
Row = tuple[list[int], list[int]]  # token ids and token types of one example


# ---- what is read from the files of a model
class VisionFields(msgspec.Struct, frozen=True):
    """The fields of vision_config that the processor needs; defaults as in `SiglipVisionConfig`."""

    image_size: Pixels = 224
    patch_size: Pixels = 14


class TextFields(msgspec.Struct, frozen=True):
    """Token ids inside text_config, where transformers 5 writes them."""

    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None


class ModelFields(msgspec.Struct):
    """The fields of config.json that the processor needs; defaults as in `PaliGemmaConfig.from_dict`."""

    image_token_index: TokenId | None = None  # older name of image_token_id
    image_token_id: TokenId | None = None
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    pad_token_id: TokenId | None = None
    text_config: TextFields = TextFields()
    vision_config: VisionFields = VisionFields()

    def token_ids(self) -> dict[str, int]:
        """The four ids as arguments of `PaliGemmaProcessor`."""
        image_ids = (self.image_token_index, self.image_token_id, PALIGEMMA_IMAGE_TOKEN_ID)
        ids = {"image_token_id": next(i for i in image_ids if i is not None)}
        for name, default in (("bos_token_id", 2), ("eos_token_id", 1), ("pad_token_id", 0)):
            values = (getattr(self, name), getattr(self.text_config, name), default)
            ids[name] = next(i for i in values if i is not None)
        return ids


Three = msgspec.Meta(min_length=3, max_length=3)  # one number per channel


class ImageFields(msgspec.Struct):
    """The image settings of preprocessor_config.json, or of "image_processor" in processor_config.json."""

    size: dict[str, int] | None = None
    image_mean: Annotated[list[float], Three] | None = None
    image_std: Annotated[list[Positive], Three] | None = None
    rescale_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None


class ProcessorFields(msgspec.Struct):
    image_processor: ImageFields | None = None


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises UserError naming the file if it is missing or broken."""
    raw = read_bytes(path)
    try:
        return Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: broken tokenizer ({one_line(error):.200}): restore the file") from error


def read_image_settings(folder: Path, image_size: int) -> dict:
    """The image settings of a model folder as arguments of `PaliGemmaProcessor`.

    transformers 4 writes preprocessor_config.json, version 5 a section of processor_config.json. Raises UserError for a
    value of the wrong type or out of range, and if images are resized to a size other than `image_size`.
    """
    settings = ImageFields()
    if (folder / "preprocessor_config.json").is_file():
        settings = read_typed(folder / "preprocessor_config.json", ImageFields)
    elif (folder / "processor_config.json").is_file():
        settings = read_typed(folder / "processor_config.json", ProcessorFields).image_processor or settings
    size = {"height": image_size, "width": image_size}
    if settings.size and settings.size != size:
        raise UserError(
            f"{folder}: images are resized to {settings.size} but config.json says image_size {image_size}: correct one"
        )
    names = ("image_mean", "image_std", "rescale_factor", "resample")
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


# ---- images
def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, with transparency composited onto white as in transformers 5.23 (5.17 drops it).

    16-bit grey, mode I;16 or mode I above 255, is scaled to 8 bits; PIL, and so transformers, clips it to white.
    """
    image = grey16_to_grey8(image)
    if image.mode == "La":  # PIL converts it to LA only; transformers fails
        image = image.convert("LA")
    if image.has_transparency_data and image.mode != "RGBa":  # transformers drops the transparency of RGBa
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- the processors
class Processor:
    """What the processors of all families share: batches of images, prompts and answers, and the text of token ids.

    A family sets the attributes below and implements `encode`, `count_image_tokens`, `patch_grid` and `image_inputs`.
    """

    answers_boxes: ClassVar[bool]  # whether its tokens include locations
    tokenizer: Tokenizer
    pad_token_id: int
    skipped: set[int]  # left out by decode: special tokens and IGNORED_LABEL

    def __post_init__(self):
        self.tokenizer.no_padding()  # tokenizer.json may have both enabled
        self.tokenizer.no_truncation()

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image | Sequence[Image.Image]] | None,
        text: str | Sequence[str],
        suffix: str | Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Images and prompts as one batch, padded on the left.

        images: one PIL image per prompt, a list of images per prompt, or None. text: B prompts. suffix: B answers, for
        training only; leave them out for generation. A single string or image is a batch of one.

        Returns input_ids, attention_mask, token_type_ids (1 on the answer and its stop token, else 0), all [B, L]
        int64; what `image_inputs` returns for every image, stacked; with a suffix labels [B, L] (-100 outside the
        answer and its stop token). Raises UserError for lists of unequal length, and for what `encode` refuses.
        """
        text = [text] if isinstance(text, str) else list(text)
        suffixes = [suffix] if isinstance(suffix, str) else [None] * len(text) if suffix is None else list(suffix)
        images = [images] if isinstance(images, Image.Image) else [[]] * len(text) if images is None else images
        images = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in images]
        if not len(images) == len(text) == len(suffixes):
            counts = f"{len(images)} images or lists of images, {len(text)} prompts, {len(suffixes)} suffixes"
            raise UserError(f"{counts}: give one of each per prompt; several images of one prompt go in a list")
        rows = [
            self.encode(prompt, answer, [self.count_image_tokens(image.size) for image in group])
            for prompt, answer, group in zip(text, suffixes, images, strict=True)
        ]
        return self.pad(rows) | stack_inputs([self.image_inputs(image) for group in images for image in group])

    def encode(self, prefix: str, suffix: str | None = None, images: int | Sequence[int] = 0) -> Row:
        """One prompt as (ids, token types): the prompt, its answer, a stop token. `images`: the number of image tokens
        of each image, or a number of images. Raises UserError if a string contains a token that the layout sets."""
        raise NotImplementedError

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """Number of image tokens of an image of this (width, height)."""
        raise NotImplementedError

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the image tokens that are patches of an image of this (width, height)."""
        raise NotImplementedError

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """The model's inputs for one image, without a batch dimension."""
        raise NotImplementedError

    def pad(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows of `encode` as a batch, see `pad_rows`."""
        return pad_rows(rows, self.pad_token_id)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """One row of ids [L] as text. Skipping drops special tokens and labels of -100; `<loc....>` and `<seg...>`
        stay, since they are part of an answer."""
        ids = torch.as_tensor(ids).tolist()
        shown = [i for i in ids if i not in self.skipped] if skip_special_tokens else ids
        return self.tokenizer.decode(shown, skip_special_tokens=False)

    def batch_decode(self, ids: Sequence[Sequence[int]] | Tensor, skip_special_tokens: bool = True) -> list[str]:
        """Rows of ids [B, L] as B texts."""
        rows = ids.tolist() if isinstance(ids, Tensor) else ids  # one copy from the device
        return [self.decode(row, skip_special_tokens) for row in rows]


@dataclass(eq=False)
class PaliGemmaProcessor(Processor):
    """Turns images and prompts into the tensors that PaliGemma takes, and token ids back into text.

    `image_size` and `patch_size` are in pixels; the ids are those of the model's config. `source` names the tokenizer
    in error messages. Raises UserError if the tokenizer and the ids do not match.
    Source: transformers' PaliGemmaProcessor and SiglipImageProcessorPil, 5.23.
    """

    answers_boxes: ClassVar[bool] = True

    tokenizer: Tokenizer = field(repr=False)  # its repr is the whole vocabulary
    image_token_id: int
    image_size: int = 224
    patch_size: int = 14
    bos_token_id: int = 2
    eos_token_id: int = 1
    pad_token_id: int = 0
    image_mean: Sequence[float] = (0.5, 0.5, 0.5)
    image_std: Sequence[float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / MAX_PIXEL
    resample: int = Image.Resampling.BICUBIC
    source: str = "the tokenizer"

    def __post_init__(self):
        super().__post_init__()
        self.num_image_tokens = (self.image_size // self.patch_size) ** 2  # N
        # The layout sets these four; inside a user's text they would shift images or labels.
        self.reserved = {
            "<image>": self.image_token_id,
            "<bos>": self.bos_token_id,
            "<eos>": self.eos_token_id,
            "<pad>": self.pad_token_id,
        }
        self._check_tokenizer()
        added = self.tokenizer.get_added_tokens_decoder().items()
        special = {i for i, token in added if token.special and not ANSWER_TOKEN.fullmatch(token.content)}
        self.skipped = {*self.reserved.values(), *special, IGNORED_LABEL}  # by decode, which returns boxes and masks

    @classmethod
    def from_pretrained(cls, path_or_hub_id: PathLike) -> "PaliGemmaProcessor":
        """Read tokenizer.json, config.json and the image settings, if any, of a model folder, run folder or hub id.

        Raises UserError for a missing or broken file, and for a tokenizer that does not match the config.
        """
        folder = base_folder(path_or_hub_id)
        config = read_typed(folder / "config.json", ModelFields)
        vision = config.vision_config
        return cls(
            tokenizer=read_tokenizer(folder / "tokenizer.json"),
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            source=str(folder / "tokenizer.json"),
            **config.token_ids(),
            **read_image_settings(folder, vision.image_size),
        )

    def encode(self, prefix: str, suffix: str | None = None, images: int | Sequence[int] = 1) -> Row:
        """One prompt as (ids, token types): `<image>` x N M, bos, prefix, newline, suffix, eos.

        images: M, or the number of image tokens of each image.
        Raises UserError if a string contains `<image>`, `<bos>`, `<eos>` or `<pad>`.
        """
        # One string, as in transformers. big_vision tokenizes "\n" separately: other ids if prefix ends in a newline.
        prompt = [self.bos_token_id, *self._tokenize("prompt", prefix + "\n")]
        answer = [] if suffix is None else [*self._tokenize("suffix", suffix), self.eos_token_id]
        if not isinstance(images, int) and len(images) == 0:
            raise UserError(f"prompt {quote(prefix)} has no image, which PaliGemma needs: give it at least one")
        tokens = images * self.num_image_tokens if isinstance(images, int) else sum(images)
        prefix_ids = [self.image_token_id] * tokens + prompt
        return prefix_ids + answer, [0] * len(prefix_ids) + [1] * len(answer)

    def count_image_tokens(self, size: tuple[int, int]) -> int:
        """Number of image tokens of an image of this (width, height): always N."""
        return self.num_image_tokens

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the image tokens: always a square, since images are resized to one."""
        side = self.image_size // self.patch_size
        return side, side

    def image_inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """The model's inputs for one image, without a batch dimension."""
        return {"pixel_values": self.pixels(image)}

    def pixels(self, image: Image.Image) -> Tensor:
        """One PIL image as [3, S, S] float32 in -1..1: RGB, resized without regard to its aspect ratio, normalized.

        The EXIF orientation is ignored, as in transformers.
        """
        resized = to_rgb(image).resize((self.image_size, self.image_size), self.resample)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous() * self.rescale_factor
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return (values - mean[:, None, None]) / std[:, None, None]

    def _tokenize(self, role: str, text: str) -> list[int]:
        """Ids of a prompt or suffix. Raises UserError if they include a token that the layout sets."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for token, token_id in self.reserved.items():
            if token_id in ids:
                raise UserError(f"{role} {quote(text.strip())} contains {token}, which the processor sets: remove it")
        return ids

    def _check_tokenizer(self) -> None:
        """Raise UserError unless the special tokens have the ids in the config and each location is one token.

        Otherwise the model would silently train and answer with wrong tokens.
        """
        fix = "take tokenizer.json and config.json from one PaliGemma model"
        for token, token_id in self.reserved.items():
            ids = self.tokenizer.encode(token, add_special_tokens=False).ids
            if ids != [token_id]:
                raise UserError(f"{self.source}: {token} becomes {ids}, config.json says {token_id}: {fix}")
        if self.tokenizer.encode("".join(LOC_TOKENS), add_special_tokens=False).tokens != LOC_TOKENS:
            raise UserError(f"{self.source}: <loc0000> .. <loc1023> are not one token each: {fix}")


def pad_rows(rows: Sequence[Row], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of ids and token types, padded on the left: input_ids, attention_mask, token_type_ids, and labels if any row
    has a suffix, [B, L]. Raises UserError if there are no rows."""
    if not rows:
        raise UserError("a batch without prompts: give at least one")
    shape = len(rows), max(len(ids) for ids, _ in rows)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask, token_type_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, (ids, types) in enumerate(rows):
        start = shape[1] - len(ids)
        input_ids[row, start:] = torch.tensor(ids)
        token_type_ids[row, start:] = torch.tensor(types)
        attention_mask[row, start:] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    if token_type_ids.any():  # a suffix has at least its <eos>
        batch["labels"] = input_ids.masked_fill(token_type_ids == 0, IGNORED_LABEL)
    return batch


def stack_inputs(inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The `image_inputs` of several images, stacked along a batch dimension; {} without images."""
    return {name: torch.stack([one[name] for one in inputs]) for name in (inputs[0] if inputs else {})}


def quote(text: str) -> str:
    """A user's text, shortened, for a one-line message."""
    return repr(text if len(text) <= MAX_QUOTE else text[: MAX_QUOTE - 3] + "...")
