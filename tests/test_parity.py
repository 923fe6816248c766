"""The port against transformers, on tiny random models, both families."""

import pytest
import tiny
import torch
import transformers

from modeling_gemma import GemmaConfig, rotary_tables

FAMILIES = ["gemma", "gemma2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_loss_equal_transformers(family, images, side):
    """In float64, since with amplified weights float32 rounding is visible and differs between processors."""
    hf, ours = (model.double() for model in tiny.pair(family))
    batch = tiny.batch(images=images, side=side)
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        expected = hf(**batch)
        found = ours(**batch, logits_to_keep=batch["input_ids"].shape[1])
    valid = batch["attention_mask"].bool()
    assert expected.logits[valid].std() > 0.5  # amplified: differences would show
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
FIELDS = {
    "layer types": ("gemma2", dict(layer_types=["full_attention", "sliding_attention", "full_attention"])),
    "linear rope of Gemma 1": ("gemma", dict(rope_parameters=LINEAR)),
    "linear rope of Gemma 2": ("gemma2", dict(rope_parameters=LINEAR)),
    "erf gelu of Gemma 2": ("gemma2", dict(hidden_activation="gelu")),
    "relu of Gemma 2": ("gemma2", dict(hidden_activation="relu")),
    "gelu of Gemma 1 is the tanh form": ("gemma", dict(hidden_act="gelu")),
    "silu of Gemma 1": ("gemma", dict(hidden_act="silu")),
    **{f"vision {name}": ("gemma", dict(vision=dict(hidden_act=name))) for name in ("relu", "gelu", "quick_gelu")},
}


@pytest.mark.parametrize("field", FIELDS)
def test_config_fields_that_change_the_function_are_read(field):
    """In float64, where only the field can make a difference."""
    family, changes = FIELDS[field]
    hf, ours = (model.double() for model in tiny.pair(family, **changes))
    standard = tiny.ours_like(tiny.hf_model(family)).double()
    batch = tiny.batch()
    batch["pixel_values"] = batch["pixel_values"].double()
    valid, length = batch["attention_mask"].bool(), batch["input_ids"].shape[1]
    with torch.no_grad():
        expected = hf(**batch).logits[valid]
        found = ours(**batch, logits_to_keep=length).logits[valid]
        unchanged = standard(**batch, logits_to_keep=length).logits[valid]
    # rotary angles are float32 in both programs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert ((unchanged - expected).abs().max() > 1e-4) != ("tanh form" in field)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_tables_are_bit_equal_to_transformers_at_every_position(dtype):
    from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding

    positions = torch.arange(8192)[None]
    expected = GemmaRotaryEmbedding(transformers.GemmaConfig(head_dim=256))(torch.zeros(1, dtype=dtype), positions)
    found = rotary_tables(GemmaConfig(), positions, dtype)
    assert all(torch.equal(ours[:, 0], theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_transformers(family):
    hf, ours = tiny.pair(family, amplify=3.0)
    batch = tiny.batch()
    hf(**batch).loss.backward()
    ours(**batch).loss.backward()
    expected = dict(hf.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name].grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [1, 3])
def test_greedy_tokens_equal_transformers(family, images):
    hf, ours = tiny.pair(family, seed=3)
    batch = tiny.prompts(images=images, prefixes=(5, 1, 3))
    expected = hf.generate(**batch, max_new_tokens=20, do_sample=False)
    found = ours.generate(**batch, max_new_tokens=20)
    assert found.tolist() == expected.tolist()
    assert found[:, batch["input_ids"].shape[1] :].unique().numel() > 3


def test_each_gemma2_difference_shows():
    """The parity test would be useless if it passed without a soft-cap or window."""
    batch = tiny.batch()
    hf, ours = tiny.pair("gemma2")
    with torch.no_grad():
        right = ours(**batch, logits_to_keep=20).logits
        for change in (dict(softcap=None), dict(window=None), dict(scale=0.25)):
            other = tiny.ours_like(hf)
            for layer in other.model.language_model.layers:
                for name, value in change.items():
                    setattr(layer.self_attn, name, value)
            assert (other(**batch, logits_to_keep=20).logits - right).abs().max() > 1e-2, change
        ours.config.text_config.final_logit_softcapping = None
        assert (ours(**batch, logits_to_keep=20).logits - right).abs().max() > 1e-2


def test_bfloat16_stays_close_to_transformers():
    hf, ours = tiny.pair("gemma", amplify=3.0)
    batch = tiny.batch()
    with torch.no_grad():
        exact = hf(**batch).logits
        expected = (
            hf.bfloat16()(**batch | {"pixel_values": batch["pixel_values"].bfloat16()}).logits.float() - exact
        ).std()
        logits = ours.bfloat16()(**batch, logits_to_keep=batch["input_ids"].shape[1]).logits  # float32 pixels are cast
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).std() < 1.5 * expected + 1e-3
