"""Layouts, refusals, atomic writes, run folders and adapters: everything that reads or writes files."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import checkpoint_memory
import huggingface_hub
import peft
import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors
from refusals import child, refused, unprivileged
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapters
import checkpoint
import files
from checkpoint import EMBEDDING, HEAD, INDEX, SINGLE
from modeling_gemma import PaliGemmaConfig, PaliGemmaForConditionalGeneration

FAMILIES = {"gemma": transformers.GemmaConfig, "gemma2": transformers.Gemma2Config}
LINEAR = "linear.weight"


def paligemma(family="gemma", device="cpu", layers=2, **changes):
    text = FAMILIES[family](
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=63, projection_dim=32, **changes
    )
    with torch.device(device):
        return transformers.PaliGemmaForConditionalGeneration(config).eval()


def layout(memory: dict, which: str) -> dict:
    """The state dict in layout L1, L2 or L3, written out independently of the code under test."""
    memory = {key: tensor for key, tensor in memory.items() if key != HEAD}
    if which == "L2":
        return {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in memory.items()}
    renamed = {}
    for key, value in memory.items():
        key = key.removeprefix("model.")
        key = key.replace("language_model.", "language_model.model.")
        renamed[key.replace("vision_tower.", "vision_tower.vision_model.") if which == "L1" else key] = value
    return renamed


def equal(model, expected: dict):
    """Every parameter except the tied head must be off the meta device and bit-equal to `expected`."""
    found = {key: tensor for key, tensor in model.state_dict().items() if key != HEAD}
    assert set(found) == set(expected) - {HEAD}
    for key, tensor in found.items():
        assert not tensor.is_meta, key
        assert torch.equal(tensor, expected[key].to(tensor.dtype)), key


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(0)
    model = paligemma()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_()
    return model


@pytest.fixture
def tiny(tmp_path):
    """A folder with one linear layer and the module it belongs to, on the meta device."""
    tensors = {LINEAR: torch.randn(8, 4), "linear.bias": torch.randn(8)}
    save_file(tensors, tmp_path / SINGLE)
    return tmp_path, tensors


def meta_linear(rows=8, columns=4):
    return torch.nn.ModuleDict({"linear": torch.nn.Linear(columns, rows, device="meta")})


def load(model, folder, **kwargs):
    return checkpoint.load_weights(model, folder, kwargs.pop("dtype", torch.float32), **kwargs)


# ---- names and layouts


def test_names_of_every_layout(source):
    memory = [key for key in source.state_dict() if key != HEAD]
    for which in ("L1", "L2", "L3"):
        assert [checkpoint.rename_key(key) for key in layout(dict.fromkeys(memory), which)] == memory
    assert [checkpoint.rename_key(key) for key in memory] == memory
    hub = list(layout(dict.fromkeys(memory), "L1"))
    assert [checkpoint.hub_key(key) for key in memory] == hub == [checkpoint.hub_key(key) for key in hub]
    for key in ("lm_head.weight", "language_model.lm_head.weight", "model.language_model.lm_head.weight"):
        assert checkpoint.rename_key(key) == HEAD
        assert checkpoint.hub_key(key) == "language_model.lm_head.weight"


@pytest.mark.parametrize("which", ["L1", "L2", "L3"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_every_layout_loads(source, tmp_path, which, size):
    expected = source.state_dict()
    huggingface_hub.save_torch_state_dict(layout(expected, which), tmp_path, max_shard_size=size)
    assert (tmp_path / INDEX).exists() == (size == "20KB")
    target = paligemma(device="meta")
    load(target, tmp_path)
    equal(target, expected)
    assert all(tensor.requires_grad for name, tensor in target.named_parameters() if name != HEAD)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_loads(tmp_path, family):
    model = paligemma(family)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / SINGLE)) == set(layout(model.state_dict(), "L3"))
    target = paligemma(family, device="meta")
    load(target, tmp_path)
    equal(target, model.state_dict())


@pytest.mark.parametrize("which", ["L1", "L2", "L3"])
def test_the_pooling_head_of_siglip_is_ignored(source, tmp_path, which):
    """Folders whose config says vision_use_head have one, which PaliGemma never uses."""
    expected = source.state_dict()
    names = {"L1": "vision_tower.vision_model", "L2": "model.vision_tower.vision_model", "L3": "vision_tower"}
    heads = {f"{names[which]}.head.{name}": torch.zeros(2) for name in ("probe", "layernorm.weight", "mlp.fc1.bias")}
    huggingface_hub.save_torch_state_dict(layout(expected, which) | heads, tmp_path)
    target = paligemma(device="meta")
    load(target, tmp_path)
    equal(target, expected)


def test_older_weights_stay_until_the_new_ones_are_in_place(source, tmp_path, monkeypatch):
    """The moves stop before config.json, the last file: the shards of the older model must still exist."""
    real_replace, moved = os.replace, []

    def replace(file, target):
        if file.name == "config.json":
            raise OSError("stopped")
        moved.append(file.name)
        real_replace(file, target)

    checkpoint.save_weights(source.state_dict(), tmp_path, max_shard_size="20KB")
    old = {file.name for file in tmp_path.iterdir()}
    config = source.config.to_dict()
    monkeypatch.setattr(checkpoint, "os", SimpleNamespace(replace=replace))
    with pytest.raises(OSError, match="stopped"):
        checkpoint.save_model_folder(source.state_dict(), config, tmp_path)
    assert moved == [SINGLE] and old < {file.name for file in tmp_path.iterdir()}
    monkeypatch.undo()
    checkpoint.save_model_folder(source.state_dict(), config, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {SINGLE, "config.json"}


def test_what_we_save_transformers_loads(source, tmp_path):
    for folder, size in ((tmp_path / "single", "5GB"), (tmp_path / "sharded", "20KB")):
        source.config.save_pretrained(folder)
        checkpoint.save_weights(source.state_dict(), folder, max_shard_size=size)
        loaded, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        equal(loaded, source.state_dict())
        assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    with safe_open(tmp_path / "single" / SINGLE, "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == set(layout(source.state_dict(), "L1"))  # the tied head is not written


def test_save_over_the_folder_that_is_mapped(source, tmp_path):
    checkpoint.save_weights(source.state_dict(), tmp_path)
    target = paligemma(device="meta")
    load(target, tmp_path)
    checkpoint.save_weights({key: value for key, value in target.state_dict().items() if key != HEAD}, tmp_path)
    again = paligemma(device="meta")
    load(again, tmp_path)
    equal(again, source.state_dict())


def test_model_folder(source, tmp_path):
    checkpoint.save_weights(source.state_dict(), tmp_path, max_shard_size="20KB")
    (tmp_path / "tokenizer.json").touch()
    mapped = paligemma(device="meta")
    load(mapped, tmp_path)
    mapped.tie_weights()
    checkpoint.save_model_folder(mapped.state_dict(), {"model_type": "paligemma"}, tmp_path)  # over its own pages
    assert sorted(os.listdir(tmp_path)) == ["config.json", SINGLE, "tokenizer.json"]
    again = paligemma(device="meta")
    load(again, tmp_path)
    equal(again, source.state_dict())
    equal(mapped, source.state_dict())


def test_tied_and_untied_heads(source, tmp_path):
    tensors, head = layout(source.state_dict(), "L1"), torch.randn(64, 32)
    embedding = checkpoint.hub_key(EMBEDDING)
    hub_head = checkpoint.hub_key(HEAD)

    save_file(tensors | {hub_head: head}, tmp_path / SINGLE)
    target = paligemma(device="meta")
    load(target, tmp_path)
    equal(target, source.state_dict())  # the file's own head is dropped

    untied = paligemma(device="meta", tie_word_embeddings=False)
    load(untied, tmp_path, tied=False)
    assert torch.equal(untied.lm_head.weight, head)

    save_file({key: value for key, value in tensors.items() if key != embedding} | {hub_head: head}, tmp_path / SINGLE)
    target = paligemma(device="meta")
    load(target, tmp_path)
    assert torch.equal(target.model.language_model.embed_tokens.weight, head)

    save_file(tensors, tmp_path / SINGLE)
    with refused(SINGLE, HEAD):
        load(paligemma(device="meta", tie_word_embeddings=False), tmp_path, tied=False)


def test_untied_head_survives_saving(source, tmp_path):
    state = source.state_dict() | {HEAD: torch.randn(64, 32)}
    checkpoint.save_weights(state, tmp_path)
    target = paligemma(device="meta", tie_word_embeddings=False)
    load(target, tmp_path, tied=False)
    assert torch.equal(target.lm_head.weight, state[HEAD])


def test_dtypes(tmp_path):
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(5, 3), requires_grad=False)
            self.scale = torch.nn.Parameter(torch.zeros(()))
            self.register_buffer("ids", torch.zeros(4, dtype=torch.long))

    stored = {"weight": torch.randn(5, 3).bfloat16(), "scale": torch.tensor(1.5), "ids": torch.arange(4)}
    save_file(stored, tmp_path / SINGLE)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        with torch.device("meta"):
            target = Mixed()
        load(target, tmp_path, dtype=dtype)
        assert target.weight.dtype == target.scale.dtype == dtype and target.ids.dtype == torch.long
        assert not target.weight.requires_grad and target.scale.requires_grad
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor.double(), stored[name].double())


def test_conversion_in_pieces(tiny, monkeypatch):
    folder, tensors = tiny
    for piece in (1, 40, 50, 1000):  # 1, 2, 3 (so a ragged end) and all of the 8 rows, of 16 bytes each
        monkeypatch.setattr(checkpoint, "PIECE", piece)
        target = meta_linear()
        load(target, folder, dtype=torch.float64)
        for name, tensor in target.state_dict().items():
            assert torch.equal(tensor, tensors[name].double()), (piece, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("stored", "loaded"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_converted_weights_are_finite(tiny, value, stored, loaded):
    folder, tensors = tiny
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    tensors[LINEAR][3, 2] = value
    save_file(tensors, folder / SINGLE)
    with refused(folder / SINGLE, LINEAR, "contains NaN or infinity"):
        load(meta_linear(), folder, dtype=loaded)
    tensors[LINEAR][:] = torch.finfo(torch.bfloat16).max  # finite, but the sum is not
    save_file(tensors, folder / SINGLE)
    load(meta_linear(), folder, dtype=loaded)


# ---- keys and shapes refused


@pytest.mark.parametrize("stored, built", [("gemma", "gemma2"), ("gemma2", "gemma")])
def test_family_mix_up(tmp_path, stored, built):
    checkpoint.save_weights(paligemma(stored).state_dict(), tmp_path)
    target = paligemma(built, device="meta")
    digit = {"gemma": 1, "gemma2": 2}[stored]
    with refused(tmp_path / SINGLE, "feedforward_layernorm", f"this is a Gemma {digit} (PaliGemma {digit})", built):
        load(target, tmp_path)
    assert all(tensor.is_meta for tensor in target.parameters())  # nothing was loaded


def test_unexpected_missing_and_shapes(source, tmp_path):
    tensors = layout(source.state_dict(), "L1")
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {"extra.weight": torch.zeros(2), "other.weight": torch.zeros(2)}, tmp_path / SINGLE)
    with refused(tmp_path / SINGLE, "2 unexpected keys", "extra.weight"):
        load(paligemma(device="meta"), tmp_path)
    save_file({name: value for name, value in tensors.items() if name != key}, tmp_path / SINGLE)
    with refused(tmp_path / SINGLE, "1 missing keys", "layers.1.mlp.up_proj.weight"):
        load(paligemma(device="meta"), tmp_path)
    save_file(tensors | {key: torch.zeros(7, 32)}, tmp_path / SINGLE)
    with refused(tmp_path / SINGLE, key, "(7, 32)", "(48, 32)"):
        load(paligemma(device="meta"), tmp_path)
    save_file(tensors | {checkpoint.rename_key(key): tensors[key].clone()}, tmp_path / SINGLE)
    with refused(tmp_path / SINGLE, key, checkpoint.rename_key(key), "two names"):
        load(paligemma(device="meta"), tmp_path)
    save_file(tensors | {"model.language_model.layers.0.self_attn.differential.x": torch.zeros(2)}, tmp_path / SINGLE)
    with refused(tmp_path / SINGLE, "differential configuration"):
        load(paligemma(device="meta"), tmp_path)


# ---- files refused


@pytest.fixture
def sharded(tmp_path):
    """Two shards of one tensor each, and what the index says."""
    save_file({LINEAR: torch.zeros(8, 4)}, tmp_path / "a.safetensors")
    save_file({"linear.bias": torch.zeros(8)}, tmp_path / "b.safetensors")
    weight_map = {LINEAR: "a.safetensors", "linear.bias": "b.safetensors"}

    def write(**changes):
        files.write_json(tmp_path / INDEX, {"metadata": {}, "weight_map": weight_map | changes})
        return tmp_path

    return write


def test_shards_refused(sharded):
    folder = sharded()
    load(meta_linear(), folder)
    (folder / "a.safetensors").rename(folder / "c.safetensors")
    with refused(folder / "a.safetensors", LINEAR, "missing"):
        load(meta_linear(), folder)
    (folder / "a.safetensors").symlink_to(folder / "c.safetensors")  # as in the hub's cache
    load(meta_linear(), folder)
    sharded(absent="b.safetensors")
    with refused(folder / "b.safetensors", "absent"):
        load(meta_linear(), folder)
    for outside in ("../b.safetensors", str(folder / "b.safetensors"), "x/../../b.safetensors"):
        sharded(**{"linear.bias": outside})
        with refused(folder / INDEX, "linear.bias", outside, "outside"):
            load(meta_linear(), folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "\x00"])
def test_broken_index(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with refused(tmp_path / INDEX):
        load(meta_linear(), tmp_path)


def test_truncated_and_corrupt(tiny):
    folder, _ = tiny
    whole = (folder / SINGLE).read_bytes()
    for content in (b"", whole[:4], whole[:40], whole[:-1], whole + b"x", b"\xff" * 64, b"PK\x03\x04" + bytes(200)):
        (folder / SINGLE).write_bytes(content)
        with refused(folder / SINGLE, "truncated or corrupt"):
            load(meta_linear(), folder)
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with refused(folder / SINGLE, "git lfs pull"):
        load(meta_linear(), folder)


def test_corrupt_shard_of_many(sharded):
    folder = sharded()
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-3])
    target = meta_linear()
    with refused(folder / "b.safetensors", "truncated"):
        load(target, folder)
    assert target["linear"].weight.is_meta  # found before anything was loaded


def test_no_weights(tmp_path):
    with refused(tmp_path, "no weights"):
        load(meta_linear(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with refused(tmp_path / "pytorch_model.bin", "convert it to safetensors", "never loaded"):
        load(meta_linear(), tmp_path)


def test_permission_denied(tiny):
    folder, _ = tiny
    files.write_json(folder / "config.json", {})
    (folder / "locked").mkdir()
    for path in (folder / SINGLE, folder / "config.json", folder / "locked"):
        path.chmod(0)
    with unprivileged(folder):
        with refused(folder / SINGLE, "Permission denied", "check"):
            load(meta_linear(), folder)
        with refused(folder / "config.json", "Permission denied"):
            files.read_json(folder / "config.json")
        with refused(folder / "locked", "Permission denied"):
            load(meta_linear(), folder / "locked")
        with refused(folder / "locked", "Permission denied"):
            checkpoint.resolve_run(folder / "locked")
        with refused(folder / "locked/in", "Permission denied"):
            checkpoint.locate(folder / "locked/in")
        with refused(folder / "new", "Permission denied", "check"), files.atomic_folder(folder / "new"):
            pass
        with refused(folder / "new.json", "Permission denied"):
            files.write_json(folder / "new.json", {})
        with refused(folder, "Permission denied"):
            checkpoint.save_weights({LINEAR: torch.zeros(2, 2)}, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "locked", SINGLE]


# ---- memory


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heavy")
    with torch.device("meta"):
        model = checkpoint_memory.build()
    tensors = {key: torch.full(value.shape, 0.5, dtype=torch.bfloat16) for key, value in model.state_dict().items()}
    save_file(tensors, folder / SINGLE)
    yield folder
    (folder / SINGLE).unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_never_held_twice(heavy, dtype):
    result = child(checkpoint_memory.__file__, heavy, dtype)
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["weights"] > 100e6
    assert 0.9 < measured["growth"] / measured["weights"] < 1.15, measured


def test_imports_are_light():
    result = child(
        "import sys, checkpoint; print([m for m in ('transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    assert result.stdout == "[]\n", result.stderr


# ---- hub and run folders


def hub_fault(kind, status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("several\nlines", response=response)


@pytest.mark.parametrize(
    "fault, parts",
    [
        (hub_fault(hub_errors.GatedRepoError, 403), ("https://huggingface.co/org/name", "license", "hf auth login")),
        (hub_fault(hub_errors.GatedRepoError, 401), ("license", "hf auth login")),
        (hub_fault(hub_errors.HfHubHTTPError, 401), ("license", "hf auth login")),
        (hub_fault(hub_errors.HfHubHTTPError, 403), ("license", "hf auth login")),
        (hub_fault(hub_errors.RepositoryNotFoundError, 401), ("no such folder", "no such model", "check the name")),
        (hub_fault(hub_errors.RevisionNotFoundError, 404), ("no revision 'v9'",)),
        (hub_errors.LocalEntryNotFoundError("several\nlines"), ("not in the cache", "connect")),
        (hub_errors.IncompleteSnapshotError("several\nlines", "/x"), ("not in the cache", "connect")),
        (hub_fault(hub_errors.HfHubHTTPError, 500), ("not fetched", "several lines", "try again")),
        (hub_errors.HTTPError("connection\nreset"), ("not fetched", "connection reset")),
        (hub_errors.HFValidationError("bad\nid"), ("not fetched", "bad id")),
        (OSError(28, "No space left on device"), ("not fetched", "No space left")),
    ],
)
def test_hub_faults(monkeypatch, fault, parts):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with refused("org/name", *parts):
        checkpoint.locate("org/name@v9")


def test_locate(tmp_path, monkeypatch):
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision))
        assert not any(pattern.endswith((".bin", ".py", ".npz")) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert checkpoint.locate("org/here") == Path("org/here")  # a folder goes before the hub
    assert checkpoint.locate(tmp_path) == tmp_path
    assert asked == []
    assert checkpoint.locate("google/paligemma-3b-pt-224@float16") == tmp_path
    assert asked == [("google/paligemma-3b-pt-224", "float16")]
    for name in ("nowhere", "./org/name", "/org/name", "a/b/c", "../name", "gone/", "org/na me"):
        with refused(name, "no such folder"):
            checkpoint.locate(name)
    (tmp_path / "model.safetensors").touch()
    with refused("model.safetensors", "is a file"):
        checkpoint.locate("model.safetensors")
    assert len(asked) == 1


def test_locate_offline_uses_the_cache(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("0" * 40)
    code = """
