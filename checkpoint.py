"""Weights on disk: safetensors in every known layout, from the hub or a folder; saving; run folders.

This module handles tensors, keys and files and knows no model class. It never loads anything that could run code. The
layouts:

    L1 hub, saves up to transformers 4.57: language_model.model.*   vision_tower.vision_model.*         lm_head under
    L3 saves of transformers 5:            language_model.model.*   vision_tower.*                      language_model.
    L2 raw state_dict of 4.52 to 4.57:     model.language_model.*   model.vision_tower.vision_model.*   lm_head
    in memory, here and transformers 5:    model.language_model.*   model.vision_tower.*                lm_head
    Phi-3 (phi3, phi3_v) on the hub:       model.*                  model.vision_embed_tokens.*         lm_head
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import huggingface_hub
import msgspec
import torch
from safetensors import safe_open
from torch import Tensor, nn

from config_fields import PHI_TYPES
from errors import UserError
from files import PathLike, atomic_folder, check_regular, one_line, read_json, read_typed, reading, write_json, writing

ROOT = Path(__file__).resolve().parent
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FINGERPRINT_BYTES = 1 << 20  # hashed at each end of a file
FINGERPRINT_DIGITS = 16
LFS_POINTER = b"version https://git-lfs"  # start of a file that git-lfs has not fetched
DIFFERENTIAL = "differential.safetensors"  # beside adapter/, or beside the weights of a whole model
# Prefixes of the model_type and weight file names, and of the class name, of a whole model with differential attention,
# so that transformers does not load it as a standard model.
DIFFERENTIAL_PREFIX, DIFFERENTIAL_CLASS = "differential_", "Differential"
MODEL_FILE = re.compile(r"(differential_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|differential\.safetensors")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model"]  # all that is fetched from the hub
PIECE = 8 << 20  # bytes converted at a time: bounds the extra memory of a dtype conversion

PROJECTOR = "model.multi_modal_projector."
KEYS_TO_MEMORY = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.(model\.)?": "model.language_model.",
    r"^(model\.)?vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^(model\.)?multi_modal_projector\.": "model.multi_modal_projector.",
    # Phi-3 on the hub, in memory in its own code (without a second vision_model), and in future transformers
    r"^model\.(?=(layers|embed_tokens|norm)\.)": "model.language_model.",
    r"^model\.vision_embed_tokens\.wte\.": "model.language_model.embed_tokens.",
    r"^model\.(vision_embed_tokens\.img_processor|vision_model)\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.(vision_embed_tokens\.img_projection\.0|image_projection\.fc1)\.": f"{PROJECTOR}linear_1.",
    r"^model\.(vision_embed_tokens\.img_projection\.2|image_projection\.fc2)\.": f"{PROJECTOR}linear_2.",
    r"^model\.(vision_embed_tokens\.glb_GN|glb_newline)$": f"{PROJECTOR}glb_GN",
    r"^model\.(vision_embed_tokens\.sub_GN|sub_newline)$": f"{PROJECTOR}sub_GN",
}
# a constant in older files; SigLIP's pooling head, which PaliGemma never uses
IGNORED_KEY = re.compile(r".*\.position_ids$|(model\.)?vision_tower\.(vision_model\.)?head\.")
KEYS_TO_HUB = {
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.language_model\.": "language_model.model.",
    r"^model\.vision_tower\.": "vision_tower.vision_model.",
    r"^model\.multi_modal_projector\.": "multi_modal_projector.",
}
PHI_KEYS_TO_HUB = {
    r"^model\.language_model\.": "model.",
    r"^model\.vision_tower\.": "model.vision_embed_tokens.img_processor.vision_model.",
    r"^model\.multi_modal_projector\.linear_1\.": "model.vision_embed_tokens.img_projection.0.",
    r"^model\.multi_modal_projector\.linear_2\.": "model.vision_embed_tokens.img_projection.2.",
    r"^model\.multi_modal_projector\.": "model.vision_embed_tokens.",
}
KEY_HINTS = (  # (kind of keys, part of one of them, what it means)
    ("unexpected", "pre_feedforward", "this is a Gemma 2 (PaliGemma 2) checkpoint but config.json says gemma"),
    ("missing", "pre_feedforward", "this is a Gemma 1 (PaliGemma 1) checkpoint but config.json says gemma2"),
    (
        "unexpected",
        ".differential.",
        "these include differential attention, whose differential configuration belongs in a file of its own: "
        "save the model with save_pretrained",
    ),
    ("unexpected", ".lora_", "these include an adapter: merge it, or give the run folder"),
    ("", "", "these weights do not belong to config.json"),
)


# ---- names of weights
def rename_key(key: str) -> str:
    """A weight's name in any layout -> its name in memory. Idempotent; unknown names are returned unchanged."""
    return apply_rule(key, KEYS_TO_MEMORY)


