"""Weights on disk: safetensors in every layout that exists, from the hub or a folder; saving; run folders; adapters.

Tensors, keys and files only: no model class is known here. Nothing that could run code is ever loaded. The layouts:

    L1 hub, saves up to transformers 4.57: language_model.model.*   vision_tower.vision_model.*         lm_head under
    L3 saves of transformers 5:            language_model.model.*   vision_tower.*                      language_model.
    L2 raw state_dict of 4.52 to 4.57:     model.language_model.*   model.vision_tower.vision_model.*   lm_head
    in memory, here and transformers 5:    model.language_model.*   model.vision_tower.*                lm_head
"""

import os
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import safe_open

from errors import UserError
from files import atomic_folder, check_regular, read_json, reading, write_json, writing

ROOT = Path(__file__).resolve().parent
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFERENTIAL = "differential.safetensors"  # beside adapter/, or beside a whole model's weights
PIECE = 8 << 20  # bytes converted at a time: bounds what a change of dtype needs beyond its result

KEYS_TO_MEMORY = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.language_model.",
    r"^(model\.)?vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^(model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
}
_TO_HUB = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.language_model\.": "language_model.model.",
    r"^model\.vision_tower\.": "vision_tower.vision_model.",
    r"^model\.multi_modal_projector\.": "multi_modal_projector.",
}
_HINTS = (  # (which keys, what one of them contains, what that means)
    ("unexpected", "pre_feedforward", "this is a Gemma 2 (PaliGemma 2) checkpoint but config.json says gemma"),
    ("missing", "pre_feedforward", "this is a Gemma 1 (PaliGemma 1) checkpoint but config.json says gemma2"),
    (
        "unexpected",
        ".differential.",
        "these hold differential attention too: save_pretrained keeps its differential configuration and values apart",
    ),
    ("unexpected", ".lora_", "these hold an adapter: merge it, or give the run folder"),
    ("", "", "these weights do not belong to config.json"),
)


# ---- names


def _rename(key: str, rules: dict) -> str:
    rule = next((pattern for pattern in rules if re.match(pattern, key)), None)
    return re.sub(rule, rules[rule], key) if rule else key


def rename_key(key: str) -> str:
    """A weight's name in any layout -> its name in memory. Idempotent; unknown names pass."""
    return _rename(key, KEYS_TO_MEMORY)


def hub_key(key: str) -> str:
    """A weight's name in any layout -> its name on the hub (the first layout), which every transformers reads."""
    return _rename(rename_key(key), _TO_HUB)


# ---- files


# ---- where a model is


