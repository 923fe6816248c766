"""Attention kernels: pure functions on tensors, and the prefix-LM mask kept as lengths.

Shapes: B batch, L query length, S key length, H query heads, K key/value heads, G = H / K, D head width, Dv value
width, R second queries (H, or a few that are shared).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from kernels import BlendedMaps, ChunkedAttention, apply_maps, attention_scores, blend, softmax_maps

# On a CPU explicit maps beat SDPA in differential attention's forward + backward up to this length (in bfloat16, where
# both maps share their keys, only below it); above it their memory loses. Standard attention they cost up to half more
# than SDPA; it takes them too, so that both arms start from equal bits. benchmarks/kernels.py measures all of it.
EXPLICIT_MAX_LENGTH = 512


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


def attention_maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """Explicit softmax maps [B, K, G, L, S] of q [B, H, L, D] on k [B, K, S, D]; mask [B, 1, L, S] bool or None.

    Scale, soft-cap, mask, softmax, in this order; see `attention_scores` and `softmax_maps`.
    """
    return softmax_maps(attention_scores(q, k, scale, softcap), mask)


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
    lambda_: Tensor | float,
    normalised: bool,
    softcap: float | None = None,
) -> Tensor:
    """Differential attention by its formula -> [B, H, L, Dv]; the yardstick of every fast path.

    (A1 - lambda A2) V (arXiv 2410.05258, equation 1), over (1 - lambda) where `normalised`: rows then sum to 1.
    q1 [B, H, L, D], q2 [B, R, L, D], k1, k2 [B, K, S, D], v [B, K, S, Dv]; lambda_: lambda, a number or [B, H, L, 1].
    """
    first, second = (attention_maps(q, k, mask, scale, softcap).flatten(1, 2) for q, k in ((q1, k1), (q2, k2)))
    second = second.repeat_interleave(first.shape[1] // second.shape[1], dim=1)
    maps = first - lambda_ * second
    if normalised:
        maps = maps / (1 - lambda_)
    return apply_maps(maps.to(q1.dtype).unflatten(1, (v.shape[1], -1)), v)


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