import adapters
import checkpoint
import files
from errors import UserError
print(checkpoint.locate("org/name"))
try:
    checkpoint.locate("org/other")
except UserError as error:
    print(error)
"""
    os.environ["HF_HUB_OFFLINE"], os.environ["HF_HUB_CACHE"] = "1", str(tmp_path)
    try:
        result = child(code)
    finally:
        del os.environ["HF_HUB_OFFLINE"], os.environ["HF_HUB_CACHE"]
    found, line = result.stdout.splitlines()
    assert found == str(snapshot)
    assert line.startswith("org/other: no such folder") and "not in the cache" in line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run in `runs/x`, its base beside it; the current folder is the parent of both."""
    (tmp_path / "base").mkdir()
    for inner in ("final", "best", "checkpoints/step-000400"):
        (tmp_path / "runs/x" / inner / "adapter").mkdir(parents=True)
        files.write_json(tmp_path / "runs/x" / inner / "adapter/adapter_config.json", {})
    files.write_json(tmp_path / "runs/x/run.json", {"base_model": "base"})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs/x"


def test_run_folders(run, monkeypatch):
    for path in ("runs/x", "runs/x/", run):
        base, adapter = checkpoint.resolve_run(path)
        assert base == "base" and adapter == Path(path) / "final/adapter"
    for inner in ("final", "best", "checkpoints/step-000400"):
        assert checkpoint.resolve_run(f"runs/x/{inner}") == ("base", Path("runs/x") / inner / "adapter")
    assert checkpoint.resolve_run("runs/x/best/adapter") == ("base", Path("runs/x/best/adapter"))
    files.write_json(run / "best/run.json", {"base_model": "google/paligemma2-3b-pt-224"})  # its own file has priority
    assert checkpoint.resolve_run("runs/x/best")[0] == "google/paligemma2-3b-pt-224"
    files.write_json(run / "run.json", {"base_model": str(run.parent.parent / "base")})
    monkeypatch.chdir(run / "final")
    assert checkpoint.resolve_run(".")[1] == Path("adapter")


