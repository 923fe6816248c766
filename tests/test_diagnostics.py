"""What a run logs about lambda and both maps, checked against the forward pass."""

import math

import pytest
import tiny
import torch
from test_differential import build, causal, layer, projected, stir

from attention import Attend, apply_rotary
from attention_formula import attention_maps, blend
from diagnostics import (
    answer_attention,
    compute_layer_maps,
    decoder_maps,
    effective_map,
    first_map,
    lambda_values,
    measure_maps,
    row_entropy,
    select_heads,
    subtracted_map,
    visit_differential_layers,
)
from differential_attention import add_differential, differential_modules


@pytest.mark.parametrize("preset", ["split", "v2", "difflora", "v1", "grouped", "dex"])
def test_visited_maps_and_outputs_are_those_of_the_forward_pass(preset):
    model, batch, outputs = stir(build(preset)), tiny.batch(), []
    for module in differential_modules(model).values():
        module.register_forward_hook(lambda module, inputs, out: outputs.append(out))

    def see(name, module, seen, valid):
        assert torch.equal(valid, batch["attention_mask"].bool())
        torch.testing.assert_close(seen.map1.sum(-1), torch.ones(seen.map1.shape[:3]))
        normalised = module.config.combine == "normalised"
        weight = seen.lambda_ / (1 - seen.lambda_) if normalised else seen.lambda_
        out = blend(seen.out1, seen.out2, weight, normalised)
        out = module.head_norm(out)
        out = module.restore_heads(out) if preset == "v1" else out
        torch.testing.assert_close(out, outputs.pop(), atol=1e-5, rtol=1e-5)
        visited.append(name)

    visited = []
    visit_differential_layers(model, batch, see)
    assert visited == [f"model.language_model.layers.{i}.self_attn.differential" for i in range(3)]


def test_diagnostics():
    model, batch = build("split"), tiny.batch()
    for line in measure_maps(model, [batch]).values():
        assert line["cosine"] == pytest.approx(1, abs=1e-6) and line["distance"] == 0
        assert line["entropy1"] == line["entropy2"] > 0 and line["lambda"] == pytest.approx(0.5)
    found = measure_maps(stir(model), [batch])
    for line in found.values():
        assert line["cosine"] < 0.999 and line["distance"] > 0.01 and line["entropy1"] != line["entropy2"]
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 55)}
    assert measure_maps(model, [other]) == found  # pads are not counted
    assert measure_maps(build(), [batch]) == {}
    token = stir(build("v2"))
    start = {name: line["lambda"] for name, line in measure_maps(token, [batch]).items()}
    assert measure_maps(token, [other]).items() and all(0 < value < 1 for value in start.values())
    assert {name: line["lambda"] for name, line in measure_maps(token, [other]).items()} == start
    uniform = torch.full((1, 1, 2, 8), 1 / 8)
    assert row_entropy(uniform).flatten().tolist() == pytest.approx([math.log(8)] * 2)


@pytest.mark.parametrize("preset", ["split", "v1"])
def test_measured_values_are_their_formulas(preset):
    """Means over heads and valid tokens, in float64, of the maps and outputs of each layer."""
    model, batch = stir(build(preset)), tiny.batch()
    found = measure_maps(model, [batch])

    def see(name, module, seen, valid):
        map1, map2, out1, out2 = (t.double() for t in seen[:4])
        rows = valid[:, None].expand(out1.shape[:3])
        entropy1, entropy2 = (-(m * m.clamp(min=1e-300).log()).sum(-1) for m in (map1, map2))
        dot, norms = (out1 * out2).sum(-1), (out1.norm(dim=-1), out2.norm(dim=-1))
        expected = {
            "entropy1": entropy1[rows].mean(),
            "entropy2": entropy2[rows].mean(),
            "cosine": (dot / (norms[0] * norms[1]))[rows].mean(),
            "distance": ((out1 - out2).norm(dim=-1) / norms[0])[rows].mean(),
            "lambda": module.current_lambda(None).mean(),
        }
        assert found[name] == pytest.approx({key: value.item() for key, value in expected.items()}, rel=1e-4)

    visit_differential_layers(model, batch, see)


PAIR = {"entropy1", "entropy2", "cosine", "distance"}
MEASURED = {
    "norm_only": {"entropy1"},
    "gate": {"entropy1"},
    "additive": PAIR,
    "sharpen": PAIR,
    "dex": {"lambda", "entropy1", "cosine", "distance"},
    "src_gemma_samemap": {"lambda", *PAIR},
}


