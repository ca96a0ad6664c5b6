"""Batch normalisation with residual and activation in pure PyTorch (docs/gan-ops.md), over one process or several.

Written out: in training, torch's own `batch_norm` takes its saved statistics for constants in the third derivative, which is then wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .bias_act import ACTIVATIONS


def bn_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "relu",
    alpha: float | None = None,
    gain: float = 1.0,
    residual: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``gain * act(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` for each channel (Ioffe and Szegedy 2015; He et al. 2016).

    ``x`` (B, C, ...); ``residual`` None or like x; the others (C,). ``training``: mean and variance of this batch, which also move the
    running ones by ``momentum`` (the variance unbiased), where they are given; else the running ones. ``process_group``: in training the
    batch is that of all its ranks. ``act`` and ``alpha`` as `bias_act`. Returns x's shape and dtype.
    """
    wide = x if x.dtype == torch.float64 else x.float()

    def along(t: Tensor) -> Tensor:
        return t.to(wide.dtype).reshape(-1, *[1] * (x.ndim - 2))

    def total(t: Tensor) -> Tensor:
        return t if process_group is None else all_reduce(t, process_group)

    if training:
        dims = [i for i in range(x.ndim) if i != 1]
        count = total(wide.new_full((1,), x.numel() / x.shape[1]))
        mean = total(wide.sum(dims)) / count
        var = total((wide - along(mean)).square().sum(dims)) / count
        with torch.no_grad():
            for running, value in ((running_mean, mean), (running_var, var * count / (count - 1))):
                if running is not None:
                    running.lerp_(value.to(running.dtype), momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.to(wide.dtype), running_var.to(wide.dtype)
    y = (wide - along(mean)) * along((var + eps).rsqrt())
    y = y if weight is None else y * along(weight)
    y = (y if bias is None else y + along(bias)).to(x.dtype)
    known = ACTIVATIONS[act]
    return known.function(y if residual is None else y + residual, known.alpha if alpha is None else alpha) * gain


class _AllReduce(torch.autograd.Function):
    """The sum over ranks. Its gradient is the sum of the ranks' gradients, so it closes to every order."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.process_group), None


def all_reduce(t: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """The sum of ``t`` over ranks, differentiable to every order: the loss is the sum of the ranks' losses."""
    total: Tensor = _AllReduce.apply(t, process_group)  # type: ignore[no-untyped-call]
    return total
