"""Hand-written autograd functions: blended attention maps, attention in chunks of queries, the tiled head loss, LoRA.

Nothing here is needed to understand the model: every function names the plain formula that it equals and the test that
proves it. Formulas of attention are in attention_formula.py.

B batch, L queries, S keys, H query heads, K key/value heads, G = H / K, D head dim, Dv value head dim, R second
queries (H, or fewer, each shared by H / R heads), n rows, C hidden size, V vocabulary, r rank.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attention_formula import apply_maps, apply_softcap, attention_scores, blend, softmax_maps

CHUNK = 64  # queries per chunk: their maps stay in a core's cache
GPU_CHUNK = 512  # the same on a GPU, where every chunk costs launches
TILE = 4096  # vocabulary tokens per tile: n x TILE logits stay in a core's cache
GPU_TILE_LOGITS = 1 << 25  # logits per tile on a GPU: few launches, 128 MB in float32
PLAIN_LOSS_MAX_LOGITS = 1 << 22  # up to this many logits the plain loss is as fast as the tiled one


# ---- both maps: forward and backward
class Maps(NamedTuple):
    """Both maps [B, K, *, L, S] and the derivatives of the soft-cap at their scores; None for what does not exist."""

    first: Tensor
    first_slope: Tensor | None
    second: Tensor | None
    second_slope: Tensor | None


class BlendedAttention(torch.autograd.Function):
    """P v for the blend P of two attention maps, which are kept for the backward pass; each pass multiplies by the
    values once.

    Equals `attention_formula.blended_reference`: tests/test_attention.py, test_fast_paths_equal_the_formula. With
    P = a P1 + b P2, G the gradient of the output, and `*` elementwise:

        dv = P^T G    dP = G v^T    D_i = rowsum(P_i * dP)    dS1 = a P1 * (dP - D1)    dS2 = b P2 * (dP - D2)

    The gradient of the weight is D1 - D2 where normalised (a = 1 + weight, b = -weight) and -D2 otherwise (a = 1,
    b = -weight); a soft-cap adds the factor 1 - (S / c)^2 to dS.
    """

    @staticmethod
    def forward(ctx, q1, q2, k, v, weight, dense, scale, normalised, softcap) -> Tensor:
        """Arguments as in `attention.blended_attention`; `dense` is the bool mask [B, 1, L, S] or None."""
        maps = compute_maps(q1, q2, k, v, dense, scale, softcap)
        ctx.save_for_backward(q1, q2, k, v, weight, *maps)
        ctx.options = scale, normalised
        return apply_maps(blend_maps(maps, weight, normalised).to(v.dtype), v)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        q1, q2, k, v, weight, *maps = ctx.saved_tensors
        return *attention_gradients(gradient, q1, q2, k, v, weight, Maps(*maps), *ctx.options), *[None] * 4


class ChunkedAttention(torch.autograd.Function):
    """Blended attention, or standard attention where q2 is None, CHUNK queries at a time. The backward pass recomputes
    the maps of each chunk, so no [L, S] tensor is kept.

    Equals `attention_formula.blended_reference` and `attention_formula.attention_reference`: tests/test_attention.py,
    test_chunks_equal_the_formula_in_float64.
    """

    @staticmethod
    def forward(ctx, q1, q2, k, v, weight, mask, scale, normalised, softcap, window) -> Tensor:
        """Arguments as in `attention.blended_attention`; with q2 and weight None, the first map alone."""
        ctx.save_for_backward(q1, q2, k, v, weight)
        ctx.options = mask, scale, normalised, softcap, window
        out = v.new_empty(*q1.shape[:3], v.shape[-1])
        for queries, keys, dense in query_chunks(mask, q1.shape[2], k.shape[2], window, k.device.type):
            k_seen, v_seen = k[:, :, keys], v[:, :, keys]
            chunks = select_queries(q1, queries), select_queries(q2, queries), select_queries(weight, queries)
            maps = compute_maps(*chunks[:2], k_seen, v_seen, dense, scale, softcap)
            out[:, :, queries] = apply_maps(blend_maps(maps, chunks[2], normalised).to(v.dtype), v_seen)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        q1, q2, k, v, weight = ctx.saved_tensors
        mask, scale, normalised, softcap, window = ctx.options
        wide = torch.promote_types(k.dtype, torch.float32)  # for sums over chunks
        d_q1, d_q2 = (None if q is None else torch.empty_like(q) for q in (q1, q2))
        d_k, d_v, d_weight = (None if t is None else torch.zeros_like(t, dtype=wide) for t in (k, v, weight))
        for queries, keys, dense in query_chunks(mask, q1.shape[2], k.shape[2], window, k.device.type):
            inputs = [select_queries(q1, queries), select_queries(q2, queries), k[:, :, keys], v[:, :, keys]]
            maps = compute_maps(*inputs, dense, scale, softcap)
            chunk_weight = select_queries(weight, queries)
            gradients = attention_gradients(gradient[:, :, queries], *inputs, chunk_weight, maps, scale, normalised)
            d_q1[:, :, queries] = gradients[0]
            d_k[:, :, keys] += gradients[2]
            d_v[:, :, keys] += gradients[3]
            if q2 is not None:
                d_q2[:, :, queries] = gradients[1]
                select_queries(d_weight, queries).add_(gradients[4])
        d_weight = None if weight is None else d_weight.to(weight.dtype)
        return d_q1, d_q2, d_k.to(k.dtype), d_v.to(v.dtype), d_weight, *[None] * 5


def query_chunks(
    mask, queries: int, keys: int, window: int | None, device: str = "cpu"
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Yields (queries, keys, dense): a chunk of queries, the keys that any of them sees, and their mask, None where
    every query sees all of these keys. `mask`: a PrefixMask or None; `device`: its type, which sets the chunk size."""
    offset, size = keys - queries, CHUNK if device == "cpu" else GPU_CHUNK
    for first in range(0, queries, size):
        last = min(first + size, queries)
        if mask is None:
            low, high, dense = 0, keys, None
        else:
            low, high, sees_all = mask.visible_keys(offset + first, offset + last, keys)
            dense = None if sees_all else mask.block((offset + first, offset + last), (low, high), window)
        yield slice(first, last), slice(low, high), dense


