"""Differential attention inside a pretrained attention layer: the module, the ways to make its second map, the presets.

Standard attention weights its values by one softmax map. Differential attention subtracts a second map, weighted by a
learnable lambda: (A1 - lambda A2) v (Differential Transformer, arXiv 2410.05258). `DifferentialAttention` below is the
default, `split`, which computes the function of the pretrained layer before the first update.

B batch, L queries, S keys, H query heads, K key/value heads, D head dim, C hidden size, r rank, R second queries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from attention_formula import blend
from errors import UserError
from files import check_ranges

LAMBDA_MAX = 0.9  # upper bound of a normalised lambda: gamma is at most 9
SEED_STRIDE = 1_000_003  # runs with neighbouring seeds share no layer seeds
VISION_SEED_OFFSET = 500_000
MAX_SEED = (1 << 31) - 1
VECTOR_STD = 0.1  # initial std of V1's lambda vectors (arXiv 2410.05258)
LAMBDA_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
NORM_EPS = 1e-5  # of the head norm (arXiv 2410.05258)


# the rotary embedding of [B, heads, L, D]; a host that normalises its queries first also has `rotate.query(projected)`
Rotate = Callable[[Tensor], Tensor]
Queries = tuple[Tensor, Tensor | None, Tensor, Tensor]  # q1, q2, k, v as `attend.blend` takes them


class AttentionShape(NamedTuple):
    """Sizes of the attention layer that a differential module is added to."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int | None = None  # number of leading dims of a head that are rotated; None: all
    has_rope_factors: bool = False  # longrope: each frequency has its own factor


