"""The sigmas a sampler visits, and the small functions of them. Names and signatures are those of ``k_diffusion.sampling``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfast.ops._checks import refusal


def append_zero(x: Tensor) -> Tensor:
    """``x`` (N,) with a zero behind it, (N + 1,)."""
    return torch.cat([x, x.new_zeros([1])])


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu") -> Tensor:
    """sigma^(1/rho) evenly spaced, then 0: (n + 1,) (Karras et al. 2022, equation 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return append_zero((high + torch.linspace(0, 1, n) * (low - high)) ** rho).to(device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """log(sigma) evenly spaced, then 0: (n + 1,)."""
    return append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp())


def get_sigmas_polyexponential(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """log(sigma) a polynomial of degree ``rho`` in the step, then 0: (n + 1,)."""
    ramp = torch.linspace(1, 0, n, device=device) ** rho
    return append_zero((ramp * (math.log(sigma_max) - math.log(sigma_min)) + math.log(sigma_min)).exp())


def get_sigmas_vp(n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu") -> Tensor:
    """The continuous variance preserving schedule at times evenly spaced from 1 to ``eps_s``, then 0: (n + 1,) (Song et al. 2021b)."""
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero((torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1).sqrt())


def append_dims(v: Tensor, ndim: int) -> Tensor:
    """``v`` with dimensions of size 1 behind it, ``ndim`` in all."""
    if v.ndim > ndim:
        raise refusal("sigma", f"{v.ndim} dimensions", f"at most those of x, {ndim}")
    return v[(..., *[None] * (ndim - v.ndim))]


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx / dsigma of the probability flow ODE, shaped like ``x``; ``sigma`` () or (B,) (Karras et al. 2022, equation 3)."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """The sigma to step down to, and the standard deviation of the noise that leads from there to ``sigma_to``. Floats or tensors ()."""
    if not eta:
        return sigma_to, 0.0
    sigma_up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up
