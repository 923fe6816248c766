"""The differential arm in the whole training loop: the same conditions as the baseline, and a lambda that learns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from runs import crash, logged, saved_differential, saved_lora
from safetensors import safe_open
from safetensors.torch import save_file

import run_folder
import training
from attention_formula import apply_maps
from data import loader, make_data
from diagnostics import decoder_maps, effective_map, first_map, subtracted_map
from differential_attention import PRESETS, DifferentialConfig, differential_parameters, trainable_names
from errors import UserError
from files import write_manifest
from finetune_diff import Config
from finetune_original import finetune
from modeling_gemma import PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor


@pytest.fixture
def config(tiny_model, tmp_path):
    return tiny.quick(Config, tiny_model, tmp_path, max_steps=4, warmup_steps=1, eval_every=2)


def train(config: Config) -> Config:
    """Train the differential arm; returns its configuration."""
    finetune(config, "diff", config.differential)
    return config


def test_both_arms_start_from_the_same_weights_batches_and_dropout(config, tmp_path):
    """split is exact at step 0: with equal adapters, rows and masks the first loss is bit-equal."""
    config = replace(config, lora_dropout=0.3)
    train(config)
    original = replace(config, output_dir=str(tmp_path / "original"))
    finetune(original, "original")
    ours, theirs = dict(logged(config)), dict(logged(original))
    assert ours[1] == theirs[1] and ours[4] != theirs[4]


def test_lambda_learns_is_logged_and_is_saved(config, capsys):
    train(config)
    printed = capsys.readouterr().out
    assert (
        "language_model differential: " in printed and "differential parameters changed by training: 6 of 6" in printed
    )
    values = [line["model.language_model.layers.1.self_attn.differential"] for _, line in logged(config, "lambda")]
    assert len(values) == 4 and values[0] == 0.5 and values[-1] != 0.5
    norms = logged(config, "differential_grad_norm")
    assert len(norms) == 4 and all(len(layers) == 2 and min(layers.values()) > 0 for _, layers in norms)
    assert [step for step, _ in logged(config, "inside")] == [0, 2, 4]
    _, measured = logged(config, "inside")[-1]
    keys = {"lambda", "cosine", "distance", "entropy1", "entropy2"}
    assert all(keys <= layer.keys() for layer in measured.values())
    logits = {name: t for name, t in saved_differential(config).items() if "lambda" in name}
    assert len(logits) == 2 and all(t.item() != 0.0 for t in logits.values())


def test_lambda_warms_up_over_its_share_of_training(config):
    """Update k of n runs at progress k / n: lambda reaches its full value at the end of its warm-up."""
    differential = DifferentialConfig("lambda_fixed", lambda_start=0.4, lambda_warmup=0.5)
    train(replace(config, differential=differential.resolve()))
    for _, layers in logged(config, "lambda"):
        assert len(set(layers.values())) == 1
    assert [next(iter(layers.values())) for _, layers in logged(config, "lambda")] == pytest.approx(
        [0.2, 0.4, 0.4, 0.4]
    )


@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_modules_are_listed_once_and_have_the_progress_of_training_only_where_lambda_follows_it(
    config, monkeypatch, warmup
):
    lists, real = [], training.differential_modules
    monkeypatch.setattr(training, "differential_modules", lambda model: lists.append(real(model)) or lists[-1])
    train(replace(config, differential=replace(config.differential.resolve(), lambda_warmup=warmup)))
    (modules,) = lists
    assert [module.progress.item() for module in modules.values()] == [1.0 if warmup else 0.0] * 2


def test_dex_selects_half_of_the_heads_and_a_run_that_goes_on_keeps_them(config, tmp_path):
    config = replace(config, differential=DifferentialConfig("dex"), max_steps=1)
    train(config)
    selected = {name: t for name, t in saved_differential(config).items() if name.endswith("selected")}
    assert selected and all(t.sum() == len(t) // 2 for t in selected.values())
    other = {name: 1 - t for name, t in selected.items()}  # as if other rows had chosen
    file = Path(config.output_dir) / "final" / "differential.safetensors"
    with safe_open(file, "pt") as stored:
        save_file(saved_differential(config) | other, file, metadata=stored.metadata())
    write_manifest(file.parent)
    more = replace(config, model=config.output_dir, output_dir=str(tmp_path / "more"))
    train(more)
    kept = saved_differential(more)
    assert all(torch.equal(kept[name], t) for name, t in other.items())


def test_gradient_norms_are_logged_before_clipping(config, tmp_path):
    norms = []
    for clip in (1e9, 1e-3):
        clipped = replace(config, clip=clip, output_dir=str(tmp_path / str(clip)), max_steps=1)
        train(clipped)
        norms.append(logged(clipped, "differential_grad_norm")[0][1])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_the_saved_run_computes_what_was_trained(config, monkeypatch):
    trained = []
    evaluate = training.evaluate
    monkeypatch.setattr(training, "evaluate", lambda *args: trained.append(args[0].model) or evaluate(*args))
    train(config)
    loaded = PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)
    processor = PaliGemmaProcessor.from_pretrained(config.output_dir)
    source, _ = make_data(config)
    ((_, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=True)
    assert torch.equal(trained[0].eval()(**batch).loss, loaded(**batch).loss)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    assert not torch.equal(plain(**batch).loss, loaded(**batch).loss)


@pytest.mark.parametrize("preset", ["split", "dex"])  # dex: lambda follows the progress of training
def test_an_interrupted_run_ends_like_the_uninterrupted_one(config, tmp_path, preset):
    config = train(replace(config, differential=DifferentialConfig(preset), max_steps=6))
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    crash(cut, 4, "diff", cut.differential)
    train(cut)
    for key in ("loss", "eval", "lambda", "inside"):
        assert logged(cut, key) == logged(config, key)
    for saved in (saved_lora, saved_differential):
        tensors, expected = saved(cut), saved(config)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "v1"])
def test_every_preset_trains(config, preset):
    config = train(replace(config, max_steps=2, differential=DifferentialConfig(preset)))
    assert len(logged(config)) == 2
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)
    learnable = {name for name in differential_parameters(model) if "lambda" in name}
    declared = {name for name in trainable_names(config.differential.resolve()) if "lambda" in name}
    assert {name.rpartition(".")[2] for name in learnable} >= declared


def test_first_adapters_batches_and_dropout_of_both_arms_are_bit_equal(config, tmp_path, monkeypatch):
    steps = []  # of every update: LoRA before it, its batch, the random state that dropout draws from
    real = training.add_lora

    def record(adapted, _, batch):
        if adapted.training:
            lora = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
            tensors = {key: t for key, t in batch.items() if key != "plan"}  # follows from them
            steps.append((lora, tensors, torch.get_rng_state()))

    def add_lora(*args):
        adapted = real(*args)
        adapted.register_forward_pre_hook(record, with_kwargs=True)
        return adapted

    monkeypatch.setattr(training, "add_lora", add_lora)
    train(config)
    finetune(replace(config, output_dir=str(tmp_path / "original")), "original")
    ours, theirs = steps[: len(steps) // 2], steps[len(steps) // 2 :]
    assert len(ours) == 4 and len(ours[0][0]) == 28
    assert all(torch.equal(tensor, theirs[0][0][name]) for name, tensor in ours[0][0].items())
    for (_, batch, state), (_, other_batch, other_state) in zip(ours, theirs, strict=True):
        assert torch.equal(state, other_state) and batch.keys() == other_batch.keys()
        assert all(torch.equal(batch[key], other_batch[key]) for key in batch)


@pytest.mark.parametrize("preset", [None, "split", "v2", "v1_width", "additive", "grouped", "src_gemma_samemap"])
def test_the_map_that_is_drawn_is_the_one_in_effect(config, preset):
    """The values weighted by it are the output of the layer's attention."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model, differential=preset)
    for name, p in differential_parameters(model).items():
        torch.nn.init.normal_(p, std=0.5 if "second_up" in name else 0.1)
    source, _ = make_data(config)
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    ((_, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=True)
    attend, checked = model.model.language_model.layers[1].self_attn, []

    def check(module, args, out):
        x, rotary, mask, *_ = args
        v = attend.attention_inputs(x, rotary, mask, None, None)[2]
        acting = effective_map(*decoder_maps(attend, x, rotary, mask)).unflatten(1, (v.shape[1], -1))
        weighed = apply_maps(acting, v)
        if preset in ("v1_width", "src_gemma_samemap"):  # a norm follows the map
            weighed = attend.differential.head_norm(weighed)
        weighed = weighed[:, :, -out.shape[1] :]  # the last layer only computes label rows
        torch.testing.assert_close(attend.o_proj(weighed.transpose(1, 2).flatten(2)), out, atol=1e-5, rtol=1e-4)
        a1, subtracted = (part(*decoder_maps(attend, x, rotary, mask)) for part in (first_map, subtracted_map))
        acts = effective_map(*decoder_maps(attend, x, rotary, mask))
        if preset == "split":  # normalised: A1 + gamma (A1 - A2) is the difference divided by 1 - lambda
            lambda_ = attend.differential.current_lambda(None)
            torch.testing.assert_close((a1 - subtracted) / (1 - lambda_), acts)
            torch.testing.assert_close(subtracted.sum(-1), lambda_.expand(subtracted.shape[:3]))
        elif preset != "additive":  # whose only map is the second one
            torch.testing.assert_close(a1 - subtracted, acts)
        assert bool(subtracted.any()) == (preset not in (None, "additive"))
        checked.append(1)

    attend.register_forward_hook(check)
    model(**batch)
    assert checked


def test_both_towers(config):
    config = train(replace(config, differential=DifferentialConfig(towers=("text", "vision"))))
    towers = {"vision_tower" in name for name in saved_differential(config)}
    assert towers == {True, False}


def test_a_lambda_that_does_not_move_fails_the_run(config):
    with pytest.raises(UserError, match="lambda_logit did not learn"):
        train(replace(config, differential=DifferentialConfig(lambda_lr=1e-60)))
    folder = Path(config.output_dir)
    assert (folder / "checkpoints" / "step-000004").exists() and not (folder / "final").exists()


def test_no_weight_decay_on_what_was_added_and_a_rate_of_its_own_for_lambda(config):
    differential = DifferentialConfig(lambda_lr=3.0)
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model, differential=differential)
    adapted = training.add_lora(run_folder.open_run(config, "diff"), config, model)
    groups = training.make_optimizer(replace(config, lr=1e-3, weight_decay=0.1), adapted).param_groups
    kinds = {id(p): "lambda" if "lambda" in name else "added" for name, p in differential_parameters(model).items()}
    found = {
        (kinds.get(id(p), "lora"), group["weight_decay"], group["scale"]) for group in groups for p in group["params"]
    }
    assert found == {("lambda", 0.0, 3.0), ("added", 0.0, 1.0), ("lora", 0.1, 1.0)}


