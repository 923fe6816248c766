"""Tests that need a GPU: its kernels against float64 on the CPU, CUDA graphs, nf4, compiled layers, two GPUs.

Skipped without a CUDA device. `GPU_TESTS_DEVICE=cpu pytest tests/test_gpu.py` runs what a CPU can, with flash attention
computed by its formula (pretend_cuda.py), to check the tests themselves.
"""

import contextlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pretend_cuda
import pytest
import tiny
import torch
from runs import crash, flags_of, logged, saved_lora, start
from torch import Tensor

import attention
import fused_ops
import modeling_vlm
import training
from attention import PrefixMask
from attention_formula import apply_softcap, attention_reference, blended_reference
from differential_attention import PRESETS, DifferentialConfig, add_differential, unfreeze_differential
from errors import UserError
from finetune_original import Config, finetune
from modeling_gemma import PaliGemmaForConditionalGeneration

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
# largest relative error of a tensor, by the norm of the difference
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-4}


def check_close(found: Tensor, expected: Tensor, tolerance: float):
    """`found`, on the GPU, must be close to `expected`, in float64 on the CPU."""
    error = (found.detach().double().cpu() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.fixture
def taken(monkeypatch) -> Counter:
    """Counts of the attention paths taken; on a CPU the paths of a GPU are forced."""
    counted = Counter()
    if DEVICE == "cpu":
        pretend_cuda.force(monkeypatch, counted)
        return counted
    real = attention.choose_path

    def choose(*args) -> str:
        path = real(*args)
        counted[path] += 1
        return path

    monkeypatch.setattr(attention, "choose_path", choose)
    return counted


# ---- attention
RAGGED, ALIKE = [(40, 20), (33, 9), (50, 14)], [(40, 24), (40, 24)]
CASES = {  # path, dtype, rows of (prefix, suffix), length, queries, head dim, value dim, options
    "varlen": ("varlen", torch.bfloat16, RAGGED, 64, 64, 64, 64, {}),
    "varlen, width 256": ("varlen", torch.bfloat16, RAGGED, 64, 64, 256, 256, {}),
    "varlen, last queries": ("varlen", torch.bfloat16, RAGGED, 64, 30, 64, 64, {}),
    "varlen, prompts": ("varlen", torch.bfloat16, [(64, 0), (21, 0)], 64, 64, 64, 64, {}),
    "varlen, a row of pads": ("varlen", torch.bfloat16, [(30, 0), (40, 24), (0, 0)], 64, 64, 64, 64, {}),
    "varlen, many pads": ("varlen", torch.bfloat16, [(300, 60), (20, 4)], 360, 360, 64, 64, {}),
    "varlen, long suffixes": ("varlen", torch.bfloat16, [(3, 61), (1, 60)], 64, 64, 64, 64, {}),
    "sdpa, no mask": ("sdpa", torch.bfloat16, None, 64, 64, 64, 64, {}),
    "sdpa, float32": ("sdpa", torch.float32, RAGGED, 64, 64, 64, 64, {}),
    "sdpa, float32, alike": ("sdpa", torch.float32, ALIKE, 64, 64, 256, 256, {}),
    "sdpa, too wide": ("sdpa", torch.bfloat16, ALIKE, 64, 64, 264, 264, {}),
    "maps, one query": ("maps", torch.bfloat16, RAGGED, 64, 1, 64, 64, {}),
    "maps, soft-cap": ("maps", torch.bfloat16, RAGGED, 64, 64, 64, 64, dict(softcap=5.0)),
    "flex, soft-cap": ("flex", torch.bfloat16, RAGGED, 576, 576, 64, 64, dict(softcap=5.0)),
    "flex, width 256": ("flex", torch.bfloat16, RAGGED, 576, 576, 256, 256, dict(softcap=5.0)),
    "flex, wide values": ("flex", torch.bfloat16, RAGGED, 576, 576, 64, 128, {}),
    "flex, window": ("flex", torch.bfloat16, RAGGED, 576, 576, 64, 64, dict(window=12)),
    "flex, window and soft-cap": ("flex", torch.bfloat16, RAGGED, 576, 576, 64, 64, dict(window=12, softcap=5.0)),
    "chunks": ("chunks", torch.float32, RAGGED, 576, 576, 64, 64, dict(softcap=5.0)),
}


def left_padded(rows: list[tuple[int, int]] | None, length: int) -> PrefixMask | None:
    """The mask of left-padded rows that end in the suffix; if `length` is larger, prefixes are extended."""
    if rows is None:
        return None
    longer = length - max(prefix + suffix for prefix, suffix in rows)
    rows = [(prefix + longer if prefix else 0, suffix) for prefix, suffix in rows]
    valid = torch.tensor([[0] * (length - p - s) + [1] * (p + s) for p, s in rows])
    types = torch.tensor([[0] * (length - s) + [1] * s for _, s in rows])
    return PrefixMask.from_tensors(valid, types)


@pytest.mark.parametrize("kind", ["standard", "blended", "blended, own keys"])
@pytest.mark.parametrize("case", CASES)
def test_every_attention_path_is_the_formula(case, kind, taken):
    """Forward and gradients, against float64."""
    path, *_ = CASES[case]
    if path == "varlen" and DEVICE != "cpu" and attention.kernels_of(torch.device(DEVICE)) == "hopper":
        path = "sdpa"
    if DEVICE == "cpu" and path == "flex":
        pytest.skip("a CPU has no backward pass of FlexAttention")
    check_attention(case, kind)
    assert taken == {path: 1}


@pytest.mark.parametrize("kind", ["standard", "blended"])
@pytest.mark.parametrize("path", ["varlen", "sdpa"])
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("varlen")])
def test_both_paths_of_ragged_rows_are_the_formula(case, path, kind, monkeypatch):
    """Two calls of flash attention, and one call with a dense mask (cuDNN's kernel on Hopper)."""
    if DEVICE == "cpu" and path == "varlen":
        pytest.skip("a CPU has no flash attention")
    monkeypatch.setattr(attention, "choose_path", lambda *_: path)
    check_attention(case, kind)


