"""What runs on a CUDA device, on CPU tensors: paths chosen as there, kernels computed by their formula (pretend_cuda.py).

What a device would launch and wait for is counted for one update of a model with PaliGemma 3b's 18 + 27 layers.
"""

from collections import Counter

import pretend_cuda
import pytest
import torch

import attention
from attention import PrefixMask, attention_reference, blended_reference, choose_path

RAGGED = {  # rows of (prefix, suffix) tokens, padded on the left to nine
    "alike": [(5, 4), (5, 4)],
    "ragged": [(5, 4), (3, 2), (6, 1)],
    "prompts": [(9, 0), (4, 0)],
    "with a row of pads": [(3, 0), (4, 5), (0, 0)],
    "long suffixes": [(2, 7), (1, 8)],
}


def left_padded(rows: list[tuple[int, int]], length: int = 9) -> PrefixMask:
    valid = torch.tensor([[0] * (length - p - s) + [1] * (p + s) for p, s in rows])
    types = torch.tensor([[0] * (length - s) + [1] * s for _, s in rows])
    return PrefixMask.from_tensors(valid, types)


def is_token(mask: PrefixMask, queries: int, keys: int) -> torch.Tensor:
    """[B, 1, L, 1]: the queries that are not pads."""
    return (torch.arange(keys - queries, keys) >= mask.start[:, None])[:, None, :, None]


@pytest.mark.parametrize("queries", [9, 6, 4, 2])
@pytest.mark.parametrize("rows", RAGGED)
def test_two_calls_of_flash_attention_are_the_prefix_mask(rows, queries, monkeypatch):
    """Forward and gradients in float64, standard and blended, with shared keys and keys of their own."""
    pretend_cuda.force(monkeypatch)
    monkeypatch.setattr(attention, "choose_path", lambda *args: "varlen")
    torch.manual_seed(0)
    mask = left_padded(RAGGED[rows])
    q1, q2 = (torch.randn(len(mask.start), 4, queries, 8, dtype=torch.double, requires_grad=True) for _ in range(2))
    k, v, own = (torch.randn(len(mask.start), h, 9, 8, dtype=torch.double, requires_grad=True) for h in (2, 2, 4))
    dense, real = mask.dense(queries, 9), is_token(mask, queries, 9)
    weight = torch.tensor([0.7], dtype=torch.double, requires_grad=True)
    pairs = [
        (attention.attention(q1, k, v, mask, 0.5), attention_reference(q1, k, v, dense, 0.5)),
        *(
            (
                attention.blended_attention(q1, q2, keys, v, mask, 0.5, weight, True),
                blended_reference(q1, q2, *halves, v, dense, 0.5, weight / (1 + weight), True),
            )
            for keys, halves in ((k, (k, k)), (own, own.chunk(2, dim=1)))
        ),
    ]
    leaves = (q1, q2, k, v, own, weight)
    for found, expected in pairs:
        torch.testing.assert_close(found * real, expected * real, atol=1e-12, rtol=0)
        direction = torch.randn_like(found) * real
        grads = (torch.autograd.grad(out, leaves, direction, allow_unused=True) for out in (found, expected))
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_both_arms_start_bit_equal_on_every_path_of_a_gpu(monkeypatch):
    """Equal queries, in bfloat16, at lengths and with options for every path: the same kernel serves both arms."""
    taken = Counter()
    pretend_cuda.force(monkeypatch, taken)
    torch.manual_seed(0)
    for length, options in ((9, {}), (9, dict(softcap=5.0)), (530, dict(softcap=5.0)), (530, dict(window=40))):
        mask = left_padded([(length - 4, 4), (length - 3, 2)], length)
        q, k, v = (torch.randn(2, h, length, 16).bfloat16() for h in (4, 2, 2))
        standard = attention.attention(q, k, v, mask, 0.25, **options)
        blended = attention.blended_attention(q, q, k, v, mask, 0.25, torch.tensor([1.5]), True, **options)
        assert torch.equal(standard, blended)
    assert taken == {"varlen": 2, "maps": 2, "flex": 4}


def test_paths_of_a_gpu():
    def path(keys=300, queries=None, width=16, value=16, dtype=torch.bfloat16, softcap=None, window=None, mask=True):
        q, k, v = (
            torch.empty(2, 4, n, d, dtype=dtype) for n, d in ((queries or keys, width), (keys, width), (keys, value))
        )
        rows = left_padded([(keys - 4, 4), (keys - 5, 3)], keys) if mask else None
        return choose_path(q, k, v, rows, softcap, window, "cuda")

    assert path() == path(width=256, value=256) == "varlen"
    assert path(mask=False) == path(dtype=torch.float32) == path(width=264, value=264) == "sdpa"
    assert path(queries=1) == path(softcap=5.0) == path(value=32) == "maps"
    assert path(600, softcap=5.0) == path(600, value=32) == path(window=20) == "flex"
    assert path(600, softcap=5.0, dtype=torch.float32) == "chunks"
    right = PrefixMask.from_tensors(torch.tensor([[1, 1, 0], [1, 1, 1]]))
    x = torch.empty(2, 1, 3, 8).bfloat16()
    assert choose_path(x, x, x, right, None, None, "cuda") == "sdpa"  # padded on the right
    assert choose_path(x, x, x, PrefixMask.from_tensors(torch.ones(2, 3)), None, None, "cuda") == "sdpa"  # no mask
