"""Code paths of a CUDA device on CPU tensors: kernels that a CPU lacks are computed by their formulas, and the kernel
launches and syncs of a device are counted.

B batch, N packed rows, H query heads, K key/value heads, D head dim.
"""

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import finetune_diff
import finetune_original
import fused_ops
import plots
import training
from differential_attention import DifferentialConfig
from modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaModel

LABEL_ROWS, VOCABULARY = 512, 257_216  # of PaliGemma 3b in a batch of 8, 64 label tokens each
FLASH_BACKWARD = 3  # kernels of flash attention's backward pass: dot products, the gradients, a conversion
GROUPED_SUMS = 2  # additional kernels if query heads share keys: sums of the gradients of keys and values
# aten ops without a kernel launch: they make a view or uninitialised memory
FREE = {
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view", "alias", "as_strided",
    "chunk", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand", "is_pinned", "is_same_size",
    "lift_fresh", "movedim", "narrow", "new_empty", "new_empty_strided", "permute", "promote_types", "resize_",
    "select", "set_", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold",
    "unsqueeze", "view", "view_as_real",
}  # fmt: skip
# aten ops whose result has a size or value that the CPU needs (a sync)
SYNCS = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_dim", "_unique2", "bincount"}


# ---- flash attention by its formula
def segment_masks(ends_q: Tensor, ends_k: Tensor, rows: int, keys: int, causal: bool) -> Tensor:
    """Bool [rows, keys]: which packed keys a packed query sees."""
    query, key = torch.arange(rows), torch.arange(keys)
    segment_q, segment_k = (torch.searchsorted(e.long(), i, right=True) for e, i in ((ends_q, query), (ends_k, key)))
    sees = segment_q[:, None] == segment_k
    if causal:  # aligned to the lower right corner
        from_end_q = ends_q.long()[segment_q.clamp(max=len(ends_q) - 1)] - query
        from_end_k = ends_k.long()[segment_k.clamp(max=len(ends_k) - 1)] - key
        sees &= from_end_q[:, None] <= from_end_k
    return sees


def flash_maps(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scale: float) -> tuple[Tensor, ...]:
    """(maps [H, N, S], q, k, v [H, *, D]) of packed q [N, H, D] and k, v [N, K, D], in float32 or wider; the map
    of a query without keys is zero."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (t.transpose(0, 1).to(wide) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
    scores = (scale * q @ k.mT).masked_fill(~sees, -torch.inf)
    return scores.softmax(-1).nan_to_num(), q, k, v


def flash_forward(q, k, v, ends_q, ends_k, max_q, max_k, dropout, is_causal, debug, *, scale=None, **_):
    lengths = (ends.diff() for ends in (ends_q, ends_k))
    assert all(n.min() >= 0 and n.max() <= longest for n, longest in zip(lengths, (max_q, max_k), strict=True))
    assert ends_q[-1] == len(q) and ends_k[-1] == len(k) and ends_q.dtype == ends_k.dtype == torch.int32
    maps, _, _, wide_v = flash_maps(q, k, v, segment_masks(ends_q, ends_k, len(q), len(k), is_causal), scale)
    out = (maps @ wide_v).transpose(0, 1).to(q.dtype).contiguous()
    unused = torch.zeros(2, dtype=torch.uint64)
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float), unused, unused, unused


def flash_backward(
    g, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, dropout, is_causal, rng, unused, *, scale=None, **_
):
    sees = segment_masks(ends_q, ends_k, len(q), len(k), is_causal)
    maps, wide_q, wide_k, wide_v = flash_maps(q, k, v, sees, scale)
    g = g.transpose(0, 1).to(maps.dtype)
    d_maps = g @ wide_v.mT
    d_scores = scale * maps * (d_maps - (maps * d_maps).sum(-1, keepdim=True))
    d_q, d_k, d_v = d_scores @ wide_k, d_scores.mT @ wide_q, maps.mT @ g
    d_k, d_v = (d.unflatten(0, (k.shape[1], -1)).sum(1) for d in (d_k, d_v))
    return tuple(d.transpose(0, 1).to(q.dtype).contiguous() for d in (d_q, d_k, d_v))


LIBRARY = torch.library.Library("aten", "IMPL")  # a CPU has no kernel of its own for these
LIBRARY.impl("_flash_attention_forward", flash_forward, "CPU")
LIBRARY.impl("_flash_attention_backward", flash_backward, "CPU")


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


# ---- counting launches and syncs
class CountedRMSNorm(torch.autograd.Function):
    """F.rms_norm, counted as one kernel, as on CUDA; on a CPU it is several operations."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        count("rms_norm")
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        with Counts.paused():
            return plain_rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        count("rms_norm backward", 1 + ctx.needs_input_grad[1])
        with Counts.paused(), torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            made = plain_rms_norm(leaves[0], x.shape[-1:], leaves[1], ctx.eps)
            d_x, d_weight = torch.autograd.grad(made, leaves, g)
        return d_x, d_weight if ctx.needs_input_grad[1] else None, None


plain_rms_norm = F.rms_norm


