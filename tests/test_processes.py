"""Several processes give the results of one: rows that do not divide evenly, evaluations, errors, two nodes."""

import json
import signal
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny_phi
import torch
from PIL import Image
from runs import ROOT, flags_of, logged, saved_lora, start, wait_for
from safetensors.torch import load_file

from data import batch_order
from differential_attention import DifferentialConfig
from errors import UserError
from finetune_original import Config, finetune

COLOURS = ["red", "green", "blue", "yellow", "white", "black", "orange", "purple", "brown", "grey", "pink", "cyan"]


def write_rows(folder: Path, name: str, count: int) -> str:
    """A jsonl file of `count` rows, each with its own image."""
    for colour in COLOURS[:count]:
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}-{colour}.png")
    rows = [
        {"image": f"{name}-{c}.png", "prefix": "caption en", "suffix": " ".join([c] * n)}
        for n, c in enumerate(COLOURS, 1)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:count]))
    return str(folder / f"{name}.jsonl")


@pytest.fixture
def config(tiny_model, tmp_path):
    """9 rows in batches of 4: the last one of an epoch has one row; 5 rows to evaluate on."""
    return Config(
        model=str(tiny_model),
        data=write_rows(tmp_path, "train", 9),
        eval_data=write_rows(tmp_path, "test", 5),
        output_dir=str(tmp_path / "alone"),
        max_steps=4,
        batch_size=4,
        accumulation=2,
        warmup_steps=1,
        eval_batch_size=2,
        eval_every=2,
        max_new_tokens=3,
        log_every=1,
        save_every=1,
    )


def launch(config, *arguments: str, scriptname="finetune_original.py", flags: tuple[str, ...] = ()):
    """Start a script with torchrun, with the flags of a configuration and the given ones."""
    return start("-m", "torch.distributed.run", *arguments, scriptname, *flags_of(config), *flags)


def check_finished(*processes):
    """Wait for processes to succeed."""
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err


def check_same(found, expected):
    """Compare losses to 1e-5, all answers of the evaluations, and the adapters."""
    assert dict(logged(found)) == pytest.approx(dict(logged(expected)), abs=1e-5)
    assert logged(found, "eval") == logged(expected, "eval")
    answers = [(Path(c.output_dir) / "samples.jsonl").read_text() for c in (found, expected)]
    assert answers[0] == answers[1] and '"green' in answers[0]
    for folder in ("final", "best"):
        weights = saved_lora(expected, folder)
        for name, tensor in saved_lora(found, folder).items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=1e-4)


def test_two_processes_train_as_one(config, tmp_path):
    shares = [len(keys[1::2]) for keys, _ in zip(batch_order(9, 4, 0), range(3), strict=False)]
    assert shares == [2, 2, 0]  # the second process has no row in the last batch
    finetune(config, "original")
    together = replace(config, output_dir=str(tmp_path / "together"))
    check_finished(launch(together, "--standalone", "--nproc-per-node=2"))
    check_same(together, config)
    assert logged(together, "eval")[0][1] == {"test.jsonl": [0, 5]}  # each row once
    record = json.loads((tmp_path / "together" / "run.json").read_text())
    assert record["processes"] == 2


def test_an_error_of_one_process_ends_all_with_one_line(config, tmp_path):
    config = replace(config, data=write_rows(tmp_path, "more", 12), strict_data=True, max_steps=6)
    second = {index for keys, _ in zip(batch_order(12, 4, 0), range(3), strict=False) for _, index in keys[1::2]}
    broken = max(second - set(range(8)))  # the first eight are read by all processes
    (tmp_path / f"more-{COLOURS[broken]}.png").write_bytes(b"no image")
    process = launch(config, "--standalone", "--nproc-per-node=2")
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    (line,) = [line for line in err.splitlines() if "error: " in line]  # next to the other process's progress bar
    assert f"more.jsonl:{broken + 1}" in line
    assert "in train\n" not in err and "Connection closed" not in err  # torchrun's own report is all that follows


