"""What follows from analysis for modulate_bias_act: higher orders, what is kept, tensors that depend on each other, compilers."""

from __future__ import annotations

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


def everything(batch: int = 2, channels: int = 3, height: int = 4, width: int = 5, noises: int | None = None) -> list[Tensor]:
    """x, b, scale, noise, post_scale."""
    scales = [normal(batch, channels, seed=seed) + 1 for seed in (1, 2)]
    noise = normal(batch if noises is None else noises, 1, height, width, seed=3)
    return [normal(batch, channels, height, width), normal(channels, seed=4), scales[0], noise, scales[1]]


def orders(namespace: Any, given: list[Tensor], count: int, **options: Any) -> list[Tensor]:
    """The value and ``count`` orders of gradients in ``given``, each order's loss made of the gradients before it."""
    given = [t.detach().requires_grad_() for t in given]
    y = namespace.modulate_bias_act(*given, **options)
    results, loss = [y], (y**3).sum() / y.numel()
    for _ in range(count):
        found = torch.autograd.grad(loss, given, create_graph=True, allow_unused=True)
        results += [torch.zeros_like(t) if g is None else g for g, t in zip(found, given, strict=True)]
        loss = sum((g**2).sum() for g in found if g is not None)  # type: ignore[assignment]
    return [r.detach() for r in results]


@pytest.mark.parametrize("clamp", [None, 0.7])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_third_order(act: str, clamp: float | None) -> None:
    for noises in (2, 1):
        given = everything(noises=noises)
        for got, want in zip(*(orders(namespace, given, 3, act=act, clamp=clamp) for namespace in (ops, reference)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11 * float(want.abs().max().clamp(min=1)))


@pytest.mark.parametrize("needed", range(5))
def test_a_gradient_of_one_tensor(needed: int) -> None:
    """Only what is asked for, in both orders."""

    def gradients(namespace: Any) -> list[Tensor]:
        given = everything()
        asked = given[needed].requires_grad_()
        (first,) = torch.autograd.grad((namespace.modulate_bias_act(*given, act="swish") ** 3).sum(), asked, create_graph=True)
        return [first, *torch.autograd.grad(first.square().sum(), asked)]

    for got, want in zip(gradients(ops), gradients(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_tensors_that_depend_on_each_other() -> None:
    """Styles computed from the picture, a bias from the styles: no path is counted twice in the higher orders."""

    def chain(namespace: Any) -> list[Tensor]:
        x = normal(2, 3, 4, 4).requires_grad_()
        scale = x.mean((2, 3)) + 1
        noise = x[:, :1] * 0.5
        y = namespace.modulate_bias_act(x, scale.sum(0), scale, noise, scale.square(), act="tanh")
        results, loss = [y], (y**3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            results.append(gradient)
            loss = gradient.square().sum()
        return [r.detach() for r in results]

    for got, want in zip(chain(ops), chain(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11 * float(want.abs().max().clamp(min=1)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 600, 3, 7), (2, 5, 70, 71), (3, 17, 1, 40), (2, 64, 33, 32)], ids=str)
def test_every_instruction_set_differentiates(shape: tuple[int, ...], layout: torch.memory_format, isa: str) -> None:
    """Sizes that no vector, chunk or block divides, in float32."""
    given = everything(*shape)
    dy = normal(*shape, seed=6)

    def gradients(namespace: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype) for t in given]
        leaves[0] = leaves[0].contiguous(memory_format=layout)
        y = namespace.modulate_bias_act(*(t.requires_grad_() for t in leaves), act="lrelu", clamp=2.0)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype).contiguous(memory_format=layout))]

    working, exact = gradients(reference, torch.float32), gradients(reference, torch.float64)
    for got, plain, truth in zip(gradients(ops, torch.float32), working, exact, strict=True):
        assert_accurate(f"{shape} with {isa}", got, plain, truth, 4 * torch.finfo(torch.float32).eps)