class DifferentialAttention(nn.Module):
    """What differential attention adds to one attention layer, and its forward pass. This class is the preset `split`:

        q2  = q1 + rotate(x A^T B^T)      A = second_down [r, C], B = second_up [H D, r], which starts at 0
        out = o1 + gamma (o1 - o2)        o1 = softmax(scale q1 k^T) v, o2 = softmax(scale q2 k^T) v
        gamma = lambda / (1 - lambda)     the rows of the blended map sum to 1

    The preset is called `split` because the query is split into two; no head is halved.
    With B = 0 the queries are equal, and so are the outputs: the layer computes the pretrained function. Subclasses
    make the second map in other ways. All parameters are float32 masters, even after `model.to(bfloat16)`.
    """

    trainable: tuple[str, ...] = ("second_down", "second_up")  # in addition to lambda and the gain of the head norm

    def __init__(self, config: "DifferentialConfig", shape: AttentionShape, tower: str, layer: int, query: nn.Linear):
        """`config`: resolved; `tower`: "text" or "vision"; `query`: the layer's pretrained query projection.

        Raises UserError where the method does not fit the shape. Use `make_differential` to get the class of a config.
        """
        super().__init__()
        self.config, self.shape, self.tower = config, shape, tower
        self.check_shape()
        scheduled = lambda_init_of(layer + config.depth_offset)
        self.lambda_init = scheduled if config.lambda_init is None else config.lambda_init
        # progress of training, 0 to 1: a tensor, so that compiled code does not depend on its value
        self.register_buffer("progress", torch.zeros(1), persistent=False)
        seed = config.seed * SEED_STRIDE + VISION_SEED_OFFSET * (tower == "vision") + layer
        generator = torch.Generator().manual_seed(seed)
        self.add_parameters(generator, query)
        self.add_lambda(generator)
        if config.norm == "head":
            self.norm_gain = nn.Parameter(torch.ones(shape.head_dim * shape.num_heads // self.num_out_heads))
        self.to(query.weight.device, torch.float32)
        names = trainable_names(config)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, attend: Callable) -> Tensor:
        """Outputs of the heads before the output projection: [B, H, L, D], or [B, H / 2, L, 2 D] for adjacent pairs.

        x [B, >= L, C]: input of the layer; q [B, H, L, D] and k, v [B, K, S, D]: what the host layer would pass to
        its attention, rotated and with cached keys and values; keys as `extend_keys` returns them. `rotate(t)` is the
        host's rotary embedding of t [B, heads, L, D]; `attend(q, k, v)` computes its attention by one map and
        `attend.blend(q1, q2, k, v, weight, normalised)` by two (see `attention.Attend`).
        """
        x = x[:, -q.shape[2] :]  # the last decoder layer computes the last queries only
        attend = self.rescale(attend)
        q1, q2, k, v = self.two_queries(x, q, k, v, rotate)
        lambda_ = self.current_lambda(x)
        if self.config.combine == "normalised":
            gamma = lambda_ / (1 - lambda_)
            out = attend.blend(q1, q2, k, v, gamma, normalised=True)  # o1 + gamma (o1 - o2)
        elif self.config.combine == "subtract":
            out = attend.blend(q1, q2, k, v, lambda_, normalised=False)  # o1 - lambda o2
        else:  # "replace", a control
            out = attend(q2, k, v)
        return self.head_norm(out)

    def two_queries(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Queries:
        """(q1, q2, k, v) for `attend.blend`; q2 is None (diagnostics.py relies on it) if the method has one map."""
        return q, q + rotate(self.low_rank(x, self.second_down, self.second_up)), k, v

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """x A^T B^T as heads [B, heads, L, D]."""
        return self.to_heads(F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)))

    def to_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        """Register the parameters of the second map; `query` is the pretrained query projection."""
        rank, width = self.config.rank, self.shape.num_heads * self.shape.head_dim
        self.second_down = uniform_parameter(generator, rank, self.shape.hidden_size)
        self.second_up = nn.Parameter(torch.zeros(width, rank))

    @property
    def has_lambda(self) -> bool:
        """Whether lambda acts on the output."""
        return self.config.has_lambda

    @property
    def num_out_heads(self) -> int:
        """Heads whose outputs are blended: H, or H / 2 where heads are paired."""
        return self.shape.num_heads

    @property
    def map_dim(self) -> int:
        """Head dim of one map's queries and keys."""
        return self.shape.head_dim

    @property
    def num_cached_key_heads(self) -> int:
        """Key heads in the KV cache of the host."""
        return self.shape.num_kv_heads

    def check_shape(self):
        """Raise UserError where the method does not fit `self.shape`."""

    def extend_keys(self, x: Tensor, k: Tensor, rotate: Rotate) -> Tensor:
        """The keys that the host caches for x [B, L, C] and its rotated k [B, K, L, D]: k itself, or [B, 2K, L, D] if
        the method has its own keys."""
        return k

    def rescale(self, attend: Callable) -> Callable:
        """The host's attention with the scale that the maps of this method need."""
        return attend

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep_float32, recurse)

    # ---- lambda and the head norm
    def add_lambda(self, generator: torch.Generator):
        kind, start = self.config.lambda_kind, self.config.lambda_start
        if kind == "vectors":
            for name in LAMBDA_VECTORS:
                drawn = torch.randn(self.map_dim, generator=generator, device="cpu", dtype=torch.float32)
                self.register_parameter(name, nn.Parameter(VECTOR_STD * drawn))
        elif kind == "token":
            self.lambda_token = nn.Parameter(torch.zeros(self.num_out_heads, self.shape.hidden_size))
        elif kind == "scalar" and self.config.combine == "normalised":
            self.lambda_logit = nn.Parameter(torch.full((1,), math.log(start / (1 - start))))
        elif kind == "scalar":
            self.lambda_learn = nn.Parameter(torch.full((1,), float(start)))

    def current_lambda(self, x: Tensor) -> Tensor:
        """The current signed lambda: [1], or [B, num_out_heads, L, 1] if it depends on the tokens x [B, L, C]."""
        config = self.config
        if config.lambda_kind == "vectors":
            pairs = (self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2)
            first, second = ((q * k).sum(-1, keepdim=True).exp() for q, k in pairs)  # autocast would round a matmul
            value = first - second + self.lambda_init
        elif config.lambda_kind == "token":
            logits = F.linear(x, self.lambda_token.to(x.dtype))
            logits = logits.to(torch.promote_types(x.dtype, torch.float32))  # bf16 has steps of 0.004 below 1
            value = logits.sigmoid().transpose(1, 2)[..., None]
        elif config.lambda_kind == "fixed":
            value = torch.full_like(self.progress, config.lambda_start)
        else:
            value = self.lambda_logit.sigmoid() if config.combine == "normalised" else self.lambda_learn
        if config.anneal:  # DEX, arXiv 2505.16333
            value = (1 - self.progress) * self.progress * self.lambda_init + self.progress * value
        if config.lambda_warmup:
            value = value * (self.progress / config.lambda_warmup).clamp(max=1)
        if config.combine == "normalised":  # bounded, but keeps its gradient, so that a lambda at the bound can return
            value = value + (value.clamp(max=LAMBDA_MAX) - value).detach()
        return -value if config.flip_sign else value

    def head_norm(self, out: Tensor) -> Tensor:
        """(1 - lambda_init) RMSNorm(out) of each head, if configured."""
        if self.config.norm == "none":
            return out
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        gain = (1 - self.lambda_init) * self.norm_gain
        return F.rms_norm(wide, out.shape[-1:], gain, eps=NORM_EPS).to(out.dtype)


def uniform_parameter(generator: torch.Generator, *shape: int) -> nn.Parameter:
    """A parameter initialised like nn.Linear's weight [out, in], drawn from `generator`."""
    drawn = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1
    return nn.Parameter(drawn * shape[-1] ** -0.5)


