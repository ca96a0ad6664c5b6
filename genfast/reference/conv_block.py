"""Convolution, normalisation, residual and activation in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

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
    """``gain * act(norm(conv(x)) + residual)`` (Radford et al. 2016; He et al. 2016).

    ``weight`` (K, C / groups, kh, kw), ``transposed`` (C, K / groups, kh, kw), convolves as torch's `conv2d` or `conv_transpose2d`;
    ``norm`` "batch" as `bn_act`, "group" with ``norm_groups`` groups, or None; ``norm_weight`` and ``bias`` (K,) belong to the norm, and
    without one ``bias`` is the convolution's; ``residual`` like the result; ``act`` and ``alpha`` as `bias_act`. Returns (B, K, H', W').
    """
    if transposed:
        y = F.conv_transpose2d(x, weight, None, stride, padding, output_padding, groups)
    else:
        y = F.conv2d(x, weight, None, stride, padding, 1, groups)
    if norm == "batch":
        statistics = (running_mean, running_var, training, momentum, eps)
        return bn_act(y, norm_weight, bias, *statistics, act, alpha, gain, residual, process_group)
    if norm == "group":
        return group_norm_act(y, norm_groups, norm_weight, bias, eps, act, alpha, gain, residual)
    y = y if bias is None else y + bias[:, None, None]
    return bias_act(y if residual is None else y + residual, None, act=act, alpha=alpha, gain=gain)
