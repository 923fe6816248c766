"""Cross entropy of a large vocabulary under a frozen head, without its logits.

Shapes: n rows, C hidden width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TILE = 4096  # tokens of the vocabulary at a time: n x TILE logits stay in a core's cache
SMALL = 1 << 22  # up to so many logits the plain formula takes no longer


def head_loss(hidden: Tensor, head: nn.Module, labels: Tensor, softcap: float | None) -> Tensor:
    """Mean cross entropy, float32, of hidden [n, C] against labels [n]; logits are head(hidden), soft-capped.

    In tiles where the head is a frozen nn.Linear and the logits are many; the formula itself elsewhere.
    """
    plain_head = type(head) is nn.Linear and head.bias is None and not head._forward_hooks
    if plain_head and not head.weight.requires_grad and len(labels) * head.out_features > SMALL:
        return TiledHeadLoss.apply(hidden, head.weight, labels, softcap)
    return F.cross_entropy(capped(head(hidden), softcap).float(), labels)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class TiledHeadLoss(torch.autograd.Function):
    """The loss, and in the same pass its gradient: sum_v p_v W_v - W_label per row.

    That sum is attention with the head's rows as keys and values, so it is formed as flash attention is: tile by tile,
    rescaled where a later tile holds a larger logit. W is read once, nothing n x V exists.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        rows, column = hidden.to(weight.dtype), labels[:, None]
        wide = torch.promote_types(weight.dtype, torch.float32)
        top = torch.full((len(rows), 1), -torch.inf, dtype=wide, device=rows.device)
        total, target, own_slope = torch.zeros_like(top), torch.zeros_like(top), torch.ones_like(top)
        mean = torch.zeros(rows.shape, dtype=wide, device=rows.device)  # sum_v exp(l_v - top) W_v
        for start, tile in zip(range(0, len(weight), TILE), weight.split(TILE), strict=True):
            logits = capped(rows @ tile.T, softcap).to(wide)
            at = (column - start).clamp(0, len(tile) - 1)
            here = (column >= start) & (column < start + len(tile))
            target = torch.where(here, logits.gather(1, at), target)
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            fade = (top - new_top).exp_()
            slope = None if softcap is None else 1 - (logits / softcap) ** 2
            shares = logits.sub_(new_top).exp_()
            total = total * fade + shares.sum(1, keepdim=True)
            if slope is not None:
                own_slope = torch.where(here, slope.gather(1, at), own_slope)
                shares = shares * slope
            if ctx.needs_input_grad[0]:
                mean.mul_(fade).add_(shares.to(weight.dtype) @ tile)
            top = new_top
        if ctx.needs_input_grad[0]:
            gradient = (mean / total - own_slope * weight[labels]) / len(labels)
            ctx.save_for_backward(gradient.to(hidden.dtype))
        return (top + total.log() - target).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (d_hidden,) = ctx.saved_tensors
        return gradient * d_hidden, None, None, None
