"""Batch normalisation and activation in two passes, backward in two (docs/gan-ops.md).

The operators take coefficients for each channel, (6, C), or for each channel of each sample, (6, B, C).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast import reference
from genfast.reference.bias_act import ACTIVATIONS, activation_derivative

from . import _backend
from ._autograd import refuse_lost_derivatives, wanted
from ._checks import check_dtype, refusal

ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_MOMENTS, _APPLY, _SUMS, _BACKWARD = range(4)  # csrc/ops/bn_act/params.h

SCHEMAS = {
    "bn_act_": "(Tensor(a!)? out, Tensor(b!)? sums, Tensor x, Tensor? dy, Tensor coef, int inner, int which, int act, float alpha) -> ()",
    "bn_moments": "(Tensor x, bool per_sample) -> Tensor",
    "bn_apply": "(Tensor x, Tensor coef, int act, float alpha) -> Tensor",
    "bn_sums": "(Tensor dy, Tensor x, Tensor coef, int act, float alpha) -> Tensor",
    "bn_backward": "(Tensor dy, Tensor x, Tensor coef, int act, float alpha) -> Tensor",
}


class _Options(NamedTuple):
    training: bool
    eps: float
    act: str
    alpha: float


def bn_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    alpha: float | None = None,
) -> Tensor:
    """``act(weight * (x - mean) / sqrt(var + eps) + bias)`` for each channel, in two passes (Ioffe and Szegedy 2015).

    ``x`` (B, C, ...), float32, float64, bfloat16 or float16, in any dense memory format, which the result keeps; the others (C,) in any of
    those. ``training``: mean and variance of this batch, which also move the running ones by ``momentum`` (the variance
    unbiased), where they are given; else the running ones. ``act`` and ``alpha`` as `bias_act`, gain 1. Sums are float32 over at most
    16384 elements, then float64. Differentiable in ``x``, ``weight`` and ``bias``: docs/derivatives.md. Raises ValueError otherwise.
    """
    check_dtype("x", x.dtype)
    if x.ndim < 2:
        raise refusal("x", f"{x.ndim} dimensions", "at least 2: (B, C, ...)")
    if act not in ACTIVATIONS:
        raise refusal("act", repr(act), ", ".join(ACTIVATIONS))
    channels = x.shape[1]
    for name, t in (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var)):
        if t is not None:
            check_dtype(name, t.dtype)
            if t.shape != (channels,) or t.device != x.device:
                raise refusal(name, f"shape {tuple(t.shape)} on {t.device}", f"{(channels,)} on {x.device}")
    if not training and (running_mean is None or running_var is None):
        raise refusal("running_mean and running_var", "None", "both, unless training")
    if training and x.numel() <= channels:
        raise refusal("x", f"{x.numel() // max(channels, 1)} values for each channel", "at least 2 in training")
    known = ACTIVATIONS[act]
    options = _Options(training, float(eps), act, float(known.alpha if alpha is None else alpha))
    derivative = wanted((x, weight, bias))
    if derivative and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return reference.bn_act(x, weight, bias, running_mean, running_var, training, momentum, eps, act, alpha)
    if training:
        moments: Tensor = torch.ops.genfast.bn_moments(x.detach(), False)
        _move(running_mean, moments[0], momentum)
        _move(running_var, moments[1] * (x.numel() / (x.numel() - channels)), momentum)
    else:
        assert running_mean is not None and running_var is not None
        moments = torch.stack([running_mean.detach().double(), running_var.detach().double()])
    if derivative:
        result: Tensor = _differentiable(x, weight, bias, moments, options)
        return result
    return _forward(x, weight, bias, moments, options)


def _move(running: Tensor | None, value: Tensor, momentum: float) -> None:
    if running is not None:
        with torch.no_grad():
            running.copy_((1 - momentum) * running.double() + momentum * value)


def _coefficients(x: Tensor, moments: Tensor, eps: float, weight: Tensor | None, shift: Tensor | None) -> list[Tensor]:
    """Center, scale and shift of csrc/ops/bn_act/params.h, (C,) float64."""
    inverse = (moments[1] + eps).rsqrt()
    zero = torch.zeros_like(inverse)
    return [moments[0], inverse if weight is None else weight.detach() * inverse, zero if shift is None else shift.detach().double()]


def packed(x: Tensor, rows: list[Tensor]) -> Tensor:
    """Up to six coefficients, in the order of csrc/ops/bn_act/params.h, in the type of the arithmetic on ``x``."""
    rows = rows + [torch.zeros_like(rows[0])] * (6 - len(rows))
    return torch.stack(rows).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, o: _Options) -> Tensor:
    coef = packed(x, _coefficients(x, moments, o.eps, weight, bias))
    result: Tensor = torch.ops.genfast.bn_apply(x, coef, ACTIVATION_CODES[o.act], o.alpha)
    return result


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, o: _Options) -> Tensor:
    result: Tensor = _BnAct.apply(x, weight, bias, moments, o)  # type: ignore[no-untyped-call]
    return result


class _BnAct(torch.autograd.Function):
    """Reverse mode by kernel; where the gradient is to be differentiated again, it is the reference's own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, o: _Options) -> Tensor:
        return _forward(x, weight, bias, moments, o)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, moments = ctx.saved_tensors
        o, needs = ctx.options, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            wide = moments.to(x.dtype)
            mean, var = (None, None) if o.training else (wide[0], wide[1])
            y = reference.bn_act(x, weight, bias, mean, var, o.training, 0.0, o.eps, o.act, o.alpha)
            asked = [t for t, needed in zip((x, weight, bias), needs, strict=True) if needed]
            found = iter(torch.autograd.grad(y, asked, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in needs), None, None)
        center, scale, shift = _coefficients(x, moments, o.eps, weight, bias)
        act, inverse = ACTIVATION_CODES[o.act], (moments[1] + o.eps).rsqrt()
        grad_x = grad_weight = grad_bias = None
        sums = torch.zeros_like(moments)
        if o.training or needs[1] or needs[2]:
            sums = torch.ops.genfast.bn_sums(grad, x, packed(x, [center, scale, shift]), act, o.alpha)
        if needs[0]:
            mean = sums / (x.numel() / x.shape[1]) if o.training else torch.zeros_like(sums)
            rows = [center, scale, shift, scale, -scale * inverse.square() * mean[1], -scale * mean[0]]
            grad_x = torch.ops.genfast.bn_backward(grad, x, packed(x, rows), act, o.alpha)
        if needs[1]:
            grad_weight = (sums[1] * inverse).to(weight.dtype)
        if needs[2]:
            grad_bias = sums[0].to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None


