"""Where a sampler's noise comes from: torch's global generator, or one Brownian path. Names and signatures are k-diffusion's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from genfast.ops._checks import refusal

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Noise from torch's global generator, shaped like ``x``, whatever the sigmas."""
    return lambda sigma, sigma_next: torch.randn_like(x)


class BatchedBrownianTree:
    """W(t1) - W(t0) of Brownian motions on ``t0`` .. ``t1``, shaped like ``x``; a list of seeds gives every sample its own motion.

    ``seed`` None draws one from torch's global generator. Needs torchsde (``pip install torchsde``).
    """

    def __init__(self, x: Tensor, t0: Tensor, t1: Tensor, seed: int | Sequence[int] | None = None, **kwargs: Any) -> None:
        try:
            import torchsde
        except ImportError:
            raise ImportError(
                "noise_sampler: got None and torchsde is not installed, supported: pip install torchsde, or a function"
            ) from None
        t0, t1, self.sign = self.sort(t0, t1)
        w0 = kwargs.pop("w0", torch.zeros_like(x))
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        self.batched = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if self.batched:
            if len(seeds) != x.shape[0]:
                raise refusal("seed", f"{len(seeds)} seeds", f"one, or one per sample, {x.shape[0]}")
            w0 = w0[0]
        self.trees = [torchsde.BrownianTree(t0, w0, t1, entropy=s, **kwargs) for s in seeds]

    @staticmethod
    def sort(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
        return (a, b, 1) if a < b else (b, a, -1)

    def __call__(self, t0: Tensor, t1: Tensor) -> Tensor:
        t0, t1, sign = self.sort(t0, t1)
        w = torch.stack([tree(t0, t1) for tree in self.trees]) * (self.sign * sign)
        return w if self.batched else w[0]


class BrownianTreeNoiseSampler:
    """A noise sampler from one Brownian path, so that nested grids see the same noise: W(sigma_next) - W(sigma), at unit variance.

    ``transform`` maps sigma to the path's time; ``seed`` as in `BatchedBrownianTree`.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Tensor | float,
        sigma_max: Tensor | float,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        self.tree = BatchedBrownianTree(x, transform(torch.as_tensor(sigma_min)), transform(torch.as_tensor(sigma_max)), seed)

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        t0, t1 = self.transform(torch.as_tensor(sigma)), self.transform(torch.as_tensor(sigma_next))
        return self.tree(t0, t1) / (t1 - t0).abs().sqrt()


def brownian(x: Tensor, sigmas: Tensor) -> NoiseSampler:
    return BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max())
