"""On a GPU: attention where scores are large. tests/large_scores.py has the inputs and the oracle."""

from __future__ import annotations

import pytest
import torch
from large_scores import CASES, CLOSE, DOUBLE, TYPES, close, draw, inputs, leaves, masked, oracle
from torch import Tensor

from genfast import ops

pytestmark = pytest.mark.cuda


def check(tensors: list[Tensor], causal: bool = False, scale: float | None = None) -> None:
    """Output, log-sum-exp and the gradients of both; with a scale of 1, but for dq's first two columns, which cancel."""
    dtype = tensors[0].dtype
    do, dlse = draw(*tensors[0].shape, seed=7, dtype=dtype), draw(*tensors[0].shape[:3], seed=8, dtype=torch.float32)
    mine, theirs = leaves([t.cuda() for t in tensors]), leaves(tensors, DOUBLE)
    o, lse = ops.attention(*mine, causal=causal, scale=scale, return_lse=True)
    exact, exact_lse = oracle(*theirs[:3], theirs[3] if len(theirs) > 3 else None, causal, scale)
    close("o", o.cpu(), exact, CLOSE[dtype])
    assert torch.allclose(lse.cpu().double(), exact_lse, rtol=1e-6, atol=1e-5)
    got = torch.autograd.grad([o, lse], mine, [do.cuda(), dlse.cuda()])
    expected = torch.autograd.grad([exact, exact_lse], theirs, [do.double(), dlse.double()])
    for name, a, b in zip(("dq", "dk", "dv", "dbias"), got, expected, strict=False):
        first = 2 if name == "dq" and scale == 1 else 0
        close(name, a.cpu()[..., first:], b[..., first:], CLOSE[dtype])


@pytest.mark.parametrize("hopper", ["0", "all"])
@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("d", [16, 64, 136])
def test_finite_masks(dtype: torch.dtype, kind: str, d: int, hopper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENFAST_ATTENTION_HOPPER", hopper)
    check([*inputs(dtype, 200, 300, d), masked(kind, 200, 300, dtype)], causal=d == 136)


@pytest.mark.parametrize("hopper", ["0", "all"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("d", [24, 64, 128])
def test_large_products(dtype: torch.dtype, d: int, hopper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of 131,072 and a small whole number, which float32 holds."""
    monkeypatch.setenv("GENFAST_ATTENTION_HOPPER", hopper)
    q, k, v = inputs(dtype, 150, 300, d)
    q, k = q.round(), k.round()
    q[..., :2] = k[..., :2] = 256
    check([q, k, v], causal=d == 64, scale=1.0)


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding(dtype: torch.dtype, kind: str, splits: int) -> None:
    q, k, v = inputs(dtype, 4, 150)
    bias = masked(kind, 4, 150, dtype)
    bias[:, :70] = bias.amin()
    given = [t.cuda() for t in (q, k, v, torch.tensor([150, 150]))]
    o = ops.attention_decode(*given, bias=bias.cuda(), causal=False, splits=splits)
    close("o", o.cpu(), oracle(*(t.double() for t in (q, k, v, bias)))[0], CLOSE[dtype])


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_tangents(dtype: torch.dtype, kind: str) -> None:
    primals, bias = inputs(dtype, 70, 90), masked(kind, 70, 90, dtype)
    directions = [draw(*p.shape, seed=20 + i, dtype=dtype) for i, p in enumerate(primals)]
    _, to = ops.attention_jvp(*(t.cuda() for t in (*primals, *directions, bias)))
    wide = tuple(p.double() for p in primals), tuple(t.double() for t in directions)
    _, (exact, _) = torch.func.jvp(lambda *t: oracle(*t, bias.double()), *wide)
    close("to", to.cpu(), exact, CLOSE[dtype])
