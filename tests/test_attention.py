"""The kernels of differential attention against their formula in float64: forward and gradients, every mask."""

import pytest
import torch

from attention import (
    EXPLICIT_MAX_KEYS,
    PrefixMask,
    attention,
    blended_attention,
    choose_path,
    fill_empty_rows,
    sdpa,
)
from attention_formula import attention_reference, blend, blended_reference
from fused_ops import query_chunks

LONG = EXPLICIT_MAX_KEYS + 8  # above the length where the path changes


def mask_of(length: int, side: str) -> PrefixMask:
    """Three rows: full; uneven prefix and suffix with pads on `side`; only pads."""
    valid = torch.ones(3, length, dtype=torch.long)
    types = torch.zeros_like(valid)
    types[0, -3:] = 1
    if side == "left":
        valid[1, :2] = 0
        types[1, -1:] = 1
    else:
        valid[1, -2:] = 0
        types[1, -4:-2] = 1
    valid[2] = 0
    return PrefixMask.from_tensors(valid, types)


def tensors(length, heads=4, second=4, kv_heads=2, keys=2, width=4, value_width=4, weight="number"):
    torch.manual_seed(0)
    shapes = [(heads, length, width), (second, length, width), (keys, length, width), (kv_heads, length, value_width)]
    made = [torch.randn(3, *shape, requires_grad=True) for shape in shapes]
    shape = (1,) if weight == "number" else (3, heads, length, 1)
    return *made, torch.rand(shape).mul(0.6).requires_grad_()