# ---- the operators -----------------------------------------------------------------------------------------------------------


def _like(t: Tensor, out: Tensor) -> Tensor:
    """``t`` with its elements where ``out``, which is dense, has them."""
    return t if t.stride() == out.stride() else torch.empty_like(out).copy_(t)


def _samples(x: Tensor) -> list[tuple[slice, slice]]:
    """How a dense (B, C, ...) is cut so that each channel of each sample is a channel: (samples, channels of all samples) of each piece."""
    channels = x.shape[1]
    if x.is_contiguous():
        return [(slice(None), slice(None))]
    return [(slice(n, n + 1), slice(n * channels, (n + 1) * channels)) for n in range(len(x))]


def _pass(which: int, x: Tensor, dy: Tensor | None, coef: Tensor, act: int, alpha: float) -> Tensor:
    out = torch.empty_like(x)
    summing = which in (_MOMENTS, _SUMS)
    sums = torch.zeros(2, *coef.shape[1:], dtype=torch.float64, device=x.device)
    if x.numel():
        x, dy = _like(x, out), None if dy is None else _like(dy, out)
        if coef.ndim == 2:
            inner = out.stride(1) if x.shape[1] > 1 else x.numel()
            _backend.namespace.bn_act_(None if summing else out, sums if summing else None, x, dy, coef, inner, which, act, alpha)
        else:
            _pass_by_sample(which, out, sums, x, dy, coef.flatten(1), act, alpha, summing)
    return sums if summing else out


