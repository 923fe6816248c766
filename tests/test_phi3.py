"""The Phi-3 decoder against transformers' Phi3ForCausalLM, on tiny random models."""

import json

import pytest
import torch
import transformers
from refusals import refused
from tiny_phi import ORIGINAL, VARIANTS, ids_and_mask, longrope, pair

import modeling_vlm
from attention import PrefixMask, call_sdpa, sdpa
from attention_formula import attention_reference
from checkpoint import hub_key, rename_key
from differential_attention import PRESETS, DifferentialConfig, add_differential
from modeling_phi3 import Phi3Config, Phi3TextConfig, rotary_tables
from models import classes_of
from processing_phi3v import IMAGE_TOKEN_ID


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [7, ORIGINAL, ORIGINAL + 1, 60])
def test_logits_and_loss_equal_transformers_on_both_sides_of_the_border(variant, length):
    """Left pads in the second row, unless they would put the rows on different sides of the border."""
    hf, ours = pair(variant)
    batch = ids_and_mask((length, length - 2 if length != ORIGINAL + 1 else length))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected, found = hf(**batch, labels=labels), ours(**batch, labels=labels, logits_to_keep=length)
    valid = batch["attention_mask"].bool()
    assert expected.logits[valid].std() > 0.3
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)


def test_logits_equal_transformers_at_600_tokens():
    """Above 512 keys attention uses SDPA."""
    hf, ours = pair("longrope", max_position_embeddings=1024)
    batch = ids_and_mask((600,))
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, hf(**batch).logits, atol=2e-5, rtol=0)


def test_each_field_of_a_variant_shows():
    """The parity test would be useless if it passed without a factor, window or partial rotation."""
    batch = ids_and_mask((60,))
    for variant in ("longrope", "partial rotary", "window", "grouped queries"):
        _, ours = pair(variant)
        config = ours.model.language_model.config
        with torch.no_grad():
            right = ours(**batch).logits
            for layer in ours.model.language_model.layers:
                layer.self_attn.window = None
            if variant == "grouped queries":
                k = ours.model.language_model.layers[0].self_attn.qkv_proj.weight[64:96]
                k.copy_(k.unflatten(0, (2, -1)).flip(0).flatten(0, 1))
            config.short_factor = config.long_factor = None
            if variant == "partial rotary":
                config.partial_rotary_factor = 1.0
            assert (ours(**batch).logits - right).abs().max() > 1e-2, variant


def test_a_row_has_the_same_logits_in_a_batch_and_alone():
    """transformers chooses the factors by the longest row of a batch, which changes the short rows in it."""
    hf, ours = pair("longrope")
    lengths = (9, ORIGINAL, ORIGINAL + 1, 50)
    batch = ids_and_mask(lengths)
    with torch.no_grad():
        together, theirs = ours(**batch).logits, hf(**batch).logits
        for row, length in enumerate(lengths):
            alone = hf(batch["input_ids"][row : row + 1, -length:]).logits
            torch.testing.assert_close(together[row : row + 1, -length:], alone, atol=1e-5, rtol=0)
    assert (theirs[0, -9:] - together[0, -9:]).abs().max() > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_transformers_over_the_border(variant):
    """Rows cross it at different steps; each equals transformers' answer to that row alone, and the uncached one."""
    hf, ours = pair(variant, seed=3)
    lengths, new = (ORIGINAL - 9, ORIGINAL - 4, ORIGINAL + 3), 14
    batch = ids_and_mask(lengths, seed=1)
    hf.generation_config.eos_token_id = ours.config.stop_ids = ()
    hf.generation_config.eos_token_id = None
    found = ours.generate(**batch, max_new_tokens=new)
    for row, length in enumerate(lengths):
        prompt = batch["input_ids"][row : row + 1, -length:]
        expected = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False)
        assert found[row, -length - new :].tolist() == expected[0].tolist()
        with torch.no_grad():
            uncached = [
                ours(expected[:, :end], logits_to_keep=1).logits.argmax() for end in range(length, length + new)
            ]
        assert torch.stack(uncached).tolist() == expected[0, -new:].tolist()
    assert found[:, -new:].unique().numel() > (2 if variant == "tied heads" else 3)