def check_attention(case: str, kind: str):
    """Forward and gradients of a case, against float64."""
    _, dtype, rows, length, queries, width, value_width, options = CASES[case]
    torch.manual_seed(0)
    mask, batch = left_padded(rows, length), len(rows or ALIKE)
    own = 2 if kind.endswith("own keys") else 1
    shapes = [(4, queries, width), (4, queries, width), (2 * own, length, width), (2, length, value_width)]
    wide = [torch.randn(batch, *shape).to(dtype).double().requires_grad_() for shape in shapes]
    leaves = [t.detach().to(DEVICE, dtype).requires_grad_() for t in wide]
    gamma = torch.tensor([0.7], dtype=torch.double, requires_grad=True)
    weight = gamma.detach().to(DEVICE, torch.float32).requires_grad_()
    dense, softcap, scale = None, options.get("softcap"), width**-0.5
    if mask is not None:
        dense = mask.dense(queries, length, options.get("window"))
    q1, q2, k, v = wide
    first_keys, second_keys = k.chunk(2, dim=1) if own == 2 else (k, k)
    on_gpu = mask and mask.to(DEVICE)
    if kind == "standard":
        expected = attention_reference(q1, k, v, dense, scale, softcap)
        found = attention.attention(leaves[0], *leaves[2:], on_gpu, scale, **options)
    else:
        lambda_ = gamma / (1 + gamma)
        expected = blended_reference(q1, q2, first_keys, second_keys, v, dense, scale, lambda_, True, softcap)
        found = attention.blended_attention(*leaves, on_gpu, scale, weight, True, **options)
    assert found.dtype == dtype
    real = torch.ones(batch, 1, queries, 1, dtype=torch.bool)
    if mask is not None:
        real = (torch.arange(length - queries, length) >= mask.start[:, None])[:, None, :, None]
    check_close(found * real.to(DEVICE), expected * real, TOLERANCE[dtype])
    direction = torch.randn_like(expected) * real
    if kind == "standard":
        wide, leaves = [q1, k, v], [leaves[0], *leaves[2:]]
    else:
        wide, leaves = [*wide, gamma], [*leaves, weight]
    expected_grads = torch.autograd.grad(expected, wide, direction)
    found_grads = torch.autograd.grad(found, leaves, direction.to(DEVICE, dtype))
    for a, b in zip(found_grads, expected_grads, strict=True):
        check_close(a, b, 2 * TOLERANCE[dtype])


