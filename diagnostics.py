"""Looking inside differential attention: lambda and both maps of every layer, and the numbers that a run logs of them.

Shapes: B batch, L sequence, S keys, H heads. Maps come from the explicit reference, beside a forward pass that returns
its output and nothing else.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import attention_maps, dense_mask, rotate
from differential_attention import DifferentialAttention, Explained, differential_modules
from kernels import blend

See = Callable[[str, DifferentialAttention, Explained, Tensor], None]


@torch.no_grad()
def lambda_values(model: nn.Module) -> dict[str, float]:
    """lambda of every layer that has one number: all kinds but `token`, whose mean is in `diagnostics`."""
    modules = differential_modules(model).items()
    return {name: float(m.current_lambda(None)) for name, m in modules if m.config.lambda_kind != "token"}


@torch.no_grad()
def look_inside(model: nn.Module, batch: dict, see: See):
    """Run `model` on `batch` and call see(name, module, explained, valid [B, L]) for every differential layer."""

    def hook(name: str):
        def call(module, args, kwargs, _):
            x, *_ = args
            mask = kwargs.get("mask", args[5] if len(args) > 5 else None)
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if mask is not None:
                index = torch.arange(x.shape[1], device=x.device)
                valid = (index >= mask.start[:, None]) & (index < mask.end[:, None])
            see(name, module, module.explain(*args, **kwargs), valid)

        return call

    modules = differential_modules(model).items()
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules]
    training = model.training
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled layers would pass the hooks by
            model.eval().model(**{key: value for key, value in batch.items() if key != "labels"})
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def diagnostics(model: nn.Module, batch: dict) -> dict[str, dict[str, float]]:
    """Layer -> means over the batch's valid tokens and all heads, from the explicit reference.

    `lambda`; `cosine` of the branches' outputs and `distance` |O1 - O2| / |O1|; `entropy1`, `entropy2` of the maps'
    rows in nats. Values that a method lacks are left out.
    """
    told = {}

    def see(name: str, module: DifferentialAttention, explained: Explained, valid: Tensor):
        at = valid[:, None].expand(-1, explained.out1.shape[1], -1)  # [B, H, L]
        lambda_ = explained.lambda_
        line = {
            "lambda": lambda_ if lambda_.ndim == 1 else lambda_[..., 0][at],
            "entropy1": row_entropy(explained.first)[at],
        }
        if explained.out2 is not None:
            out1 = explained.out1.float()
            out2 = explained.out2.float().repeat_interleave(out1.shape[1] // explained.out2.shape[1], dim=1)
            line["cosine"] = F.cosine_similarity(out1, out2, dim=-1)[at]
            line["distance"] = ((out1 - out2).norm(dim=-1) / out1.norm(dim=-1).clamp(min=1e-12))[at]
        if explained.second is not None:
            line["entropy2"] = row_entropy(explained.second)[valid[:, None].expand(explained.second.shape[:3])]
        told[name] = {key: value.float().mean().item() for key, value in line.items()}

    look_inside(model, batch, see)
    return told


def row_entropy(maps: Tensor) -> Tensor:
    """Entropy in nats [B, H, L] of the rows of maps [B, H, L, S]."""
    return torch.special.entr(maps).sum(-1)


def select_heads(model: nn.Module, batch: dict):
    """DEX: restrict W_D to the half of each layer's heads whose rows have the highest entropy on `batch`."""

    def see(name: str, module: DifferentialAttention, explained: Explained, valid: Tensor):
        if module.config.second == "value":
            entropy = (row_entropy(explained.first) * valid[:, None]).sum((0, 2))
            module.selected.zero_()[entropy.topk(len(entropy) // 2).indices] = 1

    look_inside(model, batch, see)


@torch.no_grad()
def answer_attention(model: nn.Module, batch: dict) -> Tensor:
    """What the answer's tokens pay to each picture patch, in every decoder layer: [layers, B, T, N], heads averaged.

    The map that acts: A in standard attention, A1 + gamma (A1 - A2) or A1 - lambda A2 in differential attention.
    `batch` holds labels of T tokens in every row and N image tokens in every prompt; entry t predicts token t.
    """
    rows = batch["labels"][:, 1:] != -100
    patches = batch["input_ids"] == model.config.image_token_id
    count, layers = len(rows), model.model.language_model.layers
    found = []

    def see(attend, args, _):
        paid = acting_map(attend, *args[:3]).mean(1)[:, :-1][rows].unflatten(0, (count, -1))  # [B, T, S]
        found.append(paid.transpose(1, 2)[patches].unflatten(0, (count, -1)).transpose(1, 2))

    handles = [layer.self_attn.register_forward_hook(see) for layer in layers]
    try:
        model.eval()(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def needle_share(paid: Tensor, place: tuple[int, int, int], images: int, grid: int) -> Tensor:
    """The needle's share of what is paid to the patches of all pictures: [..., M N] -> [...].

    `place` is (picture, row, column) from 0, N patches of each of M = `images` pictures lie row by row; a patch counts
    to the cell that holds its centre. Shares are of absolute values: a differential map has negative entries.
    """
    maps = paid.unflatten(-1, (images, -1)).abs()
    side = math.isqrt(maps.shape[-1])
    cell = ((torch.arange(side, device=paid.device) + 0.5) * grid / side).long()
    inside = (cell[:, None] == place[1]) & (cell[None, :] == place[2])
    return maps[..., place[0], :][..., inside.flatten()].sum(-1) / maps.sum((-1, -2))


def acting_map(attend: nn.Module, x: Tensor, rotary, mask) -> Tensor:
    """The map [B, H, L, S] by which a decoder layer's attention weighs its values."""
    q, k, v = attend.project(x)
    if attend.differential is None:
        dense = dense_mask(mask, q.shape[2], k.shape[2], attend.window)
        return attention_maps(rotate(q, *rotary), rotate(k, *rotary), dense, attend.scale, attend.softcap).flatten(1, 2)
    added = attend.differential
    explained = added.explain(x, q, k, v, rotary, mask)
    if explained.second is None or added.config.combine == "replace":
        return explained.first if explained.second is None else explained.second
    weight = added.blend_weight(x)
    return blend(explained.first, explained.second, weight, added.config.combine == "normalised")