class Counts(TorchDispatchMode):
    """Counts operations that would launch a kernel on a CUDA device, and those that would sync.

    Kernels that differ between the devices are counted as on CUDA: flash attention, RMSNorm, gradient clipping for all
    tensors at once. Copies to the device are not counted, since there is no device.
    """

    active: "Counts | None" = None

    def __init__(self):
        super().__init__()
        self.launches, self.syncs, self.is_paused = Counter(), Counter(), False

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()
        real_clip, real_tolist = torch.nn.utils.clip_grad_norm_, Tensor.tolist

        def tolist(tensor):
            self.syncs["tolist"] += not self.is_paused
            with self.paused():
                return real_tolist(tensor)

        def rms_norm(x, shape, weight=None, eps=None):
            weight = x.new_ones(shape) if weight is None else weight
            return CountedRMSNorm.apply(x, weight, eps)

        self.patches.setattr(Tensor, "tolist", tolist)
        self.patches.setattr(F, "rms_norm", rms_norm)
        self.patches.setattr(torch.nn.utils, "clip_grad_norm_", partial(real_clip, foreach=True))
        Counts.active = self
        return super().__enter__()

    def __exit__(self, *error):
        Counts.active = None
        self.patches.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.is_paused:
            self.note(func._schema.name.split("::")[1], args)
        return out

    def note(self, name: str, args: tuple):
        if name in SYNCS or (name.strip("_") in ("index", "index_put") and has_bool_index(args[1])):
            self.syncs[name] += 1
        if name == "_flash_attention_backward":
            self.launches[name] += FLASH_BACKWARD + GROUPED_SUMS * (args[1].shape[1] != args[2].shape[1])
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            self.launches[name] += FLASH_BACKWARD
        elif name not in FREE and name.rstrip("_") not in FREE:
            self.launches[name] += 1

    @classmethod
    @contextlib.contextmanager
    def paused(cls) -> Iterator[None]:
        """Inside the block nothing is counted: it is CPU work on CPU tensors."""
        mode = cls.active
        before = mode is not None and mode.is_paused
        if mode is not None:
            mode.is_paused = True
        try:
            yield
        finally:
            if mode is not None:
                mode.is_paused = before

    def take(self) -> tuple[int, int]:
        """(launches, syncs) since the last call."""
        taken = self.launches.total(), self.syncs.total()
        self.launches, self.syncs = Counter(), Counter()
        return taken


def has_bool_index(indices) -> bool:
    return any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)


def count(name: str, times: int = 1):
    if Counts.active is not None and not Counts.active.is_paused:
        Counts.active.launches[name] += times


# ---- updates of a deep model
def write_deep_model(source: Path, folder: Path):
    """A model folder with as many layers and heads as PaliGemma 3b; all other sizes are those of `source`."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = PaliGemmaConfig.from_pretrained(source)
    text = replace(config.text_config, num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1)
    config = replace(config, text_config=text, vision_config=replace(config.vision_config, num_hidden_layers=27))
    torch.manual_seed(0)
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)


def count_updates(
    model: Path, folder: Path, preset: str | None, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[int, int]]:
    """(launches, syncs) of the second update of the training loop and of the third, which is logged: ragged batches of
    8 needle questions in bfloat16, with as many tiles of the loss as at PaliGemma 3b's size."""
    base = finetune_original if preset is None else finetune_diff
    options = dict(batch_size=8, max_steps=4, log_every=3, dtype="bfloat16", grids=(2,), negatives=0.5)
    config = tiny.quick(base.Config, model, folder, save_every=100, **options)
    counts, taken = Counts(), []
    force(monkeypatch)
    tiles = -(-VOCABULARY // fused_ops.tile_size(LABEL_ROWS, ""))
    vocabulary = PaliGemmaConfig.from_pretrained(config.model).text_config.vocab_size
    monkeypatch.setattr(fused_ops, "PLAIN_LOSS_MAX_LOGITS", 0)
    monkeypatch.setattr(fused_ops, "tile_size", lambda *_: -(-vocabulary // tiles))
    real_loader, real_plan, real_rate = training.loader, PaliGemmaModel.plan, training.learning_rate_at

    def loader(*args, **kwargs):  # its work runs in worker processes
        batches = real_loader(*args, **kwargs)
        while True:
            with counts.paused():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def plan(*args, **kwargs):  # works on CPU tensors
        with counts.paused():
            return real_plan(*args, **kwargs)

    monkeypatch.setattr(training, "loader", loader)
    monkeypatch.setattr(PaliGemmaModel, "plan", plan)
    monkeypatch.setattr(training, "learning_rate_at", lambda *args: taken.append(counts.take()) or real_rate(*args))
    for module, name in ((plots, "draw_run"), (training, "evaluate"), (training, "evaluate_and_log")):
        monkeypatch.setattr(module, name, lambda *args: None)
    monkeypatch.setattr(training, "format_results", lambda *args: [])
    with counts:
        finetune_original.finetune(config, "arm", preset and DifferentialConfig(preset).resolve())
    return [taken[2], taken[3]]
