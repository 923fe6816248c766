"""Gemma 1 and Gemma 2 decoders and PaliGemma: SigLIP features, a linear projector, prefix-LM decoding.

Shapes: B batch, L sequence, H query heads, K key/value heads, D head width, C hidden width, N image tokens, V
vocabulary. Module names are those of transformers >= 5, so that weights and LoRA adapters travel both ways.
Sources: PaliGemma (arXiv 2407.07726), PaliGemma 2 (2412.03555), Gemma (2403.08295), Gemma 2 (2408.00118).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters import attach_adapter, load_differential, save_differential, stored_differential
from attention import PrefixMask, attention, rotate
from checkpoint import load_weights, locate, resolve_run, save_model_folder
from differential_attention import DifferentialConfig, add_differential, as_config
from errors import UserError
from files import read_json
from kernels import apply_linears, capped, head_loss
from modeling_siglip import Embedding, SiglipVisionConfig, SiglipVisionModel

ACTIVATIONS = {
    # Gemma's released configs say "gelu" or null and mean the tanh form
    **dict.fromkeys([None, "gelu", "gelu_pytorch_tanh"], lambda x: F.gelu(x, approximate="tanh")),
    "silu": F.silu,
}


@dataclass
class GemmaConfig:
    """Decoder of either family, `model_type` "gemma" or "gemma2". Defaults: Gemma 2B, the decoder of PaliGemma 3b."""

    model_type: str = "gemma"
    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    hidden_activation: str | None = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    # Gemma 2 only
    query_pre_attn_scalar: float | None = None  # query scale is this ** -0.5; None means head_dim
    attn_logit_softcapping: float | None = None
    # transformers >= 5.23 caps the final logits, 4.52 - 5.0 did not, big_vision never does in training;
    # greedy answers do not change, losses do: None turns it off
    final_logit_softcapping: float | None = None
    # even layers; suffix rows only, as transformers >= 5.23 (big_vision has no window): no effect below 4096 tokens
    sliding_window: int | None = None

    GEMMA2_DEFAULTS = dict(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_key_value_heads=4,
        query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
    )  # fmt: skip

    def __post_init__(self):
        if self.model_type not in ("gemma", "gemma2"):
            raise UserError(f"text model type {self.model_type!r} is unknown here: expected 'gemma' or 'gemma2'")
        if self.hidden_activation not in ACTIVATIONS:
            raise UserError(
                f"hidden_activation {self.hidden_activation!r} is unknown here: {sorted(map(str, ACTIVATIONS))}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"text_config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @classmethod
    def from_dict(cls, data: dict) -> "GemmaConfig":
        """A transformers `text_config` of any version; fields equal to their family's default may be missing."""
        data = dict(data)
        if data.get("model_type", "gemma") == "gemma2":
            data = cls.GEMMA2_DEFAULTS | data
        data["rope_theta"] = (data.get("rope_parameters") or {}).get("rope_theta") or data.get("rope_theta", 10000.0)
        activation = data.get("hidden_activation") or data.get("hidden_act")
        data["hidden_activation"] = activation or "gelu_pytorch_tanh"
        return cls(**_known(cls, data))

    def to_dict(self) -> dict:
        return {
            **dataclasses.asdict(self),
            "hidden_act": self.hidden_activation or "gelu_pytorch_tanh",
            "hidden_activation": self.hidden_activation or "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "query_pre_attn_scalar": self.query_pre_attn_scalar or self.head_dim,
        }


@dataclass
class PaliGemmaConfig:
    text_config: GemmaConfig = field(default_factory=GemmaConfig)
    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    image_token_id: int = 257152
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2
    tie_word_embeddings: bool = True
    model_type: str = "paligemma"

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "PaliGemmaConfig":
        """Read `config.json` of a folder or hub id. Unknown keys are tolerated, unknown model types refused."""
        return cls.from_dict(read_json(locate(resolve_run(path_or_hub_id)[0]) / "config.json"))

    @classmethod
    def from_dict(cls, data: dict) -> "PaliGemmaConfig":
        if data.get("model_type") != "paligemma":
            raise UserError(f"model type {data.get('model_type')!r} is unknown here: config.json must say 'paligemma'")
        if "auto_map" in data:
            raise UserError("config.json asks to run code of its own (auto_map): refused, take a model without")
        text, vision = data.get("text_config", {}), data.get("vision_config", {})
        names = ("pad_token_id", "eos_token_id", "bos_token_id")  # version 5 writes them inside text_config
        ids = {name: text.get(name) if data.get(name) is None else data[name] for name in names}
        return cls(
            text_config=GemmaConfig.from_dict(text),
            vision_config=SiglipVisionConfig(**_known(SiglipVisionConfig, vision)),
            image_token_id=data.get("image_token_index", data.get("image_token_id", 257152)),
            tie_word_embeddings=data.get("tie_word_embeddings", True),
            **{name: value for name, value in ids.items() if value is not None},
        )

    def to_dict(self) -> dict:
        """What transformers reads back."""
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


