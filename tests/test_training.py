"""The training loop: its arithmetic, what it trains, evaluates and logs, and the data it takes."""

import importlib.machinery
import json
import math
import re
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from refusals import refused
from runs import ROOT, interrupt, logged, saved_lora, start
from safetensors.torch import load_file
from test_data import parquet, vqav2

import adapters
import evaluation
import machine
import run_folder
import training
from checkpoint import resolve_run
from data import loader, make_data
from differential_attention import DifferentialConfig
from errors import TrainingFailed, UserError
from evaluation import Evaluation, Score, headline_rate
from finetune_original import Config, finetune
from modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration
from processing_paligemma import PaliGemmaProcessor

SAMPLE_ROWS = ROOT / "assets" / "sample" / "rows.jsonl"


@pytest.fixture
def config(tiny_model, tmp_path):
    return tiny.quick(Config, tiny_model, tmp_path, max_steps=6, warmup_steps=2, eval_every=4)


def load_parts(config: Config):
    """What a training step needs: run, model, peft's wrapper, processor."""
    run = run_folder.open_run(config, "original")
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    adapted = training.add_lora(run, config, model)
    return run, model, adapted, PaliGemmaProcessor.from_pretrained(config.model)


def first_batch(config: Config, rows: int, with_suffix: bool = True):
    """(examples, tensors) of the first rows of the training data."""
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    source, _ = make_data(config)
    (batch,) = loader(source, processor, [[(0, i) for i in range(rows)]], with_suffix)
    return batch


# ---- arithmetic
def test_loss_is_the_mean_over_the_label_tokens_of_all_micro_batches(config, tmp_path):
    """Rows have 2 or 6 label tokens: averaging the means of micro-batches would weight them wrongly."""
    whole = replace(config, negatives=0.5, batch_size=8, max_steps=3, lr=0.05, clip=1e9)
    split = replace(whole, batch_size=2, accumulation=4, output_dir=str(tmp_path / "split"))
    run, model, _, processor = load_parts(split)
    source, _ = make_data(split)
    batches = training.training_batches(run, split, model, processor, source, 0)
    counts = [int((next(batches)[1]["labels"] != -100).sum()) for _ in range(4)]
    assert len(set(counts)) > 1
    finetune(whole, "original")
    finetune(split, "original")
    assert dict(logged(split)) == pytest.approx(dict(logged(whole)), abs=1e-5)
    assert dict(logged(split, "grad_norm")) == pytest.approx(dict(logged(whole, "grad_norm")), rel=1e-4)
    expected = saved_lora(whole)
    for name, tensor in saved_lora(split).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3)


def test_final_weights_are_the_mean_of_the_last_updates(config, tmp_path):
    """Each of the last three of six updates counts once; a run interrupted among them has the same mean."""
    average = replace(config, average_last=0.5, save_every=1, keep_checkpoints=6)
    finetune(average, "original")
    folder = Path(average.output_dir)
    saved = [
        load_file(folder / f"checkpoints/step-00000{step}/adapter/adapter_model.safetensors") for step in (4, 5, 6)
    ]
    final = saved_lora(average)
    for name, tensor in final.items():
        mean = sum(weights[name].double() for weights in saved) / 3
        torch.testing.assert_close(tensor.double(), mean, atol=1e-8, rtol=1e-5)
    assert any(not torch.equal(final[name], saved[2][name]) for name in final)
    cut = replace(average, output_dir=str(tmp_path / "cut"))
    interrupt(cut, 5)
    finetune(cut, "original")
    assert all(torch.equal(tensor, final[name]) for name, tensor in saved_lora(cut).items())


