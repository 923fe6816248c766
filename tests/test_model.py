"""The model on its own: the mask, leaks, the cache, stopping, counts, loading and saving."""

import json

import pytest
import tiny
import torch

from attention import PrefixMask, attention
from attention_formula import attention_reference
from errors import UserError
from modeling_gemma import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from modeling_siglip import SiglipVisionConfig
from modeling_vlm import sample

FAMILIES = ["gemma", "gemma2"]


# --- the mask (golden grids: 6 prefix, 2 suffix, 2 pads; big_vision's rule)
def grid(attention_mask, token_type_ids):
    mask = PrefixMask.from_tensors(torch.tensor([attention_mask]), torch.tensor([token_type_ids]))
    return ["".join(str(int(v)) for v in row) for row in mask.dense(10, 10)[0, 0]]


def test_golden_grid_padded_right():
    rows = grid([1] * 8 + [0] * 2, [0] * 6 + [1] * 2 + [0] * 2)
    assert rows == ["1111110000"] * 6 + ["1111111000", "1111111100"] + ["1111111100"] * 2


def test_golden_grid_padded_left():
    rows = grid([0] * 2 + [1] * 8, [0] * 8 + [1] * 2)
    assert rows[2:] == ["0011111100"] * 6 + ["0011111110", "0011111111"]
    assert all("1" in row for row in rows)  # no query without a key


def test_no_token_types_means_all_prefix():
    assert grid([1] * 10, [0] * 10) == ["1" * 10] * 10
    mask = PrefixMask.from_tensors(torch.ones(1, 4), None)
    assert mask.sees_all and mask.dense(4, 4).all()


@pytest.mark.parametrize(("valid", "types"), [([1, 0, 1, 1], [0, 0, 0, 1]), ([1, 1, 1, 1], [0, 1, 0, 1])])
def test_a_gap_in_the_mask_is_refused(valid, types):
    with pytest.raises(UserError, match="gap"):
        PrefixMask.from_tensors(torch.tensor([valid]), torch.tensor([types]))


