"""Noise processes and sigma grids, in float64 numpy.

A noise process says how a clean sample becomes a noisy one, ``x_t = alpha(t) * x_0 + sigma(t) * n``.
It is a property of the trained network. A grid says which points of it a solver visits; it is the
user's choice. Nothing here touches torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise process: ``x_t = alpha(t) * x_0 + sigma(t) * n``.

    ``kind`` is "vp" (variance preserving with ``steps`` discrete times 0 .. steps-1, tables given),
    "flow" (rectified flow: alpha = 1 - t, sigma = t, t in [0, 1]) or "ve" (alpha = 1, sigma = t).
    """

    name: str
    kind: Literal["vp", "flow", "ve"]
    alphas_cumprod: Array | None = None  # (steps,) for "vp", strictly decreasing
    sigma_min: float = 0.002  # "ve" only: the smallest and largest sigma of the default grid
    sigma_max: float = 80.0
    shift: float = 1.0  # "flow" only: t -> shift * t / (1 + (shift - 1) * t)

    @property
    def steps(self) -> int:
        """Number of discrete training times; 0 for a continuous process."""
        return 0 if self.alphas_cumprod is None else len(self.alphas_cumprod)

    def alpha_sigma(self, t: ArrayLike) -> tuple[Array, Array]:
        """alpha and sigma at times ``t`` (any shape). For "vp", fractional times interpolate log(sigma/alpha)."""
        t = np.asarray(t, np.float64)
        if self.kind == "ve":
            return np.ones_like(t), t.copy()
        if self.kind == "flow":
            return 1 - t, t.copy()
        ratio = np.exp(np.interp(t, np.arange(self.steps), np.log(self.sigma_ratios)))
        whole = np.clip(np.rint(t).astype(np.int64), 0, self.steps - 1)
        assert self.alphas_cumprod is not None
        exact = t == whole  # a whole time reads its table entry, without a round trip through log and exp
        alpha = np.where(exact, np.sqrt(self.alphas_cumprod[whole]), 1 / np.sqrt(1 + ratio**2))
        sigma = np.where(exact, np.sqrt(1 - self.alphas_cumprod[whole]), ratio / np.sqrt(1 + ratio**2))
        return alpha, sigma

    @property
    def sigma_ratios(self) -> Array:
        """sigma / alpha of every discrete time, (steps,), increasing ("vp" only)."""
        assert self.alphas_cumprod is not None
        return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def time_of(self, ratio: ArrayLike) -> Array:
        """The time whose sigma / alpha is ``ratio``: the inverse of `alpha_sigma`, clamped to the process's range."""
        ratio = np.asarray(ratio, np.float64)
        if self.kind == "ve":
            return ratio.copy()
        if self.kind == "flow":
            return np.where(np.isinf(ratio), 1.0, ratio / (1 + np.where(np.isinf(ratio), 0.0, ratio)))
        with np.errstate(divide="ignore"):
            return np.interp(np.log(ratio), np.log(self.sigma_ratios), np.arange(self.steps, dtype=np.float64))

    def training_time(self, u: ArrayLike) -> Array:
        """Map uniform draws ``u`` in [0, 1) to training times: whole indices for "vp", shifted t for "flow"."""
        u = np.asarray(u, np.float64)
        if self.kind == "vp":
            return np.floor(u * self.steps)
        if self.kind == "flow":
            return self.shift * u / (1 + (self.shift - 1) * u)
        return np.exp(np.log(self.sigma_min) + u * (np.log(self.sigma_max) - np.log(self.sigma_min)))


def _vp(name: str, betas: Array) -> NoiseSchedule:
    return NoiseSchedule(name, "vp", alphas_cumprod=np.cumprod(1 - betas))


def linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """DDPM's schedule: betas evenly spaced (Ho et al. 2020, section 4)."""
    return _vp("linear", np.linspace(beta_start, beta_end, steps))


def scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Latent diffusion's schedule: square roots of the betas evenly spaced (Rombach et al. 2022)."""
    return _vp("scaled_linear", np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)


def cosine(steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """Improved DDPM's cosine schedule (Nichol and Dhariwal 2021, equation 17)."""
    t = np.arange(steps + 1) / steps
    f = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
    return _vp("cosine", np.minimum(1 - f[1:] / f[:-1], max_beta))


def from_betas(betas: ArrayLike) -> NoiseSchedule:
    """A schedule from given betas, each in (0, 1)."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas: got shape {betas.shape}, supported: a 1-D list of numbers in (0, 1)")
    return _vp("betas", betas)


def flow(shift: float = 1.0) -> NoiseSchedule:
    """Rectified flow: x_t = (1 - t) x_0 + t n (Liu et al. 2023); ``shift`` as in Esser et al. 2024, equation 23."""
    if not shift > 0:
        raise ValueError(f"shift: got {shift}, supported: a number above 0")
    return NoiseSchedule("flow", "flow", shift=shift)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
    """Variance exploding, alpha = 1 (Karras et al. 2022, table 1)."""
    return NoiseSchedule("edm", "ve", sigma_min=sigma_min, sigma_max=sigma_max)
