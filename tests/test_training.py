"""The training loop: its arithmetic, its run folder, what it saves, and that nothing is lost when it is cut off."""

import importlib.machinery
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from test_data import parquet, vqav2

import adapters
import run_folder
import training
from checkpoint import resolve_run
from data import loader, make_data
from differential_attention import DifferentialConfig
from errors import UserError
from files import write_manifest
from finetune_original import Config, finetune
from modeling_gemma import PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tiny_model, tmp_path):
    return tiny.quick(Config, tiny_model, tmp_path, max_steps=6, warmup_steps=2, eval_every=4)


def metrics(config, key="loss"):
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


def adapter(config, folder="final"):
    return safetensors.torch.load_file(Path(config.output_dir) / folder / "adapter" / "adapter_model.safetensors")


def parts(config):
    """Everything a training step needs, without a run of it."""
    run = run_folder.open_run(config, "original")
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    adapted = training.add_lora(run, config, model)
    return run, model, adapted, PaliGemmaProcessor.from_pretrained(config.model)


def flags(config):
    return [f"--{key}={value}" for key, value in vars(config).items() if getattr(Config(), key) != value]


def script(*arguments, **kwargs):
    command = [sys.executable, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


# ---- arithmetic
def gradients(config, adapted, run, micro):
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.0)
    loss, norm = training.train_step(run, config, adapted, optimizer, micro, step=0)
    return loss, norm, {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}


def test_accumulation_keeps_the_token_mean_exact(config):
    """Rows of 2 and of 6 label tokens: a mean of micro-batch means would weigh them wrongly."""
    run, model, adapted, processor = parts(replace(config, clip=1e9))
    for p in (p for n, p in adapted.named_parameters() if "lora_B" in n):
        torch.nn.init.normal_(p, std=0.1)  # at zero, half the gradients would vanish
    source, _ = make_data(replace(config, negatives=0.5))
    rows = [(0, i) for i in range(8)]
    whole = list(loader(source, processor, [rows], with_suffix=True))
    split = list(loader(source, processor, [rows[i : i + 2] for i in range(0, 8, 2)], with_suffix=True))
    assert len({int((batch["labels"] != -100).sum()) for _, batch in split}) > 1
    loss, norm, grads = gradients(config, adapted, run, whole)
    again, norm_again, grads_again = gradients(config, adapted, run, split)
    torch.testing.assert_close(torch.tensor(loss), model(**whole[0][1]).loss, atol=1e-6, rtol=0)
    assert loss == pytest.approx(again, abs=1e-6) and norm == pytest.approx(norm_again, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_again[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"batch_size": 2, "accumulation": 2}])
def test_recomputing_and_accumulating_save_memory_and_change_no_result(config, tmp_path, change):
    """Losses, adapters and answers are those of the plain run; a backward pass keeps fewer bytes."""

    def peak_kept(config) -> int:
        run, _, adapted, processor = parts(config)
        source, _ = make_data(config)
        _, batch = next(training.training_batches(run, config, processor, source, 0))
        adapted.base_model.model.gradient_checkpointing_enable(config.gradient_checkpointing)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            adapted.train()(**batch)
        return sum(t.nbytes for t in kept.values())

    config = replace(config, max_steps=3)
    changed = replace(config, output_dir=str(tmp_path / "changed"), **change)
    assert peak_kept(changed) < 0.8 * peak_kept(config)
    finetune(config, "original")
    finetune(changed, "original")
    assert dict(metrics(changed)) == pytest.approx(dict(metrics(config)), abs=1e-5)
    assert metrics(changed, "eval") == metrics(config, "eval")
    expected = adapter(config)
    for name, tensor in adapter(changed).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4)