def hub_key(key: str, model_type: str = "paligemma") -> str:
    """A weight's name in any layout -> its name on the hub: in layout L1, which every version of transformers reads, or
    in the layout of Phi-3."""
    is_phi = model_type.removeprefix(DIFFERENTIAL_PREFIX) in PHI_TYPES
    return apply_rule(rename_key(key), PHI_KEYS_TO_HUB if is_phi else KEYS_TO_HUB)


def apply_rule(key: str, rules: dict[str, str]) -> str:
    rule = next((pattern for pattern in rules if re.match(pattern, key)), None)
    return re.sub(rule, rules[rule], key) if rule else key


# ---- finding a model
def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `org/name` or `org/name@revision`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", text) is not None


def hub_revision(path_or_hub_id: str) -> str | None:
    """The commit of a hub id, fetched if necessary; None for a folder."""
    folder = locate(path_or_hub_id)
    return folder.name if folder.parent.name == "snapshots" and not Path(path_or_hub_id).is_dir() else None


def locate(path_or_hub_id: PathLike) -> Path:
    """The folder of a model: a local folder unchanged, or that of a hub id (`org/name`, `org/name@revision`), from
    the hub or its cache.

    Fetches JSON, safetensors and tokenizer files only. Raises UserError for a missing folder or model and for login or
    network failures.
    """
    name, folder = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    with reading(name):
        if folder.is_dir():
            return folder
        if folder.exists():
            raise UserError(f"{name}: is a file: give the folder that contains it")
    if not is_hub_id(name):
        raise UserError(f"{name}: no such folder, and not a hub id (org/name): check the path")
    name, _, revision = name.partition("@")
    from huggingface_hub import errors as hub_errors  # imports an HTTP client: only when something is fetched

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except (OSError, ValueError, hub_errors.HTTPError) as error:
        fault = describe_hub_fault(error, hub_errors, name, revision)
        raise UserError(f"{name}: no such folder, and from the hub: {fault}") from error


