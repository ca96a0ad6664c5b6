"""Group normalisation and SiLU in two passes, backward in two, by the kernels of `bn_act` with coefficients for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast import reference

from ._autograd import wanted
from ._checks import check_dtype, refusal
from .bn_act import ACTIVATION_CODES, packed

_SILU = ACTIVATION_CODES["swish"]


def group_norm_silu(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``silu(group_norm(x))`` in two passes (Wu and He 2018; Ramachandran et al. 2017).

    ``x`` (B, C, ...), float32, float64, bfloat16 or float16, contiguous or channels_last, which the result is too; ``groups`` divides C;
    ``weight`` and ``bias`` (C,) in any of those dtypes, or None. Sums as in `bn_act`. Differentiable in ``x``, ``weight`` and ``bias``:
    docs/derivatives.md. Raises ValueError for anything else.
    """
    check_dtype("x", x.dtype)
    if x.ndim < 2:
        raise refusal("x", f"{x.ndim} dimensions", "at least 2: (B, C, ...)")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise refusal("groups", groups, f"a divisor of the {channels} channels")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_dtype(name, t.dtype)
            if t.shape != (channels,) or t.device != x.device:
                raise refusal(name, f"shape {tuple(t.shape)} on {t.device}", f"{(channels,)} on {x.device}")
    if not wanted((x, weight, bias)):
        return _forward(x, weight, bias, _moments(x, groups), eps)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return reference.group_norm_silu(x, groups, weight, bias, eps)
    result: Tensor = _differentiable(x, weight, bias, groups, float(eps))
    return result


def _moments(x: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of each sample's groups, at each of its channels: (2, B, C) float64."""
    mean, var = torch.ops.genfast.bn_moments(x.detach(), True).unflatten(2, (groups, -1))  # (B, groups, C / groups) each
    whole = mean.mean(2, keepdim=True)
    spread = (var + (mean - whole).square()).mean(2, keepdim=True)
    return torch.stack([whole, spread]).expand(2, *mean.shape).flatten(2)


def _wide(parameter: Tensor | None, default: float, like: Tensor) -> Tensor:
    return torch.full_like(like, default) if parameter is None else parameter.detach().double().expand_as(like)


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, eps: float) -> Tensor:
    mean, var = moments
    coef = packed(x, [mean, _wide(weight, 1.0, mean) * (var + eps).rsqrt(), _wide(bias, 0.0, mean)])
    result: Tensor = torch.ops.genfast.bn_apply(x, coef, _SILU, 0.0)
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    result: Tensor = _GroupNormSilu.apply(x, weight, bias, _moments(x, groups), groups, eps)  # type: ignore[no-untyped-call]
    return result


class _GroupNormSilu(torch.autograd.Function):
    """Reverse mode by kernel; where the gradient is to be differentiated again, it is the reference's own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, groups: int, eps: float) -> Tensor:
        return _forward(x, weight, bias, moments, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.groups, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            y = reference.group_norm_silu(x, ctx.groups, weight, bias, ctx.eps)
            asked = [t for t, needed in zip((x, weight, bias), needs, strict=True) if needed]
            found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in needs), None, None, None)
        mean, var = moments
        inverse, gamma = (var + ctx.eps).rsqrt(), _wide(weight, 1.0, mean)
        rows = [mean, gamma * inverse, _wide(bias, 0.0, mean)]
        sums = torch.ops.genfast.bn_sums(grad, x, packed(x, rows), _SILU, 0.0)
        grad_x = grad_weight = grad_bias = None
        if needs[0]:
            # The group's means of weight * g and weight * g * v, at each of its channels.
            elements = max(x[:1].numel() // ctx.groups, 1)
            shared = (sums * gamma).unflatten(2, (ctx.groups, -1))
            means = (shared.sum(3, keepdim=True) / elements).expand_as(shared).flatten(2)
            rows += [gamma * inverse, -(inverse**3) * means[1], -inverse * means[0]]
            grad_x = torch.ops.genfast.bn_backward(grad, x, packed(x, rows), _SILU, 0.0)
        if needs[1]:
            grad_weight = (sums[1] * inverse).sum(0).to(weight.dtype)
        if needs[2]:
            grad_bias = sums[0].sum(0).to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None
