"""The Phi family with the scripts: both arms, resume, evaluation, answers, export, adapters in transformers."""

import json
import shutil
import sys
from dataclasses import dataclass, replace

import peft
import pytest
import tiny_phi
import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from refusals import refused
from runs import ROOT, interrupt, logged, saved_differential, saved_lora
from safetensors.torch import load_file
from tiny import quick

import eval_mmnih
import export
import fused_ops
import generate
import plots
import training
from adapters import attach_adapter, new_lora, quantize, save_lora
from data import loader, make_data
from diagnostics import answer_attention, needle_share
from differential_attention import DifferentialConfig
from files import read_json, write_json
from finetune_diff import Config
from finetune_original import finetune
from fused_ops import PLAIN_LOSS_MAX_LOGITS, LowRankLinears, head_loss
from modeling_gemma import PaliGemmaConfig
from models import classes_of
from needle_eval.questions import Question
from needle_eval.runner import Answerer, answer_questions
from processing_phi3v import Phi3Processor, Phi3VProcessor
from vision_cache import VisionCache

TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_phi.folder(tmp_path_factory.mktemp("phi") / "model")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return tiny_phi.folder(tmp_path_factory.mktemp("phi") / "decoder", vision=False)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A finished run of both arms."""
    folder = tmp_path_factory.mktemp("runs")
    fields = dict(max_steps=4, lr=1e-2, warmup_steps=1, tracker="none", lora_dropout=0.2, grids=(2,))
    config = quick(Config, model, folder, **fields)
    finetune(replace(config, output_dir=str(folder / "original")), "original")
    finetune(replace(config, output_dir=str(folder / "diff")), "diff", config.differential)
    return config, folder


@dataclass(frozen=True)
class Gradient:
    """An image of the given size that is made when it is opened."""

    size: tuple[int, int]

    def open(self) -> Image.Image:
        return Image.linear_gradient("L").resize(self.size).convert("RGB")


def script(monkeypatch, main, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def test_both_arms_start_equal_and_train(trained):
    """The first loss of split is that of standard attention, bit for bit."""
    config, folder = trained
    original, diff = (dict(logged(replace(config, output_dir=str(folder / arm)))) for arm in ("original", "diff"))
    assert original[1] == diff[1] and original[4] != diff[4]
    record = read_json(folder / "original" / "run.json")
    assert tuple(record["config"]["lora_targets"]) == TARGETS and record["config"]["lr"] == 1e-2
    counts = record["parameters"]
    width = 32 + 3 * 32, 32 + 32, 32 + 2 * 48, 48 + 32  # inputs and outputs of the four projections
    assert counts["language_model lora"] == [2 * 16 * sum(width)] * 2


def test_an_interrupted_run_ends_bit_equal(trained, tmp_path):
    config, _ = trained
    config = replace(config, differential=DifferentialConfig("v1"))
    for name in ("whole", "cut"):
        run = replace(config, output_dir=str(tmp_path / name))
        if name == "cut":
            interrupt(run, 3, "diff", run.differential)
        finetune(run, "diff", run.differential)
    whole, cut = (replace(config, output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    for read in (saved_lora, saved_differential):
        assert all(torch.equal(read(whole)[key], read(cut)[key]) for key in read(whole))


def test_defaults_follow_the_family(model, tiny_model, decoder, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("finetune_original.open_run", lambda config, arm: seen.update(config=config) or sys.exit(0))
    small = shutil.copytree(model, tmp_path / "small")
    write_json(small / "config.json", read_json(model / "config.json") | {"learning_rate": 3e-3})
    without = shutil.copytree(model, tmp_path / "without")  # as on the hub
    hub = {key: value for key, value in read_json(model / "config.json").items() if key != "learning_rate"}
    write_json(without / "config.json", hub)
    folders = ((model, TARGETS, 4e-5), (without, TARGETS, 4e-5), (small, TARGETS, 3e-3), (decoder, TARGETS, 4e-5))
    for folder, targets, lr in (*folders, (tiny_model, 7, 2e-3)):
        with pytest.raises(SystemExit):
            finetune(quick(Config, folder, tmp_path), "original")
        assert seen["config"].lr == lr
        assert targets in (seen["config"].lora_targets, len(seen["config"].lora_targets))
    assert PaliGemmaConfig().learning_rate == 1e-4  # 3b


def test_a_target_that_matches_nothing_is_refused(model):
    with refused("--lora_targets", "'q_proj'", "qkv_proj o_proj gate_up_proj down_proj"):
        new_lora(Config(lora_targets=("q_proj", "o_proj")), classes_of(model)[0].from_pretrained(model))


def test_evaluation_asks_in_the_turn_of_the_user(trained, model, tmp_path, monkeypatch, capsys):
    _, folder = trained
    monkeypatch.chdir(tmp_path)
    flags = ("--samples=3", "--grids=2", "--batch_size=4")
    models = (model, folder / "original", folder / "diff")
    assert script(monkeypatch, eval_mmnih.main, "--model", *models, *flags, f"--output_dir={tmp_path}") == 0
    printed = capsys.readouterr().out
    assert "32 px in 31 tokens" in printed and "2x2" in printed
    rank = ("--protocol=rank", f"--output_dir={tmp_path / 'rank'}")
    assert script(monkeypatch, eval_mmnih.main, f"--model={folder / 'diff'}", *flags, *rank) == 0
    assert script(monkeypatch, eval_mmnih.main, f"--model={model}", *flags, "--protocol=detect") == 2
    assert "location tokens" in capsys.readouterr().err
    attention = ("--attention=2", f"--output_dir={tmp_path / 'attention'}")
    assert script(monkeypatch, eval_mmnih.main, f"--model={folder / 'diff'}", *flags, *attention) == 0
    measured = read_json(tmp_path / "attention" / "attention.json")["1x2x2"]
    assert measured["n"] == 2 and measured["even"] == 0.25 and all(0 < share < 1 for share in measured["share"])
    assert script(monkeypatch, plots.main, folder / "original", folder / "diff") == 0
    assert (folder / "diff" / "plots" / "attention.png").exists()


def test_attention_is_measured_on_the_patches_of_the_crops(model):
    """Line ends, separator and global view are left out: a needle's share of a uniform map is that of its cell."""
    model_class, processor_class = classes_of(model)
    built, processor = model_class.from_pretrained(model), processor_class.from_pretrained(model)
    batch = processor([Gradient((9, 9)).open(), Gradient((40, 20)).open()], ["where is this?"] * 2, ["No", "yes"])
    is_patch = built.model.patch_tokens(batch["input_ids"], batch["image_sizes"])
    assert is_patch.sum(1).tolist() == [4 * 4, 2 * 4]  # 2 x 2 tokens in each of 2 x 2 and of 1 x 2 crops
    first = torch.nonzero(batch["input_ids"][0] == processor.image_token_id)[0].item()
    lines = is_patch[0, first : first + 20].unflatten(0, (4, 5))
    assert lines[:, :4].all() and not lines[:, 4].any() and not is_patch[0, first + 20 :].any()
    one = {key: value[:1] for key, value in batch.items()}
    (maps,) = answer_attention(built, one)
    assert maps.shape == (2, 1, 2, 16)
    assert needle_share(torch.ones(16), (0, 1, 0), 1, 2) == 0.25


