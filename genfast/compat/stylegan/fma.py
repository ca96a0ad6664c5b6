"""`torch_utils.ops.fma`."""

from __future__ import annotations

import torch
from torch import Tensor


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` with broadcasting, in one pass."""
    return torch.addcmul(c, a, b)