def test_only_rows_that_cross_the_border_are_decoded_on_a_growing_cache(monkeypatch):
    """On the static cache of a GPU the tokens are the same, also for rows beyond the border and just up to it."""
    _, ours = pair("longrope", seed=3)
    ours.config.stop_ids = ()
    used, real = [], modeling_vlm.LongRopeStepDecoder.run
    monkeypatch.setattr(modeling_vlm.LongRopeStepDecoder, "run", lambda *args: used.append(1) or real(*args))
    batch, new = ids_and_mask((ORIGINAL - 9, ORIGINAL + 3), seed=1), 10  # the last token is at the last short position
    grown = ours.generate(**batch, max_new_tokens=new)
    monkeypatch.setattr(modeling_vlm, "choose_step_decoder", lambda _: modeling_vlm.StaticStepDecoder)
    assert torch.equal(ours.generate(**batch, max_new_tokens=new), grown) and used == []
    longer = ours.generate(**batch, max_new_tokens=new + 1)
    assert torch.equal(longer[:, :-1], grown) and len(used) == new


def test_the_image_token_of_phi_is_a_word_in_another_decoder():
    """A decoder alone has no image token: 32044 of a larger vocabulary is text."""
    hf, ours = pair("default rotary", vocab_size=32050)
    assert ours.config.image_token_id is None
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, 7]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, hf(ids).logits, atol=1e-5, rtol=0)


def test_a_decoder_alone_has_no_patches():
    _, ours = pair("longrope")
    ids = ids_and_mask((5,))["input_ids"]
    assert not ours.model.patch_tokens(ids).any()
    with refused("decoder alone"):
        ours.model.image_features(torch.zeros(1, 3, 4, 4), torch.tensor([[4, 4]]))


