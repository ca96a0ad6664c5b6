"""`bias_act`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.reference.bias_act import ACTIVATIONS
from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


def _case(name: str, *shape: int, bias: bool = True, dim: int = 1, **options: object) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name) + sum(shape))
        x = 2 * torch.randn(shape, generator=random, dtype=torch.float64)
        b = torch.randn(shape[dim], generator=random, dtype=torch.float64).to(dtype) if bias else None
        return {"x": x.to(dtype), "b": b, "dim": dim, **options}

    return Case(name, make)


def _extremes(act: str) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        values = [float("nan"), float("inf"), 0.0, -0.0, 1e-4, -1e-4, 19.9, 20.1, -20.0, 60.0, -80.0]
        if act not in ("elu", "selu", "swish"):  # in torch these make a NaN of -inf, or of its gradient
            values.append(-float("inf"))
        return {"x": torch.tensor(values).to(dtype)[None], "b": None, "act": act, "clamp": 30.0}

    return Case(f"not finite, {act}", make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


SMOOTH = [
    _case("linear", 2, 3, 5, 7),
    *(_case(act, 2, 3, 4, 5, act=act) for act in ACTIVATIONS if act != "linear"),
    _case("short rows, lrelu", 19, 5, 3, act="lrelu", alpha=0.1, gain=0.5),
    _case("vectors, swish", 33, 24, act="swish", gain=1.2),
    _case("first dimension, tanh", 6, 3, 4, 4, dim=0, act="tanh"),
    _case("last dimension, sigmoid", 2, 3, 5, 16, dim=-1, act="sigmoid"),
    _case("one dimension, swish", 7, dim=0, act="swish"),
    _case("no bias, softplus", 2, 3, 4, 4, bias=False, act="softplus", gain=0.5),
    _case("long rows, lrelu", 2, 2, 90, 100, act="lrelu"),
]
BIAS_ACT = OpSpec(
    name="bias_act",
    cases=[
        *SMOOTH,
        *(_case(f"clamped, {act}", 2, 3, 4, 5, act=act, clamp=0.75) for act in ACTIVATIONS),
        *(_extremes(act) for act in ACTIVATIONS),
        _case("empty", 0, 3, 4, 4, act="lrelu"),
        _case("one element", 1, 1, act="elu"),
    ],
    benchmarks=[
        _case("lrelu with clamp", 8, 64, 128, 128, act="lrelu", clamp=256.0),
        _case("lrelu", 8, 64, 128, 128, act="lrelu"),
        _case("swish", 8, 64, 128, 128, act="swish"),
    ],
    bad=[
        BadInput("an unknown activation", _with(act="gelu"), "act: got 'gelu', supported: linear, relu, lrelu, tanh"),
        BadInput("an integer x", _with(x=torch.zeros(2, 3, dtype=torch.int32)), "x: got torch.int32, supported: torch.float32"),
        BadInput("a dimension too far", _with(dim=4), "dim: got 4, supported: a dimension of x, which has 4"),
        BadInput("a bias too long", _with(b=torch.zeros(4)), "b: got shape (4,), supported: (3,)"),
        BadInput("a bias of another dtype", _with(b=torch.zeros(3).double()), "b: got torch.float64, supported: torch.float32"),
        BadInput("a negative clamp", _with(clamp=-1.0), "clamp: got -1.0, supported: a number of at least 0, or None"),
        BadInput("a NaN for a clamp", _with(clamp=float("nan")), "clamp: got nan, supported: a number of at least 0, or None"),
    ],
    batched=["x"],
    differentiable=["x", "b"],
    twice=[case.name for case in SMOOTH],
    bits=False,
)
