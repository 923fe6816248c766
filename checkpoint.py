"""Weights on disk: safetensors in every layout that exists, from the hub or a folder; saving; run folders; adapters.

Tensors, keys and files only: no model class is known here. Nothing that could run code is ever loaded. The layouts:

    L1 hub, saves up to transformers 4.57: language_model.model.*   vision_tower.vision_model.*         lm_head under
    L3 saves of transformers 5:            language_model.model.*   vision_tower.*                      language_model.
    L2 raw state_dict of 4.52 to 4.57:     model.language_model.*   model.vision_tower.vision_model.*   lm_head
    in memory, here and transformers 5:    model.language_model.*   model.vision_tower.*                lm_head
"""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from differential_attention import DifferentialConfig, differential_config, differential_modules, set_progress
from errors import UserError

ROOT = Path(__file__).resolve().parent
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFERENTIAL = "differential.safetensors"  # beside adapter/, or beside a whole model's weights
SEAL = "files.json"  # in a checkpoint: what its files hashed to when they were written
PIECE = 8 << 20  # bytes converted at a time: bounds what a change of dtype needs beyond its result

_TO_MEMORY = {
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
_MENDS = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space or raise the limit")
_MENDS |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check the permissions")


# ---- names


def _rename(key: str, rules: dict) -> str:
    rule = next((pattern for pattern in rules if re.match(pattern, key)), None)
    return re.sub(rule, rules[rule], key) if rule else key


def rename_key(key: str) -> str:
    """A weight's name in any layout -> its name in memory. Idempotent; unknown names pass."""
    return _rename(key, _TO_MEMORY)


def hub_key(key: str) -> str:
    """A weight's name in any layout -> its name on the hub (the first layout), which every transformers reads."""
    return _rename(rename_key(key), _TO_HUB)


# ---- files


@contextmanager
def _reading(file):
    """Whatever disk or safetensors hold against `file` becomes one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{file}: cannot be read ({reason}): check the path and its permissions") from error
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or corrupt safetensors ({error}): download or copy it again") from error


@contextmanager
def writing(path):
    """A full disk or a missing permission becomes one line that names `path`; other faults pass."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors gives the system's number in its text only
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in _MENDS:
            raise
        raise UserError(f"{path}: cannot be written ({os.strerror(number)}): {_MENDS[number]}") from error


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path) -> dict:
    """The object in a json file. Raises UserError naming the file: missing, unreadable, not json, not an object."""
    with _reading(path):
        raw = Path(path).read_bytes()
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path}: not valid json ({error}): restore or delete it") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a json {type(data).__name__} where an object {{...}} is needed")
    return data


