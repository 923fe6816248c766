"""What every vision-language model here shares: loading and saving, embedding of images, forward pass, loss, KV cache
and generation. A family brings its decoder and tower, its mask and its positions.

B batch, L sequence, K key/value heads, D head dim, C hidden size, n images, N image tokens per image, V vocabulary.
"""

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import attach_adapter, find_differential, load_differential, save_differential, stored_differential
from attention import PrefixMask, StepMask
from checkpoint import load_weights, locate, resolve_run, save_model_folder
from config_fields import IGNORED_LABEL
from differential_attention import DifferentialConfig, add_differential, as_config
from errors import UserError
from fused_ops import apply_linears, apply_softcap, cast_lora, head_loss

ImageFeatures = Tensor | tuple[Tensor, ...]  # [n, N, C], or [N, C] of each image where N differs


class KVCache:
    """Rotated keys and values of every layer, allocated once: [B, K, max_length, D] each, with more key heads where the
    second map of a layer has keys of its own."""

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
        self.length = 0  # tokens in the cache of every layer; the decoder advances it after its last layer
        self.place: Tensor | None = None  # [1], see `fix`

    def fix(self, place: Tensor):
        """From now on write one token at a time, at `place` [1], and return the whole cache: tensors of one shape and
        address, which a CUDA graph needs. What has not been written is zero."""
        self.place = place
        for t in (*self.keys, *self.values):
            t[:, :, self.length :] = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, K, L, D] to a layer's cache; returns all its keys and values up to here."""
        if self.place is not None:
            keys, values = self.keys[layer], self.values[layer]
            return keys.index_copy_(2, self.place, k), values.index_copy_(2, self.place, v)
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class StepDecoder:
    """The logits [B, V] of one token after another, on a cache that grows."""

    def __init__(self, model: "VisionLanguageModel", cache: KVCache, mask: PrefixMask, positions: Tensor):
        """`mask` and `positions` [B, L] are those of the prompts, which are in the cache."""
        self.model, self.cache, self.mask, self.positions = model, cache, mask, positions[:, -1:]

    def __call__(self, token: Tensor) -> Tensor:
        """Logits after one more token [B] of every row."""
        self.positions, self.mask = self.positions + 1, self.mask.extend_by_one()
        return self.run(token)

    def run(self, token: Tensor) -> Tensor:
        decoder = self.model.model.language_model
        hidden = decoder(decoder.embed(token[:, None]), self.positions, self.mask, self.cache, rows=1)
        return self.model.head(hidden[:, -1])


