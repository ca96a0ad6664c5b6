"""Normalisation, residual and activation by the passes of csrc/ops/bn_act (docs/gan-ops.md): what `bn_act`, `group_norm_silu` and
`conv_block` share.

Statistics are moments of channels, (2, S, C) float64: S = 1 for those of a batch, S = B for those of each sample. A group is C / groups
neighbouring channels that are normalised together; batch normalisation has one channel a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfast.reference.bias_act import ACTIVATIONS, activation_derivative

from . import _backend
from ._activations import CODES, curve_of
from ._autograd import refuse_lost_derivatives, wanted
from ._checks import check_floating, check_is_tensor, refusal

_MOMENTS, _APPLY, _SUMS, _BACKWARD = range(4)  # csrc/ops/bn_act/params.h
_COEFFICIENTS = 6

_GIVEN = "Tensor moments, Tensor? weight, Tensor? bias, int groups, float eps, int act, float alpha, float gain"
SCHEMAS = {
    "bn_act_": "(Tensor(a!)? out, Tensor(b!)? sums, Tensor x, Tensor? dy, Tensor? residual, Tensor? coef, int samples, int inner, "
    "int which, int act, float alpha, float gain) -> ()",
    "bn_coefficients_": "(Tensor(a!) coef, Tensor(b!)? gradients, Tensor moments, Tensor? sums, Tensor? means, Tensor? weight, "
    "Tensor? bias, int groups, float eps) -> ()",
    "bn_moments": "(Tensor x, bool per_sample) -> Tensor",
    "bn_apply": f"(Tensor x, Tensor? residual, {_GIVEN}) -> Tensor",
    "bn_sums": f"(Tensor dy, Tensor x, Tensor? residual, {_GIVEN}, bool keep) -> Tensor[]",
    "bn_backward": f"(Tensor dy, Tensor x, Tensor? residual, Tensor? sums, Tensor? means, {_GIVEN}) -> Tensor[]",
}


class Activation(NamedTuple):
    """``gain * act(u)``, ``alpha`` the slope of lrelu."""

    act: str
    alpha: float
    gain: float

    @property
    def codes(self) -> tuple[int, float, float]:
        return CODES[self.act], self.alpha, self.gain

    @property
    def is_identity(self) -> bool:
        return self.act == "linear" and self.gain == 1


_IDENTITY = Activation("linear", 0.0, 1.0)


class Statistics(NamedTuple):
    """How ``norm_act`` normalises. ``elements``: those behind a group's mean where the moments are x's own, so that gradients flow through
    them; None for given ones. ``reduce`` adds sums up over ranks."""

    moments: Tensor
    groups: int
    eps: float
    elements: float | Tensor | None
    reduce: Callable[[Tensor], Tensor] | None = None


def activation(act: str, alpha: float | None, gain: float) -> Activation:
    return Activation(*curve_of(act, alpha, gain, None)[:3])


def check_image(x: Tensor, residual: Tensor | None) -> None:
    check_floating("x", x)
    if x.ndim < 2:
        raise refusal("x", f"{x.ndim} dimensions", "at least 2: (B, C, ...)")
    if residual is not None:
        check_is_tensor("residual", residual)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        got = f"{residual.dtype} {tuple(residual.shape)} on {residual.device}"
        raise refusal("residual", got, f"{x.dtype} {tuple(x.shape)} on {x.device}")


def check_channels(x: Tensor, **parameters: Tensor | None) -> None:
    channels = x.shape[1]
    for name, t in parameters.items():
        if t is not None:
            check_floating(name, t)
            if t.shape != (channels,) or t.device != x.device:
                raise refusal(name, f"shape {tuple(t.shape)} on {t.device}", f"{(channels,)} on {x.device}")


def norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Statistics,
    activation: Activation,
    plain: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor],
) -> Tensor:
    """``gain * act(weight * (x - mean) / sqrt(var + eps) + bias + residual)``; ``plain`` is the same in torch's own operators."""
    if wanted((x, weight, bias, residual)):
        result: Tensor = _differentiable(x, weight, bias, residual, statistics, activation, plain)
        return result
    return _apply(x, weight, bias, residual, statistics, activation)


def _apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, statistics: Statistics, activation: Activation
) -> Tensor:
    moments, groups, eps = statistics[:3]
    result: Tensor = torch.ops.genfast.bn_apply(x, residual, moments, weight, bias, groups, eps, *activation.codes)
    return result


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(*arguments: Any) -> Tensor:
    result: Tensor = _NormAct.apply(*arguments)  # type: ignore[no-untyped-call]
    return result


