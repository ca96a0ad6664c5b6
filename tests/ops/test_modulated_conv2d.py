"""modulated_conv2d, pixel_norm and minibatch_stddev: sweeps to the third order, the range of float16, invariances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import ops, reference
from genfast.testing.oracle import assert_accurate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orders(function: Callable[..., Tensor], given: list[Tensor], count: int) -> list[Tensor]:
    """The value and ``count`` orders of gradients in ``given``, each of the sum of squares of those before."""
    given = [t.detach().requires_grad_() for t in given]
    y = function(*given)
    results, loss = [y], (y**3).sum() / y.numel()
    for _ in range(count):
        found = torch.autograd.grad(loss, given, create_graph=True)
        results += found
        loss = sum((g**2).sum() for g in found)  # type: ignore[assignment]
    return [r.detach() for r in results]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * float(b.abs().max().clamp(min=1)))


def draw(index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and options of one modulated convolution."""
    random = np.random.default_rng(index)
    up, down = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (2, 3)][index % 6]
    kernel, flips = int(random.choice([1, 3])), random.integers(0, 2, 3)
    tensors = {"x": normal(3, 4, 7, 6, seed=index), "weight": normal(5, 4, kernel, kernel, seed=1), "styles": normal(3, 4, seed=2) + 1}
    options: dict[str, Any] = {
        "up": up,
        "down": down,
        "padding": int(random.choice([kernel // 2, 1, 2])),
        "demodulate": index // 6 % 2 == 0,
    }
    options |= {"resample_filter": [ops.setup_filter([1, 3, 3, 1]), normal(3, 4, seed=3), None][index % 3], "flip_weight": bool(flips[0])}
    shape = reference.modulated_conv2d(**tensors, **options).shape
    if index % 4:
        tensors["noise"] = normal(*[(), (3, 1, *shape[2:]), tuple(shape[2:]), tuple(shape)][index % 4], seed=4)
    if flips[1]:
        tensors["bias"] = normal(5, seed=5)
        options |= {"act": ["lrelu", "swish"][index % 2], "gain": 1.3, "clamp": [None, 2.0][index // 2 % 2]}
    if flips[2]:
        tensors["input_gain"] = normal(*[(), (4,), (3, 1)][index % 3], seed=6)
    if index % 5 > 2:
        tensors["post_scale"] = normal(3, 5, seed=7)
    options["prescaled"] = options["demodulate"] and "input_gain" not in tensors and index % 5 > 1  # else they are unused
    return tensors, options


@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "dense"])
def test_modulated_conv2d(fused: bool) -> None:
    """Values and gradients of three orders in every tensor, over 24 draws."""
    for index in range(24):
        tensors, options = draw(index)

        def run(namespace: Any, *given: Tensor, tensors: Any = tensors, options: Any = options) -> Tensor:
            result: Tensor = namespace.modulated_conv2d(**dict(zip(tensors, given, strict=True)), **options, fused_modconv=fused)
            return result

        given = list(tensors.values())
        assert_same(orders(lambda *t: run(ops, *t), given, 3), orders(lambda *t: run(reference, *t), given, 3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "dense"])
def test_modulated_conv2d_in_working_precision(fused: bool, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """As close to float64 as the reference in the same dtype, in x's memory format, parameters in float32."""
    x = normal(4, 16, 8, 8).to(dtype).contiguous(memory_format=layout)
    weight, styles, bias = normal(24, 16, 3, 3, seed=1).float(), normal(4, 16, seed=2).float() + 1, normal(24, seed=3).float()
    noise = normal(4, 1, 16, 16, seed=4).to(dtype)
    options: dict[str, Any] = {"up": 2, "padding": 1, "resample_filter": ops.setup_filter([1, 3, 3, 1]), "act": "lrelu"}
    got = ops.modulated_conv2d(x, weight, styles, noise, bias=bias, fused_modconv=fused, **options)
    wide = [t.double() for t in (x, weight, styles, noise)]
    exact = reference.modulated_conv2d(*wide, bias=bias.double(), **options)
    working = reference.modulated_conv2d(*(t.to(dtype) for t in wide), bias=bias.to(dtype), **options)
    assert_accurate("modulated_conv2d", got, working, exact)
    assert got.is_contiguous(memory_format=layout)


def test_modulated_conv2d_stays_in_the_range_of_float16() -> None:
    """Large styles and weights cancel in the demodulation; on the way nothing overflows, and no derivative is lost."""
    x, weight, styles = normal(2, 8, 6, 6), 2000 * normal(4, 8, 3, 3, seed=1), 3000 * normal(2, 8, seed=2)

    def run(dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_(), weight.float().to(torch.promote_types(dtype, torch.float32)).requires_grad_()]
        y = ops.modulated_conv2d(*given, styles, padding=1, fused_modconv=False)
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    for got, want in zip(run(torch.float16), run(torch.float64), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=1e-2 * float(want.detach().abs().max()))


def test_styles_applied_by_the_layer_before() -> None:
    """A layer that multiplies its result by the next one's styles, and the next one, which takes it so: the same as two layers."""
    x, weights, styles = normal(2, 3, 6, 6), [normal(4, 3, 3, 3), normal(5, 4, 3, 3)], [normal(2, 3, seed=1), normal(2, 4, seed=2)]
    plain = ops.modulated_conv2d(ops.modulated_conv2d(x, weights[0], styles[0], act="lrelu"), weights[1], styles[1])
    for fused in (True, False):
        y = ops.modulated_conv2d(x, weights[0], styles[0], act="lrelu", post_scale=styles[1], fused_modconv=fused)
        torch.testing.assert_close(ops.modulated_conv2d(y, weights[1], styles[1], prescaled=True, fused_modconv=fused), plain)


def test_modulated_conv2d_of_no_sample() -> None:
    assert ops.modulated_conv2d(torch.zeros(0, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.zeros(0, 3), padding=1).shape == (0, 5, 4, 4)


def test_modulated_conv2d_demodulates() -> None:
    """White noise keeps its variance whatever the styles, and a style's scale is no part of the result."""
    x, w, s = normal(2, 32, 64, 64), normal(16, 32, 3, 3, seed=1), normal(2, 32, seed=2)
    y = ops.modulated_conv2d(x, w, s, padding=1)
    assert 0.9 < float(y.var()) < 1.1
    torch.testing.assert_close(ops.modulated_conv2d(x, w, 5 * s, padding=1, fused_modconv=False), y, rtol=1e-7, atol=1e-7)


STATISTICS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("pixel_norm", (3, 5, 2, 3), {}),
    ("pixel_norm", (3, 5), {"dim": -1, "eps": 0.1}),
    ("minibatch_stddev", (8, 6, 2, 3), {}),
    ("minibatch_stddev", (6, 4, 3, 2), {"group_size": 3, "num_channels": 2}),
    ("minibatch_stddev", (3, 4, 2, 2), {"num_channels": 4}),
    ("minibatch_stddev", (6, 4, 2, 2), {"group_size": None, "eps": 1e-4}),
]


@pytest.mark.parametrize(("name", "shape", "options"), STATISTICS)
def test_statistics(name: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """Values and three orders of gradients in float64."""
    x, function, literal = normal(*shape), getattr(ops, name), getattr(reference, name)
    assert_same(orders(lambda t: function(t, **options), [x], 3), orders(lambda t: literal(t, **options), [x], 3))


def test_minibatch_stddev_of_equal_samples() -> None:
    """One sample four times has no spread, one sample alone neither."""
    x = normal(1, 3, 2, 2)
    for given in (x, x.repeat(4, 1, 1, 1)):
        torch.testing.assert_close(ops.minibatch_stddev(given)[:, 3], torch.full((len(given), 2, 2), 1e-4, dtype=torch.float64))
