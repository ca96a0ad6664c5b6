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
from ._autograd import gradient_rule, refuse_lost_derivatives, wanted
from ._checks import check_floating, check_is_tensor, refusal

_MOMENTS, _APPLY, _SUMS, _BACKWARD, _MOMENTS_APPLY, _SUMS_BACKWARD = range(6)  # Which of csrc/ops/bn_act/bn_act.cpp

_GIVEN = "Tensor? weight, Tensor? bias, int groups, float eps, int act, float alpha, float gain"
SCHEMAS = {
    "bn_act_": "(Tensor(a!)? out, Tensor(b!)? g, Tensor(c!)? sums, Tensor(d!) moments, Tensor(e!)? gradients, Tensor x, Tensor? dy, "
    "Tensor? residual, Tensor? totals, Tensor? weight, Tensor? bias, int samples, int inner, int which, int groups, float eps, "
    "float elements, int act, float alpha, float gain) -> ()",
    "bn_moments": "(Tensor x) -> Tensor",
    "bn_apply": f"(Tensor x, Tensor? residual, Tensor? moments, bool per_sample, {_GIVEN}) -> Tensor[]",
    "bn_sums": f"(Tensor dy, Tensor x, Tensor? residual, Tensor moments, {_GIVEN}, bool keep) -> Tensor[]",
    "bn_backward": f"(Tensor dy, Tensor x, Tensor? residual, Tensor? sums, Tensor? totals, Tensor moments, {_GIVEN}, float elements, "
    "bool summing, bool keep) -> Tensor[]",
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
    """How ``norm_act`` normalises. ``moments``: None for x's own, of each sample if ``per_sample``. ``elements``: those behind a group's
    mean where gradients flow through the moments; None where they are constants. ``reduce`` adds sums up over ranks."""

    moments: Tensor | None
    per_sample: bool
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
) -> tuple[Tensor, Tensor]:
    """``gain * act(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` and the moments; ``plain``: the first by torch."""
    if wanted((x, weight, bias, residual)):
        function = _differentiable if torch.compiler.is_compiling() else _NormAct.apply
        result: tuple[Tensor, Tensor] = function(x, weight, bias, residual, statistics, activation, plain)  # type: ignore[no-untyped-call]
        return result
    return _apply(x, weight, bias, residual, statistics, activation)


def _apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, statistics: Statistics, activation: Activation
) -> tuple[Tensor, Tensor]:
    moments, per_sample, groups, eps = statistics[:4]
    y, *own = torch.ops.genfast.bn_apply(x, residual, moments, per_sample, weight, bias, groups, eps, *activation.codes)
    return y, own[0] if moments is None else moments


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _NormAct.apply(*arguments)  # type: ignore[no-untyped-call]
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
    ) -> tuple[Tensor, Tensor]:
        y, moments = _apply(x, weight, bias, residual, statistics, activation)
        ctx.statistics, ctx.activation, ctx.plain = statistics, activation, plain
        ctx.save_for_backward(x, weight, bias, residual, moments)
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        return y, moments

    @gradient_rule
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        *tensors, moments = ctx.saved_tensors
        needs, activation = ctx.needs_input_grad[:4], ctx.activation
        if torch.is_grad_enabled():
            # Views: where one of them is computed from another, each still has a gradient of its own.
            tensors = [None if t is None else t.view_as(t) for t in tensors]
            asked = [t for t, needed in zip(tensors, needs, strict=True) if needed]
            found = iter(torch.autograd.grad(ctx.plain(*tensors), asked, grad, create_graph=True))
            return (*(next(found) if needed else None for needed in needs), None, None, None)
        x, weight, bias, residual = tensors
        _, _, groups, eps, elements, reduce = ctx.statistics
        given = (moments, weight, bias, groups, eps)
        keep = needs[3] and not activation.is_identity  # the gradient of u, which is then that of the residual
        summing = keep or elements is not None or needs[1] or needs[2]
        grad_residual, operators = grad, torch.ops.genfast
        if reduce is None:
            options = (*given, *activation.codes, 0.0 if elements is None else elements, summing, keep)
            grad_x, *more = operators.bn_backward(grad, x, residual, None, None, *options)
            if keep:
                grad_residual = more[1]
        else:
            sums, *kept = operators.bn_sums(grad, x, residual, *given, *activation.codes, keep)
            totals = reduce(sums) / elements
            if keep:
                grad = grad_residual = kept[0]
                residual, activation = None, _IDENTITY
            grad_x, *more = operators.bn_backward(grad, x, residual, sums, totals, *given, *activation.codes, 1.0, False, False)
        return (
            grad_x if needs[0] else None,
            _over_samples(more[0][1], weight.dtype) if needs[1] else None,
            _over_samples(more[0][0], bias.dtype) if needs[2] else None,
            grad_residual if needs[3] else None,
            None,
            None,
            None,
        )


