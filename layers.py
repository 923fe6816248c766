"""Layers that every model here shares."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Embedding(nn.Embedding):
    """Skips random initialisation on the meta device, where it would import torch.compile and take most of a second."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()
