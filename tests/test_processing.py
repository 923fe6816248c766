"""The processor against transformers' own and golden ids of the Gemma vocabulary, and its errors for wrong input.

GEMMA_TOKENIZER: path of a tokenizer.json with Gemma 1's 256000 tokens; without it the golden ids are skipped.
"""

import io
import json
import os
import pickle
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PaliGemmaProcessor as HFProcessor
from transformers import PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from boxes import locs_to_boxes
from errors import UserError
from files import open_image
from processing_paligemma import PaliGemmaProcessor

# transformers' processor under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LOCS = [f"<loc{i:04d}>" for i in range(1024)]
SEGS = [f"<seg{i:03d}>" for i in range(128)]
SPECIAL = ["<unk>", "<bos>", "<pad>", "<eos>"]  # ids differ from Gemma's, so that hard-coded ids are noticed
UNK, BOS, PAD, EOS = range(4)


def extend(tokenizer, special_locs=False):
    """PaliGemma's own tokens behind a text vocabulary, in its order."""
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special_locs) for token in LOCS + SEGS])
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    return tokenizer


def tiny_tokenizer():
    """BPE like Gemma's: spaces as "▁", bytes for unseen characters, one token for a double newline."""
    merges = [("\n", "\n"), ("▁", "c"), ("▁c", "a"), ("▁ca", "t")]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁\n" + string.ascii_letters + string.digits + "?;,.<>")
    vocab = {token: i for i, token in enumerate(SPECIAL + pieces + ["".join(pair) for pair in merges])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    # Gemma's files put a <bos> in front, which must not appear in PaliGemma's layout
    template = {"single": "<bos> $A", "pair": "<bos> $A <bos>:1 $B:1", "special_tokens": [("<bos>", BOS)]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    return tokenizer


def tiny_processor(tokenizer=None, **settings):
    """Four tokens per image of 12 pixels."""
    tokenizer = tokenizer or extend(tiny_tokenizer())
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    ids["image_token_id"] = tokenizer.token_to_id("<image>")
    return PaliGemmaProcessor(tokenizer, **{**ids, "image_size": 12, "patch_size": 6, **settings})


def write_model(folder, tokenizer, config, **files):
    """A model folder without weights."""
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in {"config": {"model_type": "paligemma", **config}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tiny():
    return tiny_processor()


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    path = os.environ.get("GEMMA_TOKENIZER")
    if not path:
        pytest.skip("GEMMA_TOKENIZER is unset: it names a tokenizer.json with Gemma 1's vocabulary")
    folder = tmp_path_factory.mktemp("gemma")
    return PaliGemmaProcessor.from_pretrained(write_model(folder, extend(Tokenizer.from_file(path)), {}))


def hf_images(size):
    return SiglipImageProcessorPil(size={"height": size, "width": size})


def hf_processor(ours):
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    tokenizer = Tokenizer.from_str(ours.tokenizer.to_str())  # transformers modifies its argument
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)
    image_settings = hf_images(ours.image_size)
    image_settings.image_seq_length = ours.num_image_tokens
    return HFProcessor(image_settings, tokenizer)


@pytest.fixture(scope="module", params=["tiny", "gemma"])
def pair(request):
    """The same processor twice: ours and transformers'."""
    ours = request.getfixturevalue(request.param)
    return ours, hf_processor(ours)


def noise_image(mode="RGB", width=37, height=23, seed=0):
    """Noise over a gradient, so that a wrong resize, channel order or mode is noticed."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 120, (height, width, 4)) + np.linspace(0, 135, width)[None, :, None]
    rgba = Image.fromarray(values.astype(np.uint8))
    return rgba if mode == "RGBA" else rgba.convert("LA") if mode == "LA" else rgba.convert("RGB").convert(mode)


def reloaded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return open_image(buffer.getvalue())


def text_ids(processor, text):
    return processor.tokenizer.encode(text, add_special_tokens=False).ids


def fault(function, *args, **kwargs):
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 500
    return message


# ---- golden ids (Gemma's vocabulary)

GOLDEN = {
    "\n": [108],
    "\n\n": [109],
    "caption en\n": [21209, 659, 108],
    "Where is the cow standing?": [6006, 603, 573, 13910, 9980, 235336],
    "answer en Where is the cow standing?\n": [13072, 659, 7890, 603, 573, 13910, 9980, 235336, 108],
    "answer en Is there a dog in the image?\n": [13072, 659, 2125, 1104, 476, 5929, 575, 573, 2416, 235336, 108],
    "detect cat ; dog\n": [39208, 4401, 2161, 5929, 108],
    "<loc0000><loc0512><loc1023><loc0100> cat": [256000, 256512, 257023, 256100, 4401],
    "<seg000><seg127>": [257024, 257151],
    "1, 2, 1": [235274, 235269, 235248, 235284, 235269, 235248, 235274],
    "10, 8, 8": [235274, 235276, 235269, 235248, 235321, 235269, 235248, 235321],
    "-1": [235290, 235274],
    **{"Top": [4870], "Bottom": [13475], "Left": [7850], "Right": [6818], "yes": [3276], "no": [956]},
    **{"top": [2234], "bottom": [9905], "left": [1672], "right": [1331], "Yes": [3553], "No": [1294]},
}


def test_golden_ids(gemma):
    assert {text: text_ids(gemma, text) for text in GOLDEN} == GOLDEN
    assert {text: gemma.decode(ids) for text, ids in GOLDEN.items()} == {text: text for text in GOLDEN}
    assert gemma.tokenizer.get_vocab_size() == 257153


def test_golden_rows(gemma):
    image = [257152] * 256
    assert gemma.encode("") == (image + [2, 108], [0] * 258)
    ids, types = gemma.encode("answer en Where is the cow standing?", "on the beach")
    prompt = image + [2, *GOLDEN["answer en Where is the cow standing?\n"]]
    assert (ids, types) == (prompt + [477, 573, 8318, 1], [0] * len(prompt) + [1] * 4)


def test_unextended_gemma_tokenizer_is_refused(gemma):
    """transformers would add `<image>` as 256000 and train on the wrong row."""
    plain = Tokenizer.from_file(os.environ["GEMMA_TOKENIZER"])
    assert "<image>" in fault(PaliGemmaProcessor, plain, 257152)
    assert "[256000]" in fault(PaliGemmaProcessor, extend_image_first(plain), 257152)


def extend_image_first(tokenizer):
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.add_tokens(LOCS)
    return tokenizer


# ---- parity with transformers

PROMPTS = ["caption en", "detect cat ; dog 你好", "", "answer en what? <loc0100>", "ends in newline\n"]
ANSWERS = [
    "a cat",
    "<loc0000><loc0512><loc1023><loc0100> cat ; <loc0001><loc0002><loc0003><loc0004> dog",
    "é",
    "",
    " x\n",
]


@pytest.mark.parametrize("answers", [None, ANSWERS], ids=["prompts", "suffixes"])
def test_batches_equal_transformers(pair, answers):
    processor, reference = pair
    images = [noise_image(seed=seed) for seed in range(len(PROMPTS))]
    ours = processor(images, PROMPTS, suffix=answers)
    options = {"return_tensors": "pt", "padding": "longest", "padding_side": "left"}
    theirs = reference(images=images, text=PROMPTS, suffix=answers, **options)
    assert set(ours) == set(theirs) - ({"labels"} if answers is None else set())
    for name in set(ours) - {"pixel_values"}:
        assert ours[name].dtype == torch.int64
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=1e-6)
    for skip in (True, False):
        decoded = reference.batch_decode(theirs["input_ids"], skip_special_tokens=skip)
        assert processor.batch_decode(ours["input_ids"], skip_special_tokens=skip) == decoded


def test_several_images_equal_transformers(tiny):
    images = [[noise_image(seed=0), noise_image(seed=1)], [noise_image(seed=2)]]
    ours = tiny(images, ["cat", "a longer prompt"], suffix=["yes", "no"])
    theirs = hf_processor(tiny)(
        images=images, text=["cat", "a longer prompt"], suffix=["yes", "no"], return_tensors="pt", padding="longest"
    )
    assert ours["pixel_values"].shape == (3, 3, 12, 12)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


OPAQUE = ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "F"]


@pytest.mark.parametrize("mode", OPAQUE)
@pytest.mark.parametrize("size", [(37, 23), (1, 1), (3000, 2), (2, 900), (12, 12)], ids=str)
def test_pixels_equal_transformers(tiny, mode, size):
    image = noise_image(mode, *size)
    theirs = hf_images(12)(image, return_tensors="pt")["pixel_values"][0]
    ours = tiny.pixels(image)
    assert ours.dtype == torch.float32 and ours.shape == (3, 12, 12) and ours.is_contiguous()
    assert ours.abs().max() <= 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def transparent():
    palette = noise_image("P")
    return {
        "LA": noise_image("LA"),
        "RGBA": noise_image("RGBA"),
        "P": reloaded(palette, transparency=palette.getpixel((3, 3))),
        "RGB": reloaded(noise_image(), transparency=noise_image().getpixel((3, 3))),
    }


@pytest.mark.parametrize("mode", transparent())
def test_transparent_pixels_equal_transformers(tiny, mode):
    image = transparent()[mode]
    assert image.mode == mode and image.has_transparency_data
    clear = hf_images(12)(Image.new("RGBA", (1, 1)), return_tensors="pt")["pixel_values"]
    if clear.min() < 1:
        pytest.skip("this release of transformers drops transparency instead of composing it onto white")
    theirs = hf_images(12)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(tiny.pixels(image), theirs, rtol=0, atol=1e-6)


MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "F",
    "I",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pil_equals_transformers(tiny, mode):
    """Random bytes; if transformers fails (La) or clips to white (16-bit grey), to_rgb only has to work."""
    assert set(Image.MODES) <= set(MODES)
    image = Image.new(mode, (37, 23))
    raw = np.random.default_rng(0).integers(0, 255, len(image.tobytes()), dtype=np.uint8).tobytes()
    if mode == "F":
        raw = np.random.default_rng(0).uniform(0, 255, (23, 37)).astype("<f4").tobytes()
    image.frombytes(raw)
    if mode in ("P", "PA"):
        image.putpalette(np.random.default_rng(1).integers(0, 255, 768, dtype=np.uint8).tobytes())
    ours = tiny.pixels(image)
    assert ours.shape == (3, 12, 12) and ours.std() > 0.05
    if mode == "La":
        torch.testing.assert_close(ours, tiny.pixels(image.convert("LA")), rtol=0, atol=0)
    elif not mode.startswith("I"):
        theirs = hf_images(12)(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# ---- pixels


def test_transparency_becomes_white(tiny):
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    torch.testing.assert_close(tiny.pixels(half)[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=0.01)
    assert (tiny.pixels(Image.new("LA", (4, 4), (0, 0))) == 1).all()
    hole = reloaded(Image.new("P", (4, 4), 0), transparency=0)
    assert (tiny.pixels(hole) == 1).all()


@pytest.mark.parametrize(("mode", "scale"), [("I;16", 257), ("I;16B", 257), ("I", 257), ("I", 1)])
def test_deep_grey_is_scaled_not_clipped(tiny, mode, scale):
    grey = np.arange(240, dtype=np.uint8).reshape(12, 20)
    raw = grey.astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]) * scale
    deep = Image.frombytes(
        mode, (20, 12), raw.astype(raw.dtype.newbyteorder(">" if mode == "I;16B" else "<")).tobytes()
    )
    assert torch.equal(tiny.pixels(deep), tiny.pixels(Image.fromarray(grey)))
    assert tiny.pixels(deep).std() > 0.3


def test_dark_deep_grey_stays_dark(tiny):
    """A 16-bit image is recognised by its mode, not by its brightest pixel."""
    dark = Image.frombytes("I;16", (4, 4), np.full(16, 200, "<u2").tobytes())
    torch.testing.assert_close(tiny.pixels(dark), torch.full((3, 12, 12), 2 / 255 - 1), rtol=0, atol=1e-6)


def test_pixels_are_channels_rows_columns(tiny):
    image = Image.new("RGB", (24, 24), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 24, 12))  # blue above red
    pixels = tiny.pixels(image)
    assert pixels[:, 0, 11].tolist() == [-1, -1, 1]
    assert pixels[:, 11, 0].tolist() == [1, -1, -1]


def test_exif_orientation_is_not_applied(tiny):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = reloaded(noise_image(), exif=exif)
    assert turned.getexif()[0x0112] == 6
    assert torch.equal(tiny.pixels(turned), tiny.pixels(noise_image()))


# ---- layout


def test_layout_labels_and_token_types(tiny):
    image = tiny.image_token_id
    rows = [
        ([image] * 8 + [BOS, *text_ids(tiny, "what?\n")], text_ids(tiny, "a cat") + [EOS]),
        ([image] * 4 + [BOS, *text_ids(tiny, "hi\n")], text_ids(tiny, "<loc0123>") + [EOS]),
    ]
    images = [[noise_image(seed=0), noise_image(seed=1)], [noise_image(seed=2)]]
    batch = tiny(images, ["what?", "hi"], suffix=["a cat", "<loc0123>"])
    length = len(sum(rows[0], []))
    for i, (prompt, answer) in enumerate(rows):
        pads = [0] * (length - len(prompt + answer))

        def row(prompt_values, answer_values, pad, pads=pads):
            pads = [pad] * len(pads)
            return pads + prompt_values + answer_values

        zeros, ones = [0] * len(prompt), [1] * len(answer)
        assert batch["input_ids"][i].tolist() == row(prompt, answer, PAD)
        assert batch["labels"][i].tolist() == row([-100] * len(prompt), answer, -100)
        assert batch["token_type_ids"][i].tolist() == row(zeros, ones, 0)
        assert batch["attention_mask"][i].tolist() == row([1] * len(prompt), ones, 0)
    assert batch["attention_mask"].sum(1).tolist() == [length, len(sum(rows[1], []))] and pads
    expected = torch.stack([tiny.pixels(image) for group in images for image in group])
    assert torch.equal(batch["pixel_values"], expected)


def test_no_suffix_no_labels(tiny):
    batch = tiny([noise_image()], ["what?"])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
    assert not batch["token_type_ids"].any()
    assert EOS not in batch["input_ids"]


def test_one_image_and_one_string(tiny):
    single, listed = tiny(noise_image(), "what?", suffix="cat"), tiny([noise_image()], ["what?"], suffix=["cat"])
    assert set(single) == set(listed)
    assert all(torch.equal(single[name], listed[name]) for name in listed)


def test_empty_suffix_is_eos_alone(tiny):
    labels = tiny([noise_image()], ["what?"], suffix=[""])["labels"]
    assert labels[labels != -100].tolist() == [EOS]


def test_prefix_and_newline_are_one_string(tiny, request):
    double = tiny.tokenizer.token_to_id("\n\n")
    assert tiny.encode("cat\n")[0][-1] == double
    assert tiny.encode("cat")[0][-1] == tiny.tokenizer.token_to_id("\n")
    if os.environ.get("GEMMA_TOKENIZER"):
        assert request.getfixturevalue("gemma").encode("caption en\n")[0][-3:] == [21209, 659, 109]


def test_answer_tokens_in_text_are_single_ids(tiny):
    ids, _ = tiny.encode("<loc0123>", "<loc1023><seg127>")
    loc, seg = tiny.tokenizer.token_to_id("<loc0000>"), tiny.tokenizer.token_to_id("<seg000>")
    assert ids[4:] == [BOS, loc + 123, tiny.tokenizer.token_to_id("\n"), loc + 1023, seg + 127, EOS]


def test_image_tokens_follow_the_config_not_a_constant():
    processor = tiny_processor(image_size=28, patch_size=4)
    batch = processor([noise_image()], ["cat"])
    assert (batch["input_ids"] == processor.image_token_id).sum() == processor.num_image_tokens == 49
    assert batch["pixel_values"].shape == (1, 3, 28, 28)


def test_a_stored_padding_or_truncation_is_ignored():
    tokenizer = extend(tiny_tokenizer())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    assert tiny_processor(tokenizer).encode("a longer prompt") == tiny_processor().encode("a longer prompt")


def test_survives_pickling(tiny):
    assert pickle.loads(pickle.dumps(tiny)).encode("what?", "cat") == tiny.encode("what?", "cat")


# ---- decoding


def test_decode_keeps_answers_and_drops_the_frame(tiny):
    batch = tiny(
        [noise_image()] * 2, ["detect cat", "a\tb 你好 🐈"], suffix=["<loc0001><loc0002><loc0003><loc0004> cat", "é"]
    )
    texts = tiny.batch_decode(batch["input_ids"])
    assert texts == ["detect cat\n<loc0001><loc0002><loc0003><loc0004> cat", "a\tb 你好 🐈\né"]
    assert tiny.batch_decode(batch["labels"]) == ["<loc0001><loc0002><loc0003><loc0004> cat", "é"]
    whole = tiny.decode(batch["input_ids"][0].tolist(), skip_special_tokens=False)
    frame = "<image><image><image><image><bos>detect cat\n<loc0001><loc0002><loc0003><loc0004> cat<eos>"
    assert whole.startswith("<pad>") and whole.replace("<pad>", "") == frame
    assert tiny.decode([]) == ""


def test_rows_are_decoded_after_one_copy_from_the_device(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "decode", lambda row, skip_special_tokens: row)
    assert tiny.batch_decode(torch.tensor([[5, 6], [7, 8]])) == [[5, 6], [7, 8]]  # lists, not tensors


def test_unseen_characters_become_bytes(tiny):
    assert text_ids(tiny, "é") == [tiny.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é".encode()]
    assert UNK not in tiny.encode("你好 🐈 \x00", "\u200b")[0]


def test_decode_keeps_locations_that_a_tokenizer_marks_special():
    processor = tiny_processor(extend(tiny_tokenizer(), special_locs=True))
    ids = [processor.image_token_id, BOS, *text_ids(processor, "<loc0007><seg001> cat"), UNK, EOS, PAD]
    assert processor.decode(torch.tensor(ids)) == "<loc0007><seg001> cat"


def test_a_batch_without_prompts_is_refused(tiny):
    with pytest.raises(UserError, match="give at least one"):
        tiny([], [])


# ---- boxes


def test_boxes_are_y_x_y_x_in_1024_steps():
    text = "<loc0128><loc0102><loc0512><loc0512> cat ; <loc0000><loc0000><loc1023><loc1023> red dog"
    cat = (102 / 1024 * 200, 128 / 1024 * 80, 100.0, 40.0)
    dog = (0.0, 0.0, 1023 / 1024 * 200, 1023 / 1024 * 80)
    assert locs_to_boxes(text, width=200, height=80) == [(cat, "cat"), (dog, "red dog")]


def test_corners_may_come_in_either_order():
    box = (100 / 1024 * 200, 100 / 1024 * 80, 800 / 1024 * 200, 800 / 1024 * 80)
    assert locs_to_boxes("<loc0800><loc0800><loc0100><loc0100> cat", width=200, height=80) == [(box, "cat")]


def test_malformed_parts_are_skipped():
    cat = "<loc0000><loc0256><loc0512><loc1023>"
    text = f"{cat} cat; <loc0001><loc0002> half ;nothing; {cat}<loc0001> five ; {cat[:-9]}<loc1024> off ;;{cat}"
    box = (25.0, 0.0, 102300 / 1024, 100.0)
    assert locs_to_boxes(text, 100, 200) == [(box, "cat"), (box, "")]
    assert locs_to_boxes("no cat", 100, 200) == locs_to_boxes("", 100, 200) == []
    assert locs_to_boxes(cat + "<seg001>" * 16 + " a dog\n", 100, 200) == [(box, "a dog")]


# ---- one-line errors for wrong input


@pytest.mark.parametrize("token", ["<image>", "<bos>", "<eos>", "<pad>"])
def test_frame_tokens_in_text_are_refused(tiny, token):
    message = fault(tiny, [noise_image()], [f"what {token} is\nit"])
    assert message.startswith("prompt") and repr(f"what {token} is\nit") in message
    assert fault(tiny, [noise_image()], ["what"], suffix=[f"{token} cat"]).startswith(
        f"suffix '{token} cat' contains {token}"
    )


def test_a_long_prompt_is_named_by_its_start(tiny):
    assert "'cat cat " in fault(tiny.encode, "cat " * 1000 + "<image>")


@pytest.mark.parametrize(
    ("images", "text", "suffix"),
    [
        ([noise_image()] * 2, ["one"], None),
        ([noise_image()], ["one", "two"], None),
        ([noise_image()] * 2, "one", None),
        ([noise_image()] * 2, ["one", "two"], ["yes"]),
        ([noise_image()] * 2, ["one", "two"], "yes"),
        ([[noise_image()], []], ["one", "two"], None),
    ],
)
def test_unequal_lists_are_refused(tiny, images, text, suffix):
    assert "image" in fault(tiny, images, text, suffix=suffix)


# ---- from_pretrained


def model_ids(tokenizer):
    return {"image_token_index": tokenizer.token_to_id("<image>"), "bos_token_id": BOS}


def model_config(tokenizer, **vision):
    """Ids at both levels, as transformers 5 writes them."""
    text = {"model_type": "gemma", "eos_token_id": EOS, "pad_token_id": PAD}
    return {**model_ids(tokenizer), "text_config": text, "vision_config": vision}


def test_from_pretrained_reads_every_value(tmp_path):
    tokenizer = extend(tiny_tokenizer())
    image_settings = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 0, "rescale_factor": 0.5}
    config = model_config(tokenizer, image_size=24, patch_size=6, hidden_size=32, num_attention_heads=2)
    config["image_token_id"] = config.pop("image_token_index")
    folder = write_model(
        tmp_path, tokenizer, config, preprocessor_config={**image_settings, "size": {"height": 24, "width": 24}}
    )
    loaded = PaliGemmaProcessor.from_pretrained(folder)
    expected_processor = tiny_processor(tokenizer, image_size=24, patch_size=6, **image_settings)
    assert loaded.num_image_tokens == 16
    assert loaded.encode("what?", "cat") == expected_processor.encode("what?", "cat")
    assert torch.equal(loaded.pixels(noise_image()), expected_processor.pixels(noise_image()))
    rgb = torch.from_numpy(np.array(noise_image().resize((24, 24), Image.Resampling.NEAREST))[5, 7]) * 0.5
    expected = (rgb - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(loaded.pixels(noise_image())[:, 5, 7], expected)


def test_from_pretrained_fills_defaults(tmp_path):
    tokenizer = extend(tiny_tokenizer())
    loaded = PaliGemmaProcessor.from_pretrained(str(write_model(tmp_path, tokenizer, model_config(tokenizer))))
    assert loaded.num_image_tokens == 256 and loaded.image_size == 224
    gradient = Image.linear_gradient("L")
    theirs = hf_images(224)(gradient, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(loaded.pixels(gradient), theirs, rtol=0, atol=1e-6)


def test_from_pretrained_reads_what_transformers_saves(tmp_path, tiny):
    """Version 5 puts the image settings into processor_config.json."""
    reference = hf_processor(tiny)
    reference.image_processor.image_mean = [0.2, 0.3, 0.4]
    reference.save_pretrained(tmp_path)
    config = model_config(tiny.tokenizer, image_size=12, patch_size=6)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma", **config}))
    loaded = PaliGemmaProcessor.from_pretrained(tmp_path)
    assert loaded.image_mean == [0.2, 0.3, 0.4]
    assert loaded.encode("what? 你好", "cat") == tiny.encode("what? 你好", "cat")


def test_from_pretrained_takes_a_run_folder(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "run" / "final" / "adapter"
    base.mkdir()
    adapter.mkdir(parents=True)
    tokenizer = extend(tiny_tokenizer())
    write_model(base, tokenizer, model_config(tokenizer, image_size=12, patch_size=6))
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"base_model": str(base)}))
    loaded = PaliGemmaProcessor.from_pretrained(tmp_path / "run")
    assert loaded.encode("what?", "cat") == tiny_processor(tokenizer).encode("what?", "cat")


def test_wrong_tokenizers_are_refused(tmp_path):
    tokenizer = extend(tiny_tokenizer())
    name = str(tmp_path / "tokenizer.json")
    load = PaliGemmaProcessor.from_pretrained

    write_model(tmp_path, tokenizer, {**model_config(tokenizer), "image_token_index": 7})
    message = fault(load, tmp_path)
    assert message.startswith(f"{name}: <image> becomes [{tokenizer.token_to_id('<image>')}]") and "says 7" in message

    write_model(tmp_path, tokenizer, {**model_config(tokenizer), "bos_token_id": EOS})  # two names for one id
    assert name in fault(load, tmp_path)

    without_locs = tiny_tokenizer()
    without_locs.add_special_tokens(["<image>"])
    write_model(tmp_path, without_locs, model_config(without_locs))
    assert "<loc0000> .. <loc1023> are not one token each" in fault(load, tmp_path)


def test_missing_and_broken_files_are_named(tmp_path):
    tokenizer = extend(tiny_tokenizer())
    write_model(tmp_path, tokenizer, model_config(tokenizer))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    assert "tokenizer.json: broken tokenizer" in fault(PaliGemmaProcessor.from_pretrained, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read (No such file" in fault(PaliGemmaProcessor.from_pretrained, tmp_path)


def test_contradicting_image_size_is_refused(tmp_path):
    tokenizer = extend(tiny_tokenizer())
    size = {"size": {"height": 448, "width": 448}}
    write_model(tmp_path, tokenizer, model_config(tokenizer), preprocessor_config=size)
    message = fault(PaliGemmaProcessor.from_pretrained, tmp_path)
    assert "448" in message and "image_size 224" in message


def test_import_does_not_cost_transformers():
    code = "import sys, processing_paligemma; sys.exit('transformers' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=300).returncode == 0