def lambda_init_of(layer: int) -> float:
    """0.8 - 0.6 exp(-0.3 layer) (arXiv 2410.05258, section 2.1), with layers counted from 0 as in its code."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


# ---- other ways of making the second map
class ProjectedQuery(DifferentialAttention):
    """q2 has its own projection, which starts as a copy of the pretrained one (Differential Transformer V2)."""

    trainable = ("second_query",)

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        if not query.weight.is_floating_point():
            raise UserError(f"differential preset {self.config.preset} copies weights, which are quantized: use split")
        self.second_query = nn.Parameter(query.weight.detach().float().clone())
        if query.bias is not None:  # SigLIP has a bias, which both queries use
            self.register_buffer("second_bias", query.bias.detach().float().clone())

    def two_queries(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Queries:
        bias = getattr(self, "second_bias", None)
        weights = (t if t is None else t.to(x.dtype) for t in (self.second_query, bias))
        rotate_query = getattr(rotate, "query", rotate)  # of a host that normalises its queries
        return q, rotate_query(self.to_heads(F.linear(x, *weights))), k, v


class SharedNoiseQuery(ProjectedQuery):
    """A few separate second queries, each shared by `noise_ratio` heads of a key/value group (arXiv 2510.06949)."""

    def check_shape(self):
        group_size = self.shape.num_heads // self.shape.num_kv_heads
        if group_size == 1:
            raise UserError(
                f"differential preset {self.config.preset}: the {self.tower} tower has no grouped queries, whose heads "
                "could share a noise query: use another preset or tower"
            )
        if group_size % min(group_size, self.config.noise_ratio):
            raise UserError(
                f"differential preset {self.config.preset}: {self.config.noise_ratio} heads share a noise query, but "
                f"the key/value groups of the {self.tower} tower have {group_size}: set another noise_ratio"
            )

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        shared = min(self.config.noise_ratio, self.shape.num_heads // self.shape.num_kv_heads)
        width = self.shape.num_heads * self.shape.head_dim // shared
        self.second_query = uniform_parameter(generator, width, self.shape.hidden_size)


class LowRankMap(DifferentialAttention):
    """q2 and k2 are purely low-rank, no factor starts at 0 (DiffLoRA, arXiv 2507.23588); the host caches k2 too."""

    trainable = ("second_down", "second_up", "key_down", "key_up")

    @property
    def num_cached_key_heads(self) -> int:
        return 2 * self.shape.num_kv_heads

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        hidden_size, num_heads, num_kv_heads, head_dim = self.shape[:4]
        self.second_down = uniform_parameter(generator, self.config.rank, hidden_size)
        self.second_up = uniform_parameter(generator, num_heads * head_dim, self.config.rank)
        self.key_down = uniform_parameter(generator, self.config.rank, hidden_size)
        self.key_up = uniform_parameter(generator, num_kv_heads * head_dim, self.config.rank)

    def two_queries(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Queries:
        return q, rotate(self.config.adapter_scale * self.low_rank(x, self.second_down, self.second_up)), k, v

    def extend_keys(self, x: Tensor, k: Tensor, rotate: Rotate) -> Tensor:
        second = rotate(self.config.adapter_scale * self.low_rank(x, self.key_down, self.key_up))
        return torch.cat((k, second), dim=1)


class PairedHeads(DifferentialAttention):
    """V1 (arXiv 2410.05258): two heads form one head of twice the value width, and their maps are subtracted.

    `pairing` "groups" pairs query head g of key/value head 2i with query head g of key/value head 2i + 1, so that every
    query keeps the keys and values that it was pretrained with. "adjacent" pairs query heads 2i and 2i + 1, as the
    official flash code does in a model trained from scratch; with grouped queries, a pair then attends to two key/value
    heads, one of which is new to each query. Without grouped queries both pairings are the same.
    """

    trainable = ()

    @property
    def num_out_heads(self) -> int:
        return self.shape.num_heads // 2

    def check_shape(self):
        if self.shape.num_kv_heads % 2:
            raise UserError(
                f"differential preset {self.config.preset} pairs key/value heads, but the {self.tower} tower has "
                f"{self.shape.num_kv_heads}: use v1_width, which splits each head in two"
            )

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        pass

    def two_queries(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Queries:
        k = torch.cat((k[:, 0::2], k[:, 1::2]), dim=1)
        v = torch.cat((v[:, 0::2], v[:, 1::2]), dim=-1)
        if self.config.pairing == "adjacent":
            return q[:, 0::2], q[:, 1::2], k, v
        q1, q2 = q.unflatten(1, (-1, 2, self.group_size)).unbind(2)  # [B, K / 2, group, L, D] each
        return q1.flatten(1, 2), q2.flatten(1, 2), k, v

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, attend: Callable) -> Tensor:
        return self.restore_heads(super().forward(x, q, k, v, rotate, attend))

    def restore_heads(self, out: Tensor) -> Tensor:
        """Outputs of pairs [B, H / 2, L, 2 D]; with `pairing` "groups" [B, H, L, D], each half at the position of the
        head whose values it holds."""
        if self.config.pairing == "adjacent":
            return out
        out = out.unflatten(1, (-1, self.group_size)).unflatten(-1, (2, -1))  # [B, K / 2, group, L, 2, D]
        return out.permute(0, 1, 4, 2, 3, 5).flatten(1, 3)

    @property
    def group_size(self) -> int:
        return self.shape.num_heads // self.shape.num_kv_heads


class HalvedHeads(DifferentialAttention):
    """The two halves of each head's queries and keys make two maps of half the head dim, with shared values."""

    trainable = ()

    @property
    def map_dim(self) -> int:
        return self.shape.head_dim // 2

    def check_shape(self):
        if self.shape.head_dim % (2 if self.tower == "vision" else 4):
            raise UserError(
                f"differential preset {self.config.preset} cannot split heads of dim {self.shape.head_dim} in two"
            )
        is_partial = self.shape.rotary_dim not in (None, self.shape.head_dim)
        if self.config.rotate_halves and (is_partial or self.shape.has_rope_factors):
            raise UserError(
                f"differential preset {self.config.preset} rotates each half as a head, which a model with longrope or "
                "partly rotated heads does not allow: use v1_width"
            )
        if is_partial and (self.config.halves_cut != "even_odd" or self.shape.rotary_dim % 4):
            raise UserError(
                f"differential preset {self.config.preset} would cut rotary pairs, since {self.shape.rotary_dim} of "
                f"{self.shape.head_dim} dims are rotated: use split"
            )

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        pass

    def two_queries(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Queries:
        return *self.halve(q), torch.cat(self.halve(k), dim=1), v

    def rescale(self, attend: Callable) -> Callable:
        return attend.rescale(math.sqrt(2)) if self.config.halves_scale == "map" else attend

    def halve(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves of t [B, heads, L, D]. Dimension i is rotated together with i + D / 2; these pairs stay whole
        unless the cut is "front_back". SigLIP rotates nothing."""
        if self.tower == "vision" or self.config.halves_cut == "front_back":
            return t.chunk(2, dim=-1)
        pairs = t.unflatten(-1, (2, -1, 2) if self.config.halves_cut == "even_odd" else (2, 2, -1))
        dim = -1 if self.config.halves_cut == "even_odd" else -2
        first, second = (half.flatten(-2) for half in pairs.unbind(dim))
        return first, second


class SingleMap(DifferentialAttention):
    """Methods with a single map: its output o1, or o1 - lambda o2 with o2 computed from o1."""

    trainable = ()

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        pass

    def two_queries(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Queries:
        return q, None, k, v

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, attend: Callable) -> Tensor:
        out = attend(q, k, v)
        second = self.second_output(out)
        if second is not None:
            out = blend(out, second, self.current_lambda(x[:, -q.shape[2] :]), normalised=False)
        return self.head_norm(out)

    def second_output(self, out: Tensor) -> Tensor | None:
        """o2, computed from o1 [B, H, L, D]; None if nothing is subtracted."""
        return None


class SameMap(SingleMap):
    """The second map is the first one: o1 - lambda o1."""

    def second_output(self, out: Tensor) -> Tensor:
        return out


class ValueMap(SingleMap):
    """o1 - lambda o1 W_D on selected heads, W_D a D x D matrix (DEX, arXiv 2505.16333).

    All heads are selected until `diagnostics.select_heads` chooses, as the training loop does before its first update.
    """

    trainable = ("value_map",)

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        self.value_map = uniform_parameter(generator, self.shape.head_dim, self.shape.head_dim)
        self.register_buffer("selected", torch.ones(self.shape.num_heads))

    def second_output(self, out: Tensor) -> Tensor:
        return (out @ self.value_map.T.to(out.dtype)) * self.selected[:, None, None].to(out.dtype)


class SharpenedQuery(DifferentialAttention):
    """q2 = exp(log_sharpness) q1, one temperature per head that starts at 1. With combine "replace", a control that can
    sharpen its maps without subtracting any."""

    trainable = ("log_sharpness",)

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        self.log_sharpness = nn.Parameter(torch.zeros(self.shape.num_heads))

    def two_queries(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate) -> Queries:
        return q, q * self.log_sharpness.exp().to(q.dtype)[:, None, None], k, v


class GatedOutput(SingleMap):
    """2 sigmoid(x W^T) o1, a gate per head and token that starts at 1 (arXiv 2505.06708): a control."""

    trainable = ("gate",)

    def add_parameters(self, generator: torch.Generator, query: nn.Linear):
        self.gate = nn.Parameter(torch.zeros(self.shape.num_heads, self.shape.hidden_size))

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rotate: Rotate, attend: Callable) -> Tensor:
        out = attend(q, k, v)
        gate = 2 * F.linear(x[:, -q.shape[2] :], self.gate.to(x.dtype)).sigmoid()  # [B, L, H]
        return self.head_norm(out * gate.transpose(1, 2)[..., None].to(out.dtype))


class NoSecondMap(SingleMap):
    """Standard attention, with the head norm: a control."""


SECOND_MAPS = {
    "delta": DifferentialAttention,
    "query": ProjectedQuery,
    "noise": SharedNoiseQuery,
    "adapter": LowRankMap,
    "pairs": PairedHeads,
    "halves": HalvedHeads,
    "same": SameMap,
    "value": ValueMap,
    "sharpened": SharpenedQuery,
    "gate": GatedOutput,
    "none": NoSecondMap,
}


# ---- configuration
Tower = Literal["text", "vision"]
Second = Literal["delta", "query", "pairs", "halves", "noise", "adapter", "same", "value", "sharpened", "gate", "none"]
Lambda = Literal["vectors", "token", "scalar", "fixed"]
Combine = Literal["subtract", "normalised", "replace"]
Norm = Literal["none", "head"]
Cut = Literal["even_odd", "contiguous", "front_back"]
Scale = Literal["map", "head"]
Pairing = Literal["groups", "adjacent"]


@dataclass
class DifferentialConfig:
    """A preset, and the choices that differ from it. Fields that are None take the preset's value."""

    preset: str = "split"  # name in PRESETS
    towers: tuple[Tower, ...] | None = None  # towers whose attention becomes differential
    layers: tuple[int, ...] | None = None  # layers of these towers, counted from 0; None: all
    second: Second | None = None  # how the second map is made (SECOND_MAPS)
    # vectors: exp(q1 . k1) - exp(q2 . k2) + lambda_init, one per layer; token: sigmoid of a projection of the token,
    # one per head; scalar: one per layer, sigmoid of a logit where combine is normalised; fixed: not learned
    lambda_kind: Lambda | None = None
    # subtract: o1 - lambda o2; normalised: (o1 - lambda o2) / (1 - lambda); replace: o2 alone, or the gated output
    combine: Combine | None = None
    norm: Norm | None = None  # head: RMSNorm of each head's output, times (1 - lambda_init)
    rank: Annotated[int, Meta(ge=1, le=65_536)] | None = None  # rank of delta and adapter
    # initial value of a scalar lambda, and the value of a fixed one
    lambda_start: float | None = None
    # the paper's constant in the formulas of vectors, anneal and norm=head, not the initial value of a scalar
    # lambda (which is lambda_start); None: 0.8 - 0.6 exp(-0.3 layer)
    lambda_init: float | None = None
    # share of training over which lambda grows linearly from 0
    lambda_warmup: Annotated[float, Meta(ge=0, le=1)] = 0.0
    # learning rate of lambda, as a multiple of that of the other parameters
    lambda_lr: Annotated[float, Meta(ge=0, le=1_000_000)] = 1.0
    # seed of the initial values, which have their own generator; finetune_diff.py sets it to the run's seed
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] = 0
    adapter_scale: float | None = None  # factor of the low-rank product of adapter
    noise_ratio: Annotated[int, Meta(ge=1)] | None = None  # heads of a key/value group that share one noise query
    anneal: bool | None = None  # at progress p lambda is (1 - p) p lambda_init + p times the learned value
    flip_sign: bool | None = None  # lambda becomes -lambda
    pairing: Pairing | None = None  # second=pairs: heads of two key/value groups (keeps pretrained maps), or adjacent
    halves_cut: Cut | None = None  # how heads are split: by whole rotary pairs, or front and back half
    halves_scale: Scale | None = None  # divide scores by the square root of the map's or the head's dim
    rotate_halves: bool | None = None  # rotate each half as a head of its own, instead of the head before the split
    depth_offset: int | None = None  # added to the layer index in the schedule of lambda_init
    fresh_layer_norms: bool | None = None  # SigLIP's LayerNorms become RMSNorms with gain 1

    def resolve(self) -> "DifferentialConfig":
        """A copy with every None filled in, except `layers` and `lambda_init`. Raises UserError for a bad value."""
        if self.preset not in PRESETS:
            raise UserError(f"differential preset {self.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
        chosen = DEFAULTS | PRESETS[self.preset].choices
        resolved = replace(self, **{key: value for key, value in chosen.items() if getattr(self, key) is None})
        resolved._check()
        for name in resolved._unused_fields():
            value = getattr(resolved, name)
            if value != chosen.get(name, getattr(DifferentialConfig, name)):
                raise UserError(f"differential.{name}={value} has no effect in preset {self.preset}: leave it out")
        towers = tuple(tower for tower in get_args(Tower) if tower in resolved.towers)
        layers = None if resolved.layers is None else tuple(sorted(set(resolved.layers)))
        return replace(resolved, towers=towers, layers=layers)

    @property
    def has_lambda(self) -> bool:
        """Whether lambda acts on the output of a resolved configuration. It does not if the second map replaces the
        first, in a gate, or without a second map."""
        return self.combine != "replace" and self.second != "none"

    def _unused_fields(self) -> list[str]:
        """The fields that a resolved configuration does not read."""
        has_init = self.lambda_kind == "vectors" or self.anneal or self.norm == "head"
        is_used = dict(
            rank=self.second in ("delta", "adapter"),
            adapter_scale=self.second == "adapter",
            noise_ratio=self.second == "noise",
            pairing=self.second == "pairs",
            halves_cut=self.second == "halves",
            halves_scale=self.second == "halves",
            lambda_start=self.has_lambda and self.lambda_kind in ("scalar", "fixed"),
            lambda_lr=self.lambda_kind != "fixed",
            lambda_init=has_init,
            depth_offset=has_init and self.lambda_init is None,
            fresh_layer_norms="vision" in self.towers,
        )
        return [name for name, used in is_used.items() if not used]

    def _check(self):
        check_ranges(self, "differential.")
        if not self.towers:
            raise UserError("differential.towers: is empty: give text, vision or both")
        if self.lambda_lr == 0 and self.lambda_kind != "fixed":
            raise UserError("differential.lambda_lr 0: lambda would never learn: set lambda_kind=fixed instead")
        if not self.has_lambda and self.lambda_kind != "fixed":
            raise UserError(
                f"differential: second={self.second} with combine={self.combine} does not use lambda, which would "
                "never learn: set lambda_kind=fixed"
            )
        if not self.has_lambda and (self.anneal or self.flip_sign or self.lambda_warmup):
            raise UserError(
                f"differential: second={self.second} with combine={self.combine} does not use lambda: leave out "
                "anneal, flip_sign and lambda_warmup"
            )
        if self.combine == "replace" and self.second not in ("delta", "query", "sharpened", "gate"):
            raise UserError(
                f"differential.combine replace needs second=delta, query, sharpened or gate, not {self.second}"
            )
        if self.second == "gate" and self.combine != "replace":
            raise UserError(f"differential.second gate has one map: it needs combine=replace, not {self.combine}")
        if self.combine == "normalised" and self.second in ("same", "value"):
            raise UserError(f"differential: second={self.second} needs combine=subtract: normalising would undo it")
        if self.rotate_halves and self.second != "halves":
            raise UserError(f"differential.rotate_halves needs second=halves, not {self.second}")
        if self.combine == "normalised" and self.lambda_kind in ("scalar", "fixed"):
            is_dead = self.lambda_kind == "scalar" and self.lambda_start == 0
            if is_dead or not 0 <= self.lambda_start <= LAMBDA_MAX:
                raise UserError(
                    f"differential.lambda_start {self.lambda_start}: a normalised lambda starts above 0 (at 0 nothing "
                    f"would learn) and at most at {LAMBDA_MAX}"
                )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "DifferentialConfig":
        """The inverse of `to_dict`, also after a round trip through json. Raises UserError for an unknown name."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"differential configuration: {min(unknown)!r} is unknown: written by another version?")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})

    def same_method(self, other: "DifferentialConfig") -> bool:
        """Whether both give the same function of the same parameters; initial values and learning rates may differ."""
        ignored = dict(preset="", seed=0, lambda_lr=1.0)
        ours, theirs = (replace(config.resolve(), **ignored) for config in (self, other))
        if ours.lambda_kind != "fixed":
            ours = replace(ours, lambda_start=theirs.lambda_start)
        return ours == theirs


class Preset(NamedTuple):
    """A row of the table: its choices, and claims that tests/test_differential.py checks."""

    choices: dict
    formula: str
    exact: bool  # before the first update the model computes the pretrained function, bit-equal in float32
    gradient: tuple[str, ...]  # parameters with a non-zero gradient at the start (progress 0)
    cost: str  # per layer, relative to standard attention
    source: str

    def describe(self) -> str:
        """A one-line description."""
        learns = ", ".join(self.gradient) or "nothing"
        start = "exact at step 0" if self.exact else "changes the function at step 0"
        return f"{self.formula}; {start}; first gradient: {learns}; {self.cost}; {self.source}"


DEFAULTS = dict(
    towers=("text",), second="delta", lambda_kind="scalar", combine="normalised", norm="none", rank=16,
    lambda_start=0.5, adapter_scale=1.0, noise_ratio=4, anneal=False, flip_sign=False, pairing="groups",
    halves_cut="even_odd", halves_scale="map", rotate_halves=False, depth_offset=0, fresh_layer_norms=False,
)  # fmt: skip
_V1 = dict(lambda_kind="vectors", combine="subtract", norm="head")
_PAPER_CODE = _V1 | dict(depth_offset=-1)  # its lambda_init schedule starts one layer early, at -0.0099
_DELTA_COST = "one more map, r (C + H D) parameters and 1 lambda, same KV cache"

# fmt: off
PRESETS = {
    "split": Preset(
        {},
        "O1 + gamma (O1 - O2), Q2 = Q1 + low rank, lambda = sigmoid(lambda_logit) <= 0.9",
        True, ("second_up",), _DELTA_COST, "post-hoc DIFF-V2 (Posthoc_differential_memory)",
    ),
    "v1": Preset(
        _V1 | dict(second="pairs"),
        "(1 - lambda_init) RMSNorm((A1 - lambda A2) [V1; V2]) on pairs of heads that keep their pretrained keys",
        False, (*LAMBDA_VECTORS, "norm_gain"),
        "no more maps, 6 D parameters, same KV cache; an even number of kv heads",
        "arXiv 2410.05258",
    ),
    "v1_width": Preset(
        _V1 | dict(second="halves"),
        "v1 on the two halves of each head, cut by whole rotary pairs after rotation",
        False, (*LAMBDA_VECTORS, "norm_gain"), "one more map, 3 D parameters, same KV cache",
        "arXiv 2410.05258, for models with one kv head",
    ),
    "v2": Preset(
        dict(second="query", lambda_kind="token", combine="subtract"),
        "O1 - sigmoid(lambda_token x) O2, Q2 from a projection that starts as Q1's",
        False, ("second_query", "lambda_token"), "one more map, C (H D + H) parameters, same KV cache",
        "Differential Transformer V2 (microsoft/unilm, 2026-01)",
    ),
    "difflora": Preset(
        dict(second="adapter", combine="subtract", lambda_start=0.1, rank=32, adapter_scale=2.0),
        "O1 - lambda O2, Q2 and K2 low rank alone, none of their factors zero",
        False, ("second_down", "second_up", "key_down", "key_up", "lambda_learn"),
        "one more map, r (2 C + H D + K D) parameters and 1 lambda, keys twice in the KV cache",
        "DiffLoRA (arXiv 2507.23588; learned lambda, no group norm)",
    ),
    "dex": Preset(
        dict(second="value", combine="subtract", lambda_start=0.0, anneal=True),
        "O - lambda(t) O W_D on selected heads",
        True, (), "one D x D matrix and 1 lambda, same KV cache; both learn once training has progressed",
        "DEX (arXiv 2505.16333; W_D starts random)",
    ),
    "grouped": Preset(
        dict(second="noise", combine="subtract", lambda_start=0.0),
        "O1 - lambda repeat(O2), a noise query for every noise_ratio heads",
        True, ("lambda_learn",), "1 / noise_ratio more maps, C R D parameters and 1 lambda, same KV cache",
        "grouped differential attention (arXiv 2510.06949; without its norm)",
    ),
    "src_siglip_split": Preset(
        _PAPER_CODE | dict(second="halves", towers=("vision",), halves_cut="front_back", halves_scale="head",
                       fresh_layer_norms=True),
        "v1_width on plain halves, scaled by the whole head's width; the LayerNorms become RMSNorms",
        False, (*LAMBDA_VECTORS, "norm_gain"), "one more map, 3 D parameters", "the code behind arXiv 2507.15875",
    ),
    "src_gemma_split": Preset(
        _PAPER_CODE | dict(second="halves", halves_cut="front_back", halves_scale="head", rotate_halves=True),
        "v1_width on plain halves, each rotated as a head, scaled by the whole head's width; "
        "each half attends to its own half of the keys, which the source's repeat_kv mixes up",
        False, (*LAMBDA_VECTORS, "norm_gain"), "one more map, 3 D parameters, same KV cache",
        "the code behind arXiv 2507.15875",
    ),
    "src_gemma_samemap": Preset(
        _PAPER_CODE | dict(second="same"),
        "(1 - lambda_init) RMSNorm((A - lambda A) V): lambda acts through the norm's eps alone",
        False, (*LAMBDA_VECTORS, "norm_gain"), "5 D parameters, same KV cache", "the code behind arXiv 2507.15875",
    ),
    "additive": Preset(
        dict(lambda_kind="fixed", lambda_start=0.0, combine="replace"),
        "control: split's low rank added to the query, one map, nothing subtracted",
        True, ("second_up",), "no more maps, r (C + H D) parameters, same KV cache", "control",
    ),
    "sharpen": Preset(
        dict(second="sharpened", lambda_kind="fixed", lambda_start=0.0, combine="replace"),
        "control: softmax(s q k^T) v, a learned temperature s of each head, nothing subtracted",
        True, ("log_sharpness",), "no more maps, H parameters, same KV cache", "control, after arXiv 2511.06818",
    ),
    "gate": Preset(
        dict(second="gate", lambda_kind="fixed", lambda_start=0.0, combine="replace"),
        "control: 2 sigmoid(W x) O, a gate of each head, nothing subtracted",
        True, ("gate",), "no more maps, H C parameters, same KV cache", "control, after arXiv 2505.06708",
    ),
    "norm_only": Preset(
        dict(second="none", lambda_kind="fixed", lambda_start=0.0, norm="head"),
        "control: (1 - lambda_init) RMSNorm(O), nothing subtracted",
        False, ("norm_gain",), "D parameters, same KV cache", "control",
    ),
    "lambda_zero": Preset(
        dict(lambda_kind="fixed", lambda_start=0.0),
        "control: split with lambda 0, which nothing can move",
        True, (), "one more map, nothing trains, same KV cache", "control",
    ),
    "flipped": Preset(
        dict(flip_sign=True),
        "control: split that adds the second map, (O1 + lambda O2) / (1 + lambda)",
        True, ("second_up",), _DELTA_COST, "control",
    ),
    "lambda_fixed": Preset(
        dict(lambda_kind="fixed", lambda_start=0.1),
        "control: split with lambda 0.1, not learned",
        True, ("second_up",), "one more map, r (C + H D) parameters, same KV cache", "control",
    ),
}
# fmt: on


# ---- models
class RMSNormWithoutWeight(nn.LayerNorm):
    """RMSNorm with gain 1 in place of a LayerNorm, whose weight and bias are kept for saving but not used."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None, self.eps)


def as_norm(norm: nn.LayerNorm, norm_class: type[nn.LayerNorm]) -> nn.LayerNorm:
    """A norm of this class with the weight and bias of `norm`; `norm` itself if it is one."""
    if type(norm) is norm_class:
        return norm
    new = norm_class(norm.normalized_shape, norm.eps, device="meta")
    new.weight, new.bias = norm.weight, norm.bias
    return new


def as_config(differential: DifferentialConfig | str) -> DifferentialConfig:
    """A preset's name as a configuration."""
    return DifferentialConfig(preset=differential) if isinstance(differential, str) else differential


def make_differential(
    config: DifferentialConfig, shape: AttentionShape, tower: str, layer: int, query: nn.Linear
) -> DifferentialAttention:
    """The differential module of a resolved configuration for one attention layer; see `DifferentialAttention`."""
    return SECOND_MAPS[config.second](config, shape, tower, layer, query)


def add_differential(model: nn.Module, differential: DifferentialConfig | str) -> None:
    """Add a `differential` module to the attention layers that the configuration names, in place.

    Call it on a model with loaded weights, before peft wraps it: second queries start as copies. The global random
    state does not change. Raises UserError if configuration and model do not fit.
    """
    towers = {"text": model.model.language_model.layers}
    if model.model.vision_tower is not None:
        encoder = model.model.vision_tower.encoder
        towers["vision"] = encoder.layers[: encoder.num_layers_run]
    add_to_layers(differential, towers, lambda attention: attention.shape)


def add_to_layers(
    differential: DifferentialConfig | str,
    towers: dict[str, Sequence[nn.Module]],
    shape_of: Callable[[nn.Module], AttentionShape],
) -> list[nn.Module]:
    """Add `self_attn.differential` to the layers of each tower that the configuration names; returns these layers.

    Raises UserError if configuration and layers do not fit, and then changes nothing.
    """
    config = as_config(differential).resolve()
    made = []
    for tower in config.towers:
        if tower not in towers:
            raise UserError("differential.towers vision: this model has no vision tower: use towers=text")
        count = len(towers[tower])
        chosen = range(count) if config.layers is None else sorted(set(config.layers))
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise UserError(f"differential.layers {config.layers}: the {tower} tower has layers 0 to {count - 1}")
        for index in chosen:
            layer = towers[tower][index]
            shape = shape_of(layer.self_attn)
            query = query_projection(layer.self_attn, shape)
            made.append((layer, make_differential(config, shape, tower, index, query)))
    replaced = {id(layer) for layer, _ in made}
    for layer in (layer for layers in towers.values() for layer in layers if id(layer) not in replaced):
        other = getattr(layer.self_attn, "differential", None)
        if other is not None and other.config != config:  # a saved folder holds one configuration
            raise UserError(
                f"differential preset {config.preset}: other layers already have {other.config.preset} with other "
                "choices: give one configuration for all layers and towers"
            )
    for layer, module in made:
        layer.self_attn.differential = module
        if module.tower == "vision":
            norm_class = RMSNormWithoutWeight if config.fresh_layer_norms else nn.LayerNorm
            layer.layer_norm1 = as_norm(layer.layer_norm1, norm_class)
            layer.layer_norm2 = as_norm(layer.layer_norm2, norm_class)
    return [layer for layer, _ in made]


def query_projection(attention: nn.Module, shape: AttentionShape) -> nn.Linear:
    """The pretrained query projection of an attention layer, also under peft's LoRA; for a fused `qkv_proj` a view of
    its first H D rows."""
    if hasattr(attention, "q_proj"):
        return getattr(attention.q_proj, "base_layer", attention.q_proj)
    fused = getattr(attention.qkv_proj, "base_layer", attention.qkv_proj)
    width = shape.num_heads * shape.head_dim
    query = nn.Linear(fused.in_features, width, bias=False, device="meta")
    query.weight = nn.Parameter(fused.weight.detach()[:width], requires_grad=False)
    return query


def differential_modules(model: nn.Module) -> dict[str, DifferentialAttention]:
    """Name -> module; the names are those of the unwrapped model, also inside peft's wrapper."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, DifferentialAttention)
    }


def differential_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that differential attention added to `model`."""
    return {
        f"{name}.{key}": parameter
        for name, module in differential_modules(model).items()
        for key, parameter in module.named_parameters()
    }


def is_lambda(name: str) -> bool:
    """Whether a parameter's name is that of a learnable lambda."""
    return "lambda" in name.rpartition(".")[2]


def trainable_names(config: DifferentialConfig) -> frozenset[str]:
    """Names, inside `self_attn.differential`, of the parameters that train; a learnable lambda is always among them.

    `config` is resolved.
    """
    names = SECOND_MAPS[config.second].trainable
    if config.lambda_kind == "fixed" and config.lambda_start == 0 and not config.anneal and config.combine != "replace":
        names = ()  # the second map never gets a gradient
    scalar = "lambda_logit" if config.combine == "normalised" else "lambda_learn"
    names += {"vectors": LAMBDA_VECTORS, "token": ("lambda_token",), "scalar": (scalar,), "fixed": ()}[
        config.lambda_kind
    ]
    return frozenset(names + (("norm_gain",) if config.norm == "head" else ()))


def unfreeze_differential(model: nn.Module) -> list[str]:
    """Make exactly the `trainable_names` trainable, after peft froze every parameter; returns their full names."""
    unfrozen = []
    for name, module in differential_modules(model).items():
        names = trainable_names(module.config)
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(key in names)
            unfrozen += [f"{name}.{key}"] if key in names else []
    return unfrozen


def differential_config(model: nn.Module) -> DifferentialConfig | None:
    """The resolved configuration that the model was built with; None for standard attention."""
    return next((module.config for module in model.modules() if isinstance(module, DifferentialAttention)), None)


def knock_out(model: nn.Module) -> None:
    """Set lambda to 0 in every differential layer, in place and permanently, to see what the trained second map does.

    The head norm and the adapters stay. Raises UserError for standard attention and for a control without lambda.
    """
    modules = differential_modules(model).values()
    if not modules:
        raise UserError("--knockout: the model has standard attention, there is no lambda to set to 0")
    for module in modules:
        if not module.has_lambda:
            raise UserError(f"--knockout: preset {module.config.preset} has no lambda that could be set to 0")
        module.config = replace(module.config, lambda_kind="fixed", lambda_start=0.0, lambda_lr=1.0, anneal=False)


def set_progress(model: nn.Module, fraction: float) -> None:
    """Set training progress, 0 to 1, for every lambda that warms up or anneals: (step + 1) / steps before a step."""
    for module in differential_modules(model).values():
        module.progress.fill_(fraction)
