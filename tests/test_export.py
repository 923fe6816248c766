"""Export of trained models: merged folders, their model cards, and what would be uploaded to the hub."""

import json
import shutil
import sys
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import torch
import transformers
from huggingface_hub.errors import HTTPError
from refusals import refused
from safetensors.torch import load_file

import checkpoint
import export
import finetune_diff
import generate
from adapters import attach_adapter, merge, new_lora, save_lora
from data import loader, make_data
from differential_attention import DifferentialConfig, differential_parameters
from files import read_json, write_json, write_manifest
from finetune_original import Config, finetune
from model_card import adapter_card, hide_folders, known_license, merged_card
from modeling_gemma import PaliGemmaForConditionalGeneration
from models import classes_of
from processing_paligemma import PaliGemmaProcessor

SHORT = dict(max_steps=3, batch_size=4, lr=0.02, eval_samples=2, eval_batch_size=4, max_new_tokens=3, log_every=1)


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """A finished run of either arm."""
    folder = tmp_path_factory.mktemp("runs")
    finetune(Config(model=str(tiny_model), output_dir=str(folder / "original"), **SHORT), "original")
    v2 = DifferentialConfig("v2")  # far from standard attention from the first step on
    diff = finetune_diff.Config(model=str(tiny_model), output_dir=str(folder / "diff"), differential=v2, **SHORT)
    finetune(diff, "diff", diff.differential)
    return folder


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    try:
        export.main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(scope="module")
def batch(tiny_model):
    source, _ = make_data(Config())
    ((_, batch),) = loader(source, PaliGemmaProcessor.from_pretrained(tiny_model), [[(0, 0), (0, 1)]], with_suffix=True)
    return {key: tensor for key, tensor in batch.items() if key != "labels"}


def logits(model, batch):
    return model.eval()(**batch).logits[batch["attention_mask"].bool()].detach()


