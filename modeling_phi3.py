"""Phi-3 decoder, alone and with images: Phi-3-vision and Phi-3.5-vision (CLIP features of crops, an MLP, causal
decoding).

B batch, L sequence, H query heads, K key/value heads, D head dim, R rotated dims of a head, C hidden size, n images,
N image tokens of an image, S side of a crop in pixels, W width of 2 x 2 concatenated CLIP features. Module names are
the same for every family here; `checkpoint.py` maps the hub's names to them.
Sources: Phi-3 (arXiv 2404.14219), LongRoPE (2402.13753), microsoft/Phi-3.5-vision-instruct, transformers' Phi3.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Mask, PrefixMask, apply_rotary
from checkpoint import DIFFERENTIAL_PREFIX
from config_fields import DECODER_ALONE_MESSAGE, PHI_TYPES, Depth, Positive, Size, TokenId, read_config
from differential_attention import AttentionShape
from errors import UserError
from fused_ops import apply_linears
from layers import ACTIVATIONS, Embedding
from modeling_clip import ClipVisionConfig, ClipVisionModel
from modeling_vlm import (
    DecoderAttention,
    KVCache,
    Rotary,
    VisionLanguageBackbone,
    VisionLanguageModel,
    read_model_config,
    run_layers,
)
from processing_phi3v import IMAGE_TOKEN_ID, MERGE, PAD_TOKEN_ID, PHI_STOP_IDS, ModelFields, flatten_config

LEARNING_RATE = 4e-5  # of Phi-3-vision's fine-tuning scripts
CLIP_NAME = "openai/clip-vit-large-patch14-336"
ROPE_TYPES = {"default": "default", "longrope": "longrope", "su": "longrope"}
Factors = tuple[Positive, ...]


# ---- configuration
def read_rope(data: dict) -> dict[str, Any]:
    """The rotary fields of `Phi3TextConfig` from any config.json: `rope_parameters` in transformers 5, `rope_scaling`
    and `rope_theta` in earlier versions. Raises UserError for a type other than default and longrope ("su")."""
    rope = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_scaling is {rope!r:.80} where an object is expected: restore the file")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise UserError(f"rope_scaling type {kind!r:.80} is not supported: must be one of {', '.join(ROPE_TYPES)}")
    first = {**data, **{key: value for key, value in rope.items() if value is not None}}
    names = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    if ROPE_TYPES[kind] == "longrope":
        names += ("short_factor", "long_factor", "attention_factor", "factor")
        for name in ("short_factor", "long_factor"):
            if rope.get(name) is None:
                raise UserError(f"rope_scaling of type {kind} has no {name}: restore the file")
    return {name: first[name] for name in names if first.get(name) is not None}


@dataclass
class Phi3TextConfig:
    """The decoder. Defaults: Phi-3-mini."""

    vocab_size: Size = 32064
    hidden_size: Size = 3072
    intermediate_size: Size = 8192
    num_hidden_layers: Depth = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 32
    head_dim: Size | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: Size = 4096
    # longrope: sequences longer than this are rotated with the long factors
    original_max_position_embeddings: Annotated[int, msgspec.Meta(ge=2, le=1 << 31)] = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: Positive = 10000.0
    partial_rotary_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0  # fraction of the head dims that is rotated
    short_factor: Factors | None = None  # longrope: divisors of the R / 2 rotary frequencies; None: default rotary
    long_factor: Factors | None = None
    attention_factor: float | None = None  # longrope: multiplies cos and sin; None: computed from the length ratio
    factor: Positive | None = None  # longrope: length ratio; None: the ratio of the two length fields above
    sliding_window: Size | None = None  # tokens that a query sees
    initializer_range: float = 0.02

    final_logit_softcapping = None  # Phi has none

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act {self.hidden_act!r} is not supported: {', '.join(ACTIVATIONS)}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads or (self.head_dim is None and self.hidden_size % heads):
            raise UserError(
                f"num_attention_heads {heads} must be a multiple of num_key_value_heads {kv_heads} and divide "
                f"hidden_size {self.hidden_size}"
            )
        self.head_dim = self.head_dim or self.hidden_size // heads
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise UserError(f"{self.rotary_dim} dims of a head would be rotated: must be even and at least 2")
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise UserError(f"{name} has {len(factors)} values: must have {self.rotary_dim // 2}")

    @classmethod
    def from_dict(cls, data: dict) -> "Phi3TextConfig":
        """Read the decoder's fields from a config.json of any transformers version.

        Raises UserError for a field that would change the model in an unsupported way.
        """
        for name in ("attention_bias", "attention_dropout", "resid_pdrop", "embd_pdrop"):
            if data.get(name):
                raise UserError(f"{name} {data[name]!r:.80} is not supported: must be absent, false or 0")
        kv_heads = data.get("num_key_value_heads") or data.get("num_attention_heads", cls.num_attention_heads)
        given = {key: value for key, value in data.items() if value is not None}
        return read_config(cls, given | {"num_key_value_heads": kv_heads} | read_rope(data), "config.json")

    @property
    def rotary_dim(self) -> int:
        """R: number of leading dims of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def short_rope_limit(self) -> int | None:
        """Longest sequence that is rotated with the short factors; None if rotary angles do not depend on length."""
        return None if self.short_factor is None else self.original_max_position_embeddings

    @property
    def window(self) -> int | None:
        """Sliding window in tokens; None if it covers every position, as in the released models."""
        window = self.sliding_window
        return None if window is None or window >= self.max_position_embeddings else window

    def to_dict(self) -> dict[str, Any]:
        """The fields as transformers' Phi3Config reads them."""
        names = ("short_factor", "long_factor", "attention_factor", "factor", "rope_theta", "partial_rotary_factor")
        data = {key: value for key, value in dataclasses.asdict(self).items() if key not in names}
        rope: dict[str, Any] = {"rope_theta": self.rope_theta, "partial_rotary_factor": self.partial_rotary_factor}
        if self.short_factor is None:
            rope["rope_type"] = "default"
        else:
            rope |= {"rope_type": "longrope", "original_max_position_embeddings": self.original_max_position_embeddings}
            rope |= {"short_factor": list(self.short_factor), "long_factor": list(self.long_factor)}
            optional = {"attention_factor": self.attention_factor, "factor": self.factor}
            rope |= {key: value for key, value in optional.items() if value is not None}
        return data | {"rope_parameters": rope}


