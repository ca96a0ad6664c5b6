"""What StyleGAN2's networks are measured against: their operators by torch's own, in the fastest forms known.

The functions stand in for those of `genfast.ops` with the same names, as far as StyleGAN2 calls them: 3x3 and 1x1 weights, a 4x4 filter,
sampling by 2. Weights of each sample's own are groups of one convolution; filters are depthwise convolutions. Random
numbers are genfast's: torch's own would be others, and the reference's take a hundred operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.ops import normal, uniform
from genfast.reference import bias_act as _reference_bias_act
from genfast.reference import minibatch_stddev, pixel_norm

__all__ = ["bias_act", "conv2d_resample", "minibatch_stddev", "modulated_conv2d", "normal", "pixel_norm", "uniform", "upsample2d"]


def bias_act(x: Tensor, b: Tensor | None = None, *, act: str = "linear", gain: float | None = None, clamp: float | None = None) -> Tensor:
    if act != "lrelu":
        return _reference_bias_act(x, b, act=act, gain=gain, clamp=clamp)
    y = x if b is None else x + b.view(1, -1, *[1] * (x.ndim - 2))
    y = F.leaky_relu(y, 0.2) * (2**0.5 if gain is None else gain)
    return y if clamp is None else y.clamp(-clamp, clamp)


def _depthwise(f: Tensor, x: Tensor, gain: float = 1.0) -> Tensor:
    return (f * gain).to(x.dtype).expand(x.shape[1], 1, 4, 4)


def upsample2d(x: Tensor, f: Tensor) -> Tensor:
    return F.conv_transpose2d(x, _depthwise(f, x, 4), stride=2, padding=1, groups=x.shape[1])


def conv2d_resample(
    x: Tensor, w: Tensor, f: Tensor | None = None, *, up: int = 1, down: int = 1, padding: int = 0, groups: int = 1
) -> Tensor:
    if f is None or (up == 1 and down == 1):
        return F.conv2d(x, w, padding=padding, groups=groups)
    if up == 2:
        transposed = w.flip([2, 3]).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        y = F.conv_transpose2d(x, transposed, stride=2, groups=groups)
        return F.conv2d(y, _depthwise(f, y, 4), padding=1, groups=y.shape[1])
    if padding == 0:
        return F.conv2d(F.conv2d(x, _depthwise(f, x), stride=2, padding=1, groups=x.shape[1]), w, groups=groups)
    return F.conv2d(F.conv2d(x, _depthwise(f, x), padding=2, groups=x.shape[1]), w, stride=2, groups=groups)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    *,
    up: int = 1,
    padding: int = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    bias: Tensor,
    act: str,
    clamp: float | None = None,
    **_: Any,
) -> Tensor:
    batch = len(x)
    w = weight * styles[:, None, :, None, None]
    if demodulate:
        w = w * (w.square().sum([2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    grouped = x.contiguous(memory_format=torch.contiguous_format).flatten(0, 1)[None]
    y = conv2d_resample(grouped, w.flatten(0, 1).to(x.dtype), resample_filter, up=up, padding=padding, groups=batch)
    y = y[0].unflatten(0, (batch, -1))
    y = y if noise is None else y + noise.to(y.dtype)
    return bias_act(y, bias.to(y.dtype), act=act, clamp=clamp)
