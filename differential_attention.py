"""Differential attention: its family as points in a space of four choices, and the module that a layer gains by it.

    second map    delta    Q2 = Q1 + zero-initialised low rank, keys and values shared
                  query    Q2 from a projection of its own, keys and values shared
                  pairs    heads 2i and 2i + 1 are one head of twice the value width
                  halves   one head's width is cut in two
                  noise    a few queries of their own, each shared by several heads
                  adapter  Q2 and K2 low rank alone, values shared
                  same     the first map again
                  value    none: a D x D matrix on the head's output
                  none     none
    lambda        vectors  exp(q1 . k1) - exp(q2 . k2) + lambda_init, one per layer
                  token    sigmoid of a projection of the token, one per head
                  scalar   one per layer: a logit where combine is normalised, the number itself elsewhere
                  fixed    lambda_start for ever
    combine       subtract    O1 - lambda O2
                  normalised  (O1 - lambda O2) / (1 - lambda) = O1 + gamma (O1 - O2), gamma = lambda / (1 - lambda)
                  replace     O2 alone
    norm          none, or head: RMSNorm of each head, times (1 - lambda_init)

Shapes: B batch, L sequence, S keys, H query heads, K key/value heads, D head width, C hidden width, r rank, R second
queries. Everything that is added lives in `self_attn.differential`; float32 whatever the model's dtype.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import PrefixMask, attention, attention_maps, dense_mask, differential_attention, rotate
from errors import UserError
from kernels import apply_maps, blend

LAMBDA_MAX = 0.9  # of a normalised lambda: gamma is at most 9
Tower = Literal["text", "vision"]
Second = Literal["delta", "query", "pairs", "halves", "noise", "adapter", "same", "value", "none"]
Lambda = Literal["vectors", "token", "scalar", "fixed"]
Combine = Literal["subtract", "normalised", "replace"]
Norm = Literal["none", "head"]
Cut = Literal["even_odd", "contiguous", "front_back"]
Scale = Literal["map", "head"]


@dataclass
class DifferentialConfig:
    """A preset, and whatever is to differ from it. Fields that are None take the preset's value."""

    preset: str = "split"  # a name in PRESETS
    towers: tuple[Tower, ...] | None = None  # which towers get it
    layers: tuple[int, ...] | None = None  # which layers of these towers, counted from 0; None: all
    second: Second | None = None  # where the second map comes from
    lambda_kind: Lambda | None = None  # what lambda is made of
    combine: Combine | None = None  # how the two outputs become one
    norm: Norm | None = None  # of the heads' outputs
    rank: int | None = None  # of delta and adapter
    lambda_start: float | None = None  # first value of a scalar lambda, only value of a fixed one
    lambda_init: float | None = None  # constant of vectors, annealing and norm; None: 0.8 - 0.6 exp(-0.3 layer)
    lambda_warmup: float = 0.0  # share of training over which lambda grows linearly from 0
    lambda_lr: float = 1.0  # lambda's learning rate over that of the other parameters
    seed: int = 0  # of the initial values, from a generator of their own; finetune_diff.py sets it to the run's
    # --- particulars of single methods
    adapter_scale: float | None = None  # the low-rank product of `adapter` is multiplied by this
    noise_ratio: int | None = None  # heads that share one noise query, inside a key/value group
    anneal: bool | None = None  # lambda goes from 0 over lambda_init to the learned value during training
    flip_sign: bool | None = None  # lambda becomes -lambda
    halves_cut: Cut | None = None  # rotary pairs, or plain halves
    halves_scale: Scale | None = None  # scores over the square root of the half or of the whole width
    rotate_halves: bool | None = None  # rotate each half as if it were a head, instead of the head before the cut
    depth_offset: int | None = None  # added to the layer in lambda_init's schedule
    fresh_layer_norms: bool | None = None  # SigLIP's LayerNorms become RMSNorms with gain 1

    def resolve(self) -> "DifferentialConfig":
        """The same with every None filled in (`layers` and `lambda_init` apart). Raises UserError for a bad value."""
        if self.preset not in PRESETS:
            raise UserError(f"differential preset {self.preset!r} is unknown: one of {', '.join(PRESETS)}")
        chosen = DEFAULTS | PRESETS[self.preset].choices
        whole = replace(self, **{key: value for key, value in chosen.items() if getattr(self, key) is None})
        whole._check()
        return whole

    def _check(self):
        kinds = dict(second=Second, lambda_kind=Lambda, combine=Combine, norm=Norm, halves_cut=Cut, halves_scale=Scale)
        for key, kind in kinds.items():
            if getattr(self, key) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise UserError(f"differential.{key} {getattr(self, key)!r} is unknown: one of {known}")
        if not self.towers or not set(self.towers) <= set(get_args(Tower)):
            raise UserError(f"differential.towers {self.towers!r}: give text, vision or both")
        if self.rank < 1 or self.noise_ratio < 1:
            raise UserError(f"differential.rank {self.rank} and noise_ratio {self.noise_ratio} must be at least 1")
        if not 0 <= self.lambda_warmup <= 1:
            raise UserError(f"differential.lambda_warmup {self.lambda_warmup} is a share of training: 0 to 1")
        without_lambda = self.combine == "replace" or self.second == "none"
        if without_lambda and self.lambda_kind != "fixed":
            raise UserError(
                f"differential: lambda has no part in second={self.second}, combine={self.combine} and would never "
                "learn: give lambda_kind=fixed"
            )
        if self.combine == "replace" and self.second not in ("delta", "query"):
            raise UserError(f"differential.combine replace needs second=delta or query, not {self.second}")
        if self.combine == "normalised" and self.second in ("same", "value"):
            raise UserError(f"differential: second={self.second} needs combine=subtract, normalised undoes it")
        if self.rotate_halves and self.second != "halves":
            raise UserError(f"differential.rotate_halves needs second=halves, not {self.second}")
        if self.combine == "normalised" and self.lambda_kind in ("scalar", "fixed"):
            dead = self.lambda_kind == "scalar" and self.lambda_start == 0
            if dead or not 0 <= self.lambda_start <= LAMBDA_MAX:
                raise UserError(
                    f"differential.lambda_start {self.lambda_start}: a normalised lambda starts above 0 (at 0 nothing "
                    f"would learn) and at most at {LAMBDA_MAX}"
                )

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "DifferentialConfig":
        """`to_dict` undone, also after a journey through json. Raises UserError for a name that is no field."""
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"differential configuration: {min(unknown)!r} is unknown: written by another version?")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})

    def same_method(self, other: "DifferentialConfig") -> bool:
        """Whether both give the same function of the same parameters, wherever those start and however they learn."""
        start = dict(preset="", seed=0, lambda_lr=1.0)
        ours, theirs = (replace(config.resolve(), **start) for config in (self, other))
        if ours.lambda_kind != "fixed":
            ours = replace(ours, lambda_start=theirs.lambda_start)
        return ours == theirs