def select_queries(t: Tensor | None, queries: slice) -> Tensor | None:
    """The slice `queries` of t [B, H, L, *]; None and a weight [1], shared by all queries, are returned unchanged."""
    return t if t is None or t.ndim == 1 else t[:, :, queries]


def compute_maps(
    q1: Tensor,
    q2: Tensor | None,
    k: Tensor,
    v: Tensor,
    dense: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Maps:
    """Both maps; arguments as in `BlendedAttention.forward`.

    Each map is computed by the operations of standard attention, so that equal queries give bit-equal maps.
    """
    made = []
    for q, key in zip((q1, q2), split_keys(k, v), strict=True):
        scores = None if q is None else attention_scores(q, key, scale, softcap)
        # taken before masking: 0 times inf would be NaN
        slope = None if q is None or softcap is None else 1 - (scores / softcap) ** 2
        made += [None if q is None else softmax_maps(scores, dense), slope]
    return Maps(*made)


def split_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of the first and of the second map, which are the same tensor where k has as many heads as v."""
    return (k, k) if k.shape[1] == v.shape[1] else k.chunk(2, dim=1)


def blend_maps(maps: Maps, weight: Tensor | None, normalised: bool) -> Tensor:
    """The map that is applied to the values."""
    if maps.second is None:
        return maps.first
    return blend(maps.first.flatten(1, 2), maps.second.flatten(1, 2), weight, normalised).view_as(maps.first)


def attention_gradients(
    gradient: Tensor,
    q1: Tensor,
    q2: Tensor | None,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    maps: Maps,
    scale: float,
    normalised: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of q1, q2, k, v and weight by the formulas of `BlendedAttention`."""
    first, second = maps.first, maps.second
    (k1, k2), kv_heads = split_keys(k, v), v.shape[1]
    g = gradient.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # query heads of a group as rows, as in the forward pass
    d_v = blend_maps(maps, weight, normalised).to(v.dtype).flatten(2, 3).mT @ g
    d_maps = (g @ v.mT).to(first.dtype).view_as(first)
    if q2 is None:
        d_q1, d_k1 = softmax_gradients(d_maps, first, maps.first_slope, 1.0, q1, k1, scale)
        return d_q1, None, d_k1, d_v, None
    d_q1, d_k1 = softmax_gradients(d_maps, first, maps.first_slope, 1 + weight if normalised else 1.0, q1, k1, scale)
    heads_per_query = first.shape[2] // second.shape[2]  # heads that share a second query
    d_second, factor = d_maps, -weight
    if heads_per_query > 1:
        weighted = (factor * d_maps.flatten(1, 2)).view_as(d_maps)
        d_second, factor = weighted.unflatten(2, (-1, heads_per_query)).sum(3), 1.0
    d_q2, d_k2 = softmax_gradients(d_second, second, maps.second_slope, factor, q2, k2, scale)
    second = second.repeat_interleave(heads_per_query, dim=2) if heads_per_query > 1 else second
    d_weight_rows = -((second - first if normalised else second) * d_maps).sum(-1, keepdim=True).flatten(1, 2)
    d_k = d_k1 + d_k2 if k1 is k2 else torch.cat((d_k1, d_k2), dim=1)
    return d_q1, d_q2, d_k, d_v, d_weight_rows.sum_to_size(weight.shape).to(weight.dtype)


def softmax_gradients(
    d_maps: Tensor, maps: Tensor, slope: Tensor | None, factor: Tensor | float, q: Tensor, k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from the gradient of factor x maps.

    The factor, a number or one per query, is multiplied into the queries, which are narrower than the maps.
    """
    d_scores = torch.ops.aten._softmax_backward_data(d_maps, maps, -1, maps.dtype)
    d_scores = d_scores if slope is None else d_scores.mul_(slope)
    d_scores, factor = d_scores.to(q.dtype).flatten(2, 3), factor * scale
    scaled = (q * factor).to(q.dtype).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    d_q = (d_scores @ k).view(q.shape) * factor
    return d_q.to(q.dtype), d_scores.mT @ scaled


# ---- flash attention on ragged rows
class Segments(NamedTuple):
    """How two calls of variable-length attention cover a batch, see `attention.PrefixMask.segments`. The offsets are
    int32: sequence i of a call is cu_seqlens[i] .. cu_seqlens[i + 1] - 1 of the packed tokens."""

    # call 1, all queries as prefix: (queries, keys) [3 B + 1], the pads, the prefix and the suffix of every row; None
    # without a prefix
    prefix: tuple[Tensor, Tensor] | None
    # call 2, the last M queries as suffix: (queries, keys) [2 B + 1], for every row no query and all pads as keys, then
    # its last M queries and the rest of its keys
    suffix: tuple[Tensor, Tensor]
    in_suffix: Tensor  # [B, M, 1, 1] which of the last M queries are in the suffix


class PrefixFlashAttention(torch.autograd.Function):
    """Attention of q [B, L, H, D] to k, v [B, S, K, D] under a prefix-LM mask -> [B, L, H, D], by two calls of flash
    attention: one treats all queries as prefix, the other the last queries as suffix; each query keeps the result
    that applies to it.

    Equals `attention_formula.attention_reference`: tests/test_cuda_path.py,
    test_two_calls_of_flash_attention_are_the_prefix_mask.
    """

    @staticmethod
    def forward(ctx, q, k, v, segments: Segments, scale: float) -> Tensor:
        """`segments`: those of the mask for this number of queries and keys."""
        prefix_out, suffix_out, saved, count = None, None, [q, k, v], segments.in_suffix.shape[1]
        if segments.prefix is not None:
            prefix_out, *more = flash(q, k, v, *segments.prefix, scale, causal=False)
            saved += [prefix_out, *more]
        if count:
            suffix_out, *more = flash(q[:, -count:], k, v, *segments.suffix, scale, causal=True)
            saved += [suffix_out, *more]
        ctx.save_for_backward(*saved)
        ctx.segments, ctx.scale = segments, scale
        if prefix_out is None or suffix_out is None:
            return suffix_out if prefix_out is None else prefix_out
        last = torch.where(segments.in_suffix, suffix_out, prefix_out[:, -count:])
        return torch.cat((prefix_out[:, :-count], last), dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        q, k, v, *saved = ctx.saved_tensors
        segments, count = ctx.segments, ctx.segments.in_suffix.shape[1]
        found, has_both = [], segments.prefix is not None and count > 0
        if segments.prefix is not None:
            g = gradient
            if has_both:  # no gradient flows into a discarded result
                g = gradient.clone(memory_format=torch.contiguous_format)
                g[:, -count:].masked_fill_(segments.in_suffix, 0)
            found.append(flash_backward(g, q, k, v, *saved[:3], *segments.prefix, ctx.scale, causal=False))
        if count:
            g = gradient[:, -count:].masked_fill(~segments.in_suffix, 0) if has_both else gradient
            found.append(flash_backward(g, q[:, -count:], k, v, *saved[-3:], *segments.suffix, ctx.scale, causal=True))
        d_q, d_k, d_v = found[0]
        if has_both:
            d_q[:, -count:] += found[1][0]
            d_k, d_v = d_k.add_(found[1][1]), d_v.add_(found[1][2])
        return d_q, d_k, d_v, None, None


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(output [B, L, H, D], log-sum-exp, RNG state) of one call of torch's variable-length flash attention on the rows
    of q, k, v [B, L or S, heads, D], one after another.

    Sequence i of the queries attends to sequence i of the keys: to all of it, or causally, aligned to the lower right.
    """
    out, lse, rng, *_ = torch.ops.aten._flash_attention_forward(
        *map(pack, (q, k, v)), cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1], 0.0, causal, False, scale=scale
    )
    return out.view(q.shape), lse, rng


def flash_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rng: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
) -> list[Tensor]:
    """Gradients of q, k and v; takes the arguments and results of `flash`."""
    packed, lengths = map(pack, (gradient, q, k, v, out)), (q.shape[1], k.shape[1])
    found = torch.ops.aten._flash_attention_backward(
        *packed, lse, cu_seqlens_q, cu_seqlens_k, *lengths, 0.0, causal, rng, rng, scale=scale
    )
    return [d.view(t.shape) for d, t in zip(found, (q, k, v), strict=True)]