def test_answers_do_not_depend_on_the_other_images_of_a_batch(model):
    """Images with different grids, answered together and alone by the runner."""
    model_class, processor_class = classes_of(model)
    parts = model_class.from_pretrained(model), processor_class.from_pretrained(model), Accelerator(cpu=True)
    images = [Gradient((40, 20)), Gradient((20, 60)), Gradient((9, 9))]
    asked = [Question(str(n), "a", (image,), "where is this?", "1", 4) for n, image in enumerate(images)]
    responses = []
    for batch_size in (3, 1):
        rows = answer_questions(Answerer(*parts, torch.float32, batch_size), asked)
        responses.append([row["response"] for row in rows])
    assert responses[0] == responses[1] and all(response for response in responses[0])


def test_generate_with_images_and_without(model, decoder, tmp_path, monkeypatch, capsys):
    image = ROOT / "assets" / "sample" / "fruit.png"
    prompt = "--prompt=where is this?"
    assert script(monkeypatch, generate.main, f"--model={model}", "--image", image, image, prompt) == 0
    assert script(monkeypatch, generate.main, f"--model={model}", prompt) == 0
    assert script(monkeypatch, generate.main, f"--model={decoder}", prompt) == 0
    capsys.readouterr()
    cases = {
        (f"--model={decoder}", f"--image={image}"): "decoder alone",
        (f"--model={model}", f"--image={image}", "--output=boxes.png"): "--output",
        (f"--model={model}", f"--image={image}", "--prompt=<|image_2|>"): "image tags",
    }
    for flags, part in cases.items():
        assert script(monkeypatch, generate.main, *flags) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1