def _known(cls, data: dict) -> dict:
    names = {f.name for f in dataclasses.fields(cls)}
    return {key: value for key, value in data.items() if key in names}


class GemmaRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32, cast back after the multiplication; stored weights start at 0."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).type_as(x)


def rotary_tables(config: GemmaConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, D] of positions [B, L]; angles in float32, tables in `dtype` as the source has them."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=positions.device) / config.head_dim
    angles = positions[..., None].float() * config.rope_theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


class KVCache:
    """Rotated keys and values of every layer, allocated once: [B, K, max_length, D] each, more key heads where a
    layer's second map has keys of its own."""

    def __init__(self, model: "GemmaModel", batch: int, max_length: int, dtype: torch.dtype, device):
        heads, width = model.config.num_key_value_heads, model.config.head_dim
        added = [layer.self_attn.differential for layer in model.layers]
        self.keys, self.values = (
            [torch.empty(batch, count, max_length, width, dtype=dtype, device=device) for count in counts]
            for counts in ([heads if d is None else d.key_heads for d in added], [heads] * len(added))
        )
        self.length = 0  # tokens held by every layer; the model moves it on after the last layer

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class GemmaAttention(nn.Module):
    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.scale = (config.query_pre_attn_scalar or config.head_dim) ** -0.5
        self.softcap = config.attn_logit_softcapping
        self.window = config.sliding_window if layer % 2 == 0 else None
        query_width, kv_width = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.differential = None  # or the DifferentialAttention that add_differential puts here

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, C] -> q [B, H, L, D], k and v [B, K, L, D], not yet rotated."""
        projected = apply_linears(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        return q, k, v

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: PrefixMask, cache: KVCache | None, rows: int | None = None
    ) -> Tensor:
        """x [B, L, C] -> [B, L, C], or the last `rows` positions of it [B, rows, C]."""
        q, k, v = self.project(x)
        if rows is not None:
            q = q[:, :, -rows:]
        if self.differential is not None:  # a second map, and lambda between the two
            out = self.differential(x, q, k, v, rotary, mask, cache)
        else:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
            if cache is not None:
                k, v = cache.update(self.layer, k, v)
            out = attention(q, k, v, mask, self.scale, self.softcap, self.window)
        return apply_linears(out.transpose(1, 2).flatten(2), self.o_proj)[0]


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
        self.four_norms = config.model_type == "gemma2"
        names = ["input_layernorm", "post_attention_layernorm"]
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if self.four_norms else []
        for name in names:
            self.add_module(name, GemmaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: PrefixMask, cache: KVCache | None, rows: int | None = None
    ) -> Tensor:
        """x [B, L, C] -> [B, L, C], or the last `rows` positions of it [B, rows, C]."""
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, cache, rows)
        x = x[:, -attended.shape[1] :]
        if not self.four_norms:  # here post_attention_layernorm is the norm before the MLP
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaModel(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings times sqrt(C), the factor rounded to their dtype as the source does."""
        x = self.embed_tokens(input_ids)
        return x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype).item()

    def forward(
        self, x: Tensor, positions: Tensor, mask: PrefixMask, cache: KVCache | None = None, rows: int | None = None
    ) -> Tensor:
        """Embeddings x [B, L, C] at positions [B, L] -> normed hidden states [B, L, C], or the last `rows` of them:
        the last layer's keys and values need every position, its queries and its MLP do not."""
        length = x.shape[1]
        rotary = rotary_tables(self.config, positions, x.dtype)
        for index, layer in enumerate(self.layers, 1):
            wanted = rows if index == len(self.layers) else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, mask, cache, wanted, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache, wanted)
        if cache is not None:
            cache.length += length
        return self.norm(x)