@dataclass
class Phi3Config:
    """A decoder alone (`model_type` "phi3") or with images ("phi3_v", which has a `vision_config`).

    config.json is flat, as on the hub; its `auto_map` is ignored, since only the code here runs. It may have fields
    that the hub's file lacks: `vision_config` for a tower other than the released one, `image_token_id`, `chat_start`,
    `chat_end` and `learning_rate`.
    """

    text_config: Phi3TextConfig = field(default_factory=Phi3TextConfig)
    vision_config: ClipVisionConfig | None = None
    model_type: str = "phi3"
    image_token_id: TokenId | None = IMAGE_TOKEN_ID  # None for a decoder alone
    pad_token_id: TokenId = PAD_TOKEN_ID
    bos_token_id: TokenId | None = 1
    # any of them ends an answer; training answers end with the first
    stop_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1)] = PHI_STOP_IDS
    chat_start: str = "<|user|>\n"  # chat_start and chat_end enclose a prompt
    chat_end: str = "<|end|>\n<|assistant|>\n"
    tie_word_embeddings: bool = False
    learning_rate: Annotated[float, msgspec.Meta(gt=0, le=10)] = LEARNING_RATE  # default for fine-tuning

    def __post_init__(self):
        if self.vision_config is None:  # the id is a word in the vocabulary of another decoder
            self.image_token_id = None

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "Phi3Config":
        """Read `config.json` of a folder or hub id. Unknown keys are tolerated, unknown model types refused."""
        return read_model_config(cls, path_or_hub_id)

    @classmethod
    def from_dict(cls, data: dict) -> "Phi3Config":
        model_type = str(data.get("model_type")).removeprefix(DIFFERENTIAL_PREFIX)
        if model_type not in PHI_TYPES:
            raise UserError(f"model_type {data.get('model_type')!r} is not supported: must be 'phi3' or 'phi3_v'")
        data = flatten_config(data)
        text = Phi3TextConfig.from_dict(data)
        top = {key: value for key, value in data.items() if value is not None} | {"model_type": model_type}
        top |= {"text_config": text, "vision_config": None, "bos_token_id": data.get("bos_token_id", 1)}
        if model_type == "phi3_v":
            top["vision_config"] = read_vision_config(data)
        names = ("vocab_size", "eos_token_id", "pad_token_id")
        fields = read_config(ModelFields, {name: data[name] for name in names if name in data}, "config.json")
        top |= {"stop_ids": fields.stop_ids, "pad_token_id": fields.padding}
        return read_config(cls, top, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the hub's layout; transformers can read it for a decoder alone."""
        names = ("pad_token_id", "bos_token_id", "tie_word_embeddings", "chat_start", "chat_end", "learning_rate")
        data = self.text_config.to_dict() | {name: getattr(self, name) for name in names}
        data |= {"model_type": self.model_type, "eos_token_id": list(self.stop_ids)}
        if self.vision_config is None:
            return data | {"architectures": ["Phi3ForCausalLM"]}
        data |= {"architectures": ["Phi3VForCausalLM"], "image_token_id": self.image_token_id}
        data["vision_config"] = dataclasses.asdict(self.vision_config)
        data["img_processor"] = {
            "name": "clip_vision_model",
            "model_name": CLIP_NAME,
            "image_dim_out": self.vision_config.hidden_size,
        }
        return data


def read_vision_config(data: dict) -> ClipVisionConfig:
    """The CLIP tower in a config.json; released files only name it. Raises UserError for another tower."""
    given = data.get("vision_config") or {}
    if not isinstance(given, dict):
        raise UserError(f"vision_config is {given!r:.80} where an object is expected: restore the file")
    processor = data.get("img_processor")
    name = processor.get("model_name", CLIP_NAME) if isinstance(processor, dict) else CLIP_NAME
    if name != CLIP_NAME:
        raise UserError(f"img_processor.model_name {name!r:.80} is not supported: must be {CLIP_NAME!r}")
    return read_config(ClipVisionConfig, given, "vision_config")


# ---- decoder
class Phi3RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to the dtype of x, then times the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).type_as(x) * self.weight


