"""Batch normalisation, residual and activation in two passes, backward in two (docs/gan-ops.md), over one process or several."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from genfast import reference
from genfast.reference.bn_act import all_reduce

from ._autograd import wanted
from ._checks import refusal
from ._norm_act import Statistics, activation, check_channels, check_image, norm_act


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
    """``gain * act(weight * (x - mean) / sqrt(var + eps) + bias + residual)`` for each channel, in two passes (Ioffe and Szegedy 2015; the
    residual before the activation as in He et al. 2016).

    ``x`` (B, C, ...), float32, float64, bfloat16 or float16, in any dense memory format, which the result keeps; ``residual`` None or like
    x; the others (C,) in any of those. ``training``: mean and variance of this batch, which also move the running ones by ``momentum`` (the
    variance unbiased), where they are given; else the running ones. ``act`` and ``alpha`` as `bias_act`. ``process_group``: in training
    the batch is that of all its ranks, whose parts may differ in size, as in `torch.nn.SyncBatchNorm`; every rank must call, forward and
    backward. Sums are float32 over at most 16384 elements, then float64. Differentiable in ``x``, ``weight``, ``bias`` and ``residual``:
    docs/derivatives.md. Raises ValueError otherwise.
    """
    check_image(x, residual)
    check_channels(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    chosen = activation(act, alpha, gain)
    channels = x.shape[1]
    if not training and (running_mean is None or running_var is None):
        raise refusal("running_mean and running_var", "None", "both, unless training")
    shared = process_group if training else None
    if training and shared is None and x.numel() <= channels:
        raise refusal("x", f"{x.numel() // max(channels, 1)} values for each channel", "at least 2 in training")

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        mean, var = (None, None) if training else (running_mean, running_var)
        return reference.bn_act(x, weight, bias, mean, var, training, 0.0, eps, act, alpha, gain, residual, shared)

    if wanted((x, weight, bias, residual)) and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        if shared is not None:
            raise refusal("process_group", "a tangent or a torch.func transform", "reverse mode over several ranks")
        return reference.bn_act(x, weight, bias, running_mean, running_var, training, momentum, eps, act, alpha, gain, residual)
    count: float | Tensor = x.numel() / max(channels, 1)
    if shared is not None:
        moments, count = _merged(torch.ops.genfast.bn_moments(x.detach()), x.numel() / channels, shared)
        statistics = Statistics(moments, False, channels, eps, count, lambda sums: all_reduce(sums, shared))
    elif training:
        statistics = Statistics(None, False, channels, eps, count)
    else:
        assert running_mean is not None and running_var is not None
        running_mean, running_var = running_mean.detach().clone(), running_var.detach().clone()
        moments = torch.stack([running_mean.double(), running_var.double()])[:, None]
        statistics = Statistics(moments, False, channels, eps, None)
    y, moments = norm_act(x, weight, bias, residual, statistics, chosen, plain)
    if training and (running_mean is not None or running_var is not None):
        with torch.no_grad():
            mean, var = moments.unbind()
            if running_mean is not None:
                running_mean.lerp_(mean[0].to(running_mean.dtype), momentum)
            if running_var is not None:
                running_var.lerp_((var[0] * (count / (count - 1))).to(running_var.dtype), momentum)
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _merged(moments: Tensor, count: float, process_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Moments and number of elements of all ranks, the same bits on each of them (Chan et al. 1983). A rank may have no element."""
    mine = torch.cat([moments.flatten(), moments.new_full((1,), count)])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, mine, group=process_group)
    of_ranks = torch.stack(parts)
    counts = of_ranks[:, -1]
    means, variances = of_ranks[:, :-1].unflatten(1, (2, -1)).unbind(1)
    total = counts.sum()
    mean = counts @ means / total
    variance = counts @ (variances + (means - mean).square()) / total
    return torch.stack([mean, variance])[:, None], total
