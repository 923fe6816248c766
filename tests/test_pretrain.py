"""assets/pretrain.py: what is specific to one family, and the unchanged tokenizer and configuration of the other."""

import copy
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pretrain
import pytest
import torch
import torch.nn.functional as F
from pretrain import LATTICE, Config, make_model, make_optimizers, model_step, page, save_asset, tower_step
from refusals import refused
from runs import ROOT

from haystack import read_pool
from models import classes_of
from processing_phi3v import Phi3VProcessor

FAMILIES = ("paligemma", "phi")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def made(family):
    """(model, task) with the drawings of sixteen concepts."""
    torch.manual_seed(0)
    pool = read_pool(splits=("train",))
    model, processor, task_class = make_model(family, read_pool())
    names = sorted({image.caption for image in pool})[:16]
    images = [image for image in pool if image.caption in names]
    return model, task_class(Config(family=family, batch_size=4, queries=2, pages=2), images, processor)


def test_the_stored_tokenizer_and_configuration_are_rebuilt(family, made):
    folder, (model, task) = ROOT / "assets" / f"{family}-nano", made
    assert json.loads(task.processor.tokenizer.to_str()) == json.loads((folder / "tokenizer.json").read_text())
    assert json.loads(json.dumps(model.config.to_dict())) == json.loads((folder / "config.json").read_text())


