"""Gemma 1 and Gemma 2 decoders, and PaliGemma: SigLIP features, a linear projector, prefix-LM decoding.

B batch, L sequence, H query heads, K key/value heads, D head dim, C hidden size, N image tokens per image. Module names
are those of transformers >= 5, so that weights and LoRA adapters can be exchanged.
Sources: PaliGemma (arXiv 2407.07726), PaliGemma 2 (2412.03555), Gemma (2403.08295), Gemma 2 (2408.00118).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Mask, PrefixMask
from checkpoint import DIFFERENTIAL_PREFIX
from config_fields import PALIGEMMA_IMAGE_TOKEN_ID, Depth, Positive, Size, TokenId, read_config
from differential_attention import AttentionShape
from errors import UserError
from fused_ops import apply_linears
from layers import ACTIVATIONS, Embedding
from modeling_siglip import SiglipVisionConfig, SiglipVisionModel
from modeling_vlm import (
    BatchPlan,
    DecoderAttention,
    KVCache,
    Rotary,
    VisionLanguageBackbone,
    VisionLanguageModel,
    read_model_config,
    run_layers,
)

GEMMA2_ONLY = (
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
)
RELEASED_HIDDEN_SIZE = 2048  # of the smallest released decoder
RELEASED_LEARNING_RATE, SMALL_LEARNING_RATE = 1e-4, 2e-3


def read_rope(data: dict) -> tuple[float, float]:
    """(theta, factor) of a text_config: `rope_parameters` in transformers 5, earlier `rope_theta` and `rope_scaling`.

    Raises UserError for scaling other than "linear", and for "linear" without a factor.
    """
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"text_config.rope_parameters is {rope!r:.80} where an object is expected: restore the file")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"text_config.rope_parameters {rope} is not supported: rope_type must be default or linear")
    theta = rope.get("rope_theta") or data.get("rope_theta") or 10000.0
    if kind == "linear" and rope.get("factor") is None:
        raise UserError("text_config.rope_parameters of type linear has no factor: restore the file")
    return theta, rope["factor"] if kind == "linear" else 1.0


@dataclass
class GemmaConfig:
    """Gemma 1 or 2 decoder (`model_type` "gemma" or "gemma2"). Defaults: Gemma 2B, the decoder of PaliGemma 3b."""

    model_type: str = "gemma"
    vocab_size: Size = 257216
    hidden_size: Size = 2048
    intermediate_size: Size = 16384
    num_hidden_layers: Depth = 18
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 1
    head_dim: Size = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: Size = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: Positive = 10000.0
    rope_factor: Positive = 1.0  # rope_type "linear": positions are divided by this
    initializer_range: float = 0.02
    # Gemma 2 only
    query_pre_attn_scalar: int | float | None = None  # query scale is this ** -0.5; None means head_dim
    attn_logit_softcapping: float | None = None
    # transformers >= 5.23 caps the final logits, 4.52 - 5.0 did not, big_vision never does in training.
    # The cap changes losses but not greedy answers; None turns it off
    final_logit_softcapping: float | None = None
    # for suffix queries only, as in transformers >= 5.23 (big_vision has no window); no effect below 4096 tokens
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None  # sliding_attention or full_attention; None: they alternate

    GEMMA2_DEFAULTS = dict(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_key_value_heads=4,
        query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
    )  # fmt: skip

    def __post_init__(self):
        if self.model_type not in ("gemma", "gemma2"):
            raise UserError(f"text model_type {self.model_type!r} is not supported: must be 'gemma' or 'gemma2'")
        if self.hidden_activation not in ACTIVATIONS:
            raise UserError(
                f"text_config.hidden_activation {self.hidden_activation!r} is not supported: {', '.join(ACTIVATIONS)}"
            )
        types = self.layer_types
        if types is not None and (
            len(types) != self.num_hidden_layers or not set(types) <= {"sliding_attention", "full_attention"}
        ):
            raise UserError(
                f"text_config.layer_types {list(types)} must be {self.num_hidden_layers} of sliding_attention and "
                "full_attention"
            )
        if self.head_dim % 2:
            raise UserError(f"text_config.head_dim {self.head_dim}: must be even, since rotary dims come in pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"text_config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @classmethod
    def from_dict(cls, data: dict) -> "GemmaConfig":
        """Read the text_config of any transformers version; fields at the family's default may be missing.

        Raises UserError for a field that would change the model in an unsupported way.
        """
        data = dict(data)
        is_gemma2 = data.get("model_type", "gemma") == "gemma2"
        for name in ("attention_bias", "attention_dropout"):
            if data.get(name):
                raise UserError(f"text_config.{name} {data[name]!r} is not supported: must be absent, false or 0")
        if is_gemma2:
            data = cls.GEMMA2_DEFAULTS | data
        else:  # transformers ignores these fields of Gemma 1
            data = {key: value for key, value in data.items() if key not in GEMMA2_ONLY}
        data["rope_theta"], data["rope_factor"] = read_rope(data)
        activation = data.get("hidden_activation") or (None if is_gemma2 else data.get("hidden_act"))
        if activation is None or (activation == "gelu" and not is_gemma2):
            activation = "gelu_pytorch_tanh"  # released configs of Gemma 1 say "gelu" or null and mean the tanh form
        data["hidden_activation"] = activation
        return read_config(cls, data, "text_config")

    def window_of(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens; None: full attention."""
        if self.layer_types is None:
            return self.sliding_window if layer % 2 == 0 else None
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def to_dict(self) -> dict:
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_factor != 1:
            rope |= {"rope_type": "linear", "factor": self.rope_factor}
        return {
            **{key: value for key, value in dataclasses.asdict(self).items() if key != "rope_factor"},
            "hidden_act": self.hidden_activation,
            "layer_types": None if self.layer_types is None else list(self.layer_types),
            "rope_parameters": rope,
            "query_pre_attn_scalar": self.query_pre_attn_scalar or self.head_dim,
        }


