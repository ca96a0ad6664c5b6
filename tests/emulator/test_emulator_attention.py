"""Attention's CUDA kernels under the block emulator, against the float64 reference. docs/emulator.md says what that shows.

test_emulator_ops.py runs this file under AddressSanitizer too.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import reference
from genfast.testing.oracle import assert_accurate, same_bits

pytestmark = pytest.mark.usefixtures("schedule")
HALF = [torch.bfloat16, torch.float16]
# Every kernel width, at its narrowest and widest head, and heads between, with 8 and 16 columns to spare.
HEADS = [8, 16, 24, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128, 136, 160, 192, 248, 256]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype, n: int, m: int, d: int, batch: int = 1, heads: int = 1, kv_heads: int = 1) -> list[Tensor]:
    return [draw(shape, dtype, i) for i, shape in enumerate([(batch, heads, n, d), *[(batch, kv_heads, m, d)] * 2])]


def rows_of(t: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Of full shape, broadcast by strides of 0 but for the last."""
    if t is None:
        return None
    t = t[(None,) * (4 - t.ndim)]
    return t.expand(*t.shape[:3], k.shape[2]).contiguous().expand(*q.shape[:3], k.shape[2])


def row_stats_of(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """row_max and log_sum of each query from float64, as csrc/core/row_stats.h defines them: (B, H, N, 2)."""
    products, (n, m) = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT, (q.shape[2], k.shape[2])
    early = bias is not None or not scale > 0
    s = products * scale + (0 if bias is None else bias.double()) if early else products
    hidden = ~torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else torch.zeros((), dtype=torch.bool)
    s = s.masked_fill(hidden if mask is None else hidden | ~mask, -torch.inf)
    row_max = s.amax(-1, keepdim=True).float().nan_to_num(neginf=0)
    row_sum = ((s - row_max.double()) * (1 if early else scale)).exp().sum(-1, keepdim=True)
    return torch.cat((row_max, row_sum.log2().nan_to_num(neginf=torch.inf).float()), -1)


def run(
    emulated: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    o: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel's output and lse, checked against the reference; what it does not write stays NaN."""
    o = torch.full_like(q, torch.nan) if o is None else o
    lse, row_stats = (torch.full(shape, torch.nan) for shape in (q.shape[:3], (*q.shape[:3], 2)))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    emulated.attention_(o, lse, row_stats, q, k, v, rows_of(bias, q, k), rows_of(mask, q, k), causal, scale)
    unit, seen = 1 if bias is not None or scale <= 0 else scale, lse != -torch.inf
    row_max, log_sum = row_stats.unbind(-1)
    assert (row_max[~seen] == 0).all() and (log_sum[~seen] == torch.inf).all()
    again = row_max * unit + log_sum * math.log(2)
    torch.testing.assert_close(again[seen], lse[seen], rtol=1e-6, atol=1e-6, equal_nan=True)
    wide = [None if t is None else t.double() for t in (q, k, v, bias)]
    working = reference.attention(q, k, v, bias, mask, causal, scale, return_lse=True)
    exact = reference.attention(*wide, mask, causal, scale, return_lse=True)
    eps = torch.finfo(q.dtype).eps * (4 if q.dtype == torch.float32 else 1)
    assert_accurate("o", o, working[0], exact[0], eps)
    assert_accurate("lse", lse, working[1], exact[1], 4 * torch.finfo(torch.float32).eps)
    return o, lse


@pytest.mark.parametrize("d", HEADS)
def test_every_head(emulated: Any, d: int) -> None:
    """90 keys: a full tile and a part of one; 70 queries: two blocks, one of them with warps that have nothing to do."""
    run(emulated, *inputs(HALF[d // 8 % 2], 70, 90, d))


@pytest.mark.parametrize("m", [1, 77, 80, 154], ids=lambda m: f"{m} keys")
@pytest.mark.parametrize("d", [40, 160])
def test_short_keys(emulated: Any, d: int, m: int) -> None:
    run(emulated, *inputs(HALF[m % 2], 20, m, d))


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("d", [40, 64, 72, 96, 160])
def test_long(emulated: Any, d: int, causal: bool) -> None:
    """Two blocks of 128 queries, the second with two."""
    run(emulated, *inputs(HALF[causal], 130, 170, d), causal=causal)


SHAPES = {"one for all": (1, 1, 1, 1), "of a key": (1, 1, 1, 90), "of a row": (2, 1, 70, 1), "whole": (2, 4, 70, 90)}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("terms", ["bias", "mask", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_terms(emulated: Any, shape: tuple[int, ...], terms: str, causal: bool) -> None:
    dtype = HALF[causal]
    q, k, v = inputs(dtype, 70, 90, 16, batch=2, heads=4, kv_heads=2)
    bias = draw(shape, dtype if shape[3] == 90 else torch.float32, 3) if terms != "mask" else None
    mask = draw(shape, torch.float32, 4) > -0.5 if terms != "bias" else None
    run(emulated, q, k, v, bias, mask, causal)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_layouts(emulated: Any, dtype: torch.dtype) -> None:
    """Rows that begin anywhere, (B, N, H, D) memory, a head that is not a multiple of 8; nothing beyond the output is written."""
    storage = torch.full((2, 33, 3, 45), torch.nan, dtype=dtype)
    for d, first in ((40, 0), (40, 1), (37, 2), (5, 0)):
        packed = draw((2, 33, 9, d + 3), dtype, d)
        q, k, v = (packed[:, :, i : i + 3, first : first + d].transpose(1, 2) for i in (0, 3, 6))
        storage.fill_(torch.nan)
        o, lse = run(emulated, q, k, v, o=storage[..., first : first + d].transpose(1, 2))
        assert storage.isnan().sum() == storage.numel() - o.numel()
        if first:
            plain = run(emulated, *(t.contiguous() for t in (q, k, v)))
            assert same_bits(o, plain[0]) and same_bits(lse, plain[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_queries_that_see_nothing(emulated: Any, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype, 100, 9, 16)
    o, lse = run(emulated, q, k, v, causal=True)
    assert not o[0, 0, :91].any() and (lse[0, 0, :91] == -torch.inf).all() and o[0, 0, 91:].any()
    hidden = torch.arange(100)[:, None].expand(100, 9) % 2 == 0
    o, lse = run(emulated, q, k, v, bias=torch.zeros(100, 9).masked_fill(hidden, -torch.inf))
    assert not o[0, 0, ::2].any() and (lse[0, 0, ::2] == -torch.inf).all()


@pytest.mark.parametrize("d", [5, 64, 72, 256])
def test_float32(emulated: Any, d: int) -> None:
    run(emulated, *inputs(torch.float32, 35, 40, d, heads=2), bias=draw((40,), torch.float32, 3), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(emulated: Any, scale: float) -> None:
    run(emulated, *inputs(torch.float16, 9, 64, 32), scale=scale)


def test_nan_stays_with_its_query(emulated: Any) -> None:
    q, k, v = inputs(torch.bfloat16, 20, 90, 24)
    q[0, 0, 3, 5] = torch.nan
    o, lse = run(emulated, q, k, v)
    assert o[0, 0, 3].isnan().all() and lse[0, 0, 3].isnan() and not o[0, 0, :3].isnan().any() and not o[0, 0, 4:].isnan().any()


def test_order_changes_no_bit(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(torch.bfloat16, 40, 100, 40, heads=2)
    o, lse = run(emulated, *arguments)
    for seed in (0, 9):
        monkeypatch.setenv("GENFAST_EMULATOR_SEED", str(seed))
        again = run(emulated, *arguments)
        assert same_bits(o, again[0]) and same_bits(lse, again[1])
