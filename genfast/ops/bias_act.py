"""Bias, activation, gain and clamp in one pass (docs/gan-ops.md), with derivatives of every order.

Elementwise, y = C(x + b). One operator computes ``factor * C^(k)(x + b)``, and its derivatives are itself: in ``factor`` of the same
order, in ``x`` of the next. The kernels hold orders 0 to 3; a third one that is differentiated again is the reference's closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast.reference.bias_act import ACTIVATIONS, bias_act_derivative

from . import _backend
from ._activations import CODES, curve_of
from ._autograd import gradient_rule, refuse_lost_derivatives, tangent_rule, wanted
from ._checks import check_floating, check_tensor, refusal

_STRAIGHT = ("linear", "relu", "lrelu")  # zero from the second derivative on
_HIGHEST = 3

SCHEMAS = {
    "bias_act_": "(Tensor(a!) out, Tensor(b!)? sums, Tensor? factor, Tensor x, Tensor? b, int channels, int inner, int act, float alpha, "
    "float gain, float? clamp, int order) -> ()",
    "bias_act": "(Tensor? factor, Tensor x, Tensor? b, int dim, int act, float alpha, float gain, float? clamp, int order, bool sums) "
    "-> Tensor[]",
}


class _Curve(NamedTuple):
    dim: int
    act: str
    alpha: float
    gain: float
    clamp: float | None

    @property
    def straight(self) -> bool:
        return self.act in _STRAIGHT

    @property
    def read_from_result(self) -> bool:
        """Whether ``y > 0`` exactly where ``x + b > 0``: then the result, which the next layer keeps anyway, is saved instead of x."""
        return self.act in ("relu", "lrelu") and self.clamp is None and self.gain >= 1 and self.alpha >= 0


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """``clamp(gain * act(x + b), -clamp, clamp)`` in one pass (Karras et al. 2020, StyleGAN2; the order of Karras et al. 2021, StyleGAN3).

    ``x`` of any shape, float32, float64, bfloat16 or float16; ``b`` (x.shape[dim],) in x's dtype, or None; ``act`` linear, relu, lrelu,
    tanh, sigmoid, elu, selu, softplus or swish; ``alpha`` the slope of lrelu (0.2); ``gain`` defaults to sqrt(2) for relu, lrelu and
    swish, else 1; ``clamp`` None for none. Returns x's shape, dtype and, where x is dense, memory format. Computed in float32
    (float64 for float64) and rounded once; a NaN stays a NaN. Differentiable to every order in ``x`` and ``b``: docs/derivatives.md.
    Raises ValueError for anything else.
    """
    check_floating("x", x)
    if not isinstance(dim, int) or not -max(x.ndim, 1) <= dim < max(x.ndim, 1):
        raise refusal("dim", dim, f"a dimension of x, which has {x.ndim}")
    if b is not None:
        if x.ndim == 0:
            raise refusal("b", "a bias for an x without dimensions", "an x of at least one dimension")
        check_tensor("b", b, (x.shape[dim],), x.dtype, x.device)
    curve = _Curve(dim % max(x.ndim, 1), *curve_of(act, alpha, gain, clamp))
    if wanted((x, b)):
        result: Tensor = (_differentiable if torch.compiler.is_compiling() else _derivative)(None, x, b, curve, 0, False)[0]
        return result
    return _kernel(None, x, b, curve, 0, False)[0]


def _kernel(factor: Tensor | None, x: Tensor, b: Tensor | None, curve: _Curve, order: int, sums: bool) -> list[Tensor]:
    dim, act, alpha, gain, clamp = curve
    results: list[Tensor] = torch.ops.genfast.bias_act(factor, x, b, dim, CODES[act], alpha, gain, clamp, order, sums)
    return results


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(*arguments: Any) -> tuple[Tensor, ...]:
    return _derivative(*arguments)


def _derivative(factor: Tensor | None, x: Tensor, b: Tensor | None, curve: _Curve, order: int, sums: bool) -> tuple[Tensor, ...]:
    """``factor * C^(order)(x + b)`` and, with ``sums``, that summed over all dimensions but ``dim``; differentiable in all three."""
    if not wanted((factor, x, b)):
        return tuple(_kernel(factor, x, b, curve, order, sums))
    if order < _HIGHEST:
        forward_mode = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        function = _BiasAct if forward_mode else _BiasActReverse
        results: tuple[Tensor, ...] = function.apply(factor, x, b, curve, order, sums)  # type: ignore[no-untyped-call]
        return results
    out = bias_act_derivative(factor, x, b, *curve, order)
    return (out, _summed(out, curve.dim)) if sums else (out,)


def _summed(x: Tensor, dim: int, first: int = 0) -> Tensor:
    """Over the dimensions from ``first`` on but ``dim``."""
    dims = [i for i in range(first, x.ndim) if i != dim]
    return x.sum(dims) if dims else x  # no dimensions would mean all of them to torch


def _along(b: Tensor, ndim: int, dim: int) -> Tensor:
    return b.reshape([-1 if i == dim else 1 for i in range(ndim)])


class _BiasAct(torch.autograd.Function):
    """(factor, x, b) -> factor * C^(order)(x + b), order below the highest, and with ``sums`` that summed as `_derivative` says."""

    @staticmethod
    def forward(factor: Tensor | None, x: Tensor, b: Tensor | None, curve: _Curve, order: int, sums: bool) -> tuple[Tensor, ...]:
        return tuple(_kernel(factor, x, b, curve, order, sums))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        factor, x, b, ctx.curve, ctx.order, ctx.sums = inputs
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        ctx.constant = ctx.order == 0 and ctx.curve.act == "linear" and ctx.curve.clamp is None  # the derivative is the gain
        ctx.from_result = ctx.order == 0 and ctx.curve.read_from_result
        ctx.save_for_backward(*((None,) * 3 if ctx.constant else (None, output[0], None) if ctx.from_result else (factor, x, b)))
        ctx.save_for_forward(factor, x, b)

    @gradient_rule
    def backward(ctx: Any, grad: Tensor | None, grad_sums: Tensor | None = None) -> tuple[Tensor | None, ...]:
        curve, order = ctx.curve, ctx.order
        factor, x, b = ctx.saved_tensors
        if grad_sums is not None:
            wide = _along(grad_sums, len(ctx.shape), curve.dim)
            grad = wide.expand(ctx.shape) if grad is None else grad + wide
        needs_factor, needs_x, needs_b = ctx.needs_input_grad[:3]
        grad_factor = grad_x = grad_b = None
        if grad is not None and needs_factor:
            (grad_factor,) = _derivative(grad, x, b, curve, order, False)
        if grad is not None and (needs_x or needs_b) and not (curve.straight and order >= 1):
            if ctx.constant:
                results = _derivative(None, grad, None, curve, 0, needs_b)
            else:
                results = _derivative(grad if factor is None else grad * factor, x, b, curve, order + 1, needs_b)
            grad_x, grad_b = results[0] if needs_x else None, results[1] if needs_b else None
        return grad_factor, grad_x, grad_b, None, None, None

    @tangent_rule
    def jvp(
        ctx: Any, saved: Sequence[Any], t_factor: Tensor | None, t_x: Tensor | None, t_b: Tensor | None, *_: None
    ) -> tuple[Tensor, ...]:
        curve, order = ctx.curve, ctx.order
        factor, x, b = saved
        tangent = torch.zeros_like(x) if t_factor is None else _derivative(t_factor, x, b, curve, order, False)[0]
        inner = t_x
        if t_b is not None:
            wide = _along(t_b, x.ndim, curve.dim)
            inner = wide.expand_as(x) if inner is None else inner + wide
        if inner is not None and not (curve.straight and order >= 1):
            tangent = tangent + _derivative(inner if factor is None else factor * inner, x, b, curve, order + 1, False)[0]
        return (tangent, _summed(tangent, curve.dim)) if ctx.sums else (tangent,)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], factor: Tensor | None, x: Tensor, b: Tensor | None, curve: _Curve, order: int, sums: bool
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def front(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        x = front(x, dims[1])
        curve = curve._replace(dim=curve.dim + 1)
        if b is not None and dims[2] is not None:
            x = x + b.movedim(dims[2], 0).reshape([s if i in (0, curve.dim) else 1 for i, s in enumerate(x.shape)])
            b = None
        (out,) = _derivative(None if factor is None else front(factor, dims[0]), x, b, curve, order, False)
        results = (out, _summed(out, curve.dim, 1)) if sums else (out,)
        return results, (0,) * len(results)


class _BiasActReverse(torch.autograd.Function):
    """`_BiasAct` for reverse mode alone. One function for forward and context: with two, which forward mode and torch.func need, torch
    binds the arguments to the signature at every call, which takes longer than a small picture."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor | None, x: Tensor, b: Tensor | None, curve: _Curve, order: int, sums: bool) -> tuple[Tensor, ...]:
        results = tuple(_kernel(factor, x, b, curve, order, sums))
        _BiasAct.setup_context(ctx, (factor, x, b, curve, order, sums), results)
        return results

    backward = _BiasAct.backward