@pytest.mark.parametrize("preset", MEASURED)
def test_what_a_method_does_not_have_is_not_measured(preset):
    """No lambda for a control without one, no second output for a gate; other values are in their places."""
    model, batch = stir(build(preset)), tiny.batch()
    for name, line in measure_maps(model, [batch]).items():
        assert set(line) == MEASURED[preset]
        assert line["entropy1"] > 0 and -1 <= line.get("cosine", 0) <= 1 + 1e-6
        value = lambda_values(model).get(name)
        assert line.get("lambda") == (value if value is None else pytest.approx(value))


def test_batches_of_one_row_give_the_means_of_one_batch():
    model = stir(build("v2"))
    batch = tiny.batch()
    single = [{key: tensor[i : i + 1] for key, tensor in batch.items()} for i in range(2)]
    together, apart = measure_maps(model, [batch]), measure_maps(model, single)
    assert together
    for name, line in together.items():
        assert apart[name] == pytest.approx(line, rel=1e-5)
    assert measure_maps(model, []) == {}


def test_compiled_layers_are_visited_as_well():
    model, batch = stir(build("split")), tiny.batch()
    expected = measure_maps(model, [batch])
    for decoder_layer in model.model.language_model.layers:
        decoder_layer.compile(fullgraph=True, backend="eager")
    with torch.no_grad():  # as an evaluation before: without hooks, and compiled so
        model(**{key: value for key, value in batch.items() if key != "labels"}, logits_to_keep=1)
    assert measure_maps(model, [batch]) == expected and not model.training
    assert measure_maps(model.train(), [batch]) == expected and model.training


def test_dex_takes_the_heads_of_highest_entropy():
    model = build("dex")
    entropies = {}

    def see(name, module, seen, valid):
        entropies[name] = (row_entropy(seen.map1) * valid[:, None]).sum((0, 2))

    visit_differential_layers(model, tiny.batch(), see)
    select_heads(model, [tiny.batch()])
    for name, module in differential_modules(model).items():
        assert module.selected.sum() == 2
        assert entropies[name][module.selected == 1].min() > entropies[name][module.selected == 0].max()


def test_only_dex_runs_the_model_to_select_heads():
    for preset in (None, "split"):
        model = build(preset)
        model.model.forward = None  # a call would raise
        select_heads(model, [tiny.batch()])


def test_dex_keeps_one_head_of_a_layer_with_one():
    model = tiny.ours_like(tiny.hf_model("gemma", num_attention_heads=1))
    add_differential(model, "dex")
    select_heads(model, [tiny.batch()])
    assert all(module.selected.sum() == 1 for module in differential_modules(model).values())


def test_maps_of_the_two_branches_are_attention_maps():
    attend, x, rotary, mask = layer("split")
    q, k, v = projected(attend, x, rotary)
    seen = compute_layer_maps(
        attend.differential, x, q, k, v, lambda t: apply_rotary(t, *rotary), Attend(mask, 8**-0.5)
    )
    torch.testing.assert_close(seen.map1, attention_maps(q, k, causal(), 8**-0.5).flatten(1, 2))
    assert (seen.map1 - seen.map2).abs().max() > 0.01


def test_attention_of_an_answer_is_that_of_the_tokens_that_predict_it():
    model, batch, maps = stir(build("split")), tiny.batch(), []

    def keep_map(attend, args, _):
        maps.append(effective_map(*decoder_maps(attend, *args[:3])))

    for decoder_layer in model.model.language_model.layers:
        decoder_layer.self_attn.register_forward_hook(keep_map)
    (found,) = answer_attention(model, batch)
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        patches = (ids == model.config.image_token_id).nonzero()[:, 0]
        answered = (labels >= 0).nonzero()[:, 0][: found.shape[2]]
        for layer_maps, paid in zip(maps, found[:, row], strict=True):
            expected = layer_maps[row].mean(0)[answered - 1][:, patches]
            torch.testing.assert_close(paid, expected, atol=1e-6, rtol=1e-5)


def test_attention_of_answers_of_unequal_length_is_that_of_each_row_alone():
    """Cut to the shortest answer: "10, 4, 2" has one token more than "1, 4, 2"."""
    model, lengths = stir(build("split")), (8, 9, 8)
    batch = tiny.batch(prefixes=(5, 2, 4), suffixes=lengths)
    parts = effective_map, first_map, subtracted_map
    attention = answer_attention(model, batch, parts)
    assert attention.shape[0] == 3 and attention.shape[2:4] == (3, 8)
    for part, found in zip(parts, attention, strict=True):  # together as alone
        torch.testing.assert_close(found, answer_attention(model, batch, (part,))[0], atol=0, rtol=0)
    assert not torch.equal(attention[1], attention[2])
    for row, length in enumerate(lengths):
        one = {key: tensor[row : row + 1] for key, tensor in batch.items()}
        alone = answer_attention(model, one, parts)
        assert alone.shape[3] == length
        torch.testing.assert_close(attention[:, :, row], alone[:, :, 0, :8], atol=1e-6, rtol=1e-5)