class FixedStepDecoder(StepDecoder):
    """The same on tensors of fixed shape and address, so that on CUDA one graph, captured at the first token, is
    replayed for all others. Nothing in it waits for the device."""

    def __init__(self, model: "VisionLanguageModel", cache: KVCache, mask: PrefixMask, positions: Tensor):
        super().__init__(model, cache, mask, positions)
        self.start, self.positions = mask.start, self.positions.clone()
        self.place = torch.full((1,), cache.length - 1, device=positions.device)
        cache.fix(self.place)
        self.token = torch.zeros(len(positions), dtype=torch.long, device=positions.device)
        self.graph, self.logits = None, None

    def __call__(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.positions.add_(1)
        self.place.add_(1)
        if self.graph is not None:
            self.graph.replay()
        elif token.device.type == "cuda":
            self.capture()
        else:
            self.logits = self.run(self.token)
        return self.logits

    def capture(self):
        """Record the graph, whose first run also gives the logits of this token: a run at one place can be repeated."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # allocates what cannot be allocated while a graph is recorded
            self.run(self.token)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self.run(self.token)
        self.graph.replay()

    def run(self, token: Tensor) -> Tensor:
        self.mask = StepMask(self.start, self.place)
        return super().run(token)


class BorderStepDecoder(StepDecoder):
    """The same for rotary factors that change at a border: a row that crosses it is rotated by other factors from its
    first token on, so the cache is computed again."""

    def __init__(
        self, model: "VisionLanguageModel", cache: KVCache, mask: PrefixMask, positions: Tensor, x: Tensor, border: int
    ):
        """x [B, L, C]: embeddings of the prompts."""
        super().__init__(model, cache, mask, positions)
        self.border, self.sequence = border, (x, positions)

    def run(self, token: Tensor) -> Tensor:
        decoder = self.model.model.language_model
        step = decoder.embed(token[:, None]), self.positions
        self.sequence = tuple(torch.cat(pair, dim=1) for pair in zip(self.sequence, step, strict=True))
        if bool((self.positions == self.border).any()):
            step, self.cache.length = self.sequence, 0
        return self.model.head(decoder(*step, self.mask, self.cache, rows=1)[:, -1])


def choose_step_decoder(device: str) -> type[StepDecoder]:
    """How tokens are decoded on a type of device: on a GPU launches take longer than the work of a step."""
    return StepDecoder if device == "cpu" else FixedStepDecoder


@dataclass(frozen=True)
class BatchPlan:
    """What the host needs to know of a batch, made of tensors on the CPU: nothing is read back from the device."""

    mask: PrefixMask
    tokens: int  # of all rows, without pads
    image_tokens: int
    label_rows: int = 0  # of the last positions, how many are needed to predict the labels
    predictors: Tensor | None = None  # [n] of the positions [B, label_rows], flattened, those that predict a label
    labels: Tensor | None = None  # [n]

    @property
    def label_count(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    def to(self, device: torch.device | str) -> "BatchPlan":
        """The plan with its tensors on `device`; the host is not made to wait."""
        mask, predictors, labels = self.mask.to(device), self.predictors, self.labels
        if labels is not None:
            predictors, labels = torch.stack((predictors, labels)).to(device, non_blocking=True)
        return replace(self, mask=mask, predictors=predictors, labels=labels)


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
        **_,
    ) -> BatchPlan:
        """The plan of a batch, arguments as in `VisionLanguageModel.forward`; of tensors on a CPU it makes no device
        wait."""
        mask, tokens = self.mask(attention_mask, token_type_ids), int(attention_mask.sum())
        image_tokens = int((input_ids == self.config.image_token_id).sum())
        if labels is None:
            return BatchPlan(mask, tokens, image_tokens)
        has_label = labels != IGNORED_LABEL
        columns = has_label.any(0)
        first = int(columns.int().argmax()) if bool(columns.any()) else labels.shape[1] - 1
        rows = labels.shape[1] - max(first - 1, 0)  # a label is predicted one position before it
        next_labels = F.pad(labels, (0, 1), value=IGNORED_LABEL)[:, -rows:].flatten()
        predictors = (next_labels != IGNORED_LABEL).nonzero().squeeze(1)
        return BatchPlan(mask, tokens, image_tokens, rows, predictors, next_labels[predictors])

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> ImageFeatures:
        """Images [n, 3, S, S] -> projected patch features [n, N, C]; the pixels are cast to the dtype of the tower.
        `image_sizes` is for families whose images have crops.

        A frozen tower runs without autocast, whose casts to float32 would only cost time: its features are those of
        generation.
        """
        dtype, tower = self.vision_tower.post_layernorm.weight.dtype, (self.vision_tower, self.multi_modal_projector)
        trains = any(p.requires_grad for part in tower for p in part.parameters())
        with contextlib.nullcontext() if trains else torch.autocast(pixel_values.device.type, enabled=False):
            return self.multi_modal_projector(self.vision_tower(pixel_values.to(dtype)))

    def zero_of_trained_parts(self) -> Tensor | float:
        """0, computed from every parameter of tower and projector that trains: without images they get a gradient of
        zeros instead of none, for which DistributedDataParallel would wait."""
        parts = [part for part in (self.vision_tower, self.multi_modal_projector) if part is not None]
        return sum(0 * p.flatten()[0] for part in parts for p in part.parameters() if p.requires_grad)

    def patch_tokens(self, input_ids: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Bool [B, L]: the image tokens that are patches, row by row."""
        return input_ids == self.config.image_token_id

    def embed(self, input_ids: Tensor, image_features: ImageFeatures | None, tokens: int | None = None) -> Tensor:
        """Embeddings [B, L, C] of the tokens, with the image features at the `<image>` tokens, in order, of which there
        are `tokens`; None: they are counted.

        Raises UserError where the numbers of `<image>` tokens and of features differ.
        """
        is_image = input_ids == self.config.image_token_id
        x = self.language_model.embed(input_ids.masked_fill(is_image, 0))  # the id of <image> may be outside the table
        tokens = int(is_image.sum()) if tokens is None else tokens
        if image_features is None:
            if tokens:
                raise UserError("input_ids contain <image> tokens but there are no images: pass pixel_values")
            return x
        flat = torch.cat(tuple(image_features))  # [features of all images, C]
        if tokens != len(flat):
            raise UserError(
                f"input_ids contain {tokens} <image> tokens but the images have {len(flat)} features "
                f"({len(image_features)} x {len(image_features[0])}): pass every image of every prompt once"
            )
        return x.masked_scatter(is_image[..., None], flat.to(x.dtype))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        image_features: ImageFeatures | None = None,
        rows: int | None = None,
        image_sizes: Tensor | None = None,
        plan: BatchPlan | None = None,
    ) -> Tensor:
        """Hidden states [B, L, C], or of the last `rows` positions; other arguments as in `VisionLanguageModel`."""
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        plan = plan or self.plan(input_ids, attention_mask, token_type_ids)
        if image_features is None and pixel_values is not None:
            image_features = self.image_features(pixel_values, image_sizes)
        x = self.embed(input_ids, image_features, plan.image_tokens)
        if image_features is None and self.training:
            x = x + self.zero_of_trained_parts()
        return self.language_model(x, self.positions(attention_mask), plan.mask, rows=rows)


@dataclass
class VisionLanguageOutput:
    loss: Tensor | None = None  # scalar float32
    logits: Tensor | None = None  # [B, L or logits_to_keep, V]