class Preset(NamedTuple):
    """A row of the table: the choices, and three claims that tests hold it to."""

    choices: dict
    formula: str
    exact: bool  # before the first update the model's function is the pretrained one, to the bit in float32
    gradient: tuple[str, ...]  # parameters with a non-zero gradient at the first update
    cost: str  # per layer, beside standard attention
    source: str

    def describe(self) -> str:
        learns = ", ".join(self.gradient) or "nothing"
        start = "exact at step 0" if self.exact else "changes the function at step 0"
        return f"{self.formula}; {start}; first gradient: {learns}; {self.cost}; {self.source}"


DEFAULTS = dict(
    towers=("text",), second="delta", lambda_kind="scalar", combine="normalised", norm="none", rank=16,
    lambda_start=0.5, adapter_scale=1.0, noise_ratio=4, anneal=False, flip_sign=False, halves_cut="even_odd",
    halves_scale="map", rotate_halves=False, depth_offset=0, fresh_layer_norms=False,
)  # fmt: skip
_VECTORS = ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
_V1 = dict(lambda_kind="vectors", combine="subtract", norm="head")
_SOURCE = _V1 | dict(depth_offset=-1)  # its lambda_init schedule starts one layer early, at -0.0099
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
        "(1 - lambda_init) RMSNorm((A1 - lambda A2) [V1; V2]) on heads 2i, 2i + 1",
        False, (*_VECTORS, "norm_gain"), "no more maps, 6 D parameters, same KV cache; an even number of kv heads",
        "arXiv 2410.05258",
    ),
    "v1_width": Preset(
        _V1 | dict(second="halves"),
        "v1 on the two halves of each head, cut by whole rotary pairs after rotation",
        False, (*_VECTORS, "norm_gain"), "one more map, 3 D parameters, same KV cache",
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
        _SOURCE | dict(second="halves", towers=("vision",), halves_cut="front_back", halves_scale="head",
                       fresh_layer_norms=True),
        "v1_width on plain halves, scaled by the whole head's width; the LayerNorms become RMSNorms",
        False, (*_VECTORS, "norm_gain"), "one more map, 3 D parameters", "the code behind arXiv 2507.15875",
    ),
    "src_gemma_split": Preset(
        _SOURCE | dict(second="halves", halves_cut="front_back", halves_scale="head", rotate_halves=True),
        "v1_width on plain halves, each rotated as a head, scaled by the whole head's width",
        False, (*_VECTORS, "norm_gain"), "one more map, 3 D parameters, same KV cache",
        "the code behind arXiv 2507.15875",
    ),
    "src_gemma_samemap": Preset(
        _SOURCE | dict(second="same"),
        "(1 - lambda_init) RMSNorm((A - lambda A) V): lambda acts through the norm's eps alone",
        False, (*_VECTORS, "norm_gain"), "5 D parameters, same KV cache", "the code behind arXiv 2507.15875",
    ),
    "additive": Preset(
        dict(lambda_kind="fixed", lambda_start=0.0, combine="replace"),
        "control: split's low rank added to the query, one map, nothing subtracted",
        True, ("second_up",), "no more maps, r (C + H D) parameters, same KV cache", "control",
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


def lambda_init_of(layer: int) -> float:
    """0.8 - 0.6 exp(-0.3 layer), layers counted from 0 (arXiv 2410.05258, section 2.1, as its code counts)."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Explained(NamedTuple):
    """Both branches of one layer, spelt out; `None` where a method has no second map."""

    first: Tensor  # maps [B, H, L, S]
    second: Tensor | None
    out1: Tensor  # outputs [B, H, L, Dv]
    out2: Tensor | None
    lambda_: Tensor  # lambda, [1] or [B, H, L, 1]


class DifferentialAttention(nn.Module):
    """What differential attention adds to one attention layer, and the attention itself.

    Takes a layer's projections before rotation and gives its heads' outputs; projections stay where they are. All
    parameters are float32 masters, cast where they are used, also after `model.to(bfloat16)`.
    """

    def __init__(self, config: DifferentialConfig, attend: nn.Module, tower: str, layer: int):
        """`attend`: the SiglipAttention or GemmaAttention that this is for. Raises UserError where they do not fit."""
        super().__init__()
        self.config = config = config.resolve()
        self.layer, self.tower, self.head_dim = layer, tower, attend.head_dim
        self.hidden = attend.q_proj.in_features
        self.heads = attend.q_proj.out_features // self.head_dim
        self.kv_heads = attend.k_proj.out_features // self.head_dim
        self.softcap, self.window = getattr(attend, "softcap", None), getattr(attend, "window", None)
        self._check(tower)
        is_half = config.second == "halves"
        self.map_width = self.head_dim // 2 if is_half else self.head_dim
        self.out_heads = self.heads // 2 if config.second == "pairs" else self.heads
        self.scale = attend.scale * (math.sqrt(2) if is_half and config.halves_scale == "map" else 1.0)
        scheduled = lambda_init_of(layer + config.depth_offset)
        self.lambda_init = scheduled if config.lambda_init is None else config.lambda_init

        # training's progress, 0 to 1: a tensor, so that compiled code need not know it
        self.register_buffer("progress", torch.zeros(1), persistent=False)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + 500_000 * (tower == "vision") + layer)
        self._add_second(attend.q_proj, generator)
        self._add_lambda(generator)
        if config.norm == "head":
            self.norm_gain = nn.Parameter(torch.ones(self.head_dim * self.heads // self.out_heads))
        self.to(attend.q_proj.weight.device, torch.float32)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in declared_trainable(config))

    # ---- construction
    def _check(self, tower: str):
        second, name, groups = self.config.second, self.config.preset, self.heads // self.kv_heads
        if second == "pairs" and self.kv_heads % 2:
            raise UserError(
                f"differential preset {name} pairs key/value heads and the {tower} tower has {self.kv_heads}: "
                "use v1_width, which cuts each head in two"
            )
        if second == "halves" and self.head_dim % (2 if tower == "vision" else 4):
            raise UserError(f"differential preset {name} cannot cut heads of width {self.head_dim} in two")
        if second == "noise" and (groups == 1 or groups % min(groups, self.config.noise_ratio)):
            raise UserError(
                f"differential preset {name} shares a noise query among {self.config.noise_ratio} heads of a key/value "
                f"group and the {tower} tower has groups of {groups}: give another noise_ratio, or towers=text"
            )

    def _add_second(self, q_proj: nn.Module, generator: torch.Generator):
        second, rank, width = self.config.second, self.config.rank, self.heads * self.head_dim

        def uniform(*shape: int) -> nn.Parameter:  # as nn.Linear starts
            drawn = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) * 2 - 1
            return nn.Parameter(drawn * shape[-1] ** -0.5)

        if second == "delta":
            self.second_down, self.second_up = uniform(rank, self.hidden), nn.Parameter(torch.zeros(width, rank))
        elif second == "adapter":
            self.second_down, self.second_up = uniform(rank, self.hidden), uniform(width, rank)
            self.key_down = uniform(rank, self.hidden)
            self.key_up = uniform(self.kv_heads * self.head_dim, rank)
        elif second == "query":
            self.second_query = nn.Parameter(q_proj.weight.detach().float().clone())
            if q_proj.bias is not None:  # SigLIP's is part of both queries
                self.register_buffer("second_bias", q_proj.bias.detach().float().clone())
        elif second == "noise":
            shared = min(self.config.noise_ratio, self.heads // self.kv_heads)
            self.second_query = uniform(width // shared, self.hidden)
        elif second == "value":
            self.value_map = uniform(self.head_dim, self.head_dim)
            self.register_buffer("selected", torch.ones(self.heads))  # see select_heads

    def _add_lambda(self, generator: torch.Generator):
        kind, start = self.config.lambda_kind, self.config.lambda_start
        if kind == "vectors":
            for name in _VECTORS:
                drawn = torch.randn(self.map_width, generator=generator, device="cpu", dtype=torch.float32)
                self.register_parameter(name, nn.Parameter(0.1 * drawn))
        elif kind == "token":
            self.lambda_token = nn.Parameter(torch.zeros(self.out_heads, self.hidden))
        elif kind == "scalar" and self.config.combine == "normalised":
            self.lambda_logit = nn.Parameter(torch.full((1,), math.log(start / (1 - start))))
        elif kind == "scalar":
            self.lambda_learn = nn.Parameter(torch.full((1,), float(start)))

    def _apply(self, fn, recurse=True):
        def keep_master(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep_master, recurse)

    @property
    def key_heads(self) -> int:
        """Key heads that the KV cache holds; values are never more than the standard K."""
        return self.kv_heads * (2 if self.config.second == "adapter" else 1)

    # ---- the forward pass
    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        mask: PrefixMask | None = None,
        cache=None,
    ) -> Tensor:
        """x [B, L, C], the layer's input, and its projections q [B, H, L, D], k, v [B, K, L, D], not yet rotated ->
        the heads' outputs [B, H, L, D] ([B, H / 2, L, 2 D] where heads are paired). `cache`: the decoder's KVCache.
        q may hold the last positions of x alone; so do the outputs then."""
        q1, q2, k, v = self.branches(x, q, k, v, rotary, cache)
        x = last_rows(x, q)
        if self.config.combine == "replace":
            q1, q2 = q2, None
        if q2 is None:
            out = attention(q1, k, v, mask, self.scale, self.softcap, self.window)
            if self.config.second in ("same", "value"):
                out = blend(out, self._second_output(out), self.blend_weight(x), normalised=False)
        else:
            kernel = (
                mask,
                self.scale,
                self.blend_weight(x),
                self.config.combine == "normalised",
                self.softcap,
                self.window,
            )
            out = differential_attention(q1, q2, k, v, *kernel)
        return self._head_norm(out) if self.config.norm == "head" else out

    def branches(self, x, q, k, v, rotary=None, cache=None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Both queries and what they attend to, rotated: q1, q2 (or None), k and v as `differential_attention` takes
        them; arguments as in `forward`."""
        second = self.config.second
        turn = self._rotation(rotary)
        q1, q2, k = turn(q), None, turn(k)
        if second == "delta":  # rotation is linear: the rotated sum is the sum of the rotated
            q2 = q1 + turn(self._low_rank(last_rows(x, q), self.second_down, self.second_up))
        elif second == "adapter":
            scale = self.config.adapter_scale
            q2 = turn(scale * self._low_rank(last_rows(x, q), self.second_down, self.second_up))
            k = torch.cat((k, turn(scale * self._low_rank(x, self.key_down, self.key_up))), dim=1)
        elif second in ("query", "noise"):
            bias = getattr(self, "second_bias", None)
            weights = (t if t is None else t.to(x.dtype) for t in (self.second_query, bias))
            q2 = turn(self._heads(F.linear(last_rows(x, q), *weights)))
        elif second == "pairs":
            q1, q2 = q1[:, 0::2], q1[:, 1::2]
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        if second == "halves":  # after the cache, which holds whole keys
            q1, q2 = self._halves(q1)
            k = torch.cat(self._halves(k), dim=1)
        elif second == "pairs":
            k = torch.cat((k[:, 0::2], k[:, 1::2]), dim=1)
            v = torch.cat((v[:, 0::2], v[:, 1::2]), dim=-1)
        return q1, q2, k, v

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _halves(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps' parts of heads [B, heads, L, D]; dimension i is rotated together with i + D / 2."""
        if self.tower == "vision" or self.config.halves_cut == "front_back":  # nothing is rotated in SigLIP
            return t.chunk(2, dim=-1)
        pairs = t.unflatten(-1, (2, -1, 2) if self.config.halves_cut == "even_odd" else (2, 2, -1))
        dim = -1 if self.config.halves_cut == "even_odd" else -2
        first, second = (half.flatten(-2) for half in pairs.unbind(dim))
        return first, second

    def _low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return self._heads(F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)))

    def _rotation(self, rotary: tuple[Tensor, Tensor] | None) -> Callable[[Tensor], Tensor]:
        if rotary is None:
            return lambda t: t
        if not self.config.rotate_halves:
            return lambda t: rotate(t, *rotary)
        # every second frequency of width D is the whole spectrum of width D / 2
        cos, sin = (table[..., ::2] for table in rotary)
        return lambda t: torch.cat([rotate(half, cos, sin) for half in t.chunk(2, dim=-1)], dim=-1)

    def _second_output(self, out: Tensor) -> Tensor:
        if self.config.second == "same":
            return out
        return (out @ self.value_map.T.to(out.dtype)) * self.selected[:, None, None].to(out.dtype)

    def _head_norm(self, out: Tensor) -> Tensor:
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        gain = (1 - self.lambda_init) * self.norm_gain
        return F.rms_norm(wide, out.shape[-1:], gain, eps=1e-5).to(out.dtype)

    # ---- lambda
    def current_lambda(self, x: Tensor) -> Tensor:
        """lambda as it acts now, signed: [1], or [B, H, L, 1] where it depends on the token x [B, L, C]."""
        config = self.config
        if config.lambda_kind == "vectors":
            pairs = (self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2)
            first, second = ((q * k).sum(-1, keepdim=True).exp() for q, k in pairs)  # autocast would round a matmul
            value = first - second + self.lambda_init
        elif config.lambda_kind == "token":
            value = F.linear(x, self.lambda_token.to(x.dtype)).sigmoid().transpose(1, 2)[..., None]
        elif config.lambda_kind == "fixed":
            value = torch.full_like(self.progress, config.lambda_start)
        else:
            value = self.lambda_logit.sigmoid() if config.combine == "normalised" else self.lambda_learn
        if config.anneal:  # DEX, arXiv 2505.16333
            value = (1 - self.progress) * self.progress * self.lambda_init + self.progress * value
        if config.lambda_warmup:
            value = value * (self.progress / config.lambda_warmup).clamp(max=1)
        if config.combine == "normalised":  # the gradient passes the bound, or a lambda that met it never came back
            value = value + (value.clamp(max=LAMBDA_MAX) - value).detach()
        return -value if config.flip_sign else value

    def blend_weight(self, x: Tensor) -> Tensor:
        value = self.current_lambda(x)
        return value / (1 - value) if self.config.combine == "normalised" else value

    # ---- looking inside
    def explain(self, x, q, k, v, rotary=None, mask=None, cache=None) -> Explained:
        """Both maps and both outputs by the explicit reference; arguments as in `forward`."""
        q1, q2, k, v = self.branches(x, q, k, v, rotary, cache)
        k1, k2 = (k, k) if k.shape[1] == v.shape[1] else k.chunk(2, dim=1)
        dense = dense_mask(mask, q1.shape[2], k.shape[2], self.window)
        maps = [
            None if query is None else attention_maps(query, key, dense, self.scale, self.softcap)
            for query, key in ((q1, k1), (q2, k2))
        ]
        outs = [None if m is None else apply_maps(m.to(q1.dtype), v) for m in maps]
        maps = [None if m is None else m.flatten(1, 2) for m in maps]
        if self.config.second in ("same", "value"):
            outs[1] = self._second_output(outs[0])
        return Explained(*maps, *outs, self.current_lambda(x))


