"""What follows from analysis for bias_act: higher orders, the clamp's edge, what is kept, compilers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from genfast import ops, reference
from genfast.reference.bias_act import ACTIVATIONS
from genfast.testing.oracle import assert_accurate


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chain(function: Callable[..., Tensor], x: Tensor, b: Tensor, orders: int, **options: Any) -> list[Tensor]:
    """Values and gradients to the given order, each order's loss made of the gradients before it."""
    x, b = x.clone().requires_grad_(), b.clone().requires_grad_()
    results = [function(x, b, **options)]
    loss = (results[0] * torch.cos(x.detach())).sum() + 0.1 * results[0].square().sum()
    for _ in range(orders):
        gx, gb = torch.autograd.grad(loss, (x, b), create_graph=True)
        results += [gx, gb]
        loss = 1.3 * (gx * torch.sin(x.detach())).sum() + 0.2 * gx.square().sum() + 0.05 * gb.square().sum()
    return [t.detach() for t in results]


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_fourth_order(act: str, clamp: float | None) -> None:
    """In every dimension, of pictures and of vectors."""
    for shape, dim in (((2, 3, 4, 5), 0), ((2, 3, 4, 5), 1), ((2, 3, 4, 5), 2), ((2, 3, 4, 5), -1), ((4, 7), 1), ((9,), 0)):
        x, b = normal(*shape), normal(shape[dim], seed=1)
        got, want = (chain(f, x, b, 4, act=act, clamp=clamp, dim=dim) for f in (ops.bias_act, reference.bias_act))
        for result, truth in zip(got, want, strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_instruction_set_differentiates(act: str, isa: str) -> None:
    x, b = normal(3, 5, 7, 9, dtype=torch.float32) * 3, normal(5, seed=1, dtype=torch.float32)
    options = {"act": act, "clamp": 2.5}
    got, working = (chain(f, x, b, 3, **options) for f in (ops.bias_act, reference.bias_act))
    exact = chain(reference.bias_act, x.double(), b.double(), 3, **options)
    for result, plain, truth in zip(got, working, exact, strict=True):
        assert_accurate(f"{act} with {isa}", result, plain, truth, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_small_values_are_relatively_exact(act: str, isa: str) -> None:
    """The oracle looks at the largest value only; here every value counts, down to where the result is subnormal."""
    size = torch.logspace(-30, 1.9, 5000, dtype=torch.float64).float()
    x = torch.cat([size, -size])[None]
    exact = reference.bias_act(x.double(), act=act, gain=1.0)
    wrong = (ops.bias_act(x, act=act, gain=1.0).double() - exact).abs() / exact.abs().clamp(min=torch.finfo(torch.float32).tiny)
    assert wrong.max() < 4e-7


@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
def test_gradient_at_and_past_the_clamp(act: str) -> None:
    """At the clamp the gradient passes, as torch's own clamp says; one step past it nothing does, not even a NaN."""
    past = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    x = torch.tensor([[1.0, past, 0.5, -1.0, -past, 0.0, float("nan"), 2.0]], requires_grad=True)
    dy = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, float("nan")]])
    options = {"act": act, "gain": 1.0, "clamp": 1.0, "alpha": 1.0}
    (got,) = torch.autograd.grad(ops.bias_act(x, **options), x, dy)
    (want,) = torch.autograd.grad(reference.bias_act(x, **options), x, dy)
    assert torch.equal(got, want)
    assert got[0, :3].tolist() == [1.0, 0.0, 1.0] and got[0, 7] == 0


@pytest.mark.parametrize("clamp", [None, 2.0])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_nan_stays(act: str, clamp: float | None) -> None:
    assert ops.bias_act(torch.full((3, 40), torch.nan), act=act, clamp=clamp).isnan().all()


