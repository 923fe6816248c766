"""The run folder: what it holds, which flags may change on resume, and how damage is handled."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from refusals import refused
from runs import ROOT, crash, flags_of, interrupt, logged, saved_lora, start, wait_for, without_speed
from safetensors.torch import load_file, save_file

import plots
import run_folder
import training
from data import HAYSTACKS_PER_EPOCH
from differential_attention import DifferentialConfig
from errors import UserError
from files import MANIFEST, lock_folder, verify_manifest, write_manifest
from finetune_diff import Config as DiffConfig
from finetune_original import Config, finetune
from modeling_gemma import PaliGemmaForConditionalGeneration


@pytest.fixture
def config(tiny_model, tmp_path):
    return tiny.quick(Config, tiny_model, tmp_path, max_steps=6, warmup_steps=2, eval_every=4)


def folder_of(config: Config) -> Path:
    return Path(config.output_dir)


def snapshot(folder: Path) -> dict[Path, int]:
    """The modification time of every file under a folder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def unfinish(config: Config) -> Path:
    """The folder of a finished run, as if it had been killed before final/ was written."""
    shutil.rmtree(folder_of(config) / "final")
    return folder_of(config)


# ---- a whole run
def test_a_run_writes_the_files_that_the_docs_name(config, capsys):
    finetune(config, "original")
    folder = folder_of(config)
    record = json.loads((folder / "run.json").read_text())
    assert record["arm"] == "original" and record["config"]["max_steps"] == 6
    assert {"versions", "commit", "device", "dtype"} <= record.keys()
    assert [step for step, _ in logged(config)] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in logged(config, "eval")] == [0, 4, 6]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {"step", "set", "id", "prompt", "answer", "response", "image", "grid"} == samples[0].keys()
    assert (folder / "plots" / "loss.png").stat().st_size > 1000 and any((folder / "tensorboard").iterdir())
    base = sum(f.stat().st_size for f in Path(config.model).glob("*.safetensors"))
    sizes = [f.stat().st_size for f in (folder / "final").rglob("*.safetensors")]
    assert len(sizes) == 1 and sizes[0] < base  # the frozen base is not saved
    for name in ("final", "best"):
        verify_manifest(folder / name)
    printed = capsys.readouterr().out
    for part in ("before", "after", "chance", "peak memory", "4 examples per update", "labels '1, "):
        assert part in printed


def test_a_finished_run_says_so_and_overwrite_starts_again(config, capsys):
    finetune(config, "original")
    first = logged(config)
    before = snapshot(folder_of(config))
    finetune(config, "original")
    assert "is finished" in capsys.readouterr().out and snapshot(folder_of(config)) == before
    finetune(replace(config, overwrite=True), "original")
    assert logged(config) == first  # the same seed gives the same losses


def test_a_run_killed_before_its_figures_draws_them_when_it_is_started_again(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plots, "draw_loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        finetune(config, "original")
    assert (folder_of(config) / "final").exists() and not plots.is_drawn(folder_of(config))
    finetune(config, "original")
    assert plots.is_drawn(folder_of(config))


def test_final_without_an_adapter_is_not_finished(config):
    """generate.py treats it as unfinished and asks to continue the run."""
    finetune(config, "original")
    expected = saved_lora(config)
    shutil.rmtree(folder_of(config) / "final" / "adapter")
    finetune(config, "original")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_lora(config).items())


# ---- other configurations, other data
def test_another_configuration_is_refused(config):
    finetune(config, "original")
    with pytest.raises(UserError, match="steps made so far: lr 0.002 -> 0.1"):
        finetune(replace(config, lr=0.1), "original")
    with pytest.raises(UserError, match="arm original -> diff"):
        finetune(config, "diff")


def test_changes_are_printed_or_refused_with_a_reason_before_anything_is_written(config, capsys):
    """What does not change the results may change within a run."""
    interrupt(config, 4)
    capsys.readouterr()
    changed = replace(config, log_every=2, lora_rank=8, batch_size=2, lr=0.1)
    before = snapshot(folder_of(config))
    reasons = ("order of the data: batch_size 4 -> 2", "shapes of what is saved: lora_rank 16 -> 8", "lr 0.002 -> 0.1")
    with refused(*reasons):
        finetune(changed, "original")
    assert "model" not in capsys.readouterr().out and snapshot(folder_of(config)) == before
    finetune(replace(config, gradient_checkpointing=True, log_every=2), "original")
    printed = capsys.readouterr().out
    for change in ("log_every 1 -> 2", "gradient_checkpointing False -> True"):
        assert f"changed since: {change}" in printed
    assert [step for step, _ in logged(config)] == [1, 2, 3, 4, 6]


