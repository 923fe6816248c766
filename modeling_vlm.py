"""Code shared by all vision-language models here: loading and saving, embedding of images, forward pass, loss, KV cache
and generation. Each family supplies its decoder, vision tower, mask and positions.

B batch, L sequence, K key/value heads, D head dim, C hidden size, n images, N image tokens per image, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters import attach_adapter, find_differential, load_differential, save_differential, stored_differential
from attention import Attend, Mask, PrefixMask, StepMask, apply_rotary, apply_rotary_to_halves
from attention_formula import apply_softcap
from checkpoint import base_folder, load_weights, locate, resolve_run, save_model_folder
from config_fields import DECODER_ALONE_MESSAGE, IGNORED_LABEL
from differential_attention import AttentionShape, DifferentialConfig, add_differential, as_config
from errors import UserError
from files import read_json
from fused_ops import apply_linears, cast_factors, cast_lora, head_loss, lora_layers

if TYPE_CHECKING:
    from modeling_gemma import PaliGemmaConfig
    from modeling_phi3 import Phi3Config

ImageFeatures = Tensor | tuple[Tensor, ...]  # [n, N, C], or [N, C] of each image where N differs
Rotary = tuple[Tensor, Tensor]  # tables of cos and sin

Config = TypeVar("Config")


def read_model_config(config_class: type[Config], path_or_hub_id: str | Path) -> Config:
    """The configuration in `config.json` of a model folder, run folder or hub id, read by `config_class.from_dict`.

    Raises UserError, with the file name, for anything that `from_dict` refuses.
    """
    file = base_folder(path_or_hub_id) / "config.json"
    data = read_json(file)
    try:
        return config_class.from_dict(data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


# ---- the KV cache and decoding, token by token
class KVCache:
    """Rotated keys and values of every layer, allocated once: [B, K, max_length, D] each, with more key heads in layers
    whose second map has its own keys."""

    def __init__(self, decoder: nn.Module, batch: int, max_length: int, dtype: torch.dtype, device: torch.device | str):
        shapes = [layer.self_attn.shape for layer in decoder.layers]
        modules = [layer.self_attn.differential for layer in decoder.layers]
        key_heads = [
            shape.num_kv_heads if module is None else module.num_cached_key_heads
            for shape, module in zip(shapes, modules, strict=True)
        ]
        self.keys, self.values = (
            [
                torch.empty(batch, count, max_length, shape.head_dim, dtype=dtype, device=device)
                for count, shape in zip(counts, shapes, strict=True)
            ]
            for counts in (key_heads, [shape.num_kv_heads for shape in shapes])
        )
        self.reset()

    def reset(self):
        """Empty the cache, which then grows from the first position again."""
        self.length = 0  # tokens in the cache of every layer; the decoder advances it after its last layer
        self.cache_position: Tensor | None = None  # [1], see `make_static`

    def make_static(self, cache_position: Tensor):
        """Switch to static shapes for a CUDA graph: from now on write one token at a time at position `cache_position`
        [1] and return the whole buffers. Call `zero_unwritten` first: masked entries must be finite."""
        self.cache_position = cache_position

    def zero_unwritten(self):
        """Zero all entries that hold no token yet."""
        for t in (*self.keys, *self.values):
            t[:, :, self.length :] = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, K, L, D] to a layer's cache, in its dtype; returns all its keys and values so far."""
        keys, values = self.keys[layer], self.values[layer]
        if self.cache_position is not None:
            at = self.cache_position
            return keys.index_copy_(2, at, k.to(keys.dtype)), values.index_copy_(2, at, v.to(values.dtype))
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class StepDecoder:
    """Decodes token by token on a growing cache; each call returns logits [B, V]."""

    def __init__(self, model: "VisionLanguageModel", cache: KVCache, mask: PrefixMask, positions: Tensor):
        """`mask` and `positions` [B, L] are those of the prompts, which are already in the cache."""
        self.model, self.cache, self.mask, self.positions = model, cache, mask, positions[:, -1:]

    def __call__(self, token: Tensor) -> Tensor:
        """Logits after one more token [B] per row."""
        self.positions, self.mask = self.positions + 1, self.mask.extend_by_one()
        return self.run(token)

    def run(self, token: Tensor) -> Tensor:
        decoder = self.model.model.language_model
        hidden = decoder(decoder.embed(token[:, None]), self.positions, self.mask, self.cache, keep_last=1)
        return self.model.head(hidden[:, -1])