@pytest.mark.parametrize(
    ("act", "options", "kept"),
    [
        ("linear", {}, "nothing"),
        ("linear", {"clamp": 1.0}, "x"),
        ("relu", {}, "y"),
        ("lrelu", {}, "y"),
        ("lrelu", {"clamp": 256.0}, "x"),
        ("lrelu", {"gain": 0.5}, "x"),
        ("lrelu", {"alpha": -0.2}, "x"),
        ("tanh", {}, "x"),
    ],
)
def test_what_the_backward_pass_keeps(act: str, options: dict[str, float], kept: str) -> None:
    """The result is what the next layer keeps anyway, so that x, a convolution's result, can go."""
    x = normal(2, 3, 4, 4).requires_grad_() * 1.0
    y = ops.bias_act(x, act=act, **options)
    y_address = y.data_ptr()
    saved = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    addresses = {t.data_ptr() for t in saved}
    assert addresses == {"nothing": set(), "x": {x.data_ptr()}, "y": {y_address}}[kept]
    alive = weakref.ref(x)
    del x, saved
    gc.collect()
    assert (alive() is not None) == (kept == "x")


def test_small_gains_do_not_lose_the_sign() -> None:
    """With a gain below one a small positive x gives a result of zero; the gradient must not take it for a negative one."""
    x = torch.tensor([[6e-8, -6e-8]], dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.bias_act(x, act="lrelu", gain=0.25, alpha=0.5).sum(), x)
    assert gradient.tolist() == [[0.25, 0.125]]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2), (1, 0, 3, 2)])
def test_any_dense_layout_is_kept(order: tuple[int, ...]) -> None:
    """Whatever the order of the dimensions in memory, the result has it too, and is computed in place of no copy."""
    plain = normal(4, 3, 6, 5)
    dims = [order.index(i) for i in range(4)]
    x = plain.permute(order).contiguous().permute(dims)
    for dim in range(4):
        b = normal(x.shape[dim], seed=2)
        y = ops.bias_act(x, b, dim, "lrelu")
        assert y.stride() == x.stride()
        torch.testing.assert_close(y, reference.bias_act(plain, b, dim, "lrelu"), rtol=1e-15, atol=1e-15)


def test_the_bias_gradient_sums_in_wide_precision() -> None:
    x = torch.ones(64, 2, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    b = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.bias_act(x, b, act="linear").sum(), b)
    assert gradient.tolist() == [64.0 * 64 * 64] * 2


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("factor", [False, True])
def test_opcheck(factor: bool, sums: bool) -> None:
    x, b = normal(2, 3, 4, 5), normal(3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = (x.clone() if factor else None, x, b)
    checked = torch.library.opcheck(torch.ops.genfast.bias_act, (*given, 1, 2, 0.2, 1.4, 0.5, 1, sums), test_utils=tests)
    kernel = (torch.empty_like(x), torch.empty_like(b) if sums else None, *given, 3, 20, 2, 0.2, 1.4, None, 1)
    checked |= torch.library.opcheck(torch.ops.genfast.bias_act_, kernel, test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}


def test_compiled_without_gradient() -> None:
    x, b = normal(2, 3, 8, 8, dtype=torch.float32), normal(3, dtype=torch.float32)
    compiled = torch.compile(lambda x, b: ops.bias_act(2 * x, b, act="swish") + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x, b), ops.bias_act(2 * x, b, act="swish") + 1)


def penalty(x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = ops.bias_act(x, b, act="tanh", gain=1.5).square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), (x, b))  # type: ignore[return-value]


def test_compiled_derivatives_are_refused_or_exact() -> None:
    x, b = normal(2, 3, 4, 4).requires_grad_(), normal(3).requires_grad_()
    want = penalty(x, b)
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|genfast"):
        torch.compile(penalty, fullgraph=True)(x, b)
    torch._dynamo.reset()
    broken = torch.compile(lambda x, b: ops.bias_act(2 * x, b, act="tanh") * 3)  # with graph breaks
    for got, exact in zip(
        torch.autograd.grad(broken(x, b).square().sum(), (x, b)),
        torch.autograd.grad((reference.bias_act(2 * x, b, act="tanh") * 3).square().sum(), (x, b)),
        strict=True,
    ):
        torch.testing.assert_close(got, exact)
    traced = torch.compile(make_fx(penalty)(x, b), fullgraph=True)
    for got, exact in zip(traced(x.detach(), b.detach()), want, strict=True):
        torch.testing.assert_close(got, exact)


def test_the_operator_itself_refuses_derivatives() -> None:
    x = normal(2, 3).requires_grad_()
    with pytest.raises(ValueError, match=r"torch.ops.genfast.bias_act: got .*, supported: none of these; call genfast.ops.bias_act"):
        torch.ops.genfast.bias_act(None, x, None, 1, 2, 0.2, 1.0, None, 0, False)
