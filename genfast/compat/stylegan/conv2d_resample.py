"""`torch_utils.ops.conv2d_resample`."""

from __future__ import annotations

from torch import Tensor

from genfast import ops
from genfast.reference.upfirdn2d import Pair

from .conv2d_gradfix import gated


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """`genfast.ops.conv2d_resample`, its weight subject to `conv2d_gradfix.no_weight_gradients`."""
    return ops.conv2d_resample(x, gated(w), f, up, down, padding, groups, flip_weight, flip_filter)
