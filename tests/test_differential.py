"""The preset table and its claims, the methods' formulas, and the defects of arXiv 2507.15875's code: each is absent
here or, if it is part of the method, present only in the `src_` preset that reproduces it."""

import functools
import itertools
import math
from typing import get_args

import pytest
import tiny
import torch
from torch import nn

import differential_attention as da
from attention import Attend, PrefixMask, apply_rotary, apply_rotary_to_halves, attention
from attention_formula import blended_reference
from diagnostics import compute_layer_maps, lambda_values
from differential_attention import PRESETS, DifferentialConfig, add_differential, set_progress
from errors import UserError
from modeling_gemma import (
    GemmaAttention,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    rotary_tables,
)

SOURCES = [name for name in PRESETS if name.startswith("src_")]


@functools.cache
def source(family: str, amplify: float = 6.0):
    return tiny.hf_model(family, amplify=amplify)


def family_of(preset: str | None) -> str:
    return "gemma2" if preset == "v1" else "gemma"  # v1 needs paired key/value heads


def build(preset: str | None = None, family: str | None = None, amplify: float = 6.0, **changes):
    """A tiny model with the weights of `source`, and differential attention of the preset if one is given."""
    model = tiny.ours_like(source(family or family_of(preset), amplify))
    if preset is not None:
        add_differential(model, DifferentialConfig(preset, **changes))
    return model


