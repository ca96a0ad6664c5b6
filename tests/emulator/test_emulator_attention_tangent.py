"""The kernel of attention's tangent under the block emulator, against the float64 reference's forward mode.

test_emulator_ops.py runs this file under AddressSanitizer too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.test_emulator_attention import HALF, draw, inputs, row_stats_of, rows_of
from torch import Tensor

from genfast import ops, reference
from genfast.ops import _attention_tangent, _backend
from genfast.testing.oracle import assert_accurate, same_bits

pytestmark = pytest.mark.usefixtures("schedule")


def run(emulated: Any, tensors: list[Tensor], bias: Tensor | None = None, mask: Tensor | None = None, causal: bool = False) -> Any:
    """The kernel's tangents, checked against the reference; what it does not write stays NaN."""
    q, k, v, *tangents = tensors
    scale = q.shape[3] ** -0.5

    def both(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        def function(*t: Tensor) -> Any:
            return reference.attention(*t, None if bias is None else bias.to(dtype), mask, causal, scale, return_lse=True)

        primals, directions = (tuple(t.to(dtype) for t in group) for group in ((q, k, v), tangents))
        return torch.func.jvp(function, primals, directions)[1]  # type: ignore[no-any-return]

    o, lse = reference.attention(q, k, v, bias, mask, causal, scale, return_lse=True)
    to, tlse = torch.full_like(q, torch.nan), torch.full_like(lse, torch.nan)
    terms = (rows_of(bias, q, k), rows_of(mask, q, k), causal, scale)
    row_stats = row_stats_of(q, k, bias, mask, causal, scale)
    emulated.attention_tangent_(to, tlse, q, k, v, *terms, *tangents, o, row_stats)
    working, exact = both(q.dtype), both(torch.float64)
    # A query that sees nothing has no log-sum-exp to differentiate.
    seen = lse != -torch.inf
    assert_accurate("to", to, working[0], exact[0], torch.finfo(q.dtype).eps)
    assert_accurate("tlse", tlse[seen], working[1][seen], exact[1][seen], torch.finfo(q.dtype).eps)
    assert not to[~seen].any() and not tlse[~seen].any()
    return to, tlse


def cases(dtype: torch.dtype, n: int, m: int, d: int, **heads: int) -> list[Tensor]:
    return [*inputs(dtype, n, m, d, **heads), *(t.flip(2) * 0.5 for t in inputs(dtype, n, m, d, **heads))]


@pytest.mark.parametrize("d", [8, 40, 48, 56, 72, 80, 96, 128, 136, 160, 192, 256])
def test_every_head(emulated: Any, d: int) -> None:
    run(emulated, cases(HALF[d // 8 % 2], 70, 90, d))


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("terms", ["bias", "mask", "both"])
def test_terms(emulated: Any, terms: str, causal: bool) -> None:
    tensors = cases(HALF[causal], 70, 90, 16, batch=2, heads=4, kv_heads=2)
    bias = draw((4, 70, 90), tensors[0].dtype, 3) if terms != "mask" else None
    mask = draw((2, 1, 1, 90), torch.float32, 4) > -0.5 if terms != "bias" else None
    run(emulated, tensors, bias, mask, causal)


def test_queries_that_see_nothing(emulated: Any) -> None:
    run(emulated, cases(torch.bfloat16, 100, 9, 16), causal=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_layouts(emulated: Any, dtype: torch.dtype) -> None:
    """Rows that begin anywhere, (B, N, H, D) memory, a head that is not a multiple of 8."""
    for d, first in ((40, 1), (37, 2), (5, 0)):
        packed = draw((2, 33, 18, d + 3), dtype, d)
        views = [packed[:, :, i : i + 3, first : first + d].transpose(1, 2) for i in range(0, 18, 3)]
        to, tlse = run(emulated, views)
        plain = run(emulated, [t.contiguous() for t in views])
        assert same_bits(to, plain[0]) and same_bits(tlse, plain[1])


def test_the_operator_takes_the_kernel(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `attention_jvp` and forward mode hand to the kernel on CUDA: any strides, a bias and a mask that are broadcast."""
    monkeypatch.setattr(_backend, "namespace", emulated)
    monkeypatch.setattr(_attention_tangent, "has_kernel", lambda *_: True)
    q, k, v, tq, tk, tv = (t.mT.contiguous().mT for t in cases(torch.bfloat16, 20, 40, 24, batch=2, heads=4, kv_heads=2))
    bias, mask = draw((4, 1, 40), torch.bfloat16, 3), draw((20, 1), torch.float32, 4) > -0.5
    primals, directions = (q, k, v), (tq, tk, tv)
    got = ops.attention_jvp(*primals, *directions, bias, mask, True, 0.3)

    def expected(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = tuple(t.to(dtype) for t in primals), tuple(t.to(dtype) for t in directions)
        return torch.func.jvp(lambda *t: reference.attention(*t, bias.to(dtype), mask, True, 0.3), *wide)  # type: ignore[no-any-return]

    for name, a, working, exact in zip(("o", "to"), got, expected(torch.bfloat16), expected(torch.float64), strict=True):
        assert_accurate(name, a, working, exact, torch.finfo(torch.bfloat16).eps)
    forward_mode = torch.func.jvp(lambda *t: ops.attention(*t, bias, mask, True, 0.3), primals, directions)
    assert all(same_bits(a, b) for a, b in zip(got, forward_mode, strict=True))