def describe_hub_fault(error: Exception, hub_errors: ModuleType, name: str, revision: str) -> str:
    """What went wrong in a download and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_unknown = isinstance(error, hub_errors.RepositoryNotFoundError)  # also a 401 without login
    if isinstance(error, hub_errors.GatedRepoError) or (status in (401, 403) and not is_unknown):
        return f"access refused: accept the license at https://huggingface.co/{name} and run `hf auth login`"
    if is_unknown:
        return "no such model: check the name (if it is private, run `hf auth login`)"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"no revision {revision!r}: check it"
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        return "not reachable and not in the cache: connect (HF_HUB_OFFLINE unset), or give a local folder"
    return f"not fetched ({type(error).__name__}: {one_line(error)[:200]}): try again"


def resolve_run(path_or_hub_id: PathLike) -> tuple[str, Path | None]:
    """What `--model` accepts -> (folder or hub id of the base model, adapter folder or None).

    A run folder means its `final/`. Its `final/`, `best/` and `checkpoints/step-*` (each contains `adapter/`) and an
    adapter folder itself are accepted too. Everything else is a plain model. Raises UserError for an unfinished run.
    """
    folder = Path(path_or_hub_id).expanduser()
    with reading(path_or_hub_id):
        if not folder.exists() and (ROOT / folder).is_dir():
            folder = path_or_hub_id = ROOT / folder  # assets/paligemma-nano, from another working directory
        for adapter in (folder, folder / "adapter", folder / "final" / "adapter"):
            if (adapter / ADAPTER_CONFIG).is_file():
                return base_of_adapter(adapter.absolute()), adapter
        is_run = any((folder / name).exists() for name in ("run.json", "final", "adapter"))
        if not is_run or (folder / "config.json").is_file():
            return str(folder if folder.exists() else path_or_hub_id), None
        checkpoints = sorted(folder.glob("checkpoints/step-*"), key=lambda path: (len(path.name), path.name))
        newest = checkpoints[-1] if checkpoints else "none yet"
    fix = f"run the same command again to continue it, or give one of its checkpoints/ (newest: {newest})"
    raise UserError(f"{folder}: an unfinished run, without final/adapter/{ADAPTER_CONFIG}: {fix}")


def base_folder(path_or_hub_id: PathLike) -> Path:
    """The folder of the base model of what `--model` accepts; see `resolve_run` and `locate`."""
    return locate(resolve_run(path_or_hub_id)[0])


class RunBase(msgspec.Struct):
    """The fields of run.json that name the base model."""

    base_model: str | None = None
    base_revision: str | None = None
    base_weights: str | None = None  # `weights_fingerprint` of a local folder; older runs have none


class AdapterBase(msgspec.Struct):
    """The fields of adapter_config.json that name the base model."""

    base_model_name_or_path: str | None = None
    revision: str | None = None


def base_of_adapter(adapter: Path) -> str:
    """The base model named by run.json beside the adapter or up to two levels above, else by the adapter's config."""
    run = find_run_record(adapter)
    if run:
        source, key = run, "base_model"
        record = read_typed(run, RunBase)
        base, revision, weights = record.base_model, record.base_revision, record.base_weights
    else:
        source, key = adapter / ADAPTER_CONFIG, "base_model_name_or_path"
        config = read_typed(source, AdapterBase)
        base, revision, weights = config.base_model_name_or_path, config.revision, None
    if not base:
        raise UserError(f"{source}: {key!r} names no base model: add its hub id or folder there")
    for candidate in (Path(base), ROOT / base):
        if candidate.is_dir():
            if weights not in (None, weights_fingerprint(candidate)):
                raise UserError(
                    f"{source}: the adapter was trained on other weights than {candidate} has now: restore them, or "
                    "train again"
                )
            return str(candidate)
    if not is_hub_id(base):
        raise UserError(f"{source}: {key!r} names the folder {base}, which does not exist: restore it or correct it")
    return f"{base}@{revision}" if revision and "@" not in base else base


def weights_fingerprint(folder: PathLike) -> str:
    """A hash that changes with the weights of a model folder: of the size and both ends of every safetensors file, so
    that it takes milliseconds for files of any size."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        size = path.stat().st_size
        with reading(path), open(path, "rb") as file:
            digest.update(f"{path.name} {size} ".encode() + file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def find_run_record(adapter: Path) -> Path | None:
    """The run.json beside an adapter folder or up to two levels above; None for an adapter that is not in a run."""
    files = (parent / "run.json" for parent in adapter.absolute().parents[:3])
    return next((file for file in files if file.is_file()), None)


# ---- reading weights
class WeightIndex(msgspec.Struct):
    """The fields of an index of shards."""

    weight_map: dict[str, str]  # key -> name of its file


class Entry(NamedTuple):
    """Where a weight is stored."""

    file: Path
    key: str  # its name in the file
    shape: tuple[int, ...]


@contextmanager
def open_safetensors(file: Path) -> Iterator[safe_open]:
    """Yields the handle of a safetensors file. Raises UserError if it is missing, unreadable, corrupt or a
    git-lfs pointer."""
    with reading(file):
        check_regular(file)
        with open(file, "rb") as start:  # safetensors does not report a missing permission as such
            if start.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{file}: a git-lfs pointer instead of the weights: run `git lfs pull`")
        with safe_open(file, framework="pt") as handle:
            yield handle


def differential_weights(folder: Path) -> Path | None:
    """The weights, or the index of their shards, of a whole model with differential attention; None for others."""
    files = (folder / (DIFFERENTIAL_PREFIX + name) for name in (SINGLE, INDEX))
    return next((file for file in files if file.is_file()), None)


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """The weight files of a folder, each with its keys in the index; an empty list means all keys of the file."""
    names = [prefix + name for prefix in ("", DIFFERENTIAL_PREFIX) for name in (SINGLE, INDEX)]
    found = [folder / name for name in names if (folder / name).is_file()]
    models = {path.name.startswith(DIFFERENTIAL_PREFIX) for path in found}
    if len(models) > 1:
        raise UserError(f"{folder}: {found[0].name} and {found[-1].name} are two models: delete one")
    if found and found[0].name.endswith(SINGLE):
        return {found[0]: []}
    index = found[0] if found else None
    if index is None:
        for pickle in folder.glob("pytorch_model*.bin"):
            raise UserError(f"{pickle}: convert it to safetensors; files that could run code are never loaded")
        raise UserError(f"{folder}: no weights here (neither {SINGLE} nor {INDEX}): check the path")
    files: dict[Path, list[str]] = {}
    for key, name in read_typed(index, WeightIndex, "download it again").weight_map.items():
        # checks the name only: in the hub's cache every file is a link out of its folder
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{index}: puts {key} in {name}, outside the folder: download the model again")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing, but {index.name} puts {key} in it: download it again")
        files.setdefault(folder / name, []).append(key)
    return files


def read_entries(folder: Path) -> dict[str, Entry]:
    """Name in memory -> entry for every weight of a folder, from the headers of the files."""
    with reading(folder):
        files = weight_files(folder)
    entries: dict[str, Entry] = {}
    for file, indexed in files.items():
        with open_safetensors(file) as handle:
            stored = list(handle.keys())
            missing = sorted(set(indexed) - set(stored))
            if missing:
                raise UserError(
                    f"{file}: has no {missing[0]} ({len(missing)} keys), which the index lists: download it again"
                )
            for key in indexed or stored:
                if IGNORED_KEY.match(key):
                    continue
                entry = Entry(file, key, tuple(handle.get_slice(key).get_shape()))
                first = entries.setdefault(rename_key(key), entry)
                if first is not entry and not is_second_embedding(key, first.key):
                    raise UserError(f"{file}: {key} and {first.key} are two names of one weight: delete one")
    return entries


def is_second_embedding(*keys: str) -> bool:
    """Whether one of two names of a weight is the name of the embedding in Phi-3's image module."""
    return any(key.endswith("vision_embed_tokens.wte.weight") for key in keys)


