"""The arithmetic of LoRA for several linear layers of one input; parameters, names and files stay peft's.

peft forms x W^T, then (x A^T) B^T, scales it and adds it, each a pass over the whole output, and in float32 where the
base is bfloat16. Here the layers of one input share one product with their stacked A, and B is added inside a matmul.

Shapes: n rows, C width of the input, r rank.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def linears(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...]:
    """[module(x) for each], as one piece where every module is a peft LoRA layer on a frozen nn.Linear without bias.

    Factors are float32 masters, cast to the base's dtype. Whatever else a module is or does, dropout, a bias, a merged
    or disabled adapter, a hook, another kind of layer, autocast to another type, it is called as it stands.
    """
    if x.numel() == x.shape[-1] and all(takes_one_row(module, x) for module in modules):
        return tuple((module.weight @ x.view(-1)).view(*x.shape[:-1], -1) for module in modules)
    if not all(is_plain_lora(module, x) for module in modules):
        return tuple(module(x) for module in modules)
    names = [module.active_adapters[0] for module in modules]
    pairs = list(zip(modules, names, strict=True))
    return LowRankLinears.apply(
        x,
        [module.scaling[name] for module, name in pairs],
        *(module.base_layer.weight for module in modules),
        *(module.lora_A[name].weight for module, name in pairs),
        *(module.lora_B[name].weight for module, name in pairs),
    )


def takes_one_row(module: nn.Module, x: Tensor) -> bool:
    """Whether x, one row, is better multiplied as a vector: bfloat16 on a CPU, a decoding step."""
    plain = type(module) is nn.Linear and module.bias is None and not (module._forward_hooks or x.requires_grad)
    return plain and x.device.type == "cpu" and x.dtype == module.weight.dtype == torch.bfloat16


def is_plain_lora(module: nn.Module, x: Tensor) -> bool:
    base = getattr(module, "base_layer", None)
    if type(base) is not nn.Linear or not hasattr(module, "lora_A"):
        return False
    if len(module.active_adapters) != 1 or module.disable_adapters or module.merged:
        return False
    name, weight = module.active_adapters[0], base.weight
    if name not in module.lora_A or name in getattr(module, "lora_variant", ()):  # DoRA and the like
        return False
    parts = (module.lora_A[name], module.lora_B[name])
    dropout = module.lora_dropout[name]
    return (
        base.bias is None
        and all(type(part) is nn.Linear and part.bias is None for part in parts)
        and not (isinstance(dropout, nn.Dropout) and dropout.p > 0 and module.training)
        and not weight.requires_grad
        and weight.dtype == x.dtype == computed_in(x)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in (module, base, *parts))
    )


def computed_in(x: Tensor) -> torch.dtype:
    """What a matmul of x gives here: autocast would mix its type with x's in the sums formed in place."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


class LowRankLinears(torch.autograd.Function):
    """y_i = x W_i^T + s_i (x A_i^T) B_i^T of x [..., C], W_i frozen; only x and the rank-r products are saved."""

    @staticmethod
    def forward(ctx, x: Tensor, scales: list[float], *weights: Tensor) -> tuple[Tensor, ...]:
        """`weights`: every W_i, then every A_i, then every B_i."""
        bases, downs, ups = thirds(weights)
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ stacked(downs, scales, x.dtype).T
        ctx.save_for_backward(rows, low, *weights)
        ctx.scales, ctx.shape = scales, x.shape
        outs = []
        for base, up, h in zip(bases, ups, low.split([a.shape[0] for a in downs], dim=1), strict=True):
            out = (rows @ base.T).addmm_(h, up.to(x.dtype).T)
            outs.append(out.view(*x.shape[:-1], -1))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        rows, low, *weights = ctx.saved_tensors
        bases, downs, ups = thirds(weights)
        ranks = [a.shape[0] for a in downs]
        gradients = [g.reshape(-1, g.shape[-1]) for g in gradients]
        d_ups = [(h.T @ g).T.to(up.dtype) for h, g, up in zip(low.split(ranks, dim=1), gradients, ups, strict=True)]
        d_low = torch.cat([g @ up.to(g.dtype) for g, up in zip(gradients, ups, strict=True)], dim=1)
        d_stacked = (d_low.T @ rows).split(ranks)
        d_downs = [scale * d.to(a.dtype) for scale, d, a in zip(ctx.scales, d_stacked, downs, strict=True)]
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_low @ stacked(downs, ctx.scales, rows.dtype)
            for g, base in zip(gradients, bases, strict=True):
                d_x.addmm_(g, base)
            d_x = d_x.view(ctx.shape)
        return d_x, None, *[None for _ in bases], *d_downs, *d_ups


def thirds(weights: tuple) -> tuple[tuple, tuple, tuple]:
    count = len(weights) // 3
    return weights[:count], weights[count : 2 * count], weights[2 * count :]


def stacked(downs: tuple[Tensor, ...], scales: list[float], dtype: torch.dtype) -> Tensor:
    """s_i A_i one below the other [sum r, C]."""
    return torch.cat([scale * a for scale, a in zip(scales, downs, strict=True)]).to(dtype)