@pytest.mark.parametrize("arm", ["original", "diff"])
def test_an_exported_run_gives_the_logits_of_the_run(trained, tmp_path, monkeypatch, arm):
    _, folder = trained
    out = tmp_path / arm
    assert script(monkeypatch, export.main, f"--model={folder / arm}", f"--output={out}") == 0
    card = (out / "README.md").read_text()
    assert "Phi3VForCausalLM" in card and "phi3" in card
    processor = Phi3VProcessor.from_pretrained(out)
    source, _ = make_data(Config())
    ((_, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=True)
    models = (classes_of(path)[0].from_pretrained(path) for path in (folder / arm, out))
    with torch.no_grad():
        run, exported = (model(**batch, logits_to_keep=1).logits for model in models)
    torch.testing.assert_close(exported, run, atol=1e-5, rtol=0)
    assert (out / "preprocessor_config.json").exists()


def test_the_vision_cache_changes_no_loss(model):
    """Images with different grids, first computed, then from the cache."""
    model_class, processor_class = classes_of(model)
    built, processor = model_class.from_pretrained(model).requires_grad_(False), processor_class.from_pretrained(model)
    images = [Gradient(size).open() for size in ((40, 20), (20, 60))]
    batch = processor(images, ["where is this?"] * 2, ["No", "yes"])
    cache = VisionCache(built, 1.0)
    with torch.no_grad():
        expected = built(**batch).loss
        pixels = {key: batch.pop(key) for key in ("pixel_values", "image_sizes")}
        for _ in range(2):
            assert torch.equal(built(**batch, image_features=cache.features(**pixels)).loss, expected)
        assert len(cache.entries) == 2
        flipped = pixels | {"image_sizes": pixels["image_sizes"].flip(1)}
        cache.features(**flipped)
    assert len(cache.entries) == 4  # another grid of the same crops is another image


def test_a_batch_of_text_alone_passes_the_vision_cache(model, tmp_path):
    rows = [{"image": None, "prefix": f"where is {n}?", "suffix": "yes"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(
        quick(Config, model, tmp_path, data=str(tmp_path / "rows.jsonl"), max_steps=1, vision_cache_gb=0.01), "original"
    )


def test_text_alone_trains(decoder, tiny_model, tmp_path, capsys):
    """Rows whose image is null, with the script: the loss of a decoder falls; PaliGemma skips such rows."""
    assert classes_of(decoder)[1] is Phi3Processor
    rows = [{"image": None, "prefix": f"where is {n}?", "suffix": "yes" if n % 2 else "No"} for n in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = dict(data=str(tmp_path / "rows.jsonl"), max_steps=20, lr=1e-2, warmup_steps=1, tracker="none")
    config = quick(Config, decoder, tmp_path, **fields)
    finetune(config, "original")
    losses = [loss for _, loss in logged(config)]
    assert losses[-1] < losses[0] - 0.15  # the head is frozen and small
    with refused("none of its", "rows can be used"):
        finetune(replace(config, model=str(tiny_model), output_dir=str(tmp_path / "paligemma")), "original")
    assert "has no image" in capsys.readouterr().out


def test_an_adapter_goes_to_transformers_and_back(decoder, tmp_path):
    """The adapter of a pure decoder, loaded by peft on transformers' Phi3ForCausalLM."""
    model_class, processor_class = classes_of(decoder)
    adapted = new_lora(Config(), model_class.from_pretrained(decoder)).eval()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    save_lora(adapted, tmp_path / "ours")
    batch = processor_class.from_pretrained(decoder)(None, ["where is this?"])
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "ours").eval()
    assert type(theirs.get_base_model()) is transformers.Phi3ForCausalLM
    with torch.no_grad():
        expected = adapted(**text).logits
        torch.testing.assert_close(theirs(**text).logits, expected, atol=1e-5, rtol=0)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        back = attach_adapter(model_class.from_pretrained(decoder), tmp_path / "theirs").eval()
        assert torch.equal(back(**text).logits, expected)
    assert len(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) == 2 * 4 * 2


def test_lora_on_fused_projections_is_computed_in_one_piece(decoder, monkeypatch):
    calls = []
    real = LowRankLinears.apply
    monkeypatch.setattr(LowRankLinears, "apply", lambda *args: calls.append(1) or real(*args))
    model_class, processor_class = classes_of(decoder)
    adapted = new_lora(Config(), model_class.from_pretrained(decoder))
    adapted(**processor_class.from_pretrained(decoder)(None, ["where is this?"], ["yes"]))
    assert len(calls) == 2 * 4  # the four projections of two layers


def test_the_tiled_loss_is_used_for_an_untied_head(monkeypatch):
    head = torch.nn.Linear(8, 5000, bias=False).requires_grad_(False)
    rows = PLAIN_LOSS_MAX_LOGITS // 5000 + 1
    hidden, labels = torch.randn(rows, 8, requires_grad=True), torch.randint(5000, (rows,))
    calls, real = [], fused_ops.TiledHeadLoss.apply
    monkeypatch.setattr(fused_ops.TiledHeadLoss, "apply", lambda *args: calls.append(args) or real(*args))
    found = head_loss(hidden, head, labels, None)
    expected = torch.nn.functional.cross_entropy(head(hidden), labels)
    assert len(calls) == 1
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, hidden)[0] for loss in (found, expected)))


def test_quantize_and_checkpointing_find_the_layers(decoder):
    """Layers are found by module type, not by name; 4-bit layers need bitsandbytes."""
    built = classes_of(decoder)[0].from_pretrained(decoder)
    built.gradient_checkpointing_enable()
    assert built.model.language_model.gradient_checkpointing
    pytest.importorskip("bitsandbytes")
    quantize(built, torch.device("cpu"))
    kinds = {type(module).__name__ for name, module in built.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit"}


def test_training_does_not_change_with_gradient_checkpointing(model):
    model_class, processor_class = classes_of(model)
    processor = processor_class.from_pretrained(model)
    source, _ = make_data(Config())
    ((_, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=True)
    gradients = []
    for enabled in (False, True):
        built = model_class.from_pretrained(model).train()
        built.gradient_checkpointing_enable(enabled)
        built(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in built.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert training.max_length(built) == 1024
