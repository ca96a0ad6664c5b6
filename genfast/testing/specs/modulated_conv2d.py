"""`modulated_conv2d`: docs/gan-ops.md."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genfast.reference import setup_filter
from genfast.testing.spec import Arguments, BadInput, Case, OpSpec

PARTS = ("noise", "bias", "input_gain", "post_scale")


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    weight: tuple[int, int, int],
    given: dict[str, tuple[int, ...]],
    taps: int = 0,
    **options: object,
) -> Case:
    """``weight`` (K, kh, kw); ``given`` the shapes of some of `PARTS`; ``taps`` 4 for StyleGAN2's filter."""

    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(len(name) + sum(shape))

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=random, dtype=torch.float64)

        batch, channels, _, _ = shape
        arguments: Arguments = {
            "x": draw(*shape).to(dtype),
            "weight": (draw(weight[0], channels, *weight[1:]) / 3).to(dtype),
            "styles": (draw(batch, channels) + 1).to(dtype),
        }
        arguments |= {key: draw(*given[key]).to(dtype) if key in given else None for key in PARTS}
        return arguments | {"resample_filter": setup_filter([1, 3, 3, 1]) if taps else None} | options

    return Case(name, make)


def _with(**changes: object) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


LAYER = {"noise": (3, 1, 5, 6), "bias": (4,)}
SMOOTH = [
    _case("dense, swish", (3, 2, 5, 6), (4, 3, 3), LAYER, padding=1, fused_modconv=False, act="swish"),
    _case("grouped, tanh", (3, 2, 5, 6), (4, 3, 3), LAYER, padding=1, fused_modconv=True, act="tanh"),
    _case(
        *("dense, up, next styles", (2, 3, 4, 4), (5, 3, 3), {"noise": (8, 8), "bias": (5,), "post_scale": (2, 5)}, 4),
        up=2,
        padding=1,
        fused_modconv=False,
        act="swish",
        gain=1.3,
    ),
    _case("dense, prescaled, input gain", (2, 3, 4, 4), (3, 3, 3), {"input_gain": (3,)}, prescaled=True, fused_modconv=False),
    _case("grouped, prescaled", (2, 3, 4, 4), (3, 3, 3), {"bias": (3,)}, prescaled=True, fused_modconv=True),
    _case("colours, by what is faster", (2, 6, 4, 5), (3, 1, 1), {"bias": (3,)}, demodulate=False),
    _case("one sample, noise of each channel", (1, 3, 4, 4), (2, 3, 3), {"noise": (2, 4, 4)}, padding=1, act="sigmoid"),
]
MODULATED_CONV2D = OpSpec(
    name="modulated_conv2d",
    cases=[
        *SMOOTH,
        _case("dense, down, lrelu, clamped", (2, 3, 6, 6), (4, 3, 3), {"bias": (4,)}, 4, down=2, padding=1, act="lrelu", clamp=1.0),
        _case("grouped, up, convolved", (2, 3, 4, 4), (4, 3, 3), {}, 4, up=2, padding=1, fused_modconv=True, flip_weight=False),
        _case("scalar noise", (2, 3, 4, 4), (4, 3, 3), {"noise": ()}, padding=1, fused_modconv=False),
    ],
    benchmarks=[],
    bad=[
        BadInput("a weight of other channels", _with(weight=torch.zeros(5, 3, 1, 1)), "weight: got shape (5, 3, 1, 1) for x (3, 2, 5, 6)"),
        BadInput("styles for one sample", _with(styles=torch.zeros(1, 2)), "styles: got shape (1, 2), supported: (B, C): (3, 2)"),
        BadInput("an input gain of others", _with(input_gain=torch.zeros(3)), "input_gain: got shape (3,), supported: broadcastable to"),
        BadInput("noise of another size", _with(noise=torch.zeros(4, 5)), "noise: got shape (4, 5), supported: broadcastable to the res"),
        BadInput("an unknown activation", _with(act="gelu"), "act: got 'gelu', supported: linear"),
        BadInput("an integer x", _with(x=torch.zeros(3, 2, 5, 6, dtype=torch.int32)), "x: got torch.int32, supported: torch.float32"),
        BadInput("a scale of other channels", _with(post_scale=torch.zeros(3, 2)), "post_scale: got shape (3, 2) on cpu, supported: "),
    ],
    batched=["x", "styles"],
    differentiable=["x", "weight", "styles", *PARTS],
    twice=[case.name for case in SMOOTH],
    bits=False,
)