def test_the_standard_arm_is_a_paligemma_of_transformers(runs, batch, tiny_model, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert run(monkeypatch, f"--model={runs / 'original'}", f"--output={folder}") == 0
    expected = logits(PaliGemmaForConditionalGeneration.from_pretrained(runs / "original"), batch)
    for family in (transformers.PaliGemmaForConditionalGeneration, PaliGemmaForConditionalGeneration):
        found = logits(family.from_pretrained(folder), batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    untuned = logits(PaliGemmaForConditionalGeneration.from_pretrained(tiny_model), batch)
    assert (untuned - expected).abs().max() > 1e-2  # it learned something that could get lost


@pytest.mark.parametrize("part", ["", "best", "checkpoints/step-000003"])
def test_the_differential_arm_stands_alone(runs, batch, tiny_model, tmp_path, monkeypatch, part):
    """Weights, differential attention and processor are in the folder, and nothing in it refers to the run."""
    folder = tmp_path / "out"
    assert run(monkeypatch, f"--model={runs / 'diff' / part}", f"--output={folder}") == 0
    expected = logits(PaliGemmaForConditionalGeneration.from_pretrained(runs / "diff" / part), batch)
    torch.testing.assert_close(
        logits(PaliGemmaForConditionalGeneration.from_pretrained(folder), batch), expected, atol=1e-5, rtol=0
    )
    here = str(tiny_model.parent)
    assert not [file for file in folder.iterdir() if here in file.read_bytes().decode("latin-1")]
    ours, theirs = (PaliGemmaProcessor.from_pretrained(place) for place in (folder, tiny_model))
    assert ours.encode("answer en where is tent?") == theirs.encode("answer en where is tent?")
    assert (ours.image_size, ours.resample) == (theirs.image_size, theirs.resample)
    assert {"config.json", "differential_model.safetensors", "README.md"} < {file.name for file in folder.iterdir()}


def test_the_card_of_a_checkpoint_claims_no_score_of_averaged_weights(tiny_model, tmp_path, monkeypatch):
    run_folder = tmp_path / "run"
    finetune(Config(model=str(tiny_model), output_dir=str(run_folder), average_last=0.5, **SHORT), "original")
    for part, has_scores in (("final", True), ("checkpoints/step-000003", False)):
        folder = tmp_path / part.replace("/", "-")
        assert run(monkeypatch, f"--model={run_folder / part}", f"--output={folder}") == 0
        assert ("unseen style" in (folder / "README.md").read_text(encoding="utf-8")) == has_scores


def test_a_standard_adapter_loads_with_peft(runs, batch, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapted = peft.AutoPeftModel.from_pretrained(runs / "original/final/adapter").eval()
    assert type(adapted.get_base_model()) is transformers.PaliGemmaForConditionalGeneration
    expected = logits(PaliGemmaForConditionalGeneration.from_pretrained(runs / "original"), batch)
    torch.testing.assert_close(logits(adapted, batch), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="differential_paligemma"):
        peft.AutoPeftModel.from_pretrained(runs / "diff/final/adapter")


@pytest.mark.parametrize("part", ["", "best", "checkpoints/step-000003", "best/adapter"])
@pytest.mark.parametrize("evidence", ["adapter", "run", "both"])
def test_a_differential_run_without_its_parameters_is_refused(runs, tmp_path, monkeypatch, capsys, part, evidence):
    """generate, eval and export would run it as standard attention."""
    run_folder = shutil.copytree(runs / "diff", tmp_path / "run")
    for file in [*run_folder.rglob("differential.safetensors"), *run_folder.rglob("files.json")]:
        file.unlink()
    for file in run_folder.rglob("adapter_config.json" if evidence == "run" else "run.json"):
        if evidence == "run":  # as older versions wrote it
            write_json(file, read_json(file) | {"auto_mapping": None})
        elif evidence == "adapter":
            write_json(file, read_json(file) | {"arm": "original"})
    image = checkpoint.ROOT / "assets/attention.png"
    arguments = (f"--model={run_folder / part}", f"--output={tmp_path / 'out'}")
    for script, main in (("generate.py", generate.main), ("export.py", export.main)):
        monkeypatch.setattr(
            sys, "argv", [script, *arguments, *([f"--image={image}"] if script == "generate.py" else [])]
        )
        with pytest.raises(SystemExit):
            main()
        error = capsys.readouterr().err
        assert "differential.safetensors: missing, although" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_differential_folder_without_its_parameters_is_refused(tiny_model, tmp_path):
    PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, differential="v2").save_pretrained(tmp_path)
    (tmp_path / "differential.safetensors").unlink()
    with refused(tmp_path / "differential.safetensors", "missing", tmp_path / "config.json"):
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "differential.safetensors"])
def test_a_flipped_bit_in_a_finished_run_is_refused(runs, tmp_path, file):
    final = shutil.copytree(runs / "diff", tmp_path / "run") / "final"
    write_manifest(final)
    (final / "run.json").write_text((final / "run.json").read_text() + "\n")  # a base model may be corrected there
    PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "run")
    data = bytearray((final / file).read_bytes())
    data[-1] ^= 1
    (final / file).write_bytes(data)
    with refused(final / file, "damaged"):
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_differential_parameters_are_finite(tiny_model, tmp_path, value):
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, differential="v2")
    name = next(iter(differential_parameters(model)))
    with torch.no_grad():
        differential_parameters(model)[name].fill_(value)
    model.save_pretrained(tmp_path)
    with refused(tmp_path / "differential.safetensors", name, "contains NaN or infinity"):
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("arm", ["original", "diff"])
def test_the_card_of_an_adapter(runs, arm):
    folder = runs / arm / "final/adapter"
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "peft" and card.data.base_model is None  # a folder is not a hub id
    assert "lora" in card.data.tags
    assert ("load_differential" in card.text) == (arm == "diff")
    assert ("AutoPeftModel" in card.text) == (arm == "original")
    assert "[More Information Needed]" not in card.text
    facts = "| task | `image-text-to-text: find a captioned image", "| base model | `tiny-model", "| seed | `0` |"
    for fact in (*facts, "| LoRA | `rank ", "| updates | `3, 4 examples each` |"):
        assert fact in card.text
    log = [json.loads(line) for line in (runs / arm / "metrics.jsonl").read_text().splitlines()]
    found = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    expected = [line["eval"] for line in log if "eval" in line][-1]
    assert found == {rows: 100 * right / n for rows, (right, n) in expected.items()}
    assert str(runs) not in (folder / "README.md").read_text(encoding="utf-8")


def test_an_update_has_the_examples_of_all_micro_batches():
    record = {"base_model": "org/name", "config": {"data": "haystack", "batch_size": 8, "accumulation": 4}, "step": 3}
    assert "| updates | `3, 32 examples each` |" in adapter_card(record, {}, None, "paligemma")


def test_a_checkpoint_has_no_scores_of_an_earlier_evaluation(tiny_model, tmp_path):
    config = Config(model=str(tiny_model), output_dir=str(tmp_path), **SHORT | {"save_every": 1, "keep_checkpoints": 3})
    finetune(config, "original")
    texts = {
        folder: (tmp_path / folder / "adapter/README.md").read_text() for folder in ("checkpoints/step-000001", "final")
    }
    assert "Wilson" not in texts["checkpoints/step-000001"] and "Wilson" in texts["final"]


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/home/jane doe/data/my.jsonl", "my.jsonl"),
        (r"C:\Users\jane\x.jsonl", "x.jsonl"),
        ("haystack:/home/jane/pets/", "haystack:pets"),
        (r"vqav2:C:\Users\jane\coco", "vqav2:coco"),
        ("haystack", "haystack"),
        ("hub:org/name", "hub:org/name"),
        ("assets/sample/rows.jsonl", "assets/sample/rows.jsonl"),
    ],
)
def test_a_card_names_no_folder_of_this_machine(path, shown):
    assert hide_folders(path) == shown