SHAPES = {
    "one kv head": dict(kv_heads=1, keys=1),
    "grouped": dict(),
    "own keys": dict(keys=4),
    "own keys, wide values": dict(keys=4, value_width=8),
    "own keys, one kv head": dict(kv_heads=1, keys=2),
    "few second queries": dict(second=2),
    "all heads their own": dict(kv_heads=4, keys=4),
    "lambda by token": dict(weight="token"),
}


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("length", "side", "softcap", "window"),
    [
        (7, "left", None, None),
        (7, "right", 2.0, 3),
        (7, "right", None, None),
        (LONG, "left", None, None),
        (LONG, "right", 2.0, 40),
    ],
)
def test_fast_paths_equal_the_formula(length, side, softcap, window, shapes, normalised):
    q1, q2, k, v, lambda_ = tensors(length, **SHAPES[shapes])
    mask = mask_of(length, side)
    weight = lambda_ / (1 - lambda_) if normalised else lambda_
    out = blended_attention(q1, q2, k, v, mask, 0.5, weight, normalised, softcap, window)

    exact = [t.detach().double().requires_grad_() for t in (q1, q2, k, v, lambda_)]
    keys = (exact[2], exact[2]) if k.shape[1] == v.shape[1] else exact[2].chunk(2, dim=1)
    dense = mask.dense(length, length, window)
    strength_seen = exact[4]
    expected = blended_reference(
        exact[0], exact[1], *keys, exact[3], dense, 0.5, strength_seen, normalised, softcap
    )  # fmt: skip
    rows = dense.any(-1)[..., None]  # a row without keys: uniform here, zero in SDPA
    assert out.isfinite().all()
    torch.testing.assert_close((out * rows).double(), expected * rows, atol=1e-5, rtol=1e-5)
    direction = torch.randn_like(out) * rows
    found = torch.autograd.grad((out * direction).sum(), (q1, q2, k, v, lambda_))
    wanted = torch.autograd.grad((expected * direction).sum(), exact)
    for name, a, b in zip(("q1", "q2", "k", "v", "lambda"), found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_formula_itself():
    """Against loops over heads and rows, in float64."""
    q1, q2, k1, k2, v = (torch.randn(2, h, 5, 4, dtype=torch.double) for h in (4, 4, 2, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    for normalised in (True, False):
        out = blended_reference(q1, q2, k1, k2, v, mask, 0.5, 0.3, normalised)
        for b in range(2):
            for h in range(4):
                for row in range(5):
                    keys = slice(0, row + 1)
                    a1 = (0.5 * k1[b, h // 2, keys] @ q1[b, h, row]).softmax(0)
                    a2 = (0.5 * k2[b, h // 2, keys] @ q2[b, h, row]).softmax(0)
                    expected = (a1 - 0.3 * a2) @ v[b, h // 2, keys] / (0.7 if normalised else 1)
                    torch.testing.assert_close(out[b, h, row], expected)


def test_a_fast_path_in_float64_is_the_formula():
    q1, q2, k, v, lambda_ = (t.detach().double() for t in tensors(7))
    mask = mask_of(7, "left")
    out = blended_attention(q1, q2, k, v, mask, 0.5, lambda_ / (1 - lambda_), True)
    expected = blended_reference(q1, q2, k, k, v, mask.dense(7, 7), 0.5, lambda_, True)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 7, 300, LONG])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (4, 2), (3, 3)])
def test_equal_queries_are_bit_equal_to_standard_attention(heads, kv_heads, length, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 16).to(dtype) for h in (heads, kv_heads, kv_heads))
    types = torch.zeros(2, length)
    types[:, length // 2 :] = 1
    mask = PrefixMask.from_tensors(torch.ones(2, length), types)
    standard = attention(q, k, v, mask, 0.25)
    for gamma in (1 / 9, 1.0, 9.0, -1 / 3):
        assert torch.equal(blended_attention(q, q, k, v, mask, 0.25, torch.tensor([gamma]), True), standard)
    assert torch.equal(blended_attention(q, -q, k, v, mask, 0.25, torch.tensor([0.0]), False), standard)


def test_equal_keys_of_their_own_give_standard_attention_up_to_rounding():
    """The second map's keys are a view of a larger tensor, for which matmul may choose another kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 7, 16) for heads in (4, 2, 2))
    standard = attention(q, k, v, None, 0.25)
    found = blended_attention(q, q, torch.cat((k, k), 1), v, None, 0.25, torch.tensor([3.0]), True)
    torch.testing.assert_close(found, standard, atol=1e-6, rtol=1e-5)


def test_values_are_multiplied_once_and_the_path_does_not_depend_on_the_arm(monkeypatch):
    products = []
    monkeypatch.setattr("fused_ops.apply_maps", lambda maps, v: products.append(1) or maps.flatten(1, 2) @ v)
    q, kv = torch.randn(1, 4, 6, 8), torch.randn(1, 1, 6, 8)
    blended_attention(q, q, kv, kv, None, 1.0, torch.ones(1), True)
    assert products == [1]
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "attention.F.scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape[1]) or real(*a, **k)
    )
    for length in (EXPLICIT_MAX_KEYS, LONG):
        q, kv = torch.randn(1, 4, length, 8), torch.randn(1, 1, length, 8)
        attention(q, kv, kv, None, 1.0)
        blended_attention(q, q, kv, kv, None, 1.0, torch.ones(1), True)
    assert calls == [4, 8]  # one call each, above the length alone


def test_a_second_query_serves_neighbouring_heads():
    first, second = torch.arange(4.0).view(1, 4, 1, 1), torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    assert blend(first, second, torch.ones(1), False).flatten().tolist() == [-10, -9, -18, -17]
    assert blend(first, second, torch.ones(1), True).flatten().tolist() == [-10, -8, -16, -14]


def test_bf16_maps_are_blended_in_float32(monkeypatch):
    """If they were rounded first, the difference of two similar maps would be only rounding error."""
    seen = []
    monkeypatch.setattr("fused_ops.blend", lambda first, *rest: seen.append(first.dtype) or blend(first, *rest))
    q, kv = torch.randn(1, 4, 6, 8).bfloat16(), torch.randn(1, 1, 6, 8).bfloat16()
    out = blended_attention(q, q, kv, kv, None, 1.0, torch.ones(1), True)
    assert seen == [torch.float32] and out.dtype == torch.bfloat16


# ---- the chunked kernel, and its mask
def shifted_mask(length: int) -> PrefixMask:
    """Ragged prefixes and suffixes, pads left and right, a causal row and a row of pads."""
    rows = [(0, 3, 4, 0), (2, 1, 3, 1), (0, 0, 7, 0), (1, 6, 0, 0), (0, 0, 0, 7)]  # pads, prefix, suffix, pads
    valid = torch.tensor([[0] * a + [1] * (b + c) + [0] * d for a, b, c, d in rows])
    types = torch.tensor([[0] * (a + b) + [1] * c + [0] * d for a, b, c, d in rows])
    return PrefixMask.from_tensors(valid.repeat_interleave(length // 7, 1), types.repeat_interleave(length // 7, 1))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shapes", ["one map", *SHAPES])
def test_chunks_equal_the_formula_in_float64(shapes, window, softcap, monkeypatch):
    monkeypatch.setattr("fused_ops.CHUNK", 3)
    monkeypatch.setattr("attention.choose_path", lambda *args: "chunks")
    q1, q2, k, v, weight = (t.detach().double() for t in tensors(7, **SHAPES.get(shapes, {})))
    batch = (torch.cat((t, t[:2])) if t.ndim > 1 else t for t in (q1, q2, k, v, weight))
    q1, q2, k, v, weight = (t.requires_grad_() for t in batch)
    mask = shifted_mask(7)
    dense = mask.dense(7, 7, window)
    rows = dense.any(-1)[..., None]
    if shapes == "one map":
        leaves = q1, k, v

        def kernel(q, k, v):
            return attention(q, k, v, mask, 0.5, softcap, window) * rows

        expected = attention_reference(*leaves, dense, 0.5, softcap) * rows
    else:
        leaves = q1, q2, k, v, weight
        keys = (k, k) if k.shape[1] == v.shape[1] else k.chunk(2, dim=1)

        def kernel(q1, q2, k, v, weight):
            return blended_attention(q1, q2, k, v, mask, 0.5, weight, True, softcap, window) * rows

        lam = weight / (1 + weight)
        expected = blended_reference(q1, q2, *keys, v, dense, 0.5, lam, True, softcap) * rows
    torch.testing.assert_close(kernel(*leaves), expected, atol=1e-12, rtol=1e-12)
    assert torch.autograd.gradcheck(kernel, leaves, fast_mode=True)
    direction = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(out, leaves, direction) for out in (kernel(*leaves), expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 7), (1, 7), (14, 14)])
def test_chunks_see_what_the_mask_allows(queries, keys, monkeypatch):
    monkeypatch.setattr("fused_ops.CHUNK", 2)
    types = torch.zeros(2, keys)
    types[:, -3:] = 1  # from here on the same in both rows
    alike = PrefixMask.from_tensors(torch.ones(2, keys), types)
    types[1, -5:] = 1
    ragged = PrefixMask.from_tensors(torch.ones(2, keys), types)
    longer = PrefixMask.from_tensors(torch.ones(2, keys - 1), types[:, 1:]).extend_by_one()
    for mask in (shifted_mask(keys), alike, ragged, longer, None):
        for window in (None, 2):
            full = torch.ones(1, 1, queries, keys) if mask is None else mask.dense(queries, keys, window)
            built = torch.zeros_like(full, dtype=torch.bool)
            for rows, seen, dense in query_chunks(mask, queries, keys, window):
                built[:, :, rows, seen] = True if dense is None else dense
            assert torch.equal(built, full.bool())


def test_sdpa_uses_no_mask_where_every_row_has_the_same_prefix(monkeypatch):
    """SDPA by rows: prefix without a mask, suffix causal from the lower right; ragged rows keep the dense mask."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "attention.F.scaled_dot_product_attention", lambda *a, **o: calls.append(o.get("attn_mask")) or real(*a, **o)
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, dtype=torch.double) for h in (4, 2, 2))
    alike = torch.zeros(2, 9)
    alike[:, 5:] = 1
    ragged, padded = alike.clone(), torch.ones(2, 9)
    ragged[1, 4], padded[1, 0] = 1, 0
    for valid, types, expected_calls in (
        (torch.ones(2, 9), alike, 2),
        (torch.ones(2, 9), ragged, 1),
        (padded, alike, 1),
    ):
        mask = PrefixMask.from_tensors(valid, types)
        for queries in (9, 6, 4):
            calls.clear()
            out = sdpa(q[:, :, -queries:], k, v, mask, 0.5, None)
            expected = attention_reference(q[:, :, -queries:], k, v, mask.dense(queries, 9), 0.5)
            torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
            assert len(calls) == (expected_calls if queries > 4 else 1)
            assert len(calls) == 1 or (calls[0] is None and calls[1].shape[2:] == (4, 9))


def test_a_query_that_sees_nothing_sees_everything_in_a_filled_mask():
    visible = mask_of(7, "left").dense(7, 7)
    empty = ~visible.any(-1, keepdim=True).expand_as(visible)
    filled = fill_empty_rows(visible)
    assert empty.any() and filled[empty].all() and torch.equal(filled[~empty], visible[~empty])


def test_dense_masks_get_expanded_keys_off_the_cpu(monkeypatch):
    """If key heads stay shared, CUDA has no fused kernel for a mask or for float32. A single key head is not copied."""
    q, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    valid = torch.ones(2, 9)
    valid[1, 0] = 0
    padded, calls = PrefixMask.from_tensors(valid), []
    parts = (t.to("meta") for t in (padded.start, padded.prefix_end, padded.end))
    padded = PrefixMask(*parts, padded.sees_all, padded.spans)
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "attention.F.scaled_dot_product_attention", lambda *a, **o: calls.append((a, o)) or real(*a, **o)
    )
    assert sdpa(q.to("meta"), v.to("meta"), v.to("meta"), padded, 0.5, None).shape == q.shape
    for dtype in (torch.float32, torch.bfloat16):
        sdpa(*(t.to("meta", dtype) for t in (q, v, v)), None, 0.5, None)
    sdpa(q.to("meta"), v[:, :1].to("meta"), v[:, :1].to("meta"), padded, 0.5, None)
    assert [(a[1].shape[1], o["enable_gqa"]) for a, o in calls] == [(4, False), (4, False), (2, True), (4, False)]
    assert calls[3][0][1].stride(1) == 0
    spread = v[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
    torch.testing.assert_close(real(q, spread, spread), real(q, v, v, enable_gqa=True))


def test_paths_of_a_cpu():
    def path(length, width=8, softcap=None):
        q, k, v = (torch.empty(1, 1, length, d, device="meta") for d in (width, width, 8))
        return choose_path(q, k, v, None, softcap, None, "cpu")

    assert path(EXPLICIT_MAX_KEYS) == path(300, width=4) == path(300, softcap=50.0) == "maps"
    assert path(LONG) == "sdpa" and path(LONG, softcap=50.0) == path(LONG, width=4) == "chunks"


def test_chunks_save_no_maps_for_the_backward_pass():
    saved = []
    q, v = torch.randn(1, 4, LONG, 8, requires_grad=True), torch.randn(1, 1, LONG, 16, requires_grad=True)
    k = torch.randn(1, 2, LONG, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        blended_attention(q, q, k, v, None, 1.0, torch.ones(1), True).sum()
    assert 0 < max(saved) <= 4 * LONG * 16
