"""Pretrain assets/paligemma-nano or assets/phi-nano: a small model that captions and detects the images of
assets/haystack-pool.

    python assets/pretrain.py                 # over an hour on a CPU; continues from its last checkpoint after a kill
    python assets/pretrain.py --family=phi

As in PaliGemma, the vision tower is trained first, here to classify the concepts; then the whole model learns
`caption en`, `detect {caption}` and `ocr` (for the digits and the words of questions, which no caption contains). It
never sees the needle task. An image shows one drawing of the pool or a grid of them on a varied background. Its caption
names all of them, row by row, because with only one caption per image the loss does not fall for a long time. `detect`
starts with a few concepts, whose number doubles each time it succeeds; with all concepts from the start it stays at
chance.

Phi's decoder is causal: its image tokens come before the prompt and cannot see it, which makes `detect` among sixteen
cells hard. Two losses of `PhiTask` help: one teaches a head where to look, the other keeps the position of
each image token readable.

B batch, N grid cells per side, n images in the pool, S image side in pixels, P patches, C hidden size, V vocabulary.
"""

import contextlib
import json
import math
import os
import random
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageDraw, ImageFont
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config_fields import IGNORED_LABEL  # noqa: E402
from errors import UserError, one_line_errors  # noqa: E402
from files import write_json  # noqa: E402
from haystack import PoolImage, read_pool  # noqa: E402
from modeling_clip import ClipVisionConfig  # noqa: E402
from modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration  # noqa: E402
from modeling_phi3 import MERGE, Phi3Config, Phi3TextConfig, Phi3VForCausalLM  # noqa: E402
from modeling_siglip import SiglipVisionConfig  # noqa: E402
from needle_eval.statistics import wilson  # noqa: E402
from processing_paligemma import PaliGemmaProcessor  # noqa: E402
from processing_phi3v import CLIP_MEAN, CLIP_STD, Phi3VProcessor  # noqa: E402

# Needle questions, so that the tokenizer encodes their words in few tokens; the model never sees the questions here.
INSTRUCTIONS = [
    "answer en where is red apple?",
    "Given 1 image indexed from 1 to 1, each divided into 2*2 subimages, identify the subimage that best matches the "
    "provided caption. Respond with 'index, row, column' and nothing else. For example, '1, 2, 3' indicates the "
    "subimage in the first image, second row, and third column. If no match is found, respond only with "
    "'-1'.\nCaption: ",
    "Given 10 images indexed from 1 to 10, each divided into 4*4 subimage, identify the subimages that best match the "
    "provided 2 captions. Respond in the format: index_1, row_1, column_1 and nothing else. For example, '1, 2, 3' "
    "indicates the subimage in the first image, second row, and third column. If no match is found, respond only with "
    "'-1'.\nCaption: ",
    "Only provide this information. If no subimage matches a caption, respond with '-1' for that caption.\nCaption_1: ",
    "Where is the caption? Top or Bottom? Left or Right? Is there a dog in the image? "
    "yes no answer question describe ocr",
]
WORDS = sorted({w for text in INSTRUCTIONS for w in re.findall(r"[A-Za-z]+", text)} | {"Yes", "No"})
MAY_CHANGE = ("work_dir", "output_dir", "save_every", "eval_every", "eval_samples")  # when a run continues
SEED_STRIDE = 1_000_003  # neighbouring seeds draw different batches
LATTICE = 16  # steps per image side: drawings are placed on this lattice, so that a box has few distinct coordinates
NUM_CROPS = 4  # of phi-nano
PHI_WIDTH = 192  # hidden size of phi-nano's tower and decoder
GUIDED_LAYER = 3  # of Phi's six, counted from 0: those before it match names with drawings, those after it write boxes
FAR = -1e9  # score of masked positions: minus infinity has no gradient
BOX = re.compile(r"(\d+), (\d+), (\d+), (\d+)$")  # at the end of an answer of phi-nano
STEPS = {"paligemma": 3800, "phi": 4500}
GRID_WEIGHTS = {"paligemma": (0.15, 0.5, 0.35), "phi": (0.1, 0.35, 0.55)}

README = """# {name}

{what}
Trained from random weights on the images of `../haystack-pool` by

```
{command}
```

which is seeded and continues when it is started again. It learned `caption en` (every drawing of a grid, row by row),
`detect {{caption}}` and `ocr`, and **not** the needle task. `pretraining.json` holds the hyperparameters and
the figures below. Training used the styles `fluent` and `twemoji` of 200 concepts; the style `noto` and 60 concepts
were left out.

Percent right on arrangements made for this table, n = {n} images each, 95 % Wilson intervals. `caption`: cells named
exactly; `detect`: centre of the box in the right cell, one search per image; `ocr`: the whole text read.

| | {columns} |
|{rule}
{rows}

Guessing finds 100, 25 and 6.25 % of the cells; a concept that was never trained can neither be named nor found.

Made by this project, Apache-2.0; the images' licences are in `../haystack-pool/LICENSES`. {end}
"""
PALIGEMMA = """\
A PaliGemma of {parameters} parameters in transformers' own format (bf16): SigLIP and Gemma 1 with {layers} layers of
width {width}, images of {image} px in patches of {patch} ({tokens} image tokens), {vocabulary} embedding rows."""
PALIGEMMA_END = """transformers loads it:
`PaliGemmaForConditionalGeneration.from_pretrained("assets/paligemma-nano")`."""
PHI = """\
A Phi-3-vision of {parameters} parameters in the hub's format (bf16): CLIP and Phi-3 with {layers} layers of width
{width} ({heads} query heads and as many key heads; CLIP's last layer is stored but never run), crops of {image} px in
patches of {patch}, at most {crops} crops and a global view ({tokens} image tokens for a square image), {vocabulary}
embedding rows, longrope beyond {original} positions (never trained). A box is four plain numbers after a name: left,
top, right and bottom edge in percent of the image."""
PHI_END = "transformers has\nclasses for the tower and the decoder, but none for the whole model."


