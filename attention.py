"""Attention kernels: pure functions on tensors, and the prefix-LM mask kept as lengths.

Shapes: B batch, L query length, S key length, H query heads, K key/value heads, G = H / K, D head width, Dv value
width, R second queries (H, or a few that are shared).
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError

# On a CPU the explicit maps beat SDPA in forward + backward up to this length; above it their memory loses.
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
        if not bool(((valid == expected_valid) & (suffix == expected_suffix)).all()):
            raise UserError(
                "attention_mask or token_type_ids has a gap: a row reads pads, prefix (type 0), suffix (type 1), pads"
            )
        return cls(start, prefix_end, end, sees_all=bool(((count == length) & (suffix_count == 0)).all()))

    def dense(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """Bool mask [B, 1, queries, keys], True = may attend, for the last `queries` of `keys` positions.

        With a `window`, a suffix query sees the last `window` keys only. Keys past `end` count as valid once
        `keys` has outgrown the prompt: they are generated tokens.
        """
        if (queries, keys, window) not in self._dense:
            device = self.start.device
            q = torch.arange(keys - queries, keys, device=device)[None, :, None]
            k = torch.arange(keys, device=device)[None, None, :]
            start, prefix_end, end = (x[:, None, None] for x in (self.start, self.prefix_end, self.end))
            causal = k <= q if window is None else (k <= q) & (k > q - window)
            both_in_prefix = (q < prefix_end) & (k < prefix_end)
            self._dense[queries, keys, window] = ((causal | both_in_prefix) & (k >= start) & (k < end))[:, None]
        return self._dense[queries, keys, window]

    def grow(self, tokens: int) -> "PrefixMask":
        """The mask after `tokens` more suffix tokens on every row; rows must be padded on the left."""
        return PrefixMask(self.start, self.prefix_end, self.end + tokens, sees_all=self.sees_all)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotary embedding of x [B, heads, L, D]: dimension i is paired with i + D / 2.

    The tables [B, 1, S, D] may reach further back than x, whose rows are then the last L of them.
    """
    cos, sin = cos[:, :, -x.shape[2] :], sin[:, :, -x.shape[2] :]
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ---- standard attention
def attention_maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """Explicit softmax maps [B, K, G, L, S] of q [B, H, L, D] on k [B, K, S, D]; mask [B, 1, L, S] bool or None.

    The soft-cap `c tanh(s / c)` comes after the scale and before the mask (Gemma 2, arXiv 2408.00118, section 2).
    The maps are float32, or float64 for float64 inputs. A row without any visible key gives a uniform map, never NaN.
    """
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    # query heads of a group share their keys: folded into rows, one matmul serves them all
    rows = q.reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = (rows @ k.transpose(-1, -2)).view(batch, kv_heads, heads // kv_heads, length, -1) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


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

    The path is chosen by device, length and soft-cap alone (SDPA knows no soft-cap).
    """
    dense = dense_mask(mask, q.shape[2], k.shape[2], window)
    if forms_maps(k, softcap):
        return attention_reference(q, k, v, dense, scale, softcap)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def dense_mask(mask: PrefixMask | None, queries: int, keys: int, window: int | None) -> Tensor | None:
    """`mask.dense`, or None where every query sees every key."""
    if mask is None or (mask.sees_all and window is None):
        return None
    return mask.dense(queries, keys, window)


def forms_maps(k: Tensor, softcap: float | None) -> bool:
    """Which path the keys k [B, K, S, D] take; both arms ask here, so the choice never depends on the arm."""
    return softcap is not None or (k.device.type == "cpu" and k.shape[2] <= EXPLICIT_MAX_LENGTH)


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
    dense = dense_mask(mask, q1.shape[2], k.shape[2], window)
    if forms_maps(k, softcap):
        return _blend_maps(q1, q2, k, v, dense, scale, weight, normalised, softcap)
    return _blend_outputs(q1, q2, k, v, dense, scale, weight, normalised)


def _blend_maps(q1, q2, k, v, dense, scale, weight, normalised, softcap) -> Tensor:
    """The maps are blended and meet the values once. Each is formed by the very call that the standard arm makes, so
    that equal queries give equal bits."""
    k1, k2 = (k, k) if k.shape[1] == v.shape[1] else k.chunk(2, dim=1)
    first, second = (attention_maps(q, key, dense, scale, softcap).flatten(1, 2) for q, key in ((q1, k1), (q2, k2)))
    maps = blend(first, second, weight, normalised).to(q1.dtype)
    return apply_maps(maps.unflatten(1, (v.shape[1], -1)), v)


def _blend_outputs(q1, q2, k, v, dense, scale, weight, normalised) -> Tensor:
    """One SDPA call on both maps' heads, then the outputs are blended."""
    if k.shape[1] == v.shape[1]:  # both queries of a head sit in one key/value group
        groups = [q.unflatten(1, (k.shape[1], -1)) for q in (q1, q2)]
    else:
        groups = [q[:, None] for q in (q1, q2)]
        v = torch.cat((v, v), dim=1)
    q = torch.cat(groups, dim=2).flatten(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    out = out.unflatten(1, (groups[0].shape[1], -1)).split([group.shape[2] for group in groups], dim=2)
    wide = torch.promote_types(q.dtype, torch.float32)  # the difference of two near outputs, and a small step of lambda
    first, second = (part.flatten(1, 2).to(wide) for part in out)
    return blend(first, second, weight, normalised).to(q.dtype)
