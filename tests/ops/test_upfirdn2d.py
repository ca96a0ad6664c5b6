"""What follows from analysis for upfirdn2d: a sweep over shapes, transposes, identities, compilers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from genfast import ops, reference


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def literal(x: Tensor, f: Tensor, up: Any, down: Any, padding: Any, flip_filter: bool, gain: float) -> Tensor:
    """The definition, element by element in numpy: insert zeros, pad or crop, convolve, keep every down-th."""
    taps = f.double().numpy()
    taps = np.outer(taps, taps) if taps.ndim == 1 else taps
    taps = gain * (taps[::-1, ::-1] if not flip_filter else taps)
    batch, channels, height, width = x.shape
    z = np.zeros((batch, channels, height * up[1], width * up[0]))
    z[:, :, :: up[1], :: up[0]] = x.double().numpy()
    left, right, top, bottom = padding
    z = np.pad(z, ((0, 0), (0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0))))
    z = z[:, :, max(-top, 0) : z.shape[2] - max(-bottom, 0), max(-left, 0) : z.shape[3] - max(-right, 0)]
    windows = np.lib.stride_tricks.sliding_window_view(z, taps.shape, axis=(2, 3))
    return torch.from_numpy(np.einsum("bchwij,ij->bchw", windows, taps)[:, :, :: down[1], :: down[0]].copy())


def sweep(count: int) -> list[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Shapes, filters, scalings and paddings drawn at random, so that no combination is left to what somebody thought of."""
    random = np.random.default_rng(3)
    cases: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    while len(cases) < count:
        channels, height, width = random.choice([1, 3, 8, 17, 70]), random.integers(1, 20), random.integers(1, 80)
        up, down = random.choice([1, 1, 2, 3, 4, 5], 2), random.choice([1, 1, 2, 2, 3, 5], 2)
        taps = (random.integers(1, 14),) if random.integers(2) else tuple(random.integers(1, 8, 2))
        padding = random.integers(-3, 9, 4)
        size = [width * up[0] + padding[:2].sum() - taps[-1], height * up[1] + padding[2:].sum() - taps[0]]
        if min(size) < 0:
            continue
        x, f = normal(2, channels, height, width, seed=len(cases)), normal(*taps, seed=1, dtype=torch.float32) / 3
        options = {"up": tuple(up.tolist()), "down": tuple(down.tolist()), "padding": padding.tolist()}
        cases.append((x, f, options | {"flip_filter": bool(random.integers(2)), "gain": float(random.choice([1.0, 2.5]))}))
    return cases


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_sweep_of_shapes(layout: torch.memory_format, isa: str) -> None:
    """Values in float64 and float32 against the definition; the gradient's inner product against the transpose."""
    for x, f, options in sweep(100):
        want = literal(x, f, **options)
        x = x.contiguous(memory_format=layout).requires_grad_()
        got = ops.upfirdn2d(x, f, **options)
        assert got.shape == want.shape and got.is_contiguous(memory_format=layout)
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ops.upfirdn2d(x.detach().float(), f, **options).double(), want, rtol=1e-5, atol=2e-5)
        dy = normal(*got.shape, seed=7)
        (gradient,) = torch.autograd.grad(got, x, dy)
        probe = normal(*x.shape, seed=8)
        torch.testing.assert_close((gradient * probe).sum(), (dy * literal(probe, f, **options)).sum(), rtol=1e-10, atol=1e-10)


def test_the_reference_is_the_definition() -> None:
    for x, f, options in sweep(100):
        torch.testing.assert_close(reference.upfirdn2d(x, f, **options), literal(x, f, **options), rtol=1e-12, atol=1e-12)


