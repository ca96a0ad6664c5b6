"""`conv_block`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec

# Keyword, shape of x, of the weight, of the result.
_KEEP = ({"padding": 1}, (3, 4, 5, 6), (6, 4, 3, 3), (3, 6, 5, 6))
_DOWN = ({"stride": 2, "padding": 1, "groups": 2}, (2, 4, 6, 8), (6, 2, 4, 4), (2, 6, 3, 4))
_UP = ({"stride": 2, "padding": 1, "groups": 2, "transposed": True}, (2, 4, 4, 3), (4, 3, 4, 4), (2, 6, 8, 6))
_DCGAN = ({"stride": 2, "padding": 1, "transposed": True}, (32, 128, 16, 16), (128, 64, 4, 4), (32, 64, 32, 32))


def _case(name: str, kind: tuple[Arguments, tuple[int, ...], tuple[int, ...], tuple[int, ...]], *tensors: str, **options: object) -> Case:
    convolution, x, weight, result = kind

    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name))

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        channels = result[1]
        values = {
            "bias": 0.5 * draw(channels),
            "residual": draw(*result),
            "norm_weight": 1 + 0.3 * draw(channels),
            "running_mean": draw(channels),
            "running_var": 0.5 + draw(channels).square(),
        }
        arguments: Arguments = {"x": draw(*x).to(dtype), "weight": (0.3 * draw(*weight)).to(dtype), "bias": None, "residual": None}
        arguments |= {"norm_weight": None} | {key: value.to(dtype) for key, value in values.items() if key in tensors}
        return {**arguments, **convolution, **options}

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


_RUNNING = ("bias", "norm_weight", "running_mean", "running_var")
SMOOTH = [
    _case("batch, tanh, residual", _KEEP, "bias", "norm_weight", "residual", norm="batch", act="tanh"),
    _case("batch, transposed, in groups", _UP, "bias", "norm_weight", norm="batch", act="swish", gain=1.5),
    _case("evaluation, transposed", _UP, *_RUNNING, norm="batch", training=False, act="softplus"),
    _case("evaluation, residual", _DOWN, *_RUNNING, "residual", norm="batch", training=False, act="elu"),
    _case("group, residual", _KEEP, "bias", "norm_weight", "residual", norm="group", norm_groups=3, act="swish"),
    _case("no norm, residual", _DOWN, "bias", "residual", act="sigmoid", gain=0.5),
    _case("no norm, linear residual", _KEEP, "residual", act="linear"),
]
CONV_BLOCK = OpSpec(
    name="conv_block",
    cases=[*SMOOTH, _case("no norm, lrelu", _UP, "bias", act="lrelu")],
    benchmarks=[
        _case("training, transposed, 32x128x16x16", _DCGAN, "bias", "norm_weight", norm="batch", act="relu"),
        _case("evaluation, transposed, 32x128x16x16", _DCGAN, *_RUNNING, norm="batch", training=False, act="relu"),
    ],
    bad=[
        BadInput("three dimensions", _with(x=torch.zeros(4, 5, 6)), "x: got 3 dimensions, supported: 4: (B, C, H, W)"),
        BadInput("a weight of another dtype", _with(weight=torch.zeros(6, 4, 3, 3).double()), "weight: got torch.float64 (6, 4, 3, 3)"),
        BadInput("an unknown norm", _with(norm="layer"), "norm: got 'layer', supported: 'batch', 'group' or None"),
        BadInput("an unknown activation", _with(act="gelu"), "act: got 'gelu', supported: linear, relu"),
        BadInput("a weight of no norm", _with(norm=None), "norm_weight: got a tensor, supported: None without a norm"),
        BadInput("nothing to evaluate with", _with(training=False), "running_mean and running_var: got None, supported: both"),
        BadInput("a residual of another size", _with(residual=torch.zeros(3, 6, 5, 5)), "residual: got torch.float32 (3, 6, 5, 5) on cpu"),
    ],
    batched=["x", "residual"],
    differentiable=["x", "weight", "bias", "norm_weight", "residual"],
    twice=[case.name for case in SMOOTH],
    bits=False,
)
