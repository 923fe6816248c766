"""Paths of a CUDA device on CPU tensors: kernels that a CPU lacks are computed by their formula, and what a device would
launch and wait for is counted.

B batch, N packed rows, H query heads, K key/value heads, D head dim.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import fused_ops

FLASH_BACKWARD = 3  # kernels of flash attention's backward pass: dot products, the gradients, a conversion
GROUPED_SUMS = 2  # more, where query heads share keys: sums of the gradients of keys and values
# aten ops that launch nothing: they make a view, or memory that is not written
FREE = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "is_pinned", "is_same_size", "lift_fresh", "movedim", "narrow", "new_empty",
    "new_empty_strided", "permute", "resize_", "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unfold", "unsqueeze", "view", "view_as_real",
}  # fmt: skip
# aten ops whose result has a size or a value that the host must know
SYNCS = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_dim", "_unique2", "bincount"}


# ---- flash attention by its formula
def segment_masks(ends_q: Tensor, ends_k: Tensor, rows: int, keys: int, causal: bool) -> Tensor:
    """Bool [rows, keys]: which packed keys a packed query sees."""
    query, key = torch.arange(rows), torch.arange(keys)
    segment_q, segment_k = (torch.searchsorted(e.long(), i, right=True) for e, i in ((ends_q, query), (ends_k, key)))
    sees = segment_q[:, None] == segment_k
    if causal:  # from the lower right corner
        from_end_q = ends_q.long()[segment_q.clamp(max=len(ends_q) - 1)] - query
        from_end_k = ends_k.long()[segment_k.clamp(max=len(ends_k) - 1)] - key
        sees &= from_end_q[:, None] <= from_end_k
    return sees


def flash_maps(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> tuple[Tensor, ...]:
    """(maps [H, N, S], q, k, v [H, *, D]) of packed q [N, H, D] and k, v [N, K, D], in float32 or wider; a query without
    keys has a map of zeros."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.transpose(0, 1).to(wide) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~sees, -torch.inf)
    return scores.softmax(-1).nan_to_num(), q, k, v


def flash_forward(q, k, v, ends_q, ends_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *_, **__):
    lengths = (ends.diff() for ends in (ends_q, ends_k))
    assert all(0 <= n.min() and n.max() <= longest for n, longest in zip(lengths, (max_q, max_k), strict=True))
    assert ends_q[-1] == len(q) and ends_k[-1] == len(k) and ends_q.dtype == ends_k.dtype == torch.int32
    assert tuple(window_size) == ((-1, 0) if is_causal else (-1, -1))
    maps, _, _, wide_v = flash_maps(q, k, v, segment_masks(ends_q, ends_k, len(q), len(k), is_causal), scale)
    out = (maps @ wide_v).transpose(0, 1).to(q.dtype).contiguous()
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float), torch.zeros(2, dtype=torch.uint64)


def flash_backward(g, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, is_causal, rng, scale=None, window_size=None):
    sees = segment_masks(ends_q, ends_k, len(q), len(k), is_causal)
    maps, wide_q, wide_k, wide_v = flash_maps(q, k, v, sees, scale)
    g = g.transpose(0, 1).to(maps.dtype)
    d_maps = g @ wide_v.mT
    d_scores = scale * maps * (d_maps - (maps * d_maps).sum(-1, keepdim=True))
    d_q, d_k, d_v = d_scores @ wide_k, d_scores.mT @ wide_q, maps.mT @ g
    d_k, d_v = (d.unflatten(0, (k.shape[1], -1)).sum(1) for d in (d_k, d_v))
    return tuple(d.transpose(0, 1).to(q.dtype).contiguous() for d in (d_q, d_k, d_v))


varlen._varlen_attn.register_kernel("cpu")(flash_forward)
varlen._varlen_attn_backward.register_kernel("cpu")(flash_backward)


# ---- the paths
def force(monkeypatch: pytest.MonkeyPatch, taken: Counter | None = None):
    """Choose paths, tiles and chunks as on CUDA; `taken` counts the attention paths."""

    def choose(*args):
        path = attention_choice(*args[:-1], "cuda")
        if taken is not None:
            taken[path] += 1
        return path

    attention_choice, chunks, tiles = attention.choose_path, fused_ops.query_chunks, fused_ops.tile_size
    monkeypatch.setattr(attention, "choose_path", choose)
    monkeypatch.setattr(fused_ops, "tile_size", lambda rows, _: tiles(rows, "cuda"))
    monkeypatch.setattr(fused_ops, "query_chunks", lambda *args: chunks(*args[:4], "cuda"))