def test_the_mask_follows_the_rule_for_random_rows():
    """cumsum(ar): query i may attend key j iff c[j] <= c[i] and j is valid."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        left, prefix, suffix, right = torch.randint(0, 4, (4,), generator=generator).tolist()
        prefix += 1
        valid = torch.tensor([[0] * left + [1] * (prefix + suffix) + [0] * right])
        types = torch.tensor([[0] * (left + prefix) + [1] * suffix + [0] * right])
        c = types.cumsum(1)
        expected = (c[:, None, :] <= c[:, :, None]) & valid[:, None, :].bool()
        length = valid.shape[1]
        assert torch.equal(PrefixMask.from_tensors(valid, types).dense(length, length)[:, 0], expected)


# --- kernels
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [7, 600])  # below and above the length where the path changes
def test_fast_attention_equals_the_reference_in_float64(kv_heads, length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 8, requires_grad=True) for h in (4, kv_heads, kv_heads))
    valid = torch.ones(2, length, dtype=torch.long)
    valid[1, :3] = 0
    types = torch.zeros_like(valid)
    types[:, -2:] = 1
    mask = PrefixMask.from_tensors(valid, types)
    out = attention(q, k, v, mask, scale=0.5)
    exact = attention_reference(q.double(), k.double(), v.double(), mask.dense(length, length), 0.5)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((exact * weight).sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_row_without_keys_gives_no_nan():
    q = torch.randn(2, 4, 5, 8, requires_grad=True)
    k = torch.randn(2, 1, 5, 8)
    mask = PrefixMask.from_tensors(torch.tensor([[1] * 5, [0] * 5]))
    out = attention(q, k, k, mask, scale=1.0)
    out.sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()


# --- leaks
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_leaks(family, side):
    model = tiny.ours_like(tiny.hf_model(family))
    batch = tiny.batch(prefixes=(5, 5), suffixes=(4, 4), side=side)
    length = batch["input_ids"].shape[1]
    before = model(**batch, logits_to_keep=length).logits
    for position in range(length - 4, length):
        changed = batch | {"input_ids": batch["input_ids"].clone()}
        changed["input_ids"][:, position] = 77
        moved = (model(**changed, logits_to_keep=length).logits - before).abs().amax((0, 2)) > 1e-5
        assert not moved[:position].any() and moved[position]
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, length - 6] = 77  # in the prefix: one block, every row sees it
    assert ((model(**changed, logits_to_keep=length).logits - before).abs().amax((0, 2)) > 1e-6).all()


def test_pads_change_nothing():
    model = tiny.ours_like(tiny.hf_model("gemma"))
    losses = [model(**tiny.batch(prefixes=(5, 2), suffixes=(3, 4), side=side)).loss for side in ("left", "right")]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    batch = tiny.batch()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 55)}
    assert torch.equal(model(**batch).loss, model(**other).loss)


def test_the_loss_is_the_mean_over_suffix_tokens_only():
    model = tiny.ours_like(tiny.hf_model("gemma"))
    batch = tiny.batch()
    out = model(**batch, logits_to_keep=batch["input_ids"].shape[1])
    losses = []
    for row, labels in zip(out.logits.log_softmax(-1), batch["labels"], strict=True):
        losses += [-row[i - 1, token] for i, token in enumerate(labels.tolist()) if token != -100]
    assert len(losses) == 3 + 4
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())


def test_the_head_runs_on_labelled_rows_only():
    model = tiny.ours_like(tiny.hf_model("gemma"))
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[:-1].numel()))
    assert model(**tiny.batch(suffixes=(3, 4))).logits is None
    assert rows == [7]


# --- generation
@pytest.mark.parametrize(("family", "seed"), [("gemma", 9), ("gemma2", 10)])  # seeds whose rows end at different steps
def test_cached_generation_equals_uncached(family, seed):
    model = tiny.ours_like(tiny.hf_model(family, seed=seed))
    batch = tiny.prompts(prefixes=(5, 2, 4))
    found = model.generate(**batch, max_new_tokens=8)
    assert (found[:, -8:] == tiny.EOS).any()
    ids, mask, types = (batch[key] for key in ("input_ids", "attention_mask", "token_type_ids"))
    finished = torch.zeros(3, dtype=torch.bool)
    for _ in range(found.shape[1] - ids.shape[1]):
        token = model(ids, batch["pixel_values"], mask, types).logits[:, -1].argmax(-1).masked_fill(finished, tiny.PAD)
        finished |= token == tiny.EOS
        ids = torch.cat([ids, token[:, None]], 1)
        mask, types = (torch.cat([x, torch.ones_like(x[:, :1])], 1) for x in (mask, types))
    assert found.tolist() == ids.tolist()


def test_generation_of_a_batch_equals_that_of_its_rows():
    model = tiny.ours_like(tiny.hf_model("gemma", seed=3))
    batch = tiny.prompts(prefixes=(6, 1, 3))
    together = model.generate(**batch, max_new_tokens=6)[:, -6:]
    for row in range(3):
        start = int((batch["attention_mask"][row] == 0).sum())
        alone = {key: batch[key][row : row + 1, start:] for key in ("input_ids", "attention_mask")}
        out = model.generate(**alone, pixel_values=batch["pixel_values"][row : row + 1], max_new_tokens=6)
        answer = out[0, alone["input_ids"].shape[1] :].tolist()  # alone, a row stops at its eos
        assert answer + [tiny.PAD] * (6 - len(answer)) == together[row].tolist()


def test_every_row_stops_at_its_own_eos(monkeypatch):
    model = tiny.ours_like(tiny.hf_model("gemma"))
    script = torch.tensor([[5, 6, tiny.EOS, 9, 9], [5, tiny.EOS, 9, 9, 9], [5, 6, 7, tiny.EOS, 9]])
    step = iter(script.T)
    monkeypatch.setattr("modeling_vlm.sample", lambda *args: next(step))
    out = model.generate(**tiny.prompts(prefixes=(5, 2, 3)), max_new_tokens=20)
    assert out[:, -4:].tolist() == [[5, 6, 1, 0], [5, 1, 0, 0], [5, 6, 7, 1]]


def test_the_vision_tower_runs_once():
    model = tiny.ours_like(tiny.hf_model("gemma"))
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    batch = tiny.prompts()
    found = model.generate(**batch, max_new_tokens=5)
    assert len(calls) == 1
    features = model.model.image_features(batch.pop("pixel_values"))
    again = model.generate(**batch, pixel_values=None, image_features=features, max_new_tokens=5)
    assert len(calls) == 2 and again.tolist() == found.tolist()


def test_sampling_follows_its_generator_and_top_p():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(4000, 4)
    draws = [sample(logits, 1.0, 1.0, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    shares = torch.bincount(draws[0], minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.03, rtol=0)
    for temperature in (0.5, 2.0):
        drawn = sample(logits, temperature, 1.0, torch.Generator().manual_seed(1))
        shares = torch.bincount(drawn, minlength=4) / 4000
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), atol=0.03, rtol=0)
    assert sample(logits, 1.0, 0.7, torch.Generator().manual_seed(1)).unique().tolist() == [0, 1]  # 0.66 < 0.7
    assert sample(logits, 1.0, 0.1, torch.Generator().manual_seed(1)).unique().tolist() == [0]
    assert sample(logits, 0.0, 1.0, None).unique().tolist() == [0]


def test_labels_without_token_types_are_refused():
    """Without token types the answer would be part of the prefix, and each of its tokens would see the next one."""
    model, batch = tiny.ours_like(tiny.hf_model("gemma")), tiny.batch()
    del batch["token_type_ids"]
    with pytest.raises(UserError, match="labels need token_type_ids"):
        model(**batch)


def test_generate_refuses_weights_that_give_nan():
    model = tiny.ours_like(tiny.hf_model("gemma"))
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(UserError, match="gives NaN"):
        model.generate(**tiny.prompts())


def test_float16_is_refused(tmp_path):
    with pytest.raises(UserError, match="float16.*overflow"):
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)


def test_arguments_out_of_range_are_refused():
    model, prompts = tiny.ours_like(tiny.hf_model("gemma")), tiny.prompts()
    with pytest.raises(UserError, match="logits_to_keep 0"):
        model(**prompts, logits_to_keep=0)
    with pytest.raises(UserError, match="temperature -1"):
        model.generate(**prompts, temperature=-1.0)
    empty = {name: tensor[:0] for name, tensor in prompts.items()}
    with pytest.raises(UserError, match="empty"):
        model(**empty)
    with pytest.raises(UserError, match="max_new_tokens -1"):
        model.generate(**prompts, max_new_tokens=-1)
    with pytest.raises(UserError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long))


def test_generate_refuses_what_it_would_get_wrong():
    model = tiny.ours_like(tiny.hf_model("gemma"))
    batch = tiny.batch(side="right")
    with pytest.raises(UserError, match="padded on the left"):
        model.generate(batch["input_ids"], batch["pixel_values"], batch["attention_mask"])
    prompts = tiny.prompts()
    with pytest.raises(UserError, match="positions"):
        model.generate(**prompts, max_new_tokens=9000)
    with pytest.raises(UserError, match="8 <image> tokens"):
        model.generate(**prompts | {"pixel_values": prompts["pixel_values"][:1]})


# --- configurations
@pytest.mark.parametrize(
    ("text", "image_size", "parameters"),
    [
        (dict(model_type="gemma"), 224, 2_923_466_480),
        (dict(model_type="gemma"), 448, 2_923_466_480 + 884_736),
        (dict(model_type="gemma"), 896, 2_923_466_480 + 4_423_680),
        (dict(model_type="gemma2"), 224, 3_032_242_416),
        (
            dict(model_type="gemma2", hidden_size=3584, intermediate_size=14336, num_hidden_layers=42)
            | dict(num_attention_heads=16, num_key_value_heads=8),
            224,
            9_662_638_832,
        ),
        (
            dict(model_type="gemma2", hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, head_dim=128)
            | dict(num_attention_heads=32, num_key_value_heads=16, query_pre_attn_scalar=144),
            224,
            27_650_487_024,
        ),
    ],
)
def test_parameter_counts_of_the_released_models(text, image_size, parameters):
    data = {"model_type": "paligemma", "text_config": {"vocab_size": 257216, **text}}
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(
            PaliGemmaConfig.from_dict(data | {"vision_config": {"image_size": image_size}})
        )
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "ids",
    [{"image_token_index": None, "image_token_id": 7}, {"image_token_index": 7}, {"image_token_id": 7}],
)
def test_the_first_image_token_that_is_not_null_counts(ids):
    assert PaliGemmaConfig.from_dict({"model_type": "paligemma"} | ids).image_token_id == 7


def test_a_config_tolerates_unknown_keys_and_refuses_unknown_models():
    config = PaliGemmaConfig.from_dict({"model_type": "paligemma", "novelty": 1, "text_config": {"novelty": 2}})
    assert config.text_config == GemmaConfig() and config.vision_config == SiglipVisionConfig()
    for data in (
        {"model_type": "llava"},
        {"model_type": "paligemma", "text_config": {"model_type": "gemma3"}},
        {"model_type": "paligemma", "vision_config": {"model_type": "clip_vision_model"}},
    ):
        with pytest.raises(UserError):
            PaliGemmaConfig.from_dict(data)


@pytest.mark.parametrize(
    ("field", "text", "vision"),
    [
        ("hidden_activation", dict(hidden_act="swish"), {}),
        ("hidden_activation", dict(model_type="gemma2", hidden_activation="gelu_fast"), {}),
        ("attention_bias", dict(attention_bias=True), {}),
        ("attention_dropout", dict(attention_dropout=0.1), {}),
        ("rope_parameters", dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), {}),
        ("rope_parameters", dict(rope_scaling=dict(type="dynamic", factor=4.0)), {}),
        ("layer_types", dict(model_type="gemma2", layer_types=["full_attention"]), {}),
        ("layer_types", dict(model_type="gemma2", num_hidden_layers=1, layer_types=["chunked_attention"]), {}),
        ("hidden_act", {}, dict(hidden_act="tanh")),
        ("attention_dropout", {}, dict(attention_dropout=0.1)),
        ("hidden_size", dict(hidden_size="2048"), {}),
        ("num_hidden_layers", dict(num_hidden_layers=10**9), {}),
        ("head_dim", dict(head_dim=0), {}),
        ("head_dim 7: must be even", dict(head_dim=7), {}),
        ("no factor", dict(rope_parameters=dict(rope_type="linear")), {}),
        ("rope_factor", dict(rope_parameters=dict(rope_type="linear", factor=0)), {}),
        ("rope_theta", dict(rope_theta=-1.0), {}),
        ("layer_types", dict(model_type="gemma2", layer_types=5), {}),
        ("layer_types", dict(model_type="gemma2", layer_types=[["full_attention"]]), {}),
        ("patch_size", {}, dict(patch_size=14.5)),
        ("vision_config", {}, [1]),
    ],
)
def test_config_fields_that_are_not_supported_are_refused_by_name(field, text, vision):
    with pytest.raises(UserError, match=field):
        PaliGemmaConfig.from_dict({"model_type": "paligemma", "text_config": text, "vision_config": vision})


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_in_transformers_and_back(family, tmp_path):
    import transformers

    hf, ours = tiny.pair(family)
    batch = tiny.batch()
    expected = hf(**batch)
    ours.save_pretrained(tmp_path / "ours")
    back = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    torch.testing.assert_close(back(**batch).logits, expected.logits, atol=1e-5, rtol=0)
    hf.save_pretrained(tmp_path / "hf")
    again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert again.config == ours.config
    torch.testing.assert_close(again(**batch).loss, expected.loss, atol=1e-5, rtol=0)
    again.save_pretrained(tmp_path / "hf")  # over the very files it is mapped from
    torch.testing.assert_close(again(**batch).loss, expected.loss, atol=1e-5, rtol=0)


def test_the_wrong_family_is_refused(tmp_path):
    hf = tiny.hf_model("gemma2")
    hf.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "gemma"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="Gemma 2"):
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)


def test_gradient_checkpointing_changes_nothing():
    model = tiny.ours_like(tiny.hf_model("gemma")).train()
    batch = tiny.batch()
    model(**batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], atol=1e-6, rtol=1e-5)