class StaticStepDecoder(StepDecoder):
    """Decodes on tensors of fixed shape and address: on CUDA, a graph captured at the first token is replayed for the
    others. A step never synchronises with the device."""

    def __init__(self, model: "VisionLanguageModel", cache: KVCache, mask: PrefixMask, positions: Tensor):
        super().__init__(model, cache, mask, positions)
        self.start, self.positions = mask.start.clone(), self.positions.clone()
        self.cache_position = torch.full((1,), cache.length - 1, device=positions.device)
        cache.zero_unwritten()
        cache.make_static(self.cache_position)
        self.token = torch.zeros(len(positions), dtype=torch.long, device=positions.device)
        self.graph, self.logits, self.lora_factors = None, None, []

    def restart(self, mask: PrefixMask, positions: Tensor):
        """Continue other prompts, which are already in the cache, with the same graph."""
        self.start.copy_(mask.start)
        self.positions.copy_(positions[:, -1:])
        self.cache_position.fill_(self.cache.length - 1)
        self.cache.make_static(self.cache_position)
        if self.lora_factors:  # the graph reads the tensors that `cast_lora` had made before the capture
            torch._foreach_copy_(self.lora_factors, cast_factors(self.model))

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.positions.add_(1)
        self.cache_position.add_(1)
        if self.graph is not None:
            self.graph.replay()
        elif token.device.type == "cuda":
            self.capture()
        else:
            self.logits = self.run(self.token)
        return self.logits

    def capture(self):
        """Record the graph. Its first replay also gives the logits of this token, since writing a position twice is
        harmless."""
        caches_casts = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # its casts end with the autocast block, the graph may live on
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # allocates what cannot be allocated while a graph is recorded
                self.run(self.token)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self.run(self.token)
        finally:
            torch.set_autocast_cache_enabled(caches_casts)
        self.lora_factors = cast_factors(self.model)
        self.graph.replay()

    def run(self, token: Tensor) -> Tensor:
        self.mask = StepMask(self.start, self.cache_position)
        return super().run(token)


class GraphCache:
    """Keeps the KV cache and the CUDA graph of one `generate` call for the next, which replays the graph if it has the
    same number of rows and the same length, rounded up to a multiple of LENGTH_STEP. Without CUDA nothing is kept.

    It belongs to one model, whose weights may be updated in place. Make a new one after any other change to the model:
    an adapter was added, merged or switched, lambda was set to 0, or the model was moved.
    """

    LENGTH_STEP = 64

    def __init__(self):
        self.key, self.cache, self.decoder = None, None, None

    def kv_cache(self, model: "VisionLanguageModel", rows: int, length: int, like: Tensor) -> KVCache:
        """An empty KV cache for `rows` rows of at most `length` tokens, in the dtype and on the device of `like`: the
        kept one if it fits."""
        length = math.ceil(length / self.LENGTH_STEP) * self.LENGTH_STEP
        kind = like.device.type
        casts = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = rows, length, like.dtype, like.device, casts, torch.is_inference_mode_enabled()
        if self.decoder is None or key != self.key:
            self.key, self.decoder, self.cache = key, None, None  # free the old one first
            self.cache = KVCache(model.model.language_model, rows, length, like.dtype, like.device)
        self.cache.reset()
        return self.cache

    def step_decoder(self, model: "VisionLanguageModel", mask: PrefixMask, positions: Tensor) -> StaticStepDecoder:
        """The decoder for prompts that are already in the cache."""
        if self.decoder is None:
            self.decoder = StaticStepDecoder(model, self.cache, mask, positions)
        else:
            self.decoder.restart(mask, positions)
        return self.decoder


