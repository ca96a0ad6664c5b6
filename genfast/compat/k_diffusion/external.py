"""k-diffusion's wrappers, which make a denoiser ``(x, sigma) -> x_0`` of a network that predicts noise or v.

Names and signatures are those of ``k_diffusion.external``. In all of them x = x_0 + sigma n, ``sigma`` (B,), and the network is fed
x / sqrt(sigma^2 + 1) and a time ``t`` (B,).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .sigmas import append_dims, append_zero

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
]


def _v_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out and c_in for a network that predicts v (Salimans and Ho 2022, in the notation of Karras et al. 2022, table 1)."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, -sigma * sigma_data / total**0.5, 1 / total**0.5


def _mean_square(error: Tensor) -> Tensor:
    """The mean square of every sample, (B,)."""
    return error.pow(2).flatten(1).mean(1)


class VDenoiser(nn.Module):
    """A network that predicts v and is fed t = atan(sigma) 2 / pi, as in v-diffusion."""

    sigma_data = 1.0

    def __init__(self, inner_model: nn.Module) -> None:
        super().__init__()
        self.inner_model = inner_model

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _v_scalings(sigma, self.sigma_data)

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        return sigma.atan() / math.pi * 2

    def t_to_sigma(self, t: Tensor) -> Tensor:
        return (t * math.pi / 2).tan()

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The square error of the network's output for data ``input`` and ``noise``, (B,)."""
        c_skip, c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        noised = input + noise * append_dims(sigma, input.ndim)
        output = self.inner_model(noised * c_in, self.sigma_to_t(sigma), **kwargs)
        return _mean_square(output - (input - c_skip * noised) / c_out)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_skip, c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        output: Tensor = self.inner_model(input * c_in, self.sigma_to_t(sigma), **kwargs)
        return output * c_out + input * c_skip


class DiscreteSchedule(nn.Module):
    """The ``sigmas`` (T,), increasing, of the times 0 .. T - 1; between them log(sigma) is linear in time.

    ``quantize`` makes `sigma_to_t` return the nearest whole time.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, sigmas: Tensor, quantize: bool) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """The sigmas of ``n`` times evenly spaced from the last to the first, then 0: (n + 1,). None: all times."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        return append_zero(self.t_to_sigma(torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)))

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The time of ``sigma``, of any shape, clamped to the schedule; int64 where quantized."""
        log_sigma = sigma.log()
        if self.quantize if quantize is None else quantize:
            return (log_sigma.flatten() - self.log_sigmas[:, None]).abs().argmin(dim=0).view(sigma.shape)
        low = (torch.searchsorted(self.log_sigmas, log_sigma, right=True) - 1).clamp(0, len(self.log_sigmas) - 2)
        start, end = self.log_sigmas[low], self.log_sigmas[low + 1]
        return low + ((log_sigma - start) / (end - start)).clamp(0, 1)

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The sigma of time ``t`` in 0 .. T - 1, of any shape, whole or not."""
        t = t.float()
        low, high, w = t.floor().long(), t.ceil().long(), t.frac()
        return ((1 - w) * self.log_sigmas[low] + w * self.log_sigmas[high]).exp()


def _sigmas(alphas_cumprod: Tensor) -> Tensor:
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """A network that predicts the noise, of a process with ``alphas_cumprod`` (T,) (Ho et al. 2020)."""

    sigma_data = 1.0

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, 1 / (sigma**2 + self.sigma_data**2) ** 0.5

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner_model(*args, **kwargs)
        return output

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The square error of the predicted noise for data ``input`` and ``noise``, (B,)."""
        _, c_in = self.get_scalings(sigma)
        noised = input + noise * append_dims(sigma, input.ndim)
        return _mean_square(self.get_eps(noised * append_dims(c_in, input.ndim), self.sigma_to_t(sigma), **kwargs) - noise)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        return input + self.get_eps(input * c_in, self.sigma_to_t(sigma), **kwargs) * c_out


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """A network of OpenAI's guided-diffusion, whose ``diffusion`` object has ``alphas_cumprod``; learned variances are left out."""

    def __init__(
        self, model: Any, diffusion: Any, quantize: bool = False, has_learned_sigmas: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, torch.tensor(diffusion.alphas_cumprod, device=device, dtype=torch.float32), quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().get_eps(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """A latent diffusion model of CompVis, with ``alphas_cumprod`` and ``apply_model``, that predicts the noise."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner_model.apply_model(*args, **kwargs)
        return output


class DiscreteVDDPMDenoiser(DiscreteSchedule):
    """A network that predicts v, of a process with ``alphas_cumprod`` (T,) (Salimans and Ho 2022)."""

    sigma_data = 1.0

    def __init__(self, model: Any, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(_sigmas(alphas_cumprod), quantize)
        self.inner_model = model

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _v_scalings(sigma, self.sigma_data)

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner_model(*args, **kwargs)
        return output

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The square error of v for data ``input`` and ``noise``, (B,)."""
        c_skip, c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        noised = input + noise * append_dims(sigma, input.ndim)
        return _mean_square(self.get_v(noised * c_in, self.sigma_to_t(sigma), **kwargs) - (input - c_skip * noised) / c_out)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        c_skip, c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        return self.get_v(input * c_in, self.sigma_to_t(sigma), **kwargs) * c_out + input * c_skip


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """A latent diffusion model of CompVis, with ``alphas_cumprod`` and ``apply_model``, that predicts v."""

    def __init__(self, model: Any, quantize: bool = False, device: torch.device | str = "cpu") -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_v(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner_model.apply_model(x, t, cond)
        return output
