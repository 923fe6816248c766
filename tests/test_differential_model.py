"""Whole models with differential attention: configurations, masks, cache, precision, LoRA, saving; and the defects of
arXiv 2507.15875's code that only show in whole models."""

import errno
import json

import peft
import pytest
import tiny
import torch
from refusals import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_differential import build, family_of, layer, logits, stir

import adapters
import differential_attention as da
import files
from adapters import load_differential, save_differential
from attention import PrefixMask
from checkpoint import DIFFERENTIAL
from diagnostics import lambda_values
from differential_attention import PRESETS, DifferentialAttention, DifferentialConfig, set_progress
from errors import UserError
from modeling_gemma import PaliGemmaForConditionalGeneration
from modeling_vlm import KVCache

BOTH = dict(towers=("text", "vision"))
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
LORA = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def adapt(model, seed=0, dropout=0.0):
    """Add LoRA as a training script does, then unfreeze the differential parameters."""
    model.requires_grad_(False)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=LORA)
    adapted = peft.get_peft_model(model, config)
    da.unfreeze_differential(adapted)
    return adapted


def steps(model, count, lr=1e-2, batches=None):
    """AdamW on one batch, as in a run: no weight decay, progress set before each step. Returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for step in range(count):
        set_progress(model, (step + 1) / count)
        loss = model(**tiny.batch(seed=step if batches is None else 0)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- configuration
REFUSED = {
    "unknown": dict(preset="v3"),
    "second": dict(second="twin"),
    "lambda_kind=matrix: choose from vectors, token, scalar, fixed": dict(lambda_kind="matrix"),
    "towers": dict(towers=("audio",)),
    "is empty: give text": dict(towers=()),
    "rank": dict(rank=0),
    "lambda_warmup": dict(lambda_warmup=2.0),
    "never learn": dict(preset="additive", lambda_kind="scalar"),
    "would never": dict(second="none"),
    "replace needs": dict(preset="additive", second="pairs"),
    "would undo it": dict(preset="dex", combine="normalised", lambda_start=0.5),
    "rotate_halves needs": dict(rotate_halves=True),
    "leave out anneal, flip_sign": dict(preset="additive", flip_sign=True),
    "and lambda_warmup": dict(preset="norm_only", lambda_warmup=0.5),
    "expected a finite number": dict(preset="dex", lambda_start=float("nan")),
    "at 0 nothing": dict(lambda_start=0.0),
    "at most at 0.9": dict(lambda_start=0.95),
    "seed=2147483648: expected int <= 2147483647": dict(seed=1 << 31),
    "layers 0 to 2": dict(layers=(1, 3)),
    "layers \\(-1,\\)": dict(layers=(-1,)),
    "layers \\(\\)": dict(layers=()),
    "v1_width": dict(preset="v1"),
    "no grouped queries": dict(preset="grouped", towers=("vision",)),
    "another noise_ratio": dict(preset="grouped", noise_ratio=3),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_configuration_that_cannot_work_is_refused_in_one_line(message):
    with pytest.raises(UserError, match=message) as caught:
        build(**{"preset": "split"} | REFUSED[message], family="gemma")
    assert "\n" not in str(caught.value)


def test_heads_that_cannot_be_split_are_refused():
    with pytest.raises(UserError, match="dim 6"):
        layer("v1_width", width=6)


def test_configurations_round_trip_through_json_and_distinguish_methods():
    config = DifferentialConfig("v2", towers=("text", "vision"), layers=(0, 2))
    assert DifferentialConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="'novelty'"):
        DifferentialConfig.from_dict({"novelty": 1})
    split = DifferentialConfig()
    assert split.same_method(DifferentialConfig(seed=3, lambda_lr=2.0, lambda_start=0.2))
    assert not split.same_method(DifferentialConfig(rank=8))
    assert not split.same_method(DifferentialConfig("flipped"))
    fixed = DifferentialConfig("lambda_fixed")
    assert not fixed.same_method(DifferentialConfig("lambda_fixed", lambda_start=0.2))


def test_only_lambda_parameters_have_lambda_in_their_name():
    for preset in PRESETS:
        model = build(preset)
        for name, parameter in da.differential_parameters(model).items():
            assert ".self_attn.differential." in name
            inside = name.partition(".differential.")[2]
            assert not any(part in inside for part in PROJECTIONS)
            assert parameter.dtype == torch.float32
        learnable = {name for name in da.trainable_names(DifferentialConfig(preset).resolve()) if "lambda" in name}
        assert bool(learnable) == (DifferentialConfig(preset).resolve().lambda_kind != "fixed")


def test_towers_and_layers_are_chosen():
    def where(**changes):
        return sorted(name.removeprefix("model.") for name in da.differential_modules(build("split", **changes)))

    text = [f"language_model.layers.{i}.self_attn.differential" for i in range(3)]
    vision = [f"vision_tower.encoder.layers.{i}.self_attn.differential" for i in range(2)]
    assert where() == text and where(towers=("vision",)) == vision
    assert where(towers=("text", "vision")) == text + vision
    assert where(layers=(2, 0)) == [text[0], text[2]]
    batch = tiny.batch()
    found = [logits(stir(build("split", **c)), batch) for c in ({}, dict(towers=("vision",)), dict(layers=(1,)))]
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(found) for b in found[:i])
    start = da.differential_parameters(build("split"))
    down = [parameter for name, parameter in start.items() if "second_down" in name]
    assert not torch.equal(down[0], down[1])
    assert not torch.equal(down[0], next(iter(da.differential_parameters(build("split", seed=1)).values())))
    for name, parameter in da.differential_parameters(build("split", layers=(2,))).items():
        assert torch.equal(parameter, start[name])  # a layer's start does not depend on the other layers


def test_all_layers_and_towers_have_one_configuration():
    """A folder stores one. Replacing it everywhere is allowed."""
    model = build("split")
    with refused("differential preset split", "other layers already have split with other choices"):
        da.add_differential(model, DifferentialConfig("split", towers=("vision",), rank=4))
    with refused("differential preset v2", "other layers already have split"):
        da.add_differential(model, DifferentialConfig("v2", layers=(1,)))
    da.add_differential(model, DifferentialConfig("v2", towers=("text", "vision")))
    assert {module.config.preset for module in da.differential_modules(model).values()} == {"v2"}


# ---- masks
@pytest.mark.parametrize("preset", PRESETS)
def test_defect_i_nothing_leaks(preset):
    model = stir(build(preset))
    batch = tiny.batch(prefixes=(5, 5), suffixes=(4, 4), side="left" if preset == "split" else "right")
    length = batch["input_ids"].shape[1]
    before = logits(model, batch)
    for position in range(length - 4, length):
        changed = batch | {"input_ids": batch["input_ids"].clone()}
        changed["input_ids"][:, position] = 77
        moved = (logits(model, changed) - before).abs().amax((0, 2)) > 1e-4
        assert not moved[:position].any() and moved[position]
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, length - 6] = 77  # in the prefix: one block, every row sees it
    assert ((logits(model, changed) - before).abs().amax((0, 2)) > 1e-6).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_pads_change_nothing(preset):
    model = stir(build(preset))
    losses = [model(**tiny.batch(side=side)).loss for side in ("left", "right")]
    torch.testing.assert_close(*losses, atol=2e-5, rtol=0)
    batch = tiny.batch()
    other = batch | {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 55)}
    assert torch.equal(model(**batch).loss, model(**other).loss)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_of_pads_gives_no_nan(preset):
    model, batch = stir(build(preset)), tiny.batch()
    for key in ("attention_mask", "token_type_ids"):
        batch[key][1] = 0
    batch["labels"][1] = -100
    model(**batch).loss.backward()
    assert logits(model, batch).isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# ---- generation
@pytest.mark.parametrize("preset", PRESETS)
def test_cached_logits_and_greedy_tokens_equal_uncached(preset):
    # amplified half as much: the gap is float32's, and grows with the weights in either arm
    model = stir(build(preset, towers=("text",), amplify=3.0), scale=0.1)
    batch, new = tiny.prompts(prefixes=(5, 2, 4)), 5
    decoder, length = model.model.language_model, batch["input_ids"].shape[1]
    found = model.generate(**batch, max_new_tokens=new)[:, length:]
    with torch.no_grad():
        prompt = model.model.embed(batch["input_ids"], model.model.image_features(batch["pixel_values"]))
        x = torch.cat((prompt, decoder.embed(found)), dim=1)
        valid = torch.cat((batch["attention_mask"], torch.ones_like(found)), dim=1)
        suffix = torch.cat((batch["token_type_ids"], torch.ones_like(found)), dim=1)
        positions = model.model.positions(valid)
        full = model.head(decoder(x, positions, PrefixMask.from_tensors(valid, suffix)))
        cache = KVCache(decoder, 3, length + new, torch.float32, "cpu")
        mask, at = PrefixMask.from_tensors(batch["attention_mask"]), slice(0, length)
        for step in range(found.shape[1]):
            last, expected = model.head(decoder(x[:, at], positions[:, at], mask, cache)[:, -1]), full[:, at.stop - 1]
            assert (last - expected).norm() <= 1e-6 * expected.norm()
            alive = (found[:, :step] != tiny.EOS).all(1)
            assert torch.equal(expected.argmax(-1)[alive], found[alive, step])
            mask, at = mask.extend_by_one(), slice(at.stop, at.stop + 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_kv_cache_has_only_the_key_heads_that_are_needed(preset):
    standard, ours = (
        KVCache(build(name, family_of(preset)).model.language_model, 2, 9, torch.float32, "cpu")
        for name in (None, preset)
    )
    size = [sum(t.numel() for t in cache.keys) for cache in (standard, ours)]
    assert size[1] == size[0] * (2 if preset == "difflora" else 1)
    assert [t.shape for t in ours.values] == [t.shape for t in standard.values]
    if preset == "difflora":  # only layers that have keys of their own hold more
        cache = KVCache(build(preset, layers=(1,)).model.language_model, 2, 9, torch.float32, "cpu")
        assert [t.shape[1] for t in cache.keys] == [1, 2, 1]


@pytest.mark.parametrize("preset", ["split", "difflora", "v1"])
def test_a_left_padded_batch_equals_its_rows(preset):
    model = stir(build(preset))
    batch = tiny.prompts(prefixes=(6, 1, 3))
    together = model.generate(**batch, max_new_tokens=6)[:, -6:]
    for row in range(3):
        start = int((batch["attention_mask"][row] == 0).sum())
        alone = {key: batch[key][row : row + 1, start:] for key in ("input_ids", "attention_mask")}
        out = model.generate(**alone, pixel_values=batch["pixel_values"][row : row + 1], max_new_tokens=6)
        answer = out[0, alone["input_ids"].shape[1] :].tolist()  # may end sooner alone
        assert answer == together[row, : len(answer)].tolist()


# ---- ways to run
@pytest.mark.parametrize("preset", ["split", "v1", "v2", "dex"])
def test_gradient_checkpointing_and_compilation_change_nothing(preset):
    model = stir(build(preset, **({} if preset == "v1" else BOTH))).train()
    batch = tiny.batch()

    def grads():
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, plain = grads()
    assert any(".differential." in name for name in plain)
    model.gradient_checkpointing_enable()
    recomputed = grads()
    model.gradient_checkpointing_enable(False)
    torch._dynamo.reset()
    for block in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        block.compile(fullgraph=True, backend="eager")
    for other, found in (recomputed, grads()):
        torch.testing.assert_close(other, loss)
        for name, expected in plain.items():
            torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)
    set_progress(model, 0.9)  # a tensor: no new graph
    with torch.compiler.set_stance("fail_on_recompile"):
        model(**batch)


@pytest.mark.parametrize("preset", PRESETS)
def test_masters_stay_float32_in_a_bfloat16_model(preset):
    model = build(preset).to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for module in da.differential_modules(model).values():
        assert all(t.dtype in (torch.float32, torch.bool) for t in (*module.parameters(), *module.buffers()))
    model(**tiny.batch()).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in da.differential_parameters(model).values() if p.requires_grad)
    low = logits(model, tiny.batch())
    assert low.dtype == torch.bfloat16 and low.isfinite().all()
    model = stir(build(preset, towers=("text",)))
    strengths = lambda_values(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**tiny.batch()).loss.isfinite() and lambda_values(model) == strengths  # not rounded


def test_bfloat16_from_the_bound_of_lambda_trains_without_nan():
    adapted = adapt(build("split", lambda_start=da.LAMBDA_MAX, **BOTH).to(torch.bfloat16))
    start = list(lambda_values(adapted).values())
    losses = steps(adapted, 200, lr=4e-4, batches=1)
    assert all(torch.tensor(losses).isfinite()) and losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in adapted.parameters())
    assert all(0 < found <= da.LAMBDA_MAX + 1e-6 for found in lambda_values(adapted).values())
    assert start != list(lambda_values(adapted).values())


# ---- LoRA and training
@pytest.mark.parametrize("preset", PRESETS)
def test_exactly_the_declared_parameters_train_beside_lora(preset):
    """Defects d and j: parameters that should train were frozen, and the trained model had another class."""
    adapted = adapt(build(preset))
    assert any(isinstance(module, DifferentialAttention) for module in adapted.modules())
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    declared = da.trainable_names(DifferentialConfig(preset).resolve())
    assert all("lora_" in name or name.rpartition(".")[2] in declared for name in trained)
    assert {name.rpartition(".")[2] for name in trained if "lora_" not in name} == declared
    assert not any("lora_" in name and ".differential." in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_trainable_parameters_learn_and_are_saved(preset, tmp_path):
    adapted = adapt(build(preset))
    trained = da.unfreeze_differential(adapted)
    assert {name.rpartition(".")[2] for name in trained} == da.trainable_names(DifferentialConfig(preset).resolve())
    before = {name: p.detach().clone() for name, p in da.differential_parameters(adapted).items()}
    steps(adapted, 2)
    gradients = {name: p.grad for name, p in da.differential_parameters(adapted).items()}
    steps(adapted, 2)
    save_differential(adapted, tmp_path)
    saved = load_file(tmp_path / DIFFERENTIAL)
    for name, parameter in da.differential_parameters(adapted).items():
        assert torch.equal(saved[name], parameter)
        assert torch.equal(parameter, before[name]) == (name not in trained), name
        if "lambda" in name or "norm_gain" in name:
            assert gradients[name].abs().max() > 0, name


def test_lambda_zero_moves_nothing_but_lora():
    adapted = adapt(build("lambda_zero"))
    before = [p.clone() for p in da.differential_parameters(adapted).values()]
    steps(adapted, 2)
    assert all(torch.equal(*pair) for pair in zip(before, da.differential_parameters(adapted).values(), strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_adding_differential_attention_leaves_the_random_state_alone(preset):
    """With the same seed LoRA's initial weights and the dropout masks are bit-equal in both arms."""
    standard, model = (build(family=family_of(preset)) for _ in range(2))
    before = torch.get_rng_state()
    da.add_differential(model, preset)
    assert torch.equal(torch.get_rng_state(), before)
    standard, adapted = (adapt(arm, dropout=0.5) for arm in (standard, model))
    expected = dict(standard.named_parameters())
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, expected[name]), name
    if PRESETS[preset].exact:
        losses = []
        for arm in (standard, adapted):
            torch.manual_seed(5)
            losses.append(arm.train()(**tiny.batch()).loss)
        assert torch.equal(*losses)