# ---- models
def models(preset: str | None, dtype: torch.dtype, family: str = "gemma", stirred: bool = False, **text) -> tuple:
    """(a model in float64 on the CPU, the same in `dtype` on the GPU), both with LoRA and ready to train; `stirred`:
    with differential parameters away from their start, where some have no gradient."""
    made = []
    for kind, device in ((torch.double, "cpu"), (dtype, DEVICE)):
        model = tiny.ours_like(tiny.hf_model(family, amplify=1.0, **text))
        if preset:
            add_differential(model, preset)
        model = model.to(device, kind)
        adapted = training.new_lora(Config(), model.requires_grad_(False))
        unfreeze_differential(model.train())
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                noise = 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
                if "lora_" in name:  # the same values on both devices
                    p.copy_(noise)
                elif stirred and ".differential." in name and p.requires_grad:
                    p.add_(noise.to(p))
        if kind == torch.double:
            adapted.double()
        made.append(model)
    return tuple(made)


def loss_and_gradients(model, batch: dict, device: str) -> tuple[Tensor, dict[str, Tensor]]:
    dtype = model.lm_head.weight.dtype
    plan = model.model.plan(**batch).to(device)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    casts = fused_ops.cast_lora(fused_ops.lora_layers(model)) if dtype == torch.bfloat16 else contextlib.nullcontext()
    with casts, torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = model(**batch, plan=plan).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_preset_trains_as_in_float64(preset, dtype, taken):
    """Loss and gradients of a ragged batch, all together and each kind of differential parameter alone."""
    # in bfloat16, sums have many rounded terms, and the gradient of a small tensor is a difference of large numbers
    tolerance = 1e-3 if dtype == torch.float32 else 0.15
    exact, rounded = models(preset, dtype, stirred=True, num_key_value_heads=2)
    batch = tiny.batch(prefixes=(5, 2, 9), suffixes=(3, 4, 2), side="left")
    expected, expected_grads = loss_and_gradients(exact, batch, "cpu")
    found, grads = loss_and_gradients(rounded, batch, DEVICE)
    assert found.item() == pytest.approx(expected.item(), rel=tolerance / 5)
    assert grads.keys() == expected_grads.keys() and len(grads) > 20

    def flat(gradients: dict[str, Tensor], kind: str = "") -> Tensor:
        return torch.cat([g.flatten().double().cpu() for name, g in gradients.items() if name.endswith(kind)])

    check_close(flat(grads), flat(expected_grads), tolerance)
    for kind in {name.partition(".differential")[2] for name in grads} - {""}:
        is_tiny = flat(expected_grads, kind).norm() < 1e-3 * flat(expected_grads).norm()  # as of src_gemma_samemap
        if dtype == torch.float32 or not is_tiny:
            check_close(flat(grads, kind), flat(expected_grads, kind), 5 * tolerance if dtype == torch.float32 else 0.5)


