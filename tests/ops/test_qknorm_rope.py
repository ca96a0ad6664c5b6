"""qknorm_rope beyond its OpSpec: the formulas of Flux, LLaMA and Wan written out, rotations, packed memory, compilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genfast import ops, reference
from genfast.testing import SPECS
from genfast.testing.oracle import assert_accurate, precision
from genfast.testing.spec import Case, widened

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=DOUBLE).to(dtype)


def positions(*sizes: int) -> Tensor:
    """The grid's coordinates in row-major order, (N, axes)."""
    return torch.stack(torch.meshgrid(*(torch.arange(s) for s in sizes), indexing="ij"), -1).flatten(0, -2)


# ---- other people's formulas ---------------------------------------------------------------------------------------------------


def test_flux() -> None:
    """RMS norm of each head; pairs (2i, 2i + 1) are complex numbers, turned by e^(i angle) over three axes."""
    q, k, weights = draw(2, 3, 24, 32), draw(2, 3, 24, 32, seed=1), 1 + 0.1 * draw(2, 32)
    axes, grid = (8, 12, 12), positions(2, 3, 4)

    def literal(x: Tensor, weight: Tensor) -> Tensor:
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        angle = torch.cat([grid[:, a, None] * 10000.0 ** -(torch.arange(0, n, 2) / n) for a, n in enumerate(axes)], -1)
        z = torch.complex(x[..., 0::2], x[..., 1::2]) * torch.exp(1j * angle.double())
        return torch.view_as_real(z).flatten(-2)

    got = ops.qknorm_rope(q, k, *weights, *ops.rope_table(grid, axes, dtype=DOUBLE))
    for a, b in zip(got, (literal(q, weights[0]), literal(k, weights[1])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the exponents above are float32


def test_llama() -> None:
    """x cos + rotate_half(x) sin with tables of twice the width; fewer key heads; the rest of a head stays."""
    q, k, rotary = draw(2, 4, 7, 24), draw(2, 2, 7, 24), 16
    angle = torch.arange(7).double()[:, None] / 500000.0 ** (torch.arange(0, rotary, 2).double() / rotary)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def literal(x: Tensor) -> Tensor:
        turning, rest = x.split([rotary, 24 - rotary], -1)
        a, b = turning.chunk(2, -1)
        return torch.cat([turning * cos + torch.cat([-b, a], -1) * sin, rest], -1)

    table = ops.rope_table(torch.arange(7), rotary, theta=500000.0, dtype=DOUBLE)
    got = ops.qknorm_rope(q, k, None, None, *table, norm=None, interleaved=False)
    for a, b in zip(got, (literal(q), literal(k)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_wan() -> None:
    """RMS norm over all heads of a token, before they are split."""
    flat, weight = draw(2, 5, 48), 1 + 0.1 * draw(48)
    literal = (flat / (flat.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight).unflatten(2, (3, 16)).transpose(1, 2)
    x = flat.unflatten(2, (3, 16)).transpose(1, 2)
    for got in ops.qknorm_rope(x, x, weight.view(3, 16), weight.view(3, 16), across_heads=True):
        torch.testing.assert_close(got, literal, rtol=1e-13, atol=1e-13)


def test_layer_norm() -> None:
    x, weight, bias = draw(2, 3, 5, 40) + 30, draw(40), draw(40, seed=2)
    want = torch.nn.functional.layer_norm(x, (40,), weight, bias, 1e-5)
    for got in ops.qknorm_rope(x, x, weight, weight, norm="layer", eps=1e-5, q_bias=bias, k_bias=bias):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


# ---- what follows from analysis ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_distances_alone(interleaved: bool) -> None:
    q, k = draw(1, 2, 12, 16), draw(1, 2, 12, 16, seed=1)

    def scores(first: int) -> Tensor:
        table = ops.rope_table(positions(3, 4) + first, (8, 8), dtype=DOUBLE)
        a, b = ops.qknorm_rope(q, k, None, None, *table, interleaved=interleaved)
        return a @ b.mT

    torch.testing.assert_close(scores(0), scores(1000), rtol=1e-9, atol=1e-9)
    assert (scores(0) - q @ k.mT).abs().max() > 0.1


def test_a_rotation_there_and_back() -> None:
    x, (cos, sin) = draw(2, 2, 9, 20, dtype=torch.float32), ops.rope_table(torch.arange(9), 20)
    there, length = ops.qknorm_rope(x, x, None, None, cos, sin, norm=None)[0], x.norm(dim=-1)
    torch.testing.assert_close(there.norm(dim=-1), length)
    torch.testing.assert_close(ops.qknorm_rope(there, there, None, None, cos, -sin, norm=None)[0], x)


def test_what_does_not_turn_is_not_touched() -> None:
    """An infinite neighbour that turns makes no NaN of it."""
    x = draw(1, 1, 3, 40, dtype=torch.float32)
    x[..., 13] = torch.inf
    cos, sin = ops.rope_table(torch.arange(3), 14)
    for interleaved in (True, False):
        got = ops.qknorm_rope(x, x, None, None, cos, sin, norm=None, interleaved=interleaved)[0]
        assert torch.equal(got[..., 14:], x[..., 14:])


def test_table_of_one_axis_and_of_many() -> None:
    cos, sin = ops.rope_table(torch.tensor([[0.0, 1.5]]), 4, theta=100.0)
    angle = torch.tensor([[[0.0, 0.0], [1.5, 0.15]]], dtype=DOUBLE)
    assert cos.dtype == torch.float32 and torch.equal(cos, angle.cos().float()) and torch.equal(sin, angle.sin().float())
    many, grid = ops.rope_table(positions(2, 3), (2, 4))[0], positions(2, 3)
    apart = [ops.rope_table(grid[:, axis], d)[0] for axis, d in enumerate((2, 4))]
    assert torch.equal(many, torch.cat(apart, -1))
    with pytest.raises(ValueError, match=r"^dims: got 3, supported: even numbers$"):
        ops.rope_table(torch.arange(3), 3)
    with pytest.raises(ValueError, match=r"^positions: got shape \(6, 2\), supported: \(\.\.\., N, 1\)"):
        ops.rope_table(grid, [4])


# ---- memory --------------------------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


def test_packed_memory_is_read_where_it_lies() -> None:
    qkv, weight, table = draw(2, 40, 3, 2, 16, dtype=torch.float32), torch.ones(16), ops.rope_table(torch.arange(40), 16)
    with Recorded() as recorded:
        o = ops.qknorm_rope_attention(qkv, weight, weight, *table)
    assert not {n for n in recorded.names if any(word in n for word in ("clone", "copy", "cat", "stack", "contiguous"))}
    assert {"qknorm_rope.default", "attention.default"} <= set(recorded.names)
    assert o.transpose(1, 2).is_contiguous()
    by_heads = qkv.flatten(2)
    assert torch.equal(ops.qknorm_rope_attention(by_heads, weight, weight, *table, heads=2), o)
    q, k, v = (t.transpose(1, 2).contiguous() for t in qkv.unbind(2))
    assert torch.equal(ops.qknorm_rope_attention([q, k, v], weight, weight, *table), o)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", SPECS["qknorm_rope"].cases, ids=lambda c: c.name)
def test_gradients_on_every_instruction_set(case: Case, dtype: torch.dtype, isa: str) -> None:
    spec, arguments = SPECS["qknorm_rope"], case.make(dtype)

    def gradients(namespace: Any, given: dict[str, Any]) -> list[Tensor]:
        leaves = {key: given[key].clone().requires_grad_() for key in spec.differentiable if given[key] is not None}
        results = getattr(namespace, spec.name)(**{**given, **leaves})
        weights = [torch.arange(r.numel()).remainder(7).sub(3).view(r.shape).to(r.dtype) for r in results]
        return list(torch.autograd.grad(results, list(leaves.values()), weights))

    got, working, exact = (gradients(*a) for a in ((ops, arguments), (reference, arguments), (reference, widened(arguments))))
    for a, plain, truth in zip(got, working, exact, strict=True):
        assert_accurate(case.name, a, plain, truth, precision(spec, dtype))


def test_threads_change_no_bit_of_a_gradient() -> None:
    qkv, weight = draw(2, 700, 3, 2, 64, dtype=torch.float32), torch.ones(64)
    table, found, before = ops.rope_table(torch.arange(700), 64), [], torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (qkv, weight, weight)]
        q, k, _ = leaves[0].permute(2, 0, 3, 1, 4)
        found.append(torch.autograd.grad(ops.qknorm_rope(q, k, *leaves[1:], *table), leaves, (qkv[:, :, 0].transpose(1, 2),) * 2))
    torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# ---- derivatives and compilers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_third_order(norm: str) -> None:
    def chain(namespace: Any) -> list[Tensor]:
        given = [t.requires_grad_() for t in (draw(1, 6, 3, 2, 8), draw(8), draw(8, seed=1))]
        y = namespace.qknorm_rope_attention(*given, *ops.rope_table(torch.arange(6), 8, dtype=DOUBLE), norm=norm)
        results, loss = [y], (y**3).sum()
        for _ in range(3):
            found = torch.autograd.grad(loss, given, create_graph=True)
            results += found
            loss = sum((g**2).sum() for g in found)  # type: ignore[assignment]
        return [r.detach() for r in results]

    for got, want in zip(chain(ops), chain(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_one_gradient_alone_and_gradients_of_the_tables() -> None:
    q, k, weight = draw(1, 2, 5, 8), draw(1, 2, 5, 8), draw(8)
    for asked in ("q_weight", "k", "cos", "sin"):

        def gradient(namespace: Any, asked: str = asked) -> Tensor:
            cos, sin = ops.rope_table(torch.arange(5), 8, dtype=DOUBLE)
            given = {"q": q, "k": k, "q_weight": weight, "cos": cos, "sin": sin}
            leaf = given[asked] = given[asked].clone().requires_grad_()
            return torch.autograd.grad(sum(y.square().mul(draw(*y.shape)).sum() for y in namespace.qknorm_rope(**given)), leaf)[0]  # type: ignore[arg-type]

        torch.testing.assert_close(gradient(ops), gradient(reference), rtol=1e-11, atol=1e-11)


def test_float32_weights_with_bfloat16_inputs() -> None:
    x, weight = draw(2, 2, 5, 16, dtype=torch.bfloat16).requires_grad_(), torch.ones(16).requires_grad_()
    y, _ = ops.qknorm_rope(x, x, weight, weight.detach())
    assert y.dtype == torch.bfloat16
    gx, gw = torch.autograd.grad(y.float().sum(), (x, weight))
    assert gx.dtype == torch.bfloat16 and gw.dtype == torch.float32


def test_opcheck() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    q, k, w, b = draw(2, 4, 5, 8), draw(2, 2, 5, 8), draw(8), draw(4, 8)
    given = (q, k, w, w.clone(), b, None, *(t[None] for t in ops.rope_table(torch.arange(5), 8, dtype=DOUBLE)), 2, 1e-6, False, True)
    genfast, whole = torch.ops.genfast, (w.expand(4, 8).contiguous(), w.clone())
    inplace = (q.clone(), k.clone(), None, None, None, None, *given[:2], *whole, *given[4:])
    for operator, arguments in [
        (genfast.qknorm_rope, given),
        (genfast.qknorm_rope_backward, (q.clone(), k.clone(), *given)),
        (genfast.qknorm_rope_, inplace),
    ]:
        assert set(torch.library.opcheck(operator, arguments, test_utils=tests).values()) == {"SUCCESS"}


def test_compiled() -> None:
    qkv, weight, table = draw(2, 20, 3, 2, 16), draw(16), ops.rope_table(torch.arange(20), 16, dtype=DOUBLE)

    def both(qkv: Tensor, weight: Tensor) -> Tensor:
        return ops.qknorm_rope_attention(2 * qkv, weight, weight, *table, causal=True) + 1

    whole: Callable[..., Tensor] = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(qkv, weight), both(qkv, weight))
    leaves = [t.clone().requires_grad_() for t in (qkv, weight)]
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|genfast"):
        whole(*leaves)
    torch.compiler.reset()
    in_parts: Callable[..., Tensor] = torch.compile(both, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (in_parts, both)), strict=True):
        torch.testing.assert_close(got, want)
