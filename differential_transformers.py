"""Differential attention in transformers models: their own code with the module of differential_attention.py.

    model = AutoModelForImageTextToText.from_pretrained("google/gemma-3-4b-it")
    add_differential(model, "split")

It works on decoders that rotate queries by `apply_rotary_pos_emb` and go through transformers' attention interface, and
on the vision towers in VISION_ATTENTION; other models raise an error that names them. A registered attention function
gets a layer's queries, keys and values after norms, rotation and cache; a forward pre-hook keeps the layer's input and
rotary tables for it. docs/bridge.md explains training, saving and loading.

B batch, L queries, S keys, H query heads, K key/value heads, D head dim, C hidden size, R second queries.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import adapters
import differential_attention
from adapters import save_differential, stored_differential
from attention_formula import blend
from checkpoint import (
    DIFFERENTIAL,
    DIFFERENTIAL_CLASS,
    DIFFERENTIAL_PREFIX,
    differential_weights,
    locate,
    mark_differential,
    move_model_files,
)
from differential_attention import (
    AttentionShape,
    DifferentialAttention,
    DifferentialConfig,
    add_to_layers,
    as_config,
    differential_config,
    differential_parameters,
    is_lambda,
    set_progress,
    trainable_names,
)
from errors import UserError
from files import PathLike, atomic_folder, read_json
from fused_ops import split_keys

BASES = ("eager", "sdpa")  # attention implementations that compute the maps
QUERY_NORMS = ("q_norm", "q_layernorm", "query_layernorm", "qk_norm")  # names of norms in attention layers
VISION_ATTENTION = ("SiglipAttention", "CLIPAttention", "Idefics3VisionAttention", "SmolVLMVisionAttention")
# matches a forward that rotates whole queries (not a part, `query_rot`), unconditionally, with its own Python module's
# `apply_rotary_pos_emb(q, k, cos, sin)`
ROTATION = re.compile(r"\n {8}(?!\w+_rot\b)(\w+), \w+ = apply_rotary_pos_emb\(\w+, \w+, cos, sin\)\n")


# ---- attention
@dataclass(frozen=True)
class HostAttend:
    """The attention of one layer of a host model, as a differential module expects it (see `attention.Attend`)."""

    base: Callable  # transformers' eager or SDPA attention
    module: nn.Module  # the layer's attention
    mask: Tensor | None
    options: dict[str, Any]  # scaling, dropout, sliding_window, softcap: what the layer passes to its attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention by one map -> [B, H, L, Dv]."""
        module, group_size = self.module, q.shape[1] // k.shape[1]
        if group_size != getattr(module, "num_key_value_groups", 1):  # fewer queries than heads
            causal = getattr(module, "is_causal", True)
            module = SimpleNamespace(num_key_value_groups=group_size, training=module.training, is_causal=causal)
        return self.base(module, q, k, v, self.mask, **self.options)[0].transpose(1, 2)

    def blend(self, q1: Tensor, q2: Tensor, k: Tensor, v: Tensor, weight: Tensor, normalised: bool) -> Tensor:
        """The blend of attention by two maps, as `attention.blended_attention`."""
        k1, k2 = split_keys(k, v)
        wide = torch.promote_types(q1.dtype, torch.float32)  # for the difference of two close outputs
        return blend(self(q1, k1, v).to(wide), self(q2, k2, v).to(wide), weight, normalised).to(q1.dtype)

    def rescale(self, factor: float) -> "HostAttend":
        """The same attention with its scale times `factor`."""
        return replace(self, options=self.options | {"scaling": self.options["scaling"] * factor})


