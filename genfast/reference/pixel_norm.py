"""Each pixel's channels brought to unit mean square, in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

from torch import Tensor


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)``, the mean along ``dim`` (Karras et al. 2018, section 4.2). ``x`` of any shape."""
    return x / (x.square().mean(dim, keepdim=True) + eps).sqrt()
