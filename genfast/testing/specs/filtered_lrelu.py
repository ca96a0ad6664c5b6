"""`filtered_lrelu`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


def _case(
    name: str, shape: tuple[int, ...], taps: tuple[tuple[int, ...], tuple[int, ...]] | None, bias: bool = True, **options: object
) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name) + sum(shape))

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        fu, fd = (None, None) if taps is None else (draw(*t).float() / 2 for t in taps)
        x = draw(*shape).to(dtype)
        return {"x": x, "fu": fu, "fd": fd, "b": draw(shape[1]).to(dtype) if bias else None, **options}

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


PLAIN = [
    _case("up 2, down 2", (2, 3, 5, 6), ((8,), (8,)), up=2, down=2, padding=(7, 6, 7, 6)),
    _case("up 4, down 2, not separable", (2, 2, 4, 5), ((4, 5), (3, 3)), up=4, down=2, padding=3, gain=1.1, slope=0.1, flip_filter=True),
    _case("no filters, no bias", (2, 3, 4, 5), None, bias=False),
]
FILTERED_LRELU = OpSpec(
    name="filtered_lrelu",
    cases=[*PLAIN, _case("clamped", (2, 3, 5, 6), ((6,), (6,)), up=2, down=2, padding=5, clamp=0.6), _case("empty", (0, 3, 4, 4), None)],
    benchmarks=[],
    bad=[
        BadInput("three dimensions", _with(x=torch.zeros(2, 3, 4)), "x: got 3 dimensions, supported: 4: (B, C, H, W)"),
        BadInput("a bias too long", _with(b=torch.zeros(4)), "b: got shape (4,), supported: (3,)"),
        BadInput("a negative clamp", _with(clamp=-1.0), "clamp: got -1.0, supported: a number of at least 0, or None"),
        BadInput("down zero", _with(down=0), "down: got 0, supported: an integer of at least 1"),
    ],
    batched=["x"],
    differentiable=["x", "b"],
    twice=[case.name for case in PLAIN],
    bits=False,
)