def lattice_boxes(side: int, grid: int) -> list[tuple[tuple[int, int], torch.Tensor]]:
    """((row, column), box in pixels) of every square that a drawing may fill in a grid."""
    step, cell = side // LATTICE, side // grid
    found = []
    for row in range(grid):
        for column in range(grid):
            for width in range(-(-cell * 5 // 8 // step) * step, cell + 1, step):
                for y in range(row * cell, (row + 1) * cell - width + 1, step):
                    for x in range(column * cell, (column + 1) * cell - width + 1, step):
                        found.append(((row, column), torch.tensor([x, y, x + width, y + width])))
    return found


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_a_box_that_is_written_and_read_lies_in_its_cell(made, grid):
    _, task = made
    for cell, box in lattice_boxes(task.side, grid):
        assert task.cell(task.answer(box, "red apple"), grid) == cell


def test_boxes_of_phi_are_percent_of_the_image_as_plain_numbers(made, family):
    _, task = made
    answer = task.answer(torch.tensor([0, 16, 64, 128]) * task.side / 128, "red apple")
    assert (
        answer
        == {"phi": "red apple 0, 12, 50, 100", "paligemma": "<loc0128><loc0000><loc1023><loc0512> red apple"}[family]
    )
    row = task.text_batch(["detect red apple"], [answer])
    assert task.processor.decode(row["labels"][0]) == answer
    assert int((row["labels"] != -100).sum()) <= {"phi": task.box_tokens, "paligemma": 8}[family]


@pytest.mark.parametrize("answer", ["", "1, 2, 3", "12, 6, 25, 19 red apple", "<loc0001><loc0002>", "no box"])
def test_an_answer_without_a_box_is_in_no_cell(made, answer):
    assert made[1].cell(answer, 4) is None


def test_a_search_hits_if_the_best_tokens_give_the_right_cell(made):
    _, task = made
    boxes = torch.tensor([[0, 0, 24, 24], [64, 32, 96, 64], [104, 104, 128, 128]]) * task.side // 128
    answers = [task.answer(box, "red apple") for box in boxes]
    labels = task.text_batch(["detect red apple"] * 3, answers)["labels"]
    moved = [
        answers[0],
        task.answer(boxes[1] - torch.tensor([32, 0, 32, 0]) * task.side // 128, "red apple"),
        answers[2],
    ]
    predicted = task.text_batch(["detect red apple"] * 3, moved)["labels"]
    assert torch.equal(predicted != -100, labels != -100)  # the same number of tokens
    vocabulary = task.processor.tokenizer.get_vocab_size()
    for best, expected in ((labels, [True] * 3), (predicted, [True, False, True])):
        logits = F.one_hot(best.clamp(min=0), vocabulary).float()
        assert task.hits(logits, labels, 4).tolist() == expected


def test_the_pixels_in_pretraining_are_those_of_the_processor(made):
    _, task = made
    seen = []

    def tower(pixels):
        seen.append(pixels)
        return torch.zeros(len(pixels), 16, 4)

    _, image = page(random.Random(0), task.side)
    task.vision(SimpleNamespace(model=SimpleNamespace(vision_tower=tower)), task.pixels(image)[None])
    expected = task.processor.image_inputs(image)["pixel_values"]
    torch.testing.assert_close(seen[0].view(expected.shape), expected, atol=1e-6, rtol=0)


def test_patch_maps_lie_as_the_image_does(made):
    """A tower whose features are the mean colours of patches gives a small copy of the image."""
    task, patch = made[1], made[0].config.vision_config.patch_size

    def mean_colours(pixels):
        return F.avg_pool2d(pixels, patch).flatten(2).transpose(1, 2)

    image = torch.rand(2, 3, task.side, task.side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    maps = task.patch_maps(task.vision(SimpleNamespace(model=SimpleNamespace(vision_tower=mean_colours)), image))
    expected = F.avg_pool2d(image, patch)
    if isinstance(task.processor, Phi3VProcessor):
        mean, std = (torch.tensor(v)[:, None, None] for v in (task.processor.image_mean, task.processor.image_std))
        expected = ((expected + 1) / 2 - mean) / std
        assert maps[1].shape == (2, 3, 4, 4)
        torch.testing.assert_close(maps[1].mean((2, 3)), expected.mean((2, 3)), atol=0.2, rtol=0)
    torch.testing.assert_close(maps[0], expected, atol=1e-5, rtol=0)


def test_dropout_takes_the_global_view_of_some_images(made, family):
    """Only the global view is dropped: tokens of the grid of crops stay, and PaliGemma has no dropout."""
    model, task = made
    vision = task.vision(model, task.draw(torch.Generator().manual_seed(0), 8, 2)[1])
    whole = task.image_features(model, vision)
    dropped = task.image_features(model, vision, torch.Generator().manual_seed(0))
    if family == "paligemma":
        assert torch.equal(whole, dropped)
        return
    crops = whole.shape[1] - 4 - 2  # behind them, two lines of two tokens and a line end
    torch.testing.assert_close(whole[:, :crops], dropped[:, :crops], atol=1e-6, rtol=0)
    changed = (whole - dropped).abs().amax((1, 2)) > 0
    assert 0 < int(changed.sum()) < 8


def guided(made, places: torch.Tensor | None = None, aimed: bool = False) -> float:
    """The guide loss of a decoder whose layer inputs hold `places` in the fixed projection, with a head that looks
    at the cell of each query or nowhere in particular."""
    model, task = made
    generator = torch.Generator().manual_seed(0)
    ids, _, boxes = task.draw(generator, 2, 4)
    prefixes, suffixes, cells = task.queries(generator, ids, boxes, 2)
    batch = task.text_batch(prefixes, suffixes)
    is_image = batch["input_ids"] == task.processor.image_token_id
    x = torch.zeros(*is_image.shape, task.places.shape[0])
    grid = [5 * (cell // 4) + cell % 4 for cell in range(16)]  # a line end after four tokens
    positions = is_image.nonzero()[:, 1].view(4, -1)[:, grid]
    if places is not None:
        for row, at in enumerate(positions):
            x[row, at] = places
    q, k = torch.zeros(2, 4, 1, x.shape[1], 8)
    if aimed:
        q[..., 0] = 10.0
        k[torch.arange(4), 0, positions[torch.arange(4), cells], 0] = 10.0
    attention = SimpleNamespace(attention_inputs=lambda *_: (q, k), scale=1.0)
    layers = [SimpleNamespace(self_attn=attention)] * 6
    decoder = SimpleNamespace(model=SimpleNamespace(language_model=SimpleNamespace(layers=layers)))
    return float(task.guide_loss(decoder, batch, [(x, None)], cells, 4))


def test_the_guide_loss_asks_for_attention_on_the_cell_and_for_readable_places(made, family):
    _, task = made
    if family == "paligemma":
        assert guided_is_zero(made)
        return
    line, column = torch.arange(16) // 4, torch.arange(16) % 4
    places = task.places[:, line].T + task.places[:, 4 + column].T
    chance = 2 * math.log(4)  # if lines and columns cannot be read
    assert guided(made, places, aimed=True) < 0.01
    assert guided(made, aimed=True) == pytest.approx(chance, abs=0.01)
    assert guided(made, places) > 3  # attention over more than 20 tokens
    assert guided(made, places.flip(0), aimed=True) > chance


def guided_is_zero(made) -> bool:
    model, task = made
    with task.attention_inputs(model) as found:
        return float(task.guide_loss(model, {}, found, None, 4)) == 0.0


def test_batches_follow_from_the_step_alone(made):
    _, task = made
    drawn = [task.draw(torch.Generator().manual_seed(5), 3, 2) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    ids, pixels, boxes = drawn[0]
    assert ids.shape == (3, 2, 2) and pixels.shape == (3, 3, task.side, task.side) and boxes.shape == (3, 2, 2, 4)


def test_both_stages_train_every_layer_that_runs(made, family):
    model, task = made
    probe = torch.nn.Linear(model.config.vision_config.hidden_size, len(task.choices))
    optimizers = make_optimizers(task.config, model, probe)
    generator = torch.Generator().manual_seed(0)
    tower_step(model, probe, task, task.config, generator, 2).backward()
    assert all(p.grad is None for p in model.model.language_model.parameters())
    loss, hit = model_step(model, probe, task, task.config, generator, 2, 8)
    loss.backward()
    assert 0 <= hit <= 1
    without = {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    last = f"vision_tower.encoder.layers.{model.config.vision_config.num_hidden_layers - 1}."
    if family == "phi":  # stored, never run
        assert without and all(last in name or "vision_tower.post_layernorm" in name for name in without)
    else:
        assert not without
    before = [p.clone() for p in model.parameters()]
    for optimizer in optimizers:
        optimizer.step()
    stayed = {name for (name, p), old in zip(model.named_parameters(), before, strict=True) if torch.equal(p, old)}
    assert stayed == without


def test_a_saved_model_is_read_back(made, family, tmp_path):
    """It is read by the classes that `--model` chooses, with the tokenizer, chat template and crops of pretraining."""
    model, task = made
    folder = tmp_path / "model"
    metrics = {"n": 4, "scores": {"trained": {"caption_2x2": 0.5, "ocr": 0.25}}}
    save_asset(replace(task.config, output_dir=str(folder)), copy.deepcopy(model), task.processor, metrics)
    model_class, processor_class = classes_of(folder)
    stored, processor = model_class.from_pretrained(folder), processor_class.from_pretrained(folder)
    assert isinstance(model, model_class) and stored.config == model.config
    _, image = page(random.Random(0), task.side)
    ours, theirs = (p(image, "detect red apple", "1, 2") for p in (task.processor, processor))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for (name, p), q in zip(model.named_parameters(), stored.parameters(), strict=True):
        assert torch.equal(p.bfloat16().float(), q), name
    readme = (folder / "README.md").read_text()
    assert "| ocr | 25.0 [" in readme and f"# {family}-nano" in readme and "{" not in readme.replace("{caption}", "")


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path):
    file, stored = tmp_path / "state.pt", pretrain.as_json(Config(grid_weights=(0.5, 0.5)))
    pretrain.check_same_config(stored, pretrain.as_json(Config(grid_weights=(0.5, 0.5), save_every=1)), file)
    with refused(file, "was made with seed 0, not 1", "--work_dir"):
        pretrain.check_same_config(stored, stored | {"seed": 1}, file)
