"""What follows from analysis for bn_act: running statistics, moments, derivatives of derivatives, compilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfast import ops, reference


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(19, 3, 5, 7), (3, 17, 4, 4), (20, 32, 2, 2), (2, 5, 90, 100), (2, 2, 103, 159)], ids=str)
def test_a_training_run_equals_torchs_module(shape: tuple[int, ...], layout: torch.memory_format, isa: str) -> None:
    """Three steps in training and one in evaluation, with running statistics, against nn.BatchNorm2d and autograd."""
    module, channels = nn.BatchNorm2d(shape[1], momentum=0.3).double(), shape[1]
    weight, bias = normal(channels, seed=1).requires_grad_(), normal(channels, seed=2).requires_grad_()
    mean, var = torch.zeros(channels).double(), torch.ones(channels).double()
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    for step in range(4):
        training = step < 3
        module.train(training)
        x = (normal(*shape, seed=step) * 3 + 20).contiguous(memory_format=layout).requires_grad_()
        got = ops.bn_act(x, weight, bias, mean, var, training, 0.3, act="lrelu")
        want = nn.functional.leaky_relu(module(x), 0.2)
        assert got.stride() == x.stride()
        dy = normal(*shape, seed=9)
        ours = torch.autograd.grad(got, (x, weight, bias), dy)
        theirs = torch.autograd.grad(want, (x, module.weight, module.bias), dy)
        for a, b in zip((got, *ours, mean, var), (want, *theirs, module.running_mean, module.running_var), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_large_mean_does_not_cancel() -> None:
    """float32 with a mean of a thousand deviations: the variance keeps its digits."""
    x = (normal(8, 2, 40, 40) + 1000).float()
    got = ops.bn_act(x, act="linear")
    want = reference.bn_act(x.double(), act="linear")
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_normalised() -> None:
    y = ops.bn_act(5 * normal(16, 4, 9, 9) - 3, act="linear", eps=0.0)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(y.var((0, 2, 3), unbiased=False), torch.ones(4).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", "tanh", "swish"])
def test_third_order(act: str, training: bool) -> None:
    def chain(namespace: Any) -> list[Tensor]:
        given = [t.requires_grad_() for t in (normal(4, 3, 5, 6), 1 + normal(3, seed=1), normal(3, seed=2))]
        y = namespace.bn_act(*given, normal(3, seed=3), normal(3, seed=4).square() + 1, training, act=act)
        results, loss = [y], (y**3).sum()
        for _ in range(3):
            found = torch.autograd.grad(loss, given, create_graph=True)
            results += found
            loss = sum((g**2).sum() for g in found)  # type: ignore[assignment]
        return [r.detach() for r in results]

    for got, want in zip(chain(ops), chain(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_third_derivative_by_differences() -> None:
    """The gradient of the second derivative against differences of it: torch's own batch_norm fails this."""

    def second(x: Tensor, residual: Tensor) -> Tensor:
        y = ops.bn_act(x, residual=residual, act="tanh")
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad((g**2).sum(), x, create_graph=True)
        return h

    given = normal(3, 2, 4, 3).requires_grad_(), normal(3, 2, 4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(second, given, fast_mode=True)


def test_float32_parameters_with_a_bfloat16_input() -> None:
    x, weight, bias = normal(8, 6, 9, 9, dtype=torch.bfloat16).requires_grad_(), torch.ones(6).requires_grad_(), torch.zeros(6)
    mean, var = torch.zeros(6), torch.ones(6)
    y = ops.bn_act(x, weight, bias, mean, var)
    assert y.dtype == torch.bfloat16 and mean.dtype == torch.float32
    gx, gw = torch.autograd.grad(y.sum(), (x, weight))
    assert gx.dtype == torch.bfloat16 and gw.dtype == torch.float32
    torch.testing.assert_close(mean.double(), 0.1 * x.detach().double().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)


def test_opcheck() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, genfast = normal(2, 4, 4, 5), torch.ops.genfast
    options = (3, 0.0, 1.5)  # act, alpha, gain
    for samples, groups in ((1, 4), (2, 2)):
        moments = normal(2, samples, 4, seed=1).square()
        given = (normal(4, seed=2), None, groups, 1e-5, *options)
        dy, residual, sums, rest = x.clone(), x.clone(), normal(2, samples, 4), (groups, 1e-5, 0.0, *options)
        for operator, arguments in [
            (genfast.bn_moments, (x,)),
            (genfast.bn_apply, (x, residual, moments, False, *given)),
            (genfast.bn_apply, (x, None, None, samples > 1, *given)),
            (genfast.bn_sums, (dy, x, None, moments, *given, False)),
            (genfast.bn_sums, (dy, x, residual, moments, *given, True)),
            (genfast.bn_backward, (dy, x, residual, None, None, moments, *given, 0.0, False, False)),
            (genfast.bn_backward, (dy, x, residual, sums, sums.clone(), moments, *given, 1.0, False, False)),
            (genfast.bn_backward, (dy, x, residual, None, None, moments, *given, 20.0, True, True)),
            (genfast.bn_act_, (torch.empty_like(x), None, None, moments, None, x, None, residual, *[None] * 3, samples, 20, 1, *rest)),
        ]:
            assert set(torch.library.opcheck(operator, arguments, test_utils=tests).values()) == {"SUCCESS"}


def test_compiled() -> None:
    x, weight, bias = normal(4, 3, 6, 6), normal(3, seed=1), normal(3, seed=2)

    def both(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y: Tensor = ops.bn_act(2 * x, weight, bias, mean, var, act="swish") + 1
        return y

    eager, compiled = ([torch.zeros(3).double(), torch.ones(3).double()] for _ in range(2))
    want = both(x, weight, bias, *eager)
    torch.testing.assert_close(torch.compile(both, fullgraph=True)(x, weight, bias, *compiled), want)
    torch.testing.assert_close(compiled, eager)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|genfast"):
        torch.compile(both, fullgraph=True)(x.requires_grad_(), weight, bias, *compiled)
