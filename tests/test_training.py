"""The training loop: its arithmetic, its run folder, what it saves, and that nothing is lost when it is cut off."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import run_folder
import training
from data import loader, make_data
from errors import UserError
from finetune_original import Config, finetune
from modeling_gemma import PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config(tiny_model, tmp_path):
    return Config(
        model=str(tiny_model),
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        batch_size=4,
        warmup_steps=2,
        eval_samples=4,
        eval_batch_size=4,
        eval_every=4,
        max_new_tokens=3,
        log_every=1,
        save_every=2,
    )


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


# ---- adapters
def test_lora_goes_into_the_language_model_only_and_changes_nothing_at_first(config):
    run, model, adapted, processor = parts(config)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    source, _ = make_data(config)
    ((_, batch),) = loader(source, processor, [[(0, 0), (0, 1)]], with_suffix=True)
    assert torch.equal(adapted(**batch).loss, plain(**batch).loss)
    counts = training.trainable_counts(adapted)
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
    assert training.trainable_counts(adapted)["language_model lora"] == [9_805_824, 9_805_824]


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
        r=4, target_modules=r".*language_model\.layers\.\d+\.self_attn\.(q|v)_proj", init_lora_weights=False
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
    with pytest.raises(UserError, match="lr 0.002 -> 0.1"):
        finetune(replace(config, lr=0.1), "original")
    with pytest.raises(UserError, match="arm original -> diff"):
        finetune(config, "diff")


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


def test_two_processes_train_as_one(config, tmp_path):
    config = replace(config, accumulation=2, lora_dropout=0.0, max_steps=4)
    finetune(config, "original")
    together = replace(config, output_dir=str(tmp_path / "together"))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "finetune_original.py"]
    process = script(*launch, *flags(together))
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert dict(metrics(together)) == pytest.approx(dict(metrics(config)), abs=1e-5)
    assert metrics(together, "eval") == metrics(config, "eval")


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


def test_a_killed_process_continues_from_its_last_whole_checkpoint(config, tmp_path):
    config = replace(config, max_steps=40)
    finetune(config, "original")
    killed = replace(config, output_dir=str(tmp_path / "killed"))
    process = script("finetune_original.py", *flags(killed))
    wait_for(tmp_path / "killed" / "checkpoints" / "step-000006", process)
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
