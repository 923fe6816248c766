"""Attention: the prefix-LM mask, the explicit references, SDPA, and the choice of the path.

B batch, L queries, S keys, H query heads, K key/value heads, D head dim, Dv value head dim, R second queries (H, or
fewer, each shared by H / R heads).
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError
from fused_ops import BlendedAttention, ChunkedAttention, apply_maps, attention_scores, blend, softmax_maps

# On a CPU the forward + backward of differential attention is faster with explicit maps than with SDPA up to this many
# keys (in bfloat16 with shared keys: below it); above it their memory costs more. Standard attention would be faster
# with SDPA, by up to a third; it takes the same path so that both arms start bit-equal (benchmarks/attention_paths.py).
EXPLICIT_MAX_KEYS = 512


@dataclass(frozen=True)
class PrefixMask:
    """The prefix-LM mask of a batch, kept as three indices per row instead of [B, L, S] bools.

    A row of a batch is `[pads | prefix | suffix | pads]`: tokens start .. prefix_end - 1 are the prefix (image and
    prompt), prefix_end .. end - 1 the suffix (the answer). The prefix attends to itself in both directions, the suffix
    causally to everything before it; nothing attends to a pad. With one pad, three prefix and two suffix tokens:

               keys  .  p  p  p  s  s
        queries  .   .  .  .  .  .  .
                 p   .  1  1  1  .  .
                 p   .  1  1  1  .  .
                 p   .  1  1  1  .  .
                 s   .  1  1  1  1  .
                 s   .  1  1  1  1  1

    Source: PaliGemma, arXiv 2407.07726, section 3.2.3; `make_attn_mask` of big_vision.
    """

    start: Tensor  # [B]
    prefix_end: Tensor  # [B]
    end: Tensor  # [B]
    sees_all: bool  # no pads and no suffix: no mask is needed
    spans: tuple[tuple[int, int], ...]  # (min, max) over the batch of start, prefix_end and end, as Python ints
    _dense: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_tensors(cls, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> "PrefixMask":
        """The mask of `attention_mask` [B, L] (1 token, 0 pad) and `token_type_ids` [B, L] (1 suffix).

        Raises UserError for a row that is not pads, prefix, suffix, pads without gaps.
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
        has_no_gap = ((valid == expected_valid) & (suffix == expected_suffix)).all()
        extremes = [reduce(t) for t in (start, prefix_end, end) for reduce in (torch.min, torch.max)]
        has_no_gap, *spans = torch.stack([has_no_gap.long(), *extremes]).tolist()  # one transfer to the host
        if not has_no_gap:
            raise UserError(
                "attention_mask or token_type_ids has a gap: a row must be pads, prefix (type 0), suffix (type 1), pads"
            )
        spans = tuple(zip(spans[::2], spans[1::2], strict=True))
        return cls(start, prefix_end, end, sees_all=spans == ((0, 0), (length, length), (length, length)), spans=spans)

    def dense(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """Bool mask [B, 1, queries, keys], True = may attend, for the last `queries` of `keys` positions.

        With a `window`, a suffix query sees the last `window` keys only. Keys past `end` count as tokens once `keys`
        is longer than the prompt: they were generated.
        """
        if (queries, keys, window) not in self._dense:
            self._dense[queries, keys, window] = self.block((keys - queries, keys), (0, keys), window)
        return self._dense[queries, keys, window]

    def block(self, queries: tuple[int, int], keys: tuple[int, int], window: int | None = None) -> Tensor:
        """Bool mask [B, 1, queries, keys] of the queries and keys at these (first, one past the last) positions."""
        q = torch.arange(*queries, device=self.start.device)[None, :, None]
        k = torch.arange(*keys, device=self.start.device)[None, None, :]
        start, prefix_end, end = (x[:, None, None] for x in (self.start, self.prefix_end, self.end))
        causal = k <= q if window is None else (k <= q) & (k > q - window)
        both_in_prefix = (q < prefix_end) & (k < prefix_end)
        return ((causal | both_in_prefix) & (k >= start) & (k < end))[:, None]

    def visible_keys(self, first: int, last: int, keys: int) -> tuple[int, int, bool]:
        """For the queries at positions first .. last - 1: the first key that any of them sees, one past the last such
        key, and whether every query sees all of these keys."""
        (low, start), (prefix_end, longest_prefix), (_, end) = self.spans
        high = min(end, last if first >= longest_prefix else max(last, longest_prefix))
        low = min(low, keys - 1)
        high = max(high, low + 1)  # a batch of pads
        return low, high, low == start and last <= prefix_end == high

    def extend(self, tokens: int) -> "PrefixMask":
        """The mask with `tokens` more suffix tokens in every row; rows must be padded on the left."""
        start, prefix_end, (low, high) = self.spans
        spans = (start, prefix_end, (low + tokens, high + tokens))
        return PrefixMask(self.start, self.prefix_end, self.end + tokens, sees_all=self.sees_all, spans=spans)

    def common_prefix_end(self, keys: int) -> int | None:
        """Where the prefix ends, if at the same position in every row and no row has pads; otherwise None."""
        (low, high), ends = self.spans[1], self.spans[2]
        return low if low == high and self.spans[0] == (0, 0) and ends == (keys, keys) else None


def dense_mask(mask: PrefixMask | None, queries: int, keys: int, window: int | None) -> Tensor | None:
    """`mask.dense(...)`, or None where every query sees every key."""
    if mask is None or (mask.sees_all and window is None):
        return None
    return mask.dense(queries, keys, window)


# ---- rotary position embedding
def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, L, D]: dimension i is rotated together with i + D / 2 (RoFormer, 2104.09864).

    The tables are [B, 1, S, D] with S >= L; the rows of x are the last L positions.
    """
    if cos.shape[2] > x.shape[2]:
        cos, sin = cos[:, :, -x.shape[2] :], sin[:, :, -x.shape[2] :]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def apply_rotary_to_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each half of x [B, heads, L, D] rotated as a head of width D / 2; the tables are those of width D."""
    # every second frequency of width D is the whole spectrum of width D / 2
    return torch.cat([apply_rotary(half, cos[..., ::2], sin[..., ::2]) for half in x.chunk(2, dim=-1)], dim=-1)