def test_base_of_a_run(run, tmp_path, monkeypatch):
    root = tmp_path / "repository"
    (root / "assets/nano").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "ROOT", root)
    files.write_json(run / "run.json", {"base_model": "assets/nano"})
    assert checkpoint.resolve_run("runs/x")[0] == str(root / "assets/nano")
    (tmp_path / "assets/nano").mkdir(parents=True)
    assert checkpoint.resolve_run("runs/x")[0] == "assets/nano"  # the current folder goes first
    for base in ("../gone", "/gone/too", "gone"):
        files.write_json(run / "run.json", {"base_model": base})
        with refused(run / "run.json", "base_model", base):
            checkpoint.resolve_run(run)
    for content in ({}, {"base_model": None}, {"base_model": ""}):
        files.write_json(run / "run.json", content)
        with refused(run / "run.json", "base_model"):
            checkpoint.resolve_run(run)
    (run / "run.json").write_text("{")
    with refused(run / "run.json", "not valid JSON"):
        checkpoint.resolve_run(run)
    (run / "run.json").unlink()
    files.write_json(run / "final/adapter/adapter_config.json", {"base_model_name_or_path": "org/base"})
    assert checkpoint.resolve_run(run)[0] == "org/base"  # an adapter from elsewhere


def test_unfinished_run(run):
    (run / "final").rename(run / "elsewhere")
    with refused("runs/x", "unfinished", "continue", "checkpoints/step-000400"):
        checkpoint.resolve_run("runs/x")
    (run / "checkpoints").rename(run / "else")
    with refused("runs/x", "unfinished", "none yet"):
        checkpoint.resolve_run("runs/x")
    (run / "final/adapter").mkdir(parents=True)
    with refused("runs/x/final", "unfinished"):
        checkpoint.resolve_run("runs/x/final")