@pytest.mark.parametrize("name", ["org/name", "org/name@abc", "assets/paligemma-nano"])
def test_the_base_of_an_adapter(tiny_model, tmp_path, monkeypatch, name):
    """A local folder is stored as an absolute path, which does not read as a hub id; a revision separately."""
    monkeypatch.chdir(checkpoint.ROOT)
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    adapted = new_lora(Config(), model)
    model.name_or_path = name
    save_lora(adapted, tmp_path / "adapter")
    config = read_json(tmp_path / "adapter/adapter_config.json")
    local = str(checkpoint.ROOT / name) if name.startswith("assets") else name.partition("@")[0]
    assert config["base_model_name_or_path"] == local
    assert config["revision"] == ("abc" if "@" in name else None)
    assert checkpoint.resolve_run(tmp_path)[0] == (local if name.startswith("assets") else name)


@pytest.mark.parametrize("how", ["no", "full"])
def test_a_model_with_an_adapter_is_not_saved_as_a_whole(tiny_model, tmp_path, how):
    """Nothing could load such a folder; the merged model can be saved."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    new_lora(Config(train_projector=how), model)
    with refused("save_pretrained", "merge it"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    merge(model)
    model.save_pretrained(tmp_path / "model")
    PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "model")


def test_a_full_memory_is_not_taken_for_a_fault_of_the_adapter(tiny_model, tmp_path, monkeypatch):
    """An out-of-memory error keeps its own message, which names the flags that help."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    save_lora(new_lora(Config(), model), tmp_path)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        attach_adapter(PaliGemmaForConditionalGeneration.from_pretrained(tiny_model), tmp_path)


def test_a_model_in_4_bits_is_not_saved(tiny_model, tmp_path):
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model)
    model.is_loaded_in_4bit = True  # set by adapters.quantize
    with refused("save_pretrained", "4 bits"):
        model.save_pretrained(tmp_path / "model")


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_transformers_refuses_a_differential_folder(runs, batch, tmp_path, monkeypatch, size):
    """As a standard model it would answer differently without an error."""
    monkeypatch.setattr(checkpoint, "save_weights", partial(checkpoint.save_weights, max_shard_size=size))
    model = PaliGemmaForConditionalGeneration.from_pretrained(runs / "diff")
    merge(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "differential_model.safetensors.index.json").is_file() == (size == "20KB")
    with pytest.raises(ValueError, match="differential_paligemma"):
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    assert classes_of(tmp_path)[0] is PaliGemmaForConditionalGeneration
    torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-5, rtol=0)


def test_differential_folders_of_older_versions_load(runs, batch, tmp_path):
    """They have the model_type and weight file names of a standard model."""
    model = PaliGemmaForConditionalGeneration.from_pretrained(runs / "diff")
    merge(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "differential_model.safetensors").rename(tmp_path / "model.safetensors")
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"model_type": "paligemma"})
    again = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("differential", [None, "v2"])
def test_saving_over_a_model_of_the_other_kind_leaves_one(tiny_model, tmp_path, differential):
    kinds = (None if differential else "v2", differential)
    for kind in kinds:
        PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, differential=kind).save_pretrained(tmp_path)
    PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "differential_model.safetensors").touch()
    with refused(tmp_path, "model.safetensors and differential_model.safetensors are two models"):
        PaliGemmaForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("arm", ["original", "diff"])
def test_the_card_says_what_it_is(runs, tmp_path, monkeypatch, arm):
    folder = tmp_path / f"my-{arm}"
    assert run(monkeypatch, f"--model={runs / arm}", f"--output={folder}", "--license=mit") == 0
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and card.data.pipeline_tag == "image-text-to-text"
    assert ("differential-attention" in card.data.tags) == (arm == "diff")
    assert "lora" not in card.data.tags  # it is merged
    log = [json.loads(line) for line in (runs / arm / "metrics.jsonl").read_text().splitlines()]
    found = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    expected = [line["eval"] for line in log if "eval" in line][-1]
    assert found == {rows: 100 * right / n for rows, (right, n) in expected.items()}
    for part in (f"arm `{arm}`, step 3", "| lr | `0.02` |", "| seed | `0` |", "torch 2", "differential_transformers"):
        assert (part in card.text) == (part != "differential_transformers" or arm == "diff")


