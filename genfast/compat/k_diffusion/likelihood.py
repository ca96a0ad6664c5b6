"""The likelihood of data under the probability flow ODE. Needs torchdiffeq."""

from __future__ import annotations

import torch
from torch import Tensor

from .loop import ExtraArgs, Model
from .sigmas import to_d


@torch.no_grad()
def log_likelihood(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[Tensor, dict[str, int]]:
    """log p(x) of every sample, (B,), in nats, and ``{"fevals": evaluations of the network}``.

    The probability flow ODE is solved from ``sigma_min`` up to ``sigma_max``, where the latent is normal with that standard deviation;
    the divergence is Hutchinson's estimate with one vector of signs from torch's global generator (Song et al. 2021b, appendix D.2).
    ``x`` (B, \\*sample) float32 or float64; ``model`` must be differentiable in x. Raises ImportError without torchdiffeq.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise ImportError("log_likelihood: torchdiffeq is not installed, supported: pip install torchdiffeq") from None
    extra_args = {} if extra_args is None else extra_args
    ones = x.new_ones([x.shape[0]])
    signs = torch.randint_like(x, 2) * 2 - 1
    evaluations = 0

    def slope(sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            at = state[0].detach().requires_grad_()
            d = to_d(at, sigma, model(at, sigma * ones, **extra_args))
            (gradient,) = torch.autograd.grad((d * signs).sum(), at)
        return d.detach(), (signs * gradient).flatten(1).sum(1)

    ends = x.new_tensor([sigma_min, sigma_max])
    latents, changes = odeint(slope, (x, x.new_zeros([x.shape[0]])), ends, atol=atol, rtol=rtol, method="dopri5")
    prior = torch.distributions.Normal(0, sigma_max).log_prob(latents[-1]).flatten(1).sum(1)
    return prior + changes[-1], {"fevals": evaluations}