def write_json(path, data):
    """Write `data` whole or not at all: beside, fsynced, renamed. Raises UserError when the disk refuses."""
    path, text = Path(path), json.dumps(data, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def whole_or_nothing(folder):
    """Yields an empty folder beside `folder` that takes its place when the block ends well, and vanishes when not.

    An older `folder` stays untouched until then. Raises UserError when the disk is full or a permission lacks.
    """
    folder = Path(folder).resolve()  # a link keeps pointing at the same place
    temporary, aside = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists() and not folder.exists():
            aside.rename(folder)  # an earlier process was killed between the two renames below
        for leftover in (temporary, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _settle(temporary)
            if folder.exists():
                folder.rename(aside)
            temporary.rename(folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if aside.exists() and not folder.exists():
                aside.rename(folder)
            if isinstance(error, UserError):  # nobody asked for the temporary name
                raise UserError(str(error).replace(str(temporary), str(folder))) from error
            raise
        _sync(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)


def seal(folder: Path):
    """Note the SHA-256 of every file under `folder` in its files.json: neither safetensors nor torch would see a
    flipped bit among weights. The last thing to be written into it."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file() and file.name != SEAL)
    write_json(Path(folder, SEAL), {str(file.relative_to(folder)): _sha256(file) for file in files})


def check_seal(folder: Path):
    """Raise UserError naming the first file under a sealed `folder` that is gone or is not as it was written."""
    for name, digest in read_json(Path(folder, SEAL)).items():
        file = Path(folder, name)
        with _reading(file):
            if _sha256(file) != digest:
                raise UserError(f"{file}: damaged, not the bytes that were written: delete {folder}")


def _sha256(file: Path) -> str:
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _settle(folder: Path):
    """Everything under `folder` reaches the disk and is as readable as the folder (safetensors writes mode 0600)."""
    for parent, _, names in os.walk(folder):
        for file in (Path(parent, name) for name in names):
            file.chmod(folder.stat().st_mode & 0o666)
            _sync(file)
        _sync(parent)


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
    with _reading(name):
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
    with _reading(folder):
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
def _open(file: Path):
    with _reading(file):
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
    with _reading(folder):
        files = _weight_files(folder)
    entries = {}
    for file, promised in files.items():
        with _open(file) as handle:
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
    with _open(file) as views, ExitStack() as mapped:
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
                    handle, unread = mapped.enter_context(_open(file)), PIECE
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

    Raises UserError when the disk is full or a permission lacks. For all or nothing, write into `whole_or_nothing`.
    """
    tensors = {hub_key(key): tensor for key, tensor in state_dict.items()}
    head, embedding = tensors.get(hub_key(HEAD)), tensors.get(hub_key(EMBEDDING))
    if head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr():
        del tensors[hub_key(HEAD)]
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)


def save_model_folder(state_dict: dict, config: dict, folder, model=None):
    """Write weights and config.json into `folder`, made if absent; its other files stay.

    What differential attention added to `model` goes into a file of its own: the rest is a standard model's.

    The new files are staged inside it and moved in at the end, so a failure leaves an older model as it was, and a
    model that is memory-mapped from this very folder keeps its pages.
    """
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(folder / ".saving") as staged:
        save_weights({key: value for key, value in state_dict.items() if ".differential." not in key}, staged)
        if model is not None:
            save_differential(model, staged)
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


def attach_adapter(model, adapter_folder, trainable=False):
    """Put a peft adapter into `model` in place; returns peft's model around it, the base frozen, in eval mode unless
    `trainable`. Adapters trained under older namings fit too (peft #2574).

    Raises UserError: files missing or corrupt, an adapter for another model, weights unused or left at random.
    """
    folder = Path(adapter_folder)
    read_json(folder / ADAPTER_CONFIG)
    with _reading(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
            raise UserError(f"{folder / 'adapter_model.bin'}: convert it to safetensors; pickles are never loaded")
    with _open(folder / ADAPTER_WEIGHTS) as handle:  # without it peft would look for a pickle, then ask the hub
        prefix = "base_model.model."
        stored = {prefix + rename_key(key.removeprefix(prefix)) for key in handle.keys()}  # noqa: SIM118

    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing keys; they are refused below
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, torch_device="cpu", key_mapping=_TO_MEMORY
            )
            used = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: this adapter does not fit the model ({reason}): give its own base model") from error
    for keys, fault in ((stored - used, "has no place in"), (used - stored, "is missing for")):
        if keys:
            fault = f"{min(keys)} {fault} this model ({len(keys)} keys)"
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: {fault}: give the adapter's own base model")
    return adapted


# ---- differential attention


def _differential_state(model) -> dict:
    """Name -> parameter or buffer of everything that differential attention added to `model`."""
    modules = differential_modules(model).items()
    return {f"{name}.{key}": tensor for name, module in modules for key, tensor in module.state_dict().items()}


def save_differential(model, folder):
    """Write what differential attention added to `model` (also inside peft's wrapper), and its configuration, into
    `folder`/differential.safetensors; a standard model writes nothing. Raises UserError when the disk refuses."""
    config = differential_config(model)
    if config is None:
        return
    progress = next(iter(differential_modules(model).values())).progress.item()
    told = {"config": json.dumps(config.to_dict()), "progress": json.dumps(progress)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _differential_state(model).items()}
    file, temporary = Path(folder, DIFFERENTIAL), Path(folder, f".{DIFFERENTIAL}.tmp")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata=told)
            _sync(temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def stored_differential(folder) -> DifferentialConfig | None:
    """The configuration in `folder`/differential.safetensors; None without such a file. Raises UserError."""
    with _reading(folder):
        if not Path(folder, DIFFERENTIAL).is_file():
            return None
    return _told(Path(folder, DIFFERENTIAL))[0]


def _told(file: Path) -> tuple[DifferentialConfig, float]:
    with _open(file) as handle:
        told = handle.metadata() or {}
    try:
        return DifferentialConfig.from_dict(json.loads(told["config"])).resolve(), float(json.loads(told["progress"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its header holds no differential configuration: save it again") from error
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def load_differential(model, folder):
    """Fill what differential attention added to `model` from `folder`/differential.safetensors.

    Raises UserError: file missing or corrupt, another configuration, keys too many or too few, wrong shapes.
    """
    file = Path(folder, DIFFERENTIAL)
    (stored, progress), built = _told(file), differential_config(model)
    if built is None or not stored.same_method(built):
        raise UserError(
            f"{file}: holds differential attention of preset {stored.preset} and the model was built with "
            f"{built.preset if built else 'none'} or other choices: ask for the stored configuration, or leave it out"
        )
    state = _differential_state(model)
    with _open(file) as handle:
        held = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        for names, fault in ((set(held) - set(state), "has no place in"), (set(state) - set(held), "is missing for")):
            if names:
                raise UserError(f"{file}: {min(names)} {fault} this model ({len(names)} keys): give its own base model")
        for name, shape in held.items():
            if shape != tuple(state[name].shape):
                raise UserError(f"{file}: {name} has shape {shape} where this model has {tuple(state[name].shape)}")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(handle.get_tensor(name))
    set_progress(model, progress)
