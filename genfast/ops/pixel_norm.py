"""Each pixel's channels brought to unit mean square (docs/gan-ops.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_floating, refusal


def pixel_norm(x: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)``, the mean along ``dim`` (Karras et al. 2018, section 4.2; on latents Karras et al. 2020).

    ``x`` of any shape, float32, float64, bfloat16 or float16. Returns its shape and dtype; computed in float32 (float64 for float64) and
    rounded once. Differentiable to every order. Raises ValueError for anything else.
    """
    check_floating("x", x)
    if not -x.ndim <= dim < x.ndim:
        raise refusal("dim", dim, f"a dimension of x, which has {x.ndim}")
    if not eps > 0:
        raise refusal("eps", eps, "a number above 0")
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * (wide.square().mean(dim, keepdim=True) + eps).rsqrt()).to(x.dtype)