@dataclass
class Config:
    family: Literal["paligemma", "phi"] = "paligemma"  # paligemma-nano or phi-nano
    # --- data
    seed: int = 0  # seed of weights, data and augmentation
    batch_size: int = 32  # images per step; all are captioned, half are also searched `queries` times
    queries: int = 3  # `detect` prompts per searched image
    pages: int = 8  # images of a word or number per step, for `ocr`
    grids: tuple[int, ...] = (1, 2, 4)  # cells per side, one drawn per step with the weights below
    grid_weights: tuple[float, ...] = ()  # probabilities of the grids; empty: those of GRID_WEIGHTS
    first_concepts: int = 8  # concepts that `detect` starts with
    grow_at: float = 0.75  # smoothed accuracy of `detect` at which the number of concepts doubles
    # --- optimisation
    tower_steps: int = 1200  # steps of the vision tower alone, which classifies the concept of each cell
    steps: int = 0  # total steps, the tower's included; 0: those of STEPS
    lr: float = 3e-3  # of Muon, for the layers' matrices; linear warm-up, cosine to a tenth
    adam_lr: float = 1e-3  # of AdamW, for embeddings, norms and biases, on the same schedule
    warmup: int = 100  # steps
    probe_weight: float = 0.5  # weight of the tower's own loss once the whole model trains
    ocr_weight: float = 0.5  # weight of the `ocr` loss
    guide_weight: float = 0.5  # weight of Phi's attention and position losses
    weight_decay: float = 0.05  # of the matrices
    bf16: bool = True  # autocast; weights stay float32
    # --- run
    eval_every: int = 500  # steps
    save_every: int = 250  # steps
    eval_samples: int = 256  # images of each evaluation during training
    work_dir: str = ""  # checkpoint and metrics; empty: runs/pretrain_{family}
    output_dir: str = ""  # the finished model; empty: assets/{family}-nano


# ---- models and their tokenizers
def train_bpe(texts: list[str], special: list[str], normalizer, decoder) -> Tokenizer:
    """BPE with byte fallback, blanks as U+2581 and separate digits, as in Gemma and Phi-3; `special` comes first."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|\d|[^\w\s▁]"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[*special, "\n", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # bytes and the newline are ordinary tokens: decoding must not drop them
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(data))


def build_tokenizer(texts: list[str]) -> Tokenizer:
    """A Gemma-shaped tokenizer: <loc>, <seg> and <image> come after the text tokens."""
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = train_bpe(texts, ["<pad>", "<eos>", "<bos>", "<unk>"], normalizers.Replace(" ", "▁"), decoder)
    locs = [f"<loc{i:04d}>" for i in range(1024)] + [f"<seg{i:03d}>" for i in range(128)]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in locs])
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False)])
    return tokenizer


def build_phi_tokenizer(texts: list[str]) -> Tokenizer:
    """A Phi-3-shaped tokenizer: every part starts with `<s>` and a blank; the tokens of the chat layout come after the
    text tokens."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer = train_bpe(texts, ["<unk>", "<s>", "</s>"], normalizer, decoders.Sequence(steps))
    for token in ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>", "<|image|>"):
        swallows_blanks = token in ("<|assistant|>", "<|image|>")  # to their right
        tokenizer.add_special_tokens([AddedToken(token, rstrip=swallows_blanks, normalized=False)])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return tokenizer