def test_gemma_2_trains_as_in_float64(taken):
    exact, rounded = models("split", torch.float32, "gemma2")
    batch = tiny.batch(prefixes=(5, 2, 9), suffixes=(3, 4, 2), side="left")
    expected, expected_grads = loss_and_gradients(exact, batch, "cpu")
    found, grads = loss_and_gradients(rounded, batch, DEVICE)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    for name, gradient in grads.items():
        check_close(gradient, expected_grads[name], 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_arms_start_with_equal_bits(dtype, taken):
    batch = tiny.batch(prefixes=(5, 2, 9), suffixes=(3, 4, 2), side="left")
    losses = [loss_and_gradients(models(preset, dtype)[1], batch, DEVICE)[0] for preset in (None, "split")]
    assert torch.equal(*losses)


def test_lora_is_the_formula():
    """In bfloat16 with float32 factors, as in training."""
    torch.manual_seed(0)
    x, base, up = torch.randn(64, 48), torch.randn(80, 48), torch.randn(80, 8)
    down, direction = torch.randn(8, 48), torch.randn(64, 80)
    wide = [t.bfloat16().double() for t in (x, base)] + [t.double() for t in (down, up)]
    wide = [t.requires_grad_() for t in wide]
    expected = wide[0] @ wide[1].T + 0.5 * wide[0] @ wide[2].T @ wide[3].T
    leaves = [t.to(DEVICE).requires_grad_() for t in (x.bfloat16(), down, up)]
    weights = base.to(DEVICE, torch.bfloat16), leaves[1], leaves[2]
    (found,) = fused_ops.LowRankLinears.apply(leaves[0], [0.5], [None], *weights)
    check_close(found, expected, 2e-2)
    grads = torch.autograd.grad(expected, [wide[0], wide[2], wide[3]], direction.double())
    for a, b in zip(torch.autograd.grad(found, leaves, direction.to(found)), grads, strict=True):
        check_close(a, b, 2e-2)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tiled_loss_is_the_formula(dtype, softcap, monkeypatch):
    """With a vocabulary of several tiles."""
    monkeypatch.setattr(fused_ops, "GPU_TILE_LOGITS", 1 << 17)
    torch.manual_seed(0)
    hidden, weight = torch.randn(48, 64).to(dtype), torch.randn(100_000, 64).to(dtype)
    labels = torch.randint(0, 100_000, (48,))
    head = torch.nn.Linear(64, 100_000, bias=False, device="meta")
    head.weight = torch.nn.Parameter(weight.to(DEVICE), requires_grad=False)
    exact, leaf = hidden.double().requires_grad_(), hidden.to(DEVICE).requires_grad_()
    found = fused_ops.head_loss(leaf, head, labels.to(DEVICE), softcap)
    logits = apply_softcap(exact @ weight.double().T, softcap)
    expected = torch.nn.functional.cross_entropy(logits, labels)
    check_close(found, expected, TOLERANCE[dtype])
    found.backward(), expected.backward()
    check_close(leaf.grad, exact.grad, TOLERANCE[dtype])


# ---- syncs
@on_a_gpu
@pytest.mark.parametrize("preset", [None, "split"])
def test_a_forward_and_backward_pass_never_wait(preset):
    """torch raises if an operation would sync with the GPU."""
    _, model = models(preset, torch.bfloat16)
    batch = tiny.batch(prefixes=(5, 2, 9), suffixes=(3, 4, 2), side="left")
    plan = model.model.plan(**batch).to(DEVICE)
    on_gpu = {key: tensor.to(DEVICE) for key, tensor in batch.items()}
    for checked in (False, True):  # the first pass creates what is created only once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            with fused_ops.cast_lora(fused_ops.lora_layers(model)), torch.autocast(DEVICE, torch.bfloat16):
                model(**on_gpu, plan=plan).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- generation
@pytest.mark.parametrize("preset", [None, "split", "difflora", "v1_width"])
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_a_cuda_graph_decodes_the_tokens_of_the_cpu(family, preset, monkeypatch):
    """Ragged prompts, twice, in float32; the graph is recorded once per call."""
    captured = []
    real = modeling_vlm.StaticStepDecoder.capture
    monkeypatch.setattr(modeling_vlm.StaticStepDecoder, "capture", lambda self: captured.append(1) or real(self))
    model = tiny.ours_like(tiny.hf_model(family, amplify=1.0))
    if preset:
        add_differential(model, preset)
    model.config.eos_token_id = -1
    prompts = tiny.prompts(prefixes=(5, 2, 3))
    expected = model.generate(**prompts, max_new_tokens=8)
    model.to(DEVICE)
    prompts = {key: tensor.to(DEVICE) for key, tensor in prompts.items()}
    for _ in range(2):
        assert torch.equal(model.generate(**prompts, max_new_tokens=8).cpu(), expected)
    assert len(captured) == 2 * (DEVICE == "cuda")


def test_a_cuda_graph_decodes_with_an_adapter():
    exact, model = models("split", torch.float32)
    prompts = tiny.prompts(prefixes=(5, 2, 3))
    answers = []
    for side, device, dtype in ((exact, "cpu", torch.double), (model, DEVICE, torch.float32)):
        side.eval().config.eos_token_id = -1
        batch = {key: tensor.to(device) for key, tensor in prompts.items()}
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        answers.append(side.generate(**batch, max_new_tokens=8).cpu())
    assert torch.equal(*answers)


def test_a_kept_graph_answers_other_prompts_and_follows_the_adapter(monkeypatch):
    """One graph serves prompts of other lengths; the adapter changes between the calls."""
    captured = []
    real = modeling_vlm.StaticStepDecoder.capture
    monkeypatch.setattr(modeling_vlm.StaticStepDecoder, "capture", lambda self: captured.append(1) or real(self))
    if DEVICE == "cpu":
        monkeypatch.setattr(modeling_vlm, "choose_step_decoder", lambda _: modeling_vlm.StaticStepDecoder)
    _, model = models("split", torch.bfloat16)
    model.eval().config.eos_token_id = -1
    graphs = modeling_vlm.GraphCache()
    for prefixes, seed in (((5, 2, 3), 0), ((9, 4, 4), 1), ((5, 2, 3), 2)):
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + p.numel())))
        batch = {key: tensor.to(DEVICE) for key, tensor in tiny.prompts(prefixes=prefixes).items()}
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
        with torch.autocast(DEVICE, torch.bfloat16):
            fresh = model.generate(**batch, max_new_tokens=8)
            assert torch.equal(model.generate(**batch, max_new_tokens=8, graphs=graphs), fresh)
    assert len(captured) == (3 + 1) * (DEVICE == "cuda")


