"""The embedded model: a PaliGemma that transformers loads too, and that does what its README says."""

import json
from pathlib import Path

import pytest
import torch
from pretrain import Config, Task, measure

from checkpoint import resolve_run
from files import open_image
from haystack import read_pool
from modeling_gemma import PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor

NANO = Path(__file__).parent.parent / "assets" / "paligemma-nano"
SAMPLE = NANO.parent / "sample"


@pytest.fixture(scope="module")
def model():
    return PaliGemmaForConditionalGeneration.from_pretrained(NANO)


@pytest.fixture(scope="module")
def processor():
    return PaliGemmaProcessor.from_pretrained(NANO)


def test_the_embedded_model_is_small(model):
    assert 5e6 <= sum(p.numel() for p in model.parameters()) <= 7e6
    assert sum(f.stat().st_size for f in NANO.iterdir()) <= 16e6


def test_the_embedded_model_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_run("assets/paligemma-nano")[0]) == NANO.resolve()


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


def test_it_captions_and_finds_trained_drawings_in_new_arrangements(model, processor):
    """The bars that it was made for; its README has the exact figures."""
    torch.manual_seed(0)
    task = Task(Config(), read_pool(splits=("train",)), processor, augment=False)
    scores = measure(model, task, 128, seed=99)
    assert scores["caption_1x1"] >= 0.7 and scores["detect_2x2"] >= 0.7


def test_the_readme_of_the_embedded_model_shows_its_metrics():
    metrics = json.loads((NANO / "pretraining.json").read_text())["metrics"]
    readme = (NANO / "README.md").read_text()
    for scores in metrics["scores"].values():
        for rate in scores.values():
            assert f"{100 * rate:.1f}" in readme