def rotary_tables(config: Phi3TextConfig, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """cos and sin [B, 1, L, R] of 0-based positions [B, L]; angles in float32, tables in `dtype`.

    LongRoPE divides each frequency by its own factor: a long factor in rows whose last position is at or beyond
    `original_max_position_embeddings`, a short factor in other rows. transformers chooses once per batch, by the
    longest row; here each row chooses for itself and has the same logits in a batch and alone.
    """
    exponent = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device=positions.device).float()
    exponent = exponent / config.rotary_dim
    scale = 1.0
    if config.short_factor is None:
        frequencies = 1.0 / config.rope_theta**exponent
    else:
        factors = rope_factors(config.short_factor, config.long_factor, positions.device)
        is_long = positions.amax(1) >= config.original_max_position_embeddings
        frequencies = (1.0 / (factors * config.rope_theta**exponent))[is_long.long()][:, None]  # [B, 1, R / 2]
        scale = attention_factor(config)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


@cache
def rope_factors(short: tuple[float, ...], long: tuple[float, ...], device: torch.device) -> Tensor:
    """LongRoPE's factors [2, R / 2] on a device, copied there once: a copy in every forward pass would block the CPU
    and could not be captured in a CUDA graph."""
    with torch.inference_mode(False):  # the first call may be an evaluation, the next one training
        return torch.tensor((short, long), device=device)


def attention_factor(config: Phi3TextConfig) -> float:
    """LongRoPE's multiplier of cos and sin, the same for short and long factors."""
    if config.attention_factor is not None:
        return config.attention_factor
    original = config.original_max_position_embeddings
    ratio = config.factor or config.max_position_embeddings / original
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))