def attend_differentially(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers' interface: (outputs [B, L, H, D], maps), where maps is None
    in a differential layer; query [B, H, L, D], key and value [B, K, S, D]."""
    python_module = sys.modules[type(module).__module__]
    function = python_module.eager_attention_forward if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    differential = getattr(module, "differential", None)
    if differential is None:  # a standard layer of the same model
        return function(module, query, key, value, attention_mask, **options)
    if module.training and torch.is_grad_enabled() and is_frozen(differential):
        warnings.warn("differential attention is frozen: call unfreeze_differential(model) after peft", stacklevel=2)
    x, rotate = module.__dict__.pop("layer_input")  # pop frees it; a module with a graph tensor cannot be copied
    if key.shape[1] < differential.num_cached_key_heads:  # nothing was cached
        key = differential.extend_keys(x, key, rotate)
    attend = HostAttend(function, module, attention_mask, options)
    return differential(x, query, key, value, rotate, attend).transpose(1, 2), None


def is_frozen(differential: DifferentialAttention) -> bool:
    """Whether none of its parameters train although some should."""
    return bool(trainable_names(differential.config)) and not any(p.requires_grad for p in differential.parameters())


@dataclass(frozen=True)
class HostRotate:
    """The rotary embedding of one layer of a host model, as a differential module expects it; vision towers have
    none."""

    module: nn.Module  # the layer's attention
    tables: tuple[Tensor, Tensor] | None

    def __call__(self, t: Tensor) -> Tensor:
        """Rotate t [B, heads, L, D]."""
        if type(self.module).__name__ in VISION_ATTENTION:
            return t
        return sys.modules[type(self.module).__module__].apply_rotary_pos_emb(t, t[:, :0], *self.tables)[0]

    def query(self, projected: Tensor) -> Tensor:
        """Rotate a projected query [B, heads, L, D], after the layer's norm of queries, if any (Qwen3, Gemma 3)."""
        norm = getattr(self.module, "q_norm", None)
        return self(projected if norm is None else norm(projected))


for _base in BASES:
    AttentionInterface.register(DIFFERENTIAL_PREFIX + _base, partial(attend_differentially, _base))
    AttentionMaskInterface.register(DIFFERENTIAL_PREFIX + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])