def test_plain_models_are_no_runs(tmp_path):
    files.write_json(tmp_path / "config.json", {})
    files.write_json(tmp_path / "run.json", {})  # how the model was made
    assert checkpoint.resolve_run(tmp_path) == (str(tmp_path), None)
    assert checkpoint.resolve_run("google/paligemma-3b-pt-224") == ("google/paligemma-3b-pt-224", None)


# ---- adapters

TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|up_proj)"


def save_adapter(folder, targets=TARGETS, layers=2, seed=1):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(paligemma(layers=layers), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return {key: value.clone() for key, value in load_file(folder / "adapter_model.safetensors").items()}


def attached(model) -> dict:
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def test_adapter_round_trip(tmp_path):
    stored = save_adapter(tmp_path)
    model = paligemma()
    adapted = adapters.attach_adapter(model, tmp_path)
    assert adapted.get_base_model() is model
    found = attached(adapted)
    assert set(found) == set(stored) and len(stored) == 8
    assert all(torch.equal(found[key], stored[key]) for key in stored)
    assert not any(tensor.requires_grad for tensor in adapted.parameters()) and not adapted.training
    adapted = adapters.attach_adapter(paligemma(), tmp_path, trainable=True)
    trainable = {name for name, tensor in adapted.named_parameters() if tensor.requires_grad}
    assert len(trainable) == 8 and all("lora_" in name for name in trainable)


@pytest.mark.parametrize("which", ["L1", "L2"])
def test_adapters_of_older_namings(tmp_path, which):
    both = [r"q_proj"]  # the vision tower as well
    stored = save_adapter(tmp_path, both)
    prefix = "base_model.model."
    old = layout({key.removeprefix(prefix): value for key, value in stored.items()}, which)
    assert set(old) & {key.removeprefix(prefix) for key in stored} != set(old)
    save_file({prefix + key: value for key, value in old.items()}, tmp_path / "adapter_model.safetensors")
    found = attached(adapters.attach_adapter(paligemma(), tmp_path))
    assert set(found) == set(stored)
    assert all(torch.equal(found[key], stored[key]) for key in stored)


def test_adapters_refused(tmp_path):
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    with refused(config, "No such file"):
        adapters.attach_adapter(paligemma(), tmp_path)
    stored = save_adapter(tmp_path)
    key = min(stored)

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with refused(weights, "truncated or corrupt"):
        adapters.attach_adapter(paligemma(), tmp_path)

    save_file(stored | {"base_model.model.model.language_model.layers.9.x.lora_A.weight": torch.zeros(2)}, weights)
    with refused(weights, "layers.9.x", "no place", "(1 keys)"):
        adapters.attach_adapter(paligemma(), tmp_path)

    save_file({name: value for name, value in stored.items() if name != key}, weights)
    with refused(weights, key, "missing"):
        adapters.attach_adapter(paligemma(), tmp_path)

    save_file(stored | {key: torch.zeros(2, 7)}, weights)
    with refused(tmp_path, key.removesuffix(".weight"), "does not fit"):
        adapters.attach_adapter(paligemma(), tmp_path)

    for value in (float("nan"), float("inf")):
        save_file(stored | {key: torch.full_like(stored[key], value)}, weights)
        with refused(weights, key, "contains NaN or infinity"):
            adapters.attach_adapter(paligemma(), tmp_path)

    weights.write_bytes(whole)
    with refused(weights, "missing for this model"):
        adapters.attach_adapter(paligemma(layers=3), tmp_path)
    with refused(weights, "no place in this model"):
        adapters.attach_adapter(paligemma(layers=1), tmp_path)
    with refused(tmp_path, "does not fit", "arget modules"):
        adapters.attach_adapter(meta_linear(), tmp_path)

    content = files.read_json(config)
    files.write_json(config, content | {"peft_type": "NOPE"})
    with refused(config, "NOPE", "peft_type"):
        adapters.attach_adapter(paligemma(), tmp_path)
    config.write_text("{")
    with refused(config, "not valid JSON"):
        adapters.attach_adapter(paligemma(), tmp_path)
    files.write_json(config, content)

    weights.unlink()
    with refused(weights, "No such file"):
        adapters.attach_adapter(paligemma(), tmp_path)
    torch.save(stored, tmp_path / "adapter_model.bin")
    with refused("adapter_model.bin", "never loaded"):
        adapters.attach_adapter(paligemma(), tmp_path)


CATASTROPHE = r".*(\w+\w+)+(\w+\w+)+(\w+\w+)+x"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", CATASTROPHE),
        ("target_modules", ["q_proj", CATASTROPHE]),
        ("target_modules", r".*language_model\.layers\.\d+\.(self_attn|mlp)\.((\w+)+x|q_proj)"),
        ("exclude_modules", CATASTROPHE),
        ("exclude_modules", [CATASTROPHE]),
        ("rank_pattern", {CATASTROPHE: 4}),
        ("alpha_pattern", {CATASTROPHE: 4}),
        ("modules_to_save", [CATASTROPHE]),
        ("layers_pattern", CATASTROPHE),
    ],
)
def test_regular_expressions_of_adapters_are_refused(tmp_path, field, value):
    """Matching them against every module name could take hours."""
    save_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    files.write_json(config, files.read_json(config) | {field: value, "layers_to_transform": [0]})
    with refused(config, field):
        adapters.attach_adapter(paligemma(), tmp_path)


