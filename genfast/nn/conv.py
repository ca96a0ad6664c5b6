"""Convolution, normalisation and activation as one block: the block of DCGAN (Radford et al. 2016) and of most convolutional networks."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from genfast import ops
from genfast.nn.plain import call, plain

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm)


class ConvBlock(nn.Module):
    """``act(norm(conv(x)) + residual)`` with one pass over the pictures after the convolution in evaluation, two in training.

    (B, channels, H, W), and the residual if there is one, -> (B, out_channels, H', W'), in the memory format of ``x``. ``transposed`` makes
    the convolution a transposed one; ``padding`` defaults to what keeps the size, up to the stride: (kernel - 1) // 2, transposed
    (kernel - stride + 1) // 2. ``norm`` "batch", "group" with ``norm_groups`` groups, or None; without one a bias stands in its place.
    ``act`` and ``alpha`` as `genfast.ops.bias_act`, gain 1. In evaluation the statistics of a batch are folded into the convolution's
    weight. Parameters are ``conv.weight`` and ``norm.weight``, ``norm.bias`` and the running statistics of `torch.nn.BatchNorm2d`, or
    ``norm.weight`` and ``norm.bias`` of `torch.nn.GroupNorm`, or ``bias``. `torch.nn.SyncBatchNorm.convert_sync_batchnorm` makes the
    batch that of all ranks. The result has x's dtype, in which the convolution takes its weight; under `torch.autocast` its dtype.

    ``conv`` and ``norm`` may be replaced, wrapped, hooked, pruned, adapted, parametrised and set to training or evaluation of their own:
    the fused computation is for torch's own modules as they are (`genfast.nn.plain`), all else is called.
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
        self.act, self.alpha = act, alpha

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, norm = self.conv, self.norm
        if not (_is_plain_convolution(conv) and (norm is None or (self.bias is None and plain(norm, *_NORMS)))):
            return self._called(x, residual)
        options: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups}
        options |= {"output_padding": conv.output_padding, "transposed": type(conv) is nn.ConvTranspose2d}
        options |= {"act": self.act, "alpha": self.alpha}
        weight = conv.weight.to(x.dtype)
        if norm is None:
            return ops.conv_block(x, weight, self.bias, residual, **options)
        options |= {"norm_weight": norm.weight, "eps": norm.eps}
        if isinstance(norm, nn.GroupNorm):
            return ops.conv_block(x, weight, norm.bias, residual, norm="group", norm_groups=norm.num_groups, **options)
        assert isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
        mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
        training = norm.training or (mean is None and var is None)
        if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            momentum = 1.0 / float(norm.num_batches_tracked) if momentum is None else momentum
        if norm.training and not norm.track_running_stats:
            mean = var = None
        options |= {"running_mean": mean, "running_var": var, "momentum": momentum or 0.0, "training": training}
        return ops.conv_block(x, weight, norm.bias, residual, norm="batch", process_group=_group_of(norm), **options)

    def _called(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same by calls of the submodules."""
        y = call(self.conv, x)
        bias = None if self.bias is None else self.bias.to(y.dtype)
        if self.norm is not None:
            y, bias = call(self.norm, y if bias is None else y + bias[:, None, None]), None
        if residual is not None:
            y, bias = (y if bias is None else y + bias[:, None, None]) + residual, None
        return ops.bias_act(y, bias, act=self.act, alpha=self.alpha, gain=1.0)


def _is_plain_convolution(conv: nn.Module) -> bool:
    """Whether `genfast.ops.conv_block` computes what a call of ``conv`` does."""
    if not plain(conv, nn.Conv2d, nn.ConvTranspose2d):
        return False
    assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
    return conv.bias is None and conv.padding_mode == "zeros" and conv.dilation == (1, 1) and not isinstance(conv.padding, str)


def _group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The ranks over which a norm takes its statistics, where there are several."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None
