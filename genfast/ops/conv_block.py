"""Convolution by torch, then normalisation, residual and activation in one pass (docs/gan-ops.md)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from genfast.reference.bias_act import bias_act as plain_bias_act
from genfast.reference.upfirdn2d import pair

from ._autograd import wanted
from ._checks import LARGEST_INTEGER, check_bytes, check_count, check_floating, refusal
from ._convolution import autocast_dtype
from ._norm_act import Statistics, activation, check_channels, check_image, norm_act
from .bias_act import bias_act
from .bn_act import bn_act
from .group_norm_silu import group_norm_act


def conv_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    groups: int = 1,
    transposed: bool = False,
    norm: Literal["batch", "group"] | None = None,
    norm_weight: Tensor | None = None,
    norm_groups: int = 32,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    alpha: float | None = None,
    gain: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``gain * act(norm(conv(x)) + residual)``: the block of DCGAN (Radford et al. 2016), and with ``residual`` the end of a residual block
    (He et al. 2016; ``act="linear"`` where the activation comes before the convolution, as in BigGAN and R3GAN).

    ``x`` (B, C, H, W), float32, float64, bfloat16 or float16; ``weight`` (K, C / groups, kh, kw), ``transposed`` (C, K / groups, kh, kw),
    in x's dtype, convolves as torch's `conv2d` or `conv_transpose2d`; ``norm`` "batch" as `bn_act`, with ``running_mean``,
    ``running_var``, ``training``, ``momentum`` and ``process_group``, "group" with ``norm_groups`` groups, or None; ``norm_weight`` and
    ``bias`` (K,) belong to the norm, in any of those dtypes, and without one ``bias`` is the convolution's; ``residual`` like the result;
    ``act`` and ``alpha`` as `bias_act`. Returns (B, K, H', W') in the memory format that the convolution gives. After it comes one pass
    over the pictures, two for moments of its own; in evaluation batch normalisation is folded into the weight. Under torch.autocast x and
    weight are taken in its dtype, and the result has that, or the wider one of it and the residual's. Differentiable in every tensor but
    the running ones: docs/derivatives.md. Raises ValueError for anything else.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    if x.ndim != 4:
        raise refusal("x", f"{x.ndim} dimensions", "4: (B, C, H, W)")
    if weight.ndim != 4 or weight.dtype != x.dtype or weight.device != x.device:
        raise refusal("weight", f"{weight.dtype} {tuple(weight.shape)} on {weight.device}", f"4 dimensions, {x.dtype} on {x.device}")
    _check_sizes(x, weight, transposed, stride, padding, output_padding, groups)
    if norm not in ("batch", "group", None):
        raise refusal("norm", repr(norm), "'batch', 'group' or None")
    if norm is None and norm_weight is not None:
        raise refusal("norm_weight", "a tensor", "None without a norm")
    chosen = activation(act, alpha, gain)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        if residual is not None:  # the sum has the wider dtype, as torch's
            check_floating("residual", residual)
            residual = residual.to(torch.promote_types(dtype, residual.dtype))

    def convolved(by: Tensor) -> Tensor:
        by = by.to(x.dtype)
        if transposed:
            y = F.conv_transpose2d(x, by, None, stride, padding, output_padding, groups)
        else:
            y = F.conv2d(x, by, None, stride, padding, 1, groups)
        return y if dtype is None or residual is None else y.to(residual.dtype)

    if norm == "group":
        return group_norm_act(convolved(weight), norm_groups, norm_weight, bias, eps, act, alpha, gain, residual)
    if norm == "batch" and training:
        statistics = (running_mean, running_var, training, momentum, eps)
        return bn_act(convolved(weight), norm_weight, bias, *statistics, act, alpha, gain, residual, process_group)
    if norm == "batch":
        if running_mean is None or running_var is None:
            raise refusal("running_mean and running_var", "None", "both, unless training")
        scale = (running_var + eps).rsqrt() if norm_weight is None else norm_weight * (running_var + eps).rsqrt()
        shift = -running_mean * scale if bias is None else bias - running_mean * scale
        bias = shift
        weight = weight * _along(scale, weight, groups, transposed)
    y = convolved(weight)
    if bias is not None:
        check_channels(y, bias=bias)
        bias = bias.to(y.dtype)
    if residual is None:
        return bias_act(y, bias, act=act, alpha=chosen.alpha, gain=chosen.gain)
    check_image(y, residual)

    def plain(y: Tensor, _: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        y = y if bias is None else y + bias[:, None, None].to(y.dtype)
        return plain_bias_act(y if residual is None else y + residual, None, 1, act, chosen.alpha, chosen.gain)

    if wanted((y, bias, residual)) and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return plain(y, None, bias, residual)
    none = torch.stack([torch.zeros(1, y.shape[1]), torch.ones(1, y.shape[1])]).to(device=y.device, dtype=torch.float64)
    return norm_act(y, None, bias, residual, Statistics(none, False, y.shape[1], 0.0, None), chosen, plain)[0]


def _check_sizes(
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    output_padding: int | tuple[int, int],
    groups: int,
) -> None:
    """Numbers that torch's convolution can count with, and pictures that could be held."""
    check_count("groups", groups)
    (sy, sx), (py, px), (oy, ox) = (
        pair(name, value) for name, value in (("stride", stride), ("padding", padding), ("output_padding", output_padding))
    )
    for name, numbers, least in (("stride", (sy, sx), 1), ("padding", (py, px), 0), ("output_padding", (oy, ox), 0)):
        if min(numbers) < least or max(numbers) > LARGEST_INTEGER:
            raise refusal(name, numbers, f"integers from {least} to {LARGEST_INTEGER}")
    (height, width), (kh, kw) = x.shape[2:], weight.shape[2:]
    if transposed:
        size = (weight.shape[1] * groups, (height - 1) * sy + kh + oy - 2 * py, (width - 1) * sx + kw + ox - 2 * px)
    else:
        size = (max(x.shape[1], weight.shape[0]), height + 2 * py, width + 2 * px)
    check_bytes("stride and padding", (len(x), *size), x)


def _along(scale: Tensor, weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """``scale`` (K,) along the output channels of ``weight``, which a transposed convolution has in its second dimension, by groups."""
    if not transposed:
        return scale[:, None, None, None]
    return scale.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).flatten(0, 1)[..., None, None]
