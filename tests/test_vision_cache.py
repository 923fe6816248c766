"""Kept vision features are those that would be computed, whatever changes."""

import pytest
import torch

from errors import UserError
from modeling_gemma import PaliGemmaForConditionalGeneration
from vision_cache import VisionCache


@pytest.fixture
def model(tiny_model):
    return PaliGemmaForConditionalGeneration.from_pretrained(tiny_model).requires_grad_(False)


@pytest.fixture
def pictures():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def watched(model, monkeypatch) -> list[int]:
    counted, real = [], model.model.image_features
    monkeypatch.setattr(model.model, "image_features", lambda pixels: counted.append(len(pixels)) or real(pixels))
    return counted


def test_features_are_computed_once_and_equal_to_the_bit(model, pictures, monkeypatch, tmp_path):
    expected = model.model.image_features(pictures)
    counted = watched(model, monkeypatch)
    cache = VisionCache(model, memory_gb=2.5 * expected[0].numel() * 4 / 1e9, folder=tmp_path / "kept")
    order = torch.tensor([3, 0, 3, 4])  # one of them twice
    for wanted in (order, torch.arange(5), order.flip(0)):
        assert torch.equal(cache.features(pictures[wanted]), expected[wanted])
    assert counted == [3, 2] and (cache.misses, cache.hits) == (5, 8)
    assert (
        len(cache.entries) == 2 and len(list((tmp_path / "kept").iterdir())) == 3
    )  # the bound holds, the rest is on disk
    again = VisionCache(model, memory_gb=0, folder=tmp_path / "kept")
    assert torch.equal(again.features(pictures), expected) and again.hits == 3


def test_the_weights_are_asked_once_a_batch(model, pictures, monkeypatch):
    asked = []
    real = VisionCache.hash_weights
    monkeypatch.setattr(VisionCache, "hash_weights", lambda self: asked.append(1) or real(self))
    VisionCache(model, 1.0).features(pictures)
    assert asked == [1]


def test_nothing_stale_is_ever_served(model, pictures, monkeypatch, tmp_path):
    cache = VisionCache(model, memory_gb=0, folder=tmp_path)
    cache.features(pictures)
    counted = watched(model, monkeypatch)

    def recomputed(change):
        change()
        counted.clear()
        found = cache.features(pictures)
        return counted == [5] and torch.equal(found, model.model.image_features(pictures))

    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    assert recomputed(lambda: tower.encoder.layers[0].mlp.fc1.weight.mul_(1.5))
    assert recomputed(lambda: projector.linear.bias.add_(1.0))
    assert recomputed(lambda: setattr(projector.linear, "bias", torch.nn.Parameter(projector.linear.bias.clone() + 1)))
    assert recomputed(lambda: pictures.mul_(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert recomputed(lambda: None)
    assert recomputed(lambda: model.to(torch.bfloat16))
    counted.clear()
    cache.features(pictures)
    assert counted == []


def test_a_damaged_file_is_computed_again(model, pictures, tmp_path):
    cache = VisionCache(model, memory_gb=0, folder=tmp_path)
    expected = cache.features(pictures)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(cache.features(pictures), expected) and cache.misses == 10
    assert torch.equal(cache.features(pictures), expected) and cache.misses == 10  # written again


def test_a_tower_that_learns_is_refused(tiny_model, model):
    model.model.multi_modal_projector.linear.weight.requires_grad_(True)
    differential = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, differential="split")
    with pytest.raises(UserError, match="vision_cache_gb"):
        VisionCache(model, 1.0)
    VisionCache(differential.requires_grad_(False), 1.0)  # in the decoder it changes nothing here
