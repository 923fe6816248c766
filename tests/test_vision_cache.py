"""Cached vision features always equal those that would be computed."""

import pytest
import torch

from errors import UserError
from modeling_gemma import PaliGemmaForConditionalGeneration
from vision_cache import VisionCache


@pytest.fixture
def model(tiny_model):
    return PaliGemmaForConditionalGeneration.from_pretrained(tiny_model).requires_grad_(False)


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def watched(model, monkeypatch) -> list[int]:
    counted, real = [], model.model.image_features
    monkeypatch.setattr(
        model.model, "image_features", lambda pixel_values: counted.append(len(pixel_values)) or real(pixel_values)
    )
    return counted


def test_features_are_computed_once_and_bit_equal(model, images, monkeypatch, tmp_path):
    expected = model.model.image_features(images)
    counted = watched(model, monkeypatch)
    cache = VisionCache(model, memory_gb=2.5 * expected[0].numel() * 4 / 1e9, folder=tmp_path / "kept")
    order = torch.tensor([3, 0, 3, 4])  # one of them twice
    for wanted in (order, torch.arange(5), order.flip(0)):
        assert torch.equal(cache.features(images[wanted]), expected[wanted])
    assert counted == [3, 2]
    assert (
        len(cache.entries) == 2 and len(list((tmp_path / "kept").iterdir())) == 3
    )  # the bound holds, the rest is on disk
    again = VisionCache(model, memory_gb=0, folder=tmp_path / "kept")
    counted.clear()
    assert torch.equal(again.features(images), expected) and counted == [2]  # three came from the disk


def test_weights_are_hashed_once_per_batch(model, images, monkeypatch):
    asked = []
    real = VisionCache.hash_weights
    monkeypatch.setattr(VisionCache, "hash_weights", lambda self: asked.append(1) or real(self))
    VisionCache(model, 1.0).features(images)
    assert asked == [1]


def test_stale_features_are_never_returned(model, images, monkeypatch, tmp_path):
    cache = VisionCache(model, memory_gb=0, folder=tmp_path)
    cache.features(images)
    counted = watched(model, monkeypatch)

    def recomputed(change):
        change()
        counted.clear()
        found = cache.features(images)
        return counted == [5] and torch.equal(found, model.model.image_features(images))

    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    assert recomputed(lambda: tower.encoder.layers[0].mlp.fc1.weight.mul_(1.5))
    assert recomputed(lambda: projector.linear.bias.add_(1.0))
    assert recomputed(lambda: setattr(projector.linear, "bias", torch.nn.Parameter(projector.linear.bias.clone() + 1)))
    assert recomputed(lambda: images.mul_(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert recomputed(lambda: None)
    assert recomputed(lambda: model.to(torch.bfloat16))
    counted.clear()
    cache.features(images)
    assert counted == []


def test_a_damaged_cache_file_is_recomputed(model, images, monkeypatch, tmp_path):
    cache = VisionCache(model, memory_gb=0, folder=tmp_path)
    expected = cache.features(images)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    counted = watched(model, monkeypatch)
    for _ in range(2):  # once computed, then written again
        assert torch.equal(cache.features(images), expected) and counted == [5]


def test_a_tower_that_trains_is_refused(tiny_model, model):
    model.model.multi_modal_projector.linear.weight.requires_grad_(True)
    differential = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, differential="split")
    with pytest.raises(UserError, match="vision_cache_gb"):
        VisionCache(model, 1.0)
    VisionCache(differential.requires_grad_(False), 1.0)  # in the decoder it changes nothing here
