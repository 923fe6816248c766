"""Add, save, load and merge what is trained on a frozen base model: LoRA and differential parameters. Also 4-bit
weights and FSDP2.

The functions take models and paths, not run configurations.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import torch
from huggingface_hub import ModelCardData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFERENTIAL,
    DIFFERENTIAL_PREFIX,
    KEYS_TO_MEMORY,
    check_finite,
    find_run_record,
    hub_key,
    open_safetensors,
    rename_key,
)
from config_fields import PHI_TYPES
from differential_attention import DifferentialConfig, differential_config, differential_modules, set_progress
from errors import UserError
from files import (
    MANIFEST,
    PathLike,
    atomic_file,
    decode_typed,
    one_line,
    read_json,
    read_typed,
    reading,
    verify_manifest,
    write_json,
    writing,
)

if TYPE_CHECKING:  # imported where needed: peft takes seconds
    from accelerate import Accelerator
    from peft import PeftModel

LOAD_IN_TRANSFORMERS = """transformers alone does not know differential attention and refuses this folder. With the
Multimodal Differential Transformer on the path:

```python
from differential_transformers import from_pretrained

model = from_pretrained("{name}")  # transformers' class, with differential attention in its layers
```
"""

# `parent_library` in adapter_config.json, from which AutoPeftModel imports the class of the base model. The second
# value marks differential attention on any base model: no library has its name, so AutoPeftModel refuses the adapter.
STANDARD_LIBRARY, DIFFERENTIAL_MARK = "transformers", "differential_paligemma"

# The parts other than the language model that can be trained, and their linear layers.
TOWER_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
PARTS = {
    "vision_tower": TOWER_LINEARS,
    "multi_modal_projector": ("linear", "linear_1", "linear_2"),  # PaliGemma's, and Phi's two
}
# peft matches module names as regular expressions, which can take forever: only plain names and these patterns pass.
LORA_PATTERN = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.({targets})"  # bare names match the vision tower too
PART_PATTERNS = {
    "vision_tower": rf".*vision_tower\.encoder\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(TOWER_LINEARS)})",
    "multi_modal_projector": r".*multi_modal_projector\.linear",
}
ALLOWED_PATTERN = re.compile(
    re.escape(LORA_PATTERN).replace(r"\{targets\}", r"\w+(\|\w+)*")
    + "".join(rf"(\|{re.escape(pattern)})?" for pattern in PART_PATTERNS.values())
)
PlainName = Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+$", max_length=256)]
Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
UNSUPPORTED = (  # fields of LoraConfig that change the function of the adapter and are not handled here
    "alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config", "layer_replication",
    "loftq_config", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip


class AdapterFields(msgspec.Struct):
    """The fields of adapter_config.json that are checked before peft reads it."""

    peft_type: Literal["LORA"] = "LORA"
    r: Rank = 8
    lora_alpha: float = 8
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: str | list[PlainName] | None = None
    exclude_modules: str | list[PlainName] | None = None
    modules_to_save: list[PlainName] | None = None
    rank_pattern: dict[PlainName, Rank] | None = None
    alpha_pattern: dict[PlainName, float] | None = None
    layers_pattern: PlainName | list[PlainName] | None = None
    layers_to_transform: int | list[int] | None = None
    init_lora_weights: bool | PlainName | None = True
    fan_in_fan_out: bool = False
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    auto_mapping: dict[str, Any] | None = None


def read_adapter_config(folder: Path) -> AdapterFields:
    """The checked fields of the adapter_config.json of an adapter folder.

    Raises UserError for a file that is not JSON, a field of the wrong type, an unsupported kind of adapter, and a
    regular expression for module names.
    """
    file = folder / ADAPTER_CONFIG
    config = read_typed(file, AdapterFields)
    unsupported = [name for name in UNSUPPORTED if read_json(file).get(name)]
    if unsupported:
        raise UserError(f"{file}: {unsupported[0]} is not supported: give a LoRA adapter without it")
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, str) and not (re.fullmatch(r"[\w.-]+", value) or ALLOWED_PATTERN.fullmatch(value)):
            raise UserError(
                f"{file}: {name} is a regular expression, {value!r:.80}: replace it by the list of the names of modules"
            )
    return config


# ---- LoRA
def new_lora(config: Any, model: nn.Module) -> "PeftModel":
    """Add new LoRA to the language model of `model`, in place. The vision tower and the projector also get LoRA, or a
    copy that trains as a whole, if `config` says so. Returns peft's wrapper.

    `config` has seed, the lora_* fields (empty lora_targets: those of the family), use_dora, use_rslora, train_vision
    and train_projector. Raises UserError for targets that match no layer.
    """
    from peft import LoraConfig, get_peft_model

    layer = model.model.language_model.layers[0]
    modules = {**dict(layer.self_attn.named_children()), **dict(layer.mlp.named_children())}
    names = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    targets = config.lora_targets or model.lora_targets
    unknown = [name for name in targets if name not in names]
    if unknown:
        raise UserError(
            f"--lora_targets: {unknown[0]!r} is not a layer of the language model: choose from {' '.join(names)}"
        )
    trained = {"vision_tower": config.train_vision, "multi_modal_projector": config.train_projector}
    with_lora = [part for part, how in trained.items() if how == "lora"]
    if is_phi(model):  # plain names: its tower has none of them, and they also fit transformers' decoder
        names = [*targets, *(name for part in with_lora for name in PARTS[part])]
    else:
        names = "|".join(
            [LORA_PATTERN.replace("{targets}", "|".join(targets)), *(PART_PATTERNS[part] for part in with_lora)]
        )
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names,
        modules_to_save=[part for part, how in trained.items() if how == "full"] or None,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )
    adapted = get_peft_model(model, lora)
    freeze_unused(adapted)
    return adapted


def freeze_unused(model: nn.Module) -> None:
    """Freeze modules that are stored but never run, such as CLIP's last layer: they would never get a gradient, and
    DistributedDataParallel would wait for it."""
    for tower in [module for module in model.modules() if hasattr(module, "unused_modules")]:
        for module in tower.unused_modules():
            module.requires_grad_(False)


def attach_adapter(model: nn.Module, adapter_folder: PathLike, trainable: bool = False) -> "PeftModel":
    """Add a stored LoRA adapter to `model`, in place; returns peft's wrapper, with the base frozen, in eval mode unless
    `trainable`. Adapters trained with older layer names also load (peft #2574).

    Raises UserError for missing or corrupt files, an adapter for another model, unused or missing weights, and NaN or
    infinity.
    """
    folder = Path(adapter_folder)
    read_adapter_config(folder)
    with reading(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
            raise UserError(f"{folder / 'adapter_model.bin'}: convert it to safetensors; pickles are never loaded")
    # without this file peft would try a pickle, then the hub
    with open_safetensors(folder / ADAPTER_WEIGHTS) as handle:
        prefix = "base_model.model."
        stored = {prefix + rename_key(key.removeprefix(prefix)) for key in handle.keys()}  # noqa: SIM118
        for key in handle.keys():  # noqa: SIM118
            check_finite(handle.get_tensor(key), key, folder / ADAPTER_WEIGHTS)

    from peft import LoraConfig, PeftModel, get_peft_model_state_dict

    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.task_type = None  # other tools store CAUSAL_LM, for which peft expects methods of transformers' models
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing keys, which are refused below
            adapted = PeftModel.from_pretrained(
                model,
                str(folder),
                config=config,
                is_trainable=trainable,
                torch_device="cpu",
                key_mapping=KEYS_TO_MEMORY,
            )
            freeze_unused(adapted)
            used = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except torch.OutOfMemoryError:  # not a fault of the adapter
        raise
    except Exception as error:  # peft raises all kinds of exceptions for wrong values
        reason = one_line(error)[:300]
        raise UserError(f"{folder}: this adapter does not fit the model ({reason}): give its own base model") from error
    for keys, fault in ((stored - used, "has no place in"), (used - stored, "is missing for")):
        if keys:
            fault = f"{min(keys)} {fault} this model ({len(keys)} keys)"
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: {fault}: give the adapter's own base model")
    return adapted


def save_lora(adapted: "PeftModel", folder: PathLike) -> None:
    """Write the LoRA of peft's wrapper into `folder` in peft's format.

    AutoPeftModel loads the folder onto transformers' PaliGemma or Phi3ForCausalLM, but refuses it if the model has
    differential attention.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a base model that is not on the hub
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    base, revision = adapted.get_base_model().name_or_path, None
    if Path(base).is_dir():
        base = str(Path(base).resolve())  # "assets/paligemma-nano" would read as a hub id
    else:
        base, _, revision = base.partition("@")
    model = adapted.get_base_model()
    describe_base(folder, model, base_model_name_or_path=base, revision=revision or None)
    if is_phi(model):
        rename_adapter(Path(folder, ADAPTER_WEIGHTS), model.config.model_type)
    Path(folder, "README.md").unlink(missing_ok=True)  # peft's empty template; see model_card.py


def differential_card(name: str) -> str:
    """README.md for the folder of a transformers model with differential attention."""
    metadata = ModelCardData(library_name="transformers", tags=["differential-attention"])
    return f"---\n{metadata.to_yaml()}\n---\n\n# {name}\n\n{LOAD_IN_TRANSFORMERS.format(name=name)}"


def describe_base(folder: PathLike, model: nn.Module, **changes: Any) -> None:
    """Write the class of the base `model` and further `changes` into the adapter_config.json of `folder`. AutoPeftModel
    loads standard models and refuses those with differential attention, which it would leave out."""
    file = Path(folder, ADAPTER_CONFIG)
    library = DIFFERENTIAL_MARK if differential_config(model) else STANDARD_LIBRARY
    mapping = {"base_model_class": type(model).__name__, "parent_library": library}
    write_json(file, read_json(file) | {"auto_mapping": mapping, "task_type": None} | changes)


def is_phi(model: nn.Module) -> bool:
    """Whether the model is of the Phi family, whose layers have other names on the hub than here."""
    return model.config.model_type in PHI_TYPES


def rename_adapter(file: Path, model_type: str) -> None:
    """Rename the weights of an adapter to the layer names of the transformers model."""
    prefix = "base_model.model."
    tensors = {prefix + hub_key(key.removeprefix(prefix), model_type): t for key, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def merge(model: nn.Module) -> None:
    """Add every LoRA update to its weight and replace peft's layers with plain ones, in place.

    Raises UserError if a merged weight would not be finite, and for modules_to_save other than the vision tower and
    the projector (the embedding, for example, is tied to the head).
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for name, wrapper in [(n, m) for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]:
        if name.rpartition(".")[2] not in PARTS:
            raise UserError(f"{name}: trained as a whole (modules_to_save), which cannot be merged: train LoRA only")
        model.set_submodule(name, wrapper.modules_to_save[wrapper.active_adapters[0]])
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{name}: cannot be merged ({error}): check the losses of the run") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def trainable_counts(model: nn.Module) -> dict[str, list[int]]:
    """Number of parameters by tower: [trainable, all]."""
    counts: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        if ".original_module." in name:  # the original of a part that trains as a whole: its copy is counted
            continue
        tower = next((t for t in (*PARTS, "language_model") if t in name), "lm_head")
        kind = " lora" if "lora_" in name else " differential" if ".differential." in name else ""
        entry = counts.setdefault(tower + kind, [0, 0])
        entry[0] += p.numel() if p.requires_grad else 0
        entry[1] += p.numel()
    return counts


# ---- differential attention
def differential_state(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Name -> parameter or buffer of everything that differential attention added to `model`; for a transformers
    model, too, the names are those of the models here.

    `state`: a state_dict of `model`, such as one gathered from its shards, to take the tensors from.
    """
    if state is None:
        modules = differential_modules(model).items()
        state = {f"{name}.{key}": tensor for name, module in modules for key, tensor in module.state_dict().items()}
    added = {name.removeprefix("base_model.model."): t for name, t in state.items() if ".differential." in name}
    return {rename_key(name): tensor for name, tensor in added.items()}


def save_differential(model: nn.Module, folder: PathLike, state: dict[str, Tensor] | None = None) -> None:
    """Write what differential attention added to `model` (also inside peft's wrapper), and its configuration, into
    `folder`/differential.safetensors; nothing for standard attention. `state`: see `differential_state`.

    Raises UserError when the disk is full or a permission is missing.
    """
    config = differential_config(model)
    if config is None:
        return
    progress = next(iter(differential_modules(model).values())).progress.item()
    metadata = {"config": json.dumps(config.to_dict()), "progress": json.dumps(progress)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in differential_state(model, state).items()}
    file = Path(folder, DIFFERENTIAL)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def find_differential(base: Path, adapter: Path | None) -> Path | None:
    """The folder whose differential.safetensors belongs to a model: its adapter folder, the parent of that, or its
    base; None for standard attention.

    Raises UserError if the file is missing although run.json, the adapter's or the model's config.json says that
    attention is differential, and if weights beside the adapter do not match the manifest there.
    """
    folders = [base] if adapter is None else [adapter.parent, base]
    if adapter is not None and (adapter / DIFFERENTIAL).is_file():  # saved by differential_transformers.py
        folders[0] = adapter
    if adapter is not None and (adapter.parent / MANIFEST).is_file():
        verify_manifest(adapter.parent, suffix=".safetensors")
    with reading(folders[0]):
        declared = declared_differential(base, adapter)
        found = [folder for folder in folders if (folder / DIFFERENTIAL).is_file()]
    if declared and folders[0] not in found:
        raise UserError(
            f"{folders[0] / DIFFERENTIAL}: missing, although {declared} says that attention is differential: restore it"
        )
    return found[0] if found else None


def declared_differential(base: Path, adapter: Path | None) -> Path | None:
    """The file that says that a model has differential attention, if there is one."""
    if adapter is None:
        model_type = read_json(base / "config.json").get("model_type")
        return base / "config.json" if str(model_type).startswith(DIFFERENTIAL_PREFIX) else None
    if (read_adapter_config(adapter).auto_mapping or {}).get("parent_library") == DIFFERENTIAL_MARK:
        return adapter / ADAPTER_CONFIG
    run = find_run_record(adapter)
    if run is not None and str(read_json(run).get("arm")).startswith("diff"):
        return run
    return None


def stored_differential(folder: PathLike) -> DifferentialConfig | None:
    """The configuration in `folder`/differential.safetensors; None without one. Raises UserError for a bad file."""
    with reading(folder):
        if not Path(folder, DIFFERENTIAL).is_file():
            return None
    return read_metadata(Path(folder, DIFFERENTIAL))[0]


def read_metadata(file: Path) -> tuple[DifferentialConfig, float]:
    """Configuration and progress of training, 0 to 1, in the header of a differential.safetensors."""
    with open_safetensors(file) as handle:
        metadata = handle.metadata() or {}
    for key in ("config", "progress"):
        if key not in metadata:
            raise UserError(f"{file}: its header has no differential configuration ({key!r}): save it again")
    raw = metadata["config"].encode()
    decode_typed(raw, DifferentialConfig, f"{file}, config")
    missing = {field.name for field in fields(DifferentialConfig)} - set(json.loads(raw))
    if missing:  # their defaults may have been others when the file was written
        raise UserError(f"{file}: its configuration has no {min(missing)!r}: load it with the version that wrote it")
    progress = decode_typed(
        metadata["progress"].encode(), Annotated[float, msgspec.Meta(ge=0, le=1)], f"{file}, progress"
    )
    try:
        return DifferentialConfig.from_dict(json.loads(raw)).resolve(), progress
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def load_differential(model: nn.Module, folder: PathLike) -> None:
    """Load what differential attention added to `model` from `folder`/differential.safetensors.

    Raises UserError for a missing or corrupt file, another configuration, unexpected or missing keys, wrong shapes, and
    NaN or infinity.
    """
    file = Path(folder, DIFFERENTIAL)
    (stored, progress), built = read_metadata(file), differential_config(model)
    if built is None or not stored.same_method(built):
        raise UserError(
            f"{file}: has differential attention of preset {stored.preset} but the model was built with "
            f"{built.preset if built else 'none'} or other choices: give the stored configuration, or none"
        )
    state = differential_state(model)
    with open_safetensors(file) as handle:
        shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
        for names, fault in (
            (set(shapes) - set(state), "has no place in"),
            (set(state) - set(shapes), "is missing for"),
        ):
            if names:
                raise UserError(f"{file}: {min(names)} {fault} this model ({len(names)} keys): give its own base model")
        for name, shape in shapes.items():
            if shape != tuple(state[name].shape):
                raise UserError(f"{file}: {name} has shape {shape} but this model has {tuple(state[name].shape)}")
        with torch.no_grad():
            for name, tensor in state.items():
                stored_tensor = handle.get_tensor(name)
                check_finite(stored_tensor, name, file)
                tensor.copy_(stored_tensor)
    set_progress(model, progress)


# ---- 4-bit and sharded base models
def quantize(model: nn.Module, device: torch.device) -> nn.Module:
    """QLoRA (arXiv 2305.14314): the frozen linear layers of the language model become 4-bit NF4 with double
    quantization and compute in bfloat16. Embedding, head, vision tower and differential parameters do not change.

    `model` is on the CPU and moves to `device` layer by layer; returns it. Raises UserError without bitsandbytes.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError("--dtype=nf4: bitsandbytes is not installed: pip install bitsandbytes") from error
    for layer in model.model.language_model.layers:
        for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            quantized = Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            quantized.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            layer.set_submodule(name, quantized.to(device))  # quantized by the move
    model.is_loaded_in_4bit = True  # read by peft
    return model.to(device)


def shard_frozen_layers(model: nn.Module, adapted: nn.Module, accelerator: "Accelerator") -> None:
    """FSDP2: each process stores a shard of the frozen layers' weights and gathers a layer when it runs.

    Trainable parameters are few: they are replicated and synchronized by DDP, as without sharding. Accelerate's own
    FSDP would shard them too, and does not run on a CPU. `adapted` is peft's wrapper of `model`. Raises UserError for a
    single process.
    """
    replicated = {p for n, p in adapted.named_parameters() if p.requires_grad or ".differential." in n}
    if accelerator.num_processes == 1:
        raise UserError("--shard=True: needs several processes: start them with torchrun")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    tower = model.model.vision_tower
    for layer in (*model.model.language_model.layers, *(() if tower is None else tower.encoder.layers)):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    frozen = [name for name, p in adapted.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(adapted, frozen)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep all sharded layers gathered in the block, where processes may run different numbers of forward passes."""
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True)
            layer.reshard()
