"""modulated_conv2d at zero, tiny and huge styles and weights, values and gradients against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import ops, reference

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5}
STYLES = {"zero": 0.0, "1e-15": 1e-15, "1e-4": 1e-4, "1": 1.0, "1e4": 1e4, "1e15": 1e15, "mixed": [0.0, 1.0, 1e3]}
WEIGHTS: dict[str, Any] = {"zero": 0.0, "1e-15": 1e-15, "1e-4": 1e-4, "1": 1.0, "1e15": 1e15, "mixed": [0.0, 1.0, 1e-6, 1e3, 1e-3]}


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(namespace: Any, x: Tensor, weight: Tensor, styles: Tensor, **options: Any) -> list[Tensor]:
    given = [t.clone().requires_grad_() for t in (x, weight, styles)]
    y = namespace.modulated_conv2d(*given, padding=1, **options)
    loss = (y.double() * draw(*y.shape, seed=9).double()).sum()
    return [t.detach().double() for t in (y, *torch.autograd.grad(loss, given))]


@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "dense"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("size", STYLES)
def test_ranges(size: str, weights: str, dtype: torch.dtype, fused: bool) -> None:
    """The value and the gradients of x, of the weights and of the styles, each to the precision of x's dtype.

    In float16 the gradients of weights and styles are measured by the larger of both: the chain that makes them has no more range.
    """
    x = draw(3, 4, 6, 5, seed=0).to(dtype)
    styles = draw(3, 4, seed=2) * torch.tensor(STYLES[size]).view(-1, 1)
    weight = draw(5, 4, 3, 3, seed=1) * torch.tensor(WEIGHTS[weights]).view(-1, 1, 1, 1)
    want = run(reference, x.double(), weight.double(), styles.double())
    got = run(ops, x, weight, styles, fused_modconv=fused)
    largest = [float(t.abs().max()) for t in want]
    if dtype == torch.float16:
        largest[2:] = [max(largest[2:])] * 2
    for a, b, scale in zip(got, want, largest, strict=True):
        assert (a - b).abs().max() <= TOLERANCE[dtype] * scale + (6e-7 if dtype == torch.float16 else 1e-35)


@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "dense"])
def test_prescaled(fused: bool) -> None:
    """Styles that the layer before has applied count in the norm alone."""
    weight, styles = draw(5, 4, 3, 3, seed=1) * 1e12, draw(3, 4, seed=2) * 1e12
    x = draw(3, 4, 6, 5, seed=0)
    want = run(reference, x.double(), weight.double(), styles.double(), prescaled=True)
    got = run(ops, x, weight, styles, prescaled=True, fused_modconv=fused)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "dense"])
def test_a_sample_that_is_not_a_number_leaves_the_others_alone(fused: bool) -> None:
    weight, styles, x = draw(5, 4, 3, 3, seed=1), draw(3, 4, seed=2), draw(3, 4, 6, 5, seed=0)
    weight[2] = 0
    styles[1] = float("nan")
    y = ops.modulated_conv2d(x, weight, styles, padding=1, fused_modconv=fused)
    assert y[1].isnan().any() and y[[0, 2]].isfinite().all()
