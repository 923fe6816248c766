"""generate.py: drawn boxes, and wrong use."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

import generate
from modeling_gemma import PaliGemmaForConditionalGeneration

BOX = "<loc0256><loc0256><loc0768><loc0768> "


def marks(tmp_path, side: int, answer: str) -> np.ndarray:
    """Which pixels of a grey square image differ after drawing, [side, side]."""
    path = str(tmp_path / f"{side}.png")
    generate.draw_boxes(Image.new("L", (side, side), 128), answer, path)
    return (np.array(Image.open(path)) != 128).any(-1)


def label_height(tmp_path, side: int) -> int:
    """Number of rows that only the label changes."""
    label = marks(tmp_path, side, BOX + "cat") & ~marks(tmp_path, side, BOX)
    return int(label.any(1).sum())


def test_labels_and_lines_scale_with_the_image(tmp_path):
    small, large = label_height(tmp_path, 400), label_height(tmp_path, 4000)
    assert 7 < large / small < 13
    thickness = [int(marks(tmp_path, side, BOX)[side // 2, : side // 2].sum()) for side in (400, 4000)]
    assert thickness == [2, 20]


def test_a_label_at_the_border_is_whole(tmp_path):
    def label_size(box: str) -> np.ndarray:
        places = np.argwhere(marks(tmp_path, 400, box + "cat") & ~marks(tmp_path, 400, box))
        return places.max(0) - places.min(0)

    middle, corner = label_size(BOX), label_size("<loc0980><loc0980><loc1020><loc1020> ")
    assert min(middle) > 8 and np.abs(middle - corner).max() <= 2  # lines of the box hide a pixel


def test_an_answer_without_boxes_says_so(tmp_path, capsys):
    assert not marks(tmp_path, 64, "a cat").any()
    assert "64.png: the answer has no boxes" in capsys.readouterr().err
    assert marks(tmp_path, 64, BOX + "cat").any()
    assert capsys.readouterr().err == ""


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    for path in (tmp_path / "none" / "a.png", tmp_path / "a.unknown"):
        with refused(path, "cannot be written"):
            generate.draw_boxes(Image.new("RGB", (8, 8)), BOX, str(path))


@pytest.mark.parametrize(
    "flag",
    ["--temperature=nan", "--temperature=-1", "--top_p=0", "--top_p=inf", "--max_new_tokens=0", "--seed=" + "9" * 20],
)
def test_flags_out_of_range_are_one_line(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--image=none.png", flag])
    with pytest.raises(SystemExit) as end:
        generate.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: " + flag.partition("=")[0]) and error.count("\n") == 1


def test_sampling_depends_on_its_flags(tiny_model, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    given = ["generate.py", f"--model={tiny_model}", f"--image={tmp_path / 'a.png'}", "--prompt=caption en"]

    def answer(*flags):
        monkeypatch.setattr(sys, "argv", [*given, "--max_new_tokens=8", *flags])
        generate.main()
        return capsys.readouterr().out

    hot = answer("--temperature=5", "--seed=1")
    assert hot == answer("--temperature=5", "--seed=1") != answer("--temperature=5", "--seed=2")
    assert answer() == answer("--temperature=5", "--seed=1", "--top_p=0.000001") != hot  # only the likeliest token


@pytest.mark.parametrize("step", ["from_pretrained", "generate"])
def test_a_full_gpu_is_one_line(tiny_model, tmp_path, monkeypatch, capsys, step):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(PaliGemmaForConditionalGeneration, step, full)
    monkeypatch.setattr(sys, "argv", ["generate.py", f"--model={tiny_model}", f"--image={tmp_path / 'a.png'}"])
    with pytest.raises(SystemExit) as end:
        generate.main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and "out of memory: give fewer or smaller images" in error and error.count("\n") == 1


def test_boxes_on_several_images_are_refused(tiny_model, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = [str(tmp_path / "a.png")] * 2
    arguments = ["generate.py", f"--model={tiny_model}", "--image", *images, "--prompt=detect cat", "--output=b.png"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        generate.main()
    assert end.value.code == 2 and "--output: draws boxes on one image, not on 2" in capsys.readouterr().err