class PaliGemmaMultiModalProjector(nn.Module):
    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


class PaliGemmaModel(nn.Module):
    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(config)
        self.language_model = GemmaModel(config.text_config)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Pictures [n, 3, S, S] -> projected patch features [n, N, C], cast to the tower's dtype first."""
        dtype = self.vision_tower.post_layernorm.weight.dtype
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(dtype)))

    def embed(self, input_ids: Tensor, image_features: Tensor | None) -> Tensor:
        """Text embeddings with image features [n, N, C] at the `<image>` tokens, in order.

        Only the text is scaled by sqrt(C). Where a port divides the image features by sqrt(C), it multiplies the
        whole sequence by it later: the same thing, not a missing factor.
        """
        is_image = input_ids == self.config.image_token_id
        x = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # <image> may lie outside the table
        if image_features is None:
            if bool(is_image.any()):
                raise UserError("input_ids hold <image> tokens but there are no pictures: pass pixel_values")
            return x
        tokens, features = int(is_image.sum()), image_features.shape[0] * image_features.shape[1]
        if tokens != features:
            raise UserError(
                f"input_ids hold {tokens} <image> tokens but the pictures give {features} features "
                f"({image_features.shape[0]} x {image_features.shape[1]}): pass every picture of every prompt once"
            )
        return x.masked_scatter(is_image[..., None], image_features.to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        rows: int | None = None,
    ) -> Tensor:
        """Arguments as PaliGemmaForConditionalGeneration's -> hidden states [B, L, C], or the last `rows` of them."""
        mask = PrefixMask.from_tensors(attention_mask, token_type_ids)
        if image_features is None and pixel_values is not None:
            image_features = self.image_features(pixel_values)
        x = self.embed(input_ids, image_features)
        return self.language_model(x, positions_of(attention_mask), mask, rows=rows)


@dataclass
class PaliGemmaOutput:
    loss: Tensor | None = None  # scalar float32
    logits: Tensor | None = None  # [B, L or logits_to_keep, V]