def test_first_loss_is_that_of_the_model_on_the_first_batch(config):
    run, model, _, processor = load_parts(config)
    source, _ = make_data(config)
    _, batch = next(training.training_batches(run, config, model, processor, source, 0))
    finetune(config, "original")
    assert logged(config)[0][1] == pytest.approx(float(model(**batch).loss), abs=1e-6)


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"batch_size": 2, "accumulation": 2}])
def test_recomputing_and_accumulating_save_memory_and_change_no_result(config, tmp_path, change):
    """Losses, adapters and answers equal those of the plain run; fewer bytes are saved for the backward pass."""

    def bytes_for_backward(config: Config) -> int:
        run, model, adapted, processor = load_parts(config)
        source, _ = make_data(config)
        _, batch = next(training.training_batches(run, config, model, processor, source, 0))
        model.gradient_checkpointing_enable(config.gradient_checkpointing)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            adapted.train()(**batch)
        return sum(t.nbytes for t in kept.values())

    config = replace(config, max_steps=3)
    changed = replace(config, output_dir=str(tmp_path / "changed"), **change)
    assert bytes_for_backward(changed) < 0.8 * bytes_for_backward(config)
    finetune(config, "original")
    finetune(changed, "original")
    assert dict(logged(changed)) == pytest.approx(dict(logged(config)), abs=1e-5)
    assert logged(changed, "eval") == logged(config, "eval")
    expected = saved_lora(config)
    for name, tensor in saved_lora(changed).items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=1e-4)


