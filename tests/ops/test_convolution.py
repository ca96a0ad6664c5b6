"""Convolution whose gradients of gradients are convolutions: equal to torch's own, to the third order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.models.r3gan import ResidualBlock
from genfast.ops._convolution import convolution

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "3x3": ((4, 2, 3, 3), {"padding": 1}),
    "groups, stride": ((6, 1, 2, 3), {"stride": (2, 1), "padding": (0, 2), "groups": 2}),
    "transposed, groups": ((2, 3, 4, 4), {"stride": 2, "padding": 1, "groups": 2, "transposed": True}),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_torchs_to_the_third_order(case: str, layout: torch.memory_format) -> None:
    shape, options = CASES[case]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn((3, 2, 5, 6), generator=draw, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()

    def torchs(x: Tensor, weight: Tensor, transposed: bool = False, **options: Any) -> Tensor:
        return (F.conv_transpose2d if transposed else F.conv2d)(x, weight, **options)

    def chain(convolve: Callable[..., Tensor]) -> list[Tensor]:
        y = convolve(x, weight, **options)
        found, results = (y * y.detach().sin() + y**3).sum(), [y]
        for order in range(3):
            gradients = torch.autograd.grad(found, (x, weight), create_graph=True)
            results += gradients
            found = sum((g * torch.linspace(-1, 1, g.numel(), dtype=g.dtype).view_as(g)).pow(2 + order).sum() for g in gradients)
        return results

    got, want = chain(convolution), chain(torchs)
    assert got[0].stride() == want[0].stride()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-9)


def test_no_convolution_for_each_group() -> None:
    """R1 through a block of 16 groups: three convolutions forward, and three again where the gradient is differentiated."""
    block = ResidualBlock(32, group_channels=4)
    x = torch.randn(2, 32, 4, 4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(g.square().sum(), list(block.parameters()))
    assert {event.key: event.count for event in profile.key_averages()}["aten::convolution"] == 6


def test_batched_gradients_and_unused_ones() -> None:
    x, weight = torch.randn(2, 3, 5, 5).requires_grad_(), torch.randn(4, 3, 3, 3).requires_grad_()
    results = []
    for convolve in (convolution, F.conv2d):
        y = convolve(x, weight)
        batch = torch.linspace(-1, 1, 3 * y.numel()).view(3, *y.shape)
        (g,) = torch.autograd.grad(y, x, batch, create_graph=True, is_grads_batched=True)
        results.append([g, *torch.autograd.grad(g.square().sum(), (x, weight), allow_unused=True, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mode", ["jvp", "func", "autocast", "compile"])
def test_what_it_leaves_to_torch(mode: str) -> None:
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    if mode == "jvp":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(), torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(convolution(dual, weight)).tangent
        torch.testing.assert_close(tangent, F.conv2d(torch.ones_like(x), weight))
    elif mode == "func":
        got = torch.func.hessian(lambda w: convolution(x, w).square().sum())(weight)
        torch.testing.assert_close(got, torch.func.hessian(lambda w: F.conv2d(x, w).square().sum())(weight))
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert convolution(x, weight.requires_grad_()).dtype == torch.bfloat16
    else:
        (got,) = torch.autograd.grad(torch.compile(convolution, fullgraph=True)(x, weight.requires_grad_()).sum(), weight)
        (want,) = torch.autograd.grad(F.conv2d(x, weight).sum(), weight)
        torch.testing.assert_close(got, want)