def check_entries(entries: dict[str, Entry], expected: dict[str, Tensor], folder: Path) -> None:
    """Raise UserError unless files and model have the same names with the same shapes."""
    unexpected = [name for name in entries if name not in expected]
    missing = [name for name in expected if name not in entries]
    for kind, names in (("unexpected", unexpected), ("missing", missing)):
        if names:
            first_file = next((entry.file for entry in entries.values()), folder)
            file, key, _ = entries.get(names[0], (first_file, names[0], None))
            hint = next(text for when, part, text in KEY_HINTS if when in ("", kind) and any(part in n for n in names))
            raise UserError(f"{file}: {len(names)} {kind} keys (first {key}): {hint}")
    wrong = [name for name, entry in entries.items() if entry.shape != expected[name].shape]
    if wrong:
        file, key, shape = entries[wrong[0]]
        fault = f"{key} has shape {shape} but config.json gives {tuple(expected[wrong[0]].shape)}"
        raise UserError(f"{file}: {fault} ({len(wrong)} such keys): {KEY_HINTS[-1][-1]}")


def read_tensors(file: Path, keys: list[str], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields the tensors of `keys`: views of the mapped file, or converted copies where a floating dtype differs."""
    with open_safetensors(file) as views, ExitStack() as mapped:
        unread = 0  # bytes left until the file is remapped, so that pages already read do not add to the copies
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
                converted = copy[start : start + rows]
                converted.copy_(piece)
                check_finite(piece if piece.itemsize > converted.itemsize else converted, key, file)
                unread -= piece.nbytes
            yield copy


def check_finite(tensor: Tensor, key: str, file: Path) -> None:
    """Raise UserError if a tensor contains NaN or infinity."""
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no sum
    # the sum is finite only if all values are, and costs a tenth of isfinite; the sum of large values may overflow
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise UserError(f"{file}: {key} contains NaN or infinity: restore the file, or train again with a lower --lr")


def load_weights(
    model: nn.Module,
    folder: PathLike,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    tied: bool = True,
) -> None:
    """Fill `model`, built on the meta device, from the safetensors of `folder`, without a second copy of the weights.

    Floating-point tensors get `dtype`; if the file already has it, parameters are views of the mapped file (copied on
    write). Everything is checked from the headers before anything is loaded. `tied`: the caller ties `lm_head.weight`
    to the embedding afterwards; a stored head is dropped, or used as the embedding if that is missing.
    Raises UserError, one line with file and key, for missing, corrupt or incomplete files, wrong keys, wrong shapes,
    and NaN or infinity in converted weights (views are not read here).
    """
    folder, entries, expected = Path(folder), read_entries(Path(folder)), model.state_dict()
    if tied:
        expected.pop(HEAD, None)
        head = entries.pop(HEAD, None)
        if head and EMBEDDING not in entries:
            entries[EMBEDDING] = head
    check_entries(entries, expected, folder)
    state = {}
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        keys = {name: entry.key for name, entry in entries.items() if entry.file == file}
        for name, tensor in zip(keys, read_tensors(file, list(keys.values()), dtype), strict=True):
            if tensor.is_floating_point() != expected[name].is_floating_point():
                raise UserError(f"{file}: {keys[name]} has dtype {tensor.dtype}: {KEY_HINTS[-1][-1]}")
            state[name] = tensor.to(device)
    model.load_state_dict(state, strict=False, assign=True)  # strict except for a tied head, see check_entries


# ---- saving weights
def save_weights(
    state_dict: dict[str, Tensor],
    folder: PathLike,
    max_shard_size: int | str = "5GB",
    model_type: str = "paligemma",
) -> None:
    """Write tensors into `folder` as safetensors under the hub's names, in shards; a tied head is written once.

    `model_type`: the family whose names are used.

    Raises UserError when the disk is full or a permission is missing. Inside `atomic_folder` it is all or nothing.
    """
    tensors = {hub_key(key, model_type): tensor for key, tensor in state_dict.items()}
    head, embedding = (tensors.get(hub_key(key, model_type)) for key in (HEAD, EMBEDDING))
    if head is not None and embedding is not None and head.data_ptr() == embedding.data_ptr():
        del tensors[hub_key(HEAD, model_type)]
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)


def save_model_folder(
    state_dict: dict[str, Tensor], config: dict, folder: PathLike, write_more: Callable[[Path], None] | None = None
) -> None:
    """Write weights and config.json into `folder`, which is created if missing; its other files stay.

    `write_more(folder)` adds further files. If they include differential.safetensors, `mark_differential` changes the
    model_type and the names of the weight files.

    The new files are written into a temporary folder inside `folder` and moved at the end: a failure during writing
    leaves an older model unchanged, and a model that is memory-mapped from the same folder keeps its pages. The moves
    as a whole are not atomic.
    """
    folder = Path(folder)
    weights = {key: value for key, value in state_dict.items() if ".differential." not in key}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / ".saving") as staged:
        save_weights(weights, staged, model_type=config["model_type"])
        write_json(staged / "config.json", config)
        if write_more is not None:
            write_more(staged)
        if (staged / DIFFERENTIAL).is_file():
            mark_differential(staged)
    move_model_files(folder / ".saving", folder)


def mark_differential(folder: Path) -> None:
    """Give a folder with weights, config.json and differential.safetensors a model_type, a class and weight file names
    that transformers does not know: otherwise it would load a standard model, which answers differently."""
    for file in sorted(folder.glob("model*.safetensors*")):
        file = file.rename(folder / (DIFFERENTIAL_PREFIX + file.name))
        if file.suffix == ".json":
            index = read_json(file)
            names = {key: DIFFERENTIAL_PREFIX + name for key, name in index["weight_map"].items()}
            write_json(file, index | {"weight_map": names})
    config = read_json(folder / "config.json")
    names = [DIFFERENTIAL_CLASS + name for name in config.get("architectures") or ()]
    changes = {"model_type": DIFFERENTIAL_PREFIX + config["model_type"], "architectures": names}
    write_json(folder / "config.json", config | changes)


def move_model_files(staged: Path, folder: Path) -> None:
    """Move the files of a saved model from `staged` into `folder`, config.json last, replacing an older model; then
    delete the remaining files of the older model, and `staged`."""
    new = sorted(staged.iterdir(), key=lambda file: file.name == "config.json")
    with writing(folder):
        for file in new:
            os.replace(file, folder / file.name)
        for old in folder.iterdir():  # from an older save
            if MODEL_FILE.fullmatch(old.name) and old.name not in {file.name for file in new}:
                old.unlink()
        staged.rmdir()