def padded_vocabulary(tokenizer: Tokenizer) -> int:
    """Number of embedding rows: the vocabulary size, rounded up to a multiple of 64."""
    return -(-tokenizer.get_vocab_size() // 64) * 64


def nano_config(tokenizer: Tokenizer) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        text_config=GemmaConfig(
            vocab_size=padded_vocabulary(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=2048,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=128,
            patch_size=16,
        ),
        image_token_id=tokenizer.token_to_id("<image>"),
    )


def phi_nano_config(tokenizer: Tokenizer) -> Phi3Config:
    """A square image has 2 x 2 crops; in a grid of 4 x 4, a cell is then one image token of 2 x 2 patches."""
    head_dim = 48
    return Phi3Config(
        text_config=Phi3TextConfig(
            vocab_size=padded_vocabulary(tokenizer),
            hidden_size=PHI_WIDTH,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=head_dim,
            max_position_embeddings=8192,
            original_max_position_embeddings=2048,
            short_factor=(1.0,) * (head_dim // 2),
            long_factor=tuple(1 + 3 * i / (head_dim // 2 - 1) for i in range(head_dim // 2)),
        ),
        vision_config=ClipVisionConfig(
            hidden_size=PHI_WIDTH,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=4,
            image_size=112,
            patch_size=28,
        ),
        model_type="phi3_v",
        image_token_id=tokenizer.token_to_id("<|image|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
        bos_token_id=tokenizer.token_to_id("<s>"),
        stop_ids=(tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|endoftext|>")),
        learning_rate=2e-3,
    )


def make_model(family: str, pool: list[PoolImage]):
    """(model with random weights, its processor, its `Task` class)."""
    captions = sorted({p.caption for p in pool})
    texts = [text for c in captions for text in (c, f"detect {c}", f"a, {c}")]
    texts += ["caption en\n", *INSTRUCTIONS]
    if family == "paligemma":
        tokenizer = build_tokenizer(texts)
        config = nano_config(tokenizer)
        vision = config.vision_config
        processor = PaliGemmaProcessor(tokenizer, config.image_token_id, vision.image_size, vision.patch_size)
        return PaliGemmaForConditionalGeneration(config), processor, Task
    tokenizer = build_phi_tokenizer(texts)
    config = phi_nano_config(tokenizer)
    processor = Phi3VProcessor(
        tokenizer,
        config.stop_ids,
        config.pad_token_id,
        image_token_id=config.image_token_id,
        crop_size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        num_crops=NUM_CROPS,
    )
    return Phi3VForCausalLM(config), processor, PhiTask


# ---- images
def drawings(images: list[PoolImage], side: int) -> Tensor:
    """RGBA drawings [n, 4, side, side] in 0..1, colours premultiplied so that resampling leaves no fringe."""
    arrays = [np.asarray(p.open().resize((side, side), Image.Resampling.LANCZOS), np.float32) / 255 for p in images]
    rgba = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)


def background(generator: torch.Generator, batch: int, grid: int, side: int) -> Tensor:
    """Flat, per-cell, smooth or blotchy colours [B, 3, S, S], one kind per call."""
    kind = int(torch.randint(4, (), generator=generator))
    blocks = (1, grid, 2, 8)[kind]
    colours = torch.rand(batch, 3, blocks, blocks, generator=generator)
    if kind == 3:  # many strong colours would hide the drawings
        colours = colours.mean((2, 3), keepdim=True).lerp(colours, 0.4)
    light = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    colours = torch.where(light, 0.7 + 0.3 * colours, colours)
    return F.interpolate(colours, side, mode="nearest" if kind < 2 else "bilinear")


def place(generator: torch.Generator, count: int, cell: int, step: int, augment: bool) -> tuple[Tensor, Tensor]:
    """Random squares in a cell, on the lattice, [count, 3] (x, y, side in pixels) and their affine maps [count, 2, 3].
    `step`: spacing of the lattice in pixels."""
    least = -(-cell * 5 // 8 // step)
    side = torch.randint(least, cell // step + 1, (count,), generator=generator) * step
    room = (cell - side) // step + 1
    x, y = ((torch.rand(count, generator=generator) * room).long() * step for _ in range(2))
    angle = torch.randn(count, generator=generator) * (0.15 if augment else 0.0)
    mirror = torch.where(torch.rand(count, generator=generator) < (0.3 if augment else 0.0), -1.0, 1.0)
    zoom = cell / side * (1 + (0.1 * torch.randn(count, generator=generator) if augment else 0.0))
    centre_x, centre_y = ((p + side / 2) * 2 / cell - 1 for p in (x, y))
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([mirror * cos, mirror * -sin, sin, cos], dim=-1).view(count, 2, 2)
    shift = -(theta @ torch.stack([centre_x, centre_y], dim=-1)[..., None])
    return torch.stack([x, y, side], dim=-1), torch.cat([theta, shift], dim=-1)


def recolour(generator: torch.Generator, tiles: Tensor) -> Tensor:
    """Random saturation, channel gains and brightness of premultiplied tiles [count, 4, c, c]."""
    count = tiles.shape[0]
    colour, alpha = tiles[:, :3], tiles[:, 3:]
    saturation = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
    colour = colour.mean(1, keepdim=True).lerp(colour, saturation)
    gain = 1 + 0.15 * torch.randn(count, 3, 1, 1, generator=generator)
    shift = 0.1 * torch.randn(count, 1, 1, 1, generator=generator)
    return torch.cat([(colour * gain + shift * alpha).clamp(0, 1), alpha], dim=1)


def compose(
    generator: torch.Generator, levels: dict[int, Tensor], ids: Tensor, side: int, augment: bool = True
) -> tuple[Tensor, Tensor]:
    """Grids of drawings `ids` [B, N, N] -> images [B, 3, S, S] in [-1, 1] and boxes [B, N, N, 4] (x0, y0, x1, y1)."""
    batch, grid, _ = ids.shape
    cell = side // grid
    square, theta = place(generator, ids.numel(), cell, side // LATTICE, augment)
    source = levels[grid][ids.flatten()]
    warp = F.affine_grid(theta, (ids.numel(), 4, cell, cell), align_corners=False)
    tiles = F.grid_sample(source, warp, align_corners=False)
    if augment:
        tiles = recolour(generator, tiles)
    tiles = tiles.view(batch, grid, grid, 4, cell, cell).permute(0, 3, 1, 4, 2, 5).reshape(batch, 4, side, side)
    images = tiles[:, :3] + (1 - tiles[:, 3:]) * background(generator, batch, grid, side)
    x, y, width = square.view(batch, grid, grid, 3).unbind(-1)
    x = x + torch.arange(grid) * cell
    y = y + torch.arange(grid)[:, None] * cell
    return images.clamp(0, 1) * 2 - 1, torch.stack([x, y, x + width, y + width], dim=-1)


def page(rng: random.Random, side: int) -> tuple[str, Image.Image]:
    """A word of the instructions, or one or two numbers, and an image of it."""
    numbers = [
        str(rng.randrange(-9, 10) if rng.random() < 0.7 else rng.randrange(100)) for _ in range(rng.choice((1, 2)))
    ]
    text = ", ".join(numbers) if rng.random() < 0.6 else rng.choice(WORDS)
    ink, paper = (tuple(rng.randint(*tones) for _ in range(3)) for tones in ((0, 90), (165, 255)))
    image = Image.new("RGB", (side, side), paper)
    size = min(side * 3 // 8, side * 7 // 4 // len(text)) * rng.uniform(0.75, 1.0)
    font = ImageFont.load_default(max(size, side * 3 // 32))
    left, top, right, bottom = font.getbbox(text)
    x, y = (rng.uniform(0, max(side - extent, 1)) for extent in (right, bottom))
    ImageDraw.Draw(image).text((x, y), text, ink, font)
    return text, image


# ---- batches
def draw_ids(generator: torch.Generator, choices: list[list[int]], batch: int, grid: int, first: int) -> Tensor:
    """Grids [B, N, N] of distinct concepts; `choices` holds the drawings of each.

    The first `first` concepts come before all others, which only fill the remaining cells.
    """
    rows = []
    for _ in range(batch):
        known = torch.randperm(first, generator=generator)
        others = first + torch.randperm(len(choices) - first, generator=generator)
        concepts = torch.cat([known, others])[: grid * grid]
        concepts = concepts[torch.randperm(len(concepts), generator=generator)].tolist()
        rows.append([c[int(torch.randint(len(c), (), generator=generator))] for c in (choices[i] for i in concepts)])
    return torch.tensor(rows).view(batch, grid, grid)


def loc_text(box: Tensor, side: int) -> str:
    x0, y0, x1, y1 = (min(round(v * 1024 / side), 1023) for v in box.tolist())
    return f"<loc{y0:04d}><loc{x0:04d}><loc{y1:04d}><loc{x1:04d}>"


def percent_text(box: Tensor, side: int) -> str:
    return ", ".join(str(round(v * 100 / side)) for v in box.tolist())


class Task:
    """Pool drawings as training batches; every batch is a pure function of (seed, step, concepts in play).

    This class is for PaliGemma; `PhiTask` has a different form of boxes and image inputs.
    """

    box_tokens = 5  # number of tokens of a `detect` answer that the box needs

    def __init__(
        self,
        config: Config,
        images: list[PoolImage],
        processor: PaliGemmaProcessor | Phi3VProcessor,
        augment: bool = True,
    ):
        self.config, self.processor, self.augment = config, processor, augment
        self.side = processor.image_size
        self.captions = [p.caption for p in images]
        names = sorted(set(self.captions))
        self.concept = torch.tensor([names.index(caption) for caption in self.captions])
        drawn = images[0].open().width
        self.levels = {grid: drawings(images, min(112 * self.side // 128 // grid, drawn)) for grid in (1, 2, 4)}
        by_caption: dict[str, list[int]] = {}
        for index, image in enumerate(images):
            by_caption.setdefault(image.caption, []).append(index)
        # random order: `detect` starts with the first concepts, which should not all share an initial letter
        order = torch.randperm(len(by_caption), generator=torch.Generator().manual_seed(config.seed)).tolist()
        self.choices = [by_caption[names[i]] for i in order]
        self.rank = {names[i]: rank for rank, i in enumerate(order)}

    def draw(self, generator: torch.Generator, batch: int, grid: int, first: int | None = None):
        ids = draw_ids(generator, self.choices, batch, grid, first or len(self.choices))
        return ids, *compose(generator, self.levels, ids, self.side, self.augment)

    def caption_texts(self, ids: Tensor) -> list[str]:
        return [", ".join(self.captions[i] for i in row) for row in ids.flatten(1).tolist()]

    def queries(self, generator: torch.Generator, ids: Tensor, boxes: Tensor, count: int, first: int | None = None):
        """`detect` prompts, answers and cell numbers, for `count` cells of each image that show one of the `first`
        concepts."""
        prefixes, suffixes, places = [], [], []
        for row, box in zip(ids.flatten(1).tolist(), boxes.flatten(1, 2), strict=True):
            cells = [i for i, p in enumerate(row) if self.rank[self.captions[p]] < (first or len(self.choices))]
            for place in torch.randint(len(cells), (count,), generator=generator).tolist():
                caption = self.captions[row[cells[place]]]
                prefixes.append(f"detect {caption}")
                suffixes.append(self.answer(box[cells[place]], caption))
                places.append(cells[place])
        return prefixes, suffixes, torch.tensor(places)

    def answer(self, box: Tensor, caption: str) -> str:
        """The answer to `detect {caption}`."""
        return f"{loc_text(box, self.side)} {caption}"

    def cell(self, answer: str, grid: int) -> tuple[int, int] | None:
        """(row, column) of the centre of the box of an answer to `detect`; None if there is no box."""
        box = [int(t[:4]) for t in answer.split("<loc")[1:5]]
        if len(box) < 4:
            return None
        return tuple(int((y0 + y1) / 2 / 1024 * grid) for y0, y1 in ((box[0], box[2]), (box[1], box[3])))

    def hits(self, logits: Tensor, labels: Tensor, grid: int) -> Tensor:
        """Bool [B]: whether the centre of the box is in the right cell, with the best token at each position (teacher
        forcing). logits [B, L, V], labels [B, L]."""
        first = self.processor.tokenizer.token_to_id("<loc0000>")
        is_loc = (labels >= first) & (labels < first + 1024)
        predicted, target = (
            (x[is_loc].view(-1, 2, 2) - first).float().mean(1) * grid // 1024  # (row, column) of the box's centre
            for x in (logits[..., first : first + 1024].argmax(-1) + first, labels)
        )
        return (predicted == target).all(1)

    def attention_inputs(self, model) -> contextlib.AbstractContextManager[list]:
        """The inputs of each call of the guided attention inside the block; PaliGemma has none."""
        return contextlib.nullcontext([])

    def guide_loss(self, model, batch: dict[str, Tensor], attention_inputs: list, cells: Tensor, grid: int) -> Tensor:
        """Zero: PaliGemma's image tokens see the prompt and need no guidance."""
        return torch.zeros(())

    def pages(self, generator: torch.Generator, count: int) -> tuple[list[str], Tensor]:
        """`ocr` answers and their images [count, 3, S, S]."""
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        texts, images = zip(*(page(rng, self.side) for _ in range(count)), strict=True)
        return list(texts), torch.stack([self.pixels(image) for image in images])

    def pixels(self, image: Image.Image) -> Tensor:
        """An image of S x S pixels as [3, S, S] in [-1, 1]."""
        return self.processor.pixels(image)

    def text_batch(self, prefixes: list[str], suffixes: list[str] | None) -> dict[str, Tensor]:
        suffixes = suffixes or [None] * len(prefixes)
        tokens = [self.processor.count_image_tokens((self.side, self.side))]
        rows = [self.processor.encode(p, s, tokens) for p, s in zip(prefixes, suffixes, strict=True)]
        return self.processor.pad(rows)

    def vision(self, model, images: Tensor) -> Tensor:
        """Features [B, P, C] of the patches of images [B, 3, S, S] in [-1, 1]."""
        return model.model.vision_tower(images)

    def image_features(self, model, vision: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Image tokens [B, tokens, C] of the features that `vision` returns. `generator`: for dropout in training."""
        return model.model.multi_modal_projector(vision)

    def patch_maps(self, vision: Tensor) -> list[Tensor]:
        """The features that `vision` returns as maps [B, C, rows, columns] of the image."""
        side = math.isqrt(vision.shape[1])
        return [vision.transpose(1, 2).unflatten(-1, (side, side))]


class PhiTask(Task):
    """Boxes are plain numbers, images a global view and 2 x 2 crops."""

    box_tokens = 28

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens_per_crop = self.processor.crop_size // self.processor.patch_size // MERGE  # along a side
        places = sum(crops * self.tokens_per_crop for crops in self.processor.grid((self.side, self.side)))
        generator = torch.Generator().manual_seed(self.config.seed)
        self.places = torch.linalg.qr(torch.randn(PHI_WIDTH, places, generator=generator))[0]

    def answer(self, box: Tensor, caption: str) -> str:
        return f"{caption} {percent_text(box, self.side)}"

    def cell(self, answer: str, grid: int) -> tuple[int, int] | None:
        box = BOX.search(answer)
        if box is None:
            return None
        x0, y0, x1, y1 = map(int, box.groups())
        return (y0 + y1) * grid // 200, (x0 + x1) * grid // 200

    def hits(self, logits: Tensor, labels: Tensor, grid: int) -> Tensor:
        """The same, for a box of the true width and height: after the true left edge, the right one needs no search."""
        predicted = logits.argmax(-1).where(labels != IGNORED_LABEL, labels)
        found = []
        for answer, truth in zip(*map(self.processor.batch_decode, (predicted, labels)), strict=True):
            x0, y0, x1, y1 = map(int, BOX.search(truth).groups())
            if box := BOX.search(answer):
                left, top = int(box[1]), int(box[2])
                answer = f"{left}, {top}, {left + x1 - x0}, {top + y1 - y0}"
            found.append(box is not None and self.cell(answer, grid) == self.cell(truth, grid))
        return torch.tensor(found)

    @contextlib.contextmanager
    def attention_inputs(self, model) -> Iterator[list]:
        found = []
        attention = model.model.language_model.layers[GUIDED_LAYER].self_attn
        hook = attention.register_forward_pre_hook(lambda module, inputs: found.append(inputs))
        yield found
        hook.remove()

    def guide_loss(self, model, batch: dict[str, Tensor], attention_inputs: list, cells: Tensor, grid: int) -> Tensor:
        """Attention loss of the first head of layer GUIDED_LAYER, which should attend from each token of a `detect`
        answer to the tokens of the cell, plus the loss of each image token's line and column, read from the layer's
        input.

        The second loss uses a fixed projection, so that the position takes up a share of the state that the layer can
        use; a learned projection reads it from a share too small for that.
        """
        attention, (x, rotary, *_) = model.model.language_model.layers[GUIDED_LAYER].self_attn, attention_inputs[0]
        is_grid = torch.zeros(self.processor.count_image_tokens((self.side, self.side)), dtype=torch.bool)
        lines, columns = (crops * self.tokens_per_crop for crops in self.processor.grid((self.side, self.side)))
        is_grid[: lines * (columns + 1)] = torch.tensor([True] * columns + [False]).repeat(lines)  # False: line ends
        line, column = torch.arange(lines).repeat_interleave(columns), torch.arange(columns).repeat(lines)
        position = (batch["input_ids"] == self.processor.image_token_id).nonzero()[:, 1].view(len(x), -1)[:, is_grid]

        q, k, *_ = attention.attention_inputs(x, rotary, None, None, None)
        q, k = q[:, 0].float(), k[:, 0].float()
        length = x.shape[1]
        visible = torch.ones(length, length).tril().bool() & batch["attention_mask"].bool()[:, None]
        weights = (q @ k.transpose(1, 2) * attention.scale).masked_fill(~visible, FAR).log_softmax(-1)
        on_grid = weights.gather(2, position[:, None].expand(-1, length, -1))
        is_cell = line * grid // lines * grid + column * grid // columns == cells[:, None]
        on_cell = on_grid.masked_fill(~is_cell[:, None], FAR).logsumexp(-1)
        attention_loss = -on_cell[:, :-1][batch["labels"][:, 1:] != IGNORED_LABEL].mean()

        states = x.float().gather(1, position[..., None].expand(-1, -1, x.shape[2]))
        lines_read, columns_read = (F.rms_norm(states, states.shape[-1:]) @ self.places).split((lines, columns), dim=-1)
        place_loss = F.cross_entropy(lines_read.flatten(0, 1), line.repeat(len(x)))
        return attention_loss + place_loss + F.cross_entropy(columns_read.flatten(0, 1), column.repeat(len(x)))

    def pixels(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    def vision(self, model, images: Tensor) -> Tensor:
        """Features [B, 5, P, C]: of the global view, then of the crops, as `Phi3VProcessor.image_inputs` makes them."""
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (CLIP_MEAN, CLIP_STD))
        images, side = ((images + 1) / 2 - mean) / std, self.processor.crop_size
        view = F.interpolate(images, side, mode="bicubic")[:, None]
        crops = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        pixels = torch.cat([view, crops], dim=1)
        return model.model.vision_tower(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])

    def image_features(self, model, vision: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """In training, the global view of half the images is zeroed. Otherwise the decoder looks for a drawing there,
        which is enough to find the right quarter of the image, and does not learn where the crops lie."""
        if generator is not None:
            keep = torch.ones(len(vision), vision.shape[1], 1, 1)
            keep[:, 0] = (torch.rand(len(vision), 1, 1, generator=generator) < 0.5).float()
            vision = vision * keep
        grid = self.processor.grid((self.side, self.side))
        return torch.stack(model.model.multi_modal_projector(vision.flatten(0, 1), [grid] * len(vision)))

    def patch_maps(self, vision: Tensor) -> list[Tensor]:
        side, (rows, columns) = math.isqrt(vision.shape[2]), self.processor.grid((self.side, self.side))
        crops = vision[:, 1:].unflatten(2, (side, side)).unflatten(1, (rows, columns))
        whole = crops.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return [whole, vision[:, 0].transpose(1, 2).unflatten(-1, (side, side))]


# ---- measuring
@torch.no_grad()
def measure(model, task: Task, samples: int, seed: int) -> dict[str, float]:
    """{"caption_GxG": share of cells named correctly, "detect_GxG": share of boxes with their centre in the right cell,
    "ocr": share of pages read}."""
    generator = torch.Generator().manual_seed(seed)
    scores = {}

    def answers(prefixes, features, new):
        batch = task.text_batch(prefixes, None)
        out = model.generate(batch["input_ids"], None, batch["attention_mask"], new, image_features=features)
        return task.processor.batch_decode(out[:, batch["input_ids"].shape[1] :])

    for grid in (1, 2, 4):
        right, total, found, searched = 0, 0, 0, 0
        for _ in range(0, samples, 64):
            ids, pixels, boxes = task.draw(generator, 64, grid)
            features = task.image_features(model, task.vision(model, pixels))
            for answer, row in zip(
                answers(["caption en"] * 64, features, 8 * grid * grid), ids.flatten(1), strict=True
            ):
                truth = [task.captions[i] for i in row.tolist()]
                right += sum(a == b for a, b in zip(answer.split(", "), truth, strict=False))
                total += len(truth)
            prefixes, suffixes, _ = task.queries(generator, ids, boxes, 1)
            for answer, truth in zip(answers(prefixes, features, task.box_tokens), suffixes, strict=True):
                found += task.cell(answer, grid) == task.cell(truth, grid)
                searched += 1
        scores |= {f"caption_{grid}x{grid}": right / total, f"detect_{grid}x{grid}": found / searched}
    texts, pixels = task.pages(generator, samples)
    read = answers(["ocr"] * samples, task.image_features(model, task.vision(model, pixels)), 8)
    return scores | {"ocr": sum(a == b for a, b in zip(read, texts, strict=True)) / samples}


# ---- training
def learning_rate_factor(config: Config, step: int) -> float:
    """Factor of the peak learning rate at a step."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / (config.steps - config.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def make_optimizers(config: Config, model, probe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest: takes two thirds of the steps of AdamW alone."""
    named = [*model.named_parameters(), *probe.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in named if not (p.ndim == 2 and ".layers." in name)]
    muon = torch.optim.Muon(matrices, config.lr, config.weight_decay, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


def probe_loss(probe, task: Task, vision: Tensor, ids: Tensor) -> Tensor:
    """Cross entropy of each cell's concept, read from its mean feature; vision from `Task.vision`, ids [B, N, N]."""
    losses = []
    for patches in task.patch_maps(vision):
        cells = F.avg_pool2d(patches, patches.shape[-1] // ids.shape[1])
        logits = probe(cells.flatten(2).transpose(1, 2)).flatten(0, 1)
        losses.append(F.cross_entropy(logits.float(), task.concept[ids.flatten()]))
    return sum(losses) / len(losses)


def tower_step(model, probe, task: Task, config: Config, generator: torch.Generator, grid: int) -> Tensor:
    """Loss of the vision tower alone."""
    ids, pixels, _ = task.draw(generator, 2 * config.batch_size, grid)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        return probe_loss(probe, task, task.vision(model, pixels), ids)


def model_step(model, probe, task: Task, config: Config, generator: torch.Generator, grid: int, concepts: int):
    """(loss of the whole model, from token means of its tasks; share of searched cells that are found)."""
    captioned, searched = config.batch_size // 2, config.batch_size - config.batch_size // 2
    ids_captioned, pixels_captioned, _ = task.draw(generator, captioned, grid)
    ids_searched, pixels_searched, boxes = task.draw(generator, searched, grid, concepts)
    page_texts, pixels_pages = task.pages(generator, config.pages)
    with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
        vision = task.vision(model, torch.cat([pixels_captioned, pixels_searched, pixels_pages]))
        features = task.image_features(model, vision, generator)
        captions = task.text_batch(
            ["caption en"] * config.batch_size, task.caption_texts(torch.cat([ids_captioned, ids_searched]))
        )
        caption_loss = model(**captions, pixel_values=None, image_features=features[: config.batch_size]).loss
        pages = task.text_batch(["ocr"] * config.pages, page_texts)
        ocr_loss = model(**pages, pixel_values=None, image_features=features[config.batch_size :]).loss
        prefixes, suffixes, cells = task.queries(generator, ids_searched, boxes, config.queries, concepts)
        searches = task.text_batch(prefixes, suffixes)
        with task.attention_inputs(model) as attention_inputs:
            out = model(
                **searches,
                pixel_values=None,
                image_features=features[captioned : config.batch_size].repeat_interleave(config.queries, 0),
                logits_to_keep=searches["input_ids"].shape[1],
            )
        guide_loss = task.guide_loss(model, searches, attention_inputs, cells, grid)
        concept_loss = probe_loss(probe, task, vision[: config.batch_size], torch.cat([ids_captioned, ids_searched]))
    hits = task.hits(out.logits[:, :-1], searches["labels"][:, 1:], grid)
    loss = caption_loss + out.loss + config.ocr_weight * ocr_loss + config.probe_weight * concept_loss
    loss = loss + config.guide_weight * guide_loss
    return loss, float(hits.float().mean()) if grid > 1 else None


def save_asset(config: Config, model, processor: PaliGemmaProcessor | Phi3VProcessor, metrics: dict):
    """Save the model in bf16, with its tokenizer and image settings."""
    folder = Path(config.output_dir)
    model.bfloat16().save_pretrained(folder)
    processor.tokenizer.save(str(folder / "tokenizer.json"))
    if config.family == "paligemma":
        special = dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
        size = model.config.vision_config.image_size
        image_settings = dict(processor_class="PaliGemmaProcessor", image_processor_type="SiglipImageProcessor")
        image_settings |= dict(size={"height": size, "width": size}, resample=3, image_mean=[0.5] * 3)
        image_settings |= dict(image_std=[0.5] * 3, rescale_factor=1 / 255, image_seq_length=64)
    else:
        special = dict(bos_token="<s>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", unk_token="<unk>")
        image_settings = dict(num_crops=NUM_CROPS, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left", **special},
    )
    write_json(folder / "preprocessor_config.json", image_settings)
    write_json(folder / "pretraining.json", {"config": asdict(config), "metrics": metrics})
    (folder / "README.md").write_text(readme(config, model, processor, metrics), encoding="utf-8")


def readme(config: Config, model, processor: PaliGemmaProcessor | Phi3VProcessor, metrics: dict) -> str:
    """What the folder is and what it can do, with 95 % Wilson intervals."""
    text, vision = model.config.text_config, model.config.vision_config
    is_phi = config.family == "phi"
    names = list(next(iter(metrics["scores"].values())))
    rows = []
    for name in names:
        cells = []
        for scores in metrics["scores"].values():
            n = metrics["n"] * (int(name[8]) ** 2 if name.startswith("caption") else 1)
            low, high = wilson(round(scores[name] * n), n)
            cells.append(f"{100 * scores[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        rows.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
    facts = dict(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        image=vision.image_size,
        patch=vision.patch_size,
        tokens=processor.count_image_tokens((1, 1)),
        width=text.hidden_size,
        layers=f"{vision.num_hidden_layers} + {text.num_hidden_layers}",
        vocabulary=text.vocab_size,
    )
    if is_phi:
        original = f"{text.original_max_position_embeddings:,}"
        facts |= dict(heads=text.num_attention_heads, crops=NUM_CROPS, original=original)
    return README.format(
        name=f"{config.family}-nano",
        what=textwrap.fill((PHI if is_phi else PALIGEMMA).format(**facts), 120),
        command="python assets/pretrain.py" + " --family=phi" * is_phi,
        end=PHI_END if is_phi else PALIGEMMA_END,
        n=metrics["n"],
        columns=" | ".join(metrics["scores"]),
        rule="---|" * (len(metrics["scores"]) + 1),
        rows="\n".join(rows),
    )


def as_json(config: Config) -> dict:
    """The configuration as it is read back from a file."""
    return json.loads(json.dumps(asdict(config)))


def check_same_config(stored: dict | None, asked: dict, file: Path) -> None:
    """Raise UserError if a checkpoint was made with other settings. Older checkpoints have none stored."""
    changed = [name for name in asked if stored and stored.get(name) != asked[name] and name not in MAY_CHANGE]
    if changed:
        name = changed[0]
        raise UserError(f"{file}: was made with {name} {stored.get(name)}, not {asked[name]}: give another --work_dir")


@one_line_errors
def main():
    config = tyro.cli(Config, config=(tyro.conf.FlagConversionOff,))
    config.steps = config.steps or STEPS[config.family]
    config.grid_weights = config.grid_weights or GRID_WEIGHTS[config.family]
    config.work_dir = config.work_dir or f"runs/pretrain_{config.family}"
    config.output_dir = config.output_dir or f"assets/{config.family}-nano"
    work = Path(config.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)

    # --- model and data
    pool = read_pool()
    model, processor, task_class = make_model(config.family, pool)
    train = [p for p in pool if p.split == "train"]
    task = task_class(config, train, processor)
    unaugmented = task_class(config, train, processor, augment=False)
    other_style = task_class(config, [p for p in pool if p.split == "test_style"], processor, augment=False)
    unseen = task_class(
        config, [p for p in pool if p.split == "test_concept" and p.style == "noto"], processor, augment=False
    )
    probe = torch.nn.Linear(model.config.vision_config.hidden_size, len(task.choices))  # not part of the saved model
    everything = torch.nn.ModuleDict({"model": model, "probe": probe})
    optimizers = make_optimizers(config, model, probe)
    concepts, smoothed, first = config.first_concepts, 0.0, 0
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        check_same_config(state.get("config"), as_json(config), state_file)
        everything.load_state_dict(state["model"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        concepts, smoothed, first = state["concepts"], state["smoothed"], state["step"]
    count = sum(p.numel() for p in model.parameters())
    tokens = processor.tokenizer.get_vocab_size()
    print(f"{count:,} parameters, {tokens} tokens, {len(task.choices)} concepts, from step {first}")

    # --- loop
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps)
    for step in bar:
        model.train()
        for optimizer, rate in zip(optimizers, (config.lr, config.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = rate * learning_rate_factor(config, step)
            optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(config.seed * SEED_STRIDE + step)
        grid = config.grids[int(torch.multinomial(torch.tensor(config.grid_weights), 1, generator=generator))]
        hit = None
        if step < config.tower_steps:
            loss = tower_step(model, probe, task, config, generator, grid)
        else:
            loss, hit = model_step(model, probe, task, config, generator, grid, concepts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        smoothed = smoothed if hit is None else 0.95 * smoothed + 0.05 * hit
        if smoothed > config.grow_at and concepts < len(task.choices):
            concepts, smoothed = min(2 * concepts, len(task.choices)), 0.0
        bar.set_postfix(loss=f"{loss.item():.3f}", found=f"{smoothed:.2f}", concepts=concepts)
        done = step + 1
        if done % config.save_every == 0 or done == config.steps:
            state = {"model": everything.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
            state |= {"concepts": concepts, "smoothed": smoothed, "step": done}
            state["config"] = as_json(config)
            torch.save(state, state_file.with_suffix(".tmp"))
            os.replace(state_file.with_suffix(".tmp"), state_file)
        if done % config.eval_every == 0 and done > config.tower_steps:
            model.eval()
            scores = {
                "train": measure(model, unaugmented, config.eval_samples, seed=1),
                "test_style": measure(model, other_style, config.eval_samples, seed=2),
            }
            line = {"step": done, "loss": loss.item(), "concepts": concepts, "found": smoothed, "time": time.time()}
            with open(work / "metrics.jsonl", "a") as log:
                log.write(json.dumps(line | scores) + "\n")

    # --- save the model, evaluated in the precision it is saved in
    model.bfloat16().float().eval()
    samples = 1024
    scores = {
        "trained drawings, new arrangements": measure(model, unaugmented, samples, seed=11),
        "trained concepts in a style never seen": measure(model, other_style, samples, seed=12),
        "concepts never seen": measure(model, unseen, samples, seed=13),
    }
    metrics = {"n": samples, "scores": scores}
    save_asset(config, model, processor, metrics)
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
