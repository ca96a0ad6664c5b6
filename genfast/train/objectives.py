"""What networks minimise: the losses and penalties of the trainers, as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genfast.schedules import NoiseSchedule

Prediction = Literal["epsilon", "v", "x0", "flow"]


def diffusion_loss(
    net: Callable[..., Tensor],
    x0: Tensor,
    t: NDArray[np.float64],
    n: Tensor,
    y: Tensor | None,
    *,
    noise: NoiseSchedule,
    prediction: Prediction,
    min_snr: float | None = None,
    autocast: str | None = None,
) -> Tensor:
    """The loss of each sample, (B,) float32, for clean samples ``x0`` (B, C, H, W) at times ``t`` (B,) with noise ``n`` like x0.

    Mean squared error of the prediction. With ``min_snr`` = gamma it is weighted such that the squared error of x_0 has the weight
    min(SNR, gamma), SNR = (alpha / sigma)^2 (Hang et al. 2023, section 3.4): an error e of the prediction is an error of x_0 of size
    e * sigma / alpha (epsilon), e * sigma (v, flow) or e (x0).
    """
    alpha, sigma = noise.alpha_sigma(t)
    a, s = (torch.from_numpy(c).to(x0)[:, None, None, None] for c in (alpha, sigma))
    target = {"epsilon": lambda: n, "v": lambda: a * n - s * x0, "x0": lambda: x0, "flow": lambda: n - x0}[prediction]()
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=autocast == "bfloat16"):
        output = net(a * x0 + s * n, torch.from_numpy(t).to(x0), y)
    error = (output.float() - target).square().flatten(1).mean(1)
    if min_snr is None:
        return error
    in_x0 = {"epsilon": (sigma / alpha) ** 2, "v": sigma**2, "x0": np.ones_like(sigma), "flow": sigma**2}[prediction]
    with np.errstate(divide="ignore"):
        weight = np.minimum((alpha / sigma) ** 2, min_snr) * in_x0
    return error * torch.from_numpy(weight).to(error)


def network_input(x: Tensor, device: torch.device) -> Tensor:
    """Samples as networks see them, on ``device``: uint8 pictures scaled to [-1, 1] in float32, latents as they are."""
    return x.to(device).float() / 127.5 - 1 if x.dtype == torch.uint8 else x.to(device)