def last_rows(x: Tensor, q: Tensor) -> Tensor:
    """Of x [B, L, C] the positions that q [B, H, *, D] asks for."""
    return x[:, -q.shape[2] :]


class UngainedRMSNorm(nn.LayerNorm):
    """RMSNorm with gain 1 in a LayerNorm's place; its weight and bias stay for saving and act no more."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None, self.eps)


# ---- models
def as_config(differential: DifferentialConfig | str) -> DifferentialConfig:
    return DifferentialConfig(preset=differential) if isinstance(differential, str) else differential


def add_differential(model: nn.Module, differential: DifferentialConfig | str):
    """Give the attention layers that the configuration names their `differential`, in place.

    To be called on a model whose weights are loaded and not yet wrapped: second queries start as copies. The global
    random state is left alone. Raises UserError where configuration and model do not fit.
    """
    config = as_config(differential).resolve()
    towers = {"text": model.model.language_model.layers, "vision": model.model.vision_tower.encoder.layers}
    for tower in config.towers:
        count = len(towers[tower])
        chosen = range(count) if config.layers is None else sorted(set(config.layers))
        if not chosen or chosen[0] < 0 or chosen[-1] >= count:
            raise UserError(f"differential.layers {config.layers}: the {tower} tower has layers 0 to {count - 1}")
        for index in chosen:
            layer = towers[tower][index]
            layer.self_attn.differential = DifferentialAttention(config, layer.self_attn, tower, index)
            if config.fresh_layer_norms and tower == "vision":
                for name in ("layer_norm1", "layer_norm2"):
                    setattr(layer, name, _ungained(getattr(layer, name)))


def _ungained(norm: nn.LayerNorm) -> UngainedRMSNorm:
    new = UngainedRMSNorm(norm.normalized_shape, norm.eps, device="meta")
    new.weight, new.bias = norm.weight, norm.bias
    return new


def differential_modules(model: nn.Module) -> dict[str, DifferentialAttention]:
    """Name -> module; names are the unwrapped model's, also inside peft's wrapper."""
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


def declared_trainable(differential: DifferentialConfig | str) -> frozenset[str]:
    """Names, inside `self_attn.differential`, of the parameters that train; a learnable lambda is always among them."""
    config = as_config(differential).resolve()
    names = {
        "delta": ("second_down", "second_up"),
        "adapter": ("second_down", "second_up", "key_down", "key_up"),
        "query": ("second_query",),
        "noise": ("second_query",),
        "value": ("value_map",),
    }.get(config.second, ())
    if config.lambda_kind == "fixed" and config.lambda_start == 0 and config.combine != "replace":
        names = ()  # no gradient ever reaches the second map
    scalar = "lambda_logit" if config.combine == "normalised" else "lambda_learn"
    names += {"vectors": _VECTORS, "token": ("lambda_token",), "scalar": (scalar,), "fixed": ()}[config.lambda_kind]
    return frozenset(names + (("norm_gain",) if config.norm == "head" else ()))


def unfreeze_differential(model: nn.Module) -> list[str]:
    """Make exactly the declared differential parameters trainable, after peft froze them all; returns their names."""
    trainable = []
    for name, parameter in differential_parameters(model).items():
        parameter.requires_grad_(name.rpartition(".")[2] in declared_trainable(differential_config(model)))
        trainable += [name] if parameter.requires_grad else []
    return trainable


def differential_config(model: nn.Module) -> DifferentialConfig | None:
    """The configuration that the model was built with, resolved; None for standard attention."""
    return next((module.config for module in differential_modules(model).values()), None)


def set_progress(model: nn.Module, fraction: float):
    """Tell every lambda that warms up or anneals how far training is, 0 to 1: (step + 1) / steps before a step."""
    for module in differential_modules(model).values():
        module.progress.fill_(fraction)
