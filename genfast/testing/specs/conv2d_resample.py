"""`conv2d_resample`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.reference import setup_filter
from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


def _case(name: str, shape: tuple[int, ...], weight: tuple[int, ...], filtered: bool = True, **options: object) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name) + sum(shape))
        x, w = (torch.randn(size, generator=random, dtype=torch.float64).to(dtype) for size in (shape, weight))
        return {"x": x, "w": w, "f": setup_filter([1, 3, 3, 1]) if filtered else None, **options}

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


PLAIN = [
    _case("3x3", (2, 3, 5, 6), (4, 3, 3, 3), False, padding=1),
    _case("3x3, up 2", (2, 3, 4, 5), (4, 3, 3, 3), up=2, padding=1),
    _case("3x3, down 2, convolved", (2, 3, 6, 6), (4, 3, 3, 3), down=2, padding=1, flip_weight=False),
    _case("1x1, up 2, groups", (2, 4, 3, 4), (6, 2, 1, 1), up=2, groups=2),
    _case("1x1, down 2", (2, 4, 6, 4), (3, 4, 1, 1), down=2),
]
CONV2D_RESAMPLE = OpSpec(
    name="conv2d_resample",
    cases=PLAIN,
    benchmarks=[],
    bad=[
        BadInput(
            "a weight of other channels", _with(w=torch.zeros(5, 2, 1, 1)), "w: got shape (5, 2, 1, 1) for x (2, 3, 5, 6) in 1 groups"
        ),
        BadInput("up zero", _with(up=0), "up: got 0, supported: an integer of at least 1"),
        BadInput("an integer x", _with(x=torch.zeros(2, 3, 5, 6, dtype=torch.int32)), "x: got torch.int32, supported: torch.float32"),
    ],
    batched=["x"],
    differentiable=["x", "w"],
    twice=[case.name for case in PLAIN],
    bits=False,
)