def test_third_order() -> None:
    """Over the sweep's shapes; nonlinear in between, so that the gradients of gradients are not zero."""

    def chain(namespace: Any, x: Tensor, f: Tensor, options: dict[str, Any]) -> list[Tensor]:
        x = x[:, :3].detach().requires_grad_()
        y = namespace.upfirdn2d(x, f, **options)
        results, loss = [y], (y**4).mean()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            results.append(gradient)
            loss = (gradient**2).sum()
        return [r.detach() for r in results]

    for x, f, options in sweep(80):
        for got, want in zip(chain(ops, x, f, options), chain(reference, x, f, options), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11 * float(want.abs().max().clamp(min=1)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_only_the_window_is_read(channels_last: bool) -> None:
    """A NaN reaches the outputs whose taps meet it, and no others: padding is not a product with zero."""
    x = normal(1, 2, 9, 40)
    x[0, 1, 4, 20] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    got = ops.upfirdn2d(x, torch.ones(3, 3), padding=1).isnan()
    want = torch.zeros_like(got)
    want[0, 1, 3:6, 19:22] = True
    assert torch.equal(got, want)


def test_sizes() -> None:
    x, f = normal(1, 2, 8, 10), ops.setup_filter([1, 3, 3, 1])
    assert ops.filter2d(x, f).shape == (1, 2, 8, 10)
    assert ops.upsample2d(x, f).shape == (1, 2, 16, 20)
    assert ops.downsample2d(x, f, down=(2, 1)).shape == (1, 2, 8, 5)
    assert ops.upsample2d(x, f, up=(1, 3), padding=(0, 1)).shape == (1, 2, 26, 10)


@pytest.mark.parametrize("taps", [[1, 3, 3, 1], [1, 2, 1], [1, 4, 6, 4, 1, 0, 0, 0, 0]])
@pytest.mark.parametrize("namespace", [ops, reference])
def test_a_constant_picture_stays(namespace: Any, taps: list[float]) -> None:
    """A normalised filter keeps a constant, and so do upsampling and downsampling, away from the border."""
    x, f = torch.full((1, 1, 24, 24), 3.0, dtype=torch.float64), namespace.setup_filter(taps)
    middle = (..., slice(8, -8), slice(8, -8))
    for y in (namespace.filter2d(x, f), namespace.downsample2d(namespace.upsample2d(x, f), f)):
        torch.testing.assert_close(y[middle], x[middle], rtol=1e-6, atol=0)


def test_setup_filter() -> None:
    assert ops.setup_filter(None).tolist() == [[1.0]]
    assert ops.setup_filter([1, 3], normalize=False).tolist() == [[1.0, 3.0], [3.0, 9.0]]
    assert ops.setup_filter([1, 3], normalize=False, separable=True, gain=4).tolist() == [2.0, 6.0]
    assert ops.setup_filter(list(range(8))).shape == (8,)
    assert ops.setup_filter([[1, 2], [3, 4]], normalize=False, flip_filter=True, gain=2).tolist() == [[8.0, 6.0], [4.0, 2.0]]
    assert ops.setup_filter([2.0, 2.0]).sum() == 1


@pytest.mark.parametrize("taps", [(4, 4), (9,)])
def test_opcheck(taps: tuple[int, ...]) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    given = (normal(2, 3, 4, 5), normal(*taps, dtype=torch.float32), [2, 1], [1, 2], [9, 9, 9, 9], False, 2.0)
    assert set(torch.library.opcheck(torch.ops.genfast.upfirdn2d, given, test_utils=tests).values()) == {"SUCCESS"}


def penalty(x: Tensor) -> Tensor:
    f = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    y = ops.upfirdn2d(x, f, up=2, padding=1) ** 3
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def test_compiled() -> None:
    x = normal(2, 3, 6, 6)
    f = ops.setup_filter([1, 3, 3, 1])
    compiled = torch.compile(lambda x: ops.upsample2d(2 * x, f) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.upsample2d(2 * x, f) + 1)
    x.requires_grad_()
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|genfast"):
        torch.compile(penalty, fullgraph=True)(x)
    torch._dynamo.reset()
    traced = torch.compile(make_fx(penalty)(x), fullgraph=True)
    torch.testing.assert_close(traced(x.detach()), penalty(x))


def test_the_operator_itself_refuses_derivatives() -> None:
    with pytest.raises(ValueError, match=r"torch.ops.genfast.upfirdn2d: got .*, supported: none of these; call genfast.ops.upfirdn2d"):
        torch.ops.genfast.upfirdn2d(normal(1, 1, 4, 4).requires_grad_(), torch.ones(1, 1), [1, 1], [1, 1], [0] * 4, False, 1.0)