def test_random_models_are_the_same_in_both_arms():
    config = build().config
    torch.manual_seed(0)
    standard = PaliGemmaForConditionalGeneration(config)
    torch.manual_seed(0)
    ours = PaliGemmaForConditionalGeneration(config, differential="split")
    found = ours.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in standard.state_dict().items())
    assert torch.equal(logits(ours.eval(), tiny.batch()), logits(standard.eval(), tiny.batch()))


# ---- saving and loading
@pytest.fixture
def base(tmp_path):
    build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def run_folder(folder, base, adapted):
    adapted.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    save_differential(adapted, folder)
    files.write_json(folder / "run.json", {"base_model": str(base)})
    return folder


@pytest.mark.parametrize("preset", ["split", "v2", "v1_width", "dex", "src_siglip_split"])
def test_a_run_folder_and_its_base_are_enough(preset, base, tmp_path):
    """Save, load, merge, save whole, load: equal logits, lambda kept."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(base, differential=DifferentialConfig(preset, **BOTH))
    adapted = adapt(model)
    steps(adapted, 3)
    adapted.eval()
    batch = tiny.batch()
    expected, strengths = logits(model, batch), lambda_values(model)
    folder = run_folder(tmp_path / "final", base, adapted)
    assert not any(".differential." in key for key in load_file(folder / "adapter/adapter_model.safetensors"))

    back = PaliGemmaForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(logits(back, batch), expected) and lambda_values(back) == strengths
    assert da.differential_config(back) == da.differential_config(model)

    adapted.merge_adapter()
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=1e-5)
    adapted.unmerge_adapter()
    merged = adapted.merge_and_unload()
    assert merged is model and lambda_values(merged) == strengths
    torch.testing.assert_close(logits(merged, batch), expected, atol=1e-5, rtol=1e-5)
    expected = logits(merged, batch)
    merged.save_pretrained(tmp_path / "merged")
    again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again, batch), expected) and lambda_values(again) == strengths
    assert all(p.dtype == torch.float32 for p in da.differential_parameters(again).values())


def test_defect_e_a_resumed_run_equals_the_uninterrupted_one(base, tmp_path):
    """Loading overwrites the initial parameters, whatever their seed; the next losses are equal."""
    adapted = adapt(PaliGemmaForConditionalGeneration.from_pretrained(base, differential="v1_width"))
    steps(adapted, 3)
    folder = run_folder(tmp_path / "run", base, adapted)
    config = DifferentialConfig("v1_width", seed=9)
    model = PaliGemmaForConditionalGeneration.from_pretrained(base, differential=config)
    model.requires_grad_(False)
    resumed = adapters.attach_adapter(model, folder / "adapter", trainable=True)
    load_differential(resumed, folder)
    da.unfreeze_differential(resumed)
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (adapted, resumed)]
    assert trained[0] == trained[1]
    adapted.train(), resumed.train()
    assert steps(adapted, 3) == steps(resumed, 3)


def test_a_standard_model_saved_over_a_differential_one_replaces_it(tmp_path):
    build("split").save_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    assert not (tmp_path / DIFFERENTIAL).exists()
    assert da.differential_config(PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)) is None


def test_progress_is_saved(tmp_path):
    model = build("dex", lambda_start=0.4)
    set_progress(model, 0.25)
    model.save_pretrained(tmp_path)
    again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert lambda_values(again) == lambda_values(model) and min(lambda_values(model).values()) > 0


def test_a_second_query_and_its_bias_start_as_the_loaded_ones(base):
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        base, dtype=torch.bfloat16, differential=DifferentialConfig("v2", **BOTH)
    )
    for block in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        attend = block.self_attn
        assert torch.equal(attend.differential.second_query, attend.q_proj.weight.float())
        if attend.q_proj.bias is not None:
            assert torch.equal(attend.differential.second_bias, attend.q_proj.bias.float())


def test_an_older_adapter_gains_differential_attention(base, tmp_path):
    adapted = adapt(PaliGemmaForConditionalGeneration.from_pretrained(base))
    steps(adapted, 2)
    folder = run_folder(tmp_path / "lora", base, adapted)
    assert not (folder / DIFFERENTIAL).exists()
    expected = logits(adapted.eval(), tiny.batch())
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, differential="split")
    assert da.differential_config(model).preset == "split"
    torch.testing.assert_close(logits(model, tiny.batch()), expected, atol=1e-5, rtol=1e-5)


def rewrite(folder, change, metadata=None):
    file = folder / DIFFERENTIAL
    with safe_open(file, "pt") as handle:
        stored = handle.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=stored if metadata is None else metadata)


NAME = "model.language_model.layers.1.self_attn.differential.lambda_logit"
STORED = DifferentialConfig("split").resolve().to_dict()
UNPAIRED = {key: value for key, value in STORED.items() if key != "pairing"}


@pytest.mark.parametrize(
    ("message", "change", "metadata"),
    [
        ("is missing for", lambda t: t.pop(NAME), None),
        ("has no place in", lambda t: t.update({NAME + "x": torch.ones(1)}), None),
        ("has shape", lambda t: t.update({NAME: torch.ones(2)}), None),
        ("no differential configuration", lambda t: None, {"format": "pt"}),
        ("config: Expected object", lambda t: None, {"config": "[", "progress": "0"}),
        ("its configuration has no 'pairing'", lambda t: None, {"config": json.dumps(UNPAIRED), "progress": "0"}),
        ("is unknown", lambda t: None, {"config": json.dumps(STORED | {"preset": "v9"}), "progress": "0"}),
    ],
)
def test_defect_k_a_file_that_does_not_fit_is_refused_in_one_line(message, change, metadata, tmp_path):
    stir(build("split")).save_pretrained(tmp_path)
    rewrite(tmp_path, change, metadata)
    with pytest.raises(UserError, match=message) as caught:
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert str(tmp_path / DIFFERENTIAL) in str(caught.value) and "\n" not in str(caught.value)


def test_another_configuration_or_a_broken_file_is_refused(base, tmp_path):
    stir(build("split")).save_pretrained(tmp_path / "split")
    for other in ("v2", DifferentialConfig(rank=4), DifferentialConfig(layers=(0,))):
        with pytest.raises(UserError, match="has differential attention of preset split"):
            PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "split", differential=other)
    with pytest.raises(UserError, match="built with none"):
        load_differential(build(), tmp_path / "split")
    same = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "split", differential="split")
    assert torch.equal(logits(same, tiny.batch()), logits(stir(build("split")), tiny.batch()))
    with pytest.raises(UserError, match="read"):
        load_differential(build("split"), base)  # no such file there
    file = tmp_path / "split" / DIFFERENTIAL
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="truncated or corrupt"):
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "split")


def test_a_run_of_v1_on_one_kv_head_names_the_fix(base):
    with pytest.raises(UserError, match="v1_width"):
        PaliGemmaForConditionalGeneration.from_pretrained(base, differential="v1")


def test_saving_is_atomic(tmp_path, monkeypatch):
    save_differential(build("split"), tmp_path / "new")  # makes the folder
    before = (tmp_path / "new" / DIFFERENTIAL).read_bytes()

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("adapters.save_file", full_disk)
    with pytest.raises(UserError, match="free some space"):
        save_differential(stir(build("split")), tmp_path / "new")
    assert [file.read_bytes() for file in (tmp_path / "new").iterdir()] == [before]