# ---- the formulas; every fast path is tested against them in float64
def attention_maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """softmax(softcap(scale q k^T)) under a mask: [B, K, H / K, L, S] of q [B, H, L, D] and k [B, K, S, D].

    `mask`: bool [B, 1, L, S], True = may attend, or None.
    """
    return softmax_maps(attention_scores(q, k, scale, softcap), mask)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v: standard attention by its formula -> [B, H, L, D]."""
    return apply_maps(attention_maps(q, k, mask, scale, softcap).to(q.dtype), v)


def blended_reference(
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
    """(A1 - lambda A2) v (arXiv 2410.05258, equation 1), over (1 - lambda) where `normalised`, so that the rows of the
    map sum to 1: differential attention by its formula -> [B, H, L, Dv].

    q1 [B, H, L, D], q2 [B, R, L, D], k1 and k2 [B, K, S, D], v [B, K, S, Dv]; lambda_: a number or [B, H, L, 1].
    """
    first, second = (attention_maps(q, k, mask, scale, softcap).flatten(1, 2) for q, k in ((q1, k1), (q2, k2)))
    second = second.repeat_interleave(first.shape[1] // second.shape[1], dim=1)
    maps = first - lambda_ * second
    if normalised:
        maps = maps / (1 - lambda_)
    return apply_maps(maps.to(q1.dtype).unflatten(1, (v.shape[1], -1)), v)


# ---- the paths
def choose_path(k: Tensor, v: Tensor, softcap: float | None) -> Literal["maps", "chunks", "sdpa"]:
    """How attention to the keys k [B, K, S, D] and values v [B, K, S, Dv] is computed, in both arms alike.

    "maps": explicit maps, kept for the backward pass: few keys on a CPU, or where SDPA has no kernel.
    "chunks": explicit maps of a few queries at a time, computed again in the backward pass.
    "sdpa": torch's fused kernels, which have no soft-cap; for values wider than the keys they fall back to a slow one.
    """
    has_kernel = softcap is None and k.shape[-1] == v.shape[-1]
    if k.shape[2] <= EXPLICIT_MAX_KEYS:
        return "maps" if k.device.type == "cpu" or not has_kernel else "sdpa"
    return "sdpa" if has_kernel else "chunks"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PrefixMask | None,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Standard attention -> [B, H, L, D] of q [B, H, L, D] and k, v [B, K, S, D]; without a mask all keys are seen."""
    path = choose_path(k, v, softcap)
    if path == "maps":
        return attention_reference(q, k, v, dense_mask(mask, q.shape[2], k.shape[2], window), scale, softcap)
    if path == "chunks":
        return ChunkedAttention.apply(q, None, k, v, None, mask, scale, False, softcap, window)
    return sdpa(q, k, v, mask, scale, window)