@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "up_proj"], ["self_attn.q_proj", "mlp.up_proj"]])
def test_plain_names_of_adapters_are_accepted(tmp_path, targets):
    stored = save_adapter(tmp_path, targets)
    config = tmp_path / "adapter_config.json"
    changes = {"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"layers.0.mlp.up_proj": 4}, "exclude_modules": ["x"]}
    files.write_json(config, files.read_json(config) | changes)
    found = attached(adapters.attach_adapter(paligemma(), tmp_path))
    assert all(torch.equal(found[key], stored[key]) for key in stored)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"r": "8"}, ("Expected int, got str", "$.r")),
        ({"r": 0}, ("Expected int >= 1", "$.r")),
        ({"lora_dropout": 2}, ("lora_dropout",)),
        ({"lora_alpha": None}, ("lora_alpha",)),
        ({"peft_type": "IA3"}, ("IA3", "peft_type")),
        ({"peft_type": 3}, ("peft_type",)),
        ({"target_modules": {"a": 1}}, ("target_modules",)),
        ({"rank_pattern": ["a"]}, ("rank_pattern",)),
        ({"megatron_config": {"x": 1}, "megatron_core": "antigravity"}, ("megatron_config is not supported",)),
        ({"layer_replication": [[0, 10**9]]}, ("layer_replication is not supported",)),
        ({"auto_mapping": []}, ("auto_mapping",)),
    ],
)
def test_fields_of_an_adapter_are_typed(tmp_path, changes, parts):
    save_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    files.write_json(config, files.read_json(config) | changes)
    with refused(config, *parts):
        adapters.attach_adapter(paligemma(), tmp_path)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "QUESTION_ANS"])
