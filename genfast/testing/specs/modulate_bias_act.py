"""`modulate_bias_act`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec

EVERYTHING = ("b", "scale", "noise", "post_scale")


def _case(name: str, *shape: int, given: tuple[str, ...] = EVERYTHING, noise_batch: int | None = None, **options: object) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name) + sum(shape))
        batch, channels, height, width = shape

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        tensors = {
            "x": 2 * draw(*shape),
            "b": draw(channels),
            "scale": draw(batch, channels) + 1,
            "noise": 0.5 * draw(batch if noise_batch is None else noise_batch, 1, height, width),
            "post_scale": draw(batch, channels) + 1,
        }
        return {key: t.to(dtype) if key in ("x", *given) else None for key, t in tensors.items()} | options

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


SMOOTH = [
    _case("everything, swish", 2, 3, 5, 7, act="swish", gain=1.2),
    _case("one noise for all, lrelu", 3, 5, 4, 4, noise_batch=1, act="lrelu", alpha=0.1),
    _case("styles before a convolution", 2, 4, 3, 5, given=("scale",)),
    _case("noise alone, tanh", 2, 3, 4, 5, given=("noise",), act="tanh"),
    _case("style of the next layer, relu", 2, 3, 4, 5, given=("post_scale",), act="relu"),
    _case("one channel, softplus", 2, 1, 5, 6, act="softplus"),
    _case("many channels, one pixel, sigmoid", 2, 70, 1, 1, act="sigmoid"),
]
MODULATE_BIAS_ACT = OpSpec(
    name="modulate_bias_act",
    cases=[
        *SMOOTH,
        _case("clamped, lrelu", 2, 3, 4, 5, act="lrelu", clamp=0.75),
        _case("clamped, elu", 2, 9, 3, 3, given=("b", "scale", "noise"), act="elu", clamp=0.75),
        _case("several chunks, lrelu", 2, 33, 25, 24, act="lrelu"),
        _case("vectors, selu", 3, 48, 4, 8, act="selu"),
        _case("bias alone, lrelu", 2, 3, 4, 5, given=("b",), act="lrelu"),
        _case("empty", 0, 3, 4, 4, act="lrelu"),
    ],
    benchmarks=[
        _case("lrelu with clamp", 8, 128, 64, 64, given=("b", "scale", "noise"), act="lrelu", clamp=256.0),
        _case("lrelu with clamp and the next style", 8, 128, 64, 64, act="lrelu", clamp=256.0),
    ],
    bad=[
        BadInput("two dimensions", _with(x=torch.zeros(2, 3)), "x: got 2 dimensions, supported: 4: (B, C, H, W)"),
        BadInput("an integer x", _with(x=torch.zeros(2, 3, 4, 4, dtype=torch.int32)), "x: got torch.int32, supported: torch.float32"),
        BadInput("a bias too long", _with(b=torch.zeros(4)), "b: got shape (4,) on cpu, supported: (3,) on cpu"),
        BadInput("a scale for one sample", _with(scale=torch.zeros(1, 3)), "scale: got shape (1, 3) on cpu, supported: (2, 3) on cpu"),
        BadInput("noise for channels", _with(noise=torch.zeros(2, 3, 5, 7)), "supported: (2, 1, 5, 7) or (1, 1, 5, 7) on cpu"),
        BadInput("integer styles", _with(post_scale=torch.zeros(2, 3).int()), "post_scale: got torch.int32, supported: torch.float32"),
        BadInput("an unknown activation", _with(act="gelu"), "act: got 'gelu', supported: linear, relu"),
        BadInput("a negative clamp", _with(clamp=-1.0), "clamp: got -1.0, supported: a number of at least 0, or None"),
    ],
    batched=["x", "scale", "post_scale"],
    differentiable=["x", "b", "scale", "noise", "post_scale"],
    twice=[case.name for case in SMOOTH],
    bits=False,
)
