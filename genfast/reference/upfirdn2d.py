"""Resampling by an FIR filter in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | Sequence[int]


def _integers(name: str, value: Pair, lengths: tuple[int, ...], supported: str) -> list[int]:
    try:
        numbers = [n if isinstance(n, torch.SymInt) else index(n) for n in cast(Sequence[int], value)]
    except TypeError:
        numbers = []
    if len(numbers) not in lengths:
        raise ValueError(f"{name}: got {value!r}, supported: {supported}")
    return numbers


def pair(name: str, value: Pair) -> tuple[int, int]:
    """(x, y) of the scaling ``name`` that is one number for both, or (x, y)."""
    if type(value) is int:
        return value, value
    x, y = _integers(name, value, (2,), "an integer or (x, y)")
    return x, y


def padding_of(padding: Pair) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of a padding given as one number, as (x, y) or in full."""
    if type(padding) is int:
        return (padding,) * 4
    numbers = _integers("padding", padding, (2, 4), "an integer, (x, y) or (left, right, top, bottom)")
    left, right, top, bottom = numbers if len(numbers) == 4 else (numbers[0], numbers[0], numbers[1], numbers[1])
    return left, right, top, bottom


def filter_size(f: Tensor | None) -> tuple[int, int]:
    """Taps along x and y of a filter (h, w), separable (taps,), or None for the identity."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def setup_filter(
    f: Tensor | Sequence[float] | Sequence[Sequence[float]] | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> Tensor:
    """A float32 filter for `upfirdn2d` from taps: (h, w), (taps,), one number or None for the identity.

    ``normalize`` makes the taps sum to 1; ``gain`` then multiplies the signal's magnitude; ``separable`` keeps one-dimensional taps as
    they are, to be used along both axes (the default from 8 taps on), else they become their outer product. Raises ValueError for
    anything else: no tap, more than two dimensions, numbers that float32 cannot hold, or with ``normalize`` a sum of zero.
    """
    supported = "one number, (taps,) or (h, w), finite and not empty"
    try:
        taps = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"f: got {f!r}, supported: {supported}") from None
    known = not torch._C._len_torch_dispatch_stack()  # a tracer has no numbers
    if taps.ndim > 2 or taps.numel() == 0 or (known and not bool(taps.isfinite().all())):
        raise ValueError(f"f: got {f'shape {tuple(taps.shape)}' if taps.ndim > 2 else f!r}, supported: {supported}")
    if normalize and known and float(taps.sum()) == 0:
        raise ValueError(f"f: got {f!r}, whose sum is zero, supported: taps of another sum, or normalize=False")
    taps = taps[None] if taps.ndim == 0 else taps
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= 8
    if taps.ndim == 1 and not separable:
        taps = torch.outer(taps, taps)
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    try:
        scale: float = float(gain) ** (taps.ndim / 2)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"gain: got {gain!r}, supported: a number that float64 holds") from None
    scaled: Tensor = taps * scale
    return scaled.to(device)


def upfirdn2d(
    x: Tensor, f: Tensor | None, up: Pair = 1, down: Pair = 1, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """Zero-insertion upsampling, padding, FIR filter, downsampling, for each channel alone (Karras et al. 2020, appendix; 2021, section 3).

    ``x`` (B, C, H, W); ``f`` from `setup_filter`: (fh, fw), separable (taps,), or None for the identity; ``up`` and ``down`` one number or
    (x, y); ``padding`` of the upsampled picture, one number, (x, y) or (left, right, top, bottom), negative to crop; ``flip_filter`` True
    correlates, False convolves; ``gain`` multiplies the result. Returns (B, C, H', W') in x's dtype,
    W' = (W * up + left + right - fw + down) // down.
    """
    (up_x, up_y), (down_x, down_y) = pair("up", up), pair("down", down)
    left, right, top, bottom = padding_of(padding)
    batch, channels, height, width = x.shape
    taps = x.new_ones(1, 1) if f is None else f.to(x.dtype)
    taps = torch.outer(taps, taps) if taps.ndim == 1 else taps
    taps = (taps if flip_filter else taps.flip([0, 1])) * gain
    z = F.pad(x.reshape(batch * channels, 1, height, 1, width, 1), [0, up_x - 1, 0, 0, 0, up_y - 1])
    z = F.pad(z.reshape(batch * channels, 1, height * up_y, width * up_x), [max(n, 0) for n in (left, right, top, bottom)])
    z = z[:, :, max(-top, 0) : z.shape[2] - max(-bottom, 0), max(-left, 0) : z.shape[3] - max(-right, 0)]
    y = F.conv2d(z, taps[None, None])[:, :, ::down_y, ::down_x]
    return y.reshape(batch, channels, *y.shape[2:]).contiguous(memory_format=_format_of(x))


def _format_of(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def same_padding(f: Tensor | None, padding: Pair, up: tuple[int, int], down: tuple[int, int], kind: str) -> tuple[int, int, int, int]:
    """``padding`` added to what keeps (kind "filter"), multiplies ("up") or divides ("down") the picture's size."""
    result = list(padding_of(padding))
    for axis, taps in enumerate(filter_size(f)):
        u, d = up[axis], down[axis]
        before, after = {"filter": (taps // 2, (taps - 1) // 2), "up": ((taps + u - 1) // 2, (taps - u) // 2)}.get(
            kind, ((taps - d + 1) // 2, (taps - d) // 2)
        )
        result[2 * axis] += before
        result[2 * axis + 1] += after
    return result[0], result[1], result[2], result[3]


def filter2d(x: Tensor, f: Tensor | None, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> Tensor:
    """`upfirdn2d` that keeps the size; ``padding`` is added to that."""
    return upfirdn2d(x, f, padding=same_padding(f, padding, (1, 1), (1, 1), "filter"), flip_filter=flip_filter, gain=gain)


def upsample2d(x: Tensor, f: Tensor | None, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> Tensor:
    """`upfirdn2d` that multiplies the size by ``up`` and keeps the magnitude of the signal; ``padding`` is added to that."""
    up_x, up_y = pair("up", up)
    around = same_padding(f, padding, (up_x, up_y), (1, 1), "up")
    return upfirdn2d(x, f, up=(up_x, up_y), padding=around, flip_filter=flip_filter, gain=gain * up_x * up_y)


def downsample2d(x: Tensor, f: Tensor | None, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> Tensor:
    """`upfirdn2d` that divides the size by ``down``; ``padding`` is added to that."""
    down_x, down_y = pair("down", down)
    around = same_padding(f, padding, (1, 1), (down_x, down_y), "down")
    return upfirdn2d(x, f, down=(down_x, down_y), padding=around, flip_filter=flip_filter, gain=gain)