def test_the_learning_rate_warms_up_from_above_zero_and_ends_at_zero():
    config = Config(lr=1.0, warmup_steps=4)
    rates = [training.learning_rate(config, step, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[20] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_an_evaluation_batch_never_holds_the_answer(config, tiny_model):
    processor = PaliGemmaProcessor.from_pretrained(tiny_model)
    source, _ = make_data(config)
    ((examples, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=False)
    assert "labels" not in batch and not batch["token_type_ids"].any()
    for row, example in zip(batch["input_ids"], examples, strict=True):
        assert processor.decode(row) == example.prefix + "\n"


def test_a_non_finite_loss_stops_with_step_and_rows(config):
    run, model, adapted, processor = parts(config)
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = torch.inf
    source, sets = make_data(config)
    batch = list(loader(source, processor, [[(0, 3)]], with_suffix=True))
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(UserError, match="step 8.*train/0/0/3"):
        training.train_step(run, config, adapted, optimizer, batch, step=7)
    assert all(torch.equal(before[n], p) for n, p in adapted.named_parameters() if p.requires_grad)


# ---- 4-bit bases
def small_linear(told: list):
    """A stand-in for bitsandbytes' layer, which notes how it was made."""

    class Linear4bit(torch.nn.Linear):
        def __init__(self, *shape, **kwargs):
            told.append(kwargs)
            super().__init__(*shape, bias=kwargs["bias"])

    return Linear4bit


def test_a_4_bit_base_computes_in_bfloat16(config, monkeypatch):
    """The name of the compute type is easily misspelt, and swallowed: then all is computed in float32."""
    with pytest.raises(UserError, match="--dtype=nf4: 4-bit weights need a CUDA card"):
        finetune(replace(config, dtype="nf4"), "original")
    assert run_folder.choose_dtype("nf4", torch.device("cuda"))[0] == torch.bfloat16
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        adapters.quantize(model, torch.device("cpu"))
    told = []
    stand_in = types.ModuleType("bitsandbytes.nn")
    stand_in.Linear4bit, stand_in.Params4bit = (
        small_linear(told),
        lambda data, **kwargs: torch.nn.Parameter(data, False),
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", stand_in)
    adapters.quantize(model, torch.device("cpu"))
    assert told == [{"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}] * 14


def test_a_4_bit_base_trains(config):
    """With bitsandbytes itself, which has kernels for the CPU too."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = run_folder.open_run(config, "original")
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model, torch.bfloat16)
    adapters.quantize(model, torch.device("cpu"))
    small = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(small) == 14 and all(m.compute_dtype == torch.bfloat16 for m in small)
    assert all(m.weight.quant_type == "nf4" and m.weight.quant_state is not None for m in small)
    adapted = training.add_lora(run, config, model)
    source, _ = make_data(config)
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    batch = list(loader(source, processor, [[(0, i) for i in range(4)]], with_suffix=True))
    optimizer = training.make_optimizer(replace(config, lr=0.01), adapted)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [training.train_step(run, config, adapted, optimizer, batch, step)[0] for step in range(15)]
    assert losses[-1] < losses[0] - 0.2


# ---- adapters
def test_lora_goes_into_the_language_model_only_and_changes_nothing_at_first(config):
    run, model, adapted, processor = parts(config)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    source, _ = make_data(config)
    ((_, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=True)
    assert torch.equal(adapted(**batch).loss, plain(**batch).loss)
    counts = adapters.trainable_counts(adapted)
    trained = {name for name, (trainable, _) in counts.items() if trainable}
    assert trained == {"language_model lora"}
    wrapped = {n for n, _ in adapted.named_parameters() if "lora_" in n}
    assert len(wrapped) == 2 * 7 * 2 and all("language_model.layers" in n for n in wrapped)


def test_lora_counts_of_paligemma_3b():
    """9,805,824 parameters at rank 8: the language model's seven linears, none in SigLIP."""
    from modeling_gemma import PaliGemmaConfig

    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig())
    config = Config(model="google/paligemma-3b-pt-224", lora_rank=8)
    run = run_folder.Run(Path("none"), None, torch.float32, {})
    adapted = training.add_lora(run, config, model)
    assert adapters.trainable_counts(adapted)["language_model lora"] == [9_805_824, 9_805_824]


def test_lora_that_fits_nothing_is_refused(config):
    with pytest.raises(UserError, match="lora_targets"):
        parts(replace(config, lora_targets=("c_attn",)))


def test_adapters_travel_to_transformers_and_back(config, tmp_path):
    import peft
    import transformers

    finetune(config, "original")
    ours = PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)
    processor = PaliGemmaProcessor.from_pretrained(config.output_dir)
    source, _ = make_data(config)
    ((_, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=True)
    length = batch["input_ids"].shape[1]
    expected = ours(**batch, logits_to_keep=length).logits
    base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    theirs = peft.PeftModel.from_pretrained(base, Path(config.output_dir) / "final" / "adapter").eval()
    found = theirs(**batch).logits
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=0)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    assert (plain(**batch, logits_to_keep=length).logits[valid] - expected[valid]).abs().max() > 1e-3  # it learned

    lora = peft.LoraConfig(
        r=4, target_modules=r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj)", init_lora_weights=False
    )
    base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    trained_there = peft.get_peft_model(base, lora).eval()
    trained_there.save_pretrained(tmp_path / "there" / "adapter", save_embedding_layers=False)
    (tmp_path / "there" / "run.json").write_text(json.dumps({"base_model": config.model}))
    back = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "there")
    expected = trained_there(**batch).logits
    torch.testing.assert_close(back(**batch, logits_to_keep=length).logits[valid], expected[valid], atol=1e-5, rtol=0)


# ---- the run folder
def test_a_run_leaves_what_it_promises(config, capsys):
    finetune(config, "original")
    folder = Path(config.output_dir)
    record = json.loads((folder / "run.json").read_text())
    assert record["arm"] == "original" and record["config"]["max_steps"] == 6
    assert {"versions", "commit", "device", "dtype"} <= record.keys()
    assert [step for step, _ in metrics(config)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in metrics(config, "eval")] == [0, 4, 6]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {"step", "set", "id", "prompt", "answer", "response"} <= samples[0].keys()
    assert (folder / "plots" / "loss.png").stat().st_size > 1000 and any((folder / "tensorboard").iterdir())
    base = sum(f.stat().st_size for f in Path(config.model).glob("*.safetensors"))
    sizes = [f.stat().st_size for f in (folder / "final").rglob("*.safetensors")]
    assert len(sizes) == 1 and sizes[0] < base  # the frozen base is nowhere in it
    told = capsys.readouterr().out
    for part in ("untuned", "fine-tuned", "chance", "peak memory", "4 examples an update", "labels '1, "):
        assert part in told


def test_a_finished_run_says_so_and_overwrite_starts_anew(config, capsys):
    finetune(config, "original")
    first = metrics(config)
    finetune(config, "original")
    assert "is finished" in capsys.readouterr().out and metrics(config) == first
    finetune(replace(config, overwrite=True), "original")
    assert metrics(config) == first  # and the same seed gives the same losses


def test_another_configuration_is_refused(config):
    finetune(config, "original")
    with pytest.raises(UserError, match="steps made so far: lr 0.002 -> 0.1"):
        finetune(replace(config, lr=0.1), "original")
    with pytest.raises(UserError, match="arm original -> diff"):
        finetune(config, "diff")


def test_what_was_changed_is_said_before_anything_else(config, capsys):
    """What only watches may change under a run; the rest is refused, each by its reason."""
    interrupt(config, 4)
    capsys.readouterr()
    changed = replace(config, log_every=2, lora_rank=8, batch_size=2, lr=0.1)
    before = sorted((p, p.stat().st_mtime_ns) for p in Path(config.output_dir).rglob("*"))
    with pytest.raises(UserError) as caught:
        finetune(changed, "original")
    told = str(caught.value)
    for part in (
        "order of the data: batch_size 4 -> 2",
        "shapes of what is saved: lora_rank 16 -> 8",
        "lr 0.002 -> 0.1",
    ):
        assert part in told
    assert "log_every" not in told and "model" not in capsys.readouterr().out
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(config.output_dir).rglob("*")) == before
    finetune(replace(config, gradient_checkpointing=True, eval_batch_size=4, log_every=2), "original")
    told = capsys.readouterr().out
    assert "changed since: log_every 1 -> 2" in told and "changed since: gradient_checkpointing False -> True" in told
    assert [step for step, _ in metrics(config)] == [1, 2, 3, 4, 6]


def interrupt(config, step: int, arm="original"):
    """A run that is asked to stop in the update after `step` others."""
    real = training.train_step

    def stops(run, *rest):
        run.signal = signal.SIGTERM if rest[-1] == step - 1 else 0
        return real(run, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training, "train_step", stops)
        finetune(config, arm)


def test_data_that_changed_under_a_run_is_noticed(config, tmp_path):
    shutil.copytree(ROOT / "assets" / "sample", tmp_path / "rows")
    config = replace(config, data=str(tmp_path / "rows" / "rows.jsonl"), batch_size=2)
    interrupt(config, 3)
    text = (tmp_path / "rows" / "rows.jsonl").read_text()
    (tmp_path / "rows" / "rows.jsonl").write_text(text.replace("banana", "orange"))
    before = metrics(config)
    with pytest.raises(UserError, match="rows.jsonl has changed since this run began"):
        finetune(config, "original")
    (tmp_path / "rows" / "rows.jsonl").write_text(text + "\n\n")
    finetune(config, "original")
    assert metrics(config)[: len(before)] == before and len(metrics(config)) == 6


def test_bad_rows_are_counted_and_named_or_refused(config, tmp_path, capsys):
    """One bad when it is read, one when it is opened: training and evaluation go on without them."""
    shutil.copytree(ROOT / "assets" / "sample", tmp_path / "rows")
    good = json.loads((tmp_path / "rows" / "rows.jsonl").read_text().splitlines()[0])
    rows = [good, good | {"suffix": ""}, good | {"image": "broken.png"}, good]
    (tmp_path / "rows" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "rows" / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = str(tmp_path / "rows" / "some.jsonl")
    config = replace(config, data=data, eval_data=data, batch_size=1, max_steps=6)
    with pytest.raises(UserError, match="some.jsonl:2: suffix"):
        finetune(replace(config, strict_data=True), "original")
    assert not Path(config.output_dir).exists()
    finetune(config, "original")
    told = capsys.readouterr().out
    assert "1 rows cannot be used" in told and told.count("some.jsonl:3: broken.png: broken image") == 1
    named = (Path(config.output_dir) / "skipped.log").read_text()
    assert [line.partition("some.jsonl:")[2][0] for line in named.splitlines()] == ["2", "3"]
    assert metrics(config, "eval")[0][1] == {"some.jsonl": [0, 2]}
    losses = dict(metrics(config))
    assert len(losses) == 6 and sum(loss == 0 for loss in losses.values()) == 2  # alone in its batch, it weighs nothing


def test_vqav2_from_its_official_files(config, tmp_path):
    """The path of the documented GPU command, on a data set of the same columns."""
    vqav2(tmp_path / "vqa", "train", pictures=6)
    vqav2(tmp_path / "vqa", "val", pictures=2)
    spec = f"vqav2:{tmp_path / 'vqa'}"
    config = replace(config, data=spec, eval_data=spec, max_steps=20, lr=1e-2, eval_every=100)
    finetune(config, "original")
    losses = [loss for _, loss in metrics(config)]
    assert losses[-1] < losses[0] - 0.4
    assert metrics(config, "eval")[-1][1].keys() == {"vqav2-val"}
    sample = json.loads((Path(config.output_dir) / "samples.jsonl").read_text().splitlines()[0])
    assert (sample["prompt"], sample["answer"]) == ("answer en What is 0?", "red 0")


def test_vqav2_from_a_parquet_copy(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = replace(config, data=f"hub:{parquet(tmp_path / 'set')}", max_steps=3)
    finetune(config, "original")
    assert len(metrics(config)) == 3 and metrics(config, "eval")[-1][1]["held out"][1] == 2


def test_a_model_that_brings_code_is_refused(config, tmp_path):
    shutil.copytree(config.model, tmp_path / "model")
    told = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(told | {"auto_map": {"AutoModel": "model.Model"}}))
    with pytest.raises(UserError, match="code of its own"):
        finetune(replace(config, model=str(tmp_path / "model")), "original")


def test_nothing_here_runs_code_from_a_disk():
    text = "\n".join(file.read_text() for file in ROOT.glob("*.py"))
    assert not re.findall(r"trust_remote_code|pickle\.loads?\(|(?<![.\w])(?:eval|exec)\(", text)
    loads = [line for line in text.splitlines() if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)


def test_the_revision_of_a_hub_model_is_noted_and_used(config, tmp_path, monkeypatch):
    """From a cache with two revisions: the run goes on with, and its folder stands for, the one it began with."""
    import huggingface_hub

    revisions = {"main": "a" * 40, "later": "b" * 40}
    for commit in revisions.values():
        shutil.copytree(config.model, tmp_path / "snapshots" / commit)

    def snapshot(name, revision=None, allow_patterns=None):
        assert name == "org/name"
        return str(tmp_path / "snapshots" / revisions.get(revision or "main", revision))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    config = replace(config, model="org/name", max_steps=4)
    interrupt(config, 3)
    record = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert (record["base_model"], record["base_revision"]) == ("org/name", "a" * 40)
    monkeypatch.setitem(revisions, "main", "b" * 40)
    with pytest.raises(UserError, match=f"base_revision {'a' * 40} -> {'b' * 40}"):
        finetune(config, "original")
    monkeypatch.setitem(revisions, "main", "a" * 40)
    finetune(config, "original")
    assert resolve_run(config.output_dir)[0] == "org/name@" + "a" * 40
    shutil.rmtree(tmp_path / "snapshots" / ("b" * 40))
    monkeypatch.setitem(revisions, "main", "b" * 40)
    PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)


# ---- trackers
def test_tensorboard_has_every_number_of_the_log(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(config, "original")
    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(dict(metrics(config)), rel=1e-6)
    assert [e.step for e in events.Scalars("exact/2x2")] == [0, 4, 6]


def test_wandb_by_name_if_it_is_installed(config, monkeypatch):
    """Told to a stand-in for the package; the run folder holds the same."""
    with pytest.raises(UserError, match="pip install wandb"):
        finetune(replace(config, tracker="wandb"), "original")
    assert not Path(config.output_dir).exists()
    told = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    service = types.SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end")
    )
    wandb.init = lambda **kwargs: told.append(kwargs) or service
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    finetune(replace(config, tracker="wandb"), "original")
    start, *lines, end = told
    assert start["id"] == "run" and start["config"]["max_steps"] == 6 and end == "end"
    assert [(step, v["loss"]) for step, v in lines if "loss" in v] == metrics(config)
    assert not (Path(config.output_dir) / "tensorboard").exists()


def test_a_tower_in_shares_keeps_no_features(config):
    for kept in ({"vision_cache_gb": 1.0}, {"vision_cache_dir": "features"}):
        with pytest.raises(UserError, match="--shard=True --vision_cache_gb"):
            finetune(replace(config, shard=True, **kept), "original")


@pytest.mark.parametrize("field", ["eval_every", "log_every", "save_every", "accumulation", "keep_checkpoints"])
def test_numbers_that_make_no_sense_are_refused(config, field):
    with pytest.raises(UserError, match=f"--{field}=0"):
        finetune(replace(config, **{field: 0}), "original")


def test_a_run_of_which_no_checkpoint_reads_is_not_thrown_away(config):
    finetune(config, "original")
    folder = Path(config.output_dir)
    shutil.rmtree(folder / "final")
    for state in folder.glob("checkpoints/*/trainer.pt"):
        state.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="no checkpoint can be read"):
        finetune(config, "original")
    assert len(metrics(config)) == 6