def test_learning_rate_warms_up_from_above_zero_and_ends_at_zero():
    config = Config(lr=1.0, warmup_steps=4)
    rates = [training.learning_rate_at(config, step, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[20] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_epochs_count_the_short_last_batch():
    source = range(10)
    assert training.count_steps(Config(epochs=2, batch_size=4), source) == 6
    assert training.count_steps(Config(epochs=0.5, batch_size=4, accumulation=2), source) == 1
    assert training.count_steps(Config(max_steps=7), source) == 7


def test_an_evaluation_batch_never_holds_the_answer(config):
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    examples, batch = first_batch(config, 2, with_suffix=False)
    assert "labels" not in batch and not batch["token_type_ids"].any()
    for row, example in zip(batch["input_ids"], examples, strict=True):
        assert processor.decode(row) == example.prefix + "\n"


def test_a_non_finite_loss_stops_before_the_update_and_names_step_and_rows(config, monkeypatch):
    real, adapters_seen = training.add_lora, []

    def break_norm(run, config, model):
        adapters_seen.append(real(run, config, model))
        with torch.no_grad():
            model.model.language_model.norm.weight[0] = torch.inf
        return adapters_seen[0]

    monkeypatch.setattr(training, "add_lora", break_norm)
    with pytest.raises(UserError, match="step 1: loss nan.*lower --lr, or check these rows: train/0/0/"):
        finetune(config, "original")
    trained = {n: p for n, p in adapters_seen[0].named_parameters() if p.requires_grad}
    assert trained and all(p.isfinite().all() for p in trained.values())
    assert all(not p.any() for n, p in trained.items() if "lora_B" in n)  # as they were


@pytest.mark.parametrize("flag", [{"lr": 10.0, "weight_decay": 10.0}, {"lr": 10.0}])
def test_parameters_that_are_not_finite_are_never_saved(config, monkeypatch, flag):
    """No loss after the last update would show them."""
    monkeypatch.setattr(training, "learning_rate_at", lambda *_: math.inf)
    with pytest.raises(TrainingFailed, match="not finite after step 1: lower --lr"):
        finetune(replace(config, max_steps=1, save_every=1, **flag), "original")
    folder = Path(config.output_dir)
    assert not (folder / "final").exists() and not list(folder.glob("checkpoints/step-*"))


# ---- 4-bit bases
def stand_in_linear(calls: list):
    """A stand-in for the layer of bitsandbytes that records its arguments."""

    class Linear4bit(torch.nn.Linear):
        def __init__(self, *shape, **kwargs):
            calls.append(kwargs)
            super().__init__(*shape, bias=kwargs["bias"])

    return Linear4bit


def test_a_4_bit_base_computes_in_bfloat16(config, monkeypatch):
    """A misspelt compute dtype would be accepted, and everything would be computed in float32."""
    with pytest.raises(UserError, match="--dtype=nf4: 4-bit weights need a CUDA GPU"):
        finetune(replace(config, dtype="nf4"), "original")
    assert machine.choose_dtype("nf4", torch.device("cuda"))[0] == torch.bfloat16
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model, torch.bfloat16)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        adapters.quantize(model, torch.device("cpu"))
    calls = []
    stand_in = types.ModuleType("bitsandbytes.nn")
    stand_in.Linear4bit = stand_in_linear(calls)
    stand_in.Params4bit = lambda data, **kwargs: torch.nn.Parameter(data, False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", stand_in)
    adapters.quantize(model, torch.device("cpu"))
    assert calls == [{"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}] * 14


def test_a_4_bit_base_trains(config, monkeypatch):
    """With the real bitsandbytes, which also has CPU kernels."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = run_folder.open_run(config, "original")
    model = PaliGemmaForConditionalGeneration.from_pretrained(config.model, torch.bfloat16)
    adapters.quantize(model, torch.device("cpu"))
    small = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(small) == 14 and all(m.compute_dtype == torch.bfloat16 for m in small)
    assert all(m.weight.quant_type == "nf4" and m.weight.quant_state is not None for m in small)
    adapted = training.add_lora(run, config, model)
    _, batch = first_batch(config, 4)
    optimizer = training.make_optimizer(replace(config, lr=0.01), adapted)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted.train()(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2


# ---- adapters
def test_lora_is_in_the_language_model_only_and_changes_nothing_at_first(config):
    _, _, adapted, _ = load_parts(config)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    _, batch = first_batch(config, 2)
    assert torch.equal(adapted(**batch).loss, plain(**batch).loss)
    counts = adapters.trainable_counts(adapted)
    assert {name for name, (trainable, _) in counts.items() if trainable} == {"language_model lora"}
    lora = {n for n, _ in adapted.named_parameters() if "lora_" in n}
    assert len(lora) == 2 * 7 * 2 and all("language_model.layers" in n for n in lora)


def test_lora_counts_of_paligemma_3b():
    """9,805,824 parameters at rank 8: the seven linears of the language model, none in SigLIP."""
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(PaliGemmaConfig())
    config = Config(model="google/paligemma-3b-pt-224", lora_rank=8)
    run = run_folder.Run(Path("none"), None, torch.float32, {})
    adapted = training.add_lora(run, config, model)
    assert adapters.trainable_counts(adapted)["language_model lora"] == [9_805_824, 9_805_824]


def test_lora_targets_without_a_layer_are_refused(config):
    for targets in (("c_attn",), ("q_proj", "nope")):
        with pytest.raises(UserError, match=f"--lora_targets: '{targets[-1]}'"):
            load_parts(replace(config, lora_targets=targets))


def test_adapters_load_in_transformers_and_back(config, tmp_path):
    import peft
    import transformers

    finetune(config, "original")
    ours = PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)
    _, batch = first_batch(config, 2)
    length = batch["input_ids"].shape[1]
    expected = ours(**batch, logits_to_keep=length).logits
    base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    theirs = peft.PeftModel.from_pretrained(base, Path(config.output_dir) / "final" / "adapter").eval()
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(theirs(**batch).logits[valid], expected[valid], atol=1e-5, rtol=0)
    plain = PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    assert (plain(**batch, logits_to_keep=length).logits[valid] - expected[valid]).abs().max() > 1e-3  # it learned

    targets = ["q_proj", "v_proj"]
    lora = peft.LoraConfig(r=4, target_modules=targets, exclude_modules=["out_proj"], init_lora_weights=False)
    base = transformers.PaliGemmaForConditionalGeneration.from_pretrained(config.model)
    trained_there = peft.get_peft_model(base, lora).eval()
    trained_there.save_pretrained(tmp_path / "there" / "adapter", save_embedding_layers=False)
    (tmp_path / "there" / "run.json").write_text(json.dumps({"base_model": config.model}))
    back = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "there")
    expected = trained_there(**batch).logits
    torch.testing.assert_close(back(**batch, logits_to_keep=length).logits[valid], expected[valid], atol=1e-5, rtol=0)


def test_training_goes_on_from_the_adapter_of_another_run(config, tmp_path):
    finetune(config, "original")
    again = replace(config, model=config.output_dir, output_dir=str(tmp_path / "again"))
    finetune(again, "original")
    assert logged(again, "eval")[0][1] == logged(config, "eval")[-1][1]
    with pytest.raises(UserError, match="--lora_rank: the adapter of .* is trained on as it is: leave it out"):
        finetune(replace(again, lora_rank=4, overwrite=True), "original")


# ---- evaluation
def test_evaluations_answer_all_rows_before_and_after_and_two_batches_between(config):
    config = replace(config, eval_samples=9, eval_batch_size=2)
    finetune(config, "original")
    evals = dict(logged(config, "eval"))
    assert [[n for _, n in evals[step].values()] for step in (0, 4, 6)] == [[9] * 8, [4] * 8, [9] * 8]


def test_the_evaluation_loss_is_the_mean_over_the_label_tokens_of_the_first_rows(config):
    """Over the rows that every evaluation answers, here 4 of 9, in batches with different numbers of label tokens."""
    config = replace(config, eval_samples=9, eval_batch_size=2, negatives=0.5)
    finetune(config, "original")
    logged_losses = dict(logged(config, "eval_loss"))
    assert logged_losses.keys() == {0, 4, 6}
    processor = PaliGemmaProcessor.from_pretrained(config.model)
    for step, folder in ((0, config.model), (6, config.output_dir)):
        model = PaliGemmaForConditionalGeneration.from_pretrained(folder)
        for name, source in make_data(config)[1].items():
            total, count = 0.0, 0
            for _, batch in loader(source, processor, [[(0, row)] for row in range(4)], True):
                labels = batch.pop("labels")
                log_probs = model(**batch).logits[:, :-1].detach().double().log_softmax(-1)
                valid = labels[:, 1:] != -100
                total -= float(log_probs.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0][valid].sum())
                count += int(valid.sum())
            assert logged_losses[step][name] == pytest.approx(total / count, abs=1e-5)


def test_an_evaluation_row_that_is_too_long_is_named_and_not_counted(config, tmp_path):
    shutil.copytree(SAMPLE_ROWS.parent, tmp_path / "rows")
    good = json.loads(SAMPLE_ROWS.read_text().splitlines()[0])
    rows = [good, good | {"prefix": "answer en " + "why " * 9000}, good | {"prefix": "x" * 10_000_000}, good]
    (tmp_path / "rows" / "long.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = replace(config, data=str(SAMPLE_ROWS), eval_data=str(tmp_path / "rows" / "long.jsonl"), batch_size=2)
    finetune(config, "original")
    assert logged(config, "eval")[0][1] == {"long.jsonl": [0, 2]}
    named = (Path(config.output_dir) / "skipped.log").read_text().splitlines()
    assert sorted(re.search(r"long.jsonl:(\d)", line)[1] for line in named) == ["2", "3"]


def test_attention_that_does_not_fit_the_memory_of_the_gpu_does_not_cost_the_run(config, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "answer_attention", fail)
    finetune(replace(config, max_steps=1), "original")
    folder = Path(config.output_dir)
    assert (folder / "final" / "adapter").is_dir() and not (folder / "attention.safetensors").exists()
    assert "the attention maps of some sets are not saved: the GPU is out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (PaliGemmaForConditionalGeneration, "from_pretrained"),
        (training, "select_heads"),
        (training, "measure_maps"),
        (torch.optim.AdamW, "step"),
    ],
    ids=["loading", "selecting heads", "measuring maps", "the update"],
)
def test_running_out_of_memory_anywhere_is_one_line(config, monkeypatch, owner, name):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(owner, name, fail)
    with refused("the GPU is out of memory: lower --batch_size"):
        finetune(replace(config, max_steps=1), "original")


def test_the_sets_are_answered_in_one_call_with_the_answers_of_one_call_each(config, monkeypatch):
    run, model, _, processor = load_parts(config)
    _, sets = make_data(replace(config, eval_samples=3))
    made, calls = evaluation.make_evaluation(run, config, model, processor, sets), []
    answerer = evaluation.Answerer(model, processor, run.accelerator, run.dtype, config.eval_batch_size)
    expected = {name: evaluation.answer_questions(answerer, asked[:2]) for name, asked in made.questions.items()}
    real = evaluation.answer_questions
    monkeypatch.setattr(
        evaluation, "answer_questions", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    )
    scores = evaluation.evaluate(made, 2)
    assert len(calls) == 1 and len(scores) == 8
    for name, score in scores.items():
        pairs = zip(score.rows, expected[name], strict=True)
        assert all(row | {"seconds": 0} == other | {"seconds": 0} for row, other in pairs)


def test_an_image_that_several_rows_share_is_opened_once_in_an_evaluation(config, tmp_path, monkeypatch):
    shutil.copy(SAMPLE_ROWS.parent / "fruit.png", tmp_path)
    row = {"image": "fruit.png", "suffix": "b"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row | {"prefix": f"a {n}"}) for n in range(9)))
    config = replace(config, data=str(SAMPLE_ROWS), eval_data=str(tmp_path / "rows.jsonl"))
    run, model, _, processor = load_parts(config)
    made = evaluation.make_evaluation(run, config, model, processor, make_data(config)[1])
    opened, real = [], PaliGemmaProcessor.image_inputs
    monkeypatch.setattr(PaliGemmaProcessor, "image_inputs", lambda *args: opened.append(1) or real(*args))
    assert len(evaluation.evaluate(made)["rows.jsonl"].rows) == config.eval_samples == 4
    assert len(opened) == 1


def test_images_of_samples_show_16_bit_grey_and_transparency_as_the_model_sees_them(tmp_path):
    ramp = Image.fromarray(np.linspace(0, 65_535, 64, dtype=np.uint16).reshape(8, 8))
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    images = tuple(types.SimpleNamespace(open=lambda image=image: image) for image in (ramp, clear))
    question = types.SimpleNamespace(images=images)
    evaluation.save_sample_image(types.SimpleNamespace(is_main=True), question, tmp_path / "samples" / "0.png")
    pixels = np.asarray(Image.open(tmp_path / "samples" / "0.png"))
    assert abs(pixels[:, :8, 0].flatten() - np.linspace(0, 255, 64)).max() <= 1 and (pixels[:, 8:] == 255).all()


def test_checkpoints_do_not_read_the_log_again(config, monkeypatch):
    expected, real = [], training.adapter_card
    monkeypatch.setattr(training, "read_metrics", None)
    monkeypatch.setattr(training, "adapter_card", lambda *args: expected.append(args[1]) or real(*args))
    finetune(config, "original")
    evals = dict(logged(config, "eval"))
    assert expected == [{}, {}, evals[4], {}, evals[6], evals[6]]  # steps 2, 4, best 4, 6, best 6, final


def test_best_is_chosen_by_the_sets_that_count_for_it():
    rows = {right: [{"id": "0", "response": "1", "ground_truth": "1" if right else "2"}] for right in (True, False)}
    scores = {name: Score(0, 1, rows[name == "a"]) for name in "abc"}
    sets = {name: types.SimpleNamespace(counts_for_best=name != "c") for name in scores}
    questions = {name: [types.SimpleNamespace(id="0")] for name in scores}
    evaluation = Evaluation(None, Config(), None, None, sets, questions)
    assert headline_rate(evaluation, scores) == 0.5


def test_best_is_chosen_by_the_rows_that_every_evaluation_asks():
    """Two batches of one; that the third row is right does not count."""
    rows = [{"id": n, "response": "1", "ground_truth": "1" if n == "2" else "2"} for n in "012"]
    sets = {"a": types.SimpleNamespace(counts_for_best=True)}
    questions = {"a": [types.SimpleNamespace(id=n) for n in "012"]}
    evaluation = Evaluation(None, Config(eval_batch_size=1), None, None, sets, questions)
    assert headline_rate(evaluation, {"a": Score(1, 3, rows)}) == 0.0


def test_on_equal_scores_best_is_the_last_step_or_else_the_first(config, monkeypatch):
    rates, saved = iter((0.5, 0.5, 0.5)), []
    monkeypatch.setattr(training, "headline_rate", lambda *_: next(rates))
    monkeypatch.setattr(training, "save_snapshot", lambda *args: saved.append((args[2].name, args[3]["step"])))
    finetune(replace(config, max_steps=6, eval_every=2), "original")
    assert saved == [("best", 2), ("best", 6), ("final", 6)]


def test_training_stops_when_the_score_has_not_risen_for_the_given_evaluations(config, tmp_path, monkeypatch):
    """Scores 1, 2, 2, 1: with a patience of 2 the evaluation at step 8 is the last chance, and one update follows."""
    rates = {0: 0.0, 2: 0.1, 4: 0.2, 6: 0.2, 8: 0.1, 9: 0.0}

    steps, real = [], training.evaluate_and_log

    def follow(*arguments):
        steps.append(arguments[-2]["step"])
        real(*arguments)

    config = replace(config, max_steps=20, eval_every=2, patience=2)
    monkeypatch.setattr(training, "headline_rate", lambda *_: rates[steps[-1]])
    monkeypatch.setattr(training, "evaluate_and_log", follow)
    finetune(config, "original")
    folder = Path(config.output_dir)
    assert steps == [0, 2, 4, 6, 8, 9]
    assert json.loads((folder / "final" / "run.json").read_text())["step"] == 9
    assert json.loads((folder / "best" / "run.json").read_text())["step"] == 4
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    interrupt(cut, 7)
    finetune(cut, "original")
    assert all(torch.equal(a, b) for a, b in zip(saved_lora(cut).values(), saved_lora(config).values(), strict=True))
    with pytest.raises(UserError, match="--patience --average_last"):
        finetune(replace(config, average_last=0.5), "original")


# ---- data
def test_vqav2_from_its_official_files(config, tmp_path):
    """The code path of the documented GPU command, on a data set with the same columns."""
    vqav2(tmp_path / "vqa", "train", images=6)
    vqav2(tmp_path / "vqa", "val", images=2)
    spec = f"vqav2:{tmp_path / 'vqa'}"
    config = replace(config, data=spec, eval_data=spec, max_steps=20, lr=1e-2, eval_every=100)
    finetune(config, "original")
    losses = [loss for _, loss in logged(config)]
    assert losses[-1] < losses[0] - 0.4
    assert logged(config, "eval")[-1][1].keys() == {"vqav2-val"}
    sample = json.loads((Path(config.output_dir) / "samples.jsonl").read_text().splitlines()[0])
    asked = {f"answer en What is {n}?": f"red {n}" for n in range(3)}
    assert asked[sample["prompt"]] == sample["answer"]


def test_vqav2_from_a_parquet_copy(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    config = replace(config, data=f"hub:{parquet(tmp_path / 'set')}", max_steps=3)
    finetune(config, "original")
    assert len(logged(config)) == 3 and logged(config, "eval")[-1][1]["held out"][1] == 2


def test_jsonl_rows_are_learned(config):
    rows = replace(config, data=str(SAMPLE_ROWS), max_steps=30, lr=1e-2, batch_size=2)
    finetune(replace(rows, eval_every=100), "original")
    losses = [loss for _, loss in logged(rows)]
    assert losses[-1] < losses[0] - 0.4


def test_bad_rows_are_counted_and_named_or_refused(config, tmp_path, capsys):
    """One row fails when the file is read, one when its image is opened: the run continues without them."""
    shutil.copytree(SAMPLE_ROWS.parent, tmp_path / "rows")
    good = json.loads(SAMPLE_ROWS.read_text().splitlines()[0])
    rows = [good, good | {"suffix": ""}, good | {"image": "broken.png"}, good]
    (tmp_path / "rows" / "broken.png").write_bytes(b"no image")
    (tmp_path / "rows" / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = str(tmp_path / "rows" / "some.jsonl")
    shutil.copy(data, tmp_path / "rows" / "held.jsonl")
    config = replace(config, data=data, eval_data=str(tmp_path / "rows" / "held.jsonl"), batch_size=1, max_steps=6)
    with pytest.raises(UserError, match="some.jsonl:2: suffix"):
        finetune(replace(config, strict_data=True), "original")
    assert not Path(config.output_dir).exists()
    finetune(config, "original")
    printed = capsys.readouterr().out
    assert "2 rows cannot be used" in printed and printed.count("some.jsonl:3: broken.png: broken image") == 1
    named = (Path(config.output_dir) / "skipped.log").read_text()
    for name in ("some", "held"):
        assert sorted(re.findall(rf"{name}.jsonl:(\d)", named)) == ["2", "3"]
    assert logged(config, "eval")[0][1] == {"held.jsonl": [0, 2]}
    losses = dict(logged(config))
    assert len(losses) == 6 and sum(loss == 0 for loss in losses.values()) == 2  # alone in its batch, it does not count


def test_cached_vision_features_and_batches_of_one_length_train(config, tmp_path, monkeypatch):
    """Cached features change no bit of a run, and the tower sees every image once."""
    rows = replace(config, data=str(SAMPLE_ROWS), batch_size=2, max_steps=8)
    finetune(rows, "original")
    cached = replace(
        rows, output_dir=str(tmp_path / "cached"), vision_cache_gb=1.0, vision_cache_dir=str(tmp_path / "f")
    )
    stored, real = [], training.VisionCache.store
    monkeypatch.setattr(training.VisionCache, "store", lambda *args: stored.append(args[1]) or real(*args))
    finetune(cached, "original")
    assert 0 < len(stored) <= 3
    assert logged(cached) == logged(rows)
    assert all(torch.equal(a, b) for a, b in zip(saved_lora(cached).values(), saved_lora(rows).values(), strict=True))
    grouped = replace(rows, output_dir=str(tmp_path / "grouped"), group_by_length=True)
    finetune(grouped, "original")
    assert logged(grouped) != logged(rows)  # another order of the rows


def test_options_that_do_not_go_together_are_refused_before_anything_is_written(config):
    """New images cannot be cached, features of a trained tower change."""
    cached = dict(data=str(SAMPLE_ROWS), vision_cache_gb=1.0)
    cases = [
        (dict(vision_cache_gb=1.0), None, "--vision_cache_gb, --vision_cache_dir: every haystack has new images"),
        (cached, DifferentialConfig(towers=("vision",)).resolve(), "--vision_cache_gb: the features of a vision tower"),
        (cached | dict(train_vision="lora"), None, "--vision_cache_gb: the features of a vision tower that trains"),
        (cached | dict(train_vision="full"), None, "--vision_cache_gb: the features of a vision tower that trains"),
        (cached | dict(train_projector="lora"), None, "--vision_cache_gb: the features of a vision tower that trains"),
        (dict(shard=True, vision_cache_gb=1.0), None, "--shard=True --vision_cache_gb"),
        (dict(shard=True, vision_cache_dir="features"), None, "--shard=True --vision_cache_gb"),
        (dict(shard=True, dtype="nf4"), None, "--shard=True --dtype=nf4"),
        (dict(eval_data="other.jsonl"), None, "--eval_data=other.jsonl"),
        (dict(vision_lr=1e-3), None, "--vision_lr: the vision tower does not train: add --train_vision=lora"),
        (dict(projector_lr=1e-3), None, "--projector_lr: .* add --train_projector=lora"),
        (dict(data=str(SAMPLE_ROWS), negatives=0.5), None, "--negatives: applies to haystacks only"),
        (dict(data=str(SAMPLE_ROWS), shapes=((2, 2),)), None, "--shapes: applies to haystacks only"),
    ]
    for change, differential, message in cases:
        with pytest.raises(UserError, match=message):
            finetune(replace(config, **change), "original", differential)
    assert not Path(config.output_dir).exists()


def test_data_that_cannot_be_read_is_named_before_the_model_is_loaded(config, monkeypatch):
    monkeypatch.setattr(PaliGemmaForConditionalGeneration, "from_pretrained", None)
    with pytest.raises(UserError, match="missing.jsonl"):
        finetune(replace(config, data="missing.jsonl"), "original")


def test_a_warm_up_that_is_as_long_as_the_run_is_named(config, capsys):
    finetune(replace(config, max_steps=1, warmup_steps=1), "original")
    assert "--warmup_steps=1: as long as the run" in capsys.readouterr().out


def test_bfloat16_trains(config):
    config = replace(config, dtype="bfloat16", data=str(SAMPLE_ROWS), max_steps=20, lr=1e-2, batch_size=2)
    finetune(config, "original")
    losses = [loss for _, loss in logged(config)]
    assert losses[-1] < losses[0] - 0.3
    assert all(t.dtype == torch.float32 for t in saved_lora(config).values())


# ---- remote code and revisions
def test_code_that_a_model_brings_is_ignored(config, tmp_path):
    shutil.copytree(config.model, tmp_path / "model")
    fields = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(fields | {"auto_map": {"AutoModel": "model.Model"}}))
    (tmp_path / "model" / "model.py").write_text("raise SystemExit('run')")
    model = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert model.config == PaliGemmaConfig.from_pretrained(config.model)


def test_nothing_here_runs_code_from_a_disk():
    shipped = [*ROOT.glob("*.py"), *ROOT.glob("needle_eval/*.py"), *ROOT.glob("assets/**/*.py")]
    text = "\n".join(file.read_text() for file in shipped)
    code = r"trust_remote_code|allow_pickle=True|pickle\.loads?\(|(?<![.\w])(?:eval|exec)\("
    assert not re.findall(code, text)
    assert re.findall(r"\w+\(pickle\.Unpickler\)|pickle\.Unpickler\(", text) == ["PlainUnpickler(pickle.Unpickler)"]
    loads = [line for line in text.splitlines() if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)


def test_the_revision_of_a_hub_model_is_recorded_and_used(config, tmp_path, monkeypatch):
    """From a cache with two revisions: resuming the run and loading its folder use the revision it began with."""
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


# ---- trackers and launchers
def test_tensorboard_has_every_number_of_the_log(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(config, "original")
    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(dict(logged(config)), rel=1e-6)
    assert [e.step for e in events.Scalars("eval exact/2x2 unseen style")] == [0, 4, 6]
    (first, *_), (*_, last) = logged(config, "eval_loss"), logged(config, "eval_loss")
    seen = events.Scalars("eval loss/4x4 unseen style")
    assert [seen[0].value, seen[-1].value] == pytest.approx([n[1]["4x4 unseen style"] for n in (first, last)], rel=1e-6)
    assert "step" not in events.Tags()["scalars"]
    assert [e.step for e in events.Images("samples 2x2 unseen style/0")] == [0]
    text = events.Tensors("samples 2x2 unseen style/0/text_summary")
    assert [e.step for e in text] == [0, 4, 6] and b"prompt: " in text[0].tensor_proto.string_val[0]


def test_tensorboard_has_the_hyperparameters_of_a_differential_run_and_names_layers_by_number(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    finetune(replace(config, max_steps=1), "diff", DifferentialConfig(towers=("text", "vision")).resolve())
    events = EventAccumulator(str(Path(config.output_dir) / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"lambda/text layer 01", "lambda/vision layer 00", "maps cosine/text layer 00"} <= set(scalars)
    assert not any("self_attn" in name for name in scalars)
    stored = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(stored).session_start_info.hparams
    assert values["max_steps"].number_value == 1 and values["tracker"].string_value == "tensorboard"
    stored = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(stored).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} <= set(scalars)


def test_wandb_by_name_if_it_is_installed(config, monkeypatch):
    """With a stand-in for the package, which gets the same numbers as the run folder."""
    with pytest.raises(UserError, match="pip install wandb"):
        finetune(replace(config, tracker="wandb"), "original")
    assert not Path(config.output_dir).exists()
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **kwargs: 1 / 0
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    service = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with refused("--tracker=wandb: division by zero: run wandb login"):  # as without a login
        finetune(replace(config, tracker="wandb"), "original")
    wandb.init = lambda **kwargs: calls.append(kwargs) or service
    finetune(replace(config, tracker="wandb"), "original")
    opened, *lines, end = calls
    record = json.loads((Path(config.output_dir) / "run.json").read_text())
    assert (opened["name"], opened["id"]) == ("run", record["id"])  # two folders of one name are two runs
    assert opened["config"]["max_steps"] == 6 and end == "end"
    assert [(step, v["train/loss"]) for step, v in lines if "train/loss" in v] == logged(config)
    assert not (Path(config.output_dir) / "tensorboard").exists()


def test_the_precision_of_a_launcher_is_not_used(monkeypatch):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        assert machine.make_accelerator().mixed_precision == "no"
    finally:
        AcceleratorState._reset_state()


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"), ("ACCELERATE_USE_FSDP", "true")]
)
def test_settings_of_a_launcher_that_change_the_training_are_refused(config, monkeypatch, name, value):
    """Accelerate would divide every loss by its own number of accumulated micro-batches."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}"):
        finetune(config, "original")
    assert not Path(config.output_dir).exists()


# ---- the command line
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max_stepz=2"], "max_stepz"),
        (["--max_steps=two"], "max_steps"),
        (["--model=no/such/folder"], "no/such/folder"),
        (["--data=missing.jsonl"], "missing.jsonl"),
    ],
)
def test_mistakes_of_a_user_are_named_with_exit_code_2(arguments, named, tmp_path):
    process = start("finetune_original.py", f"--output_dir={tmp_path / 'run'}", *arguments)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and named in err and "Traceback" not in err
    if not arguments[0].startswith("--max"):  # those two are reported by the flag parser, in a box
        assert len(err.strip().splitlines()) == 1 and err.startswith("error: ")


def test_dropout_seeds_of_seeds_steps_and_processes_differ():
    seeds = {
        training.dropout_seed(Config(seed=seed), step, process)
        for seed in range(5)
        for step in range(2_000)
        for process in range(8)
    }
    assert len(seeds) == 5 * 2_000 * 8
