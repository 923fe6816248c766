"""Attention: the prefix-LM mask, torch's kernels, and the choice between them and the formula.

B batch, L queries, S keys, H query heads, K key/value heads, D head dim, Dv value head dim, R second queries (H, or
fewer, each shared by H / R heads).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_formula import attention_maps, attention_reference, blend
from errors import UserError
from fused_ops import BlendedAttention, ChunkedAttention, PrefixFlashAttention, Segments

if TYPE_CHECKING:  # takes a second
    from torch.nn.attention.flex_attention import BlockMask

# Up to this many keys, forward + backward of differential attention on a CPU is faster with explicit maps than with
# SDPA; above it the maps take too much memory. (With shared keys in bfloat16, SDPA is faster even below it.)
# Standard attention takes the same path although SDPA takes up to a third less time, because the arms must start
# bit-equal. Measured by benchmarks/attention_paths.py.
EXPLICIT_MAX_KEYS = 512
FLASH_MAX_DIM, FLASH_DIM_STEP = 256, 8  # head dims that flash attention takes: multiples of the step
FLASH_CAPABILITY = (8, 0)  # compute capability of Ampere: older GPUs have no flash attention
HOPPER_CAPABILITY = (9, 0)
# Up to this many keys on Hopper, one SDPA call with a dense mask, which runs on cuDNN, is faster than the two calls of
# flash attention. Measured by benchmarks/gpu.py at 384 and 1152 keys for ragged rows and Gemma 2B's heads in bfloat16.
DENSE_MAX_KEYS = 1152
SMALL_SHARED_MEMORY = 160 << 10  # GPUs with up to these bytes per block need smaller tiles (sm86, sm89, sm12x: 99 KB)
FLEX_LARGE_DIM, SMALL_TILE = 128, 32  # on these GPUs, head dims above the first need tiles of the second


def is_visible(q: Tensor, k: Tensor, start: Tensor, prefix_end: Tensor, end: Tensor, window: int | None) -> Tensor:
    """Whether the query at position q may attend to the key at position k of a row; all arguments broadcast.

    `start`, `prefix_end` and `end` are those of `PrefixMask`; with a `window`, a suffix query sees the last `window`
    keys only.
    """
    causal = k <= q if window is None else (k <= q) & (k > q - window)
    both_in_prefix = (q < prefix_end) & (k < prefix_end)
    return (causal | both_in_prefix) & (k >= start) & (k < end)


def fill_empty_rows(visible: Tensor) -> Tensor:
    """The bool mask [..., L, S], but a query that sees no key sees every key: cuDNN returns NaN where all queries of a
    sequence see nothing."""
    return visible | ~visible.any(-1, keepdim=True)


@dataclass(frozen=True)
class PrefixMask:
    """The prefix-LM mask of a batch, kept as three indices per row instead of [B, L, S] bools.

    A row of a batch is `[pads | prefix | suffix | pads]`: tokens start .. prefix_end - 1 are the prefix (image and
    prompt), prefix_end .. end - 1 the suffix (the answer). The prefix attends to itself in both directions, the suffix
    causally to everything before it; no token attends to a pad. With one pad, three prefix and two suffix tokens:

               keys  .  p  p  p  s  s
        queries  .   .  1  1  1  .  .
                 p   .  1  1  1  .  .
                 p   .  1  1  1  .  .
                 p   .  1  1  1  .  .
                 s   .  1  1  1  1  .
                 s   .  1  1  1  1  1

    What a pad sees follows from the same rule, but on a GPU it sees everything where it would see nothing. It does not
    matter: its output is never used.
    Source: PaliGemma, arXiv 2407.07726, section 3.2.3; `make_attn_mask` of big_vision.
    """

    start: Tensor  # [B]
    prefix_end: Tensor  # [B]
    end: Tensor  # [B]
    sees_all: bool  # no pads and no suffix: no mask is needed
    spans: tuple[tuple[int, int], ...]  # (min, max) over the batch of start, prefix_end and end, as Python ints
    _derived: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_tensors(cls, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> "PrefixMask":
        """The mask for `attention_mask` [B, L] (1 token, 0 pad) and `token_type_ids` [B, L] (1 suffix).

        Raises UserError for an empty batch, and for a row other than pads, prefix, suffix, pads without gaps.
        """
        if not attention_mask.numel():
            raise UserError(f"attention_mask of shape {tuple(attention_mask.shape)} is empty: give at least one token")
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
        has_no_gap, *spans = torch.stack([has_no_gap.long(), *extremes]).tolist()  # one transfer to the CPU
        if not has_no_gap:
            raise UserError(
                "attention_mask or token_type_ids has a gap: a row must be pads, prefix (type 0), suffix (type 1), pads"
            )
        spans = tuple(zip(spans[::2], spans[1::2], strict=True))
        return cls(start, prefix_end, end, sees_all=spans == ((0, 0), (length, length), (length, length)), spans=spans)

    def dense(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """Bool mask [B, 1, queries, keys], True = may attend, for the last `queries` of `keys` positions.

        With a `window`, a suffix query sees the last `window` keys only. On a GPU, a query that would see nothing (of a
        pad) sees everything.
        """
        key = queries == keys, window  # no lengths in the key: torch.compile would specialise on them and recompile
        if key not in self._derived or self._derived[key].shape[-2:] != (queries, keys):
            visible = self.block((keys - queries, keys), (0, keys), window)
            self._derived[key] = visible if self.start.device.type == "cpu" else fill_empty_rows(visible)
        return self._derived[key]

    def block(self, queries: tuple[int, int], keys: tuple[int, int], window: int | None = None) -> Tensor:
        """Bool mask [B, 1, queries, keys] of the queries and keys at these (first, one past the last) positions."""
        q = torch.arange(*queries, device=self.start.device)[None, :, None]
        k = torch.arange(*keys, device=self.start.device)[None, None, :]
        start, prefix_end, end = (x[:, None, None] for x in (self.start, self.prefix_end, self.end))
        return is_visible(q, k, start, prefix_end, end, window)[:, None]

    def flex_blocks(self, queries: int, keys: int, window: int | None) -> "BlockMask":
        """The mask as FlexAttention takes it, for the last `queries` of `keys` positions."""
        key = "blocks", queries == keys, window  # as in `dense`
        if key not in self._derived or self._derived[key].shape[-2:] != (queries, keys):
            first = keys - queries

            def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return is_visible(i + first, j, self.start[b], self.prefix_end[b], self.end[b], window)

            batch, device = len(self.start), self.start.device
            self._derived[key] = flex_module().create_block_mask(sees, batch, None, queries, keys, device=device)
        return self._derived[key]

    def visible_keys(self, first: int, last: int, keys: int) -> tuple[int, int, bool]:
        """For the queries at positions first .. last - 1: the first key that any of them sees, one past the last such
        key, and whether every query sees all of these keys."""
        (low, start), (prefix_end, longest_prefix), (_, end) = self.spans
        high = min(end, last if first >= longest_prefix else max(last, longest_prefix))
        low = min(low, keys - 1)
        high = max(high, low + 1)  # a batch of pads only
        return low, high, low == start and last <= prefix_end == high

    def extend_by_one(self) -> "PrefixMask":
        """The mask with one more suffix token per row, for the single query of a decoding step. With `sees_all` it
        still sees all keys. Rows must be padded on the left."""
        start, prefix_end, (low, high) = self.spans
        spans = (start, prefix_end, (low + 1, high + 1))
        return PrefixMask(self.start, self.prefix_end, self.end + 1, sees_all=self.sees_all, spans=spans)

    def to(self, device: torch.device | str) -> "PrefixMask":
        """This mask on another device; the copy does not block the CPU."""
        start, prefix_end, end = torch.stack((self.start, self.prefix_end, self.end)).to(device, non_blocking=True)
        return PrefixMask(start, prefix_end, end, sees_all=self.sees_all, spans=self.spans)

    def is_padded_left_only(self, keys: int) -> bool:
        """Whether every row ends at the last of the keys."""
        return self.spans[2] == (keys, keys)

    def segments(self, queries: int, keys: int) -> Segments:
        """Sequence offsets for the two calls of `varlen`, for the last `queries` of `keys` positions; every row must be
        padded on the left only.

        Call 1 runs pads, prefix and suffix as separate sequences without a mask, which is correct for prefix queries.
        Call 2 runs the last queries of each row causally against all of its keys except pads, which is correct for
        suffix queries. Each query keeps its correct result and discards the other, so no tokens are moved.
        """
        key = "segments", queries == keys  # as in `dense`
        if key not in self._derived or self._derived[key][0] != queries:
            first, (shortest, longest) = keys - queries, self.spans[1]
            has_prefix = longest > max(first, self.spans[0][0])
            count = min(queries, keys - shortest) if has_prefix else queries  # without call 1, call 2 takes every query
            device = self.start.device
            row = torch.arange(len(self.start), device=device)[:, None]
            ends = torch.stack((self.start, self.prefix_end, torch.full_like(self.start, keys)), dim=1)

            def offsets(length: int, ends: Tensor) -> Tensor:
                return F.pad((row * length + ends).flatten(), (1, 0)).int()

            positions = torch.arange(keys - count, keys, device=device)
            segments = Segments(
                prefix=(offsets(queries, (ends - first).clamp(min=0)), offsets(keys, ends)) if has_prefix else None,
                suffix=(offsets(count, count * torch.arange(2, device=device)), offsets(keys, ends[:, ::2])),
                in_suffix=(positions >= self.prefix_end[:, None])[:, :, None, None],
            )
            self._derived[key] = queries, segments
        return self._derived[key][1]

    def common_prefix_end(self, keys: int) -> int | None:
        """Where the prefix ends, if at the same position in every row and no row has pads; otherwise None."""
        (low, high), ends = self.spans[1], self.spans[2]
        return low if low == high and self.spans[0] == (0, 0) and ends == (keys, keys) else None


class StepMask:
    """The mask of one new token per row, as `PrefixMask` for left-padded rows. The token's position is in a tensor, so
    that a captured CUDA graph or compiled step stays valid at every position."""

    sees_all = False

    def __init__(self, start: Tensor, position: Tensor):
        self.start, self.position = start, position  # [B], the first token of each row; [1], where the new token is
        self._derived: dict = {}

    def dense(self, queries: int, keys: int, window: int | None = None) -> Tensor:
        """Bool mask [B, 1, 1, keys]; keys beyond the new token are hidden."""
        if (keys, window) not in self._derived:
            k, start = torch.arange(keys, device=self.start.device), self.start[:, None]
            seen = is_visible(self.position, k, start, start, self.position + 1, window)
            self._derived[keys, window] = seen[:, None, None]
        return self._derived[keys, window]

    def common_prefix_end(self, keys: int) -> None:
        """None: a single query needs no split into prefix and suffix."""


Mask = PrefixMask | StepMask


def dense_mask(mask: Mask | None, queries: int, keys: int, window: int | None) -> Tensor | None:
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


# ---- the paths
Kernels = Literal["cpu", "cuda", "hopper", "sdpa"]
AttentionPath = Literal["maps", "chunks", "sdpa", "varlen", "flex"]


def kernels_of(device: torch.device) -> Kernels:
    """The kernels of a device: "cpu"; "cuda" for Ampere or later, which has flash attention and FlexAttention (the meta
    device, on which memory is counted, stands for such a GPU); "hopper" for Hopper, whose cuDNN is fast with a mask;
    "sdpa" for any other device, which has SDPA only."""
    if device.type in ("cpu", "meta"):
        return "cpu" if device.type == "cpu" else "cuda"
    if device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return "sdpa"
    capability = torch.cuda.get_device_capability(device)
    return "hopper" if capability == HOPPER_CAPABILITY else "cuda" if capability >= FLASH_CAPABILITY else "sdpa"


# what torch.compiler.assume_constant_result sets; calling that would import the compiler, which takes a second
kernels_of._dynamo_marked_constant = True


def choose_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    softcap: float | None,
    window: int | None,
    kernels: Kernels,
) -> AttentionPath:
    """The path for attention of q [B, H, L, D] to k [B, K, S, D] and v [B, K, S, Dv] on a device with these `kernels`,
    the same as in standard attention unless a preset changes the widths of keys or values.

    "maps": explicit maps, kept for the backward pass: few keys on a CPU or without an SDPA kernel, one query on a GPU.
    "chunks": explicit maps of a few queries at a time, recomputed in the backward pass.
    "sdpa": torch's fused kernels, which have no soft-cap; for values wider than the keys they fall back to a slow one.
    "varlen": flash attention on rows of different lengths, for a prefix-LM mask in half precision on a GPU; not for
    short rows on Hopper.
    "flex": FlexAttention, for what flash attention lacks (soft-cap, wide values, a window), also in half precision.
    """
    has_kernel = softcap is None and k.shape[-1] == v.shape[-1]
    is_short = k.shape[2] <= EXPLICIT_MAX_KEYS
    if kernels == "cpu":
        return "maps" if is_short else "sdpa" if has_kernel else "chunks"
    has_flash = kernels in ("cuda", "hopper")  # and FlexAttention, both in half precision
    is_half = has_flash and k.dtype in (torch.bfloat16, torch.float16)
    if q.shape[2] == 1 or (is_short and not has_kernel):
        return "maps"
    if has_kernel and (mask is None or window is None):
        fits_flash = is_half and k.shape[-1] <= FLASH_MAX_DIM and k.shape[-1] % FLASH_DIM_STEP == 0
        needs_mask = mask is not None and not mask.sees_all
        prefers_dense = kernels == "hopper" and k.shape[2] <= DENSE_MAX_KEYS
        is_ragged = fits_flash and needs_mask and mask.is_padded_left_only(k.shape[2])
        return "varlen" if is_ragged and not prefers_dense else "sdpa"
    return "flex" if is_half else "sdpa" if has_kernel else "chunks"


def fused_attention(
    path: AttentionPath,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attention by one of torch's kernels; arguments as in `attention`."""
    if path == "varlen":
        return varlen(q, k, v, mask, scale)
    if path == "flex":
        return flex(q, k, v, mask, scale, softcap, window)
    return sdpa(q, k, v, mask, scale, window)


