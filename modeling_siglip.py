"""SigLIP vision tower as PaliGemma uses it: no class token, no pooling head.

B images, N patches = (image_size / patch_size)^2, C hidden size, H heads, D head dim. Module names are those of
transformers >= 5, so that weights and LoRA adapters can be exchanged.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Attend
from config_fields import Depth, Size
from differential_attention import AttentionShape
from errors import UserError
from layers import ACTIVATIONS, Embedding

if TYPE_CHECKING:
    from modeling_clip import ClipVisionConfig

TowerConfig = Union["SiglipVisionConfig", "ClipVisionConfig"]  # CLIP has the same encoder


@dataclass
class SiglipVisionConfig:
    """Defaults: So400m/14 at 224 px, the tower of PaliGemma."""

    hidden_size: Size = 1152
    intermediate_size: Size = 4304
    num_hidden_layers: Depth = 27
    num_attention_heads: Size = 16
    image_size: Size = 224
    patch_size: Size = 14
    num_channels: Size = 3
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    attention_dropout: float = 0.0
    model_type: str = "siglip_vision_model"

    def __post_init__(self):
        if self.model_type != "siglip_vision_model":
            raise UserError(f"vision model_type {self.model_type!r} is not supported: must be 'siglip_vision_model'")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"vision_config.hidden_act {self.hidden_act!r} is not supported: {', '.join(ACTIVATIONS)}")
        if self.attention_dropout:
            raise UserError(f"vision_config.attention_dropout {self.attention_dropout} is not supported: must be 0")
        if self.hidden_size % self.num_attention_heads or self.image_size % self.patch_size:
            raise UserError(
                f"vision_config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and image_size {self.image_size} of patch_size {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class SiglipEmbeddings(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch, stride=patch)
        self.position_embedding = Embedding(config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N, C]
        return patches + self.position_embedding.weight


class SiglipAttention(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        heads = config.num_attention_heads
        self.shape = AttentionShape(config.hidden_size, heads, heads, config.hidden_size // heads)
        self.attend = Attend(mask=None, scale=self.shape.head_dim**-0.5)
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.differential = None  # or a DifferentialAttention, see add_differential

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)  # [B, H, N, D]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.differential is None:
            out = self.attend(q, k, v)
        else:
            k = self.differential.extend_keys(x, k, no_rotation)
            out = self.differential(x, q, k, v, no_rotation, self.attend)
        return self.out_proj(out.transpose(1, 2).flatten(2))


def no_rotation(t: Tensor) -> Tensor:
    """The identity: SigLIP has learned positions and no rotary embedding."""
    return t


class SiglipMLP(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class SiglipEncoderLayer(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipEncoder(nn.Module):
    def __init__(self, config: TowerConfig, num_layers_run: int | None = None):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.num_layers_run = num_layers_run or len(self.layers)  # CLIP stores one more layer, which never runs
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.num_layers_run]:
            recompute = self.gradient_checkpointing and self.training
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        return x


class SiglipVisionModel(nn.Module):
    """Images [B, 3, image_size, image_size] in [-1, 1] -> patch features [B, N, C], after the last LayerNorm."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = SiglipEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.post_layernorm.weight.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))
