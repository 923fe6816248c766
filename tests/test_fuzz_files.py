"""Mutated files of a model, an adapter and a manifest: each loads and answers, or is refused in one line that names it.

Mutations are random with a fixed seed: a JSON value replaced, removed or renamed, mostly in a field that is read;
tensors with NaN, another shape, dtype or name in a well-formed file; headers edited; bytes flipped, cut or inserted;
the file replaced by a link loop, a pipe, a device or a folder, or deleted.
"""

import json
import os
import random
import re
import shutil
import signal
import struct
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import files
from adapters import save_differential
from checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DIFFERENTIAL, INDEX, SINGLE, hub_key, save_weights
from errors import UserError
from modeling_gemma import PaliGemmaForConditionalGeneration
from models import classes_of

LIMIT = 60  # seconds for one file
FAST, SLOW = 15, 180  # mutations of each kind of file: in the suite, and in the run marked slow
TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q_proj|v_proj)"

# kind -> (the folder of `originals` that is copied, the file in it that is mutated)
KINDS = {
    "config": ("model", "config.json"),
    "preprocessor": ("model", "preprocessor_config.json"),
    "processor": ("model5", "processor_config.json"),
    "tokenizer": ("model", "tokenizer.json"),
    "weights": ("model", SINGLE),
    "index": ("sharded", INDEX),
    "adapter_config": ("run", f"adapter/{ADAPTER_CONFIG}"),
    "adapter_weights": ("run", f"adapter/{ADAPTER_WEIGHTS}"),
    "differential": ("run", DIFFERENTIAL),
    "manifest": ("complete", files.MANIFEST),
    "image": ("images", "a.png"),
}

FINITE = ("adapter_weights", "differential")  # NaN or an infinite value in these is refused

VALUES = [
    *(None, True, False, -1, 0, 1, 3, 7, 0.5, -0.5, 1e30, 2**31, 2**63, 10**25, float("nan"), float("inf")),
    *("", "x", "nan", "\ud800", "a\0b", "../../etc/passwd", "/dev/zero", "x" * 5000, "all-linear"),
    *("CAUSAL_LM", "QUESTION_ANS", "LORA", "IA3", "PROMPT_TUNING", "pissa", "eva", "sum", "gelu", "relu", "gemma2"),
    *([], {}, [1], ["x"], [None], [[]], {"x": 1}, {"": None}, [0] * 1000, ["q_proj"], ["lm_head"]),
    *({"q_proj": 0}, {"q_proj": "x"}, {"rope_type": "yarn"}),
]

# untrusted regular expressions: the first takes exponential time on the name of a module
PATTERN_FIELDS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern")
PATTERNS = [value for text in (r"(([a-z_.0-9])+)+!", r".*\.q_proj", "(", "") for value in (text, [text], {text: 3})]