def is_hub_id(text: str) -> bool:
    """`org/name` or `org/name@revision`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", text) is not None


def hub_revision(path_or_hub_id: str) -> str | None:
    """The commit of a hub id, fetched if need be; None for a folder."""
    folder = locate(path_or_hub_id)
    return folder.name if folder.parent.name == "snapshots" and not Path(path_or_hub_id).is_dir() else None


def locate(path_or_hub_id, revision=None) -> Path:
    """A model's folder: a local one as it is, a hub id (`org/name`, `org/name@revision`) fetched into the hub's cache,
    or taken from it.

    Fetches json, safetensors and tokenizer files alone. Raises UserError: no such folder or model, login, network.
    """
    name, folder = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    with reading(name):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"{name}: a file; give the folder that holds it")
    if not is_hub_id(name):
        raise UserError(f"{name}: no such folder, and not a hub id (org/name): check the path")
    name, _, at = name.partition("@")
    revision = at or revision
    from huggingface_hub import errors as faults  # brings an http client: only when something is fetched

    patterns = ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, faults.HTTPError) as error:
        raise UserError(
            f"{name}: no such folder, and from the hub: {_hub_fault(error, faults, name, revision)}"
        ) from error


def _hub_fault(error, faults, name, revision) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    unknown = isinstance(error, faults.RepositoryNotFoundError)  # a 401 as well, when not logged in
    if isinstance(error, faults.GatedRepoError) or (status in (401, 403) and not unknown):
        return f"access refused: accept the licence at https://huggingface.co/{name} and run `hf auth login`"
    if unknown:
        return "no such model: check the name (if it is private, run `hf auth login`)"
    if isinstance(error, faults.RevisionNotFoundError):
        return f"no revision {revision!r}: check it"
    if isinstance(error, faults.LocalEntryNotFoundError):
        return "not reachable and not in the cache: connect (HF_HUB_OFFLINE unset), or give a local folder"
    return f"not fetched ({type(error).__name__}: {' '.join(str(error).split())[:200]}): try again"


def resolve_run(path_or_hub_id) -> tuple[str, Path | None]:
    """What `--model` takes -> (base model's folder or hub id, adapter folder or None).

    A run folder stands for its `final/`; `final/`, `best/` and `checkpoints/step-*` (each holds `adapter/`), and an
    adapter folder itself, are taken too. Anything else is a plain model. Raises UserError for an unfinished run.
    """
    folder = Path(path_or_hub_id).expanduser()
    if not folder.exists() and (ROOT / folder).is_dir():
        folder = path_or_hub_id = ROOT / folder  # assets/paligemma-nano, asked for from another directory
    with reading(folder):
        for adapter in (folder, folder / "adapter", folder / "final" / "adapter"):
            if (adapter / ADAPTER_CONFIG).is_file():
                return _base_model(adapter.absolute()), adapter
        is_run = any((folder / name).exists() for name in ("run.json", "final", "adapter"))
        if not is_run or (folder / "config.json").is_file():
            return str(path_or_hub_id), None
        newest = max(folder.glob("checkpoints/step-*"), default="none yet")
    mend = f"run the same command again to continue it, or give one of its checkpoints/ (newest: {newest})"
    raise UserError(f"{folder}: an unfinished run, without final/adapter/{ADAPTER_CONFIG}: {mend}")


def _base_model(adapter: Path) -> str:
    """The base that run.json beside the adapter, or up to two levels above, names; else the adapter's configuration."""
    run = next((parent / "run.json" for parent in adapter.parents[:3] if (parent / "run.json").is_file()), None)
    source, key = (run, "base_model") if run else (adapter / ADAPTER_CONFIG, "base_model_name_or_path")
    told = read_json(source)
    base, revision = told.get(key), told.get("base_revision")
    if not isinstance(base, str) or not base:
        raise UserError(f"{source}: {key!r} names no base model: add its hub id or folder there")
    for candidate in (Path(base), ROOT / base):
        if candidate.is_dir():
            return str(candidate)
    if not is_hub_id(base):
        raise UserError(f"{source}: {key!r} names the folder {base}, not found: restore it or correct the entry")
    return f"{base}@{revision}" if revision and "@" not in base else base


# ---- reading weights


class _Entry(NamedTuple):
    file: Path
    key: str  # as the file has it
    shape: tuple


@contextmanager
def open_safetensors(file: Path):
    with reading(file):
        check_regular(file)
        with open(file, "rb") as probe:  # also tells a missing permission apart, which safetensors does not
            if probe.read(30).startswith(b"version https://git-lfs"):
                raise UserError(f"{file}: a git-lfs pointer instead of the weights: run `git lfs pull`")
        with safe_open(file, framework="pt") as handle:
            yield handle


def _weight_files(folder: Path) -> dict[Path, list]:
    """The folder's weight files, each with the keys that the index promises in it (none promised: all it has)."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: []}
    if not index.is_file():
        for pickle in folder.glob("pytorch_model*.bin"):
            raise UserError(f"{pickle}: convert it to safetensors; files that could run code are never loaded")
        raise UserError(f"{folder}: no weights here (neither {SINGLE} nor {INDEX}): check the path")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: no valid 'weight_map': download it again")
    files = {}
    for key, name in weight_map.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{index}: puts {key} in {name}, outside the folder: refused, download the model again")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: not there, though {INDEX} puts {key} in it: download it again")
        files.setdefault(folder / name, []).append(key)
    return files


def _headers(folder: Path) -> dict[str, _Entry]:
    """Name in memory -> where and what, from the files' headers alone."""
    with reading(folder):
        files = _weight_files(folder)
    entries = {}
    for file, promised in files.items():
        with open_safetensors(file) as handle:
            held = list(handle.keys())
            lost = sorted(set(promised) - set(held))
            if lost:
                raise UserError(f"{file}: lacks {lost[0]} ({len(lost)} keys) that {INDEX} promises: download it again")
            for key in promised or held:
                entry = _Entry(file, key, tuple(handle.get_slice(key).get_shape()))
                twin = entries.setdefault(rename_key(key), entry)
                if twin is not entry:
                    raise UserError(f"{file}: {key} and {twin.key} are two names of one weight: delete one")
    return entries


def _check(entries: dict, wanted: dict, optional, folder: Path):
    """UserError unless files and model hold the same names, but for `optional` ones, in the same shapes."""
    unexpected = [name for name in entries if name not in wanted]
    missing = [name for name in wanted if name not in entries and not any(part in name for part in optional)]
    for kind, names in (("unexpected", unexpected), ("missing", missing)):
        if names:
            file = folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)
            file, key, _ = entries.get(names[0], (file, names[0], None))
            hint = next(text for when, part, text in _HINTS if when in ("", kind) and any(part in n for n in names))
            raise UserError(f"{file}: {len(names)} {kind} keys (first {key}): {hint}")
    wrong = [name for name, entry in entries.items() if entry.shape != wanted[name].shape]
    if wrong:
        file, key, shape = entries[wrong[0]]
        fault = f"{key} has shape {shape} where config.json asks for {tuple(wanted[wrong[0]].shape)}"
        raise UserError(f"{file}: {fault} ({len(wrong)} such keys): {_HINTS[-1][-1]}")