def _over_samples(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return (gradient[0] if len(gradient) == 1 else gradient.sum(0)).to(dtype)


# ---- the operators -----------------------------------------------------------------------------------------------------------


def _like(t: Tensor | None, out: Tensor) -> Tensor | None:
    """``t`` with its elements where ``out``, which is dense, has them."""
    return t if t is None or t.stride() == out.stride() else torch.empty_like(out).copy_(t)


def _empty(x: Tensor, samples: int) -> Tensor:
    """What a result lies like: as x, where samples lie one after another or need not."""
    out = torch.empty_like(x)
    in_order = samples <= 1 or x.numel() == 0 or out.stride(0) == x.numel() // samples
    return out if in_order else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _run(
    which: int,
    x: Tensor,
    moments: Tensor,
    out: Tensor | None = None,
    g: Tensor | None = None,
    sums: Tensor | None = None,
    gradients: Tensor | None = None,
    dy: Tensor | None = None,
    residual: Tensor | None = None,
    totals: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
    eps: float = 0.0,
    codes: tuple[int, float, float] = _IDENTITY.codes,
    elements: float = 0.0,
) -> None:
    """The passes ``which``, into whatever of ``out``, ``g``, ``sums``, ``gradients`` and ``moments`` they write."""
    samples = moments.shape[1]
    if x.numel() == 0:
        for t in (sums, gradients, *([moments] if which in (_MOMENTS, _MOMENTS_APPLY) else [])):
            if t is not None:
                t.zero_()
        return
    layout = out if out is not None else g if g is not None else _empty(x, samples)
    inner = layout.stride(1) if x.shape[1] > 1 else x.numel() // samples
    _backend.namespace.bn_act_(
        out,
        g,
        sums,
        moments,
        gradients,
        _like(x, layout),
        _like(dy, layout),
        _like(residual, layout),
        totals,
        None if weight is None else weight.contiguous(),
        None if bias is None else bias.contiguous(),
        samples,
        inner,
        which,
        groups,
        eps,
        elements,
        *codes,
    )


def _statistics(x: Tensor, samples: int) -> Tensor:
    return torch.empty(2, samples, x.shape[1], dtype=torch.float64, device=x.device)


def _bn_moments(x: Tensor) -> Tensor:
    """Mean and biased variance of each channel, (2, 1, C) float64. Summed around an element, so that no mean cancels."""
    moments = _statistics(x, 1)
    _run(_MOMENTS, x, moments)
    return moments


def _bn_apply(
    x: Tensor,
    residual: Tensor | None,
    moments: Tensor | None,
    per_sample: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    *codes: Any,
) -> list[Tensor]:
    """The result; and x's own moments, where none are given."""
    own = _statistics(x, x.shape[0] if per_sample else 1) if moments is None else None
    used = moments if own is None else own
    assert used is not None
    out, which = _empty(x, used.shape[1]), _APPLY if own is None else _MOMENTS_APPLY
    _run(which, x, used, out, residual=residual, weight=weight, bias=bias, groups=groups, eps=eps, codes=codes)
    return [out] if own is None else [out, own]


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
    """The sums, (2, S, C) float64; and with ``keep`` the gradient that they are the sums of."""
    sums, g = torch.empty_like(moments), _empty(x, moments.shape[1]) if keep else None
    _run(_SUMS, x, moments, None, g, sums, None, dy, residual, None, weight, bias, groups, eps, (act, alpha, gain))
    return [sums] if g is None else [sums, g]


def _bn_backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    sums: Tensor | None,
    totals: Tensor | None,
    moments: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    act: int,
    alpha: float,
    gain: float,
    elements: float,
    summing: bool,
    keep: bool,
) -> list[Tensor]:
    """The gradient of x; with sums, given or made here, those of bias and weight, (2, S, C); with ``keep`` that of the residual.

    Sums made here also stand for the moments' gradients, if ``elements`` is not 0; those that are given do so as ``totals``, of all ranks.
    """
    out, g = _empty(x, moments.shape[1]), _empty(x, moments.shape[1]) if keep else None
    which = _SUMS_BACKWARD if summing else _BACKWARD
    sums = torch.empty_like(moments) if summing else sums
    gradients = None if sums is None else torch.empty_like(sums)
    codes = (act, alpha, gain)
    _run(which, x, moments, out, g, sums, gradients, dy, residual, totals, weight, bias, groups, eps, codes, elements)
    return [t for t in (out, gradients, g) if t is not None]


