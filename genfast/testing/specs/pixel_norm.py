"""`pixel_norm`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


def _case(name: str, *shape: int, **options: object) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
        return {"x": x.to(dtype), **options}

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


SMOOTH = [_case("pictures", 3, 5, 2, 3), _case("latents", 3, 5, dim=-1, eps=0.1)]
PIXEL_NORM = OpSpec(
    name="pixel_norm",
    cases=[*SMOOTH, _case("empty", 0, 3)],
    benchmarks=[],
    bad=[
        BadInput("a dimension too far", _with(dim=4), "dim: got 4, supported: a dimension of x, which has 4"),
        BadInput("eps zero", _with(eps=0), "eps: got 0, supported: a number above 0"),
        BadInput("an integer x", _with(x=torch.zeros(2, 3, dtype=torch.int32)), "x: got torch.int32, supported: torch.float32"),
    ],
    batched=["x"],
    differentiable=["x"],
    twice=[case.name for case in SMOOTH],
    bits=False,
)
