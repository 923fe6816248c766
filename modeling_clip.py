"""CLIP vision tower as Phi-3-vision uses it: the patch features before the last layer.

B images, N patches = (image_size / patch_size)^2, C hidden size. Module names are those of transformers >= 5.
Sources: CLIP (arXiv 2103.00020), transformers' CLIPVisionModel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config_fields import Depth, Size
from errors import UserError
from layers import ACTIVATIONS, Embedding
from modeling_siglip import SiglipEncoder


@dataclass
class ClipVisionConfig:
    """Defaults: CLIP ViT-L/14 at 336 px, the tower of Phi-3-vision."""

    hidden_size: Size = 1024
    intermediate_size: Size = 4096
    num_hidden_layers: Depth = 24
    num_attention_heads: Size = 16
    image_size: Size = 336
    patch_size: Size = 14
    num_channels: Size = 3
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"vision_config.hidden_act {self.hidden_act!r} is not supported: {', '.join(ACTIVATIONS)}")
        if self.num_hidden_layers < 2:
            raise UserError("vision_config.num_hidden_layers 1: must be at least 2, since the last layer is not run")
        if self.hidden_size % self.num_attention_heads or self.image_size % (2 * self.patch_size):
            raise UserError(
                f"vision_config: hidden_size {self.hidden_size} must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}, and image_size {self.image_size} of twice patch_size {self.patch_size}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class ClipEmbeddings(nn.Module):
    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        patch = config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=patch, stride=patch, bias=False
        )
        self.position_embedding = Embedding(1 + config.num_patches, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N, C]
        class_token = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((class_token, patches), dim=1) + self.position_embedding.weight


class ClipVisionModel(nn.Module):
    """Images [B, 3, image_size, image_size] -> patch features [B, N, C] after the second-to-last layer, without the
    class token. The last layer and `post_layernorm` are stored and saved but never run."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = ClipEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # transformers' spelling
        self.encoder = SiglipEncoder(config, num_layers_run=config.num_hidden_layers - 1)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @property
    def dtype(self) -> torch.dtype:
        return self.pre_layrnorm.weight.dtype

    def unused_modules(self) -> list[nn.Module]:
        """The modules that are stored but never run."""
        return [*self.encoder.layers[self.encoder.num_layers_run :], self.post_layernorm]

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))[:, 1:]
