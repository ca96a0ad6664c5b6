"""A leaky rectifier between two resamplings (docs/gan-ops.md)."""

from __future__ import annotations

from torch import Tensor

from genfast.reference.upfirdn2d import Pair

from ._checks import check_count, number
from .bias_act import bias_act
from .upfirdn2d import check_filter, upfirdn2d


def filtered_lrelu(
    x: Tensor,
    fu: Tensor | None = None,
    fd: Tensor | None = None,
    b: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    gain: float = 2**0.5,
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """Bias, upsampling by ``fu``, leaky relu with gain and clamp, downsampling by ``fd`` (Karras et al. 2021, section 3).

    ``x`` (B, C, H, W), dtypes and errors of `bias_act` and `upfirdn2d`; ``b`` (C,); filters and ``padding`` (of the upsampled picture) as
    `upfirdn2d`; the upsampling keeps the magnitude. Four passes, each with exact derivatives of every order.
    """
    check_filter("fu", fu, x)
    check_filter("fd", fd, x)
    check_count("up", up)
    check_count("down", down)
    x = x if b is None else bias_act(x, b)
    y = upfirdn2d(x, fu, up=up, padding=padding, flip_filter=flip_filter, gain=up**2)
    return upfirdn2d(bias_act(y, act="lrelu", alpha=number("slope", slope), gain=gain, clamp=clamp), fd, down=down, flip_filter=flip_filter)
