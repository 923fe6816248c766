"""Attention kernels: pure functions on tensors, and the prefix-LM mask kept as lengths.

Shapes: B batch, L query length, S key length, H query heads, K key/value heads, G = H / K, D head width.
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


def attention_maps(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """Explicit softmax maps [B, K, G, L, S] of q [B, H, L, D] on k [B, K, S, D]; mask [B, 1, L, S] bool or None.

    The soft-cap `c tanh(s / c)` comes after the scale and before the mask (Gemma 2, arXiv 2408.00118, section 2).
    The softmax runs in float32, or in float64 for float64 inputs, and is cast back. A row without any visible key
    gives a uniform map, never NaN.
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
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)


def apply_maps(maps: Tensor, v: Tensor) -> Tensor:
    """Weighted values [B, H, L, D] of maps [B, K, G, L, S] and v [B, K, S, D]."""
    batch, kv_heads, groups, length, keys = maps.shape
    return (maps.reshape(batch, kv_heads, groups * length, keys) @ v).view(batch, kv_heads * groups, length, -1)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """Standard attention by its formula, softmax(scale q k^T) v -> [B, H, L, D]; the yardstick of every fast path."""
    return apply_maps(attention_maps(q, k, mask, scale, softcap), v)


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
    queries, keys = q.shape[2], k.shape[2]
    dense = None
    if mask is not None and not (mask.sees_all and window is None):
        dense = mask.dense(queries, keys, window)
    if softcap is not None or (q.device.type == "cpu" and keys <= EXPLICIT_MAX_LENGTH):
        return attention_reference(q, k, v, dense, scale, softcap)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
