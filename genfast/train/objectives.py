"""What networks minimise: the losses and penalties of the trainers, as functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from genfast.schedules import NoiseSchedule

Logits = Callable[[Tensor, Tensor], Tensor]

# (discriminator's, generator's) loss of each sample from the logits of real and of fake samples, both (B,).
LOSSES: dict[str, tuple[Logits, Logits]] = {
    # Goodfellow et al. 2014, section 3: the form that does not saturate.
    "logistic": (lambda real, fake: F.softplus(-real) + F.softplus(fake), lambda real, fake: F.softplus(-fake)),
    # Lim and Ye 2017, equations 6 and 7.
    "hinge": (lambda real, fake: F.relu(1 - real) + F.relu(1 + fake), lambda real, fake: -fake),
    # Arjovsky et al. 2017, algorithm 1.
    "wgan": (lambda real, fake: fake - real, lambda real, fake: -fake),
    # Mao et al. 2017, equation 9.
    "lsgan": (lambda real, fake: ((real - 1).square() + fake.square()) / 2, lambda real, fake: (fake - 1).square() / 2),
    # Jolicoeur-Martineau 2019, equations 3 and 4, with pairs as in R3GAN (Huang et al. 2024, equation 2).
    "relativistic": (lambda real, fake: F.softplus(fake - real), lambda real, fake: F.softplus(real - fake)),
}
PAIRED = ("relativistic",)  # the generator's loss reads the real samples too

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


def gradient_penalty(logits: Tensor, x: Tensor, center: float = 0.0) -> Tensor:
    """(|grad_x logits_i| - center)^2 of each sample, (B,), differentiable: ``logits`` (B,) were computed from ``x`` (B, \\*sample).

    The gradient is that of the sum of the logits, so it is each sample's own only where the discriminator treats samples alone.
    """
    (g,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    if center == 0:  # the same as below, in fewer kernels
        return g.square().flatten(1).sum(1)
    norms: Tensor = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return (norms - center).square()


def between(real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Points on the lines from fake to real samples, (B, \\*sample), at the shares ``mix`` (B,) of the real ones."""
    return torch.lerp(fake, real, mix.view(-1, *[1] * (real.ndim - 1)))


def path_lengths(images: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """|J_w^T y| of each sample, (B,), differentiable: ``images`` (B, C, H, W) were computed from ``w`` (B, L) or (B, layers, L).

    y is ``noise`` (like images, standard normal) / sqrt(H W). Where w differs by layer the square is averaged over layers (Karras et
    al. 2020, section 3.2 and its code).
    """
    (g,) = torch.autograd.grad((images * noise).sum() / math.sqrt(math.prod(images.shape[2:])), w, create_graph=True)
    return g.square().sum(-1).flatten(1).mean(1).sqrt() if g.ndim > 2 else torch.linalg.vector_norm(g, dim=-1)
