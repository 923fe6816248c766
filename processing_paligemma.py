"""Pictures and strings to tensors and back: the PaliGemma sequence layout, its labels, and boxes as location tokens.

One row of a batch reads, from left to right: `<image>` x N M, `<bos>`, prefix and newline, then in training suffix and
`<eos>`. Tokenizer, PIL, numpy and torch are used directly: a processor costs no transformers import.

Shapes: B batch, L sequence, I pictures in the batch, M pictures of one prompt, N image tokens of one picture,
S picture side in pixels.
"""

import re
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from checkpoint import locate, resolve_run
from errors import UserError
from files import one_line, open_image, read_json  # noqa: F401
from modeling_gemma import PaliGemmaConfig

IGNORE = -100  # the label that the loss skips
LOC_STEPS = 1024  # <loc0000> .. <loc1023>: a coordinate is a fraction of the picture's side in 1024 steps
LOC_TOKENS = [f"<loc{step:04d}>" for step in range(LOC_STEPS)]
ANSWER_TOKEN = re.compile(r"<loc\d{4}>|<seg\d{3}>")
DETECTION = re.compile(r"\s*((?:<loc\d{4}>){4})(?:<seg\d{3}>)*([^<]*)")


@dataclass(eq=False)
class PaliGemmaProcessor:
    """Turns pictures and prompts into the tensors that PaliGemma takes, and token ids back into text.

    `image_size` and `patch_size` are in pixels; the ids are those of the model's config. `source` names the tokenizer
    in error messages. Raises UserError where the tokenizer and the ids do not belong together.
    Source: transformers' PaliGemmaProcessor and SiglipImageProcessorPil, 5.23.
    """

    tokenizer: Tokenizer = field(repr=False)  # its repr is the whole vocabulary
    image_token_id: int
    image_size: int = 224
    patch_size: int = 14
    bos_token_id: int = 2
    eos_token_id: int = 1
    pad_token_id: int = 0
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    resample: int = Image.Resampling.BICUBIC
    source: str = "the tokenizer"

    def __post_init__(self):
        self.tokenizer.no_padding()  # a tokenizer.json can carry both from an earlier use
        self.tokenizer.no_truncation()
        self.num_image_tokens = (self.image_size // self.patch_size) ** 2  # N
        # The layout sets these four by place; met inside a user's text, they would shift every picture or label.
        self.reserved = {
            "<image>": self.image_token_id,
            "<bos>": self.bos_token_id,
            "<eos>": self.eos_token_id,
            "<pad>": self.pad_token_id,
        }
        self._check_tokenizer()
        added = self.tokenizer.get_added_tokens_decoder().items()
        special = {i for i, token in added if token.special and not ANSWER_TOKEN.fullmatch(token.content)}
        self.skipped = {*self.reserved.values(), *special, IGNORE}  # by decode; boxes and masks stay, as answers

    @classmethod
    def from_pretrained(cls, path_or_hub_id):
        """Reads tokenizer.json, config.json and the picture settings, if any, of a model folder, run folder or hub id.

        Raises UserError for a missing or broken file, and for a tokenizer that is not the one of the config.
        """
        base, _ = resolve_run(path_or_hub_id)
        folder = locate(base)
        config = PaliGemmaConfig.from_pretrained(base)  # the model's own reading, so that the two cannot disagree
        return cls(
            tokenizer=read_tokenizer(folder / "tokenizer.json"),
            image_token_id=config.image_token_id,
            image_size=config.vision_config.image_size,
            patch_size=config.vision_config.patch_size,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            source=str(folder / "tokenizer.json"),
            **read_picture_settings(folder, config.vision_config.image_size),
        )

    def __call__(self, images, text, suffix=None, padding_side="left", max_length=None):
        """Pictures and prompts to one batch.

        images: a list with one PIL picture per prompt, or with a list of pictures per prompt. text: list of B prefixes.
        suffix: list of B answers, in training only: a batch to generate from must not hold them. One picture with one
        string is a batch of one. max_length: the most tokens of a row, `<image>` not counted.

        Returns input_ids, attention_mask, token_type_ids (1 on suffix and `<eos>`, else 0), all [B, L] int64;
        pixel_values [I, 3, S, S] float32; with a suffix labels [B, L] (-100 off the suffix and its `<eos>`).
        Raises UserError for lists of unequal length, a prompt without picture, and whatever `encode` refuses.
        """
        text = [text] if isinstance(text, str) else list(text)
        suffix = [suffix] if isinstance(suffix, str) else suffix
        images = [images] if isinstance(images, Image.Image) else images
        images = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in images]
        suffixes = [None] * len(text) if suffix is None else list(suffix)
        if not len(images) == len(text) == len(suffixes):
            counts = f"{len(images)} pictures or lists of pictures, {len(text)} prompts, {len(suffixes)} suffixes"
            raise UserError(f"{counts}: give one of each per prompt; several pictures of one prompt go in a list")
        if [] in images:
            raise UserError(f"prompt {_quote(text[images.index([])])} has no picture: give it at least one")
        rows = [
            self.encode(prefix, answer, len(pictures), max_length)
            for prefix, answer, pictures in zip(text, suffixes, images, strict=True)
        ]
        pixels = [self.pixels(image) for pictures in images for image in pictures]
        return {**self.pad(rows, padding_side), "pixel_values": torch.stack(pixels)}

    def encode(self, prefix, suffix=None, num_images=1, max_length=None):
        """One prompt to (ids, token types), two lists of ints: `<image>` x N M, bos, prefix newline, suffix eos.

        Raises UserError if a string holds `<image>`, `<bos>`, `<eos>` or `<pad>`, or if there are more than max_length
        tokens beside the `<image>` ones: nothing is ever cut.
        """
        # One string, as transformers has it. big_vision tokenises "\n" apart, which differs after a prefix in newline.
        prompt = [self.bos_token_id, *self._tokens("prompt", prefix + "\n")]
        answer = [] if suffix is None else [*self._tokens("suffix", suffix), self.eos_token_id]
        if max_length is not None and len(prompt) + len(answer) > max_length:
            lengths = f"{len(prompt)} tokens and its suffix {len(answer)}, more than max_length {max_length} together"
            raise UserError(f"prompt {_quote(prefix)} has {lengths}: shorten it or raise max_length")
        front = [self.image_token_id] * (num_images * self.num_image_tokens) + prompt
        return front + answer, [0] * len(front) + [1] * len(answer)

    def pad(self, rows, padding_side="left"):
        """Rows of `encode` to input_ids, attention_mask, token_type_ids, and labels if any row has a suffix: [B, L]."""
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side {padding_side!r}: choose left or right")
        shape = len(rows), max(len(ids) for ids, _ in rows)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask, token_type_ids = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        for row, (ids, types) in enumerate(rows):
            place = slice(len(ids)) if padding_side == "right" else slice(shape[1] - len(ids), None)
            input_ids[row, place] = torch.tensor(ids)
            token_type_ids[row, place] = torch.tensor(types)
            attention_mask[row, place] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        if token_type_ids.any():  # a suffix has at least its <eos>
            batch["labels"] = input_ids.masked_fill(token_type_ids == 0, IGNORE)
        return batch

    def pixels(self, image):
        """One PIL picture to [3, S, S] float32 in -1..1: RGB, resized without regard to its aspect ratio, normalised.

        An EXIF orientation is not applied, as in transformers.
        """
        resized = to_rgb(image).resize((self.image_size, self.image_size), self.resample)
        values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous() * self.rescale_factor
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return (values - mean[:, None, None]) / std[:, None, None]

    def decode(self, ids, skip_special_tokens=True):
        """One row of ids, list or tensor [L], to text. Skipping drops `<image>`, bos, eos, pad and labels of -100, and
        keeps `<loc....>` and `<seg...>`, since they are the answer."""
        ids = torch.as_tensor(ids).tolist()
        kept = [i for i in ids if i not in self.skipped] if skip_special_tokens else ids
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def batch_decode(self, ids, skip_special_tokens=True):
        """Rows of ids, a list of lists or a tensor [B, L], to a list of B texts."""
        return [self.decode(row, skip_special_tokens) for row in ids]

    def _tokens(self, role, text):
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        for token, token_id in self.reserved.items():
            if token_id in ids:
                raise UserError(f"{role} {_quote(text.strip())} holds {token}, which the processor sets: remove it")
        return ids

    def _check_tokenizer(self):
        """An id of the wrong token, or a location split into characters, would train and answer without an error."""
        mend = "take tokenizer.json and config.json from one PaliGemma model"
        for token, token_id in self.reserved.items():
            ids = self.tokenizer.encode(token, add_special_tokens=False).ids
            if ids != [token_id]:
                raise UserError(f"{self.source}: {token} becomes {ids}, config.json says {token_id}: {mend}")
        if self.tokenizer.encode("".join(LOC_TOKENS), add_special_tokens=False).tokens != LOC_TOKENS:
            raise UserError(f"{self.source}: <loc0000> .. <loc1023> are not one token each: {mend}")