def test_the_output_folder_may_be_a_link_but_no_file(config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    finetune(replace(config, output_dir=str(tmp_path / "link"), max_steps=2), "original")
    assert (tmp_path / "disk" / "final").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        finetune(replace(config, output_dir=str(tmp_path / "file")), "original")


def test_overwrite_never_deletes_what_is_no_run(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="no run"):
        finetune(replace(config, output_dir=str(tmp_path / "mine"), overwrite=True), "original")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_a_fault_before_training_leaves_nothing(config):
    with pytest.raises(UserError, match="missing.jsonl"):
        finetune(replace(config, data="missing.jsonl"), "original")
    assert not Path(config.output_dir).exists()


def test_a_run_cut_off_in_its_last_evaluation_ends_with_the_same_files(config, monkeypatch):
    finetune(config, "original")
    folder = Path(config.output_dir)
    expected = {name: (folder / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")}
    shutil.rmtree(folder / "final")
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "ev')
    finetune(config, "original")
    for name, text in expected.items():
        assert _without_speed((folder / name).read_text()) == _without_speed(text)


def _without_speed(text):
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in text.splitlines()]


def test_a_run_that_was_cut_off_ends_as_the_uninterrupted_one(config, tmp_path, monkeypatch):
    config = replace(config, lora_dropout=0.3)
    finetune(config, "original")
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    step = training.train_step

    def dies(*args, **kwargs):
        if kwargs.get("step", args[-1]) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    monkeypatch.setattr(training, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, "original")
    monkeypatch.setattr(training, "train_step", step)
    assert not (tmp_path / "cut" / "final").exists()
    finetune(cut, "original")
    assert metrics(cut) == metrics(config) and metrics(cut, "eval") == metrics(config, "eval")
    expected = adapter(config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(cut).items())


def test_a_damaged_checkpoint_is_passed_over(config, capsys):
    finetune(config, "original")
    expected = metrics(config)
    folder = Path(config.output_dir)
    shutil.rmtree(folder / "final")
    (folder / "checkpoints" / "step-000006" / "trainer.pt").write_bytes(b"rubbish")
    finetune(config, "original")
    told = capsys.readouterr().out
    assert "step-000006" in told and "continues from" in told
    assert metrics(config) == expected


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "trainer.pt", "run.json"])
def test_one_flipped_bit_is_damage(config, capsys, file):
    """Neither safetensors nor torch would tell: the weights would be loaded in silence."""
    finetune(config, "original")
    expected, weights = metrics(config), adapter(config)
    folder = Path(config.output_dir)
    shutil.rmtree(folder / "final")
    damaged = folder / "checkpoints" / "step-000006" / file
    data = bytearray(damaged.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    damaged.write_bytes(data)
    finetune(config, "original")
    told = capsys.readouterr().out
    assert f"step-000006/{file}: damaged" in told and "step-000004" in told.partition("continues from")[2]
    assert metrics(config) == expected and all(torch.equal(weights[n], t) for n, t in adapter(config).items())


def test_a_checkpoint_after_a_damaged_one_is_kept(config):
    """The damaged one has the higher number and must not push the good ones out."""
    finetune(replace(config, keep_checkpoints=1, save_every=6), "original")
    folder = Path(config.output_dir)
    shutil.rmtree(folder / "final")
    shutil.copytree(folder / "checkpoints" / "step-000006", folder / "checkpoints" / "step-000009")
    (folder / "checkpoints" / "step-000009" / "trainer.pt").write_bytes(b"rubbish")
    (folder / "checkpoints" / "step-000006").rename(folder / "checkpoints" / "step-000003")
    state = torch.load(folder / "checkpoints" / "step-000003" / "trainer.pt", weights_only=True)
    torch.save(state | {"step": 3}, folder / "checkpoints" / "step-000003" / "trainer.pt")
    write_manifest(folder / "checkpoints" / "step-000003")
    finetune(replace(config, keep_checkpoints=1, save_every=5), "original")
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000006", "step-000009"]


def test_a_killed_process_continues_from_its_last_whole_checkpoint(config, tmp_path):
    config = replace(config, max_steps=40)
    finetune(config, "original")
    killed = replace(config, output_dir=str(tmp_path / "killed"))
    process = script("finetune_original.py", *flags(killed))
    wait_for(tmp_path / "killed" / "checkpoints" / "step-000006", process)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="another process is training into it"):
        finetune(killed, "original")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "final").exists()
    process = script("finetune_original.py", *flags(killed))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "continues from" in out
    losses, expected = dict(metrics(killed)), dict(metrics(config))
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, abs=1e-5)  # another number of threads