class PaliGemmaForConditionalGeneration(nn.Module):
    """`differential`: a DifferentialConfig or a preset's name, or None for standard attention."""

    def __init__(self, config: PaliGemmaConfig, differential: DifferentialConfig | str | None = None):
        super().__init__()
        self.config = config
        self.model = PaliGemmaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.apply(self._init_weights)
        self.tie_weights()
        if differential is not None:
            add_differential(self, differential)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        differential: DifferentialConfig | str | None = None,
    ) -> "PaliGemmaForConditionalGeneration":
        """Load a hub id, a model folder, or a run folder (its base model with its LoRA adapter put in).

        A folder that holds differential attention brings its own; elsewhere `differential` (a DifferentialConfig or a
        preset's name) adds it at its start values, in float32 whatever `dtype` is.

        The model is built on the meta device and filled from memory-mapped safetensors: no second copy of the weights.
        Raises UserError, one line naming file and key, for anything that does not fit.
        """
        base, adapter = resolve_run(path_or_hub_id)
        folder = locate(base)
        homes = [folder] if adapter is None else [adapter.parent, folder]
        stored = next((home for home in homes if stored_differential(home) is not None), None)
        if differential is not None:
            differential = as_config(differential).resolve()
        elif stored is not None:
            differential = stored_differential(stored)
        config = PaliGemmaConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype, device, tied=config.tie_word_embeddings)
        model.tie_weights()
        model.name_or_path = str(path_or_hub_id)
        if differential is not None:
            add_differential(model, differential)
        if adapter is not None:
            attach_adapter(model, adapter)
        if stored is not None:
            load_differential(model, stored)
        return model.eval()

    def save_pretrained(self, folder: str | Path):
        """Write config.json and safetensors that transformers loads back with equal logits.

        Differential attention goes into a file beside, which `from_pretrained` finds and transformers does not:
        there the model is the standard one.
        """
        save_model_folder(self.state_dict(), self.config.to_dict(), folder, partial(save_differential, self))

    def gradient_checkpointing_enable(self, enabled: bool = True):
        """Recompute layers in the backward pass: less memory, same results."""
        self.model.language_model.gradient_checkpointing = enabled
        self.model.vision_tower.encoder.gradient_checkpointing = enabled

    def head(self, hidden: Tensor) -> Tensor:
        return capped(apply_linears(hidden, self.lm_head)[0], self.config.text_config.final_logit_softcapping)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | None = None,
        image_features: Tensor | None = None,
    ) -> PaliGemmaOutput:
        """One prefix-LM pass.

        input_ids, attention_mask, token_type_ids (1 = suffix; None = all prefix) and labels (-100 = no loss): [B, L];
        pixel_values: [n, 3, S, S], the pictures of all prompts in order; image_features [n, N, C] stands in for them.
        Without labels: `logits` [B, L, V], or of the last `logits_to_keep` rows. With labels: `loss`, the float32 mean
        over all labelled tokens of the batch, the head run on their rows only; logits only if `logits_to_keep` asks.
        """
        rows = last_rows(labels, logits_to_keep)
        hidden = self.model(input_ids, pixel_values, attention_mask, token_type_ids, image_features, rows)
        loss = logits = None
        if labels is not None:
            loss = self.label_loss(hidden, labels[:, -hidden.shape[1] :])
        if labels is None or logits_to_keep is not None:
            logits = self.head(hidden if logits_to_keep is None else hidden[:, -logits_to_keep:])
        return PaliGemmaOutput(loss, logits)

    def label_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy of hidden [B, L, C] at each row whose next token carries a label, in float32."""
        labelled = labels[:, 1:] != -100
        cap = self.config.text_config.final_logit_softcapping
        return head_loss(hidden[:, :-1][labelled], self.lm_head, labels[:, 1:][labelled], cap)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        attention_mask: Tensor,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        image_features: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Continue prompts [B, L], padded on the left -> ids [B, L + new], pad tokens after a row's eos.

        Greedy at temperature 0, else sampled from the smallest set of tokens whose probability reaches `top_p`.
        Stops when every row has met its eos; the vision tower runs once, its features may be passed instead.
        `token_type_ids` is accepted for `model.generate(**batch)`: a prompt is all prefix.
        """
        if not bool(attention_mask[:, -1].all()):
            raise UserError("generate needs prompts padded on the left: the last token of a row is a pad")
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise UserError("generate takes prompts only: token_type_ids mark a suffix, leave it out of the batch")
        batch, length = input_ids.shape
        self._check_budget(length + max_new_tokens)
        if image_features is None and pixel_values is not None:
            image_features = self.model.image_features(pixel_values)
        x = self.model.embed(input_ids, image_features)
        mask, positions = PrefixMask.from_tensors(attention_mask), positions_of(attention_mask)
        cache = KVCache(self.model.language_model, batch, length + max_new_tokens, x.dtype, x.device)

        new_ids, finished = [], torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        for step in range(max_new_tokens):
            hidden = self.model.language_model(x, positions, mask, cache, rows=1)
            token = sample(self.head(hidden[:, -1]), temperature, top_p, generator)
            token = token.masked_fill(finished, self.config.pad_token_id)
            new_ids.append(token)
            finished = finished | (token == self.config.eos_token_id)
            if step + 1 == max_new_tokens or bool(finished.all()):
                break
            x, positions, mask = self.model.language_model.embed(token[:, None]), positions[:, -1:] + 1, mask.grow(1)
        return torch.cat([input_ids, *(token[:, None] for token in new_ids)], dim=1)

    def _check_budget(self, tokens: int):
        limit = self.config.text_config.max_position_embeddings
        if tokens > limit:
            raise UserError(
                f"the sequence needs {tokens} positions and the model has {limit}: use fewer or smaller pictures"
            )


def last_rows(labels: Tensor | None, logits_to_keep: int | None) -> int | None:
    """How many of the last positions the head is asked for: None means all. A label is predicted one row before it."""
    if labels is None:
        return logits_to_keep
    labelled = (labels != -100).any(0)
    first = int(labelled.int().argmax()) if bool(labelled.any()) else labels.shape[1] - 1
    return max(labels.shape[1] - max(first - 1, 0), logits_to_keep or 0)


def positions_of(attention_mask: Tensor) -> Tensor:
    """1-based positions [B, L] that count valid tokens only (rotary angles are relative: pads change nothing)."""
    return attention_mask.long().cumsum(1).clamp(min=1)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens [B] of logits [B, V]; nucleus sampling as in Holtzman et al., arXiv 1904.09751."""
    if temperature <= 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)  # the first token always stays
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
