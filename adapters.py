"""What is trained on a frozen base: LoRA and differential parameters, added, unfrozen, saved, loaded and merged; 4-bit
weights and FSDP2.

Everything takes models and paths; the folder of a run is not known here.
"""

import contextlib
import json
import os
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIFFERENTIAL,
    KEYS_TO_MEMORY,
    open_safetensors,
    rename_key,
)
from differential_attention import DifferentialConfig, differential_config, differential_modules, set_progress
from errors import UserError
from files import read_json, reading, sync, writing


# ---- LoRA
def new_lora(config, model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    targets = "|".join(config.lora_targets)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        # anchored: bare names would put adapters into the vision tower too
        target_modules=rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({targets})",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"lora_targets {config.lora_targets} do not fit the language model: {reason}") from error


def attach_adapter(model, adapter_folder, trainable=False):
    """Put a peft adapter into `model` in place; returns peft's model around it, the base frozen, in eval mode unless
    `trainable`. Adapters trained under older namings fit too (peft #2574).

    Raises UserError: files missing or corrupt, an adapter for another model, weights unused or left at random.
    """
    folder = Path(adapter_folder)
    read_json(folder / ADAPTER_CONFIG)
    with reading(folder):
        if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
            raise UserError(f"{folder / 'adapter_model.bin'}: convert it to safetensors; pickles are never loaded")
    with open_safetensors(
        folder / ADAPTER_WEIGHTS
    ) as handle:  # without it peft would look for a pickle, then ask the hub
        prefix = "base_model.model."
        stored = {prefix + rename_key(key.removeprefix(prefix)) for key in handle.keys()}  # noqa: SIM118

    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of missing keys; they are refused below
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, torch_device="cpu", key_mapping=KEYS_TO_MEMORY
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


def merge(model: torch.nn.Module):
    """Add every LoRA update to the weight that it belongs to, in place, and leave plain layers. Raises UserError where
    a weight would not be finite."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{name}: cannot be merged ({error}): look at the run's losses") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())


def trainable_counts(model) -> dict[str, list[int]]:
    """Parameters by tower: [trainable, all]."""
    counts: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        tower = next((t for t in ("vision_tower", "multi_modal_projector", "language_model") if t in name), "lm_head")
        kind = " lora" if "lora_" in name else " differential" if ".differential." in name else ""
        entry = counts.setdefault(tower + kind, [0, 0])
        entry[0] += p.numel() * p.requires_grad
        entry[1] += p.numel()
    return counts


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
            sync(temporary)
            os.replace(temporary, file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def stored_differential(folder) -> DifferentialConfig | None:
    """The configuration in `folder`/differential.safetensors; None without such a file. Raises UserError."""
    with reading(folder):
        if not Path(folder, DIFFERENTIAL).is_file():
            return None
    return _told(Path(folder, DIFFERENTIAL))[0]


def _told(file: Path) -> tuple[DifferentialConfig, float]:
    with open_safetensors(file) as handle:
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
    with open_safetensors(file) as handle:
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


# ---- a base in 4 bits, a base in shards
def quantize(model, device: torch.device):
    """QLoRA (arXiv 2305.14314): the language model's frozen linears as 4-bit NF4 with doubly quantised scales, which
    compute in bfloat16; embedding, head, vision tower and what differential attention added stay as they are.

    `model` is on the CPU and goes to `device` piece by piece; returns it. Raises UserError without bitsandbytes.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise UserError("--dtype=nf4: bitsandbytes is not installed: pip install bitsandbytes") from error
    for layer in model.model.language_model.layers:
        for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]:
            small = Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            small.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            layer.set_submodule(name, small.to(device))  # quantised on the way
    model.is_loaded_in_4bit = True  # so peft knows
    return model.to(device)


def shard_frozen_layers(model, adapted, accelerator):
    """FSDP2: each process keeps its share of the frozen layers' weights and gathers a layer when it acts.

    What trains is small: it stays whole on each process and goes the way of DDP, as without shares. Accelerate's own
    FSDP would cut it too, and does not run on a CPU.
    """
    whole = {p for n, p in adapted.named_parameters() if p.requires_grad or ".differential." in n}
    if accelerator.num_processes == 1:
        raise UserError("--shard=True: one process has no one to share with: start several with torchrun")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    frozen = [name for name, p in adapted.named_parameters() if not p.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(adapted, frozen)


@contextlib.contextmanager
def gathered(model):
    """Whole layers on every process while each works at its own pace: outside, they gather in step."""
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