def test_results_of_a_finished_baseline_are_printed_beside(config, tmp_path, capsys):
    finetune(replace(config, output_dir=str(tmp_path / "original_seed0")), "original")
    assert "original, after" not in capsys.readouterr().out
    train(config)
    assert "original, after" in capsys.readouterr().out
    ours, theirs = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("run", "original_seed0"))
    assert run_folder.differing_fields(ours, theirs) == [] and theirs["base_weights"] and "train" in theirs["data"]
    for key, value in {"base_weights": "x", "base_revision": "y", "dtype": "torch.bfloat16"}.items():
        assert run_folder.differing_fields(ours, theirs | {key: value}) == [key]
    other = theirs | {"data": theirs["data"] | {"train": {"rows": 1, "sha256": ""}}}
    assert run_folder.differing_fields(ours, other) == ["contents of train"]


def test_v1_on_one_kv_head_is_refused_before_anything_is_written(config):
    with pytest.raises(UserError, match="v1_width"):
        train(replace(config, differential=DifferentialConfig("v1")))
    assert not Path(config.output_dir).exists()


def test_the_baseline_refuses_a_differential_base(config, tmp_path):
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model, differential="split")
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="finetune_diff.py"):
        (tmp_path / "base" / "tokenizer.json").write_bytes((Path(config.model) / "tokenizer.json").read_bytes())
        finetune(replace(config, model=str(tmp_path / "base")), "original")


def test_the_configuration_is_in_run_json(config):
    train(config)
    record = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert record["config"]["differential"]["preset"] == "split" and record["arm"] == "diff"