# ---- where no kernel is loaded -----------------------------------------------------------------------------------------------


def _bn_act_(
    out: Tensor | None,
    g: Tensor | None,
    sums: Tensor | None,
    moments: Tensor,
    gradients: Tensor | None,
    x: Tensor,
    dy: Tensor | None,
    residual: Tensor | None,
    totals: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    samples: int,
    inner: int,
    which: int,
    groups: int,
    eps: float,
    elements: float,
    act: int,
    alpha: float,
    gain: float,
) -> None:
    _backend.reference_runs(x.device)
    channels = moments.shape[2]
    shape = (samples, x.numel() // (samples * channels * inner), channels, inner)
    stride = (x.numel() // samples, channels * inner, inner, 1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def seen(t: Tensor) -> Tensor:
        return t.as_strided(shape, stride)

    def of_group(t: Tensor) -> Tensor:
        grouped: Tensor = t.unflatten(-1, (groups, -1))  # type: ignore[no-untyped-call]
        return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)

    def placed(t: Tensor) -> Tensor:
        return t.to(wide).expand(samples, channels)[:, None, :, None]

    values = seen(x).to(wide)
    if which in (_MOMENTS, _MOMENTS_APPLY):
        moments.copy_(torch.stack([values.double().mean((1, 3)), values.double().var((1, 3), correction=0)]))
    if which == _MOMENTS:
        return
    mean = of_group(moments[0])
    inverse = (of_group(moments[1] + (moments[0] - mean).square()) + eps).rsqrt()
    gamma = torch.ones_like(mean) if weight is None else weight.double().expand_as(mean)
    v, name = values - placed(mean), list(ACTIVATIONS)[act]
    u = placed(gamma * inverse) * v
    u = u if bias is None else u + placed(bias)
    u = u if residual is None else u + seen(residual)
    if dy is None:
        assert out is not None
        seen(out).copy_(gain * ACTIVATIONS[name].function(u, alpha))
        return
    slope = seen(dy).to(wide) * (gain * activation_derivative(u, name, alpha, 1))
    if which in (_SUMS, _SUMS_BACKWARD):
        assert sums is not None
        sums.copy_(torch.stack([slope.double().sum((1, 3)), (slope.double() * v).sum((1, 3))]))
    if g is not None:
        seen(g).copy_(slope)
    if out is None:
        return
    result = placed(gamma * inverse) * slope
    totals = sums if which == _SUMS_BACKWARD and elements else totals
    if totals is not None:
        shared = of_group(totals / elements * gamma) * (channels // groups)
        result = result - placed(inverse**3 * shared[1]) * v - placed(inverse * shared[0])
    seen(out).copy_(result)
    if gradients is not None and sums is not None:
        gradients.copy_(torch.stack([sums[0], sums[1] * inverse]))


def _fake_backward(dy: Tensor, x: Tensor, residual: Tensor | None, sums: Tensor | None, totals: Tensor | None, *rest: Any) -> list[Tensor]:
    moments, summing, keep = rest[0], rest[-2], rest[-1]
    more = [torch.empty_like(moments)] if summing or sums is not None else []
    return [_empty(x, moments.shape[1]), *more] + ([_empty(x, moments.shape[1])] if keep else [])


def _fake_apply(x: Tensor, residual: Tensor | None, moments: Tensor | None, per_sample: bool, *_: Any) -> list[Tensor]:
    samples = moments.shape[1] if moments is not None else x.shape[0] if per_sample else 1
    return [_empty(x, samples)] + ([_statistics(x, samples)] if moments is None else [])


_backend.define(
    SCHEMAS,
    {"bn_act_": _bn_act_, "bn_moments": _bn_moments, "bn_apply": _bn_apply, "bn_sums": _bn_sums, "bn_backward": _bn_backward},
    {
        "bn_moments": lambda x: _statistics(x, 1),
        "bn_apply": _fake_apply,
        "bn_sums": lambda dy, x, residual, moments, *rest: (
            [torch.empty_like(moments)] + ([_empty(x, moments.shape[1])] if rest[-1] else [])
        ),
        "bn_backward": _fake_backward,
    },
)
for _name in SCHEMAS:
    refuse_lost_derivatives(_name, "genfast.ops.bn_act")