def rotate_first_dims(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary` on the first R dims of x [B, heads, L, D]; the other dims are unchanged. Tables [B, 1, S, R]."""
    width = cos.shape[-1]
    if width == x.shape[-1]:
        return apply_rotary(x, cos, sin)
    return torch.cat((apply_rotary(x[..., :width], cos, sin), x[..., width:]), dim=-1)


class Phi3Attention(DecoderAttention):
    """Query, key and value projections are one matrix: H D rows of queries, then K D of keys, then K D of values."""

    apply_rotary = staticmethod(rotate_first_dims)

    def __init__(self, config: Phi3TextConfig, layer: int):
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        has_rope_factors = config.short_factor is not None
        super().__init__(
            layer, AttentionShape(config.hidden_size, heads, kv_heads, head_dim, config.rotary_dim, has_rope_factors)
        )
        self.scale = head_dim**-0.5
        self.window = config.window
        self.widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        return apply_linears(x, self.qkv_proj)[0].split(self.widths, dim=-1)


class Phi3MLP(nn.Module):
    """Gate and up projections are one matrix, with the rows of the gate first."""

    def __init__(self, config: Phi3TextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = apply_linears(x, self.gate_up_proj)[0].chunk(2, dim=-1)
        return apply_linears(self.activation(gate) * up, self.down_proj)[0]


class Phi3DecoderLayer(nn.Module):
    def __init__(self, config: Phi3TextConfig, layer: int):
        super().__init__()
        self.self_attn = Phi3Attention(config, layer)
        self.mlp = Phi3MLP(config)
        self.input_layernorm = Phi3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Phi3RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None, keep_last: int | None = None
    ) -> Tensor:
        """x [B, L, C] -> [B, L, C], or the last `keep_last` positions [B, keep_last, C]."""
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, cache, keep_last)
        x = (x if keep_last is None else x[:, -keep_last:]) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


class Phi3Decoder(nn.Module):
    def __init__(self, config: Phi3TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Phi3DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Phi3RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [B, L, C]."""
        return self.embed_tokens(input_ids)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None = None, keep_last: int | None = None
    ) -> Tensor:
        """Embeddings x [B, L, C] at positions [B, L] -> hidden states, see `run_layers`.

        Raises UserError if several tokens cross `short_rope_limit` and the cache has keys from before it. Single tokens
        are not checked: `generate` handles the crossing, and a check would sync with the device in every step.
        """
        limit = self.config.short_rope_limit
        continues = limit is not None and cache is not None and cache.length > 0 and x.shape[1] > 1
        if continues and bool(((positions[:, 0] <= limit) & (positions[:, -1] >= limit)).any()):
            raise UserError(f"a row crosses {limit} positions, but its cached keys were rotated by the short factors")
        return run_layers(self, x, rotary_tables(self.config, positions, x.dtype), mask, cache, keep_last)


# ---- images
class Phi3Projector(nn.Module):
    """Turns the CLIP features of crops into image tokens.

    The crops of an image are laid out as one grid, followed by the global view. The learned `sub_GN` ends each line of
    tokens, `glb_GN` separates grid and global view; an MLP projects all of them to the decoder's width.
    """

    def __init__(self, config: Phi3Config):
        super().__init__()
        width, hidden = MERGE**2 * config.vision_config.hidden_size, config.text_config.hidden_size
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, width))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.linear_1 = nn.Linear(width, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Image tokens [N, C] of each image.

        features [crops of all images, patches, width of CLIP]: for each image the global view, then its crops row by
        row; grids: rows and columns of crops of each image.
        """
        rows = []
        for (height, width), crops in zip(grids, features.split([1 + h * w for h, w in grids]), strict=True):
            grid = self.add_line_ends(merge_neighbours(crops[1:], height, width))
            rows.append(torch.cat((grid, self.glb_GN[0], self.add_line_ends(merge_neighbours(crops[:1], 1, 1)))))
        projected = self.linear_2(F.gelu(self.linear_1(torch.cat(rows))))
        return projected.split([len(row) for row in rows])

    def add_line_ends(self, grid: Tensor) -> Tensor:
        """Grid [lines, columns, W] -> tokens [lines x (columns + 1), W]."""
        return torch.cat((grid, self.sub_GN[0].expand(len(grid), 1, -1)), dim=1).flatten(0, 1)


def merge_neighbours(crops: Tensor, height: int, width: int) -> Tensor:
    """Merge the features of height x width crops [crops, patches, E], row by row, into one grid [lines, columns,
    MERGE^2 E], in which MERGE x MERGE neighbours are concatenated in the order (row, column, channel)."""
    side = math.isqrt(crops.shape[1]) // MERGE
    grid = crops.unflatten(1, (side, MERGE, side, MERGE)).unflatten(0, (height, width))
    return grid.permute(0, 2, 1, 4, 3, 5, 6).flatten(4).flatten(2, 3).flatten(0, 1)


# ---- models
class Phi3Model(VisionLanguageBackbone):
    """The decoder with or without a vision tower. Attention is causal everywhere, also between image tokens."""

    def __init__(self, config: Phi3Config):
        super().__init__()
        self.config = config
        self.vision_tower = self.multi_modal_projector = None
        if config.vision_config is not None:
            self.vision_tower = ClipVisionModel(config.vision_config)
            self.multi_modal_projector = Phi3Projector(config)
        self.language_model = Phi3Decoder(config.text_config)

    def mask(self, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> PrefixMask:
        """A causal mask: a prefix-LM mask with an empty prefix; token types are ignored."""
        return PrefixMask.from_tensors(attention_mask, attention_mask)

    def positions(self, attention_mask: Tensor) -> Tensor:
        """0-based positions [B, L] that count tokens but not pads, as `short_rope_limit` does."""
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)

    def encode_images(self, pixel_values: Tensor, grids: tuple[tuple[int, int], ...]) -> tuple[Tensor, ...]:
        """Image tokens [N, C] of each image in pixel_values [n, crops, 3, S, S] (the global view, crops row by row,
        unused crops); `grids`: rows and columns of these crops. Raises UserError for grids that do not fit the pixels.
        """
        if len(grids) != len(pixel_values) or any(not 1 <= h * w < pixel_values.shape[1] for h, w in grids):
            raise UserError("image_sizes do not fit pixel_values: pass both as the processor returns them")
        crops = torch.cat([image[: 1 + h * w] for image, (h, w) in zip(pixel_values, grids, strict=True)])
        return self.multi_modal_projector(self.vision_tower(crops), grids)

    def crop_grids(self, image_sizes: Tensor | None) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the crops of each image, from image_sizes [n, 2]: height and width of its grid in pixels.

        Raises UserError if a decoder alone is given images.
        """
        if image_sizes is None:
            return ()
        if self.config.vision_config is None:
            raise UserError(DECODER_ALONE_MESSAGE)
        side = self.config.vision_config.image_size
        return tuple((height // side, width // side) for height, width in image_sizes.tolist())

    def patch_tokens(self, input_ids: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Bool [B, L]: the tokens of the crops, row by row over the whole grid, without line ends, separator and global
        view."""
        is_image, flags = self.is_image_token(input_ids), []
        for rows, columns in self.crop_grids(image_sizes):
            side = self.config.vision_config.image_size // (MERGE * self.config.vision_config.patch_size)
            grid = torch.ones(rows * side, columns * side + 1, dtype=torch.bool)
            grid[:, -1] = False
            flags += [grid.flatten(), torch.zeros(1 + side * (side + 1), dtype=torch.bool)]
        return is_image.masked_scatter(is_image, torch.cat(flags).to(is_image.device)) if flags else is_image


class Phi3ForCausalLM(VisionLanguageModel):
    """A Phi-3 decoder alone: `pixel_values` is None."""

    config_class = Phi3Config
    backbone_class = Phi3Model
    lora_targets = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class Phi3VForCausalLM(Phi3ForCausalLM):
    """Phi-3-vision and Phi-3.5-vision."""
