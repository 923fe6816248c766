"""The included models agree with transformers, and do what their READMEs say."""

import json
from pathlib import Path

import pytest
import torch
from pretrain import Config, PhiTask, Task, measure
from safetensors.torch import load_file

from checkpoint import resolve_run
from files import open_image, read_json
from haystack import read_pool
from models import classes_of

ASSETS = Path(__file__).parent.parent / "assets"
NANO, PHI_NANO = ASSETS / "paligemma-nano", ASSETS / "phi-nano"
SAMPLE = ASSETS / "sample"


@pytest.fixture(scope="module", params=[NANO, PHI_NANO], ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def model(folder):
    return classes_of(folder)[0].from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder):
    return classes_of(folder)[1].from_pretrained(folder)


def test_the_included_model_is_small(folder, model):
    assert 5e6 <= sum(p.numel() for p in model.parameters()) <= 7e6
    assert sum(f.stat().st_size for f in folder.iterdir()) <= {NANO: 16e6, PHI_NANO: 12e6}[folder]


def test_the_included_model_is_found_from_any_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_run(f"assets/{folder.name}")[0]) == folder.resolve()


@pytest.mark.parametrize("folder", [NANO], indirect=True)
def test_transformers_reads_it_and_agrees(model, processor):
    import transformers

    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32).eval()
    their_processor = transformers.AutoProcessor.from_pretrained(NANO, backend="pil")
    images = [open_image(SAMPLE / "fruit.png"), open_image(SAMPLE / "animals.png")]
    text, suffix = (
        ["caption en", "detect penguin"],
        ["red apple, banana", "<loc0032><loc0032><loc0480><loc0480> penguin"],
    )
    ours = processor(images, text, suffix)
    found = their_processor(
        images=images, text=["<image>" + t for t in text], suffix=suffix, return_tensors="pt", padding=True
    )
    for key in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert torch.equal(found[key], ours[key]), key
    torch.testing.assert_close(found["pixel_values"], ours["pixel_values"], atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = theirs(**ours)
        out = model(**ours, logits_to_keep=ours["input_ids"].shape[1])
    valid = ours["attention_mask"].bool()
    torch.testing.assert_close(out.logits[valid], expected.logits[valid], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=0)
    prompts = processor(images, text)
    assert (
        model.generate(**prompts, max_new_tokens=12).tolist() == theirs.generate(**prompts, max_new_tokens=12).tolist()
    )


@pytest.mark.parametrize("folder", [PHI_NANO], indirect=True)
def test_tower_and_decoder_of_phi_nano_agree_with_transformers(model, processor):
    """transformers has both parts, but not the module that joins them."""
    import transformers

    config, weights = read_json(PHI_NANO / "config.json"), load_file(PHI_NANO / "model.safetensors")
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config["vision_config"])).eval()
    start = "model.vision_embed_tokens.img_processor.vision_model."
    tower = {key.removeprefix(start): tensor.float() for key, tensor in weights.items() if key.startswith(start)}
    clip.load_state_dict(tower, strict=True)
    names = transformers.Phi3Config().to_dict().keys() - {"model_type", "architectures"}
    decoder_config = transformers.Phi3Config(**{key: config[key] for key in names & config.keys()})
    decoder = transformers.Phi3ForCausalLM(decoder_config).eval()
    decoder.load_state_dict(
        {key: tensor.float() for key, tensor in weights.items() if "vision_embed_tokens" not in key}, strict=True
    )
    batch = processor([open_image(SAMPLE / "fruit.png"), open_image(SAMPLE / "animals.png")], ["caption en"] * 2)
    with torch.no_grad():
        crops = batch["pixel_values"].flatten(0, 1)
        expected = clip(crops, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(model.model.vision_tower(crops), expected, atol=2e-4, rtol=1e-4)
        features = model.model.image_features(batch["pixel_values"], batch["image_sizes"])
        embedded = model.model.embed(batch["input_ids"], features)
        expected = decoder(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
        logits = model(**batch).logits
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_it_captions_and_finds_trained_drawings_in_new_arrangements(folder, model, processor):
    """The minimum accuracies that it was made for; its README has the exact numbers."""
    task_class = {NANO: Task, PHI_NANO: PhiTask}[folder]
    task = task_class(Config(), read_pool(splits=("train",)), processor, augment=False)
    scores = measure(model, task, 128, seed=99)
    assert scores["caption_1x1"] >= 0.9 and scores["detect_2x2"] >= 0.9


def test_the_readme_of_the_included_model_shows_its_metrics(folder):
    metrics = json.loads((folder / "pretraining.json").read_text())["metrics"]
    readme = (folder / "README.md").read_text()
    for scores in metrics["scores"].values():
        for rate in scores.values():
            assert f"{100 * rate:.1f}" in readme