def _tensors(file: Path, keys: list, dtype):
    """Yields the tensors of `keys`: views of the mapped file, or converted copies where a floating dtype differs."""
    with open_safetensors(file) as views, ExitStack() as mapped:
        unread = 0  # bytes to go until the file is mapped anew: the pages read never add up with the copies
        for key in keys:
            view = views.get_tensor(key)
            if view.dtype == dtype or not view.is_floating_point() or view.dim() == 0:
                yield view.to(dtype) if view.is_floating_point() else view
                continue
            copy = torch.empty(view.shape, dtype=dtype)
            rows = max(1, PIECE * len(view) // max(1, view.nbytes))
            for start in range(0, len(view), rows):
                if unread <= 0:
                    mapped.close()
                    handle, unread = mapped.enter_context(open_safetensors(file)), PIECE
                piece = handle.get_slice(key)[start : start + rows]
                copy[start : start + rows] = piece
                unread -= piece.nbytes
            yield copy


def load_weights(model, folder, dtype, device="cpu", may_be_missing=(), tied=True) -> dict:
    """Fill `model`, built on the meta device, from the safetensors of `folder`, without holding weights twice.

    Floating tensors get `dtype`; where the file has it already, parameters are views of the mapped file (copied on
    write). Everything is checked from the headers before anything is loaded. `may_be_missing`: parts of names that the
    file may lack. `tied`: the caller ties `lm_head.weight` to the embedding afterwards; the file's own is dropped, or
    serves as the embedding where that lacks. Returns {"loaded": count, "missing": [names still on the meta device]}.
    Raises UserError, one line with file and key: no, corrupt or incomplete files, wrong keys, wrong shapes.
    """
    folder, entries, wanted = Path(folder), _headers(Path(folder)), model.state_dict()
    if tied:
        wanted.pop(HEAD, None)
        head = entries.pop(HEAD, None)
        if head and EMBEDDING not in entries:
            entries[EMBEDDING] = head
    _check(entries, wanted, may_be_missing, folder)
    state = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        names = {name: entry.key for name, entry in entries.items() if entry.file == file}
        for name, tensor in zip(names, _tensors(file, list(names.values()), dtype), strict=True):
            state[name] = tensor.to(device)
    model.load_state_dict(state, strict=False, assign=True)  # strict by the check above
    return {"loaded": len(state), "missing": [name for name in wanted if name not in state]}


def save_weights(state_dict: dict, folder, max_shard_size="5GB"):
    """Write tensors into `folder` as safetensors under the hub's names, in shards; a tied head is written once.

    Raises UserError when the disk is full or a permission lacks. For all or nothing, write into `atomic_folder`.
    """
    tensors = {hub_key(key): tensor for key, tensor in state_dict.items()}
    head, embedding = tensors.get(hub_key(HEAD)), tensors.get(hub_key(EMBEDDING))
    if head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr():
        del tensors[hub_key(HEAD)]
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)


def save_model_folder(state_dict: dict, config: dict, folder, write_more=None):
    """Write weights and config.json into `folder`, made if absent; its other files stay.

    `write_more(folder)` adds further files to it, such as those of differential attention.

    The new files are staged inside it and moved in at the end, so a failure leaves an older model as it was, and a
    model that is memory-mapped from this very folder keeps its pages.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / ".saving") as staged:
        save_weights({key: value for key, value in state_dict.items() if ".differential." not in key}, staged)
        if write_more is not None:
            write_more(staged)
        write_json(staged / "config.json", config)
    new = list((folder / ".saving").iterdir())
    with writing(folder):
        for pattern in ("model*.safetensors", "model*.safetensors.index.json", DIFFERENTIAL):
            for old in folder.glob(pattern):
                if old.name not in {file.name for file in new}:
                    old.unlink()  # left by an older save
        for file in new:
            os.replace(file, folder / file.name)
        (folder / ".saving").rmdir()


# ---- adapters


# ---- differential attention