def blended_attention(
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
    """The blend of attention by two maps -> [B, H, L, Dv]: o1 + weight (o1 - o2) where `normalised`, with
    weight = gamma = lambda / (1 - lambda); o1 - weight o2 with weight = lambda otherwise.

    q1 [B, H, L, D], q2 [B, R, L, D], v [B, K, S, Dv]; k [B, K, S, D] serves both maps, k [B, 2K, S, D] holds the heads
    of the first map and then those of the second; weight [1] or [B, H, L, 1].
    """
    path = choose_path(k, v, softcap)
    if path == "maps":
        dense = dense_mask(mask, q1.shape[2], k.shape[2], window)
        return BlendedAttention.apply(q1, q2, k, v, weight, dense, scale, normalised, softcap)
    if path == "chunks":
        return ChunkedAttention.apply(q1, q2, k, v, weight, mask, scale, normalised, softcap, window)
    # one SDPA call on the heads of both maps, then the outputs are blended
    if k.shape[1] == v.shape[1]:  # both queries of a head are in one key/value group
        groups = [q.unflatten(1, (k.shape[1], -1)) for q in (q1, q2)]
    else:
        groups = [q[:, None] for q in (q1, q2)]
        v = torch.cat((v, v), dim=1)
    out = sdpa(torch.cat(groups, dim=2).flatten(1, 2), k, v, mask, scale, window)
    out = out.unflatten(1, (groups[0].shape[1], -1)).split([group.shape[2] for group in groups], dim=2)
    wide = torch.promote_types(q1.dtype, torch.float32)  # for the difference of two close outputs
    first, second = (part.flatten(1, 2).to(wide) for part in out)
    return blend(first, second, weight, normalised).to(q1.dtype)


@dataclass(frozen=True)
class Attend:
    """The attention of one layer with its mask, scale, soft-cap and window bound, as a differential module takes it."""

    mask: PrefixMask | None
    scale: float
    softcap: float | None = None
    window: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attention` of one map."""
        return attention(q, k, v, self.mask, self.scale, self.softcap, self.window)

    def blend(self, q1: Tensor, q2: Tensor, k: Tensor, v: Tensor, weight: Tensor, normalised: bool) -> Tensor:
        """`blended_attention` of two maps."""
        return blended_attention(q1, q2, k, v, self.mask, self.scale, weight, normalised, self.softcap, self.window)

    def rescale(self, factor: float) -> "Attend":
        """The same attention with its scale times `factor`."""
        return replace(self, scale=self.scale * factor)

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        """The explicit map [B, H, L, S] of q [B, H, L, D] and k [B, K, S, D]."""
        dense = dense_mask(self.mask, q.shape[2], k.shape[2], self.window)
        return attention_maps(q, k, dense, self.scale, self.softcap).flatten(1, 2)


# ---- SDPA
def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: PrefixMask | None, scale: float, window: int | None) -> Tensor:
    """torch's scaled_dot_product_attention under a prefix-LM mask -> [B, H, L, D]; arguments as those of `attention`.

    Where the prefix ends at the same position in every row and no row is padded, in two calls: prefix queries on prefix
    keys without a mask, suffix queries on all keys, causal from the lower right corner. A dense mask would rule out
    CUDA's flash kernels; it remains for ragged or padded rows, for a window and for decoding.
    """
    queries, keys = q.shape[2], k.shape[2]
    prefix_end = None if mask is None or window is not None else mask.common_prefix_end(keys)
    first = keys - queries  # position of the first query
    if prefix_end is None or prefix_end == keys:
        return call_sdpa(q, k, v, dense_mask(mask, queries, keys, window), scale)
    prefix_end = max(prefix_end, first)  # position of the first suffix query
    if q.device.type == "cuda" and q.dtype != torch.float32:
        from torch.nn.attention.bias import causal_lower_right  # imports torch.compile, which takes a second

        causal = causal_lower_right(keys - prefix_end, keys)
    else:
        causal = mask.dense(keys - prefix_end, keys)
    if prefix_end == first:  # without a prefix query: a causal mask, or decoding
        return call_sdpa(q, k, v, causal, scale)
    prefix = call_sdpa(q[:, :, : prefix_end - first], k[:, :, :prefix_end], v[:, :, :prefix_end], None, scale)
    return torch.cat((prefix, call_sdpa(q[:, :, prefix_end - first :], k, v, causal, scale)), dim=2)


def call_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One SDPA call; `mask`: dense, a torch.nn.attention.bias, or None.

    Off the CPU the fused kernel that takes a dense mask needs keys and values for every query head; with shared ones
    torch falls back to its slow formula silently (`use_gqa_in_sdpa` of transformers avoids the same).
    """
    if type(mask) is Tensor and q.device.type != "cpu":
        k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