class _NormAct(torch.autograd.Function):
    """Reverse mode by kernel; where the gradient is to be differentiated again, it is the plain function's own."""

    # One function for forward and context: with two, torch binds the arguments to the signature at every call, which takes longer than a
    # small picture. Only torch.func needs two, and it is served by the plain function.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Statistics,
        activation: Activation,
        plain: Callable[..., Tensor],
    ) -> Tensor:
        ctx.statistics, ctx.activation, ctx.plain = statistics, activation, plain
        ctx.save_for_backward(x, weight, bias, residual)
        return _apply(x, weight, bias, residual, statistics, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual = tensors = list(ctx.saved_tensors)
        needs, activation = ctx.needs_input_grad[:4], ctx.activation
        if torch.is_grad_enabled():
            # Views: where one of them is computed from another, each still has a gradient of its own.
            tensors = [None if t is None else t.view_as(t) for t in tensors]
            asked = [t for t, needed in zip(tensors, needs, strict=True) if needed]
            found = iter(torch.autograd.grad(ctx.plain(*tensors), asked, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in needs), None, None, None)
        moments, groups, eps, elements, reduce = ctx.statistics
        given = (moments, weight, bias, groups, eps)
        sums = means = grad_residual = None
        keep = needs[3] and not activation.is_identity
        if keep or elements is not None or needs[1] or needs[2]:
            sums, *kept = torch.ops.genfast.bn_sums(grad, x, residual, *given, *activation.codes, keep)
            if elements is not None:
                means = (sums if reduce is None else reduce(sums)) / elements
            if keep:  # the gradient of the residual is also that of the normalised tensor
                grad, residual, activation = kept[0], None, _IDENTITY
        if needs[3]:
            grad_residual = grad
        grad_x, *gradients = torch.ops.genfast.bn_backward(grad, x, residual, sums, means, *given, *activation.codes)
        grad_weight = gradients[0][1].sum(0).to(weight.dtype) if needs[1] else None
        grad_bias = gradients[0][0].sum(0).to(bias.dtype) if needs[2] else None
        return grad_x if needs[0] else None, grad_weight, grad_bias, grad_residual, None, None, None


# ---- the operators -----------------------------------------------------------------------------------------------------------


def _like(t: Tensor | None, out: Tensor) -> Tensor | None:
    """``t`` with its elements where ``out``, which is dense, has them."""
    return t if t is None or t.stride() == out.stride() else torch.empty_like(out).copy_(t)


def _empty(x: Tensor, samples: int) -> Tensor:
    """What a result lies like: as x, where samples lie one after another or need not."""
    out = torch.empty_like(x)
    in_order = samples <= 1 or x.numel() == 0 or out.stride(0) == x.numel() // samples
    return out if in_order else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _pass(
    which: int,
    x: Tensor,
    dy: Tensor | None,
    residual: Tensor | None,
    coef: Tensor | None,
    samples: int,
    codes: tuple[int, float, float],
    keep: bool = False,
) -> list[Tensor]:
    """The result of a pass, or its sums and with ``keep`` the gradient that they are the sums of."""
    summing = which in (_MOMENTS, _SUMS)
    out = _empty(x, samples)
    sums = torch.empty(2, samples, x.shape[1], dtype=torch.float64, device=x.device) if summing else None
    results = [t for t in (sums, out if keep or not summing else None) if t is not None]
    if x.numel():
        inner = out.stride(1) if x.shape[1] > 1 else x.numel() // samples
        written = out if keep or not summing else None
        x, dy, residual = (_like(t, out) for t in (x, dy, residual))  # type: ignore[assignment]
        _backend.namespace.bn_act_(written, sums, x, dy, residual, coef, samples, inner, which, *codes)
    elif sums is not None:
        sums.zero_()
    return results


def _coefficients(
    x: Tensor,
    moments: Tensor,
    sums: Tensor | None,
    means: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """The passes' coefficients, (6, S, C), in the type of the arithmetic on x; with sums the gradients of bias and weight, (2, S, C)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    coef = torch.empty(_COEFFICIENTS, *moments.shape[1:], dtype=wide, device=x.device)
    gradients = None if sums is None else torch.empty_like(sums)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    if coef.numel():
        _backend.namespace.bn_coefficients_(coef, gradients, moments, sums, means, weight, bias, groups, eps)
    return coef, gradients


def _bn_moments(x: Tensor, per_sample: bool) -> Tensor:
    """Mean and biased variance of each channel, (2, 1, C) or (2, B, C) float64. Summed around an element, so that no mean cancels."""
    return _pass(_MOMENTS, x, None, None, None, x.shape[0] if per_sample else 1, _IDENTITY.codes)[0]


def _bn_apply(
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *codes: Any,
) -> Tensor:
    coef, _ = _coefficients(x, moments, None, None, weight, bias, groups, eps)
    return _pass(_APPLY, x, None, residual, coef, moments.shape[1], codes)[0]


def _bn_sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    act: int,
    alpha: float,
    gain: float,
    keep: bool,
) -> list[Tensor]:
    coef, _ = _coefficients(x, moments, None, None, weight, bias, groups, eps)
    return _pass(_SUMS, x, dy, residual, coef, moments.shape[1], (act, alpha, gain), keep)


def _bn_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    sums: Tensor | None,
    means: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *codes: Any,
) -> list[Tensor]:
    coef, gradients = _coefficients(x, moments, sums, means, weight, bias, groups, eps)
    return _pass(_BACKWARD, x, dy, residual, coef, moments.shape[1], codes) + ([] if gradients is None else [gradients])


# ---- where no kernel is loaded -----------------------------------------------------------------------------------------------


def _bn_act_(
    out: Tensor | None,
    sums: Tensor | None,
    x: Tensor,
    dy: Tensor | None,
    residual: Tensor | None,
    coef: Tensor | None,
    samples: int,
    inner: int,
    which: int,
    act: int,
    alpha: float,
    gain: float,
) -> None:
    _backend.reference_runs(x.device)
    channels = (coef if sums is None else sums).shape[2]  # type: ignore[union-attr]
    shape = (samples, x.numel() // (samples * channels * inner), channels, inner)
    stride = (x.numel() // samples, channels * inner, inner, 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.as_strided(shape, stride).to(wide)
    if coef is None:
        assert sums is not None
        sums.copy_(torch.stack([values.double().mean((1, 3)), values.double().var((1, 3), correction=0)]))
        return
    center, scale, shift, p, q, r = coef[:, :, None, :, None]
    v, name = values - center, list(ACTIVATIONS)[act]
    u = scale * v + shift
    if residual is not None:
        u = u + residual.as_strided(shape, stride)
    if dy is None:
        result = gain * ACTIVATIONS[name].function(u, alpha)
    else:
        result = g = dy.as_strided(shape, stride).to(wide) * (gain * activation_derivative(u, name, alpha, 1))
        if sums is not None:
            sums.copy_(torch.stack([g.double().sum((1, 3)), (g.double() * v).sum((1, 3))]))
        else:
            result = p * g + q * v + r
    if out is not None:
        out.as_strided(shape, stride).copy_(result)


def _bn_coefficients_(
    coef: Tensor,
    gradients: Tensor | None,
    moments: Tensor,
    sums: Tensor | None,
    means: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
) -> None:
    def of_group(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(-1, (groups, -1))  # type: ignore[no-untyped-call]
        return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)

    mean = of_group(moments[0])
    inverse = (of_group(moments[1] + (moments[0] - mean).square()) + eps).rsqrt()
    gamma = torch.ones_like(mean) if weight is None else weight.double().expand_as(mean)
    zero = torch.zeros_like(mean)
    rows = [mean, gamma * inverse, zero if bias is None else bias.double().expand_as(mean), gamma * inverse, zero, zero]
    if means is not None:
        shared = of_group(means * gamma) * (moments.shape[2] // groups)
        rows[4:] = [-(inverse**3) * shared[1], -inverse * shared[0]]
    coef.copy_(torch.stack(rows))
    if gradients is not None and sums is not None:
        gradients.copy_(torch.stack([sums[0], sums[1] * inverse]))


_backend.define(
    SCHEMAS,
    {
        "bn_act_": _bn_act_,
        "bn_coefficients_": _bn_coefficients_,
        "bn_moments": _bn_moments,
        "bn_apply": _bn_apply,
        "bn_sums": _bn_sums,
        "bn_backward": _bn_backward,
    },
    {
        "bn_moments": lambda x, per_sample: x.new_empty(2, x.shape[0] if per_sample else 1, x.shape[1], dtype=torch.float64),
        "bn_apply": lambda x, residual, moments, *_: _empty(x, moments.shape[1]),
        "bn_sums": lambda dy, x, residual, moments, *rest: (
            [torch.empty_like(moments)] + ([_empty(x, moments.shape[1])] if rest[-1] else [])
        ),
        "bn_backward": lambda dy, x, residual, sums, means, moments, *_: (
            [_empty(x, moments.shape[1])] + ([] if sums is None else [torch.empty_like(sums)])
        ),
    },
)
for _name in SCHEMAS:
    refuse_lost_derivatives(_name, "genfast.ops.bn_act")