def _pass_by_sample(
    which: int, out: Tensor, sums: Tensor, x: Tensor, dy: Tensor | None, coef: Tensor, act: int, alpha: float, summing: bool
) -> None:
    """One launch where a sample's channels lie one after another; else one a sample."""
    for samples, channels in _samples(x):
        part = x[samples]
        inner = part.stride(1) if len(part) == 1 and part.shape[1] > 1 else part[0, 0].numel()
        total = torch.zeros(2, coef[:, channels].shape[1], dtype=torch.float64, device=x.device) if summing else None
        given = None if dy is None else dy[samples]
        _backend.namespace.bn_act_(
            None if summing else out[samples], total, part, given, coef[:, channels].contiguous(), inner, which, act, alpha
        )
        if total is not None:
            sums.flatten(1)[:, channels] = total


def _bn_moments(x: Tensor, per_sample: bool) -> Tensor:
    """Mean and biased variance of each channel, (2, C) or (2, B, C) float64. Summed around an element, so that no mean cancels."""
    origin = x if per_sample else x[0]
    while origin.ndim > (2 if per_sample else 1):
        origin = origin[..., 0]
    origin = origin.double()
    mean, square = _pass(_MOMENTS, x, None, packed(x, [origin]), 0, 0.0) / (x.numel() / max(origin.numel(), 1))
    return torch.stack([origin + mean, (square - mean.square()).clamp(min=0)])


def _bn_act_(
    out: Tensor | None, sums: Tensor | None, x: Tensor, dy: Tensor | None, coef: Tensor, inner: int, which: int, act: int, alpha: float
) -> None:
    _backend.reference_runs(x.device)
    channels = coef.shape[1]
    shape, stride = (x.numel() // (channels * inner), channels, inner), (channels * inner, inner, 1)
    center, scale, shift, p, q, r = coef[:, :, None]
    v = x.as_strided(shape, stride) - center
    name, u = list(ACTIVATIONS)[act], scale * v + shift
    pair = (v, v)
    if dy is not None:
        g = dy.as_strided(shape, stride) * activation_derivative(u, name, alpha, 1)
        pair = (g, v)
    if sums is not None:
        sums.copy_(torch.stack([pair[0].double().sum((0, 2)), (pair[0].double() * pair[1]).sum((0, 2))]))
    if out is not None:
        out.as_strided(shape, stride).copy_(ACTIVATIONS[name].function(u, alpha) if dy is None else p * pair[0] + q * v + r)


_backend.define(
    SCHEMAS,
    {
        "bn_act_": _bn_act_,
        "bn_moments": _bn_moments,
        "bn_apply": lambda x, coef, act, alpha: _pass(_APPLY, x, None, coef, act, alpha),
        "bn_sums": lambda dy, x, coef, act, alpha: _pass(_SUMS, x, dy, coef, act, alpha),
        "bn_backward": lambda dy, x, coef, act, alpha: _pass(_BACKWARD, x, dy, coef, act, alpha),
    },
    {
        "bn_moments": lambda x, per_sample: x.new_empty(2, *(x.shape[:2] if per_sample else x.shape[1:2]), dtype=torch.float64),
        "bn_apply": lambda x, *_: torch.empty_like(x),
        "bn_sums": lambda dy, x, coef, *_: x.new_empty(2, *coef.shape[1:], dtype=torch.float64),
        "bn_backward": lambda dy, x, *_: torch.empty_like(x),
    },
)
for _name in SCHEMAS:
    refuse_lost_derivatives(_name, "genfast.ops.bn_act")