def test_sharded_frozen_layers_train_like_whole_ones(config, tmp_path):
    """FSDP2 on two processes, with recomputed layers, in the differential arm; what is saved is whole. Batches of odd
    size are shared out as they come."""
    config = replace(config, batch_size=5)
    finetune(config, "diff", DifferentialConfig().resolve())
    sharded = replace(config, output_dir=str(tmp_path / "sharded"), shard=True, gradient_checkpointing=True)
    check_finished(launch(sharded, "--standalone", "--nproc-per-node=2", scriptname="finetune_diff.py"))
    check_same(sharded, config)
    added, expected = (load_file(Path(c.output_dir) / "final" / "differential.safetensors") for c in (sharded, config))
    for name, tensor in expected.items():
        torch.testing.assert_close(added[name], tensor, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="--shard=True.*torchrun"):
        finetune(replace(config, output_dir=str(tmp_path / "one"), shard=True), "original")


SHARDED = """
import tiny
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from adapters import gathered, new_lora, shard_frozen_layers
from finetune_original import Config
from machine import make_accelerator

model = tiny.ours_like(tiny.hf_model("gemma"))
adapted, accelerator = new_lora(Config(), model), make_accelerator()
shard_frozen_layers(model, adapted, accelerator)
layers = [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]
frozen = [p for layer in layers for p in layer.parameters() if not p.requires_grad]
assert all(isinstance(layer, FSDPModule) for layer in layers) and all(isinstance(p, DTensor) for p in frozen)
assert sum(p.to_local().numel() for p in frozen) < 0.6 * sum(p.numel() for p in frozen)
with gathered(model):
    assert not any(isinstance(p, DTensor) for layer in layers for p in layer.parameters())
assert all(isinstance(p, DTensor) for layer in layers for p in layer.parameters() if not p.requires_grad)
torch.distributed.destroy_process_group()
"""


def test_each_process_stores_half_of_the_frozen_layers(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(f"import sys\n\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n{SHARDED}")
    check_finished(start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)))


@pytest.mark.slow
def test_two_processes_train_the_phi_family_as_one(config, tmp_path):
    """FSDP2 for the frozen layers; trained parameters are synchronized by DDP."""
    model = str(tiny_phi.folder(tmp_path / "phi"))
    config = replace(config, model=model, max_steps=3, lr=1e-2)
    finetune(config, "diff", DifferentialConfig("v1").resolve())
    sharded = replace(config, output_dir=str(tmp_path / "sharded"), shard=True)
    choice = dict(scriptname="finetune_diff.py", flags=("--differential.preset=v1",))
    check_finished(launch(sharded, "--standalone", "--nproc-per-node=2", **choice))
    check_same(sharded, config)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora", "full"])
def test_two_processes_train_the_tower_of_phi_as_one(config, tmp_path, how):
    """CLIP's last layer never runs, and most micro-batches have no image."""
    rows = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
    rows = [row | {"image": row["image"] if index < 2 else None} for index, row in enumerate(rows)]
    Path(config.data).write_text("\n".join(json.dumps(row) for row in rows))
    model = str(tiny_phi.folder(tmp_path / "phi"))
    config = replace(config, model=model, lr=1e-3, batch_size=2, train_vision=how, train_projector="full")
    finetune(config, "original")
    together = replace(config, output_dir=str(tmp_path / "together"))
    check_finished(launch(together, "--standalone", "--nproc-per-node=2"))
    check_same(together, config)
    assert any("img_processor" in name for name in saved_lora(config))


@pytest.mark.slow
def test_four_processes_train_as_one(config, tmp_path):
    finetune(config, "original")
    together = replace(config, output_dir=str(tmp_path / "together"))
    check_finished(launch(together, "--standalone", "--nproc-per-node=4"))
    check_same(together, config)


@pytest.mark.slow
def test_two_nodes_train_as_one(config, tmp_path):
    """Two torchrun agents with one rendezvous address, as on two machines."""
    finetune(config, "original")
    together = replace(config, output_dir=str(tmp_path / "together"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    check_finished(*(launch(together, *rendezvous, f"--node-rank={rank}") for rank in range(2)))
    check_same(together, config)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_two_interrupted_processes_continue_as_four(config, tmp_path, number):
    """The batches do not depend on the number of processes."""
    config = replace(config, max_steps=60)
    finetune(config, "original")
    cut = replace(config, output_dir=str(tmp_path / "cut"))
    process = launch(cut, "--standalone", "--nproc-per-node=2")
    wait_for(tmp_path / "cut" / "checkpoints" / "step-000008", process)
    for worker in psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else ():
        worker.kill()  # as when the machine is lost; torchrun passes other signals on to them
    process.send_signal(number)
    process.communicate()
    assert not (tmp_path / "cut" / "final").exists()
    check_finished(launch(cut, "--standalone", "--nproc-per-node=4"))
    check_same(cut, config)
