"""Group normalisation, residual and activation in two passes, backward in two, by the kernels of `bn_act`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast.reference.group_norm_silu import group_norm_act as plain_group_norm_act

from ._autograd import wanted
from ._checks import refusal
from ._norm_act import Statistics, activation, check_channels, check_image, norm_act


def group_norm_silu(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``silu(group_norm(x))`` in two passes (Wu and He 2018; Ramachandran et al. 2017).

    ``x`` (B, C, ...), float32, float64, bfloat16 or float16, contiguous or channels_last, which the result is too; ``groups`` divides C;
    ``weight`` and ``bias`` (C,) in any of those dtypes, or None. Sums as in `bn_act`. Differentiable in ``x``, ``weight`` and ``bias``:
    docs/derivatives.md. Raises ValueError for anything else.
    """
    return group_norm_act(x, groups, weight, bias, eps, "swish", None, 1.0, None)


def group_norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str,
    alpha: float | None,
    gain: float,
    residual: Tensor | None,
) -> Tensor:
    """``gain * act(group_norm(x) + residual)``, the rest as in `group_norm_silu` and `bn_act`."""
    check_image(x, residual)
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise refusal("groups", groups, f"a divisor of the {channels} channels")
    check_channels(x, weight=weight, bias=bias)
    chosen = activation(act, alpha, gain)

    def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return plain_group_norm_act(x, groups, weight, bias, eps, act, alpha, gain, residual)

    if wanted((x, weight, bias, residual)) and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return plain(x, weight, bias, residual)
    count = max(x[:1].numel() // groups, 1)
    return norm_act(x, weight, bias, residual, Statistics(None, True, groups, eps, count), chosen, plain)[0]
