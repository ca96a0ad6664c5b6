"""Attention's CUDA kernels where scores are large, under the block emulator: tests/large_scores.py has the inputs and the oracle.

Forward and backward kernels in a row, so that what the one keeps of a row must fit what the other makes of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.test_emulator_hopper import hopper as hopper
from large_scores import CASES, CLOSE, DOUBLE, close, draw, inputs, leaves, masked, oracle
from torch import Tensor

from genfast import ops
from genfast.ops import _attention_tangent
from genfast.testing import operators_from

pytestmark = pytest.mark.usefixtures("schedule", "emulated")
WIDE = [torch.float32, torch.bfloat16, torch.float16]


def whole_numbers(dtype: torch.dtype, n: int, m: int, d: int) -> list[Tensor]:
    """Scores of 131,072 and a small whole number, which float32 holds; dq's first two columns are sums that cancel."""
    q, k, v = inputs(dtype, n, m, d)
    q, k = q.round(), k.round()
    q[..., :2] = k[..., :2] = 256
    return [q, k, v]


def check(tensors: list[Tensor], causal: bool = False, scale: float | None = None) -> None:
    """Output, log-sum-exp and the gradients of both."""
    dtype = tensors[0].dtype
    do, dlse = draw(*tensors[0].shape, seed=7, dtype=dtype), draw(*tensors[0].shape[:3], seed=8, dtype=torch.float32)
    mine, theirs = leaves(tensors), leaves(tensors, DOUBLE)
    with operators_from("genfast_emulator"):
        o, lse = ops.attention(*mine, causal=causal, scale=scale, return_lse=True)
        got = torch.autograd.grad([o, lse], mine, [do, dlse])
    exact, exact_lse = oracle(*theirs[:3], theirs[3] if len(theirs) > 3 else None, causal, scale)
    close("o", o, exact, CLOSE[dtype])
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    expected = torch.autograd.grad([exact, exact_lse], theirs, [do.double(), dlse.double()])
    for name, a, b in zip(("dq", "dk", "dv", "dbias"), got, expected, strict=False):
        first = 2 if name == "dq" and scale == 1 else 0
        close(name, a[..., first:], b[..., first:], CLOSE[dtype])


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
def test_finite_masks(dtype: torch.dtype, kind: str) -> None:
    """Forward, backward and the bias's gradient, whole and of one row for all."""
    q, k, v = inputs(dtype, 35, 90, 8)
    check([q, k, v, masked(kind, 35, 90, dtype)])
    check([q, k, v, masked(kind, 35, 90, dtype)[:1]])


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("d", [64, 72, 136, 256])
def test_finite_masks_of_wider_heads(dtype: torch.dtype, d: int) -> None:
    check([*inputs(dtype, 35, 90, d), masked("-3e38 and lowest", 35, 90, dtype)], causal=True)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("n", "m"), [(20, 50), (100, 300)], ids=str)
def test_large_products(dtype: torch.dtype, n: int, m: int) -> None:
    """Several tiles of keys, with maxima that differ."""
    check(whole_numbers(dtype, n, m, 24), causal=n == 100, scale=1.0)


@pytest.mark.parametrize(("dtype", "kind"), [case for case in CASES if case[0] != torch.float32], ids=str)
def test_tangents(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention_tangent, "has_kernel", lambda *_: True)
    primals, bias = inputs(dtype, 35, 90), masked(kind, 35, 90, dtype)
    directions = [draw(*p.shape, seed=20 + i, dtype=dtype) for i, p in enumerate(primals)]
    with operators_from("genfast_emulator"):
        _, to = ops.attention_jvp(*primals, *directions, bias)
    wide = tuple(p.double() for p in primals), tuple(t.double() for t in directions)
    _, (exact, _) = torch.func.jvp(lambda *t: oracle(*t, bias.double()), *wide)
    close("to", to, exact, CLOSE[dtype])


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding(dtype: torch.dtype, kind: str, splits: int) -> None:
    """Parts of a row may hold nothing but hidden keys; rows that are not aligned take fused multiply-adds."""
    for d in (16, 5):
        q, k, v = inputs(dtype, 4, 150, d)
        bias = masked(kind, 4, 150, dtype)
        bias[:, :70] = bias.amin()
        with operators_from("genfast_emulator"):
            o, lse = ops.attention_decode(q, k, v, torch.tensor([150, 150]), bias=bias, causal=False, splits=splits, return_lse=True)
        exact, exact_lse = oracle(*(t.double() for t in (q, k, v, bias)))
        close("o", o, exact, CLOSE[dtype])
        assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    q, k, v = whole_numbers(dtype, 4, 150, 16)
    with operators_from("genfast_emulator"):
        o = ops.attention_decode(q, k, v, torch.tensor([150, 150]), causal=False, splits=splits, scale=1.0)
    close("o", o, oracle(*(t.double() for t in (q, k, v)), None, scale=1.0)[0], CLOSE[dtype])


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_packed_sequences(emulated: Any, dtype: torch.dtype) -> None:
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in whole_numbers(dtype, 90, 90, 16))
    starts, o, lse = torch.tensor([0, 20, 90]), torch.full_like(q, torch.nan), torch.full((2, 90), torch.nan)
    emulated.attention_varlen_(o, lse, q, k, v, starts, starts, 70, False, 1.0)
    for a, b in ((0, 20), (20, 90)):
        exact, exact_lse = oracle(*(t[a:b].transpose(0, 1)[None].double() for t in (q, k, v)), None, scale=1.0)
        close("o", o[a:b].transpose(0, 1)[None], exact, CLOSE[dtype])
        assert torch.allclose(lse[None, :, a:b].double(), exact_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("d", "dtype", "kind"), [(64, *case) for case in CASES if case[0] == torch.bfloat16] + [(160, WIDE[2], "lowest")])
def test_hopper_with_finite_masks(hopper: None, d: int, dtype: torch.dtype, kind: str) -> None:
    """The forward kernel for sm_90a; the backward kernels are those with mma.sync, which read what it keeps."""
    check([*inputs(dtype, 30, 150, d), masked(kind, 30, 150, dtype)])


@pytest.mark.parametrize("dtype", WIDE[1:], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_hopper_with_large_products(hopper: None, dtype: torch.dtype, d: int) -> None:
    """Forward and backward kernels for sm_90a."""
    check(whole_numbers(dtype, 150, 270, d), causal=d == 64, scale=1.0)
