"""Convolution, normalisation and activation as one block: the block of DCGAN (Radford et al. 2016) and of most convolutional networks."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from genfast import ops


class ConvBlock(nn.Module):
    """``act(norm(conv(x)) + residual)`` with one pass over the pictures after the convolution in evaluation, two in training.

    (B, channels, H, W), and the residual if there is one, -> (B, out_channels, H', W'), in the memory format of ``x``. ``transposed`` makes
    the convolution a transposed one; ``padding`` defaults to what keeps the size, up to the stride: (kernel - 1) // 2, transposed
    (kernel - stride + 1) // 2. ``norm`` "batch", "group" with ``norm_groups`` groups, or None; without one a bias stands in its place.
    ``act`` and ``alpha`` as `genfast.ops.bias_act`, gain 1. In evaluation the statistics of a batch are folded into the convolution's
    weight. Parameters are ``conv.weight`` and ``norm.weight``, ``norm.bias`` and the running statistics of `torch.nn.BatchNorm2d`, or
    ``norm.weight`` and ``norm.bias`` of `torch.nn.GroupNorm`, or ``bias``. `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the
    batch that of all ranks. The result has x's dtype, in which the convolution takes its weight.
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
        norm: Literal["batch", "group"] | None = "batch",
        norm_groups: int = 32,
        act: str = "relu",
        alpha: float | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "group", None):
            raise ValueError(f"norm: got {norm!r}, supported: 'batch', 'group' or None")
        if padding is None:
            padding = (kernel - stride + 1) // 2 if transposed else (kernel - 1) // 2
        module = nn.ConvTranspose2d if transposed else nn.Conv2d
        self.conv = module(channels, out_channels, kernel, stride, padding, bias=False)
        self.norm: nn.BatchNorm2d | nn.SyncBatchNorm | nn.GroupNorm | None = None
        if norm == "batch":
            self.norm = nn.BatchNorm2d(out_channels)
        elif norm == "group":
            self.norm = nn.GroupNorm(norm_groups, out_channels)
        self.bias = None if norm else nn.Parameter(self.conv.weight.new_zeros(out_channels))
        self.act, self.alpha, self.stride, self.padding, self.transposed = act, alpha, stride, padding, transposed

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "transposed": self.transposed}
        options |= {"act": self.act, "alpha": self.alpha, "training": self.training}
        norm, weight = self.norm, self.conv.weight.to(x.dtype)
        if norm is None:
            assert self.bias is not None
            return ops.conv_block(x, weight, self.bias.to(x.dtype), residual, **options)
        options |= {"norm_weight": norm.weight, "eps": norm.eps}
        if isinstance(norm, nn.GroupNorm):
            return ops.conv_block(x, weight, norm.bias, residual, norm="group", norm_groups=norm.num_groups, **options)
        momentum = norm.momentum
        if self.training:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
            momentum = 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum
        options |= {"running_mean": norm.running_mean, "running_var": norm.running_var, "momentum": momentum}
        return ops.conv_block(x, weight, norm.bias, residual, norm="batch", process_group=_group_of(norm), **options)


def _group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which a norm takes its statistics, where there are several."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