class LongRopeStepDecoder(StepDecoder):
    """Decodes with longrope: when a row reaches `limit` positions, the frequencies of all its tokens change, so the
    whole sequence is run again."""

    def __init__(
        self, model: "VisionLanguageModel", cache: KVCache, mask: PrefixMask, positions: Tensor, x: Tensor, limit: int
    ):
        """x [B, L, C]: embeddings of the prompts."""
        super().__init__(model, cache, mask, positions)
        self.limit, self.steps = limit, [(x, positions)]

    def run(self, token: Tensor) -> Tensor:
        decoder = self.model.model.language_model
        step = decoder.embed(token[:, None]), self.positions
        self.steps.append(step)
        if bool((self.positions == self.limit).any()):
            step, self.cache.length = tuple(torch.cat(parts, dim=1) for parts in zip(*self.steps, strict=True)), 0
        return self.model.head(decoder(*step, self.mask, self.cache, keep_last=1)[:, -1])


def choose_step_decoder(device: str) -> type[StepDecoder]:
    """The step decoder for a device type: static on CUDA, where a graph saves the launches of the kernels, which take
    longer than running them."""
    return StaticStepDecoder if device == "cuda" else StepDecoder


# ---- decoders: where standard attention becomes differential
class DecoderAttention(nn.Module):
    """The attention of a decoder layer. A family creates its projections, including `o_proj`, sets `scale` and, if it
    has them, `softcap` and `window`, and implements `project`. `apply_rotary` rotates whole heads."""

    softcap: float | None = None
    window: int | None = None
    apply_rotary: Callable[..., Tensor] = staticmethod(apply_rotary)

    def __init__(self, layer: int, shape: AttentionShape):
        super().__init__()
        self.layer, self.shape = layer, shape
        self.differential = None  # or a DifferentialAttention, see add_differential

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Queries [B, L, H D], keys and values [B, L, K D] of x [B, L, C]."""
        raise NotImplementedError

    def attention_inputs(
        self, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None, keep_last: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor], Attend]:
        """(q, k, v, rotate, attend) of x [B, L, C]: q [B, H, L or keep_last, D] and k [B, K, S, D], both rotated, and v
        [B, K, S, D]; keys and values include those in the cache."""
        q, k, v = (t.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for t in self.project(x))
        if keep_last is not None:
            q = q[:, :, -keep_last:]
        by_halves = self.differential is not None and self.differential.config.rotate_halves
        rotate = partial(apply_rotary_to_halves if by_halves else self.apply_rotary, cos=rotary[0], sin=rotary[1])
        q, k = rotate(q), rotate(k)
        if self.differential is not None:
            k = self.differential.extend_keys(x, k, rotate)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return q, k, v, rotate, Attend(mask, self.scale, self.softcap, self.window)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None, keep_last: int | None = None
    ) -> Tensor:
        """x [B, L, C] -> [B, L, C], or the last `keep_last` positions [B, keep_last, C]."""
        q, k, v, rotate, attend = self.attention_inputs(x, rotary, mask, cache, keep_last)
        if self.differential is None:
            out = attend(q, k, v)
        else:  # a second map, weighted by lambda
            out = self.differential(x, q, k, v, rotate, attend)
        return apply_linears(out.transpose(1, 2).flatten(2), self.o_proj)[0]


def run_layers(
    decoder: nn.Module, x: Tensor, rotary: Rotary, mask: Mask, cache: KVCache | None, keep_last: int | None
) -> Tensor:
    """Embeddings x [B, L, C] -> hidden states after the last norm [B, L, C], or the last `keep_last` of them (None:
    all). The last layer needs keys and values of every position, but queries and MLP only for those it returns."""
    length = x.shape[1]
    for layer in decoder.layers:
        arguments = x, rotary, mask, cache, keep_last if layer is decoder.layers[-1] else None
        recompute = decoder.gradient_checkpointing and decoder.training
        x = checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)
    if cache is not None:
        cache.length += length
    return decoder.norm(x)


# ---- models
@dataclass(frozen=True)
class BatchPlan:
    """Everything about a batch that Python code branches on, computed from the CPU tensors of the collated batch, so
    that the forward pass never synchronises with the device."""

    mask: PrefixMask
    tokens: int  # number of tokens in the batch, without pads
    image_tokens: int
    keep_last: int = 0  # number of last positions of each row needed to predict the labels
    label_indices: Tensor | None = None  # [n], positions that predict a label: indices into flattened [B, keep_last]
    labels: Tensor | None = None  # [n]
    grids: tuple[tuple[int, int], ...] = ()  # rows and columns of the crops of each image, where images have crops

    @property
    def label_count(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    def to(self, device: torch.device | str) -> "BatchPlan":
        """The plan with its tensors on `device`; the copy does not block the CPU."""
        mask, label_indices, labels = self.mask.to(device), self.label_indices, self.labels
        if labels is not None:
            label_indices, labels = torch.stack((label_indices, labels)).to(device, non_blocking=True)
        return replace(self, mask=mask, label_indices=label_indices, labels=labels)


class VisionLanguageBackbone(nn.Module):
    """Tower, projector and decoder under transformers' names. A family sets `config`, `vision_tower`,
    `multi_modal_projector` and `language_model`, and implements `mask` and `positions`."""

    def mask(self, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> PrefixMask:
        """The attention mask of a batch; both arguments [B, L], see `forward`."""
        raise NotImplementedError

    def positions(self, attention_mask: Tensor) -> Tensor:
        """Positions [B, L] of the tokens."""
        raise NotImplementedError

    def plan(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        image_sizes: Tensor | None = None,
        **_: Tensor,
    ) -> BatchPlan:
        """The plan of a batch; arguments as in `VisionLanguageModel.forward`. For CPU tensors it never syncs with a
        device."""
        mask, tokens = self.mask(attention_mask, token_type_ids), int(attention_mask.sum())
        image_tokens = int(self.is_image_token(input_ids).sum())
        plan = BatchPlan(mask, tokens, image_tokens, grids=self.crop_grids(image_sizes))
        if labels is None:
            return plan
        has_label = labels != IGNORED_LABEL
        columns = has_label.any(0)
        first = int(columns.int().argmax()) if bool(columns.any()) else labels.shape[1] - 1
        count = labels.shape[1] - max(first - 1, 0)  # a label is predicted one position before it
        next_labels = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, -count:].flatten()
        label_indices = (next_labels != IGNORED_LABEL).nonzero().squeeze(1)
        return replace(plan, keep_last=count, label_indices=label_indices, labels=next_labels[label_indices])

    def crop_grids(self, image_sizes: Tensor | None) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the crops of each image; () for families whose images have no crops."""
        return ()

    def image_features(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        grids: tuple[tuple[int, int], ...] = (),
    ) -> ImageFeatures:
        """Images [n, 3, S, S] -> projected patch features [n, N, C]; the pixels are cast to the dtype of the tower.
        Families whose images have crops need `image_sizes`, or the `grids` of the batch's plan.

        A frozen tower runs without autocast, whose casts to float32 would only cost time; its features equal those in
        generation. Raises UserError for a decoder alone.
        """
        if self.vision_tower is None:
            raise UserError(DECODER_ALONE_MESSAGE)
        parts = self.vision_tower, self.multi_modal_projector
        trains = any(p.requires_grad for part in parts for p in part.parameters())
        with contextlib.nullcontext() if trains else torch.autocast(pixel_values.device.type, enabled=False):
            return self.encode_images(pixel_values.to(self.vision_tower.dtype), grids or self.crop_grids(image_sizes))

    def encode_images(self, pixel_values: Tensor, grids: tuple[tuple[int, int], ...]) -> ImageFeatures:
        """`image_features` of pixels that already have the dtype of the tower."""
        return self.multi_modal_projector(self.vision_tower(pixel_values))

    def zero_of_trained_parts(self) -> Tensor | float:
        """0, computed from every trainable parameter of tower and projector: without images their gradients are zero
        instead of missing, and DistributedDataParallel would wait for missing ones."""
        parts = [part for part in (self.vision_tower, self.multi_modal_projector) if part is not None]
        return sum(0 * p.flatten()[0] for part in parts for p in part.parameters() if p.requires_grad)

    def is_image_token(self, input_ids: Tensor) -> Tensor:
        """Bool [B, L]: the `<image>` tokens; all False for a decoder alone, which has none."""
        image_token_id = self.config.image_token_id
        return torch.zeros_like(input_ids, dtype=torch.bool) if image_token_id is None else input_ids == image_token_id

    def patch_tokens(self, input_ids: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Bool [B, L]: the image tokens that are patches, row by row."""
        return self.is_image_token(input_ids)

    def embed(self, input_ids: Tensor, image_features: ImageFeatures | None, tokens: int | None = None) -> Tensor:
        """Embeddings [B, L, C] of the tokens, with the image features placed in order at the `<image>` tokens.
        `tokens`: the number of `<image>` tokens; None: count them.

        Raises UserError if the numbers of `<image>` tokens and of features differ.
        """
        is_image = self.is_image_token(input_ids)
        x = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # the id of <image> may be outside the table
        tokens = int(is_image.sum()) if tokens is None else tokens
        if image_features is None:
            if tokens:
                raise UserError("input_ids contain <image> tokens but there are no images: pass pixel_values")
            return x
        lengths = [len(features) for features in image_features]
        if tokens != sum(lengths):
            raise UserError(
                f"input_ids contain {tokens} <image> tokens but the images have {sum(lengths)} features {lengths}: "
                "pass every image of every prompt once"
            )
        if not lengths:
            return x
        flat = torch.cat(tuple(image_features))  # [features of all images, C]
        return x.masked_scatter(is_image[..., None], flat.to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        keep_last: int | None = None,
        image_sizes: Tensor | None = None,
        plan: BatchPlan | None = None,
    ) -> Tensor:
        """Hidden states [B, L, C], or of the last `keep_last` positions; other arguments as in
        `VisionLanguageModel`."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        plan = plan or self.plan(input_ids, attention_mask, token_type_ids, image_sizes=image_sizes)
        if image_features is None and pixel_values is not None:
            image_features = self.image_features(pixel_values, image_sizes, plan.grids)
        x = self.embed(input_ids, image_features, plan.image_tokens)
        if image_features is None and self.training:
            x = x + self.zero_of_trained_parts()
        return self.language_model(x, self.positions(attention_mask), plan.mask, keep_last=keep_last)


@dataclass
class VisionLanguageOutput:
    loss: Tensor | None = None  # scalar float32
    logits: Tensor | None = None  # [B, L or logits_to_keep, V]


class VisionLanguageModel(nn.Module):
    """A backbone with its language-model head. `differential`: a DifferentialConfig, a preset's name, or None."""

    # of the family; has from_pretrained, to_dict, text_config, stop_ids, pad_token_id and learning_rate
    config_class: type
    backbone_class: type[VisionLanguageBackbone]
    lora_targets: tuple[str, ...]  # linear layers of the decoder that get LoRA by default

    def __init__(self, config: "PaliGemmaConfig | Phi3Config", differential: DifferentialConfig | str | None = None):
        super().__init__()
        self.config = config
        self.model = self.backbone_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.apply(self._init_weights)
        self.tie_weights()
        if differential is not None:
            add_differential(self, differential)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def tie_weights(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight

    # ---- loading and saving
    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        differential: DifferentialConfig | str | None = None,
    ) -> "VisionLanguageModel":
        """Load a hub id, a model folder, or a run folder (its base model with its LoRA adapter).

        A folder with differential attention brings its own configuration; for other folders `differential` (a
        DifferentialConfig or a preset's name) adds it at its initial values, always in float32. The model is built on
        the meta device and filled from memory-mapped safetensors, without a second copy of the weights.
        Raises UserError, one line with file and key, for anything that does not fit, and for float16.
        """
        if dtype == torch.float16:
            raise UserError("dtype float16: activations overflow in it: use bfloat16 or float32")
        base, adapter = resolve_run(path_or_hub_id)
        folder = locate(base)
        stored = find_differential(folder, adapter)
        if differential is None and stored is not None:
            differential = stored_differential(stored)
        config = cls.config_class.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
        load_weights(model, folder, dtype, device, tied=config.tie_word_embeddings)
        model.tie_weights()
        model.name_or_path = base
        if differential is not None:
            add_differential(model, as_config(differential))
        if adapter is not None:
            attach_adapter(model, adapter)
        if stored is not None:
            load_differential(model, stored)
        return model.eval()

    def save_pretrained(self, folder: str | Path):
        """Write config.json and safetensors. transformers loads a saved standard model with equal logits.

        Differential attention is saved in a separate file, with a model_type and weight file names that make
        transformers refuse the folder instead of loading it as a standard model. Raises UserError for a model with an
        adapter or 4-bit weights, since nothing could load the folder.
        """
        state = self.state_dict()
        if any(".lora_" in name or ".base_layer." in name or ".modules_to_save." in name for name in state):
            raise UserError(
                "save_pretrained: the model has an adapter: merge it (adapters.merge), or keep its run folder"
            )
        if getattr(self, "is_loaded_in_4bit", False):
            raise UserError("save_pretrained: the weights are in 4 bits: keep the model that they were made of")
        save_model_folder(state, self.config.to_dict(), folder, partial(save_differential, self))

    def gradient_checkpointing_enable(self, enabled: bool = True):
        """Recompute layers in the backward pass: less memory, same results."""
        self.model.language_model.gradient_checkpointing = enabled
        if self.model.vision_tower is not None:
            self.model.vision_tower.encoder.gradient_checkpointing = enabled

    # ---- forward pass and loss
    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | None = None,
        image_features: ImageFeatures | None = None,
        image_sizes: Tensor | None = None,
        plan: BatchPlan | None = None,
    ) -> VisionLanguageOutput:
        """`logits` or `loss` of a batch.

        input_ids, attention_mask (1 token, 0 pad; None: no pads), token_type_ids (1 suffix; None: all prefix, which
        PaliGemma refuses with labels), labels (-100: no loss): [B, L]; pixel_values and image_sizes: the images of
        all prompts in order, as the processor returns them, or their image_features instead. Without labels: logits
        [B, L, V], or of the last `logits_to_keep` positions. With labels: the loss, the float32 mean over all label
        tokens of the batch (the head runs on their positions only); logits only if `logits_to_keep` is given.
        `plan`: what `model.plan` returns for the batch; None: the plan is computed here, which blocks the CPU if the
        tensors are on a GPU. Raises UserError for `logits_to_keep` below 1.
        """
        if logits_to_keep is not None and logits_to_keep < 1:
            raise UserError(f"logits_to_keep {logits_to_keep}: must be at least 1, or None for all positions")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        plan = plan or self.model.plan(input_ids, attention_mask, token_type_ids, labels, image_sizes=image_sizes)
        hidden = self.model(
            input_ids,
            pixel_values,
            attention_mask,
            token_type_ids,
            image_features=image_features,
            keep_last=logits_to_keep if labels is None else max(plan.keep_last, logits_to_keep or 0),
            image_sizes=image_sizes,
            plan=plan,
        )
        loss = logits = None
        if labels is not None:
            loss = self.label_loss(hidden, plan)
        if labels is None or logits_to_keep is not None:
            logits = self.head(hidden if logits_to_keep is None else hidden[:, -logits_to_keep:])
        return VisionLanguageOutput(loss, logits)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C]."""
        return apply_softcap(apply_linears(hidden, self.lm_head)[0], self.config.text_config.final_logit_softcapping)

    def label_loss(self, hidden: Tensor, plan: BatchPlan) -> Tensor:
        """Mean cross entropy, float32, of hidden states [B, at least keep_last, C] at each position whose next
        token has a label."""
        softcap = self.config.text_config.final_logit_softcapping
        hidden = hidden[:, -plan.keep_last :].flatten(0, 1).index_select(0, plan.label_indices)
        return head_loss(hidden, self.lm_head, plan.labels, softcap)

    # ---- generation
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        image_features: ImageFeatures | None = None,
        token_type_ids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        plan: BatchPlan | None = None,
        graphs: GraphCache | None = None,
    ) -> Tensor:
        """Continue prompts [B, L], padded on the left -> ids [B, L + new], with pad tokens after the eos of a row.

        Greedy at temperature 0, otherwise sampled from the smallest set of tokens whose probability reaches `top_p`.
        Stops when every row has its eos. `token_type_ids` is accepted so that `model.generate(**batch)` works, but
        must not mark a suffix. `plan` as in `forward`; calls on a GPU with the same `graphs` share its CUDA graph.
        Raises UserError for empty prompts, those that `check_prompts` refuses, a negative temperature, and NaN logits.
        """
        if max_new_tokens < 0:
            raise UserError(f"max_new_tokens {max_new_tokens}: must be at least 0")
        if not input_ids.numel():
            raise UserError(
                f"input_ids of shape {tuple(input_ids.shape)} is empty: give a prompt of at least one token"
            )
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = input_ids.shape[1] + max_new_tokens
        check_prompts(attention_mask, token_type_ids, length, self.config.text_config.max_position_embeddings)
        if temperature < 0:
            raise UserError(f"temperature {temperature}: must be at least 0")
        plan = plan or self.model.plan(input_ids, attention_mask, image_sizes=image_sizes)
        if image_features is None and pixel_values is not None:
            image_features = self.model.image_features(pixel_values, image_sizes, plan.grids)
        x = self.model.embed(input_ids, image_features, plan.image_tokens)
        positions = self.model.positions(attention_mask)
        if graphs is None or choose_step_decoder(x.device.type) is StepDecoder:
            graphs, cache = None, KVCache(self.model.language_model, len(x), length, x.dtype, x.device)
        else:
            cache = graphs.kv_cache(self, len(x), length, like=x)

        def choose(logits: Tensor) -> Tensor:
            return sample(logits, temperature, top_p, generator)

        with cast_lora(lora_layers(self)):
            new_ids = self.continue_prompts(x, positions, plan.mask, cache, max_new_tokens, choose, graphs)
        return torch.cat([input_ids, *(token[:, None] for token in new_ids)], dim=1)

    def continue_prompts(
        self,
        x: Tensor,
        positions: Tensor,
        mask: PrefixMask,
        cache: KVCache,
        max_new_tokens: int,
        choose: Callable[[Tensor], Tensor],
        graphs: GraphCache | None,
    ) -> list[Tensor]:
        """The list of new tokens [B] that continue embedded prompts x [B, L, C] at positions [B, L]. The cache is
        empty; with `graphs`, it comes from `graphs.kv_cache`.

        `choose(logits)` picks the next tokens [B] from logits [B, V]. Raises UserError for NaN logits.
        """
        logits = self.head(self.model.language_model(x, positions, mask, cache, keep_last=1)[:, -1])
        if bool(logits.isnan().any()):  # memory-mapped weights are not checked when they are loaded
            raise UserError(f"{getattr(self, 'name_or_path', 'the model')}: gives NaN: its weights are damaged")
        limit, last = getattr(self.config.text_config, "short_rope_limit", None), positions[:, -1]
        if limit is not None and bool(((last < limit) & (last + max_new_tokens > limit)).any()):
            next_logits = LongRopeStepDecoder(self, cache, mask, positions, x, limit)
        elif graphs is not None:
            next_logits = graphs.step_decoder(self, mask, positions)
        else:
            next_logits = choose_step_decoder(x.device.type)(self, cache, mask, positions)
        new_ids, finished = [], torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for step in range(max_new_tokens):
            token = choose(logits).masked_fill(finished, self.config.pad_token_id)
            new_ids.append(token)
            for stop_id in self.config.stop_ids:
                finished = finished | (token == stop_id)
            if step + 1 == max_new_tokens or bool(finished.all()):
                break
            logits = next_logits(token)
        return new_ids


def check_prompts(attention_mask: Tensor, token_type_ids: Tensor | None, length: int, limit: int) -> None:
    """Raise UserError for prompts that `generate` cannot continue: a row that ends in a pad, a suffix, or a `length`
    (prompt and answer) above the model's `limit` of positions."""
    if not bool(attention_mask[:, -1].all()):
        raise UserError("generate needs prompts padded on the left, but the last token of a row is a pad")
    if token_type_ids is not None and bool(token_type_ids.any()):
        raise UserError("generate takes prompts only, but token_type_ids mark a suffix: leave it out of the batch")
    if length > limit:
        raise UserError(
            f"the sequence needs {length} positions but the model has {limit}: shorten the prompt, lower "
            "max_new_tokens, or use fewer or smaller images"
        )


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens [B] from logits [B, V]; nucleus sampling (Holtzman et al., arXiv 1904.09751), greedy at temperature
    0."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)  # the first token always stays
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
