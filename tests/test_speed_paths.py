"""Optimised arithmetic: LoRA for several layers at once, the tiled head, last rows only."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import fused_ops
from attention_formula import apply_softcap
from fused_ops import LowRankLinears, TiledHeadLoss, apply_linears, head_loss, is_plain_lora

ROOT = Path(__file__).resolve().parent.parent


# ---- LoRA
def adapted(dtype=torch.float64, **changes):
    """Three linear layers with the same input under peft, with random factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(6, width, bias=False) for name, width in dict(a=5, b=7, c=4).items()})
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["a", "b", "c"], **changes)
    wrapped = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    modules = list(wrapped.base_model.model.values())
    return wrapped, modules


def test_lora_equals_peft_in_float64():
    wrapped, modules = adapted()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    assert all(is_plain_lora(module, x) for module in modules) and len(parameters) == 6
    expected, found = tuple(module(x) for module in modules), apply_linears(x, *modules)
    weights = [torch.randn_like(out) for out in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(outs, (x, *parameters), weights) for outs in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_low_rank_gradients():
    shapes = [(4, 6), (5, 6), (2, 6), (3, 6), (4, 2), (5, 3)]
    torch.manual_seed(0)
    x, *weights = (torch.randn(s, dtype=torch.float64) for s in [(2, 3, 6), *shapes])
    for tensor in (x, *weights[2:]):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *t: LowRankLinears.apply(t[0], [0.5, 2.0], [None, None], *t[1:]), (x, *weights)
    )


@pytest.mark.parametrize(
    "change",
    [
        "dropout", "bias", "dora", "merged", "disabled", "hook", "trainable base", "two adapters", "plain", "autocast",
    ],
)  # fmt: skip
def test_whatever_is_not_plain_is_left_to_peft(change, monkeypatch):
    from peft import LoraConfig

    options = {"dropout": dict(lora_dropout=0.5), "bias": dict(lora_bias=True), "dora": dict(use_dora=True)}
    dtype = torch.float32 if change == "autocast" else torch.float64  # which autocast leaves alone
    wrapped, modules = adapted(dtype, **options.get(change, {}))
    wrapped.train()
    if change == "merged":
        wrapped.merge_adapter()
    elif change == "disabled":
        wrapped.base_model.disable_adapter_layers()
    elif change == "hook":
        modules[1].register_forward_hook(lambda module, args, out: out + 1)
    elif change == "trainable base":
        modules[0].base_layer.weight.requires_grad_(True)
    elif change == "two adapters":
        wrapped.add_adapter("other", LoraConfig(r=3, target_modules=["a", "b", "c"]))
        wrapped.base_model.set_adapter(["default", "other"])
    elif change == "plain":
        modules = [module.base_layer for module in modules]
    monkeypatch.setattr(fused_ops.LowRankLinears, "apply", None)
    x = torch.randn(3, 6, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        torch.manual_seed(1)
        found = apply_linears(x, *modules)
        torch.manual_seed(1)  # dropout
        for a, b in zip(found, (module(x) for module in modules), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_float32_masters_on_a_bfloat16_base():
    """As close to exact arithmetic as peft's own float32 adapters, up to the rounding of the output."""
    wrapped, modules = adapted(torch.bfloat16)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
    x = torch.randn(64, 6).bfloat16().requires_grad_()
    outs = apply_linears(x, *modules)
    assert all(out.dtype == torch.bfloat16 for out in outs)
    sum(out.float().square().sum() for out in outs).backward()
    assert x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in wrapped.parameters() if p.requires_grad)
    for module, out in zip(modules, outs, strict=True):
        exact = module.double()(x.double())
        assert (out.double() - exact).norm() < 0.01 * exact.norm()


# ---- the head
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tile", [5, 16, 100])  # one that does not divide the vocabulary, and one beyond it
def test_the_tiled_loss_is_the_formula_in_float64(tile, softcap, monkeypatch):
    monkeypatch.setattr(fused_ops, "TILE", tile)
    torch.manual_seed(0)
    hidden = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    weight, labels = 3 * torch.randn(32, 6, dtype=torch.float64), torch.tensor([0, 31, 4, 5, 15, 16, 4])
    expected = nn.functional.cross_entropy(apply_softcap(hidden @ weight.T, softcap), labels)
    found = TiledHeadLoss.apply(hidden, weight, labels, softcap)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(2 * value, hidden)[0] for value in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda h: TiledHeadLoss.apply(h, weight, labels, softcap), hidden)
    with torch.no_grad():
        torch.testing.assert_close(TiledHeadLoss.apply(hidden, weight, labels, softcap), expected)


