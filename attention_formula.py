"""Standard and differential attention by their formulas; every fast path is tested against them in float64.

B batch, L queries, S keys, H query heads, K key/value heads, G = H / K, D head dim, Dv value head dim, R second
queries (H, or fewer, each shared by H / R heads).
"""

import torch
from torch import Tensor


# ---- step by step
def attention_scores(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Scores [B, K, G, L, S] of q [B, H, L, D] and k [B, K, S, D]: scaled, then soft-capped, not masked.

    The soft-cap is `c tanh(s / c)` (Gemma 2, arXiv 2408.00118, section 2).
    """
    batch, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    # query heads of a group share their keys: folded into rows, they need one matmul
    rows = (q * scale).reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
    scores = (rows @ k.transpose(-1, -2)).view(batch, kv_heads, heads // kv_heads, length, -1)
    return apply_softcap(scores, softcap)


def apply_softcap(x: Tensor, softcap: float | None) -> Tensor:
    """c tanh(x / c), or x itself where `softcap` is None."""
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def softmax_maps(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over keys of scores [B, K, G, L, S], which may be overwritten, under the bool mask [B, 1, L, S].

    The maps are float32, or float64 for float64 scores. A query without any visible key gets a uniform map, never NaN.
    """
    if mask is not None:
        scores = scores.masked_fill_(~mask[:, :, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def apply_maps(maps: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of the values [B, H, L, Dv] for maps [B, K, G, L, S] and v [B, K, S, Dv]."""
    batch, kv_heads, groups, length, keys = maps.shape
    return (maps.reshape(batch, kv_heads, groups * length, keys) @ v).view(batch, kv_heads * groups, length, -1)


def blend(first: Tensor, second: Tensor, weight: Tensor, normalised: bool) -> Tensor:
    """Blend of two maps or two outputs, first [B, H, L, *] and second [B, R, L, *]; weight [1] or [B, H, L, 1].

    `normalised`: first + weight (first - second), bit-equal to `first` where both are equal; otherwise
    first - weight second. Head h of `first` is paired with head h R / H of `second`.
    """
    if second.shape[1] != first.shape[1]:
        second = second.repeat_interleave(first.shape[1] // second.shape[1], dim=1)
    weight = weight.to(first.dtype)
    if normalised:
        return torch.lerp(first, second, -weight)  # the same sum in one pass
    return torch.addcmul(first, weight, second, value=-1)


# ---- in one call
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
    """(A1 - lambda A2) v (arXiv 2410.05258, equation 1), divided by (1 - lambda) if `normalised`, so that the rows of
    the map sum to 1: differential attention by its formula -> [B, H, L, Dv].

    q1 [B, H, L, D], q2 [B, R, L, D], k1 and k2 [B, K, S, D], v [B, K, S, Dv]; lambda_: a number or [B, H, L, 1].
    """
    first, second = (attention_maps(q, k, mask, scale, softcap).flatten(1, 2) for q, k in ((q1, k1), (q2, k2)))
    second = second.repeat_interleave(first.shape[1] // second.shape[1], dim=1)
    maps = first - lambda_ * second
    if normalised:
        maps = maps / (1 - lambda_)
    return apply_maps(maps.to(q1.dtype).unflatten(1, (v.shape[1], -1)), v)