def stir(model, scale=0.3, seed=0):
    """Move every differential parameter away from its start, so that both maps and lambda differ everywhere."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in da.differential_parameters(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    set_progress(model, 0.7)
    return model


def logits(model, batch):
    with torch.no_grad():
        return model(**batch, logits_to_keep=batch["input_ids"].shape[1]).logits


# every preset in every tower that it fits: the tiny vision tower has three heads, each with its own keys
CASES = [(p, t) for p in PRESETS for t in ("text", "vision") if t == "text" or p not in ("v1", "grouped")]


# ---- the table's claims
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("preset", "tower"), CASES)
def test_step_0_is_exact_or_not_as_claimed(preset, tower, side):
    """Bit-equal in float32; includes defect b, a norm that destroys the pretrained function."""
    batch = tiny.batch(side=side)
    standard = logits(build(family=family_of(preset)), batch)
    found = logits(build(preset, towers=(tower,)), batch)
    if PRESETS[preset].exact:
        assert torch.equal(found, standard)
    else:
        assert (found - standard).abs().max() > 0.1


@pytest.mark.parametrize("preset", [name for name in PRESETS if PRESETS[name].exact])
def test_exact_presets_are_exact_in_gemma_2_in_bfloat16_and_in_float64(preset):
    batch = tiny.batch()
    for dtype in (torch.float64, torch.bfloat16):
        standard, model = (build(name, "gemma2").to(dtype) for name in (None, preset))
        assert torch.equal(logits(model, batch), logits(standard, batch))


@pytest.mark.parametrize(("preset", "tower"), CASES)
def test_first_gradients_are_the_claimed_ones(preset, tower):
    model = build(preset, towers=(tower,)).double()
    model.requires_grad_(False)
    trained = da.unfreeze_differential(model)
    parameters = da.differential_parameters(model)
    declared = da.trainable_names(DifferentialConfig(preset).resolve())
    assert {name for name in parameters if name.rpartition(".")[2] in declared} == set(trained)
    assert {name.rpartition(".")[2] for name in parameters} >= declared >= set(PRESETS[preset].gradient)
    assert (not trained) == (preset == "lambda_zero")
    if not trained:
        return
    model(**tiny.batch()).loss.backward()
    for name, parameter in parameters.items():
        if name in trained:
            claimed = name.rpartition(".")[2] in PRESETS[preset].gradient
            assert (parameter.grad.abs().max() > 1e-12) == claimed, name


def gradients(model):
    """Largest gradient of each kind of differential parameter."""
    model.requires_grad_(False)
    for parameter in da.differential_parameters(model).values():
        parameter.requires_grad_(True)
    model(**tiny.batch()).loss.backward()
    found = {}
    for name, parameter in da.differential_parameters(model).items():
        kind = name.rpartition(".")[2]
        found[kind] = max(found.get(kind, 0.0), parameter.grad.abs().max().item())
    return found


def zeroed(model, *kinds):
    with torch.no_grad():
        for name, parameter in da.differential_parameters(model).items():
            if name.rpartition(".")[2] in kinds:
                parameter.zero_()
    return model


def test_other_starting_points_behave_as_known():
    """Known starting points of conversions that no preset uses."""
    standard = logits(build().double(), tiny.batch())
    # W_D zero, lambda zero: exact and dead; W_D random, no annealing: exact, lambda learns first
    model = zeroed(build("dex", anneal=False).double(), "value_map")
    assert torch.equal(logits(model, tiny.batch()), standard)
    assert gradients(model) == {"value_map": 0, "lambda_learn": 0}
    model = build("dex", anneal=False).double()
    assert torch.equal(logits(model, tiny.batch()), standard)
    found = gradients(model)
    assert found["value_map"] == 0 < found["lambda_learn"]
    # annealing starts a zero W_D
    model = zeroed(build("dex").double(), "value_map")
    set_progress(model, 0.1)
    assert torch.equal(logits(model, tiny.batch()), standard)
    found = gradients(model)
    assert found["lambda_learn"] == 0 < found["value_map"]
    # vectors with q zero, k random, lambda_init zero: exact; q learns
    vectors = dict(lambda_kind="vectors", lambda_init=0.0)
    model = zeroed(build("grouped", **vectors).double(), "lambda_q1", "lambda_q2")
    assert torch.equal(logits(model, tiny.batch()), standard)
    found = gradients(model)
    assert found["lambda_q1"] > 0 < found["lambda_q2"]
    assert found["lambda_k1"] == found["lambda_k2"] == found["second_query"] == 0
    # adapter with both up factors zero: not exact, lambda alone learns; with all vectors zero as well: a dead point
    model = zeroed(build("difflora").double(), "second_up", "key_up")
    assert not torch.equal(logits(model, tiny.batch()), standard)
    found = gradients(model)
    assert found.pop("lambda_learn") > 0 and not any(found.values())
    model = zeroed(build("difflora", **vectors).double(), "second_up", "key_up", *da.LAMBDA_VECTORS)
    assert torch.equal(logits(model, tiny.batch()), standard)
    assert not any(gradients(model).values())


def test_the_first_gradient_of_the_delta_is_proportional_to_gamma():
    found = {}
    for start in (0.2, 1 / 3, 0.5, 2 / 3, 0.8):
        model = build("split", lambda_start=start).double()
        gradients(model)
        name, parameter = next(item for item in da.differential_parameters(model).items() if "second_up" in item[0])
        found[start] = parameter.grad
    for start, gamma in ((0.2, 0.25), (1 / 3, 0.5), (2 / 3, 2.0), (0.8, 4.0)):  # and gamma 1 at 1/2
        torch.testing.assert_close(found[start], gamma * found[0.5], rtol=1e-5, atol=1e-9)


COUNTS = {  # extra parameters of PaliGemma 3b: decoder, vision tower
    "split": (1_179_648 + 18, 995_328 + 27),
    "v1_width": (18 * (4 * 128 + 256), 27 * (4 * 36 + 72)),
    "v2": (75_497_472 + 294_912, 35_831_808 + 497_664),
    "difflora": (18 * (32 * (3 * 2048 + 256) + 1), 27 * (32 * 4 * 1152 + 1)),
    "dex": (1_179_648 + 18, 139_968 + 27),
    "grouped": (18 * (2 * 256 * 2048 + 1), None),
    "src_siglip_split": (None, 27 * (4 * 36 + 72)),
    "src_gemma_split": (18 * (4 * 128 + 256), None),
    "src_gemma_samemap": (18 * (4 * 256 + 256), None),
    "additive": (1_179_648, 995_328),
    "sharpen": (18 * 8, 27 * 16),
    "gate": (18 * 8 * 2048, 27 * 16 * 1152),
    "norm_only": (18 * 256, 27 * 72),
    "lambda_zero": (1_179_648, 995_328),
    "flipped": (1_179_648 + 18, 995_328 + 27),
    "lambda_fixed": (1_179_648, 995_328),
}


def test_parameter_counts_at_real_size():
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig())
        paired = PaliGemmaForConditionalGeneration(
            PaliGemmaConfig(GemmaConfig.from_dict({"model_type": "gemma2", "vocab_size": 257216}))
        )

    def count(model, preset, tower):
        for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
            layer.self_attn.differential = None
        add_differential(model, DifferentialConfig(preset, towers=(tower,)))
        return sum(parameter.numel() for parameter in da.differential_parameters(model).values())

    for preset, expected in COUNTS.items():
        for tower, wanted in zip(("text", "vision"), expected, strict=True):
            assert wanted is None or count(model, preset, tower) == wanted, (preset, tower)
    assert count(paired, "v1", "text") == 26 * (4 * 256 + 512)
    assert count(paired, "v1", "vision") == 27 * (4 * 72 + 144)
    assert set(COUNTS) | {"v1"} == set(PRESETS)


def test_every_row_says_what_it_does():
    for name, preset in PRESETS.items():
        line = preset.describe()
        assert "\n" not in line and preset.formula in line and preset.cost in line and preset.source in line
        assert ("exact at step 0" in line) == preset.exact, name
        assert DifferentialConfig(name).resolve().resolve() == DifferentialConfig(name).resolve()


# ---- formulas, in float64
def module_for(attend, depth=2, **choices):
    config = DifferentialConfig(**choices).resolve()
    return da.make_differential(config, attend.shape, "text", depth, attend.q_proj)


def gamma_of(module):
    lambda_ = module.current_lambda(None)
    return lambda_ / (1 - lambda_)


def layer(preset, heads=4, kv_heads=2, width=8, hidden=24, depth=2, **changes):
    """One Gemma attention layer with differential attention, float64, every parameter stirred; its inputs."""
    torch.manual_seed(1)
    config = GemmaConfig(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, num_hidden_layers=3
    )
    attend = GemmaAttention(config, depth).double()
    for parameter in attend.parameters():
        nn.init.normal_(parameter, std=0.4)
    if preset is not None:
        attend.differential = module_for(attend, depth, preset=preset, **changes)
        attend.differential.double()
        with torch.no_grad():
            for parameter in attend.differential.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 6, hidden, dtype=torch.double)
    ones = torch.ones(2, 6, dtype=torch.long)
    mask = PrefixMask.from_tensors(ones, ones)  # no prefix: causal
    rotary = rotary_tables(config, torch.arange(1, 7).expand(2, 6), torch.double)
    return attend, x, rotary, mask


def projected(attend, x, rotary):
    q, k, v = (
        proj(x).unflatten(-1, (-1, attend.shape.head_dim)).transpose(1, 2)
        for proj in (attend.q_proj, attend.k_proj, attend.v_proj)
    )
    return (q, k, v) if rotary is None else (apply_rotary(q, *rotary), apply_rotary(k, *rotary), v)


def causal(queries=6):
    return torch.ones(queries, queries, dtype=torch.bool).tril()[None, None]


def rms_norm(t, gain):
    return t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def test_v1_by_groups_is_its_formula():
    attend, x, rotary, mask = layer("v1", heads=8, kv_heads=4)
    d = attend.differential
    q, k, v = projected(attend, x, rotary)
    init = 0.8 - 0.6 * math.exp(-0.6)
    lam = (d.lambda_q1 @ d.lambda_k1).exp() - (d.lambda_q2 @ d.lambda_k2).exp() + init
    heads = [None] * 8
    for first in (0, 2):  # key/value heads `first` and `first` + 1, query heads 2 first + g and 2 (first + 1) + g
        wide = torch.cat((v[:, first], v[:, first + 1]), dim=-1)
        for g in (0, 1):
            places = 2 * first + g, 2 * (first + 1) + g
            maps = [
                (q[:, place] @ k[:, place // 2].mT / math.sqrt(8)).masked_fill(~causal()[0], -torch.inf).softmax(-1)
                for place in places
            ]
            out = (1 - init) * rms_norm((maps[0] - lam * maps[1]) @ wide, d.norm_gain)
            heads[places[0]], heads[places[1]] = out.chunk(2, dim=-1)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(torch.cat(heads, -1)))


@pytest.mark.parametrize(("pairing", "kept"), [("groups", 8), ("adjacent", 4)])
def test_v1_by_groups_keeps_every_pretrained_map_and_adjacent_pairs_half_of_them(pairing, kept):
    attend, x, rotary, mask = layer("v1", heads=8, kv_heads=4, pairing=pairing)
    q, k, v, turn, host = attend.attention_inputs(x, rotary, mask, None, None)
    pretrained = host.maps(q, k)
    maps = compute_layer_maps(attend.differential, x, q, k, v, turn, host)
    found = torch.cat((maps.map1, maps.map2), dim=1)
    is_kept = [any(torch.allclose(found[:, i], pretrained[:, h]) for i in range(8)) for h in range(8)]
    assert sum(is_kept) == kept
    plain, *_ = layer("v1", heads=8, kv_heads=4, pairing=pairing, lambda_kind="fixed", lambda_start=0.0, norm="none")
    own = host(q, k, v)  # with lambda 0 the first head of each pair is the pretrained head, in its own place
    out = plain.differential(x, q, k, v, turn, host)
    out = out if pairing == "groups" else out.unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2)
    assert sum(torch.allclose(out[:, h], own[:, h]) for h in range(8)) == (4 if pairing == "groups" else 2)


def test_v1_by_adjacent_heads_is_its_formula():
    attend, x, rotary, mask = layer("v1", heads=8, kv_heads=4, pairing="adjacent")
    d = attend.differential
    q, k, v = projected(attend, x, rotary)
    lam = (d.lambda_q1 @ d.lambda_k1).exp() - (d.lambda_q2 @ d.lambda_k2).exp() + (0.8 - 0.6 * math.exp(-0.6))
    heads = []
    for i in range(4):  # query heads 2i and 2i + 1, key/value heads 2j and 2j + 1
        j = i // 2
        wide = torch.cat((v[:, 2 * j], v[:, 2 * j + 1]), dim=-1)
        maps = [
            (q[:, 2 * i + b] @ k[:, 2 * j + b].mT / math.sqrt(8))
            .masked_fill(~causal()[0], -torch.inf)
            .softmax(-1)
            for b in (0, 1)
        ]  # fmt: skip
        head = (maps[0] - lam * maps[1]) @ wide
        heads.append((1 - (0.8 - 0.6 * math.exp(-0.6))) * rms_norm(head, d.norm_gain))
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(torch.cat(heads, -1)))


def test_v1_equals_diffllama_after_the_permutation_of_heads():
    """DiffLlama pairs head i with i + H / 2, V1 2i with 2i + 1; its norm has no gain."""
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention

    attend, x, rotary, mask = layer("v1", heads=8, kv_heads=4, pairing="adjacent")
    config = DiffLlamaConfig(
        hidden_size=24, num_attention_heads=8, num_key_value_heads=4, head_dim=8, rms_norm_eps=1e-5
    )
    config._attn_implementation = "eager"
    theirs = DiffLlamaAttention(config, layer_idx=2).double()
    with torch.no_grad():
        attend.differential.norm_gain.fill_(1)
        theirs.o_proj.weight.copy_(attend.o_proj.weight)
        for name in da.LAMBDA_VECTORS:
            getattr(theirs, name).copy_(getattr(attend.differential, name))
        for name, heads in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4)):
            order = torch.arange(heads).view(-1, 2).T.flatten()  # theirs h = ours order[h]
            ours = getattr(attend, name).weight.view(heads, 8, 24)
            getattr(theirs, name).weight.copy_(ours[order].flatten(0, 1))
    dense = torch.zeros(6, 6, dtype=torch.double).masked_fill(~causal()[0, 0], -torch.inf)[None, None]
    expected, _ = theirs(x, tuple(t[:, 0] for t in rotary), dense)
    # their lambda is rounded to float32
    torch.testing.assert_close(attend(x, rotary, mask, None), expected, atol=1e-6, rtol=1e-6)


def test_v2_is_its_formula():
    attend, x, rotary, mask = layer("v2")
    d = attend.differential
    q, k, v = projected(attend, x, rotary)
    second = apply_rotary((x @ d.second_query.T).unflatten(-1, (-1, 8)).transpose(1, 2), *rotary)
    interleaved = torch.stack((q, second), dim=2).flatten(1, 2)  # as its code has them: 0::2 and 1::2
    both = attention(interleaved, k, v, mask, 8**-0.5)
    out = both[:, 0::2] - torch.sigmoid(x @ d.lambda_token.T).mT[..., None] * both[:, 1::2]
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))


def test_v2_halves_the_output_at_first():
    standard, x, rotary, mask = layer(None)
    attend, *_ = layer(None)
    attend.differential = module_for(attend, preset="v2").double()
    half = 0.5 * standard(x, rotary, mask, None)  # the copied query is float32
    torch.testing.assert_close(attend(x, rotary, mask, None), half, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("preset", "lambda_"), [("split", 0.3), ("flipped", -0.3), ("lambda_fixed", 0.1), ("lambda_zero", 0.0)]
)
def test_split_and_its_controls_are_their_formula(preset, lambda_):
    """The delta is added before rotation; gamma = exp(logit) is lambda / (1 - lambda)."""
    attend, x, rotary, mask = layer(preset)
    d = attend.differential
    if preset in ("split", "flipped"):
        with torch.no_grad():
            d.lambda_logit.fill_(math.log(0.3 / 0.7))
    delta = (x @ d.second_down.T @ d.second_up.T).unflatten(-1, (-1, 8)).transpose(1, 2)
    q, k, v = projected(attend, x, None)
    q1, q2, k = apply_rotary(q, *rotary), apply_rotary(q + delta, *rotary), apply_rotary(k, *rotary)
    out = blended_reference(q1, q2, k, k, v, causal(), 8**-0.5, lambda_, normalised=True)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))
    if preset == "split":
        torch.testing.assert_close(gamma_of(d), d.lambda_logit.exp())


def test_additive_is_attention_with_the_delta_on_its_one_query():
    attend, x, rotary, mask = layer("additive")
    d = attend.differential
    q, k, v = projected(attend, x, None)
    q = q + (x @ d.second_down.T @ d.second_up.T).unflatten(-1, (-1, 8)).transpose(1, 2)
    out = attention(apply_rotary(q, *rotary), apply_rotary(k, *rotary), v, mask, 8**-0.5)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))


def test_sharpen_and_gate_are_their_formulas():
    attend, x, rotary, mask = layer("sharpen")
    q, k, v = projected(attend, x, rotary)
    sharpness = attend.differential.log_sharpness.exp()
    assert (sharpness - 1).abs().min() > 1e-3  # of every head
    out = attention(q * sharpness[:, None, None], k, v, mask, 8**-0.5)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))

    attend, x, rotary, mask = layer("gate")
    out = attention(*projected(attend, x, rotary), mask, 8**-0.5)
    gate = 2 * torch.sigmoid(x @ attend.differential.gate.T)  # [B, L, H]
    out = out.transpose(1, 2) * gate[..., None]
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.flatten(2)))


@pytest.mark.parametrize("preset", PRESETS)
def test_knock_out_is_lambda_zero(preset):
    """`split` and its relatives lose their second map; v2 and v1 keep their first map."""
    batch, model = tiny.batch(), stir(build(preset))
    config = DifferentialConfig(preset).resolve()
    if config.combine == "replace" or config.second == "none":
        with pytest.raises(UserError, match=f"--knockout: preset {preset} has no lambda"):
            da.knock_out(model)
        return
    trained = logits(model, batch)
    da.knock_out(model)
    assert all(
        module.current_lambda(torch.zeros(1)).abs().max() == 0 for module in da.differential_modules(model).values()
    )
    found = logits(model, batch)
    if preset not in ("lambda_zero", "src_gemma_samemap"):
        assert (found - trained).abs().max() > 1e-3
    if config.norm == "none":
        torch.testing.assert_close(found, logits(build(family=family_of(preset)), batch))


def test_knock_out_of_standard_attention_is_refused():
    with pytest.raises(UserError, match="--knockout: the model has standard attention"):
        da.knock_out(build())


def test_difflora_dex_and_grouped_are_their_formulas():
    def heads(t):
        return t.unflatten(-1, (-1, 8)).transpose(1, 2)

    attend, x, rotary, mask = layer("difflora", rank=3)
    d, (q, k, v) = attend.differential, projected(attend, x, rotary)
    q2 = apply_rotary(heads(2 * x @ d.second_down.T @ d.second_up.T), *rotary)
    k2 = apply_rotary(heads(2 * x @ d.key_down.T @ d.key_up.T), *rotary)
    out = blended_reference(q, q2, k, k2, v, causal(), 8**-0.5, d.lambda_learn, normalised=False)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))

    attend, x, rotary, mask = layer("dex")
    d, (q, k, v) = attend.differential, projected(attend, x, rotary)
    d.selected.copy_(torch.tensor([1, 0, 1, 0]))
    d.progress.fill_(0.25)
    out = attention(q, k, v, mask, 8**-0.5)
    lambda_ = 0.1875 * (0.8 - 0.6 * math.exp(-0.6)) + 0.25 * d.lambda_learn
    out = out - lambda_ * (out @ d.value_map.T) * torch.tensor([1, 0, 1, 0]).view(4, 1, 1)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))

    attend, x, rotary, mask = layer("grouped", heads=8, noise_ratio=2)
    d, (q, k, v) = attend.differential, projected(attend, x, rotary)
    noise = apply_rotary(heads(x @ d.second_query.T), *rotary)  # four queries for eight heads, two key/value groups
    out = attention(q, k, v, mask, 8**-0.5)
    out = out - d.lambda_learn * attention(noise, k, v, mask, 8**-0.5).repeat_interleave(2, dim=1)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("cut", ["even_odd", "contiguous"])
def test_v1_width_is_its_formula(cut):
    attend, x, rotary, mask = layer("v1_width", width=16, halves_cut=cut)
    d, (q, k, v) = attend.differential, projected(attend, x, rotary)
    first = [0, 2, 4, 6, 8, 10, 12, 14] if cut == "even_odd" else [0, 1, 2, 3, 8, 9, 10, 11]
    second = [i for i in range(16) if i not in first]
    lam = (d.lambda_q1 @ d.lambda_k1).exp() - (d.lambda_q2 @ d.lambda_k2).exp() + (0.8 - 0.6 * math.exp(-0.6))
    out = blended_reference(
        q[..., first], q[..., second], k[..., first], k[..., second], v, causal(), 8**-0.5, lam, normalised=False
    )
    out = (1 - (0.8 - 0.6 * math.exp(-0.6))) * rms_norm(out, d.norm_gain)
    torch.testing.assert_close(attend(x, rotary, mask, None), attend.o_proj(out.transpose(1, 2).flatten(2)))


def test_src_siglip_split_is_its_formula():
    model = stir(build("src_siglip_split")).double()
    encoder = model.model.vision_tower.encoder.layers[1]
    attend, x = encoder.self_attn, torch.randn(2, 4, 36, dtype=torch.double)
    d, (q, k, v) = attend.differential, projected(attend, x, None)
    lam = (d.lambda_q1 @ d.lambda_k1).exp() - (d.lambda_q2 @ d.lambda_k2).exp() + 0.2  # layer 1, counted from -1
    out = blended_reference(q[..., :6], q[..., 6:], k[..., :6], k[..., 6:], v, None, 12**-0.5, lam, normalised=False)
    out = (1 - 0.2) * rms_norm(out, d.norm_gain)
    torch.testing.assert_close(attend(x), attend.out_proj(out.transpose(1, 2).flatten(2)))
    torch.testing.assert_close(encoder.layer_norm1(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())


def test_every_allowed_combination_of_the_four_choices_computes():
    allowed = 0
    for second, kind, combine, norm in itertools.product(*map(get_args, (da.Second, da.Lambda, da.Combine, da.Norm))):
        try:
            ratio = {"noise_ratio": 2} if second == "noise" else {}
            attend, x, rotary, mask = layer(
                "split", second=second, lambda_kind=kind, combine=combine, norm=norm, **ratio
            )
        except UserError:
            continue
        allowed += 1
        out = attend(x, rotary, mask, None)
        out.sum().backward()
        trained = {name for name, p in attend.differential.named_parameters() if p.requires_grad}
        assert trained == da.trainable_names(attend.differential.config)
        assert out.shape == x.shape and all(attend.differential.get_parameter(n).grad.isfinite().all() for n in trained)
        for name in trained:
            learns = attend.differential.get_parameter(name).grad.abs().max() > 0
            assert learns, (second, kind, combine, norm, name)
    assert allowed == 7 * 4 * 2 * 2 + 2 * 4 * 2 + 2 * 2 + 4 * 2  # two maps; same, value; none; replace


# ---- lambda
WITHOUT_EFFECT = {
    "v2": dict(lambda_start=0.1),
    "v1": dict(rank=4),
    "split": dict(pairing="adjacent"),
    "grouped": dict(halves_cut="front_back"),
    "v1_width": dict(noise_ratio=2),
    "lambda_fixed": dict(lambda_lr=3.0),
    "additive": dict(lambda_init=0.5),
    "difflora": dict(depth_offset=-1),
    "dex": dict(fresh_layer_norms=True),
    "sharpen": dict(adapter_scale=4.0),
}


@pytest.mark.parametrize("preset", WITHOUT_EFFECT)
def test_a_field_that_a_preset_does_not_read_is_refused(preset):
    (name, value), *_ = WITHOUT_EFFECT[preset].items()
    with pytest.raises(UserError, match=rf"differential\.{name}={value} has no effect in preset {preset}"):
        DifferentialConfig(preset, **WITHOUT_EFFECT[preset]).resolve()
    stored = DifferentialConfig.from_dict(DifferentialConfig(preset).resolve().to_dict())  # names every field
    assert stored.resolve() == DifferentialConfig(preset).resolve()


def test_the_order_of_layers_and_towers_does_not_matter():
    towers, layers = ("text", "vision"), (0, 2)
    expected = DifferentialConfig(towers=towers, layers=layers).resolve()
    assert DifferentialConfig(towers=("vision", "text", "text"), layers=[2, 0, 2]).resolve() == expected
    assert expected.towers == towers and expected.layers == layers


def test_another_preset_restores_the_layer_norms_that_src_siglip_split_replaced():
    expected = logits(build(family="gemma"), tiny.batch())
    model = build("src_siglip_split", family="gemma")
    assert not torch.equal(logits(model, tiny.batch()), expected)
    add_differential(model, DifferentialConfig(towers=("vision",)))
    assert torch.equal(logits(model, tiny.batch()), expected)


def test_lambda_of_a_token_is_float32_in_a_bfloat16_model():
    module = next(iter(da.differential_modules(stir(build("v2"))).values()))
    x = torch.randn(1, 3, module.shape.hidden_size, dtype=torch.bfloat16)
    found = module.current_lambda(x)
    weight = module.lambda_token.to(torch.bfloat16)
    expected = nn.functional.linear(x, weight).double().sigmoid().transpose(1, 2)[..., None]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_the_schedule_counts_layers_from_0():
    """Defect f, only in the source presets: a schedule that is one layer early."""
    known = {0: 0.2000, 1: 0.3555, 2: 0.4707, 10: 0.7701, 17: 0.7963, 26: 0.7998}
    for index, value in known.items():
        assert abs(da.lambda_init_of(index) - value) < 5e-5
    model = build("v1_width")
    assert [round(m.lambda_init, 4) for m in da.differential_modules(model).values()] == [0.2, 0.3555, 0.4707]
    for preset in SOURCES:
        found = [round(m.lambda_init, 4) for m in da.differential_modules(build(preset)).values()]
        assert found[:2] == [-0.0099, 0.2]


def test_vectors_start_as_v1s_and_gains_at_1():
    """Defect c: gains initialised like lambdas."""
    attend, *_ = layer(None, heads=8, kv_heads=2, width=128)
    drawn = []
    for seed in range(20):
        d = module_for(attend, 0, preset="v1", seed=seed)
        drawn += [torch.stack([getattr(d, name) for name in da.LAMBDA_VECTORS]).flatten()]
        assert torch.equal(d.norm_gain, torch.ones(256)) and d.lambda_q1.dtype == torch.float32
    drawn = torch.cat(drawn)
    assert abs(drawn.std() - 0.1) < 0.005 and abs(drawn.mean()) < 0.005
    for preset in PRESETS:
        for name, parameter in da.differential_parameters(build(preset)).items():
            assert "norm_gain" not in name or torch.equal(parameter, torch.ones_like(parameter))


def test_a_normalised_lambda_keeps_below_its_bound_and_can_come_back():
    d = next(iter(da.differential_modules(build("split", lambda_start=0.9)).values()))
    assert abs(d.current_lambda(None) - 0.9) < 1e-6
    with torch.no_grad():
        d.lambda_logit.fill_(5.0)
    value = d.current_lambda(None)
    assert abs(value - 0.9) < 1e-6 and abs(gamma_of(d) - 9) < 1e-4
    assert torch.autograd.grad(value.sum(), d.lambda_logit)[0] > 0


def test_lambda_warms_up_and_anneals_with_progress():
    model = build("split", lambda_warmup=0.2)
    assert set(lambda_values(model).values()) == {0.0}
    set_progress(model, 0.1)
    assert list(lambda_values(model).values()) == pytest.approx([0.25] * 3)
    set_progress(model, 0.5)
    assert list(lambda_values(model).values()) == pytest.approx([0.5] * 3)
    model = build("dex", lambda_start=0.6)
    for progress, init, learned in ((0, 0, 0), (0.25, 0.1875, 0.25), (0.5, 0.25, 0.5), (0.75, 0.1875, 0.75), (1, 0, 1)):
        set_progress(model, progress)
        expected = [init * da.lambda_init_of(i) + learned * 0.6 for i in range(3)]
        assert list(lambda_values(model).values()) == pytest.approx(expected)


def test_gamma_and_lambda_correspond():
    for gamma, lambda_ in ((0.25, 0.2), (0.5, 1 / 3), (1, 0.5), (2, 2 / 3), (4, 0.8)):
        d = next(iter(da.differential_modules(build("split", lambda_start=lambda_)).values()))
        assert gamma_of(d).item() == pytest.approx(gamma)


# ---- the source project's defects (a, g, h here; b, c, f above; d, e, i, j, k in test_differential_model.py)
def test_defect_a_the_same_map_on_both_sides():
    attend, x, rotary, mask = layer("src_gemma_samemap", lambda_kind="fixed")
    other, *_ = layer("v1_width", width=8, lambda_kind="fixed")

    def at(attend, lambda_):
        attend.differential.config.lambda_start = lambda_
        return attend(x, rotary, mask, None)

    size = at(attend, 0.2).abs().max()
    assert (at(attend, 0.8) - at(attend, 0.2)).abs().max() < 1e-2 * size  # through eps alone
    assert (at(attend, 1.8) + at(attend, 0.2)).abs().max() < 1e-2 * size  # past 1 the sign flips
    assert (at(other, 0.8) - at(other, 0.2)).abs().max() > 0.2 * size  # two maps: lambda acts
    model = stir(build("split")).double()
    assert gradients(model)["lambda_logit"] > 1e-4


def scores(attend, rotary, q, k):
    """Both maps' logits of raw one-head queries and keys [1, 1, L, D], at the positions of `rotary`."""
    turn = apply_rotary_to_halves if attend.differential.config.rotate_halves else apply_rotary
    q1, q2, k, _ = attend.differential.two_queries(None, turn(q, *rotary), turn(k, *rotary), k, None)
    k1, k2 = k.chunk(2, dim=1)
    return q1 @ k1.mT, q2 @ k2.mT


