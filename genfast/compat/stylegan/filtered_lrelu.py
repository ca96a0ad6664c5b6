"""`torch_utils.ops.filtered_lrelu`."""

from __future__ import annotations

from torch import Tensor

from genfast.reference.upfirdn2d import Pair

from ._implementation import operators


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
    impl: str = "cuda",
) -> Tensor:
    """`genfast.ops.filtered_lrelu`; ``impl`` "ref" is `genfast.reference`."""
    result: Tensor = operators(impl).filtered_lrelu(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter)
    return result
