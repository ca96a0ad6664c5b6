"""Group normalisation followed by SiLU in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``silu(group_norm(x))`` (Wu and He 2018; Ramachandran et al. 2017), ``x`` (B, C, ...), ``weight`` and ``bias`` (C,)."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps))