# ---- runs
@pytest.fixture
def config(tiny_model, tmp_path) -> Config:
    return tiny.quick(Config, tiny_model, tmp_path, max_steps=4, save_every=1)


@pytest.mark.parametrize("preset", [None, "split"])
def test_a_killed_run_continues(preset, config, tmp_path):
    """Losses are close to those of an uninterrupted run; sums on a GPU are not bit-equal."""
    arm, differential = ("diff", DifferentialConfig(preset).resolve()) if preset else ("original", None)
    finetune(config, arm, differential)
    resumed = replace(config, output_dir=str(tmp_path / "resumed"))
    crash(resumed, 2, arm, differential)
    finetune(resumed, arm, differential)
    assert [step for step, _ in logged(resumed)] == [1, 2, 3, 4]
    assert dict(logged(resumed)) == pytest.approx(dict(logged(config)), rel=2e-2)


def test_accumulation_and_checkpointing_keep_the_losses(config, tmp_path):
    finetune(config, "original")
    changes = dict(batch_size=2, accumulation=2, gradient_checkpointing=True, output_dir=str(tmp_path / "other"))
    finetune(replace(config, **changes), "original")
    assert dict(logged(replace(config, **changes))) == pytest.approx(dict(logged(config)), rel=2e-2)


@on_a_gpu
def test_a_run_in_4_bits_learns(config):
    pytest.importorskip("bitsandbytes")
    finetune(replace(config, dtype="nf4", max_steps=8), "original")
    losses = [loss for _, loss in logged(config)]
    assert losses[-1] < losses[0]


@on_a_gpu
def test_compiled_layers_keep_the_losses(config, tmp_path):
    """Inductor, ragged batches, both arms; the layers share their graphs."""
    for arm, differential in (("original", None), ("diff", DifferentialConfig("split").resolve())):
        plain = replace(config, output_dir=str(tmp_path / f"{arm}-plain"))
        compiled = replace(config, output_dir=str(tmp_path / f"{arm}-compiled"), compile=True)
        finetune(plain, arm, differential)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        finetune(compiled, arm, differential)
        assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
        assert not torch._dynamo.utils.counters["graph_break"]
        assert dict(logged(compiled)) == pytest.approx(dict(logged(plain)), rel=5e-2)


@on_a_gpu
def test_out_of_memory_is_one_line(config):
    """A real out-of-memory error: the process may allocate only 24 MB more."""
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 24e6
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(UserError, match="the GPU is out of memory: lower --(eval_)?batch_size"):
            finetune(replace(config, batch_size=512, eval_batch_size=1), "original")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("shard", [False, True])
def test_two_cards_train_as_one(shard, config, tmp_path):
    """NCCL, DDP, and FSDP2 for the frozen layers."""
    finetune(config, "original")
    both = replace(config, output_dir=str(tmp_path / "both"), shard=shard)
    process = start("-m", "torch.distributed.run", "--nproc-per-node=2", "finetune_original.py", *flags_of(both))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert dict(logged(both)) == pytest.approx(dict(logged(config)), rel=2e-2)
    expected = saved_lora(config)
    for name, tensor in saved_lora(both).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=0.1)


@on_a_gpu
def test_a_folder_loads_onto_the_card(tiny_model):
    ids = torch.randint(5, 90, (2, 6))
    logits = {}
    for device in ("cpu", DEVICE):
        model = PaliGemmaForConditionalGeneration.from_pretrained(Path(tiny_model), device=device)
        logits[device] = model(ids.to(device), None).logits
        assert logits[device].device.type == device
    check_close(logits[DEVICE], logits["cpu"].detach().double(), 1e-4)