def wait_for(path: Path, process, seconds: float = 300):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()[1]
        time.sleep(0.02)


def test_a_launcher_s_precision_is_not_taken_up(monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        assert run_folder.make_accelerator().mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()


def test_bfloat16_trains(config):
    finetune(replace(config, dtype="bfloat16"), "original")
    assert all(0 < loss < 20 for _, loss in metrics(config))
    assert all(t.dtype == torch.float32 for t in adapter(config).values())


def test_jsonl_rows_are_learned(config):
    rows = replace(config, data=str(ROOT / "assets" / "sample" / "rows.jsonl"), max_steps=30, lr=1e-2, batch_size=2)
    finetune(replace(rows, eval_every=100), "original")
    losses = [loss for _, loss in metrics(rows)]
    assert losses[-1] < losses[0] - 0.4


def test_kept_vision_features_and_groups_of_one_length_train(config, tmp_path, monkeypatch):
    """Kept features change no bit of a run, and the tower sees every picture once."""
    rows = replace(config, data=str(ROOT / "assets" / "sample" / "rows.jsonl"), batch_size=2, max_steps=8)
    finetune(rows, "original")
    kept = replace(rows, output_dir=str(tmp_path / "kept"), vision_cache_gb=1.0, vision_cache_dir=str(tmp_path / "f"))
    caches = []
    real = training.VisionCache
    monkeypatch.setattr(training, "VisionCache", lambda *args: caches.append(real(*args)) or caches[-1])
    finetune(kept, "original")
    assert caches[0].hits > 0 and caches[0].misses == len(caches[0].kept) <= 3
    assert metrics(kept) == metrics(rows)
    assert all(torch.equal(a, b) for a, b in zip(adapter(kept).values(), adapter(rows).values(), strict=True))
    finetune(replace(rows, output_dir=str(tmp_path / "grouped"), group_by_length=True), "original")


def test_options_that_cannot_be_are_refused_before_anything_is_written(config):
    """Made-up questions are not grouped by length; features of a tower that learns are not kept."""
    with pytest.raises(UserError, match="group_by_length"):
        finetune(replace(config, group_by_length=True), "original")
    vision = DifferentialConfig(towers=("vision",)).resolve()
    with pytest.raises(UserError, match="vision_cache_gb"):
        finetune(replace(config, vision_cache_gb=1.0), "diff", vision)
    assert not Path(config.output_dir).exists()


# ---- the command line
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max_stepz=2"], "max_stepz"),
        (["--max_steps=two"], "max_steps"),
        (["--model=no/such/folder"], "no/such/folder"),
        (["--data=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_a_user_gets_wrong_is_named_with_exit_code_2(arguments, told, tmp_path):
    process = script("finetune_original.py", f"--output_dir={tmp_path / 'run'}", *arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and told in err and "Traceback" not in err
    if not arguments[0].startswith("--max"):  # those two are told by the flag parser, in a box
        assert len(err.strip().splitlines()) == 1 and err.startswith("error: ")
