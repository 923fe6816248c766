"""Phi-3-vision: pixels, token counts, ids and logits against numbers from the released code."""

import json
import os
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_phi
import torch
import transformers
from PIL import Image
from refusals import refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from checkpoint import SINGLE, hub_key, rename_key
from differential_attention import PRESETS, DifferentialConfig, add_differential
from files import read_json, write_json
from modeling_clip import ClipVisionConfig, ClipVisionModel
from modeling_phi3 import Phi3Config, Phi3TextConfig, Phi3VForCausalLM
from models import classes_of
from processing_phi3v import Phi3VProcessor

IMAGE = 400  # outside the vocabulary of the golden model


def golden_values(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights computed as a hash of their name and index, so that another program can make the same ones."""
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    h = (np.uint64(2654435761) * index + np.uint64(zlib.crc32(name.encode()))) & np.uint64(0xFFFFFFFF)
    h ^= h >> np.uint64(16)
    h = (np.uint64(2246822519) * h) & np.uint64(0xFFFFFFFF)
    h ^= h >> np.uint64(13)
    unit = 2 * h.astype(np.float64) / 2**32 - 1
    if "norm" in name and name.endswith("weight"):
        values = 1 + 0.2 * unit
    elif name.endswith(("embed_tokens.weight", "position_embedding.weight", "glb_GN", "sub_GN")):
        values = 0.5 * unit
    elif len(shape) == 1:
        values = 0.1 * unit
    else:
        values = 1.7 / np.sqrt(np.prod(shape[1:])) * unit
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def golden_config(original: int) -> Phi3Config:
    factors = dict(
        short_factor=tuple(1 + 0.05 * i for i in range(8)), long_factor=tuple(1.2 + 1.5 * i for i in range(8))
    )
    text = Phi3TextConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=original,
        **factors,
    )
    tower = ClipVisionConfig(num_hidden_layers=3, intermediate_size=128)
    return Phi3Config(text, tower, "phi3_v", image_token_id=IMAGE, pad_token_id=0, stop_ids=(2,))


@pytest.fixture(scope="module")
def golden_model() -> Phi3VForCausalLM:
    with torch.device("meta"):
        model = Phi3VForCausalLM(golden_config(4096))
    state = {key: golden_values(hub_key(key, "phi3_v"), tensor.shape) for key, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def golden_image(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    red, green, blue = (7 * x + 3 * y) % 256, (x**2 // 50 + 2 * y) % 256, 37 * (x // 9 + y // 7) % 256
    return Image.fromarray(np.stack((red, green, blue), axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return tiny_phi.tokenizer()


def processor_of(words: Tokenizer, num_crops: int = 4, **changes) -> Phi3VProcessor:
    ids = {name: words.token_to_id(f"<|{name}|>") for name in ("end", "endoftext", "image")}
    made = dict(stop_ids=(ids["end"], ids["endoftext"]), pad_token_id=ids["endoftext"], image_token_id=ids["image"])
    return Phi3VProcessor(words, num_crops=num_crops, **made | changes)


GOLDEN = [  # images, num_crops, original length, tokens of each image, logits 0-3 and the mean of all at the last row
    ([(640, 480)], 4, 4096, [757], (0.04674, -0.34353, -0.51224, -1.15177), 0.78112),
    ([(640, 480)], 4, 512, [757], (-0.29339, -0.20497, -0.59787, -1.37428), 0.77585),
    ([(300, 1000)], 4, 4096, [625], (0.39069, -0.41820, -0.42737, -1.40198), 0.76623),
    ([(336, 336), (1000, 300)], 1, 512, [313, 313], (-0.13355, -0.36906, -1.06355, -1.88832), 0.77779),
    ([(1000, 300), (200, 100)], 4, 4096, [601, 457], (0.56502, -0.32804, -0.19096, -1.05398), 0.77443),
]


@pytest.mark.parametrize("sizes, num_crops, original, tokens, logits, mean", GOLDEN)
def test_logits_equal_those_of_the_released_code(golden_model, words, sizes, num_crops, original, tokens, logits, mean):
    processor = processor_of(words, num_crops)
    inputs = [processor.image_inputs(golden_image(*size)) for size in sizes]
    assert [processor.count_image_tokens(size) for size in sizes] == tokens
    ids = [1, 10, 13]
    for number, count in enumerate(tokens, 1):
        ids += [IMAGE] * count + [1, 13, 39 + number]
    ids = torch.tensor([ids + [50, 51, 52, 7]])
    golden_model.model.language_model.config.original_max_position_embeddings = original
    batch = {name: torch.stack([one[name] for one in inputs]) for name in inputs[0]}
    with torch.no_grad():
        found = golden_model(ids, **batch).logits
    torch.testing.assert_close(found[0, -1, :4], torch.tensor(logits), atol=1e-4, rtol=0)
    assert found[0, -1].argmax() == 102
    assert found.abs().mean().item() == pytest.approx(mean, abs=1e-4)


def test_pixels_equal_those_of_the_released_code(words):
    pixels = processor_of(words).image_inputs(golden_image(640, 480))["pixel_values"]
    assert pixels.shape == (5, 3, 336, 336)
    assert pixels.mean().item() == pytest.approx(0.65817, abs=1e-5)
    points = {(0, 0, 168, 168): 0.38427, (1, 1, 100, 100): 1.41454, (-1, 2, 200, 50): 0.69545}
    for place, value in points.items():
        assert pixels[place].item() == pytest.approx(value, abs=1e-5)


def test_an_upright_image_is_the_mirrored_wide_one(words):
    processor = processor_of(words)
    wide = golden_image(300, 140)
    one, other = (processor.image_inputs(image) for image in (wide, wide.transpose(Image.Transpose.TRANSPOSE)))
    assert one["image_sizes"].tolist() == other["image_sizes"].flip(0).tolist()
    rows, columns = processor.grid(wide.size)
    crops = one["pixel_values"][1 : 1 + rows * columns].unflatten(0, (rows, columns))
    mirrored = other["pixel_values"][1 : 1 + rows * columns].unflatten(0, (columns, rows))
    assert torch.equal(mirrored, crops.permute(1, 0, 2, 4, 3))


COUNTS = {  # width x height: (grid, tokens) at num_crops 4 and 16; at 1 the grid is 1 x 1 with 313 tokens
    (224, 224): ((2, 2), 757, (4, 4), 2509),
    (336, 336): ((2, 2), 757, (4, 4), 2509),
    (1, 1): ((2, 2), 757, (4, 4), 2509),
    (672, 336): ((1, 2), 457, (3, 5), 2353),
    (336, 672): ((2, 1), 469, (5, 3), 2377),
    (640, 480): ((2, 2), 757, (3, 4), 1921),
    (480, 640): ((2, 2), 757, (4, 3), 1933),
    (1000, 300): ((1, 3), 601, (2, 6), 1909),
    (300, 1000): ((3, 1), 625, (6, 2), 1957),
    (1344, 336): ((1, 4), 745, (2, 8), 2485),
    (1920, 1080): ((2, 2), 757, (3, 5), 2353),
    (1080, 1920): ((2, 2), 757, (5, 3), 2377),
    (8000, 50): ((1, 4), 745, (1, 16), 2473),
    (50, 8000): ((4, 1), 781, (16, 1), 2653),
}


@pytest.mark.parametrize("size", COUNTS)
def test_grids_and_token_counts_equal_those_of_the_released_code(words, size):
    for num_crops, grid, tokens in zip(
        (4, 16, 1), (*COUNTS[size][::2], (1, 1)), (*COUNTS[size][1::2], 313), strict=True
    ):
        processor = processor_of(words, num_crops)
        assert (processor.grid(size), processor.count_image_tokens(size)) == (grid, tokens)
        assert tokens <= processor.num_image_tokens
    assert processor_of(words, 4).num_image_tokens == 781 and processor_of(words, 16).num_image_tokens == 2653


def test_an_image_that_would_have_no_height_is_refused(words):
    for size in ((8000, 1), (1, 8000)):
        with refused("8000 x 1", "height of 0"):
            processor_of(words).image_inputs(Image.new("RGB", size))


def test_the_tower_equals_transformers():
    """The features before the last layer, without the class token."""
    fields = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    fields |= dict(image_size=28, patch_size=7)
    torch.manual_seed(0)
    hf = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**fields, hidden_act="quick_gelu")).eval()
    with torch.no_grad():
        for p in hf.parameters():
            p.mul_(3) if p.ndim > 1 else p.add_(0.2 * torch.randn_like(p))
    ours = ClipVisionModel(ClipVisionConfig(**fields)).eval()
    state = {key.removeprefix("vision_model."): tensor for key, tensor in hf.state_dict().items()}
    ours.load_state_dict({key: tensor for key, tensor in state.items() if "position_ids" not in key})
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = hf(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(ours(pixels), expected, atol=1e-5, rtol=0)


# ---- prompts
def test_parts_between_images_are_tokenised_alone(words):
    processor = processor_of(words)
    tag = processor.image_token_id

    def part(text):
        return words.encode(text).ids

    tail = "\nIs this shown?<|end|>\n<|assistant|>\n"
    expected = [*part("<|user|>\n"), *[tag] * 5, *part("\n"), *[tag] * 3, *part(tail)]
    ids, types = processor.encode("Is this shown?", None, [5, 3])
    assert ids == expected and not any(types)
    assert processor.encode("<|image_1|>\n<|image_2|>\nIs this shown?", None, [5, 3])[0] == expected
    assert ids.count(1) == 3  # <s> in front of every part
    between = processor.encode("a <|image_1|> there <|image_2|>", None, [1, 1])[0]
    assert between == [*part("<|user|>\na "), tag, *part(" there "), tag, *part("<|end|>\n<|assistant|>\n")]


def test_questions_lose_the_task_word_of_paligemma(words):
    processor = processor_of(words)
    assert processor.encode("answer en where is an image?", None, 1) == processor.encode("where is an image?", None, 1)


def test_labels_are_the_answer_and_the_first_stop_token(words):
    processor = processor_of(words)
    image = golden_image(64, 64)
    batch = processor([image, image], ["where is this?", "is an image shown?"], [" 1, 2, 1\n", "No"])
    for row, answer in enumerate(("1, 2, 1", "No")):
        labels = batch["labels"][row]
        expected = [*words.encode(answer, add_special_tokens=False).ids, words.token_to_id("<|end|>")]
        assert labels[labels >= 0].tolist() == expected
        assert processor.decode(labels) == answer
        assert batch["input_ids"][row, -len(expected) :].tolist() == expected


BAD_TAGS = ["<|image_2|> <|image_1|>", "<|image_1|>", "<|image_1|> <|image_1|>", "<|image_1|> <|image_3|>"]


@pytest.mark.parametrize("prompt", BAD_TAGS)
def test_tags_out_of_order_or_missing_are_refused(words, prompt):
    with refused("image tags", "2 images", "<|image_1|>, <|image_2|>"):
        processor_of(words).encode(prompt, None, [4, 4])


def test_special_tokens_in_a_text_are_refused(words):
    processor = processor_of(words)
    for token in ("<|end|>", "<|assistant|>", "<|image|>", "<s>"):
        with refused("prompt", token):
            processor.encode(f"an {token} image", None, 1)
        with refused("suffix", token):
            processor.encode("an image", f"an {token} image", 1)


def test_a_nul_character_in_a_prompt_is_text_like_another(words):
    processor = processor_of(words)
    assert processor.split("a\0b<|image_1|>c") == ["a\0b", "c"]
    with refused("prompt", "<unk>"):  # the tokenizer here does not know it
        processor.encode("a\0b<|image_1|>c", None, [4])


def test_a_text_is_tokenised_once(words):
    processor, seen = processor_of(words), []
    processor.tokenizer = SimpleNamespace(
        encode=lambda text, **options: seen.append(text) or words.encode(text, **options)
    )
    processor.encode("where is <|image_1|> this?", "No", [4])
    assert seen == ["<|user|>\nwhere is ", " this?<|end|>\n<|assistant|>\n", "No"]


OTHER_LAYOUTS = {  # of models with model_type phi3: fields that differ from Phi-3's, and the parts of the message
    "the tokens are no tokens": (dict(chat_start="<|im_start|>user\n"), ("<|im_start|> of chat_start", "config.json")),
    "a turn's end that is text": (
        dict(chat_end="<|im_end|>\n<|assistant|>"),
        ("<|im_end|> of chat_end", "config.json"),
    ),
    "no answer ends with it": (dict(stop_ids=(2,)), ("<|end|> of chat_end", "eos_token_id gives 2")),
}


@pytest.mark.parametrize("case", OTHER_LAYOUTS)
def test_a_model_with_another_chat_layout_is_refused(words, case):
    changes, parts = OTHER_LAYOUTS[case]
    with refused(*parts):
        processor_of(words, **changes)


def test_the_chat_layout_of_the_included_model_is_accepted():
    assert Phi3VProcessor.from_pretrained("assets/phi-nano").chat_end.startswith("<|end|>")


LLAMA = os.environ.get("PHI3_TOKENIZER")  # a tokenizer.json of Phi-3-vision


@pytest.mark.skipif(not LLAMA, reason="PHI3_TOKENIZER names no tokenizer.json of Phi-3-vision")
def test_ids_of_the_released_tokenizer():
    processor = Phi3VProcessor(Tokenizer.from_file(LLAMA))
    ids = processor.encode("What is shown in this image?", None, [1])[0]
    expected = [
        1,
        32010,
        29871,
        13,
        32044,
        1,
        29871,
        13,
        5618,
        338,
        4318,
        297,
        445,
        1967,
        29973,
        32007,
        29871,
        13,
        32001,
    ]
    assert ids == expected
    for answer, expected in {"1, 2, 1": [29871, 29896, 29892, 29871, 29906, 29892, 29871, 29896], "No": [1939]}.items():
        ids, types = processor.encode("", answer, [1])
        assert [i for i, kind in zip(ids, types, strict=True) if kind] == [*expected, 32007]
        assert processor.decode(expected) == answer


# ---- folders
def test_every_layout_of_keys_loads(tmp_path):
    """The hub's keys, those of the released code in memory, and transformers' future names; auto_map is ignored."""
    hub = tiny_phi.folder(tmp_path / "hub")
    processor = Phi3VProcessor.from_pretrained(hub)
    batch = processor([golden_image(40, 20)], ["where is this?"])
    model = Phi3VForCausalLM.from_pretrained(hub)
    with torch.no_grad():
        expected = model(**batch).logits
    stored, config = load_file(hub / SINGLE), json.loads((hub / "config.json").read_text())
    prefix = "model.vision_embed_tokens."
    assert f"{prefix}img_processor.vision_model.pre_layrnorm.weight" in stored
    memory = stored | {f"{prefix}wte.weight": stored["model.embed_tokens.weight"].clone()}
    memory[f"{prefix}img_processor.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    names = {
        f"{prefix}img_processor.": "model.vision_model.",
        f"{prefix}img_projection.0.": "model.image_projection.fc1.",
        f"{prefix}img_projection.2.": "model.image_projection.fc2.",
        f"{prefix}glb_GN": "model.glb_newline",
        f"{prefix}sub_GN": "model.sub_newline",
        "model.layers.": "model.language_model.layers.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.norm.": "model.language_model.norm.",
    }
    coming = {}
    for key, tensor in stored.items():
        old = next((old for old in names if key.startswith(old)), key)
        coming[key.replace(old, names.get(old, old))] = tensor
    short = {key.replace("img_processor.vision_model.", "img_processor."): value for key, value in stored.items()}
    for name, state in {"memory": memory, "coming": coming, "short": short}.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file(state, folder / SINGLE)
        code = {"auto_map": {"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"}}
        (folder / "config.json").write_text(json.dumps(config | code))
        with torch.no_grad():
            assert torch.equal(Phi3VForCausalLM.from_pretrained(folder)(**batch).logits, expected)
    assert all(rename_key(hub_key(key, "phi3_v")) == key == rename_key(key) for key in model.state_dict())


def test_a_released_config_is_read(tmp_path):
    """Its tower is only named, its stop token is never generated, its code is not run."""
    released = {
        "model_type": "phi3_v",
        "architectures": ["Phi3VForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"},
        "eos_token_id": 2,
        "img_processor": {"model_name": "openai/clip-vit-large-patch14-336", "name": "clip_vision_model"},
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 48},
        "rope_theta": 10000.0,
        "sliding_window": 131072,
        "vocab_size": 32064,
    }
    (tmp_path / "config.json").write_text(json.dumps(released))
    config = Phi3Config.from_pretrained(tmp_path)
    assert config.stop_ids == (32007, 32000) and config.text_config.window is None
    assert config.vision_config == ClipVisionConfig() and config.text_config.head_dim == 96
    assert Phi3Config.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        model = Phi3VForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4146.6e6, rel=1e-4)
    released["img_processor"]["model_name"] = "openai/clip-vit-base-patch32"
    with refused("clip-vit-base-patch32"):
        Phi3Config.from_dict(released)


@pytest.mark.parametrize("vision", [True, False])
def test_processor_and_model_read_a_nested_text_config(tmp_path, vision):
    folder = tiny_phi.folder(tmp_path, vision=vision)
    data = read_json(folder / "config.json")
    nested = {name: data.pop(name) for name in ("vocab_size", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", data | {"text_config": nested})
    config, processor = Phi3Config.from_pretrained(folder), classes_of(folder)[1].from_pretrained(folder)
    assert processor.stop_ids == config.stop_ids == tuple(nested["eos_token_id"])
    assert processor.pad_token_id == config.pad_token_id == nested["pad_token_id"]
    assert processor.image_token_id == config.image_token_id and (config.image_token_id is None) == (not vision)
    write_json(folder / "config.json", data | {"text_config": [1]})
    with refused(folder / "config.json", "text_config"):
        classes_of(folder)[1].from_pretrained(folder)


@pytest.mark.parametrize("size", [(40, 20), (20, 60), (9, 9), (64, 16)])
def test_the_grid_of_patches_has_all_of_them(tmp_path, size):
    folder = tiny_phi.folder(tmp_path)
    model, processor = Phi3VForCausalLM.from_pretrained(folder), Phi3VProcessor.from_pretrained(folder)
    batch = processor([golden_image(*size)], ["where is this?"])
    rows, columns = processor.patch_grid(size)
    assert model.model.patch_tokens(batch["input_ids"], batch["image_sizes"]).sum() == rows * columns
    assert (rows * columns > 4) and (rows > columns) == (size[1] > size[0])


def test_images_of_unlike_grids_in_one_batch_equal_each_alone(tmp_path):
    folder = tiny_phi.folder(tmp_path)
    model_class, processor_class = classes_of(folder)
    model, processor = model_class.from_pretrained(folder), processor_class.from_pretrained(folder)
    images = [[golden_image(40, 20)], [golden_image(20, 60), golden_image(9, 9)], []]
    prompts = ["where is this?", "is an image shown?", "where is the image?"]
    batch = processor(images, prompts)
    together = model.generate(**batch, max_new_tokens=4)
    assert batch["image_sizes"].tolist() == [[16, 32], [48, 16], [32, 32]]
    for row, (group, prompt) in enumerate(zip(images, prompts, strict=True)):
        one = processor([group], [prompt])
        with torch.no_grad():
            alone = model(**one, logits_to_keep=1).logits
            features = (
                {}
                if not group
                else {"image_features": model.model.image_features(one["pixel_values"], one["image_sizes"])}
            )
            text = {key: one[key] for key in ("input_ids", "attention_mask")}
            assert torch.equal(model(**text, **features, logits_to_keep=1).logits, alone)
        torch.testing.assert_close(model(**batch, logits_to_keep=1).logits[row], alone[0], atol=1e-5, rtol=0)
        assert together[row, -4:].tolist() == model.generate(**one, max_new_tokens=4)[0, -4:].tolist()


def test_a_frozen_tower_computes_under_autocast_what_it_does_without(tmp_path):
    """Training uses the same features as generation."""
    folder = tiny_phi.folder(tmp_path)
    model, processor = Phi3VForCausalLM.from_pretrained(folder), Phi3VProcessor.from_pretrained(folder)
    batch = processor([golden_image(20, 20)], ["where is this?"])
    expected = model.requires_grad_(False).model.image_features(batch["pixel_values"], batch["image_sizes"])
    with torch.autocast("cpu", torch.bfloat16):
        found = model.model.image_features(batch["pixel_values"], batch["image_sizes"])
    assert torch.equal(found[0], expected[0])


def test_the_plan_has_the_grids_of_the_crops(tmp_path):
    """Without them the sizes would be read back from the device in every micro-batch."""
    folder = tiny_phi.folder(tmp_path)
    model, processor = Phi3VForCausalLM.from_pretrained(folder), Phi3VProcessor.from_pretrained(folder)
    batch = processor([golden_image(40, 20)], ["where is this?"], ["No"])
    expected, plan = model(**batch).loss, model.model.plan(**batch)
    assert plan.grids == ((1, 2),)
    on_device = batch | {"image_sizes": batch["image_sizes"].to("meta")}  # which cannot be read
    assert torch.equal(model(**on_device, plan=plan).loss, expected)


def test_images_that_do_not_fit_are_refused(tmp_path):
    folder = tiny_phi.folder(tmp_path)
    model, processor = Phi3VForCausalLM.from_pretrained(folder), Phi3VProcessor.from_pretrained(folder)
    batch = processor([golden_image(20, 20)], ["where is this?"])
    with refused("image_sizes"):
        model(**{key: value for key, value in batch.items() if key != "image_sizes"})
    with refused("image_sizes"):
        model(**batch | {"image_sizes": torch.tensor([[160, 160]])})
    with refused("<image> tokens", "features"):
        model(**batch | {"image_sizes": torch.tensor([[16, 16]])})
    with refused("positions"):
        model.generate(**batch, max_new_tokens=1000)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_both_towers(tmp_path, preset):
    """Exact presets change no logit; the layer of the tower that never runs is left as it is."""
    folder = tiny_phi.folder(tmp_path)
    model, processor = Phi3VForCausalLM.from_pretrained(folder), Phi3VProcessor.from_pretrained(folder)
    batch = processor([golden_image(20, 20)], ["where is this?"], ["No"])
    config = DifferentialConfig(preset).resolve()
    if preset != "src_gemma_split":
        config.towers = ("text", "vision")
    if preset in ("grouped", "src_gemma_split"):
        with refused(preset):
            add_differential(model, config)
        return
    with torch.no_grad():
        before = model(**batch, logits_to_keep=1).logits
        add_differential(model, config)
        after = model(**batch, logits_to_keep=1).logits
    assert torch.equal(before, after) == PRESETS[preset].exact
    model(**batch).loss.backward()
    modules = [layer.self_attn.differential for layer in model.model.vision_tower.encoder.layers]
    assert [module is None for module in modules] == [False, False, True]