@pytest.mark.parametrize(
    ("preset", "cut", "relative", "adds_up"),
    [
        ("v1_width", "even_odd", True, True),
        ("v1_width", "contiguous", True, True),
        ("v1_width", "front_back", False, True),
        ("src_gemma_split", "front_back", True, False),
    ],
)
def test_defect_g_rotary_pairs_stay_whole(preset, cut, relative, adds_up):
    attend, *_ = layer(preset, heads=1, kv_heads=1, width=16, halves_cut=cut)
    config = GemmaConfig(hidden_size=24, num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.double), torch.randn(1, 1, 1, 16, dtype=torch.double)
    tables = [rotary_tables(config, torch.arange(n, n + 8)[None], torch.double) for n in (0, 100)]
    near, far = (scores(attend, table, q.expand(1, 1, 8, 16), k.expand(1, 1, 8, 16)) for table in tables)
    assert relative == all(torch.allclose(a, b, atol=1e-4) for a, b in zip(near, far, strict=True))
    whole = apply_rotary(q.expand(1, 1, 8, 16), *tables[0]) @ apply_rotary(k.expand(1, 1, 8, 16), *tables[0]).mT
    assert adds_up == torch.allclose(near[0] + near[1], whole, atol=1e-6)


@pytest.mark.parametrize("preset", ["v1_width", "src_gemma_split"])
def test_defect_h_each_branch_attends_to_its_own_half_of_the_keys(preset):
    attend, x, _, _ = layer(preset, heads=4, kv_heads=1, width=8, halves_cut="front_back")
    q, k, v = projected(attend, x, None)
    q1, q2, keys, _ = attend.differential.two_queries(x, q, k, v, None)
    k1, k2 = keys.chunk(2, dim=1)
    torch.testing.assert_close(q1 @ k1.mT, q[..., :4] @ k[..., :4].mT)  # every head of a group
    torch.testing.assert_close(q2 @ k2.mT, q[..., 4:] @ k[..., 4:].mT)


def test_scores_are_scaled_by_the_width_that_the_method_says():
    for preset, width in (("v1_width", 8), ("src_gemma_split", 16)):
        attend, *_ = layer(preset, width=16)
        host = Attend(None, attend.scale)
        assert attend.differential.rescale(host).scale == pytest.approx(width**-0.5)
