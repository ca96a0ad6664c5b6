"""Convolution, normalisation and activation as one block: the block of DCGAN (Radford et al. 2016) and of most convolutional networks."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from genfast import ops


class ConvBlock(nn.Module):
    """``act(norm(conv(x)))`` with one pass over the pictures after the convolution in evaluation, two in training.

    (B, channels, H, W) -> (B, out_channels, H', W'), in the memory format of ``x``. ``transposed`` makes the convolution a
    transposed one; ``padding`` defaults to what keeps the size, up to the stride: (kernel - 1) // 2, transposed
    (kernel - stride + 1) // 2. ``norm`` "batch" or None; without one a bias stands in its place. ``act`` and ``alpha`` as
    `genfast.ops.bias_act`, gain 1. In evaluation the statistics are folded into the convolution's weight. Parameters are
    ``conv.weight`` and ``norm.weight``, ``norm.bias`` and the running statistics of `torch.nn.BatchNorm2d`, or ``bias``.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        padding: int | None = None,
        transposed: bool = False,
        norm: Literal["batch"] | None = "batch",
        act: str = "relu",
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", None):
            raise ValueError(f"norm: got {norm!r}, supported: 'batch' or None")
        if padding is None:
            padding = (kernel - stride + 1) // 2 if transposed else (kernel - 1) // 2
        module = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.conv = module(channels, out_channels, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None
        self.bias = None if norm else nn.Parameter(self.conv.weight.new_zeros(out_channels))
        self.act, self.alpha, self.padding = act, alpha, padding

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if norm is None:
            y = self.conv(x)
            bias = None if self.bias is None else self.bias.to(y.dtype)
            return ops.bias_act(y, bias, act=self.act, alpha=self.alpha, gain=1.0)
        if self.training:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            return ops.bn_act(
                self.conv(x), norm.weight, norm.bias, norm.running_mean, norm.running_var, eps=norm.eps, act=self.act, alpha=self.alpha
            )
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        conv = self.conv
        if isinstance(conv, nn.ConvTranspose2d):
            y = F.conv_transpose2d(x, conv.weight * scale[:, None, None], None, conv.stride, self.padding)
        else:
            y = F.conv2d(x, conv.weight * scale[:, None, None, None], None, conv.stride, self.padding)
        return ops.bias_act(y, shift.to(y.dtype), act=self.act, alpha=self.alpha, gain=1.0)
