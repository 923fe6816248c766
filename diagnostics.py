"""What differential attention does inside a model: lambda, both maps of every layer, attention on the needle.

B batch, L sequence, S keys, H heads, T answer tokens, N image tokens per image. The maps are computed explicitly,
beside the forward pass, which returns only its output.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Attend
from attention_formula import apply_maps, blend
from config_fields import IGNORED_LABEL
from differential_attention import DifferentialAttention, SingleMap, differential_config, differential_modules
from fused_ops import split_keys

# a run saves answers, images and attention of this many questions of each evaluation set, for plots.py
SAVED_QUESTIONS = 2
SMALLEST_NORM = 1e-12  # lower bound of a norm that is divided by


class LayerMaps(NamedTuple):
    """Both branches of one layer; None for what a method does not have."""

    map1: Tensor  # [B, H, L, S]
    map2: Tensor | None
    out1: Tensor  # [B, H, L, Dv]
    out2: Tensor | None
    lambda_: Tensor | None  # [1] or [B, H, L, 1]


Visit = Callable[[str, DifferentialAttention, LayerMaps, Tensor], None]


def compute_layer_maps(module: DifferentialAttention, x, q, k, v, rotate, attend: Attend) -> LayerMaps:
    """Both maps and outputs by the explicit formula; arguments as in `DifferentialAttention.forward`."""
    x = x[:, -q.shape[2] :]
    q1, q2, k, v = module.two_queries(x, q, k, v, rotate)
    k1, k2 = split_keys(k, v)
    attend = module.rescale(attend)
    map1, map2 = attend.maps(q1, k1), None if q2 is None else attend.maps(q2, k2)
    out1, out2 = (
        None if m is None else apply_maps(m.to(q1.dtype).unflatten(1, (v.shape[1], -1)), v) for m in (map1, map2)
    )
    if isinstance(module, SingleMap):
        map2, out2 = map1 if module.config.second == "same" else None, module.second_output(out1)
    return LayerMaps(map1, map2, out1, out2, module.current_lambda(x) if module.has_lambda else None)


@torch.no_grad()
def lambda_values(model: nn.Module) -> dict[str, float]:
    """lambda of every layer that has a single one: all kinds but `token`, whose mean is in `measure_maps`; {} for
    controls without lambda."""
    modules = differential_modules(model).items()
    values = {name: m.current_lambda(None) for name, m in modules if m.has_lambda and m.config.lambda_kind != "token"}
    return dict(zip(values, torch.cat(list(values.values())).tolist(), strict=True)) if values else {}  # one transfer


@contextlib.contextmanager
def forward_hooks(model: nn.Module, hooks: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Within this block `model` is in eval mode, without gradients, and the modules have these forward hooks; compiled
    layers, which would skip them, run eagerly."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    was_training = model.training
    try:
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def visit_differential_layers(model: nn.Module, batch: dict, visit: Visit) -> None:
    """Run `model` on `batch` and call visit(name, module, layer_maps, valid) for every differential layer; valid [B, L]
    is False on padding."""

    def hook_of(name: str):
        def hook(module, args, _):
            x, *_, attend = args
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if attend.mask is not None:
                index = torch.arange(x.shape[1], device=x.device)
                valid = (index >= attend.mask.start[:, None]) & (index < attend.mask.end[:, None])
            visit(name, module, compute_layer_maps(module, *args), valid)

        return hook

    hooks = [(module, hook_of(name)) for name, module in differential_modules(model).items()]
    with forward_hooks(model, hooks):
        model.model(**{key: value for key, value in batch.items() if key != "labels"})


def measure_maps(model: nn.Module, batches: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Layer -> means over the valid tokens of all batches and all heads; {} for standard attention.

    `lambda`; `cosine` of the two outputs and `distance` |o1 - o2| / |o1|; `entropy1`, `entropy2`: mean entropy of the
    rows of the maps in nats. Values that a method does not have are left out. The maps of a whole batch are in memory:
    batches of one row need the least.
    """
    sums: dict[str, dict[str, Tensor]] = defaultdict(lambda: defaultdict(float))
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def visit(name: str, module: DifferentialAttention, maps: LayerMaps, valid: Tensor):
        is_valid = valid[:, None].expand(-1, maps.out1.shape[1], -1)  # [B, H, L]
        values = {"entropy1": row_entropy(maps.map1)[is_valid]}
        if maps.lambda_ is not None:
            values["lambda"] = maps.lambda_ if maps.lambda_.ndim == 1 else maps.lambda_[..., 0][is_valid]
        if maps.out2 is not None:
            out1 = maps.out1.float()
            out2 = maps.out2.float().repeat_interleave(out1.shape[1] // maps.out2.shape[1], dim=1)
            values["cosine"] = F.cosine_similarity(out1, out2, dim=-1)[is_valid]
            values["distance"] = ((out1 - out2).norm(dim=-1) / out1.norm(dim=-1).clamp(min=SMALLEST_NORM))[is_valid]
        if maps.map2 is not None:
            values["entropy2"] = row_entropy(maps.map2)[valid[:, None].expand(maps.map2.shape[:3])]
        for key, value in values.items():
            sums[name][key] += value.float().sum()
            counts[name][key] += value.numel()

    if differential_config(model) is not None:
        for batch in batches:
            visit_differential_layers(model, batch, visit)
    means = [total / counts[name][key] for name, line in sums.items() for key, total in line.items()]
    numbers = iter(torch.stack(means).tolist() if means else ())  # one transfer
    return {name: dict(zip(line, numbers, strict=False)) for name, line in sums.items()}


def row_entropy(maps: Tensor) -> Tensor:
    """Entropy in nats [B, H, L] of the rows of maps [B, H, L, S]."""
    return torch.special.entr(maps).sum(-1)


def select_heads(model: nn.Module, batches: Sequence[dict]) -> None:
    """DEX: restrict W_D to the half of the heads of each layer, at least one, whose rows have the highest entropy on
    `batches`. Does nothing for other presets."""
    config = differential_config(model)
    if config is None or config.second != "value":
        return
    entropies: dict[str, Tensor] = defaultdict(float)

    def visit(name: str, module: DifferentialAttention, maps: LayerMaps, valid: Tensor):
        entropies[name] += (row_entropy(maps.map1) * valid[:, None]).sum((0, 2))

    for batch in batches:
        visit_differential_layers(model, batch, visit)
    for name, module in differential_modules(model).items():
        module.selected.zero_()[entropies[name].topk(max(1, len(entropies[name]) // 2)).indices] = 1


# ---- attention on the needle
def effective_map(module: DifferentialAttention | None, maps: LayerMaps) -> Tensor:
    """The map [B, H, L, S] that a layer applies to its values: A in standard attention (`module` is None), A1 + gamma
    (A1 - A2) or A1 - lambda A2 in differential attention.

    For `dex` it is only A1: what W_D subtracts is not a map.
    """
    if maps.map2 is None or module.config.combine == "replace":
        return maps.map1 if maps.map2 is None else maps.map2
    is_normalised = module.config.combine == "normalised"
    weight = maps.lambda_ / (1 - maps.lambda_) if is_normalised else maps.lambda_
    return blend(maps.map1, maps.map2, weight, is_normalised)


def first_map(module: DifferentialAttention | None, maps: LayerMaps) -> Tensor:
    """A1 [B, H, L, S], the only map of standard attention."""
    return maps.map1


def subtracted_map(module: DifferentialAttention | None, maps: LayerMaps) -> Tensor:
    """lambda A2 [B, H, L, S]; zeros where nothing is subtracted."""
    if maps.map2 is None or module.config.combine == "replace":
        return torch.zeros_like(maps.map1)
    return maps.map1 - blend(maps.map1, maps.map2, maps.lambda_, False)


def decoder_maps(
    layer_attention: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], mask
) -> tuple[DifferentialAttention | None, LayerMaps]:
    """The differential module of a decoder layer, if any, and its maps; standard attention has map1 alone."""
    q, k, v, rotate, attend = layer_attention.attention_inputs(x, rotary, mask, None, None)
    module = layer_attention.differential
    if module is None:
        return None, LayerMaps(attend.maps(q, k), None, None, None, None)
    return module, compute_layer_maps(module, x, q, k, v, rotate, attend)


def answer_attention(
    model: nn.Module, batch: dict, parts: Sequence[Callable[..., Tensor]] = (effective_map,)
) -> Tensor:
    """Attention of the answer tokens to the image patches, heads averaged: [parts, layers, B, T, N of all images].

    `parts`: `effective_map`, the map applied to the values, `first_map` or `subtracted_map`. T: label tokens of the
    shortest answer; entry t is the attention that predicts token t. All prompts of `batch` have the same number of
    image tokens.
    """
    predicts = batch["labels"][:, 1:] != IGNORED_LABEL
    predicts &= predicts.cumsum(1) <= predicts.sum(1).min()
    is_patch = model.model.patch_tokens(batch["input_ids"], batch.get("image_sizes"))
    count, layers = len(predicts), model.model.language_model.layers
    attention = []

    def hook(layer_attention, args, _):
        module, maps = decoder_maps(layer_attention, *args[:3])
        for part in parts:
            to_all = part(module, maps).mean(1)[:, :-1][predicts].unflatten(0, (count, -1))  # [B, T, S]
            attention.append(to_all.transpose(1, 2)[is_patch].unflatten(0, (count, -1)).transpose(1, 2))

    with forward_hooks(model, [(layer.self_attn, hook) for layer in layers]):
        model(**batch)
    return torch.stack(attention).unflatten(0, (-1, len(parts))).transpose(0, 1)


def needle_share(attention: Tensor, needle: tuple[int, int, int], images: int, grid: int) -> Tensor:
    """The needle's share of the attention to the patches of all images: [..., M N] -> [...].

    `needle` is (image, row, column) from 0; the N patches of each of the M = `images` images are row-major; a patch
    belongs to the cell with its centre. Shares are of absolute values: a differential map has negative entries.
    """
    maps = attention.unflatten(-1, (images, -1)).abs()
    side = math.isqrt(maps.shape[-1])
    cell = ((torch.arange(side, device=attention.device) + 0.5) * grid / side).long()
    inside = (cell[:, None] == needle[1]) & (cell[None, :] == needle[2])
    return maps[..., needle[0], :][..., inside.flatten()].sum(-1) / maps.sum((-1, -2))
