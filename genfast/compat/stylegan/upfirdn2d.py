"""`torch_utils.ops.upfirdn2d`: the functions of `genfast.ops`; ``impl`` "ref" is `genfast.reference`."""

from __future__ import annotations

from torch import Tensor

from genfast.ops import setup_filter
from genfast.reference.upfirdn2d import Pair

from ._implementation import operators

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]


def upfirdn2d(
    x: Tensor,
    f: Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "cuda",
) -> Tensor:
    """`genfast.ops.upfirdn2d`."""
    result: Tensor = operators(impl).upfirdn2d(x, f, up, down, padding, flip_filter, gain)
    return result


def filter2d(x: Tensor, f: Tensor | None, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, impl: str = "cuda") -> Tensor:
    """`genfast.ops.filter2d`."""
    result: Tensor = operators(impl).filter2d(x, f, padding, flip_filter, gain)
    return result


def upsample2d(
    x: Tensor, f: Tensor | None, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, impl: str = "cuda"
) -> Tensor:
    """`genfast.ops.upsample2d`."""
    result: Tensor = operators(impl).upsample2d(x, f, up, padding, flip_filter, gain)
    return result


def downsample2d(
    x: Tensor, f: Tensor | None, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, impl: str = "cuda"
) -> Tensor:
    """`genfast.ops.downsample2d`."""
    result: Tensor = operators(impl).downsample2d(x, f, down, padding, flip_filter, gain)
    return result