def test_sums_are_wide_and_parameters_keep_their_dtype() -> None:
    """A bfloat16 picture of ones: the sums are exact counts, in the dtype of what they are the gradients of."""
    x = torch.ones(4, 2, 64, 64, dtype=torch.bfloat16)
    b, noise = torch.zeros(2, requires_grad=True), torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    scale, post = torch.ones(4, 2, dtype=torch.float64, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    found = torch.autograd.grad(ops.modulate_bias_act(x, b, scale, noise, post).sum(), (b, noise, scale, post))
    assert [t.dtype for t in found] == [t.dtype for t in (b, noise, scale, post)]
    assert [t.unique().tolist() for t in found] == [[4.0 * 4096], [8.0], [4096.0], [4096.0]]


def test_what_the_backward_pass_keeps() -> None:
    """The picture that came in and the small tensors, nothing else of a picture's size."""
    x, *rest = everything(2, 8, 16, 16)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        ops.modulate_bias_act(x.requires_grad_(), *rest, act="lrelu", clamp=256.0)
    assert sorted(kept) == sorted([x.numel(), *(t.numel() for t in rest)])


def test_all_parts_left_out_are_neutral() -> None:
    """Ones and zeros in place of None change no bit."""
    x = normal(2, 5, 6, 7, dtype=torch.float32)
    neutral = {"b": torch.zeros(5), "scale": torch.ones(2, 5), "noise": torch.zeros(1, 1, 6, 7), "post_scale": torch.ones(2, 5)}
    want = ops.bias_act(x, act="elu", clamp=1.0)
    for name in ("scale", "noise", "post_scale"):
        assert torch.equal(ops.modulate_bias_act(x, **{name: neutral[name]}, act="elu", clamp=1.0), want)
    assert torch.equal(ops.modulate_bias_act(x, **neutral, act="elu", clamp=1.0), want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_opcheck(layout: torch.memory_format) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, b, scale, noise, post = everything()
    x = x.contiguous(memory_format=layout)
    rest, curve = (b, scale, noise, post), (2, 0.2, 1.4, 0.5)
    operators = torch.ops.genfast
    checked = torch.library.opcheck(operators.modulate_bias_act, (x, *rest, *curve), test_utils=tests)
    checked |= torch.library.opcheck(operators.modulate_bias_act_backward, (x.cos(), x, *rest, *curve, True), test_utils=tests)
    outputs = (torch.empty_like(x), torch.empty(3, 2, 3, dtype=torch.float64), torch.empty_like(noise))
    given = (*outputs, x, x.cos(), scale, noise, b, post, *curve)
    checked |= torch.library.opcheck(operators.modulate_bias_act_, given, test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}


def penalty(x: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    y = ops.modulate_bias_act(x, scale=scale, act="tanh").square().sum()
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), (x, scale))


def test_compiled() -> None:
    """Exact without a derivative and by make_fx; otherwise refused."""
    x, scale = normal(2, 3, 4, 4), normal(2, 3)
    compiled = torch.compile(lambda x, s: ops.modulate_bias_act(2 * x, scale=s, act="swish") + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, scale), ops.modulate_bias_act(2 * x, scale=scale, act="swish") + 1)
    given = (x.requires_grad_(), scale.requires_grad_())
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|genfast"):
        torch.compile(penalty, fullgraph=True, backend="aot_eager")(*given)
    torch._dynamo.reset()
    traced = torch.compile(make_fx(penalty)(*given), fullgraph=True, backend="aot_eager")
    for got, want in zip(traced(*(t.detach() for t in given)), penalty(*given), strict=True):
        torch.testing.assert_close(got, want)


def test_the_operator_itself_refuses_derivatives() -> None:
    x = normal(1, 2, 3, 3).requires_grad_()
    with pytest.raises(ValueError, match=r"torch.ops.genfast.modulate_bias_act: got .*, supported: none of these; call genfast.ops.modul"):
        torch.ops.genfast.modulate_bias_act(x, None, None, None, None, 0, 0.0, 1.0, None)