class VisionLanguageModel(nn.Module):
    """A backbone with its language-model head. `differential`: a DifferentialConfig, a preset's name, or None."""

    config_class: type  # of the family; has from_pretrained, to_dict and learning_rate
    backbone_class: type[VisionLanguageBackbone]
    lora_targets: tuple[str, ...]  # linear layers of the decoder that get LoRA by default

    def __init__(self, config, differential: DifferentialConfig | str | None = None):
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

        A folder with differential attention brings its own configuration; elsewhere `differential` (a
        DifferentialConfig or a preset's name) adds it at its initial values, in float32 whatever `dtype` is. The model
        is built on the meta device and filled from memory-mapped safetensors: there is no second copy of the weights.
        Raises UserError, one line with file and key, for anything that does not fit.
        """
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
        """Write config.json and safetensors. transformers loads a standard model back with equal logits.

        Differential attention is saved in a file of its own, with a model_type and names of the weight files that make
        transformers refuse the folder instead of loading it as a standard model. Raises UserError for a model with an
        adapter or 4-bit weights, whose folder nothing could load.
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
        PaliGemma refuses beside labels), labels (-100: no loss): [B, L]; pixel_values and image_sizes: the images of
        all prompts in order, as the processor returns them, or instead their image_features. Without labels: logits
        [B, L, V], or of the last `logits_to_keep` positions. With labels: the loss, the float32 mean over all label
        tokens of the batch, for which the head runs on their positions only; logits only if `logits_to_keep` is given.
        `plan`: what `model.plan` returns for the batch; without it the host makes it now, and waits for a device that
        holds the tensors.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        plan = plan or self.model.plan(input_ids, attention_mask, token_type_ids, labels)
        rows = logits_to_keep if labels is None else max(plan.label_rows, logits_to_keep or 0)
        hidden = self.model(
            input_ids, pixel_values, attention_mask, token_type_ids, image_features, rows, image_sizes, plan
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
        """Mean cross entropy, float32, of hidden states [B, at least label_rows, C] at each position whose next token
        has a label."""
        softcap = self.config.text_config.final_logit_softcapping
        rows = hidden[:, -plan.label_rows :].flatten(0, 1).index_select(0, plan.predictors)
        return head_loss(rows, self.lm_head, plan.labels, softcap)

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
    ) -> Tensor:
        """Continue prompts [B, L], padded on the left -> ids [B, L + new], with pad tokens after the eos of a row.

        Greedy at temperature 0, otherwise sampled from the smallest set of tokens whose probability reaches `top_p`.
        Stops when every row has its eos. `token_type_ids` is accepted for `model.generate(**batch)`: a prompt is all
        prefix. `plan` as in `forward`. Raises UserError for a row that ends in a pad, a suffix, too many positions, and
        NaN logits.
        """
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if not bool(attention_mask[:, -1].all()):
            raise UserError("generate needs prompts padded on the left, but the last token of a row is a pad")
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise UserError("generate takes prompts only, but token_type_ids mark a suffix: leave it out of the batch")
        batch, length = input_ids.shape
        limit = self.config.text_config.max_position_embeddings
        if length + max_new_tokens > limit:
            raise UserError(
                f"the sequence needs {length + max_new_tokens} positions but the model has {limit}: use fewer or "
                "smaller images"
            )
        if image_features is None and pixel_values is not None:
            image_features = self.model.image_features(pixel_values, image_sizes)
        decoder = self.model.language_model
        plan, positions = plan or self.model.plan(input_ids, attention_mask), self.model.positions(attention_mask)
        x = self.model.embed(input_ids, image_features, plan.image_tokens)
        cache = KVCache(decoder, batch, length + max_new_tokens, x.dtype, x.device)
        border = getattr(self.config.text_config, "rope_border", None)

        new_ids, finished = [], torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        with cast_lora(self):
            logits = self.head(decoder(x, positions, plan.mask, cache, rows=1)[:, -1])
            if bool(logits.isnan().any()):  # memory-mapped weights are not read when they are loaded
                raise UserError(f"{getattr(self, 'name_or_path', 'the model')}: gives NaN: its weights are damaged")
            if border is None:
                next_logits = choose_step_decoder(x.device.type)(self, cache, plan.mask, positions)
            else:
                next_logits = BorderStepDecoder(self, cache, plan.mask, positions, x, border)
            for step in range(max_new_tokens):
                token = sample(logits, temperature, top_p, generator)
                token = token.masked_fill(finished, self.config.pad_token_id)
                new_ids.append(token)
                for stop_id in self.config.stop_ids:
                    finished = finished | (token == stop_id)
                if step + 1 == max_new_tokens or bool(finished.all()):
                    break
                logits = next_logits(token)
        return torch.cat([input_ids, *(token[:, None] for token in new_ids)], dim=1)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Next tokens [B] of logits [B, V]; nucleus sampling (Holtzman et al., arXiv 1904.09751), greedy at temperature
    0."""
    if temperature <= 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0.0)  # the first token always stays
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