def useful_window(window: int | None, keys: int) -> int | None:
    """The window, or None if it hides none of the keys."""
    return None if window is None or window >= keys else window


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Standard attention -> [B, H, L, D] of q [B, H, L, D] and k, v [B, K, S, D]; without a mask all keys are seen."""
    window = useful_window(window, k.shape[2])
    path = choose_path(q, k, v, mask, softcap, window, kernels_of(k.device))
    if path == "maps":
        return attention_reference(q, k, v, dense_mask(mask, q.shape[2], k.shape[2], window), scale, softcap)
    if path == "chunks":
        return ChunkedAttention.apply(q, None, k, v, None, mask, scale, False, softcap, window)
    return fused_attention(path, q, k, v, mask, scale, softcap, window)


def blended_attention(
    q1: Tensor,
    q2: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
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
    window = useful_window(window, k.shape[2])
    path = choose_path(q1, k, v, mask, softcap, window, kernels_of(k.device))
    if path == "maps":
        dense = dense_mask(mask, q1.shape[2], k.shape[2], window)
        return BlendedAttention.apply(q1, q2, k, v, weight, dense, scale, normalised, softcap)
    if path == "chunks":
        return ChunkedAttention.apply(q1, q2, k, v, weight, mask, scale, normalised, softcap, window)
    # one call on the heads of both maps, then the outputs are blended
    if k.shape[1] == v.shape[1]:  # both queries of a head are in one key/value group
        groups = [q.unflatten(1, (k.shape[1], -1)) for q in (q1, q2)]
    else:
        groups = [q[:, None] for q in (q1, q2)]
        v = torch.cat((v, v), dim=1)
    out = fused_attention(path, torch.cat(groups, dim=2).flatten(1, 2), k, v, mask, scale, softcap, window)
    out = out.unflatten(1, (groups[0].shape[1], -1)).split([group.shape[2] for group in groups], dim=2)
    wide = torch.promote_types(q1.dtype, torch.float32)  # for the difference of two close outputs
    first, second = (part.flatten(1, 2).to(wide) for part in out)
    return blend(first, second, weight, normalised).to(q1.dtype)


@dataclass  # not frozen: torch.compile of torch 2.11 cannot build a frozen one
class Attend:
    """The attention of one layer with mask, scale, soft-cap and window bound, as a differential module expects it."""

    mask: Mask | None
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
        """This attention with its scale times `factor`."""
        return replace(self, scale=self.scale * factor)

    def maps(self, q: Tensor, k: Tensor) -> Tensor:
        """The explicit map [B, H, L, S] of q [B, H, L, D] and k [B, K, S, D]."""
        dense = dense_mask(self.mask, q.shape[2], k.shape[2], self.window)
        return attention_maps(q, k, dense, self.scale, self.softcap).flatten(1, 2)


# ---- torch's kernels
def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scale: float, window: int | None) -> Tensor:
    """torch's scaled_dot_product_attention under a prefix-LM mask -> [B, H, L, D]; arguments as in `attention`.

    If the prefix ends at the same position in every row and no row is padded, this makes two calls: prefix queries on
    prefix keys without a mask, suffix queries on all keys. Ragged or padded rows, a window and decoding use a single
    call with a dense mask.
    """
    queries, keys = q.shape[2], k.shape[2]
    prefix_end = None if mask is None or window is not None else mask.common_prefix_end(keys)
    first = keys - queries  # position of the first query
    if prefix_end is None or prefix_end == keys:
        return call_sdpa(q, k, v, dense_mask(mask, queries, keys, window), scale)
    prefix_end = max(prefix_end, first)  # position of the first suffix query
    causal = mask.dense(keys - prefix_end, keys)
    if prefix_end == first:  # no prefix queries: a causal mask, or decoding
        return call_sdpa(q, k, v, causal, scale)
    prefix = call_sdpa(q[:, :, : prefix_end - first], k[:, :, :prefix_end], v[:, :, :prefix_end], None, scale)
    return torch.cat((prefix, call_sdpa(q[:, :, prefix_end - first :], k, v, causal, scale)), dim=2)


def call_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One SDPA call with a dense mask or None.

    Off the CPU, only the flash kernel takes shared keys and values, and it takes neither a mask nor float32. For other
    kernels they are repeated for every query head, since torch would silently fall back to its slow formula.
    """
    if q.device.type != "cpu" and (mask is not None or q.dtype == torch.float32):
        k, v = repeat_heads(q.shape[1], k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def repeat_heads(heads: int, *tensors: Tensor) -> list[Tensor]:
    """Key or value tensors [B, K, ...] with each head repeated to make `heads`; a single head is not copied."""
    return [t[:, :, None].expand(-1, -1, heads // t.shape[1], *t.shape[2:]).flatten(1, 2) for t in tensors]


def varlen(q: Tensor, k: Tensor, v: Tensor, mask: PrefixMask, scale: float) -> Tensor:
    """Flash attention under a prefix-LM mask of rows padded on the left; arguments as in `attention`.

    Two calls without a mask, as `PrefixMask.segments` explains: a dense mask would rule out flash attention.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return PrefixFlashAttention.apply(q, k, v, mask.segments(q.shape[1], k.shape[1]), scale).transpose(1, 2)


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: PrefixMask | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """FlexAttention under a prefix-LM mask; arguments as in `attention`, v may be wider than k."""
    needs_mask = mask is not None and not (mask.sees_all and window is None)
    blocks = mask.flex_blocks(q.shape[2], k.shape[2], window) if needs_mask else None
    cap = None if softcap is None else softcap_score(torch.full((), softcap, device=q.device))
    run = compiled_flex() if q.device.type != "cpu" else flex_module().flex_attention
    shared = q.shape[1] != k.shape[1]
    tiles = flex_tiles(q)
    return run(q, k, v, score_mod=cap, block_mask=blocks, scale=scale, enable_gqa=shared, kernel_options=tiles)


def softcap_score(softcap: Tensor) -> Callable[..., Tensor]:
    """The soft-cap as a `score_mod` of FlexAttention. `softcap` is a tensor because torch.compile would turn a float
    into an input of the graph, which the kernel cannot read."""
    return lambda score, *_: softcap * torch.tanh(score / softcap)


def flex_module() -> ModuleType:
    """torch's FlexAttention, imported on first use."""
    import torch.nn.attention.flex_attention as module  # takes a second

    return module


@cache
def compiled_flex() -> Callable:
    """`flex_attention` as one compiled kernel."""
    return torch.compile(flex_module().flex_attention, dynamic=True, fullgraph=True)


def flex_tiles(q: Tensor) -> dict | None:
    """Tiles for FlexAttention's kernel if the default ones need more shared memory than a block of the GPU has."""
    if q.device.type == "cpu" or q.shape[-1] <= FLEX_LARGE_DIM:
        return None
    memory = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    if memory > SMALL_SHARED_MEMORY:
        return None
    return dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), SMALL_TILE)
