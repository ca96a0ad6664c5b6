"""Attention where scores are large: masks of finite numbers down to the lowest, and large products of queries and keys.

Beside a score of -1e9 rounding takes log(row_sum) from the log-sum-exp, so weights rebuilt from that are wrong by orders of magnitude,
and a mask near -FLT_MAX multiplied by log2(e) is infinite. tests/large_scores.py has the inputs and the oracle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from large_scores import CASES, CLOSE, DOUBLE, MASKS, TYPES, close, draw, inputs, leaves, masked, oracle
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from genfast import ops
from genfast.testing.oracle import assert_accurate

QUERIES = [1, 4, 20, 64, 257]


def check(tensors: list[Tensor], causal: bool = False, cancelled: int = 0, **options: Any) -> None:
    """Output, log-sum-exp and the gradients of both against the oracle's, but for dq's first columns that are ``cancelled``."""
    dtype, n = tensors[0].dtype, tensors[0].shape[2]
    do = draw(*tensors[0].shape, seed=7, dtype=dtype)
    dlse = draw(*tensors[0].shape[:3], seed=8, dtype=torch.float32)
    mine, theirs = leaves(tensors), leaves(tensors, DOUBLE)
    o, lse = ops.attention(*mine[:3], *mine[3:], causal=causal, return_lse=True, **options)
    exact, exact_lse = oracle(*theirs[:3], theirs[3] if len(theirs) > 3 else None, causal, **options)
    close("o", o, exact, CLOSE[dtype])
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    got = torch.autograd.grad([o, lse], mine, [do, dlse])
    expected = torch.autograd.grad([exact, exact_lse], theirs, [do.double(), dlse.double()])
    for name, a, b in zip(("dq", "dk", "dv", "dbias"), got, expected, strict=False):
        first = cancelled if name == "dq" else 0
        close(f"{name}, {n} queries", a[..., first:], b[..., first:], CLOSE[dtype])
    with torch.no_grad():  # may take another route
        again, lse_again = ops.attention(*mine[:3], *mine[3:], causal=causal, return_lse=True, **options)
    close("o without derivatives", again, exact, CLOSE[dtype])
    assert torch.allclose(lse_again.double(), exact_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("n", QUERIES)
def test_finite_masks(dtype: torch.dtype, n: int, kind: str, isa: str) -> None:
    check([*inputs(dtype, n), masked(kind, n, 50, dtype)])


@pytest.mark.parametrize("kind", ["-1e9", "lowest", "-3e38 and lowest"])
@pytest.mark.parametrize("n", [4, 20, 50])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_causal_groups_and_a_broadcast_bias(dtype: torch.dtype, n: int, kind: str) -> None:
    """Also a bias whose gradient is summed over the samples and heads that share it, and over all rows."""
    q, k, v = inputs(dtype, n, heads=4, kv_heads=2)
    bias = masked(kind, n, 50, dtype)
    check([q, k, v, bias], causal=True)
    check([q, k, v, torch.stack([bias, bias / 2])[:, None].expand(2, 4, n, 50).contiguous()])
    check([q, k, v, bias[:1]])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("n", [4, 20])
def test_the_math_path_of_torch(n: int, kind: str) -> None:
    """In float32, row by row. (torch's fused CPU kernel is no oracle: its backward pass has the log-sum-exp alone.)"""
    tensors, do = (
        [*inputs(torch.float32, n, kv_heads=2), masked(kind, n, 50, torch.float32)],
        draw(2, 2, n, 16, seed=7, dtype=torch.float32),
    )
    results = []
    for function in (ops.attention, F.scaled_dot_product_attention):
        given = leaves(tensors)
        with sdpa_kernel(SDPBackend.MATH):
            o = function(*given)
        results.append([o, *torch.autograd.grad(o, given, do)])
    for got, expected in zip(*results, strict=True):
        for mine, theirs in zip(got.flatten(0, -2), expected.flatten(0, -2), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["-1e9", "lowest", "-1e300"])
@pytest.mark.parametrize("n", [4, 20])
def test_float64(n: int, kind: str) -> None:
    tensors = inputs(DOUBLE, n, heads=4, kv_heads=2)
    bias = masked(kind, n, 50, torch.float32).double()
    if kind == "-1e300":
        bias = torch.where(bias < 0, -1e300, bias)
    mine, theirs = leaves([*tensors, bias]), leaves([*tensors, bias])
    keys, values = (t.repeat_interleave(2, 1) for t in theirs[1:3])
    weights = torch.softmax(theirs[0] @ keys.mT / 4 + theirs[3], -1)
    o, lse = ops.attention(*mine, return_lse=True)
    close("o", o, weights @ values, CLOSE[DOUBLE])
    do = draw(*o.shape, seed=7)
    for a, b in zip(torch.autograd.grad(o, mine, do), torch.autograd.grad(weights @ values, theirs, do), strict=True):
        close("gradient", a, b, 1e-9 if kind == "-1e9" else CLOSE[DOUBLE])  # of products beside -1e9 seven digits are left
    assert lse.isfinite().all()


@pytest.mark.parametrize("kind", ["-1e4", "lowest of the dtype", "large products"])
@pytest.mark.parametrize("n", QUERIES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_scores_that_are_rounded(dtype: torch.dtype, n: int, kind: str) -> None:
    """No further from float64 than torch's math path in the same dtype, twice over.

    But for dq's column of sums of slopes times 640, which cancel: in 16 bits torch widens everything, genfast rounds slopes.
    """
    q, k, v = inputs(dtype, n, kv_heads=2)
    bias = masked(kind, n, 50, torch.float32 if kind == "-1e4" else dtype)
    if kind == "large products":  # of about 1e5
        q[..., 0], k[..., 0], bias = 630, 640, bias * 0
    do, results = draw(*q.shape, seed=7, dtype=dtype), []
    for function, wide in ((ops.attention, dtype), (F.scaled_dot_product_attention, dtype), (F.scaled_dot_product_attention, DOUBLE)):
        given = leaves([q, k, v, bias.to(wide)], wide)
        with sdpa_kernel(SDPBackend.MATH):
            o = function(*given)
        dq, *others = torch.autograd.grad(o, given, do.to(wide))
        results.append([o.detach(), dq[..., 1:], *others])
    for name, got, working, exact in zip(("o", "dq", "dk", "dv", "dbias"), *results, strict=True):
        assert_accurate(name, got, working, exact, torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize("n", QUERIES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_large_products_that_are_exact(dtype: torch.dtype, n: int, isa: str) -> None:
    """Scores of 131,072 and a small whole number, which float32 holds: weights and gradients are those of the small numbers.

    dq's columns of 256 are sums of slopes, which cancel to nothing but 256 roundings.
    """
    q, k, v = inputs(dtype, n, 300)
    q, k = q.round(), k.round()
    q[..., :2] = k[..., :2] = 256
    check([q, k, v], scale=1.0, cancelled=2)
    check([q, k, v], causal=True, scale=1.0, cancelled=2)
    few = inputs(dtype, n)
    few[0], few[1] = q, k[:, :, :50]
    check(few, scale=1.0, cancelled=2)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("n", QUERIES)
def test_a_loss_that_ignores_the_hidden_rows(n: int, kind: str) -> None:
    """Their gradients are zero, and they change no other."""
    bias = masked(kind, n, 50, torch.float32)
    hidden = bias.abs().amin(-1) > 0
    tensors, weights = [*inputs(torch.float32, n), bias], draw(2, 2, n, 16, seed=7, dtype=torch.float32)
    weights[:, :, hidden] = 0
    mine = leaves(tensors)
    dq, dk, dv, dbias = torch.autograd.grad((ops.attention(*mine) * weights).sum(), mine)
    assert not dq[:, :, hidden].any() and not dbias[hidden].any()
    part = leaves([tensors[0][:, :, ~hidden], *tensors[1:3], bias[~hidden]])
    if not hidden.all():
        expected = torch.autograd.grad((ops.attention(*part) * weights[:, :, ~hidden]).sum(), part)
        for got, alone in zip((dq[:, :, ~hidden], dk, dv, dbias[~hidden]), expected, strict=True):
            close("gradient", got, alone, 1e-5)


# ---- other derivatives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("n", [4, 20])
def test_double_backward(n: int, kind: str) -> None:
    results = []
    for function, dtype in ((ops.attention, torch.float32), (oracle, DOUBLE)):
        given = leaves([*inputs(torch.float32, n), masked(kind, n, 50, torch.float32)], dtype)
        o = function(*given) if dtype == torch.float32 else function(*given)[0]
        first = torch.autograd.grad((o**3).sum(), given, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((g**2).sum() for g in first), given)])  # type: ignore[arg-type]
    for i, (got, exact) in enumerate(zip(*results, strict=True)):
        close(f"order {1 + i // 4}, argument {i % 4}", got, exact, 1e-4)


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("n", [4, 20])
def test_tangents(dtype: torch.dtype, n: int, kind: str) -> None:
    """Of `torch.func.jvp`, a tangent of the bias included, and of `attention_jvp`."""
    primals = [*inputs(dtype, n), masked(kind, n, 50, dtype)]
    directions = [draw(*p.shape, seed=20 + i, dtype=p.dtype) for i, p in enumerate(primals)]
    wide = tuple(p.double() for p in primals), tuple(t.double() for t in directions)
    (o, _), (to, tlse) = torch.func.jvp(lambda *t: ops.attention(*t, return_lse=True), tuple(primals), tuple(directions))
    (exact, _), (exact_to, exact_tlse) = torch.func.jvp(oracle, *wide)
    close("o", o, exact, CLOSE[dtype])
    close("to", to, exact_to, CLOSE[dtype])
    close("tlse", tlse, exact_tlse, CLOSE[dtype])
    o, to = ops.attention_jvp(*primals[:3], *directions[:3], primals[3])
    (exact, _), (exact_to, _) = torch.func.jvp(lambda *t: oracle(*t, wide[0][3]), wide[0][:3], wide[1][:3])
    close("o of attention_jvp", o, exact, CLOSE[dtype])
    close("to of attention_jvp", to, exact_to, CLOSE[dtype])


# ---- other operators -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), CASES, ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_decoding(dtype: torch.dtype, n: int, splits: int, kind: str, isa: str) -> None:
    """Equal to `attention`, and to the oracle; parts of a row may hold nothing but hidden keys."""
    q, k, v = inputs(dtype, n, 150, kv_heads=1)
    bias = masked(kind, n, 150, dtype)
    bias[:, :70] = bias.amin()
    lengths = torch.tensor([150, 150])
    o, lse = ops.attention_decode(q, k, v, lengths, bias=bias, causal=False, splits=splits, return_lse=True)
    exact, exact_lse = oracle(*(t.double() for t in (q, k, v, bias)))
    close("o", o, exact, CLOSE[dtype])
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    close("attention", o, ops.attention(q, k, v, bias).double(), CLOSE[dtype])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_packed_sequences(dtype: torch.dtype) -> None:
    """Scores of 131,072 and more in sequences of 1, 4 and 20 tokens, with gradients."""
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in inputs(dtype, 25, 25))
    q, k = q.round(), k.round()
    q[..., :2] = k[..., :2] = 256
    starts = torch.tensor([0, 1, 5, 25])
    mine, theirs = leaves([q, k, v]), leaves([q, k, v], DOUBLE)
    o = ops.attention_varlen(*mine, starts, starts, 20, 20, scale=1.0)
    parts = []
    for a, b in ((0, 1), (1, 5), (5, 25)):
        parts.append(oracle(*(t[a:b].transpose(0, 1)[None] for t in theirs), None, scale=1.0)[0][0].transpose(0, 1))
    exact, do = torch.cat(parts), draw(25, 2, 16, seed=7, dtype=dtype)
    close("o", o, exact, CLOSE[dtype])
    for i, (a, b) in enumerate(zip(torch.autograd.grad(o, mine, do), torch.autograd.grad(exact, theirs, do.double()), strict=True)):
        first = 2 if i == 0 else 0  # of dq, as above
        close("gradient", a[..., first:], b[..., first:], CLOSE[dtype])