def test_the_base_model_s_name_and_licence_are_metadata():
    record = {"arm": "original", "base_model": "google/paligemma-3b-pt-224", "base_revision": "a" * 40}
    record |= {"config": {"data": "hub:org/set"}, "step": 1, "base_weights": None}
    for family, library, task in (
        ("paligemma", "transformers", "image-text-to-text"),
        ("phi3_v", None, "image-text-to-text"),  # transformers has no class for it
        ("phi3", "transformers", "text-generation"),
    ):
        card = merged_card(record, {}, None, family, "Model", "out")
        data = huggingface_hub.ModelCard(card).data
        assert (data.library_name, data.pipeline_tag) == (library, task)
        assert "95 % Wilson interval" not in card  # no scores, no table
    text = merged_card(record, {}, None, "paligemma", "PaliGemmaForConditionalGeneration", "out")
    data = huggingface_hub.ModelCard(text).data
    assert (data.base_model, data.license, data.datasets) == ("google/paligemma-3b-pt-224", "gemma", ["org/set"])
    assert "google/paligemma-3b-pt-224@" + "a" * 40 in text
    assert known_license("assets/paligemma-nano") == "apache-2.0" and known_license("/x") is None


def test_a_base_model_in_the_repository_is_no_hub_id():
    """run.json stores it as assets/paligemma-nano, which has the form of an id."""
    config = {"data": "haystack", "batch_size": 1, "accumulation": 1}
    record = {"arm": "original", "base_model": "assets/paligemma-nano", "base_weights": "0" * 16, "config": config}
    for card in (
        adapter_card(record, {}, None, "paligemma"),
        merged_card(record, {}, None, "paligemma", "PaliGemmaForConditionalGeneration", "out"),
    ):
        assert huggingface_hub.ModelCard(card).data.base_model is None and "`assets/paligemma-nano`" in card


def test_bfloat16_halves_the_folder(runs, batch, tmp_path, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        assert run(monkeypatch, f"--model={runs / 'diff'}", f"--output={tmp_path / dtype}", f"--dtype={dtype}") == 0
    whole, half = (
        (tmp_path / dtype / "differential_model.safetensors").stat().st_size for dtype in ("float32", "bfloat16")
    )
    assert 0.49 < half / whole < 0.52
    added = [load_file(tmp_path / dtype / "differential.safetensors") for dtype in ("float32", "bfloat16")]
    assert all(torch.equal(added[0][key], added[1][key]) for key in added[0])


class Hub:
    """A stand-in for HfApi that records its calls."""

    asked: list = []
    fault = upload_fault = None

    def create_repo(self, name, **kwargs):
        if self.fault:
            raise self.fault
        self.asked.append((name, kwargs))

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.upload_fault:
            raise self.upload_fault
        self.asked.append((repo_id, sorted(file.name for file in folder_path.iterdir())))


def test_push_to_hub(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    arguments = [f"--model={runs / 'diff'}", f"--output={tmp_path / 'out'}", "--push_to_hub=me/mine"]
    monkeypatch.setattr(Hub, "fault", OSError("no\ntoken"))
    assert run(monkeypatch, *arguments) == 2
    assert "--push_to_hub=me/mine: no token: check the name and try again" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # refused before the work
    monkeypatch.setattr(Hub, "fault", None)
    assert run(monkeypatch, *arguments) == 0
    (created, kwargs), (uploaded, files) = Hub.asked
    assert created == uploaded == "me/mine" and kwargs == {"private": True, "exist_ok": True}
    weights = {"differential.safetensors", "differential_model.safetensors"}
    assert {"README.md", "config.json", "tokenizer.json"} | weights <= set(files)


@pytest.mark.parametrize("status", [None, 401, 403, 500])
def test_a_failed_upload_leaves_the_folder_and_says_how_to_upload_it(runs, tmp_path, monkeypatch, capsys, status):
    """A timeout has no status, and only a refused token needs a login."""
    fault = HTTPError("timed out")
    if status is not None:
        fault.response = SimpleNamespace(status_code=status)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "upload_fault", fault)
    output = tmp_path / "out"
    assert run(monkeypatch, f"--model={runs / 'original'}", f"--output={output}", "--push_to_hub=me/mine") == 2
    error = capsys.readouterr().err
    assert f"upload {output}, which is complete, with `hf upload me/mine {output}`" in error
    assert error.startswith("error: --push_to_hub=me/mine: timed out") and len(error.splitlines()) == 1
    assert ("hf auth login" in error) == (status in (401, 403))
    PaliGemmaForConditionalGeneration.from_pretrained(output)


def test_what_a_user_gets_wrong(runs, tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    for model, output, message in (
        (tiny_model, tmp_path / "out", "not a run"),
        (runs / "diff", tmp_path / "mine", "exists already"),
        (tmp_path / "gone", tmp_path / "out", "gone"),
    ):
        assert run(monkeypatch, f"--model={model}", f"--output={output}") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists() and (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
