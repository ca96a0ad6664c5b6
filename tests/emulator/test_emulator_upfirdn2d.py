"""upfirdn2d's CUDA kernels under the emulator: every kernel of upfirdn2d.cu over sizes, phases and alignments drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import ops, reference
from genfast.testing import SPECS, operators_from
from genfast.testing.oracle import assert_accurate, precision

# (up, down, taps): those with kernels of their own, as a filter of two dimensions or a separable one, and one that has none.
KINDS = [(2, 1, 4), (1, 2, 4), (1, 1, 4), (2, 1, 12), (1, 2, 12), (3, 2, 5)]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(random: Any, up: int, down: int, taps: int, channels_last: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
    channels = int(random.choice([8, 16, 24, 5] if channels_last else [1, 3, 17]))
    # As many sides as make one patch, one tile, several tiles; several planes of small pictures in a block.
    height, width = (int(random.choice([1, 2, 7, 16, 33, 70])) for _ in range(2))
    padding = [int(n) for n in random.integers(0, taps, 4)]
    padding[random.integers(4)] -= 2
    padding = [pad + max(0, taps - size * up + 2) for pad, size in zip(padding, (width, width, height, height), strict=True)]
    f = draw(*(taps,) if taps == 12 or random.integers(2) else (taps, taps), seed=1, dtype=torch.float32) / 3
    seed, layout = int(random.integers(1000)), torch.channels_last if channels_last else torch.contiguous_format
    x = draw(int(random.choice([1, 3])), channels, height, width, seed=seed, dtype=dtype).contiguous(memory_format=layout)
    if random.integers(4) == 0:  # an address that is not aligned to vectors
        storage = torch.empty(x.numel() + 1, dtype=dtype)[1:]
        x = storage.as_strided(x.shape, x.stride()).copy_(x)
    return x, f, {"up": up, "down": down, "padding": padding, "flip_filter": bool(random.integers(2)), "gain": 2.0}


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_sweep_of_shapes(emulated: Any, schedule: None, kind: tuple[int, int, int], dtype: torch.dtype, channels_last: bool) -> None:
    random = np.random.default_rng(sum(kind))
    for _ in range(2 if dtype == torch.float64 else 8):
        x, f, options = case(random, *kind, channels_last, dtype)
        with operators_from("genfast_emulator"):
            got = ops.upfirdn2d(x, f, **options)
        working, exact = reference.upfirdn2d(x, f, **options), reference.upfirdn2d(x.double(), f.double(), **options)
        assert_accurate(f"{tuple(x.shape)} {options}", got, working, exact, precision(SPECS["upfirdn2d"], dtype))


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels last"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_the_window_is_read(emulated: Any, kind: tuple[int, int, int], channels_last: bool) -> None:
    """A NaN reaches the outputs whose taps meet it and no others, also where a tile or a patch ends."""
    up, down, taps = kind
    f = torch.ones(taps) if taps == 12 else torch.ones(taps, taps)
    x = torch.zeros(1, 8, 21, 75).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x[0, 1, 10, 33] = torch.nan
    options: dict[str, Any] = {"up": up, "down": down, "padding": taps - 2}
    with operators_from("genfast_emulator"):
        got = ops.upfirdn2d(x, f, **options)
    marked = reference.upfirdn2d(x.nan_to_num(1.0), f, **options)  # x is zero but there
    assert torch.equal(got.isnan(), marked != 0)