class ExtendedCache:
    """A layer's KV cache that also stores the keys of the second map."""

    def __init__(self, cache: Any, extend: Callable[[Tensor], Tensor]):
        self.cache, self.extend = cache, extend

    def update(self, key: Tensor, value: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
        return self.cache.update(self.extend(key), value, *args, **options)


def keep_layer_input(names: list[str], module: nn.Module, args: tuple, options: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: keep the input [B, L, C] and the rotation of a layer until its attention function runs.
    `names`: those of the layer's arguments."""
    implementation = module.config._attn_implementation
    if not implementation.startswith(DIFFERENTIAL_PREFIX):  # set_attn_implementation: the module would not run
        raise UserError(
            f"{type(module).__name__}: attention implementation {implementation} ignores differential attention: "
            f"set {DIFFERENTIAL_PREFIX}eager or {DIFFERENTIAL_PREFIX}sdpa"
        )
    given = dict(zip(names, args, strict=False)) | options
    x, differential = given["hidden_states"], module.differential
    rotate = HostRotate(module, given.get("position_embeddings"))
    module.layer_input = x, rotate
    if given.get("past_key_values") is not None and differential.num_cached_key_heads > differential.shape.num_kv_heads:
        extend = partial(differential.extend_keys, x, rotate=rotate)
        given["past_key_values"] = ExtendedCache(given["past_key_values"], extend)
    return (), given


# ---- supported layers
def tower_of(attention: nn.Module) -> str | None:
    """The tower of a layer's attention, "text" or "vision"; None if it is not supported."""
    if type(attention).__name__ in VISION_ATTENTION:
        return "vision" if "Vision" in type(attention.config).__name__ else None
    return "text" if ROTATION.search(inspect.getsource(type(attention).forward)) else None


def changes_rotated_query(attention: nn.Module) -> bool:
    """Whether a decoder layer changes its queries after the rotation, as Ministral 3 scales them."""
    source = inspect.getsource(type(attention).forward)
    rotation = ROTATION.search(source)
    return re.search(rf"\n +{rotation[1]} = ", source[rotation.end() - 1 :]) is not None


def find_towers(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The layers of the decoder, "text", and of the vision tower, "vision", if supported. Raises UserError for two
    of a kind."""
    towers: dict[str, nn.ModuleList] = {}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) and all(hasattr(layer, "self_attn") for layer in stack):
            kinds = {tower_of(layer.self_attn) for layer in stack}
            tower = kinds.pop() if len(kinds) == 1 else None
            if tower in towers:
                raise UserError(f"{type(model).__name__} has two {tower} towers: use one of its parts, and save that")
            if tower is not None:
                towers[tower] = stack
    return towers


def shape_of(attention: nn.Module) -> AttentionShape:
    """Sizes of an attention layer of transformers. Raises UserError for projections of other sizes."""
    config, head_dim, heads = attention.config, attention.head_dim, attention.config.num_attention_heads
    if tower_of(attention) == "vision":
        return AttentionShape(config.hidden_size, heads, heads, head_dim)
    kv_heads, fused = config.num_key_value_heads, not hasattr(attention, "q_proj")
    projection = attention.qkv_proj if fused else attention.q_proj
    if projection.out_features != head_dim * (heads + 2 * kv_heads * fused):
        name = type(attention).__name__
        raise UserError(f"{name}: q_proj or qkv_proj holds more than queries, keys and values: not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get(getattr(attention, "layer_type", None)) or rope  # Gemma 3: one per layer type
    rotary_dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    is_long = rope.get("rope_type") == "longrope"
    return AttentionShape(projection.in_features, heads, kv_heads, head_dim, rotary_dim, is_long)


def check_host(config: DifferentialConfig, attention: nn.Module) -> None:
    """Raise UserError for a resolved configuration, or an attention implementation, that cannot work in a layer."""
    implementation, name = attention.config._attn_implementation, type(attention).__name__
    if implementation.removeprefix(DIFFERENTIAL_PREFIX) not in BASES:
        raise UserError(f"{name}: load the model with attn_implementation eager or sdpa, not {implementation}")
    if getattr(attention, "attn_logit_softcapping", None) and implementation.endswith("sdpa"):
        raise UserError(f"{name}: sdpa has no soft-cap: load the model with attn_implementation='eager'")
    if tower_of(attention) == "vision":
        return
    if hasattr(attention, "sinks"):
        raise UserError(f"{name}: attention sinks are not supported: use a model without them")
    weight = getattr(getattr(attention, "q_norm", None), "weight", None)
    is_per_head = weight is not None and weight.shape == (attention.head_dim,)  # HostRotate.query applies it
    is_normalised = any(hasattr(attention, norm) for norm in QUERY_NORMS) or getattr(attention.config, "clip_qkv", None)
    if config.second in ("query", "noise") and is_normalised and not is_per_head:
        raise UserError(f"differential preset {config.preset} would skip the norm of queries of {name}: use split")
    if config.second in ("query", "noise") and changes_rotated_query(attention):
        raise UserError(f"differential preset {config.preset} would skip a scale of queries of {name}: use split")
    if config.rotate_halves:
        raise UserError(
            f"differential preset {config.preset} rotates half heads, and transformers whole ones: use v1_width"
        )
    rotate_half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    is_half_split = rotate_half is not None and rotate_half(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
    if config.second == "halves" and not is_half_split:
        raise UserError(f"differential preset {config.preset} would cut the rotary pairs of {name}: use split")


# ---- models
def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper. Raises UserError for another kind of model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise UserError(f"{type(model).__name__} is not a transformers model: see differential_attention.py")
    return base


def add_differential(model: nn.Module, differential: DifferentialConfig | str = "split") -> None:
    """Add `self_attn.differential` to the attention layers of a transformers model, in place.

    `differential`: a DifferentialConfig or a preset's name; `model` has its weights and may be peft's wrapper. Give the
    model whose `save_pretrained` you call: that of a model around it does not save what is added here. Raises UserError
    if configuration and model do not fit, and then changes nothing.
    """
    base, config = unwrap(model), as_config(differential).resolve()
    towers = find_towers(base)
    for tower in config.towers:
        if tower not in towers:
            names = sorted({type(m).__name__ for m in base.modules() if type(m).__name__.endswith("Attention")})
            raise UserError(
                f"differential.towers {tower}: {type(base).__name__} has no {tower} layers that fit "
                f"({', '.join(names)}): use another tower or model"
            )
        check_host(config, towers[tower][0].self_attn)
    hosted = [id(towers[tower][0].self_attn.config) for tower in config.towers]
    parts = [part for part in base.modules() if isinstance(part, PreTrainedModel) and id(part.config) in hosted]
    if {id(part.config) for part in parts if part._can_set_attn_implementation()} != set(hosted):
        raise UserError(
            f"{type(base).__name__} does not let its attention implementation be changed: use another model"
        )
    for layer in add_to_layers(config, towers, shape_of):
        hooks = layer.self_attn._forward_pre_hooks.values()
        if not any(getattr(hook, "func", None) is keep_layer_input for hook in hooks):
            names = list(inspect.signature(type(layer.self_attn).forward).parameters)[1:]
            layer.self_attn.register_forward_pre_hook(partial(keep_layer_input, names), with_kwargs=True)
    for part in parts:
        name = part.config._attn_implementation.removeprefix(DIFFERENTIAL_PREFIX)
        part.set_attn_implementation({"": DIFFERENTIAL_PREFIX + name})  # of this part only
    keep_when_saved(model)


def unfreeze_differential(model: nn.Module) -> list[str]:
    """Make the differential parameters trainable again after `get_peft_model`, which freezes them, and have peft's
    wrapper save them; returns their names."""
    if differential_config(model) is None:
        raise UserError(f"{type(model).__name__} has standard attention: call add_differential first")
    keep_when_saved(model)
    return differential_attention.unfreeze_differential(model)


def load_differential(model: nn.Module, folder: PathLike) -> None:
    """Load `folder`/differential.safetensors, from a local folder or hub id, into `model`; adds differential attention
    first if there is none. Raises UserError for a missing file and for one of another model."""
    folder = locate(folder)
    if differential_config(model) is None:
        stored = stored_differential(folder)
        if stored is None:
            raise UserError(f"{Path(folder, DIFFERENTIAL)}: missing: give a folder that save_differential wrote")
        add_differential(model, stored)
    adapters.load_differential(model, folder)


# ---- folders
def keep_when_saved(model: nn.Module) -> None:
    """Make `save_pretrained` of a model, and of peft's wrapper, save differential attention too."""
    base = unwrap(model)
    base.save_pretrained = partial(save_model, base)
    if base is not model:
        model.save_pretrained, model.load_adapter = partial(save_adapter, model), partial(load_adapter, model)


def save_model(
    model: PreTrainedModel, folder: PathLike, is_main_process: bool = True, state_dict: dict | None = None, **options
) -> None:
    """`save_pretrained` of a model with differential attention. `from_pretrained` below reads the folder; transformers
    refuses it because of its model_type and the names of its weight files."""
    state = model.state_dict() if state_dict is None else state_dict
    if options.pop("push_to_hub", False) or any(".lora_" in name for name in state):
        raise UserError("save_pretrained: save peft's wrapper or merge LoRA first; upload the folder with `hf upload`")
    if not is_main_process:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with atomic_folder(Path(folder, ".saving")) as staged:
        standard = {name: tensor for name, tensor in state.items() if ".differential." not in name}
        type(model).save_pretrained(model, staged, state_dict=standard, **options)
        save_differential(model, staged, state_dict)
        mark_differential(staged)
        if not Path(folder, "README.md").exists():  # the user's own model card stays
            card = adapters.differential_card(Path(folder).resolve().name)
            (staged / "README.md").write_text(card, encoding="utf-8")
    move_model_files(Path(folder, ".saving"), Path(folder))


def from_pretrained(folder: PathLike, **options: Any) -> PreTrainedModel:
    """Load a transformers model with differential attention from a folder or hub id; `options` are those of the model
    class's `from_pretrained`. Raises UserError for another kind of folder, and for options that cannot be passed on."""
    for name in ("subfolder", "token", "cache_dir", "output_loading_info"):
        if options.get(name):
            raise UserError(f"from_pretrained: {name} is not supported: download the folder and give its path")
    revision = options.pop("revision", None)
    folder = locate(f"{folder}@{revision}" if revision else folder)
    data = read_json(folder / "config.json")
    names = [str(name).removeprefix(DIFFERENTIAL_CLASS) for name in data.get("architectures") or ()]
    model_class = getattr(transformers, names[0], None) if names else None
    is_ours = str(data.get("model_type")).startswith(DIFFERENTIAL_PREFIX)
    if not is_ours or not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise UserError(f"{folder / 'config.json'}: not the config of a transformers model with differential attention")
    data |= {"model_type": data["model_type"].removeprefix(DIFFERENTIAL_PREFIX), "architectures": names}
    config = model_class.config_class.from_dict(data)
    weights = differential_weights(folder)
    if weights is None:
        raise UserError(f"{folder}: no differential_model.safetensors here: restore it")
    config.transformers_weights = weights.name
    model = model_class.from_pretrained(folder, config=config, **options)
    del model.config.transformers_weights
    load_differential(model, folder)
    return model


def save_adapter(model: nn.Module, folder: PathLike, *args: Any, is_main_process: bool = True, **options: Any) -> None:
    """`save_pretrained` of peft's wrapper: the adapter, which AutoPeftModel refuses, and differential.safetensors."""
    type(model).save_pretrained(model, folder, *args, is_main_process=is_main_process, **options)
    if is_main_process:
        save_differential(model, folder, options.get("state_dict"))
        for name in options.get("selected_adapters") or model.peft_config:
            adapters.describe_base(folder if name == "default" else Path(folder, name), model.get_base_model())


def load_adapter(model: nn.Module, folder: PathLike, *args: Any, **options: Any) -> Any:
    """`load_adapter` of peft's wrapper, which also loads the differential attention in the adapter's folder (a local
    one or a hub id) or, in a run of this repository, in its parent. Raises UserError if it is missing."""
    revision = options.get("revision")
    adapter = locate(f"{folder}@{revision}" if revision else folder) / (options.get("subfolder") or "")
    found = adapters.find_differential(adapter, adapter)
    result = type(model).load_adapter(model, folder, *args, **options)
    if found is not None:
        load_differential(model, found)
    return result


# ---- training
class DifferentialTrainerMixin:
    """Mix in before transformers' Trainer: differential parameters train without weight decay, even if peft froze them,
    lambda at `lambda_lr` times the learning rate; annealing follows the steps; checkpoints of whole models resume.

        class DifferentialTrainer(DifferentialTrainerMixin, Trainer): ...
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        unfreeze_differential(self.model)

    def create_optimizer(self, *args: Any, **options: Any) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return super().create_optimizer(*args, **options)
        optimizer = super().create_optimizer(*args, **options)
        added = {p: name for name, p in differential_parameters(self.model).items() if p.requires_grad}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in added]
        lambda_lr = self.args.learning_rate * differential_config(self.model).lambda_lr
        for of_lambda, lr in ((True, lambda_lr), (False, self.args.learning_rate)):
            params = [p for p, name in added.items() if is_lambda(name) == of_lambda]
            optimizer.add_param_group({"params": params, "lr": lr, "weight_decay": 0.0})
        return optimizer

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        set_progress(self.model, (self.state.global_step + 1) / self.state.max_steps)
        return super().training_step(*args, **options)

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        if not differential_weights(Path(folder)):
            return super()._load_from_checkpoint(folder, model)
        loaded = from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        if not differential_weights(Path(self.state.best_model_checkpoint)):
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)
