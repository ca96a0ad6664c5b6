"""`minibatch_stddev`: docs/gan-ops.md."""

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


SMOOTH = [
    _case("groups of four", 8, 6, 2, 3),
    _case("groups of three, two channels", 6, 4, 3, 2, group_size=3, num_channels=2),
    _case("the whole batch", 6, 4, 2, 2, group_size=None, eps=1e-4),
    _case("a batch smaller than a group", 3, 4, 2, 2, num_channels=4),
]
MINIBATCH_STDDEV = OpSpec(
    name="minibatch_stddev",
    cases=SMOOTH,
    benchmarks=[],
    bad=[
        BadInput("two dimensions", _with(x=torch.zeros(2, 3)), "x: got 2 dimensions, supported: 4: (B, C, H, W)"),
        BadInput("an empty batch", _with(x=torch.zeros(0, 3, 2, 2)), "x: got an empty batch, supported: at least one sample"),
        BadInput("groups that do not divide", _with(group_size=3), "group_size: got 3, supported: None, or a divisor of the batch 8"),
        BadInput("parts that do not divide", _with(num_channels=4), "num_channels: got 4, supported: a divisor of x's 6 channels"),
    ],
    batched=["x"],
    differentiable=["x"],
    twice=[case.name for case in SMOOTH],
    bits=False,
)
