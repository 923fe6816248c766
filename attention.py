"""Attention kernels: pure functions on tensors, and the prefix-LM mask kept as lengths.

Shapes: B batch, L query length, S key length, H query heads, K key/value heads, G = H / K, D head width, Dv value
width, R second queries (H, or a few that are shared).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from errors import UserError

# On a CPU explicit maps beat SDPA in differential attention's forward + backward up to this length (in bfloat16, where
# both maps share their keys, only below it); above it their memory loses. Standard attention they cost up to half more
# than SDPA; it takes them too, so that both arms start from equal bits. benchmarks/kernels.py measures all of it.
EXPLICIT_MAX_LENGTH = 512
CHUNK = 64  # query rows whose maps exist at a time above it: they stay in a core's cache


@dataclass(frozen=True)
class PrefixMask:
    """The prefix-LM mask of a batch, as three indices per row.

    Row b holds `[pads | prefix | suffix | pads]` with `start <= prefix < prefix_end <= suffix < end`. A query sees
    every valid key of the prefix if it is in the prefix itself, and every valid key up to itself otherwise: image and
    prompt are one bidirectional block, the suffix is causal, the block never sees the suffix, a pad is never a key
    (PaliGemma, arXiv 2407.07726, section 3.2.3; big_vision's `make_attn_mask`).
    """

    start: Tensor  # [B]
    prefix_end: Tensor  # [B]
    end: Tensor  # [B]
    sees_all: bool  # no pad and no suffix: kernels need no mask
    spans: tuple[tuple[int, int], ...]  # smallest and largest start, prefix_end and end: kernels plan on the host
    _dense: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_tensors(cls, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> "PrefixMask":
        """Read the lengths off `attention_mask` [B, L] (1 valid, 0 pad) and `token_type_ids` [B, L] (1 suffix).

        Raises UserError when a row is not contiguous: such a mask cannot be told by lengths.
        """
        valid = attention_mask.bool()
        suffix = valid & (token_type_ids == 1) if token_type_ids is not None else torch.zeros_like(valid)
        length = valid.shape[1]
        count, suffix_count = valid.sum(1), suffix.sum(1)
        start = torch.where(count > 0, valid.int().argmax(1), length)
        end = torch.where(count > 0, start + count, length)
        prefix_end = end - suffix_count
        index = torch.arange(length, device=valid.device)
        expected_valid = (index >= start[:, None]) & (index < end[:, None])
        expected_suffix = expected_valid & (index >= prefix_end[:, None])
        whole = ((valid == expected_valid) & (suffix == expected_suffix)).all()
        told = [whole.long(), *(f(t) for t in (start, prefix_end, end) for f in (torch.min, torch.max))]
        whole, *spans = torch.stack(told).tolist()  # all that the host needs to know, asked for once
        if not whole:
            raise UserError(
                "attention_mask or token_type_ids has a gap: a row reads pads, prefix (type 0), suffix (type 1), pads"
            )
        spans = tuple(zip(spans[::2], spans[1::2], strict=True))
        return cls(start, prefix_end, end, sees_all=spans == ((0, 0), (length, length), (length, length)), spans=spans)

    def to(self, device, **kwargs) -> "PrefixMask":
        moved = (t.to(device, **kwargs) for t in (self.start, self.prefix_end, self.end))
        return PrefixMask(*moved, sees_all=self.sees_all, spans=self.spans)

    def dense(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """Bool mask [B, 1, queries, keys], True = may attend, for the last `queries` of `keys` positions.

        With a `window`, a suffix query sees the last `window` keys only. Keys past `end` count as valid once
        `keys` has outgrown the prompt: they are generated tokens.
        """
        if (queries, keys, window) not in self._dense:
            self._dense[queries, keys, window] = self.block((keys - queries, keys), (0, keys), window)
        return self._dense[queries, keys, window]

    def block(self, rows: tuple[int, int], keys: tuple[int, int], window: int | None = None) -> Tensor:
        """Bool mask [B, 1, rows, keys] of the queries and keys at these positions, first to one past the last."""
        q = torch.arange(*rows, device=self.start.device)[None, :, None]
        k = torch.arange(*keys, device=self.start.device)[None, None, :]
        start, prefix_end, end = (x[:, None, None] for x in (self.start, self.prefix_end, self.end))
        causal = k <= q if window is None else (k <= q) & (k > q - window)
        both_in_prefix = (q < prefix_end) & (k < prefix_end)
        return ((causal | both_in_prefix) & (k >= start) & (k < end))[:, None]

    def reach(self, first: int, last: int, keys: int) -> tuple[int, int, bool]:
        """Of queries `first` to `last`: the first key that any of them sees, one past the last, and whether every one
        of them sees all of these."""
        (low, start), (prefix_end, longest), (_, end) = self.spans
        high = min(end, last if first >= longest else max(last, longest))
        low = min(low, keys - 1)
        high = max(high, low + 1)  # a batch of pads
        return low, high, low == start and last <= prefix_end == high

    def grow(self, tokens: int) -> "PrefixMask":
        """The mask after `tokens` more suffix tokens on every row; rows must be padded on the left."""
        start, prefix_end, (low, high) = self.spans
        spans = (start, prefix_end, (low + tokens, high + tokens))
        return PrefixMask(self.start, self.prefix_end, self.end + tokens, sees_all=self.sees_all, spans=spans)

    def split_at(self, keys: int) -> int | None:
        """Where prefix becomes suffix, if that is the same position in every row and nothing is padded."""
        (low, high), ends = self.spans[1], self.spans[2]
        return low if low == high and self.spans[0] == (0, 0) and ends == (keys, keys) else None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [B, heads, L, D]: dimension i is paired with i + D / 2.

    The tables [B, 1, S, D] may reach further back than x, whose rows are then the last L of them.
    """
    if cos.shape[2] > x.shape[2]:
        cos, sin = cos[:, :, -x.shape[2] :], sin[:, :, -x.shape[2] :]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ---- standard attention
def attention_scores(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Scores [B, K, G, L, S] of q [B, H, L, D] on k [B, K, S, D]: scaled, then soft-capped, not yet masked.

    The soft-cap is `c tanh(s / c)` (Gemma 2, arXiv 2408.00118, section 2).
    """
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    # query heads of a group share their keys: folded into rows, one matmul serves them all
    rows = (q * scale).reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = (rows @ k.transpose(-1, -2)).view(batch, kv_heads, heads // kv_heads, length, -1)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def softmax_maps(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of scores [B, K, G, L, S], which may be overwritten, under mask [B, 1, L, S].

    The maps are float32, or float64 for float64 scores. A row without any visible key gives a uniform map, never NaN.
    """
    if mask is not None:
        scores = scores.masked_fill_(~mask[:, :, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def attention_maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """Explicit softmax maps [B, K, G, L, S] of q [B, H, L, D] on k [B, K, S, D]; mask [B, 1, L, S] bool or None.

    Scale, soft-cap, mask, softmax, in this order; see `attention_scores` and `softmax_maps`.
    """
    return softmax_maps(attention_scores(q, k, scale, softcap), mask)


def apply_maps(maps: Tensor, v: Tensor) -> Tensor:
    """Weighted values [B, H, L, Dv] of maps [B, K, G, L, S] and v [B, K, S, Dv]."""
    batch, kv_heads, groups, length, keys = maps.shape
    return (maps.reshape(batch, kv_heads, groups * length, keys) @ v).view(batch, kv_heads * groups, length, -1)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Standard attention by its formula, softmax(scale q k^T) v -> [B, H, L, D]; the yardstick of every fast path."""
    return apply_maps(attention_maps(q, k, mask, scale, softcap).to(q.dtype), v)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PrefixMask | None,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Standard attention -> [B, H, L, D] of q [B, H, L, D] on k, v [B, K, S, D]; `mask` None lets every query see all.

    The path is chosen by `path_of`.
    """
    path = path_of(k, v, softcap)
    if path == "maps":
        return attention_reference(q, k, v, dense_mask(mask, q.shape[2], k.shape[2], window), scale, softcap)
    if path == "chunks":
        return ChunkedAttention.apply(q, None, k, v, None, mask, scale, False, softcap, window)
    return sdpa(q, k, v, mask, scale, window)


def path_of(k: Tensor, v: Tensor, softcap: float | None) -> Literal["maps", "chunks", "sdpa"]:
    """Which way the keys k [B, K, S, D] and values v go; both arms ask here, and where keys and values are of one
    width, as in every preset that is exact at step 0, the choice never depends on the arm.

    "maps": explicit maps, kept for the backward pass: short sequences on a CPU, and where SDPA has no kernel.
    "chunks": the same, a few query rows at a time, maps formed anew in the backward pass.
    "sdpa": torch's fused kernels. They know no soft-cap, and values wider than keys fall to a slow one.
    """
    fused = softcap is None and k.shape[-1] == v.shape[-1]
    if k.shape[2] <= EXPLICIT_MAX_LENGTH:
        return "maps" if k.device.type == "cpu" or not fused else "sdpa"
    return "sdpa" if fused else "chunks"


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: PrefixMask | None, scale: float, window: int | None) -> Tensor:
    """torch's fused attention under a prefix-LM mask -> [B, H, L, D]; arguments as `attention`'s.

    Where every row splits into prefix and suffix at one position and holds no pad, in two calls: prefix rows on prefix
    keys without a mask, suffix rows on all keys, causal from the lower right corner. A dense mask would keep CUDA from
    its flash kernels; it is what remains for ragged or padded rows, for a window and for decoding.
    """
    queries, keys = q.shape[2], k.shape[2]
    split = None if mask is None or window is not None else mask.split_at(keys)
    first = keys - queries  # position of the first query
    if split is None or not first < split < keys:
        return fused(q, k, v, dense_mask(mask, queries, keys, window), scale)
    if q.device.type == "cuda" and q.dtype != torch.float32:
        from torch.nn.attention.bias import causal_lower_right  # brings torch.compile along: a second of import

        causal = causal_lower_right(keys - split, keys)
    else:
        causal = mask.dense(keys - split, keys)
    prefix = fused(q[:, :, : split - first], k[:, :, :split], v[:, :, :split], None, scale)
    return torch.cat((prefix, fused(q[:, :, split - first :], k, v, causal, scale)), dim=2)


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One call of SDPA; mask: dense, a torch.nn.attention.bias, or None.

    Off the CPU the fused kernel that takes a dense mask wants keys and values for every query head; asked to share,
    torch falls to its slow formula without a word (transformers' `use_gqa_in_sdpa` goes around the same).
    """
    if type(mask) is Tensor and q.device.type != "cpu":
        k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def dense_mask(mask: PrefixMask | None, queries: int, keys: int, window: int | None) -> Tensor | None:
    """`mask.dense`, or None where every query sees every key."""
    if mask is None or (mask.sees_all and window is None):
        return None
    return mask.dense(queries, keys, window)


# ---- differential attention
def differential_reference(
    q1: Tensor,
    q2: Tensor,
    k1: Tensor,
    k2: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    strength: Tensor | float,
    normalised: bool,
    softcap: float | None = None,
) -> Tensor:
    """Differential attention by its formula -> [B, H, L, Dv]; the yardstick of every fast path.

    (A1 - lambda A2) V (arXiv 2410.05258, equation 1), over (1 - lambda) where `normalised`: rows then sum to 1.
    q1 [B, H, L, D], q2 [B, R, L, D], k1, k2 [B, K, S, D], v [B, K, S, Dv]; strength: lambda, a number or [B, H, L, 1].
    """
    first, second = (attention_maps(q, k, mask, scale, softcap).flatten(1, 2) for q, k in ((q1, k1), (q2, k2)))
    second = second.repeat_interleave(first.shape[1] // second.shape[1], dim=1)
    maps = first - strength * second
    if normalised:
        maps = maps / (1 - strength)
    return apply_maps(maps.to(q1.dtype).unflatten(1, (v.shape[1], -1)), v)


def blend(first: Tensor, second: Tensor, weight: Tensor, normalised: bool) -> Tensor:
    """Maps or outputs, first [B, H, L, *] and second [B, R, L, *]; weight [1] or [B, H, L, 1].

    `normalised`: first + weight (first - second), which is `first` to the bit where both are equal; else
    first - weight second. Head h of `first` meets head h R / H of `second`.
    """
    if second.shape[1] != first.shape[1]:
        second = second.repeat_interleave(first.shape[1] // second.shape[1], dim=1)
    weight = weight.to(first.dtype)
    if normalised:
        return torch.lerp(first, second, -weight)  # that very sum, in one pass
    return torch.addcmul(first, weight, second, value=-1)


def differential_attention(
    q1: Tensor,
    q2: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PrefixMask | None,
    scale: float,
    weight: Tensor,
    normalised: bool,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Two maps on the same values, blended -> [B, H, L, Dv]; the path is chosen as for `attention`.

    q1 [B, H, L, D], q2 [B, R, L, D], v [B, K, S, Dv]; k [B, K, S, D] serves both maps, k [B, 2K, S, D] holds the first
    map's heads and then the second's. `weight` and `normalised` as in `blend`: gamma = lambda / (1 - lambda) where
    normalised, lambda where not.
    """
    path = path_of(k, v, softcap)
    if path == "maps":
        dense = dense_mask(mask, q1.shape[2], k.shape[2], window)
        return BlendedMaps.apply(q1, q2, k, v, weight, dense, scale, normalised, softcap)
    if path == "chunks":
        return ChunkedAttention.apply(q1, q2, k, v, weight, mask, scale, normalised, softcap, window)
    return _blend_outputs(q1, q2, k, v, mask, scale, weight, normalised, window)


def _blend_outputs(q1, q2, k, v, mask, scale, weight, normalised, window) -> Tensor:
    """One SDPA call on both maps' heads, then the outputs are blended."""
    if k.shape[1] == v.shape[1]:  # both queries of a head sit in one key/value group
        groups = [q.unflatten(1, (k.shape[1], -1)) for q in (q1, q2)]
    else:
        groups = [q[:, None] for q in (q1, q2)]
        v = torch.cat((v, v), dim=1)
    q = torch.cat(groups, dim=2).flatten(1, 2)
    out = sdpa(q, k, v, mask, scale, window)
    out = out.unflatten(1, (groups[0].shape[1], -1)).split([group.shape[2] for group in groups], dim=2)
    wide = torch.promote_types(q.dtype, torch.float32)  # the difference of two near outputs, and a small step of lambda
    first, second = (part.flatten(1, 2).to(wide) for part in out)
    return blend(first, second, weight, normalised).to(q.dtype)


# ---- formed maps: forward, and backward by hand
class BlendedMaps(torch.autograd.Function):
    """P v, P the blend of two maps that are kept for the backward pass; the values are met once each way.

    With P = a P1 + b P2 and G the gradient of the output,

        dv = P^T G    dP = G v^T    D_i = rowsum(P_i dP)    dS1 = a P1 (dP - D1)    dS2 = b P2 (dP - D2)

    The weight's gradient is D1 - D2 where normalised (a = 1 + weight, b = -weight) and -D2 where not (a = 1,
    b = -weight); the soft-cap's factor is 1 - (S / c)^2.
    """

    @staticmethod
    def forward(ctx, q1, q2, k, v, weight, dense, scale, normalised, softcap) -> Tensor:
        """Arguments as `differential_attention`'s, the mask dense."""
        formed = form_maps(q1, q2, k, v, dense, scale, softcap)
        ctx.save_for_backward(q1, q2, k, v, weight, *formed)
        ctx.options = scale, normalised
        return apply_blend(formed, v, weight, normalised)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        q1, q2, k, v, weight, *formed = ctx.saved_tensors
        return *map_gradients(gradient, q1, q2, k, v, weight, formed, *ctx.options), *[None] * 4


class ChunkedAttention(torch.autograd.Function):
    """The same, or the first map alone, a chunk of query rows at a time: nothing L x S is kept, the backward pass forms
    every chunk's maps anew."""

    @staticmethod
    def forward(ctx, q1, q2, k, v, weight, mask, scale, normalised, softcap, window) -> Tensor:
        """Arguments as `differential_attention`'s; q2 and weight None: the first map alone."""
        ctx.save_for_backward(q1, q2, k, v, weight)
        ctx.options = mask, scale, normalised, softcap, window
        out = v.new_empty(*q1.shape[:3], v.shape[-1])
        for rows, keys, dense in row_chunks(mask, q1.shape[2], k.shape[2], window):
            seen = k[:, :, keys], v[:, :, keys]
            formed = form_maps(rows_of(q1, rows), rows_of(q2, rows), *seen, dense, scale, softcap)
            out[:, :, rows] = apply_blend(formed, seen[1], rows_of(weight, rows), normalised)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        q1, q2, k, v, weight = ctx.saved_tensors
        mask, scale, normalised, softcap, window = ctx.options
        wide = torch.promote_types(k.dtype, torch.float32)  # of what chunks add up to
        d_q1, d_q2 = (None if q is None else torch.empty_like(q) for q in (q1, q2))
        d_k, d_v, d_weight = (None if t is None else torch.zeros_like(t, dtype=wide) for t in (k, v, weight))
        for rows, keys, dense in row_chunks(mask, q1.shape[2], k.shape[2], window):
            here = [rows_of(q1, rows), rows_of(q2, rows), k[:, :, keys], v[:, :, keys]]
            formed = form_maps(*here, dense, scale, softcap)
            told = map_gradients(gradient[:, :, rows], *here, rows_of(weight, rows), formed, scale, normalised)
            d_q1[:, :, rows] = told[0]
            d_k[:, :, keys] += told[2]
            d_v[:, :, keys] += told[3]
            if q2 is not None:
                d_q2[:, :, rows] = told[1]
                rows_of(d_weight, rows).add_(told[4])
        d_weight = None if weight is None else d_weight.to(weight.dtype)
        return d_q1, d_q2, d_k.to(k.dtype), d_v.to(v.dtype), d_weight, *[None] * 5


def row_chunks(mask: PrefixMask | None, queries: int, keys: int, window: int | None) -> Iterator[tuple]:
    """(rows, keys, dense): query rows by the CHUNK, the keys that any of them sees, and their mask or None."""
    offset = keys - queries
    for first in range(0, queries, CHUNK):
        last = min(first + CHUNK, queries)
        low, high, whole = (0, keys, True) if mask is None else mask.reach(offset + first, offset + last, keys)
        dense = None if whole else mask.block((offset + first, offset + last), (low, high), window)
        yield slice(first, last), slice(low, high), dense


def rows_of(t: Tensor | None, rows: slice) -> Tensor | None:
    """These query rows of t [B, H, L, *]; a weight [1] belongs to every row."""
    return t if t is None or t.ndim == 1 else t[:, :, rows]


def form_maps(q1, q2, k, v, dense, scale, softcap) -> tuple[Tensor | None, ...]:
    """Both maps and the soft-cap's derivative at their scores, None where there is none: first, slope, second, slope.

    Each map is formed by the very operations of the standard arm, so that equal queries give equal bits.
    """
    k1, k2 = halves_of(k, v)
    formed = ()
    for q, key in ((q1, k1), (q2, k2)):
        scores = None if q is None else attention_scores(q, key, scale, softcap)
        slope = None if q is None or softcap is None else 1 - (scores / softcap) ** 2  # unmasked: 0 times inf is NaN
        formed += (None if q is None else softmax_maps(scores, dense), slope)
    return formed


def halves_of(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of the first and of the second map, which may be the same."""
    return (k, k) if k.shape[1] == v.shape[1] else k.chunk(2, dim=1)


def apply_blend(formed, v: Tensor, weight: Tensor | None, normalised: bool) -> Tensor:
    return apply_maps(blended(formed, weight, normalised).to(v.dtype), v)


def blended(formed, weight: Tensor | None, normalised: bool) -> Tensor:
    first, _, second, _ = formed
    if second is None:
        return first
    return blend(first.flatten(1, 2), second.flatten(1, 2), weight, normalised).view_as(first)


def map_gradients(gradient, q1, q2, k, v, weight, formed, scale, normalised) -> tuple[Tensor | None, ...]:
    """Gradients of q1, q2, k, v and weight by the formulas of `BlendedMaps`."""
    first, slope1, second, slope2 = formed
    (k1, k2), kv_heads = halves_of(k, v), v.shape[1]
    g = gradient.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # query heads of a group as rows, as in the forward pass
    d_v = blended(formed, weight, normalised).to(v.dtype).flatten(2, 3).mT @ g
    d_maps = (g @ v.mT).to(first.dtype).view_as(first)
    if q2 is None:
        d_q1, d_k1 = through_softmax(d_maps, first, slope1, 1.0, q1, k1, scale)
        return d_q1, None, d_k1, d_v, None
    d_q1, d_k1 = through_softmax(d_maps, first, slope1, 1 + weight if normalised else 1.0, q1, k1, scale)
    shared = first.shape[2] // second.shape[2]  # heads that share a second query
    d_second, factor = d_maps, -weight
    if shared > 1:
        d_second, factor = (factor * d_maps.flatten(1, 2)).view_as(d_maps).unflatten(2, (-1, shared)).sum(3), 1.0
    d_q2, d_k2 = through_softmax(d_second, second, slope2, factor, q2, k2, scale)
    second = second.repeat_interleave(shared, dim=2) if shared > 1 else second
    gap = ((second - first if normalised else second) * d_maps).sum(-1, keepdim=True).flatten(1, 2)
    d_k = d_k1 + d_k2 if k1 is k2 else torch.cat((d_k1, d_k2), dim=1)
    return d_q1, d_q2, d_k, d_v, -gap.sum_to_size(weight.shape).to(weight.dtype)


def through_softmax(d_maps, maps, slope, factor, q, k, scale) -> tuple[Tensor, Tensor]:
    """Gradients of q and k from that of factor x maps; the factor, a number or one per row, is multiplied into the
    queries, which are narrower than the maps."""
    d_scores = torch.ops.aten._softmax_backward_data(d_maps, maps, -1, maps.dtype)
    d_scores = d_scores if slope is None else d_scores.mul_(slope)
    d_scores, factor = d_scores.to(q.dtype).flatten(2, 3), factor * scale
    scaled = (q * factor).to(q.dtype).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    d_q = (d_scores @ k).view(q.shape) * factor
    return d_q.to(q.dtype), d_scores.mT @ scaled