def test_an_adapter_of_any_task_loads(tmp_path, task):
    """peft's task classes need methods that only transformers' models have."""
    stored = save_adapter(tmp_path)
    config = tmp_path / "adapter_config.json"
    files.write_json(config, files.read_json(config) | {"task_type": task})
    found = attached(adapters.attach_adapter(tiny_model(), tmp_path))
    assert all(torch.equal(found[key], stored[key]) for key in stored)


def tiny_model():
    """The model of `paligemma`, of this repository."""
    config = PaliGemmaConfig.from_dict(paligemma(device="meta").config.to_dict())
    return PaliGemmaForConditionalGeneration(config)


@pytest.mark.parametrize("targets", [("q_proj", "nope"), ("nope",), ("q.*",), ("vision_tower",)])
def test_every_lora_target_is_a_layer(targets):
    config = SimpleNamespace(seed=0, lora_rank=2, lora_alpha=2, lora_dropout=0.0, lora_targets=targets)
    with refused("--lora_targets", repr(targets[-1]), "q_proj k_proj v_proj"):
        adapters.new_lora(config, tiny_model())


def test_modules_to_save_are_not_merged(tmp_path):
    """Except the tower and the projector, see test_trained_parts.py."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["input_layernorm"])
    peft.get_peft_model(paligemma(), config).save_pretrained(tmp_path, save_embedding_layers=False)
    model = tiny_model()
    adapters.attach_adapter(model, tmp_path)
    with refused("input_layernorm", "modules_to_save"):
        adapters.merge(model)


@pytest.mark.parametrize(
    ("content", "parts"),
    [({"base_model": 3}, ("base_model", "got int")), ({"base_model": "a/b", "base_revision": [1]}, ("base_revision",))],
)
def test_the_base_in_a_run_record_is_typed(run, content, parts):
    files.write_json(run / "run.json", content)
    with refused(run / "run.json", *parts):
        checkpoint.resolve_run(run)