def test_a_run_that_saved_no_weights_starts_again_with_other_flags(config, monkeypatch, capsys):
    """As after "the GPU is out of memory: lower --eval_batch_size", which the first evaluation may say."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, refused("out of memory", "lower --eval_batch_size"):
        patch.setattr("evaluation.answer_questions", fail)
        finetune(config, "original")
    assert (folder_of(config) / "run.json").exists()
    changed = replace(config, eval_batch_size=2, batch_size=2, accumulation=2)
    finetune(changed, "original")
    assert "has saved no weights yet" in capsys.readouterr().out
    record = json.loads((folder_of(config) / "run.json").read_text())
    assert record["config"]["eval_batch_size"] == 2 and len(record["starts"]) == 1
    with refused("which answers choose best/: eval_batch_size 2 -> 4"):
        finetune(replace(changed, eval_batch_size=4), "original")


def test_data_that_changed_within_a_run_is_refused(config, tmp_path):
    shutil.copytree(ROOT / "assets" / "sample", tmp_path / "rows")
    data, held = (tmp_path / "rows" / f"{name}.jsonl" for name in ("rows", "held"))
    shutil.copy(data, held)
    config = replace(config, data=str(data), eval_data=str(held), batch_size=2)
    interrupt(config, 3)
    text = data.read_text()
    before = logged(config)
    for file, name in ((data, "train"), (held, "held.jsonl")):
        file.write_text(text.replace("banana", "orange"))
        with refused(f"{file} has changed since this run began ({name}: ", "compared by prompts, answers and names"):
            finetune(config, "original")
        file.write_text(text)
    data.write_text(text + "\n\n")
    finetune(config, "original")
    assert logged(config)[: len(before)] == before and len(logged(config)) == 6


def test_images_of_ones_own_that_were_only_touched_do_not_stop_a_run(config, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.bmp")
        (folder / f"{number}.txt").write_text(f"thing {number}")
    config = replace(config, data=f"haystack:{folder}", grids=(2,), max_steps=2, lr=2e-3)
    finetune(config, "original")
    os.utime(folder / "0.bmp", (1, 1))
    finetune(replace(config, max_steps=3), "original")
    assert [step for step, _ in logged(config)] == [1, 2, 3]
    Image.new("RGB", (8, 8), "white").save(folder / "0.bmp")
    with refused("has changed since this run began", "compared by captions and images"):
        finetune(replace(config, max_steps=4), "original")


# ---- folders that are not runs
def test_the_output_folder_may_be_a_link_but_not_a_file(config, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    finetune(replace(config, output_dir=str(tmp_path / "link"), max_steps=2), "original")
    assert (tmp_path / "disk" / "final").exists()
    (tmp_path / "file").write_text("mine")
    with refused("file"):
        finetune(replace(config, output_dir=str(tmp_path / "file")), "original")


def test_overwrite_never_deletes_a_folder_that_is_no_run(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with refused(tmp_path / "mine", "not a run"):
        finetune(replace(config, output_dir=str(tmp_path / "mine"), overwrite=True), "original")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_is_not_trained_on_in_its_own_folder(config, tmp_path, overwrite):
    """Its adapter would be loaded, and then deleted with the folder."""
    config = replace(config, max_steps=1)
    finetune(config, "original")
    (tmp_path / "link").symlink_to(config.output_dir)
    before = snapshot(folder_of(config))
    for model in (config.output_dir, f"{tmp_path}/link/best"):
        with pytest.raises(UserError) as caught:
            finetune(replace(config, model=model, overwrite=overwrite), "original")
        line = f"--model={model} is inside --output_dir={config.output_dir}: give another --output_dir"
        assert str(caught.value) == line
    assert snapshot(folder_of(config)) == before
    finetune(replace(config, model=config.output_dir, eval_only=True), "original")  # writes nothing


def test_an_error_before_training_leaves_nothing(config):
    with refused("missing.jsonl"):
        finetune(replace(config, data="missing.jsonl"), "original")
    assert not folder_of(config).exists()


# ---- leftovers of a killed process
@pytest.mark.parametrize("overwrite", [False, True])
def test_own_temporary_files_do_not_block_a_start(config, overwrite):
    """A kill between writing and renaming the first run.json leaves only its temporary file."""
    folder_of(config).mkdir()
    (folder_of(config) / ".run.json.tmp").write_text('{"arm": ')
    finetune(replace(config, max_steps=2, overwrite=overwrite), "original")
    assert (folder_of(config) / "final").exists() and not (folder_of(config) / ".run.json.tmp").exists()


def test_run_json_is_deleted_last(config, monkeypatch):
    """So that a folder whose deletion was interrupted is still recognised as a run."""
    finetune(replace(config, max_steps=2), "original")
    deleted = []
    unlink, rmtree = Path.unlink, shutil.rmtree
    monkeypatch.setattr(Path, "unlink", lambda path: (deleted.append(path.name), unlink(path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (deleted.append(path.name), rmtree(path)))
    run_folder.empty_folder(folder_of(config))
    assert deleted[-1] == "run.json" and len(deleted) > 5


def test_stray_files_and_folders_do_not_stop_a_run(config):
    finetune(config, "original")
    expected = logged(config)
    folder = unfinish(config)
    (folder / "checkpoints" / "step-abc").mkdir()
    (folder / "checkpoints" / "step-000099").write_text("a file")
    (folder / "checkpoints" / ".step-000006.tmp").write_text("a file")
    (folder / ".final.tmp").write_text("a file")
    finetune(config, "original")
    assert logged(config) == expected and (folder / "final" / "adapter").is_dir()


# ---- two processes
def test_a_second_process_is_refused_while_the_first_trains(config):
    folder_of(config).mkdir()
    lock = lock_folder(folder_of(config))
    process = start("finetune_original.py", *flags_of(config))
    _, err = process.communicate(timeout=300)
    lock.release()
    assert process.returncode == 2 and "another process writes into it" in err
    assert [path.name for path in folder_of(config).iterdir()] == [".lock"]


@pytest.mark.parametrize("state", ["nothing", "a checkpoint"])
def test_a_run_that_finished_meanwhile_is_not_deleted(config, monkeypatch, state):
    """B reads the state of the folder, A finishes training into it, B goes on: it must read the state again."""
    if state == "a checkpoint":
        interrupt(config, 4)
    real = run_folder.start_folder

    def meanwhile(run, faults):
        with monkeypatch.context() as patch:
            patch.setattr("training.start_folder", real)
            finetune(config, "original")
        real(run, faults)

    with monkeypatch.context() as patch, refused("another process trained into it meanwhile"):
        patch.setattr("training.start_folder", meanwhile)
        finetune(config, "original")
    assert (folder_of(config) / "final" / "adapter").is_dir() and len(logged(config)) == 6


# ---- interrupted runs
def test_a_run_cut_off_in_its_last_evaluation_ends_with_the_same_files(config):
    finetune(config, "original")
    names = ("metrics.jsonl", "samples.jsonl")
    expected = [without_speed(folder_of(config) / name) for name in names]
    folder = unfinish(config)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "ev')
    finetune(config, "original")
    assert [without_speed(folder / name) for name in names] == expected


def test_an_interrupted_run_ends_like_the_uninterrupted_one(config, tmp_path):
    config = replace(config, lora_dropout=0.3)
    finetune(config, "original")
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    crash(cut, 4)
    assert not (tmp_path / "cut" / "final").exists()
    finetune(cut, "original")
    assert logged(cut) == logged(config) and logged(cut, "eval") == logged(config, "eval")
    expected = saved_lora(config)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved_lora(cut).items())


def test_an_evaluation_at_the_checkpoint_is_repeated_with_another_eval_every_too(config):
    """Its log lines are dropped, and best/ is compared with it."""
    config = replace(config, eval_every=2, save_every=2)
    crash(config, 4)
    assert [step for step, _ in logged(config, "eval")] == [0, 2, 4]
    finetune(replace(config, eval_every=100), "original")
    assert [step for step, _ in logged(config, "eval")] == [0, 2, 4, 6]


def test_an_update_after_the_checkpoint_is_no_evaluation_at_it(tmp_path):
    """Otherwise a resumed run would log an evaluation that the uninterrupted one does not have."""
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 0.9}\n{"step": 4, "eval": {}}\n')
    assert [run_folder.was_evaluated(tmp_path, step) for step in (3, 4)] == [False, True]
    log.write_text('{"step": 3, "loss": 1.0}\n{"step": 3, "eval": {}}')  # killed while it wrote the line
    assert not run_folder.was_evaluated(tmp_path, 3)


def test_patience_counts_evaluations_so_their_interval_may_not_change(config):
    config = replace(config, patience=2)
    interrupt(config, 4)
    with refused("which answers choose best/: eval_every 4 -> 2"):
        finetune(replace(config, eval_every=2), "original")


def test_a_killed_process_continues_from_its_last_complete_checkpoint(config, tmp_path):
    config = replace(config, max_steps=40)
    finetune(config, "original")
    killed = replace(config, output_dir=str(tmp_path / "killed"))
    process = start("finetune_original.py", *flags_of(killed))
    wait_for(tmp_path / "killed" / "checkpoints" / "step-000006", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "final").exists()
    process = start("finetune_original.py", *flags_of(killed))
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "continues from" in out
    losses, expected = dict(logged(killed)), dict(logged(config))
    assert losses.keys() == expected.keys()
    assert losses == pytest.approx(expected, abs=1e-5)  # another number of threads


# ---- damage
def test_a_damaged_checkpoint_is_skipped(config, capsys):
    finetune(config, "original")
    expected = logged(config)
    folder = unfinish(config)
    (folder / "checkpoints" / "step-000006" / "trainer.pt").write_bytes(b"rubbish")
    finetune(config, "original")
    printed = capsys.readouterr().out
    assert "step-000006" in printed and "continues from" in printed
    assert logged(config) == expected


@pytest.mark.parametrize("file", ["adapter/adapter_model.safetensors", "trainer.pt", "run.json"])
def test_one_flipped_bit_in_a_checkpoint_is_damage(config, capsys, file):
    """Neither safetensors nor torch would notice: the weights would be loaded without a message."""
    finetune(config, "original")
    expected, weights = logged(config), saved_lora(config)
    damaged = unfinish(config) / "checkpoints" / "step-000006" / file
    data = bytearray(damaged.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    damaged.write_bytes(data)
    finetune(config, "original")
    printed = capsys.readouterr().out
    assert f"step-000006/{file}: damaged" in printed and "step-000004" in printed.partition("continues from")[2]
    assert logged(config) == expected and all(torch.equal(weights[n], t) for n, t in saved_lora(config).items())


def test_a_checkpoint_after_a_damaged_one_is_kept(config):
    """The damaged one has the higher number and must not cause good ones to be deleted."""
    finetune(replace(config, keep_checkpoints=1, save_every=6), "original")
    checkpoints = unfinish(config) / "checkpoints"
    shutil.copytree(checkpoints / "step-000006", checkpoints / "step-000009")
    (checkpoints / "step-000009" / "trainer.pt").write_bytes(b"rubbish")
    (checkpoints / "step-000006").rename(checkpoints / "step-000003")
    change_state(checkpoints / "step-000003", step=3)
    finetune(replace(config, keep_checkpoints=1, save_every=5), "original")
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-000006", "step-000009"]


def test_a_run_of_which_no_checkpoint_can_be_read_is_not_deleted(config):
    finetune(config, "original")
    for state in unfinish(config).glob("checkpoints/*/trainer.pt"):
        state.write_bytes(b"rubbish")
    with refused("no checkpoint can be read"):
        finetune(config, "original")
    assert len(logged(config)) == 6


def change_state(checkpoint: Path, **changes):
    """Change entries of trainer.pt and update the manifest; None deletes an entry."""
    state = torch.load(checkpoint / "trainer.pt", weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, checkpoint / "trainer.pt")
    write_manifest(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [dict(step=None), dict(best=None), dict(optimizer=None), dict(step="6"), dict(step=5), dict(seconds=-1.0)]
    + [dict(optimizer={}), dict(optimizer={"state": {}, "param_groups": [3]}), dict(best=torch.zeros(2))],
    ids=str,
)
def test_a_trainer_state_with_other_contents_is_refused_in_one_line(config, changes):
    finetune(config, "original")
    checkpoint = unfinish(config) / "checkpoints" / "step-000006"
    change_state(checkpoint, **changes)
    with refused(checkpoint / "trainer.pt", f"delete {checkpoint}"):
        finetune(config, "original")


@pytest.mark.parametrize("kind", ["shape", "dtype", "missing moment", "another name", "infinity"])
def test_an_optimizer_state_that_does_not_fit_is_refused(config, kind):
    """A fused update with moments of the wrong shape writes out of bounds."""
    finetune(config, "original")
    checkpoint = unfinish(config) / "checkpoints" / "step-000006"
    optimizer = torch.load(checkpoint / "trainer.pt", weights_only=True)["optimizer"]
    moments = optimizer["state"][0]
    match kind:
        case "shape":
            moments["exp_avg"] = moments["exp_avg"][:, :1].clone()
        case "dtype":
            moments["exp_avg_sq"] = moments["exp_avg_sq"].double()
        case "missing moment":
            del moments["exp_avg"]
        case "another name":
            moments["max_exp_avg_sq"] = moments["exp_avg"]
        case "infinity":
            moments["exp_avg"][0, 0] = torch.inf
    change_state(checkpoint, optimizer=optimizer)
    with refused(checkpoint / "trainer.pt", "the optimizer state does not fit this model"):
        finetune(config, "original")


def test_damaged_lines_of_a_log_are_dropped_on_resume(config):
    """Only complete lines count; lines of another form are dropped."""
    finetune(config, "original")
    expected = [without_speed(folder_of(config) / name) for name in ("metrics.jsonl", "samples.jsonl")]
    folder = unfinish(config)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(folder / name, "a") as log:
            for line in ("null", "7", "[1]", "{}", '{"step": "one"}', '{"step": true}', '{"step": -1}', "[" * 100_000):
                log.write(line + "\n")
    finetune(config, "original")
    assert [without_speed(folder / name) for name in ("metrics.jsonl", "samples.jsonl")] == expected


@pytest.mark.parametrize(
    "line", ['{"step": 3, "eval": 5}', '{"step": 3, "eval": {"2x2": [1]}}', '{"step": 3, "eval": {"2x2": [1, 0]}}']
)
def test_a_metrics_line_with_another_type_is_named(config, line):
    finetune(config, "original")
    log = unfinish(config) / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([line + "\n", *lines]))
    with refused(f"{log}, line 1"):
        finetune(config, "original")


def test_missing_metrics_are_named(config):
    finetune(config, "original")
    log = unfinish(config) / "metrics.jsonl"
    log.unlink()
    with refused(log, "--overwrite=True"):
        finetune(config, "original")


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", '{"config": 3}', '{"config": {}, "arm": 5}', '{"config": {}, "data": {"x": 1}}']
)
def test_a_damaged_run_json_is_named_and_overwrite_starts_again(config, text):
    interrupt(config, 4)
    (folder_of(config) / "run.json").write_text(text)
    with refused(folder_of(config) / "run.json"):
        finetune(config, "original")
    finetune(replace(config, overwrite=True), "original")
    assert (folder_of(config) / "final").exists()


# ---- differential runs
@pytest.fixture
def diff(tiny_model, tmp_path):
    return tiny.quick(
        DiffConfig, tiny_model, tmp_path, max_steps=4, eval_every=4, differential=DifferentialConfig().resolve()
    )


def test_a_checkpoint_without_its_differential_weights_is_refused(diff):
    finetune(diff, "diff", diff.differential)
    for checkpoint in unfinish(diff).glob("checkpoints/step-*"):
        (checkpoint / "differential.safetensors").unlink()
        write_manifest(checkpoint)
    with refused("step-000004/differential.safetensors"):
        finetune(diff, "diff", diff.differential)


def test_training_on_a_run_without_its_differential_weights_is_refused(diff, tmp_path):
    finetune(diff, "diff", diff.differential)
    (folder_of(diff) / "final" / "differential.safetensors").unlink()
    for arm, differential in (("diff", diff.differential), ("original", None)):
        again = replace(diff, model=diff.output_dir, output_dir=str(tmp_path / "again"))
        with refused("differential.safetensors"):
            finetune(again, arm, differential)


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "differential.safetensors"])
def test_damaged_weights_of_a_finished_run_are_not_trained_on(diff, tmp_path, name):
    finetune(diff, "diff", diff.differential)
    file = folder_of(diff) / "final" / name
    tensors = load_file(file)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, file, metadata=read_header(file))
    assert (folder_of(diff) / "final" / MANIFEST).exists()
    with refused(file, "damaged"):
        finetune(replace(diff, model=diff.output_dir, output_dir=str(tmp_path / "again")), "diff", diff.differential)


def read_header(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as handle:
        return handle.metadata()


def test_a_base_with_other_weights_than_the_adapter_was_trained_on_is_refused(config, tmp_path, capsys):
    """For loading, further training and resuming; a run from before the weights were recorded loads."""
    shutil.copytree(config.model, tmp_path / "base")
    config = replace(config, model=str(tmp_path / "base"))
    interrupt(config, 5)
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    shutil.copytree(config.output_dir, cut.output_dir)
    finetune(config, "original")
    file = next((tmp_path / "base").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    message = "trained on other weights than .*base has now: restore them, or train again"
    with pytest.raises(UserError, match=message):
        PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)
    with pytest.raises(UserError, match=message):
        finetune(replace(config, model=config.output_dir, output_dir=str(tmp_path / "more")), "original")
    with pytest.raises(UserError, match="base_weights"):
        finetune(cut, "original")
    for record in Path(config.output_dir).rglob("run.json"):
        fields = json.loads(record.read_text())
        record.write_text(json.dumps({key: value for key, value in fields.items() if key != "base_weights"}))
    PaliGemmaForConditionalGeneration.from_pretrained(config.output_dir)


# ---- a longer run
def test_a_finished_run_is_extended_and_an_interrupted_extension_resumes_with_equal_bits(config, tmp_path, capsys):
    short = replace(config, max_steps=4, save_every=1, lr=2e-3)
    finetune(short, "original")
    shutil.copytree(short.output_dir, tmp_path / "cut")
    capsys.readouterr()
    long = replace(short, max_steps=8)
    finetune(long, "original")
    printed = capsys.readouterr().out
    assert "max_steps 4 -> 8" in printed and "finished after 4 updates" in printed
    rates = [rate for _, rate in logged(long, "lr")]
    assert rates[:4] == [training.learning_rate_at(short, step, 4) for step in range(4)]
    assert rates[4:] == [training.learning_rate_at(long, step, 8) for step in range(4, 8)]
    assert [step for step, _ in logged(long, "eval")] == [0, 4, 8]
    record = json.loads((folder_of(long) / "run.json").read_text())
    assert [(start["step"], start["extended"]) for start in record["starts"]] == [(0, False), (4, True)]
    assert json.loads((folder_of(long) / "final" / "run.json").read_text())["step"] == 8

    cut = replace(long, output_dir=str(tmp_path / "cut"))
    interrupt(cut, 6)
    assert json.loads((folder_of(cut) / "final" / "run.json").read_text())["step"] == 4  # it can be used meanwhile
    finetune(cut, "original")
    assert logged(cut) == logged(long) and logged(cut, "eval") == logged(long, "eval")
    assert all(torch.equal(a, b) for a, b in zip(saved_lora(cut).values(), saved_lora(long).values(), strict=True))
    starts = json.loads((folder_of(cut) / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4, 6]
    assert json.loads((folder_of(cut) / "run.json").read_text())["id"] == record["id"]  # both began as one run


def test_an_extension_that_makes_no_update_is_refused_and_loses_nothing(config):
    """A share of an epoch may be fewer updates than --max_steps was, and --max_steps does not count beside --epochs."""
    finetune(replace(config, max_steps=3), "original")
    before = (folder_of(config) / "metrics.jsonl").read_text()
    for updates in (2, 3):
        with refused("3 updates are made", "give more"):
            finetune(replace(config, max_steps=3, epochs=updates * config.batch_size / HAYSTACKS_PER_EPOCH), "original")
        assert (folder_of(config) / "metrics.jsonl").read_text() == before


def test_a_run_that_cannot_be_extended_says_why(config):
    short = replace(config, max_steps=2, average_last=0.5)
    finetune(short, "original")
    with refused("max_steps 2 -> 1", "--overwrite=True"):
        finetune(replace(short, max_steps=1), "original")
    with refused("average_last"):
        finetune(replace(short, max_steps=4), "original")
    shutil.rmtree(folder_of(short) / "checkpoints")
    with refused("checkpoint of step 2 is missing"):
        finetune(replace(short, max_steps=4), "original")