# what peft reads of an adapter's configuration, and the fields with ranges of a model's
FIELDS = (
    *("base_model_name_or_path", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("layers_pattern", "layers_to_transform", "modules_to_save", "task_type", "peft_type", "r", "lora_alpha"),
    *("lora_dropout", "bias", "use_dora", "use_rslora", "init_lora_weights", "auto_mapping", "target_parameters"),
    *("trainable_token_indices", "fan_in_fan_out", "lora_bias", "eva_config", "loftq_config", "layer_replication"),
    *("model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers"),
    *("hidden_activation", "hidden_act", "rope_parameters", "rope_theta", "rms_norm_eps", "layer_norm_eps"),
    *("image_token_index", "image_size", "patch_size", "pad_token_id", "eos_token_id", "tie_word_embeddings"),
    *("size", "height", "image_mean", "image_std", "rescale_factor", "resample", "weight_map", "base_revision"),
)


class Hang(BaseException):
    """Raised in a case that takes longer than LIMIT; the code under test does not catch it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises Hang in the block after `seconds`."""

    def stop(*_):
        raise Hang

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


# ---- mutations: (content, random) -> other content


def places(data: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in parsed JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in items for found in ((*path, key), *places(value, (*path, key)))]


def mutate_data(data: Any, rng: random.Random, fields: tuple[str, ...] = ()) -> str:
    """Replace, delete, rename or exchange one value of parsed JSON, in place. Returns what was done.

    Half of the time this is the value of one of `fields`, which are read, since most of a file is never read.
    """
    paths = places(data)
    short = [path for path in paths if len(path) <= 2]  # a tokenizer is mostly vocabulary
    used = [path for path in paths if path[-1] in fields]
    path = rng.choice(used if used and rng.random() < 0.5 else short if short and rng.random() < 0.6 else paths)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    action = rng.choice(["replace"] * 6 + ["delete", "rename", "exchange", "wrap"])
    if action == "replace":
        pattern = path[-1] in PATTERN_FIELDS and rng.random() < 0.5
        parent[path[-1]] = rng.choice(PATTERNS if pattern else VALUES)
        action = f"replace by {parent[path[-1]]!r:.40}"
    elif action == "delete":
        del parent[path[-1]]
    elif action == "rename" and isinstance(parent, dict):
        parent[path[-1] + "_"] = parent.pop(path[-1])
    elif action == "exchange":
        other = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
    else:
        parent[path[-1]] = {"x": parent[path[-1]]} if rng.random() < 0.5 else [parent[path[-1]]]
    return f"{action} at {'.'.join(map(str, path))[:80]}"


def mutate_json(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    data = json.loads(raw)
    done = mutate_data(data, rng, FIELDS)
    return json.dumps(data).encode(), done


def mutate_header(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Edit the header of a safetensors file: 8 bytes with its length, then JSON."""
    length = struct.unpack("<Q", raw[:8])[0]
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, length - 1, length + 1, len(raw), 2**32, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + raw[8:], f"header length {wrong}"
    header = json.loads(raw[8 : 8 + length])
    done = mutate_data(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + length :], f"header: {done}"


def mutate_tensors(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A well-formed safetensors file with other tensors or other metadata."""
    length = struct.unpack("<Q", raw[:8])[0]
    metadata = json.loads(raw[8 : 8 + length]).get("__metadata__")
    tensors = safetensors.torch.load(raw)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    actions = ["nan", "inf", "drop", "rename", "add", "transpose", "flatten", "scalar", "empty", "dtype", "twin"]
    action = rng.choice(actions + ["metadata"] * (8 if metadata and "config" in metadata else 1))
    if action in ("nan", "inf"):
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[rng.randrange(tensor.numel())] = float(action)
    elif action == "drop":
        del tensors[name]
    elif action == "rename":
        tensors[rng.choice(["", "x", "a\0b", name + "_", name.upper(), "." + name, "lm_head.weight"])] = tensors.pop(
            name
        )
    elif action == "add":
        tensors[rng.choice(["", "x", name + ".bias", "lora_A", "lm_head.weight"])] = torch.zeros(3)
    elif action == "transpose":
        tensors[name] = tensor.t().contiguous() if tensor.ndim == 2 else tensor[None]
    elif action == "flatten":
        tensors[name] = tensor.reshape(-1)
    elif action == "scalar":
        tensors[name] = torch.zeros(())
    elif action == "empty":
        tensors[name] = tensor[:0] if tensor.ndim else torch.zeros(0)
    elif action == "dtype":
        dtype = rng.choice([torch.int8, torch.int64, torch.bool, torch.float64, torch.float8_e4m3fn, torch.complex64])
        tensors[name] = tensor.to(dtype)
        action = f"dtype {dtype}"
    elif action == "twin":
        other = rng.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], tensor
        action = f"exchange with {other}"
    elif metadata and "config" in metadata and rng.random() < 0.7:  # JSON in a string
        config = json.loads(metadata["config"])
        action = f"config: {mutate_data(config, rng)}"
        metadata["config"] = json.dumps(config)
    else:
        key = rng.choice(sorted(metadata or {"config": ""}))
        text = rng.choice(["", "x", "null", "nan", "NaN", "1e999", "-1", "5", "{}", "[]", "[" * 100_000, '"x"', "true"])
        metadata, action = {**(metadata or {}), key: text}, f"metadata {key}={text:.20}"
    return safetensors.torch.save(tensors, metadata), f"{action} of {name[-60:]}"


def mutate_bytes(raw: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Flip, cut or insert bytes, mostly near the start, where headers are."""
    at = rng.randrange(min(len(raw), rng.choice([8, 200, 2000, len(raw)])))
    action = rng.choice(["flip", "flip", "cut", "insert", "empty", "nested", "noise"])
    if action == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :], f"flip a bit of byte {at}"
    if action == "cut":
        return raw[:at], f"cut at byte {at}"
    if action == "insert":
        return raw[:at] + rng.randbytes(rng.choice([1, 7, 100])) + raw[at:], f"insert at byte {at}"
    return {"empty": b"", "nested": b'{"x": ' + b"[" * 100_000, "noise": rng.randbytes(300)}[action], action


def replace_file(path: Path, rng: random.Random) -> str:
    """Replace `path` by something that is not a regular file."""
    action = rng.choice(["missing", "folder", "link loop", "pipe", "link to /dev/zero", "dangling link"])
    path.unlink()
    if action == "folder":
        path.mkdir()
    elif action == "pipe":
        os.mkfifo(path)
    elif action != "missing":
        target = {"link loop": path.name, "link to /dev/zero": "/dev/zero", "dangling link": "nowhere"}[action]
        path.symlink_to(target)
    return action


def mutate(path: Path, rng: random.Random) -> str:
    """Mutate a file. Returns what was done."""
    raw, chance = path.read_bytes(), rng.random()
    if chance < 0.08:
        return replace_file(path, rng)
    mutators = {".json": [mutate_json] * 5, ".safetensors": [mutate_tensors] * 4 + [mutate_header]}
    content, done = rng.choice([*mutators.get(path.suffix, []), mutate_bytes])(raw, rng)
    path.unlink()  # it may be mapped by a model
    path.write_bytes(content)
    return done


# ---- what is loaded


@pytest.fixture(scope="module")
def originals(tiny_model, tmp_path_factory) -> Path:
    """One folder for each value of KINDS, and an image outside them."""
    root = tmp_path_factory.mktemp("originals")
    shutil.copytree(tiny_model, root / "model")
    model = PaliGemmaForConditionalGeneration.from_pretrained(tiny_model, differential="split")

    shutil.copytree(tiny_model, root / "model5")
    settings = files.read_json(root / "model5/preprocessor_config.json")
    (root / "model5/preprocessor_config.json").unlink()
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255, "resample": 3}
    files.write_json(root / "model/preprocessor_config.json", settings)
    files.write_json(root / "model5/processor_config.json", {"image_processor": settings})

    shutil.copytree(tiny_model, root / "sharded")
    (root / "sharded" / SINGLE).unlink()
    standard = {hub_key(key): value for key, value in model.state_dict().items() if ".differential." not in key}
    save_weights(standard, root / "sharded", max_shard_size=40_000)
    assert (root / "sharded" / INDEX).is_file()

    save_differential(model, root / "run")
    model.name_or_path = str(root / "model")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, lora_alpha=4))
    lora.save_pretrained(str(root / "run/adapter"), save_embedding_layers=False)

    shutil.copytree(root / "run", root / "complete")
    files.write_manifest(root / "complete")

    noise = np.random.default_rng(0).integers(0, 255, (23, 37, 3), dtype=np.uint8)
    for folder in ("", "images"):
        (root / folder).mkdir(exist_ok=True)
        Image.fromarray(noise).save(root / folder / "a.png")
    return root


def answer(folder: Path, image: Path) -> None:
    """Load the model in `folder` and answer a prompt, as generate.py does."""
    model_class, processor_class = classes_of(folder)
    processor = processor_class.from_pretrained(folder)
    batch = processor([files.open_image(image)], ["caption en"])
    model = model_class.from_pretrained(folder)
    ids = model.generate(**batch, max_new_tokens=2)
    processor.decode(ids[0])


def load(kind: str, folder: Path, originals: Path) -> None:
    if kind == "manifest":
        files.verify_manifest(folder)
    elif kind == "image":
        image = files.open_image(folder / "a.png")
        classes_of(originals / "model")[1].from_pretrained(originals / "model").pixels(image)
    else:
        answer(folder, originals / "a.png")


def outcome(kind: str, folder: Path, originals: Path) -> tuple[str, str]:
    """("loads" | "one line" | "fault", details) of loading a mutated folder."""
    try:
        with time_limit(LIMIT), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            load(kind, folder, originals)
    except UserError as error:
        line = str(error)
        if "\n" in line or not line.strip():
            return "fault", f"not one line: {line!r}"
        return ("one line", line) if str(folder) in line else ("fault", f"names no file: {line[:200]}")
    except Hang:
        return "fault", f"more than {LIMIT} s"
    except BaseException as error:  # noqa: BLE001, also exceptions of Rust, which are no Exception
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        place = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        return "fault", f"{type(error).__name__} in {place}: {re.sub(chr(10), ' ', str(error))[:200]}"
    return "loads", ""


def fuzz(kind: str, count: int, originals: Path, work: Path) -> tuple[Counter, list[str]]:
    """Outcomes of `count` mutations, and a line for each that is a fault."""
    assert threading.current_thread() is threading.main_thread()  # the alarm needs it
    source, file = KINDS[kind]
    outcomes, faults = Counter(), []
    for number in range(count):
        rng = random.Random(f"{kind} {number}")
        folder = work / f"{kind}-{number}"
        shutil.copytree(originals / source, folder)
        done = mutate(folder / file, rng)
        start = time.monotonic()
        result, details = outcome(kind, folder, originals)
        if result == "loads" and kind in FINITE and done.split()[0] in ("nan", "inf"):
            result, details = "fault", "loads and answers"
        outcomes[result] += 1
        if result == "fault":
            faults.append(f"{kind} {number}, {done} ({time.monotonic() - start:.1f} s): {details}")
        shutil.rmtree(folder)
    return outcomes, faults


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_loads(originals, kind):
    assert outcome(kind, originals / KINDS[kind][0], originals) == ("loads", "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_file_loads_or_ends_in_one_line(originals, tmp_path, kind):
    outcomes, faults = fuzz(kind, FAST, originals, tmp_path)
    assert not faults, "\n".join(faults)
    assert outcomes["one line"] > 0, outcomes  # the mutations reach the checks


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_files_load_or_end_in_one_line(originals, tmp_path, kind):
    outcomes, faults = fuzz(kind, SLOW, originals, tmp_path)
    print(kind, dict(outcomes))
    assert not faults, "\n".join(faults)
