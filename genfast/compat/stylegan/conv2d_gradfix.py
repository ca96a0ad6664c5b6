"""`torch_utils.ops.conv2d_gradfix`: convolutions with every derivative, and the switch for those of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.ops._autograd import tangent_rule
from genfast.ops._convolution import convolution

enabled = False  # set by the user: whether `no_weight_gradients` has an effect
weight_gradients_disabled = False


@contextmanager
def no_weight_gradients(disable: bool = True) -> Iterator[None]:
    """Backward passes inside give no gradient to weights of this module's convolutions, if ``enabled`` was set before the forward pass."""
    global weight_gradients_disabled
    before = weight_gradients_disabled
    weight_gradients_disabled = before or disable
    try:
        yield
    finally:
        weight_gradients_disabled = before


class _Gate(torch.autograd.Function):
    """The identity, whose gradient stops while `no_weight_gradients` holds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return None if weight_gradients_disabled else grad

    @tangent_rule
    def jvp(ctx: Any, saved: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def gated(weight: Tensor) -> Tensor:
    """``weight``, its gradient subject to `no_weight_gradients`."""
    result: Tensor = _Gate.apply(weight) if enabled and weight.requires_grad else weight  # type: ignore[no-untyped-call]
    return result


def _usual(input: Tensor, bias: Tensor | None, padding: Any, dilation: Any) -> bool:
    """Whether `convolution` serves, whose gradients of gradients need no convolution for each group."""
    return input.ndim == 4 and bias is None and dilation in (1, (1, 1)) and not isinstance(padding, str)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """`torch.nn.functional.conv2d`."""
    if _usual(input, bias, padding, dilation):
        return convolution(input, gated(weight), stride, padding, groups)
    return F.conv2d(input, gated(weight), bias, stride, padding, dilation, groups)


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`."""
    if _usual(input, bias, padding, dilation) and output_padding in (0, (0, 0)):
        return convolution(input, gated(weight), stride, padding, groups, transposed=True)
    return F.conv_transpose2d(input, gated(weight), bias, stride, padding, output_padding, groups, dilation)
