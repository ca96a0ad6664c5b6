"""Batch normalisation with its activation in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

import torch.nn.functional as F
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
) -> Tensor:
    """``act(weight * (x - mean) / sqrt(var + eps) + bias)`` for each channel (Ioffe and Szegedy 2015).

    ``x`` (B, C, ...); the others (C,). ``training``: mean and variance of this batch, which also move the running ones by ``momentum``
    (the variance unbiased), where they are given; else the running ones. ``act`` and ``alpha`` as `bias_act`. Returns x's shape, dtype.
    """
    known = ACTIVATIONS[act]
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return known.function(y, known.alpha if alpha is None else alpha)