@dataclass
class PaliGemmaConfig:
    text_config: GemmaConfig = field(default_factory=GemmaConfig)
    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    image_token_id: TokenId = PALIGEMMA_IMAGE_TOKEN_ID
    pad_token_id: TokenId = 0
    eos_token_id: TokenId = 1
    bos_token_id: TokenId = 2
    tie_word_embeddings: bool = True
    model_type: str = "paligemma"

    @property
    def learning_rate(self) -> float:
        """Default peak learning rate of fine-tuning: 1e-4 for the released models, 2e-3 for small ones."""
        return RELEASED_LEARNING_RATE if self.text_config.hidden_size >= RELEASED_HIDDEN_SIZE else SMALL_LEARNING_RATE

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "PaliGemmaConfig":
        """Read `config.json` of a folder or hub id. Unknown keys are tolerated, unknown model types refused. `auto_map`
        is ignored, since only the code here runs."""
        return read_model_config(cls, path_or_hub_id)

    @classmethod
    def from_dict(cls, data: dict) -> "PaliGemmaConfig":
        if str(data.get("model_type")).removeprefix(DIFFERENTIAL_PREFIX) != "paligemma":
            raise UserError(f"model_type {data.get('model_type')!r} is not supported: config.json must say 'paligemma'")
        text, vision = data.get("text_config", {}), data.get("vision_config", {})
        for name, part in (("text_config", text), ("vision_config", vision)):
            if not isinstance(part, dict):
                raise UserError(f"{name} is {part!r:.80} where an object is expected: restore the file")
        top = {"text_config": GemmaConfig.from_dict(text)}
        top["vision_config"] = read_config(SiglipVisionConfig, vision, "vision_config")
        image_ids = (data.get("image_token_index"), data.get("image_token_id"), PALIGEMMA_IMAGE_TOKEN_ID)
        top["image_token_id"] = next(i for i in image_ids if i is not None)
        top["tie_word_embeddings"] = data.get("tie_word_embeddings", True)
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):  # version 5 writes them inside text_config
            value = text.get(name) if data.get(name) is None else data[name]
            top |= {} if value is None else {name: value}
        return read_config(cls, top, "config.json")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return (self.eos_token_id,)

    def to_dict(self) -> dict:
        """The content of a config.json that transformers can read."""
        width = self.text_config.hidden_size
        data = dataclasses.asdict(self)
        data["image_token_index"] = data.pop("image_token_id")
        return {
            **data,
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "hidden_size": width,
            "projection_dim": width,
            "text_config": self.text_config.to_dict(),
            "vision_config": {**data["vision_config"], "projection_dim": width, "vision_use_head": False},
        }


class GemmaRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32 and cast back after the multiplication; weights start at 0."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)


def rotary_tables(config: GemmaConfig, positions: Tensor, dtype: torch.dtype) -> Rotary:
    """cos and sin [B, 1, L, D] of positions [B, L]; angles in float32, tables in `dtype` as in transformers."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=positions.device) / config.head_dim
    # bit-equal to transformers; theta ** -exponent differs by a unit in the last place
    frequencies = 1.0 / config.rope_theta**exponent / config.rope_factor
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class GemmaAttention(DecoderAttention):
    def __init__(self, config: GemmaConfig, layer: int):
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        super().__init__(layer, AttentionShape(config.hidden_size, heads, kv_heads, head_dim))
        self.scale = (config.query_pre_attn_scalar or head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        self.window = config.window_of(layer)
        self.q_proj = nn.Linear(config.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor) -> Sequence[Tensor]:
        return apply_linears(x, self.q_proj, self.k_proj, self.v_proj)


class GemmaMLP(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.hidden_activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = apply_linears(x, self.gate_proj, self.up_proj)
        return apply_linears(self.activation(gate) * up, self.down_proj)[0]


class GemmaDecoderLayer(nn.Module):
    """Gemma 1: a norm before attention and before the MLP. Gemma 2: one more after each, before the residual sum."""

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.self_attn = GemmaAttention(config, layer)
        self.mlp = GemmaMLP(config)
        self.has_four_norms = config.model_type == "gemma2"
        names = ["input_layernorm", "post_attention_layernorm"]
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if self.has_four_norms else []
        for name in names:
            self.add_module(name, GemmaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None, keep_last: int | None = None
    ) -> Tensor:
        """x [B, L, C] -> [B, L, C], or the last `keep_last` positions [B, keep_last, C]."""
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, cache, keep_last)
        x = x if keep_last is None else x[:, -keep_last:]
        if not self.has_four_norms:  # here post_attention_layernorm is the norm before the MLP
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


@cache
def rounded(value: float, dtype: torch.dtype) -> float:
    """`value` rounded to the nearest number in `dtype`."""
    return torch.tensor(value, dtype=dtype, device="cpu").item()


class GemmaModel(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [B, L, C] times sqrt(C), which is rounded to their dtype as in transformers."""
        x = self.embed_tokens(input_ids)
        return x * rounded(math.sqrt(self.config.hidden_size), x.dtype)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Mask, cache: KVCache | None = None, keep_last: int | None = None
    ) -> Tensor:
        """Embeddings x [B, L, C] at positions [B, L] -> hidden states, see `run_layers`."""
        return run_layers(self, x, rotary_tables(self.config, positions, x.dtype), mask, cache, keep_last)


class PaliGemmaMultiModalProjector(nn.Module):
    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


class PaliGemmaModel(VisionLanguageBackbone):
    """Only text embeddings are scaled by sqrt(C), in `GemmaModel.embed`. Ports that divide the image features by
    sqrt(C) later multiply the whole sequence by sqrt(C), which is equivalent."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(config)
        self.language_model = GemmaModel(config.text_config)

    def mask(self, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> PrefixMask:
        """Image and prompt tokens attend to each other in both directions; the suffix is causal."""
        return PrefixMask.from_tensors(attention_mask, token_type_ids)

    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **images: Tensor,
    ) -> BatchPlan:
        """See `VisionLanguageBackbone.plan`. Raises UserError for labels without token types."""
        if labels is not None and token_type_ids is None:
            raise UserError(
                "labels need token_type_ids: without them the answer is in the prefix, where each token sees the next: "
                "pass those of the processor"
            )
        return super().plan(input_ids, attention_mask, token_type_ids, labels, **images)

    def positions(self, attention_mask: Tensor) -> Tensor:
        """1-based positions [B, L] that count tokens, not pads (rotary angles are relative, so pads change nothing)."""
        return attention_mask.long().cumsum(1).clamp(min=1)


class PaliGemmaForConditionalGeneration(VisionLanguageModel):
    config_class = PaliGemmaConfig
    backbone_class = PaliGemmaModel
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
