"""demo.py: answers and maps of several models, and, if gradio is installed, the page."""

import re
import sys
from unittest.mock import MagicMock

import pytest
import tiny_phi
import torch
from PIL import Image
from refusals import refused
from runs import ROOT

import demo
import generate
from differential_attention import differential_parameters
from haystack import ImagePool, read_pool
from needle_eval.plots import STYLE
from needle_eval.questions import normalise

PROMPT = "answer en where is cat?"


@pytest.fixture(autouse=True)
def small_figures(monkeypatch):
    monkeypatch.setitem(STYLE, "figure.dpi", 40)


@pytest.fixture
def models(tiny_model) -> list[demo.Loaded]:
    """The standard model, and one with a second map that differs from the first."""
    standard = demo.load(demo.Config(models=(str(tiny_model),), max_new_tokens=4, device="cpu"))[0]
    model = type(standard.model).from_pretrained(tiny_model, differential="split").eval()
    for parameter in differential_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return [standard, demo.Loaded("split", model, standard.processor, "cpu", 4)]


@pytest.fixture
def image() -> Image.Image:
    return Image.open(ROOT / "assets" / "sample" / "fruit.png")


def test_the_answer_is_that_of_generate(models, image, tiny_model, monkeypatch, capsys):
    answer = demo.ask(models[0], image, PROMPT)
    path = ROOT / "assets" / "sample" / "fruit.png"
    flags = [f"--image={path}", f"--model={tiny_model}", f"--prompt={PROMPT}", "--max_new_tokens=4", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    generate.main()
    assert capsys.readouterr().out.strip() == answer.text.strip()


def test_maps_are_those_that_act(models, image):
    standard, split = (demo.ask(loaded, image, PROMPT).maps for loaded in models)
    assert list(standard) == ["A"] and list(split) == ["A", "A1", "lambda A2", "A1 - lambda A2"]
    layers, tokens, *grid = standard["A"].shape
    assert layers == 2 and 1 <= tokens <= 5 and grid == [4, 4]
    assert bool((standard["A"] >= 0).all()) and bool((standard["A"].sum((-1, -2)) < 1).all())
    for number, layer in enumerate(models[1].model.model.language_model.layers):
        lambda_ = layer.self_attn.differential.current_lambda(None)
        torch.testing.assert_close(split["A1 - lambda A2"][number] / (1 - lambda_), split["A"][number])
    assert (split["A1"] - split["lambda A2"]).abs().max() > 0


def test_all_models_have_one_scale_of_colours(models, image, monkeypatch):
    limits = []
    draw_signed = demo.draw_signed
    monkeypatch.setattr(
        demo, "draw_signed", lambda panel, m, limit: limits.append((limit, m)) or draw_signed(panel, m, limit)
    )
    answers = [demo.ask(loaded, image, PROMPT) for loaded in models]
    figures = demo.draw(image, answers, layer=99, token=99)  # the last ones
    assert len(figures) == 2 and figures[0].size == figures[1].size
    assert len(limits) == 1 + 3 and len({limit for limit, _ in limits}) == 1
    assert torch.equal(limits[0][1], answers[0].maps["A"][-1, -1])
    assert all(float(m.abs().max()) <= limits[0][0] for _, m in limits)


def test_the_map_of_a_wide_image_has_the_rows_and_columns_of_its_crops(tmp_path, monkeypatch):
    """A 4:1 image has 1 x 4 crops of 2 x 2 tokens: as many as a map of 4 x 4, in another order."""
    loaded = demo.load(demo.Config(models=(str(tiny_phi.folder(tmp_path)),), max_new_tokens=3, device="cpu"))[0]
    image = Image.new("RGB", (64, 16))
    answer = demo.ask(loaded, image, "where is this?")
    assert answer.maps["A"].shape[2:] == (2, 8)
    batch = loaded.processor([image], ["where is this?"], [answer.text])
    flat = demo.answer_attention(loaded.model, batch)[0, :, 0]
    assert torch.equal(demo.select(answer, 0, 0)["A"][1], flat[0, 0, 8:])
    drawn, draw_signed = [], demo.draw_signed
    monkeypatch.setattr(demo, "draw_signed", lambda *args: drawn.append(draw_signed(*args)) or drawn[-1])
    demo.draw(image, [answer], 0, 0)
    assert drawn[0].get_array().shape == (2, 8) and drawn[0].get_extent() == [0, 8, 2, 0]


def test_a_full_gpu_is_one_line(models, image, tiny_model, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(models[0].model), "generate", full)
    with refused("out of memory", "--max_new_tokens"):
        demo.ask(models[0], image, PROMPT)
    monkeypatch.setattr(type(models[0].model), "from_pretrained", full)
    with refused("out of memory", "--models"):
        demo.load(demo.Config(models=(str(tiny_model),), device="cpu"))


def test_the_page_takes_the_file_as_it_is_and_has_a_slider_over_every_token(models):
    gradio = MagicMock()
    demo.build_app(gradio, [models[0], demo.Loaded("longer", models[1].model, models[1].processor, "cpu", 40)])
    given = next(call for call in gradio.Image.call_args_list if call.kwargs.get("label") == "image")
    assert given.kwargs["type"] == "filepath" and given.kwargs["image_mode"] is None
    slider = next(call for call in gradio.Slider.call_args_list if "token" in call.kwargs["label"])
    assert slider.args == (0, 40)


def test_an_answer_without_boxes_says_so(image):
    box = "<loc0000><loc0000><loc0512><loc0512> cat"
    assert demo.describe(image, "detect cat", "a cat") == "a cat\nno boxes"
    assert demo.describe(image, "detect cat", box).endswith("\n1 box")
    assert demo.describe(image, "detect cat", f"{box} ; {box}").endswith("\n2 boxes")
    assert demo.describe(image, PROMPT, " ") == "(empty)"


def test_a_new_haystack_shows_its_needle():
    pool = ImagePool(read_pool(splits=("test_style",)))
    for grid in demo.GRIDS:
        image, prompt, truth = demo.make_haystack(pool, grid)
        assert image.size == (grid * demo.CELL, grid * demo.CELL) and prompt.startswith("answer en where is ")
        answer = normalise(truth.rpartition(": ")[2])
        assert re.fullmatch(rf"1, [1-{grid}], [1-{grid}]", answer)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert stopped.value.code == 2 and "pip install gradio" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["demo.py", "--port=0"])
    with pytest.raises(SystemExit):
        demo.main()
    assert "--port=0" in capsys.readouterr().err


def test_models_that_do_not_exist_are_refused():
    with refused("none/such"):
        demo.load(demo.Config(models=("./none/such",), device="cpu"))


def test_the_page_asks_every_model(models, image):
    """The functions behind the buttons, called as the page calls them."""
    gradio = pytest.importorskip("gradio")
    app = demo.build_app(gradio, models)
    labels = {block.label for block in app.blocks.values() if getattr(block, "label", None)}
    assert {"image", "prompt", "answer", "decoder layer", "token of the answer"} <= labels
    functions = {fn.name: fn.fn for fn in app.fns.values() if fn.fn is not None}
    answered = functions["answer"](image.filename, PROMPT)
    assert [answer.text for answer in answered[2]] == [demo.ask(loaded, image, PROMPT).text for loaded in models]
    shown = functions["show"](answered, 0, 0)
    assert (
        len(shown) == 4
        and isinstance(shown[1], Image.Image)
        and shown[0] == demo.describe(image, PROMPT, answered[2][0].text)
    )
    assert functions["show"](None, 0, 0) == [None] * 4
    with pytest.raises(gradio.Error, match="image first"):
        functions["answer"](None, PROMPT)
