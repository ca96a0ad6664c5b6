"""Group normalisation and activation in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .bias_act import ACTIVATIONS


def group_norm_silu(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``silu(group_norm(x))`` (Wu and He 2018; Ramachandran et al. 2017), ``x`` (B, C, ...), ``weight`` and ``bias`` (C,)."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))


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
    """``gain * act(group_norm(x) + residual)``, ``act`` and ``alpha`` as `bias_act`."""
    known = ACTIVATIONS[act]
    y = F.group_norm(x, groups, weight, bias, eps)
    return known.function(y if residual is None else y + residual, known.alpha if alpha is None else alpha) * gain