# ---- the operators -----------------------------------------------------------------------------------------------------------


def _like(t: Tensor, out: Tensor) -> Tensor:
    """``t`` with its elements where ``out``, which is dense, has them."""
    return t if t.stride() == out.stride() else torch.empty_like(out).copy_(t)


def _bias_act(
    factor: Tensor | None,
    x: Tensor,
    b: Tensor | None,
    dim: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float | None,
    order: int,
    sums: bool,
) -> list[Tensor]:
    out = torch.empty_like(x)
    total = x.new_zeros(x.shape[dim]) if sums else None
    if x.numel():
        # In memory (outer, channels, inner), whatever the order of the dimensions.
        channels, inner = (x.shape[dim], out.stride(dim)) if (b is not None or sums) and x.shape[dim] > 1 else (1, x.numel())
        factor = None if factor is None else _like(factor, out)
        b = None if b is None else b.contiguous()
        _backend.namespace.bias_act_(out, total, factor, _like(x, out), b, channels, inner, act, alpha, gain, clamp, order)
    return [out] if total is None else [out, total]


def _bias_act_(
    out: Tensor,
    sums: Tensor | None,
    factor: Tensor | None,
    x: Tensor,
    b: Tensor | None,
    channels: int,
    inner: int,
    act: int,
    alpha: float,
    gain: float,
    clamp: float | None,
    order: int,
) -> None:
    _backend.reference_runs(x.device)
    shape, stride = (x.numel() // (channels * inner), channels, inner), (channels * inner, inner, 1)
    factor = None if factor is None else factor.as_strided(shape, stride)
    result = bias_act_derivative(factor, x.as_strided(shape, stride), b, 1, list(ACTIVATIONS)[act], alpha, gain, clamp, order)
    out.as_strided(shape, stride).copy_(result)
    if sums is not None:
        sums.copy_(result.sum((0, 2)))


def _fake(factor: Tensor | None, x: Tensor, b: Tensor | None, dim: int, *options: object) -> list[Tensor]:
    return [torch.empty_like(x)] + ([x.new_empty(x.shape[dim])] if options[-1] else [])


_backend.define(SCHEMAS, {"bias_act_": _bias_act_, "bias_act": _bias_act}, {"bias_act": _fake})
for _name in SCHEMAS:
    refuse_lost_derivatives(_name, "genfast.ops.bias_act")
