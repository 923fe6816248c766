"""Training the tower and projector with the language model, DoRA, rsLoRA: what changes, what is saved and loaded."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import tiny
import tiny_phi
import torch
import transformers
from PIL import Image
from refusals import refused
from runs import interrupt, logged, saved_differential, saved_lora

import adapters
import training
from data import loader, make_data
from differential_attention import DifferentialConfig
from finetune_diff import Config as DiffConfig
from finetune_original import Config, finetune
from modeling_gemma import PaliGemmaForConditionalGeneration
from modeling_phi3 import Phi3VForCausalLM
from processing_paligemma import PaliGemmaProcessor
from processing_phi3v import Phi3VProcessor
from run_folder import check_config, open_run

WAYS = {
    "vision LoRA": dict(train_vision="lora"),
    "vision and projector full": dict(train_vision="full", train_projector="full", vision_lr=1e-3),
    "projector LoRA, DoRA, rsLoRA": dict(train_projector="lora", use_dora=True, use_rslora=True),
}


@pytest.fixture
def config(tiny_model, tmp_path):
    return tiny.quick(Config, tiny_model, tmp_path, max_steps=3, warmup_steps=0, eval_every=4, eval_samples=2)


def batch_of(config: Config) -> dict[str, torch.Tensor]:
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    ((_, batch),) = loader(make_data(config)[0], processor, [[(0, 0), (0, 1)]], True)
    return batch


def logits(model, batch: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize("way", WAYS)
def test_what_trains_changes_is_saved_resumed_merged_and_read_by_peft(config, tmp_path, way):
    config = replace(config, **WAYS[way])
    finetune(config, "original")
    saved, batch = saved_lora(config), batch_of(config)
    length = batch["input_ids"].shape[1]
    for part, how in (("vision_tower", config.train_vision), ("multi_modal_projector", config.train_projector)):
        keys = {key for key in saved if part in key}
        assert bool(keys) == (how != "no") and all(("lora_" in key) == (how == "lora") for key in keys)
        if how == "full":
            base = PaliGemmaForConditionalGeneration.from_pretrained(config.model).state_dict()
            prefix = "base_model.model."
            assert all(not torch.equal(saved[key], base[key.removeprefix(prefix)]) for key in keys)

    ours = PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)
    expected = logits(ours, batch, logits_to_keep=length)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    assert (logits(plain, batch, logits_to_keep=length) - expected).abs().max() > 1e-3
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    theirs = peft.PeftModel.from_pretrained(theirs, Path(config.output_dir) / "final" / "adapter").eval()
    torch.testing.assert_close(logits(theirs, batch), expected, atol=1e-5, rtol=0)
    adapters.merge(ours)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(ours, batch, logits_to_keep=length), expected, atol=1e-5, rtol=0)

    cut = replace(config, output_dir=str(tmp_path / "cut"))
    interrupt(cut, 2)
    finetune(cut, "original")
    assert logged(cut) == logged(config)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in saved_lora(cut).items())


def test_tower_and_projector_have_learning_rates_of_their_own(config):
    config = replace(config, lr=1e-2, train_vision="lora", train_projector="full", vision_lr=1e-3, projector_lr=1e-4)
    run = open_run(config, "original")
    adapted = training.add_lora(run, config, PaliGemmaForConditionalGeneration.from_pretrained(config.model))
    rates = {id(p): group["scale"] * 1e-2 for group in training.make_optimizer(config, adapted).param_groups
             for p in group["params"]}  # fmt: skip
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            expected = 1e-3 if "vision_tower" in name else 1e-4 if "projector" in name else 1e-2
            assert rates[id(parameter)] == pytest.approx(expected), name
    counts = adapters.trainable_counts(adapted)
    assert counts["multi_modal_projector"] == [24 * 32 + 32] * 2 and counts["vision_tower"][0] == 0
    assert counts["vision_tower lora"][0] == counts["vision_tower lora"][1] > 0


def test_both_arms_start_from_the_same_weights_of_a_trained_tower(config, tiny_model, tmp_path):
    """With LoRA in the tower too, at one seed, and bit-equal losses at step 0."""
    choices = dict(train_vision="lora", train_projector="lora", use_dora=True, max_steps=1)
    differential = DifferentialConfig(towers=("text", "vision")).resolve()
    ours = replace(config, **choices)
    other = tiny.quick(DiffConfig, tiny_model, tmp_path, warmup_steps=0, eval_samples=2, differential=differential)
    other = replace(other, output_dir=str(tmp_path / "diff"), **choices)
    start = []
    for one, arm, choice in ((ours, "original", None), (other, "diff", differential)):
        model = PaliGemmaForConditionalGeneration.from_pretrained(one.model, differential=choice)
        adapted = training.add_lora(open_run(one, arm), one, model)
        start.append({name: p for name, p in adapted.named_parameters() if "lora_" in name})
        finetune(one, arm, choice)
    assert start[0].keys() == start[1].keys() and any("vision_tower" in name for name in start[0])
    assert all(torch.equal(start[0][name], tensor) for name, tensor in start[1].items())
    assert logged(ours) == logged(other)
    assert any("vision_tower" in name for name in saved_differential(other))


@pytest.mark.parametrize("how", ["lora", "full"])
def test_what_never_runs_in_a_tower_does_not_train(tmp_path, how):
    """CLIP's last layer and last norm, in a new adapter and in a stored one; a batch without images gives the tower a
    gradient of zeros."""
    folder = tiny_phi.folder(tmp_path / "phi")
    config = Config(model=str(folder), train_vision=how, train_projector="lora", output_dir=str(tmp_path / "run"))
    model = Phi3VForCausalLM.from_pretrained(folder)
    adapted = training.add_lora(open_run(config, "original"), config, model)
    adapters.save_lora(adapted, tmp_path / "adapter")
    fresh = Phi3VForCausalLM.from_pretrained(folder)
    stored = adapters.attach_adapter(fresh, tmp_path / "adapter", trainable=True)
    processor = Phi3VProcessor.from_pretrained(folder)
    with_image = processor([Image.new("RGB", (20, 20), "red")], ["where is this?"], ["No"])
    without = processor(None, ["where is this?"], ["No"])
    for wrapped in (adapted.train(), stored.train()):
        trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        assert any("vision_tower" in name for name in trained)
        assert not any("encoder.layers.2." in name or "post_layernorm" in name for name in trained)
        for batch in (with_image, without):
            wrapped.zero_grad(set_to_none=True)
            wrapped(**batch).loss.backward()
            assert [name for name, p in trained.items() if p.grad is None] == []
        assert all(not p.grad.any() for name, p in trained.items() if "vision_tower" in name)


def test_rslora_divides_by_the_root_of_the_rank(config):
    config = replace(config, lora_rank=16, lora_alpha=8.0, use_rslora=True)
    run = open_run(config, "original")
    adapted = training.add_lora(run, config, PaliGemmaForConditionalGeneration.from_pretrained(config.model))
    scales = {scale for module in adapted.modules() for scale in getattr(module, "scaling", {}).values()}
    assert scales == {2.0} and run.record["lora"]["rslora"]


def test_parts_that_cannot_train_are_refused(config, tmp_path):
    with refused("--train_vision=full", "differential"):
        finetune(replace(config, train_vision="full"), "diff", DifferentialConfig(towers=("vision",)).resolve())
    with refused("--shard=True"):
        check_config(replace(config, shard=True, train_projector="full"))
    with refused("vision_cache_gb"):
        rows = dict(data="assets/sample/rows.jsonl", vision_cache_gb=1.0)
        finetune(replace(config, train_projector="lora", **rows), "original")
    assert not Path(config.output_dir).exists()
    finetune(replace(config, max_steps=1), "original")
    with refused("its adapter does not train the vision_tower"):
        again = replace(config, model=config.output_dir, output_dir=str(tmp_path / "again"), train_vision="lora")
        finetune(again, "original")


def test_the_parts_of_phi_train_and_load(config, tmp_path):
    """They are stored in the adapter file under their names on the hub."""
    from models import classes_of

    config = replace(config, model=str(tiny_phi.folder(tmp_path / "phi")), max_steps=1, lr=1e-2)
    for number, way in enumerate(({"train_vision": "lora", "train_projector": "full"}, {"train_projector": "lora"})):
        changed = replace(config, output_dir=str(tmp_path / str(number)), **way)
        finetune(changed, "original")
        keys = set(saved_lora(changed))
        assert any("img_projection.0" in key for key in keys)
        assert any("img_processor" in key for key in keys) == ("train_vision" in way)
        model = classes_of(config.model)[0].from_pretrained(changed.output_dir)
        adapters.merge(model)
        base = classes_of(config.model)[0].from_pretrained(config.model).state_dict()
        merged = model.state_dict()
        for part, trains in (("vision_tower", "train_vision" in way), ("multi_modal_projector", True)):
            names = [name for name in base if part in name and "norm" not in name and "embed" not in name]
            assert any(not torch.equal(base[name], merged[name]) for name in names) == trains
    decoder = str(tiny_phi.folder(tmp_path / "decoder", vision=False))
    with refused("decoder alone"):
        finetune(replace(config, model=decoder, train_vision="lora", output_dir=str(tmp_path / "none")), "original")


def test_a_pattern_that_is_not_ours_is_still_refused(config):
    finetune(replace(config, max_steps=1, train_vision="lora"), "original")
    file = Path(config.output_dir) / "final" / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    adapters.read_adapter_config(file.parent)
    file.write_text(json.dumps(fields | {"target_modules": fields["target_modules"] + "|(a+)+"}))
    with refused("regular expression"):
        adapters.read_adapter_config(file.parent)
