"""Convolution whose gradients of gradients are convolutions too.

``y = conv(x, w)`` is linear in both, and so are its gradients ``dx = input_gradient(g, w)`` and ``dw = weight_gradient(g, x)``. The
derivatives of any of the three are the other two, so that they close under differentiation. torch has kernels for all three but, when it
differentiates a gradient, makes the weight's part of forward convolutions of transposed pictures: one for each group, each with copies of
both (2.13).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._autograd import batched, wanted


class _Geometry(NamedTuple):
    """The arguments of ``aten::convolution`` after the tensors."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    transposed: bool
    output_padding: tuple[int, int]
    groups: int


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which dtype a convolution of ``x`` is computed under torch.autocast; None without it, and for float64, which it leaves alone."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def convolution(
    x: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv2d`, or `conv_transpose2d`, without a bias: the same values, memory format and first derivatives;
    under torch.autocast in its dtype."""
    others = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    if others or x.numel() == 0 or not wanted((x, weight)):
        if transposed:
            return F.conv_transpose2d(x, weight, None, stride, padding, 0, groups)
        return F.conv2d(x, weight, None, stride, padding, 1, groups)
    geometry = _Geometry(_pair(stride), _pair(padding), (1, 1), transposed, (0, 0), groups)
    result: Tensor = _Convolution.apply(x, weight, geometry)  # type: ignore[no-untyped-call]
    return result


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _gradients(g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, *asked: bool) -> tuple[Tensor | None, Tensor | None]:
    """Of x and of weight, those that are asked for; of the other tensor no more than the shape is read then."""
    dx, dw, _ = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, [*asked, False])
    return dx, dw


def _by_torch(g: Tensor) -> bool:
    """Whether derivatives are left to torch: of batched gradients, whose graph a custom derivative would drop."""
    return torch._C._are_functorch_transforms_active() or batched(g)


def _convolve(x: Tensor, weight: Tensor, geometry: _Geometry, by_torch: bool) -> Tensor:
    result: Tensor = torch.ops.aten.convolution(x, weight, None, *geometry) if by_torch else _Convolution.apply(x, weight, geometry)  # type: ignore[no-untyped-call]
    return result


def _input_gradient(g: Tensor, weight: Tensor, x: Tensor, geometry: _Geometry, by_torch: bool) -> Tensor | None:
    """Of ``x`` the shape is read."""
    if by_torch:
        return _gradients(g, x, weight, geometry, True, False)[0]
    result: Tensor = _InputGradient.apply(g, weight, x.detach(), geometry)  # type: ignore[no-untyped-call]
    return result


def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, by_torch: bool) -> Tensor | None:
    """Of ``weight`` the shape is read."""
    if by_torch:
        return _gradients(g, x, weight, geometry, False, True)[1]
    result: Tensor = _WeightGradient.apply(g, x, weight.detach(), geometry)  # type: ignore[no-untyped-call]
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return torch.ops.aten.convolution(x, weight, None, *geometry)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled():
            return (*_gradients(g, x, weight, ctx.geometry, needs_x, needs_weight), None)
        by_torch = _by_torch(g)
        dx = _input_gradient(g, weight, x, ctx.geometry, by_torch) if needs_x else None
        dw = _weight_gradient(g, x, weight, ctx.geometry, by_torch) if needs_weight else None
        return dx, dw, None


class _InputGradient(torch.autograd.Function):
    """(g, weight) -> the gradient of x, which is there for its shape."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, x: Tensor, geometry: _Geometry) -> Tensor | None:
        ctx.save_for_backward(g, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return _gradients(g, x, weight, geometry, True, False)[0]

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return None, None, None, None
        (g, weight), by_torch = ctx.saved_tensors, _by_torch(h)
        dg = _convolve(h, weight, ctx.geometry, by_torch) if ctx.needs_input_grad[0] else None
        dw = _weight_gradient(g, h, weight, ctx.geometry, by_torch) if ctx.needs_input_grad[1] else None
        return dg, dw, None, None


class _WeightGradient(torch.autograd.Function):
    """(g, x) -> the gradient of weight, which is there for its shape."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry) -> Tensor | None:
        ctx.save_for_backward(g, x)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return _gradients(g, x, weight, geometry, False, True)[1]

    @staticmethod
    def backward(ctx: Any, h: Tensor | None) -> tuple[Tensor | None, ...]:
        if h is None:
            return None, None, None, None
        (g, x), by_torch = ctx.saved_tensors, _by_torch(h)
        dg = _convolve(x, h, ctx.geometry, by_torch) if ctx.needs_input_grad[0] else None
        dx = _input_gradient(g, h, x, ctx.geometry, by_torch) if ctx.needs_input_grad[1] else None
        return dg, dx, None, None
