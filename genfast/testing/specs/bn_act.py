"""`bn_act`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


def _case(name: str, *shape: int, affine: bool = True, running: bool = False, residual: bool = False, **options: object) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name) + sum(shape))
        channels = shape[1]

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        # Away from zero, so that the mean matters; relu's kink is met by no element in any precision.
        arguments: Arguments = {"x": (1.5 * draw(*shape) + 2).to(dtype)}
        if affine:
            arguments |= {"weight": (1 + 0.3 * draw(channels)).to(dtype), "bias": (0.5 * draw(channels)).to(dtype)}
        else:
            arguments |= {"weight": None, "bias": None}
        if running:
            arguments |= {"running_mean": draw(channels).to(dtype), "running_var": (0.5 + draw(channels).square()).to(dtype)}
        arguments["residual"] = draw(*shape).to(dtype) if residual else None
        return {**arguments, "training": not running, **options}

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


SMOOTH = [
    _case("training, tanh", 4, 3, 5, 7, act="tanh"),
    _case("training, relu", 4, 3, 5, 7, act="relu"),
    _case("evaluation, lrelu", 4, 3, 5, 7, running=True, act="lrelu", alpha=0.1),
    _case("vectors, swish", 33, 24, act="swish"),
    _case("one channel, softplus", 4, 1, 5, 6, act="softplus"),
    _case("without weight and bias, linear", 3, 5, 20, affine=False, act="linear"),
    _case("residual, swish", 4, 3, 5, 7, residual=True, act="swish", gain=1.5),
    _case("residual, linear, evaluation", 3, 8, 20, residual=True, running=True, act="linear"),
]
BN_ACT = OpSpec(
    name="bn_act",
    cases=[
        *SMOOTH,
        _case("long rows, residual, lrelu", 2, 3, 40, 41, residual=True, act="lrelu"),
        _case("long rows, sigmoid", 2, 3, 130, 131, act="sigmoid"),
        _case("empty", 0, 3, 4, 4, running=True),
    ],
    benchmarks=[
        _case("training, relu", 32, 64, 64, 64, act="relu"),
        _case("evaluation, relu", 32, 64, 64, 64, running=True, act="relu"),
    ],
    bad=[
        BadInput("one dimension", _with(x=torch.zeros(3)), "x: got 1 dimensions, supported: at least 2: (B, C, ...)"),
        BadInput("an integer x", _with(x=torch.zeros(2, 3, dtype=torch.int32)), "x: got torch.int32, supported: torch.float32"),
        BadInput("an unknown activation", _with(act="gelu"), "act: got 'gelu', supported: linear, relu"),
        BadInput("a weight too long", _with(weight=torch.ones(4)), "weight: got shape (4,) on cpu, supported: (3,) on cpu"),
        BadInput("nothing to evaluate with", _with(training=False), "running_mean and running_var: got None, supported: both"),
        BadInput(
            "another residual", _with(residual=torch.zeros(4, 3, 5, 1)), "residual: got torch.float32 (4, 3, 5, 1) on cpu, supported: "
        ),
        BadInput("one value a channel", _with(x=torch.zeros(1, 3)), "x: got 1 values for each channel, supported: at least 2"),
    ],
    batched=["x", "residual"],
    differentiable=["x", "weight", "bias", "residual"],
    twice=[case.name for case in SMOOTH if "vectors" not in case.name],
    bits=False,
)