def pack(t: Tensor) -> Tensor:
    """[B, L, heads, D] as rows [B L, heads, D]."""
    return t.reshape(-1, *t.shape[2:])


# ---- the loss of a frozen head
def head_loss(hidden: Tensor, head: nn.Module, labels: Tensor, softcap: float | None) -> Tensor:
    """Mean cross entropy, float32, of hidden [n, C] against labels [n]; the logits are head(hidden), soft-capped.

    Tiled if the head is a frozen nn.Linear and there are many logits; otherwise the plain formula.
    """
    is_plain = type(head) is nn.Linear and head.bias is None and not has_hooks(head)
    if is_plain and not head.weight.requires_grad and len(labels) * head.out_features > PLAIN_LOSS_MAX_LOGITS:
        return TiledHeadLoss.apply(hidden, head.weight, labels, softcap)
    return F.cross_entropy(apply_softcap(head(hidden), softcap).float(), labels)


def tile_size(rows: int, device_type: str) -> int:
    """Vocabulary tokens per tile for the logits of this many rows."""
    return TILE if device_type == "cpu" else max(1, GPU_TILE_LOGITS // max(rows, 1) // TILE) * TILE  # rows stay aligned


class TiledHeadLoss(torch.autograd.Function):
    """F.cross_entropy(soft-capped hidden @ weight.T, labels), without storing the logits: tests/test_speed_paths.py,
    test_the_tiled_loss_is_the_formula_in_float64.

    The gradient is computed in the forward pass: sum_v p_v W_v - W_label per row. The sum is attention with the rows of
    the head as keys and values, so it is computed like flash attention: tile by tile, rescaled when a later tile has a
    larger logit. W is read once, and no tensor of size n x V exists.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        rows, column = hidden.to(weight.dtype), labels[:, None]
        wide = torch.promote_types(weight.dtype, torch.float32)
        top = torch.full((len(rows), 1), -torch.inf, dtype=wide, device=rows.device)
        total, target, target_slope = torch.zeros_like(top), torch.zeros_like(top), torch.ones_like(top)
        mean = torch.zeros(rows.shape, dtype=wide, device=rows.device)  # sum_v exp(l_v - top) W_v
        size = tile_size(len(rows), rows.device.type)
        for start, tile in zip(range(0, len(weight), size), weight.split(size), strict=True):
            logits = apply_softcap(rows @ tile.T, softcap).to(wide)
            at = (column - start).clamp(0, len(tile) - 1)
            is_here = (column >= start) & (column < start + len(tile))
            target = torch.where(is_here, logits.gather(1, at), target)
            new_top = torch.maximum(top, logits.amax(1, keepdim=True))
            rescale = (top - new_top).exp_()
            slope = None if softcap is None else 1 - (logits / softcap) ** 2
            shares = logits.sub_(new_top).exp_()
            total = total * rescale + shares.sum(1, keepdim=True)
            if slope is not None:
                target_slope = torch.where(is_here, slope.gather(1, at), target_slope)
                shares = shares * slope
            if ctx.needs_input_grad[0]:
                mean.mul_(rescale).add_(shares.to(weight.dtype) @ tile)
            top = new_top
        if ctx.needs_input_grad[0]:
            gradient = (mean / total - target_slope * weight[labels]) / len(labels)
            ctx.save_for_backward(gradient.to(hidden.dtype))
        return (top + total.log() - target).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        (d_hidden,) = ctx.saved_tensors
        return gradient * d_hidden, None, None, None


# ---- LoRA
def apply_linears(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """(module(x) for each module), computed together if every module is a peft LoRA layer on a frozen nn.Linear.

    peft computes x W^T, then (x A^T) B^T, scales it and adds it. Each step is a pass over the whole output, in float32
    if the base is bfloat16. Here the layers of one input share one product with their stacked A, and the product with B
    is added inside a matmul. The factors are float32 masters, cast to the dtype of the base; parameters, names and
    files stay peft's. In all other cases (dropout, a bias, a merged or disabled adapter, a hook, another kind of layer,
    autocast to another dtype) the modules themselves are called.
    """
    if not all(is_plain_lora(module, x) for module in modules):
        return tuple(module(x) for module in modules)
    names = [module.active_adapters[0] for module in modules]
    pairs = list(zip(modules, names, strict=True))
    return LowRankLinears.apply(
        x,
        [module.scaling[name] for module, name in pairs],
        [getattr(module, CAST_FACTORS, None) for module in modules],
        *(module.base_layer.weight for module in modules),
        *(module.lora_A[name].weight for module, name in pairs),
        *(module.lora_B[name].weight for module, name in pairs),
    )


def is_plain_lora(module: nn.Module, x: Tensor) -> bool:
    """Whether `LowRankLinears` computes what `module`, a peft LoRA layer, does on x."""
    if not has_one_adapter(module) or module.disable_adapters or module.merged:
        return False
    name, base = module.active_adapters[0], module.base_layer
    if name in getattr(module, "lora_variant", ()):  # DoRA and others
        return False
    parts = (module.lora_A[name], module.lora_B[name])
    dropout = module.lora_dropout[name]
    return (
        base.bias is None
        and all(type(part) is nn.Linear and part.bias is None for part in parts)
        and not (isinstance(dropout, nn.Dropout) and dropout.p > 0 and module.training)
        and not base.weight.requires_grad
        and base.weight.dtype == x.dtype == matmul_dtype(x)
        and not any(has_hooks(part) for part in (module, base, *parts))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks, which the functions here would skip."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a matmul of x here: under autocast it may differ from that of the sums computed in place."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


CAST_FACTORS = "cast_factors"  # attribute of a LoRA layer inside `cast_lora`: (s A, B) in the dtype of its base


@contextlib.contextmanager
def cast_lora(layers: list[nn.Module]) -> Iterator[None]:
    """Scale and cast the factors of these `lora_layers` once for the block, in a few launches for all of them.

    Outside such a block `apply_linears` casts them at every call, to the same values. The masters must not change
    inside the block: use it for the forward and backward passes of one update, or for the tokens of one answer. A
    nested block keeps the factors of the outer one.
    """
    found = [layer for layer in layers if not hasattr(layer, CAST_FACTORS)]
    names = [module.active_adapters[0] for module in found]
    pairs = list(zip(found, names, strict=True))
    downs, ups = ([getattr(m, part)[n].weight for m, n in pairs] for part in ("lora_A", "lora_B"))
    if found:
        with torch.no_grad():
            scaled = torch._foreach_mul(downs, [module.scaling[name] for module, name in pairs])
            dtypes = [module.base_layer.weight.dtype for module in found]
            for module, *factors in zip(found, cast_all(scaled, dtypes), cast_all(ups, dtypes), strict=True):
                setattr(module, CAST_FACTORS, factors)
    try:
        yield
    finally:
        for module in found:
            delattr(module, CAST_FACTORS)


def cast_factors(model: nn.Module) -> list[Tensor]:
    """All factors of a `cast_lora` block, in the order of the layers."""
    return [factor for module in model.modules() for factor in getattr(module, CAST_FACTORS, ())]


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """The LoRA layers of `model` whose factors `cast_lora` can cast."""
    return [module for module in model.modules() if has_one_adapter(module)]


def has_one_adapter(module: nn.Module) -> bool:
    """Whether `module` is a peft LoRA layer with one active adapter on an nn.Linear."""
    is_lora = type(getattr(module, "base_layer", None)) is nn.Linear and hasattr(module, "lora_A")
    return is_lora and len(module.active_adapters) == 1 and module.active_adapters[0] in module.lora_A


def cast_all(tensors: list[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """Copies of `tensors` in these dtypes, in one launch where the device supports it."""
    copies = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(copies, tensors)
    return copies


class LowRankLinears(torch.autograd.Function):
    """y_i = x W_i^T + s_i (x A_i^T) B_i^T of x [..., C], W_i frozen; saves x, the rank-r products and the factors in
    the dtype of x.

    Equals peft's layers: tests/test_speed_paths.py, test_lora_equals_peft_in_float64.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scales: list[float], casts: list, *weights: Tensor) -> tuple[Tensor, ...]:
        """`casts`: for every layer (s_i A_i, B_i) in the dtype of x, or None. `weights`: every W_i, then every A_i,
        then every B_i."""
        count = len(weights) // 3
        bases, downs, ups = weights[:count], weights[count : 2 * count], weights[2 * count :]
        ctx.scales, ctx.shape, ctx.dtypes = scales, x.shape, (downs[0].dtype, ups[0].dtype)
        if all(cast is not None for cast in casts):
            parts, ups = zip(*casts, strict=True)
            stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            stacked = torch.cat([scale * a for scale, a in zip(scales, downs, strict=True)]).to(x.dtype)
            ups = [up.to(x.dtype) for up in ups]
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ stacked.T
        ctx.save_for_backward(rows, low, stacked, *bases, *ups)
        outs = []
        for base, up, h in zip(bases, ups, low.split([up.shape[1] for up in ups], dim=1), strict=True):
            out = (rows @ base.T).addmm_(h, up.T)
            outs.append(out.view(*x.shape[:-1], -1))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        rows, low, stacked, *saved = ctx.saved_tensors
        bases, ups = saved[: len(ctx.scales)], saved[len(ctx.scales) :]
        ranks, (down_dtype, up_dtype) = [up.shape[1] for up in ups], ctx.dtypes
        gradients = [g.reshape(-1, g.shape[-1]) for g in gradients]
        d_ups = [
            torch.empty_like(up, dtype=up_dtype, memory_format=torch.contiguous_format).copy_((h.T @ g).T)
            for h, g, up in zip(low.split(ranks, dim=1), gradients, ups, strict=True)
        ]
        d_lows = [g @ up for g, up in zip(gradients, ups, strict=True)]
        d_low = d_lows[0] if len(d_lows) == 1 else torch.cat(d_lows, dim=1)
        d_downs = torch._foreach_mul(list((d_low.T @ rows).to(down_dtype).split(ranks)), ctx.scales)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_low @ stacked
            for g, base in zip(gradients, bases, strict=True):
                d_x.addmm_(g, base)
            d_x = d_x.view(ctx.shape)
        return d_x, None, None, *[None for _ in bases], *d_downs, *d_ups
