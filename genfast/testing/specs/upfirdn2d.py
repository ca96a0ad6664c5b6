"""`upfirdn2d` and what is made of it: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.reference import setup_filter
from genfast.testing.spec import Arguments, BadInput, Case, OpSpec

Shape = tuple[int, ...]


PHASES = {"up": (5, 3), "down": (3, 2), "padding": (4, -1, 2, 3), "gain": 2.5}


def _case(name: str, shape: Shape, taps: Shape | None, **options: object) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name) + sum(shape))
        x = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        f = None if taps is None else torch.randn(taps, generator=random) / 3
        return {"x": x, "f": f, **options}

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


PLAIN = [
    _case("up 2", (2, 3, 8, 9), (4, 4), up=2, padding=(2, 1, 2, 1), gain=4),
    _case("down 2", (2, 3, 8, 10), (4, 4), down=2, padding=1),
    _case("separable, up 2, down 3", (2, 3, 8, 9), (8,), up=2, down=3, padding=(3, 4)),
    _case("identity", (2, 3, 4, 5), None),
    _case("correlation, cropped", (2, 3, 8, 9), (3, 2), padding=(-1, 2, -2, -1), flip_filter=True),
]


def _stylegan(name: str, shape: Shape, **options: object) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        return {"x": x, "f": setup_filter([1, 3, 3, 1]), **options}

    return Case(name, make)


UPFIRDN2D = OpSpec(
    name="upfirdn2d",
    cases=[
        *PLAIN,
        _case("every phase, up 5 and 3, down 3 and 2", (2, 2, 7, 6), (4, 7), **PHASES),
        _case("wide, separable, down 2", (1, 17, 12, 150), (12,), down=2, padding=5),
        _case("more rows than a strip, up 2", (1, 2, 150, 40), (4, 4), up=2, padding=(2, 1, 2, 1)),
        _case("empty", (0, 3, 4, 4), (4, 4), up=2, padding=2),
        _case("nothing of the picture is met", (1, 2, 3, 3), (2, 2), padding=(-7, 9, 0, 0)),
    ],
    benchmarks=[
        _stylegan("4x4 filter, up 2", (8, 64, 128, 128), up=2, padding=(2, 1, 2, 1), gain=4),
        _stylegan("4x4 filter, down 2", (8, 64, 256, 256), down=2, padding=1),
    ],
    bad=[
        BadInput("three dimensions", _with(x=torch.zeros(2, 3, 4)), "x: got 3 dimensions, supported: 4: (B, C, H, W)"),
        BadInput("an integer x", _with(x=torch.zeros(2, 3, 4, 4, dtype=torch.int32)), "x: got torch.int32, supported: torch.float32"),
        BadInput("a filter of three dimensions", _with(f=torch.zeros(1, 2, 3)), "f: got shape (1, 2, 3), supported: (fh, fw), or (taps,)"),
        BadInput("a learnt filter", _with(f=torch.zeros(2, 2, requires_grad=True)), "f: got a filter with a gradient"),
        BadInput("up zero", _with(up=0), "up: got (0, 0), supported: integers of at least 1"),
        BadInput("down zero", _with(down=(1, 0)), "down: got (1, 0), supported: integers of at least 1"),
        BadInput("everything cropped", _with(padding=-9), "padding: got -9, supported: enough for one place of the filter"),
    ],
    batched=["x"],
    differentiable=["x"],
    twice=[case.name for case in PLAIN],
    bits=False,
)