def test_a_cache_of_the_other_side_of_the_border_is_refused():
    from modeling_vlm import KVCache

    _, ours = pair("longrope")
    decoder, ids = ours.model.language_model, ids_and_mask((ORIGINAL + 2,))["input_ids"]
    cache = KVCache(decoder, 1, ORIGINAL + 2, torch.float32, "cpu")
    mask, positions = ours.model.mask(torch.ones_like(ids)), ours.model.positions(torch.ones_like(ids))
    first = ORIGINAL - 1
    decoder(
        decoder.embed(ids[:, :first]), positions[:, :first], ours.model.mask(torch.ones_like(ids[:, :first])), cache
    )
    with refused(ORIGINAL, "cached keys"):
        decoder(decoder.embed(ids[:, first:]), positions[:, first:], mask, cache)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_transformers(variant):
    hf, ours = pair(variant, amplify=2.0)
    batch = ids_and_mask((40, 37))
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, 3] = -100  # a pad would predict it
    hf(**batch, labels=labels).loss.backward()
    ours(**batch, labels=labels).loss.backward()
    found = dict(ours.named_parameters())
    for name, p in hf.named_parameters():
        grad = found[rename_key(name)].grad
        torch.testing.assert_close(grad, p.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_rotary_tables_are_bit_equal_to_transformers():
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    fields = dict(max_position_embeddings=131072, original_max_position_embeddings=4096)
    config = transformers.Phi3Config(**fields, rope_scaling=longrope(96))
    for length in (4096, 4097):
        positions = torch.arange(length)[None]
        expected = Phi3RotaryEmbedding(config)(torch.zeros(1), positions)
        found = rotary_tables(Phi3TextConfig.from_dict(config.to_dict()), positions, torch.float32)
        assert all(torch.equal(a[:, 0], b) for a, b in zip(found, expected, strict=True))
    assert found[0][0, 0, 0, 0].item() == pytest.approx(1.1902380714)  # Phi-3-vision's attention factor


# ---- attention paths
@pytest.mark.parametrize("queries", [1, 5, 64])
def test_a_causal_mask_without_pads_is_one_causal_call(monkeypatch, queries):
    """On a GPU SDPA gets a causal bias; here the same call is made with a dense mask."""
    calls = []

    def record(q, k, v, mask, scale):
        calls.append(mask)
        return call_sdpa(q, k, v, mask, scale)

    monkeypatch.setattr("attention.call_sdpa", record)
    ones = torch.ones(2, 64, dtype=torch.long)
    q, k, v = (torch.randn(2, 4, n, 16) for n in (queries, 64, 64))
    mask = PrefixMask.from_tensors(ones, ones)
    out = sdpa(q, k, v, mask, 0.25, None)
    assert len(calls) == 1
    torch.testing.assert_close(out, attention_reference(q, k, v, mask.dense(queries, 64), 0.25))
    causal = torch.ones(queries, 64, dtype=torch.bool).tril(64 - queries)
    assert torch.equal(mask.dense(queries, 64), causal.expand(2, 1, -1, -1))


# ---- saved and loaded
@pytest.mark.parametrize("variant", VARIANTS)
def test_folders_go_to_transformers_and_back(variant, tmp_path):
    hf, ours = pair(variant)
    batch = ids_and_mask((30,))
    hf.save_pretrained(tmp_path / "theirs")
    loaded = classes_of(tmp_path / "theirs")[0].from_pretrained(tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    back = transformers.Phi3ForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, ours(**batch).logits)
        assert torch.equal(back(**batch).logits, hf(**batch).logits)


def test_hub_names_of_a_decoder():
    _, ours = pair("longrope")
    for key in ours.state_dict():
        stored = hub_key(key, "phi3")
        assert stored.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
        assert rename_key(stored) == key == rename_key(key)


# ---- differential attention
EXACT = [name for name, preset in PRESETS.items() if preset.exact and name != "grouped"]


@pytest.mark.parametrize("variant", ["longrope", "partial rotary"])
@pytest.mark.parametrize("preset", EXACT)
def test_exact_presets_do_not_change_a_logit(variant, preset):
    _, ours = pair(variant)
    batch = ids_and_mask((40, 12))
    with torch.no_grad():
        before = ours(**batch).logits
        add_differential(ours, preset)
        assert torch.equal(ours(**batch).logits, before)
        assert torch.equal(
            ours.generate(**batch, max_new_tokens=3), pair(variant)[1].generate(**batch, max_new_tokens=3)
        )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_or_is_refused_by_name(preset):
    _, ours = pair("longrope")
    config = DifferentialConfig(preset).resolve()
    if preset == "grouped":
        with refused("grouped", "grouped queries"):
            add_differential(ours, config)
    elif config.rotate_halves:
        with refused(preset, "longrope"):
            add_differential(ours, config)
    elif config.towers == ("vision",):
        with refused("towers vision", "has no vision tower"):
            add_differential(ours, config)
    else:
        add_differential(ours, config)
        batch = ids_and_mask((30, 25))
        ours(**batch, labels=batch["input_ids"]).loss.backward()
        with torch.no_grad():
            whole = ours(**batch).logits[:, -1].argmax(-1)
        assert torch.equal(ours.generate(**batch, max_new_tokens=1)[:, -1], whole)
        learned = {
            name.rpartition(".")[2] for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()
        }
        assert set(PRESETS[preset].gradient) <= learned


def test_second_query_of_v2_is_the_query_part_of_the_fused_projection():
    _, ours = pair("grouped queries")
    add_differential(ours, "v2")
    for layer in ours.model.language_model.layers:
        attention = layer.self_attn
        rows = attention.shape.num_heads * attention.shape.head_dim
        assert torch.equal(attention.differential.second_query, attention.qkv_proj.weight[:rows])


def test_v1_pairs_keep_the_maps_of_their_heads():
    """The paper's case: with as many key heads as query heads, both maps of a pair are pretrained maps."""
    _, ours = pair("default rotary")
    attention = ours.model.language_model.layers[0].self_attn
    x = torch.randn(1, 9, 64)
    ones = torch.ones(1, 9, dtype=torch.long)
    rotary = rotary_tables(ours.config.text_config, ours.model.positions(ones), torch.float32)
    mask = ours.model.mask(ones)
    q, k, v, rotate, attend = attention.attention_inputs(x, rotary, mask, None, None)
    maps = attend.maps(q, k)
    add_differential(ours, "v1")
    q1, q2, keys, _ = attention.differential.two_queries(x, q, k, v, rotate)
    first, second = (attend.maps(*pair) for pair in zip((q1, q2), keys.chunk(2, dim=1), strict=True))
    assert torch.equal(first, maps[:, 0::2]) and torch.equal(second, maps[:, 1::2])


def test_cuts_that_would_break_rotary_pairs_are_refused():
    _, ours = pair("partial rotary")
    for changes in (dict(halves_cut="contiguous"), dict(halves_cut="front_back"), dict(rotate_halves=True)):
        with refused("v1_width"):
            add_differential(ours, DifferentialConfig("v1_width", **changes))
    add_differential(ours, "v1_width")  # even and odd pairs stay whole


# ---- refusals
BAD = {
    "rope_scaling": (dict(rope_scaling={"rope_type": "yarn", "factor": 2}), "yarn"),
    "long_factor": (dict(rope_scaling={"type": "su", "short_factor": [1.0] * 8}), "long_factor"),
    "short_factor": (dict(rope_scaling=longrope(10)), "short_factor has 5"),
    "model_type": (dict(model_type="phi4mm"), "phi4mm"),
    "hidden_act": (dict(hidden_act="gelu_fast"), "gelu_fast"),
    "num_attention_heads": (dict(num_attention_heads=5), "num_attention_heads"),
    "attention_dropout": (dict(attention_dropout=0.1), "attention_dropout"),
    "vocab_size": (dict(vocab_size="many"), "vocab_size"),
    "type": (dict(rope_scaling={"type": ["su"]}), "rope_scaling"),
    "factor": (dict(rope_scaling=longrope() | {"factor": 0}), "factor"),
    "rope_theta": (dict(rope_scaling={"rope_theta": 0.0}), "rope_theta"),
    "original": (dict(rope_scaling=longrope(), original_max_position_embeddings=1), "original_max_position_embeddings"),
    "head_dim": (dict(head_dim=7), "must be even"),
    "eos_token_id": (dict(eos_token_id=[]), "eos_token_id"),
}


@pytest.mark.parametrize("field", BAD)
def test_configs_that_cannot_be_right_are_refused(field, tmp_path):
    changes, part = BAD[field]
    data = pair("default rotary")[1].config.to_dict() | changes
    if "rope_scaling" in changes:
        del data["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    with refused(tmp_path / "config.json", part):
        Phi3Config.from_pretrained(tmp_path)


def test_stop_ids_of_released_configs():
    """Released configs give 2, which the model never generates."""
    for single in (None, 2, 32000):
        assert Phi3Config.from_dict({"model_type": "phi3", "eos_token_id": single}).stop_ids == (32007, 32000)
    other = {"model_type": "phi3", "eos_token_id": 199999, "vocab_size": 200064}  # a larger vocabulary than Phi-3's
    assert Phi3Config.from_dict(other).stop_ids == (199999,)
    assert Phi3Config.from_dict({"model_type": "phi3", "eos_token_id": [7, 8]}).stop_ids == (7, 8)
    assert Phi3Config.from_dict({"model_type": "phi3", "eos_token_id": 5, "vocab_size": 9}).stop_ids == (5,)