def test_large_logits_do_not_overflow():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight, labels = torch.arange(-5.0, 5.0)[:, None], torch.tensor([9, 0])
    value = TiledHeadLoss.apply(hidden, weight, labels, None)
    value.backward()
    assert value == 0 and hidden.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_takes_the_tiled_loss_where_its_head_is_frozen(dtype, monkeypatch):
    """Frozen head: tiled, with the plain path's loss and gradients; a head that trains keeps its gradient."""
    model = tiny.ours_like(tiny.hf_model("gemma2")).to(dtype)
    batch = tiny.batch()
    tiled = []
    real = TiledHeadLoss.apply
    monkeypatch.setattr(fused_ops.TiledHeadLoss, "apply", lambda *args: tiled.append(1) or real(*args))
    results = []
    for small in (1 << 22, 0):
        monkeypatch.setattr(fused_ops, "PLAIN_LOSS_MAX_LOGITS", small)
        model.zero_grad()
        model.lm_head.weight.requires_grad_(True)
        model(**batch).loss.backward()
        assert not tiled and model.lm_head.weight.grad is not None
        model.zero_grad()
        model.lm_head.weight.requires_grad_(False)
        value = model(**batch).loss
        value.backward()
        results.append((value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert tiled == [1]
    tolerance = dict(atol=1e-5, rtol=1e-4) if dtype == torch.float32 else dict(atol=0.05, rtol=0.05)
    torch.testing.assert_close(results[0][0], results[1][0], **tolerance)
    for name, grad in results[0][1].items():
        gap = (grad.float() - results[1][1][name].float()).norm()
        assert gap <= (1e-4 if dtype == torch.float32 else 0.1) * grad.float().norm() + 1e-5, name


def test_no_labels_give_nan_like_cross_entropy():
    head = nn.Linear(4, 9, bias=False).requires_grad_(False)
    empty = torch.zeros(0, dtype=torch.long)
    assert head_loss(torch.zeros(0, 4), head, empty, None).isnan()


# ---- the last layer
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_layer_computes_only_the_needed_rows(family, side, monkeypatch):
    model = tiny.ours_like(tiny.hf_model(family))
    batch = tiny.batch(side=side)
    seen = []
    model.model.language_model.layers[-1].mlp.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    few, length = model(**batch).loss, batch["input_ids"].shape[1]
    every = model(**batch, logits_to_keep=length)
    first = int((batch["labels"] != -100).any(0).int().argmax())
    assert seen == [length - first + 1, length]
    torch.testing.assert_close(few, every.loss)
    some = {key: batch[key] for key in ("input_ids", "pixel_values", "attention_mask", "token_type_ids")}
    torch.testing.assert_close(model(**some, logits_to_keep=2).logits, every.logits[:, -2:])
    assert seen[2:] == [2]


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_are_called_on_every_fast_path(hook, monkeypatch):
    """Fused LoRA and the tiled head loss."""
    calls = []
    _, modules = adapted()
    for module in modules:
        getattr(module.base_layer, f"register_{hook}")(lambda *args: calls.append("lora"))
    sum(
        out.sum() for out in apply_linears(torch.randn(2, 6, dtype=torch.float64, requires_grad=True), *modules)
    ).backward()
    assert calls == ["lora"] * 3
    monkeypatch.setattr(fused_ops, "PLAIN_LOSS_MAX_LOGITS", 0)
    head = nn.Linear(6, 9, bias=False).requires_grad_(False)
    getattr(head, f"register_{hook}")(lambda *args: calls.append("head"))
    head_loss(torch.randn(3, 6, requires_grad=True), head, torch.tensor([1, 2, 3]), None).backward()
    assert calls[3:] == ["head"]


def test_loading_imports_neither_transformers_nor_the_compiler(tiny_model):
    code = f"import sys, modeling_gemma as m; m.PaliGemmaForConditionalGeneration.from_pretrained({str(tiny_model)!r})"
    code += "; print([name for name in ('transformers', 'peft', 'torch._dynamo') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_tests_that_fused_ops_names_exist():
    named = re.findall(r"tests/(test_\w+)\.py,\s+(test_\w+)", (ROOT / "fused_ops.py").read_text())
    assert len(named) == 5
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / f"{module}.py").read_text()
