"""`group_norm_silu`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


def _case(name: str, groups: int, *shape: int, affine: bool = True) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(sum(shape))

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        x = (1.5 * draw(*shape) + 2).to(dtype)
        weight, bias = ((1 + 0.3 * draw(shape[1])).to(dtype), draw(shape[1]).to(dtype)) if affine else (None, None)
        return {"x": x, "groups": groups, "weight": weight, "bias": bias}

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


SMOOTH = [
    _case("two channels a group", 3, 2, 6, 5, 7),
    _case("one group", 1, 3, 4, 4, 4),
    _case("a group a channel", 5, 2, 5, 6, 3),
    _case("without weight and bias", 2, 3, 8, 9, affine=False),
]
GROUP_NORM_SILU = OpSpec(
    name="group_norm_silu",
    cases=[*SMOOTH, _case("vectors", 4, 7, 24), _case("long rows", 2, 2, 4, 33, 35)],
    benchmarks=[_case("32 groups", 32, 16, 128, 64, 64)],
    bad=[
        BadInput("one dimension", _with(x=torch.zeros(3)), "x: got 1 dimensions, supported: at least 2: (B, C, ...)"),
        BadInput("groups that do not divide", _with(groups=4), "groups: got 4, supported: a divisor of the 6 channels"),
        BadInput("a weight too long", _with(weight=torch.ones(4)), "weight: got shape (4,) on cpu, supported: (6,) on cpu"),
    ],
    batched=["x"],
    differentiable=["x", "weight", "bias"],
    twice=[case.name for case in SMOOTH],
    bits=False,
)