def read_tokenizer(path):
    """tokenizer.json to a Tokenizer; UserError naming the file if it is missing or broken."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a PaliGemma folder holds its tokenizer as tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: broken tokenizer ({one_line(error)}); copy it anew") from error


def read_picture_settings(folder, image_size):
    """Image settings of a model folder as constructor arguments; UserError if they resize to another image_size.

    Up to version 4 transformers writes preprocessor_config.json, version 5 a part of processor_config.json.
    """
    settings = {}
    if (folder / "preprocessor_config.json").is_file():
        settings = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor") or {}
    size = settings.get("size") or {"height": image_size, "width": image_size}
    if size != {"height": image_size, "width": image_size}:
        raise UserError(f"{folder}: pictures are resized to {size}, config.json says image_size {image_size}: mend one")
    names = ("image_mean", "image_std", "rescale_factor", "resample")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def to_rgb(image):
    """A PIL picture of any mode to RGB, transparency composed onto white as transformers 5.23 does (5.17 drops it).

    16-bit grey, mode I;16 or mode I beyond 255, is scaled to 8 bit: PIL, and so transformers, clips it to white.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32)
        scale = 257 if image.mode != "I" or grey.max() > 255 else 1
        image = Image.fromarray((grey / scale).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def boxes_to_locs(boxes, labels, width, height):
    """Boxes (x0, y0, x1, y1) in pixels and their labels to PaliGemma's answer, in the order y0, x0, y1, x1:
    "<loc0102><loc0204><loc0512><loc0820> cat ; ...". width, height: the picture's, in pixels. A label holds no ";"."""

    def loc(coordinate, side):
        return LOC_TOKENS[min(max(round(coordinate / side * LOC_STEPS), 0), LOC_STEPS - 1)]

    return " ; ".join(
        f"{loc(y0, height)}{loc(x0, width)}{loc(y1, height)}{loc(x1, width)} {label}"
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True)
    )


def locs_to_boxes(text, width, height):
    """A detection or segmentation answer to [((x0, y0, x1, y1) in pixels, label)]; malformed parts are skipped."""
    found = []
    for match in map(DETECTION.fullmatch, text.split(";")):
        steps = [int(step) for step in re.findall(r"\d{4}", match[1])] if match else []
        if steps and max(steps) < LOC_STEPS:
            y0, x0, y1, x1 = (step / LOC_STEPS for step in steps)
            found.append(((x0 * width, y0 * height, x1 * width, y1 * height), match[2].strip()))
    return found


def _quote(text):
    """A user's string as it stands in a one-line message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
