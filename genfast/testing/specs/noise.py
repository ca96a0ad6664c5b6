"""`normal` and `uniform`: docs/noise.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


def _case(*shape: int, draw: int = 0, stream: int = 0) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        seeds = torch.arange(shape[0]) * (2**40 + 12345) + 7
        return {"seeds": seeds, "shape": shape, "draw": draw, "stream": stream, "dtype": dtype, "memory_format": torch.contiguous_format}

    return Case("x".join(map(str, shape)), make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


NORMAL = OpSpec(
    name="normal",
    cases=[
        _case(3, 3, 5, 7, draw=3),
        _case(2, 4, 6, 6, draw=2**32 - 1, stream=3),
        _case(5),
        _case(1, 1, 1, 1),
        _case(0, 3, 4, 4),
        _case(2, 0, 4, 4),
        _case(2, 3, 64, 65, stream=1),
        _case(2, 3, 2, 3, 5),
    ],
    benchmarks=[_case(8, 3, 256, 256), _case(1, 4, 64, 64)],
    bad=[
        BadInput("a draw too large", _with(draw=2**32), "draw: got 4294967296, supported: an integer in [0, 2^32)"),
        BadInput("a negative stream", _with(stream=-1), "stream: got -1, supported: an integer in [0, 2^32)"),
        BadInput("an integer dtype", _with(dtype=torch.int32), "dtype: got torch.int32, supported: torch.float32"),
        BadInput("too few seeds", _with(seeds=torch.arange(2)), "seeds: got torch.int64 (2,) on cpu, supported: torch.int64 (3,) on cpu"),
        BadInput("a list of seeds", _with(seeds=[1, 2, 3]), "seeds: got a list, supported: an int64 tensor, one seed per sample"),
        BadInput("float seeds", _with(seeds=torch.zeros(3)), "seeds: got torch.float32 (3,) on cpu"),
        BadInput("a negative seed", _with(seeds=torch.tensor([1, -5, 2])), "seeds: got -5, supported: integers in [0, 2^63)"),
        BadInput("no batch", _with(shape=()), "shape: got (), supported: (B, *sample)"),
        BadInput("a 5-D format", _with(memory_format=torch.channels_last_3d), "memory_format: got torch.channels_last_3d for 4 dimensions"),
    ],
    batched=["seeds"],
)
UNIFORM = replace(NORMAL, name="uniform")
