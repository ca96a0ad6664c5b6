"""Noise that belongs to the sample (docs/noise.md), by kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _backend
from ._checks import check_dtype, check_seeds, refusal


def _fill(
    seeds: Tensor,
    shape: Sequence[int],
    draw: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    memory_format: torch.memory_format,
    uniform: bool,
) -> Tensor:
    if not 0 <= draw < 2**32:
        raise refusal("draw", draw, "an integer in [0, 2^32)")
    if not 0 <= stream < 2**32:
        raise refusal("stream", stream, "an integer in [0, 2^32)")
    check_dtype("dtype", dtype)
    if len(shape) < 1:
        raise refusal("shape", tuple(shape), "(B, *sample)")
    if not isinstance(seeds, Tensor):
        raise refusal("seeds", f"a {type(seeds).__name__}", "an int64 tensor, one seed per sample")
    check_seeds(seeds, shape[0], seeds.device)
    if device is not None:
        seeds = seeds.to(device)
    layouts = {torch.contiguous_format: len(shape), torch.channels_last: 4, torch.channels_last_3d: 5}
    if layouts.get(memory_format) != len(shape):
        got = f"{memory_format} for {len(shape)} dimensions"
        raise refusal("memory_format", got, "contiguous; channels_last for 4, channels_last_3d for 5 dimensions")
    out = torch.empty(tuple(shape), dtype=dtype, device=seeds.device, memory_format=memory_format)
    _backend.namespace.noise_(out, seeds.contiguous(), draw, stream, uniform)
    return out


def normal(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    draw: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normal noise of docs/noise.md: the same bits as `genfast.reference.normal`.

    ``seeds`` (B,) int64, each in [0, 2^63) (values are checked in host memory only); ``shape`` (B, \\*sample); ``draw`` and ``stream``
    in [0, 2^32). Returns ``shape`` in ``dtype`` on ``device`` (default: the seeds'), the float32 values rounded to nearest even.
    Raises ValueError for anything else.
    """
    return _fill(seeds, shape, draw, stream, dtype, device, memory_format, uniform=False)


def uniform(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    draw: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Uniform noise of docs/noise.md, multiples of 2^-24 in [0, 1); arguments as `normal`.

    A type narrower than float32 holds the value rounded toward zero, so that it stays below 1.
    """
    return _fill(seeds, shape, draw, stream, dtype, device, memory_format, uniform=True)
