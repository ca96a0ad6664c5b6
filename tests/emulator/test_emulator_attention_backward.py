"""Attention's backward CUDA kernels under the block emulator, against autograd through the float64 reference.

test_emulator_ops.py runs this file under AddressSanitizer too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.test_emulator_attention import HALF, HEADS, SHAPES, draw, inputs, row_stats_of, rows_of
from torch import Tensor

from genfast import reference
from genfast.testing.oracle import assert_accurate, same_bits

pytestmark = pytest.mark.usefixtures("schedule")
NAMES = ["dq", "dk", "dv", "dbias"]


def gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, do: Tensor, dlse: Tensor | None, *rest: Any) -> list[Tensor]:
    """The reference's o, lse, dq, dk, dv and, with a bias, dbias."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v, *([] if bias is None else [bias]))]
    o, lse = reference.attention(*leaves[:3], None if bias is None else leaves[3], *rest, return_lse=True)
    outputs, cotangents = ([o], [do]) if dlse is None else ([o, lse], [do, dlse])
    return [o.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, cotangents)]


def run(
    emulated: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dlse: bool = True,
    do: Tensor | None = None,
    into: list[Tensor] | None = None,
) -> list[Tensor]:
    """The kernels' gradients, checked against the reference's; what they do not write stays NaN."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    do = draw(tuple(q.shape), q.dtype, 10) if do is None else do
    grad_lse = draw(tuple(q.shape[:3]), torch.float32, 11) if dlse else None
    wide = [None if t is None else t.double() for t in (q, k, v, bias, do, grad_lse)]
    # Contiguous, so that o has the same bits for any layout.
    o, lse, *working = gradients(q.contiguous(), k.contiguous(), v.contiguous(), bias, do, grad_lse, mask, causal, scale)
    exact = gradients(*wide, mask, causal, scale)[2:]  # type: ignore[arg-type]
    got = [torch.full_like(t, torch.nan) for t in (q, k, v)] if into is None else into
    delta = torch.full_like(lse, torch.nan)
    dbias = None if bias is None else torch.full((1,) * (4 - bias.ndim) + bias.shape, torch.nan)
    given = (q, k, v, rows_of(bias, q, k), rows_of(mask, q, k), causal, scale, o, row_stats_of(q, k, bias, mask, causal, scale))
    emulated.attention_backward_(*got, dbias, delta, do, grad_lse, *given)
    if dbias is not None and bias is not None:
        got = [*got, dbias.view(bias.shape)]
        working[3] = working[3].float()
    eps = torch.finfo(q.dtype).eps * (4 if q.dtype == torch.float32 else 1)
    for name, result, plain, truth in zip(NAMES, got, working, exact, strict=False):
        assert_accurate(name, result, plain, truth, eps)
    return got


@pytest.mark.parametrize(("n", "m"), [(60, 150), (150, 60)], ids=["one block of queries", "one block of keys"])
@pytest.mark.parametrize("d", HEADS)
def test_every_head(emulated: Any, d: int, n: int, m: int) -> None:
    """One block of a side takes the tiles for few blocks, the other side the others; whole tiles and parts of tiles."""
    q, k, v = inputs(HALF[d // 8 % 2], n, m, d)
    run(emulated, q, k, v, draw((n, m), q.dtype, 3))


@pytest.mark.parametrize("m", [170, 50])
@pytest.mark.parametrize("d", [40, 64, 72, 128])
def test_causal_groups(emulated: Any, d: int, m: int) -> None:
    """Tiles that see nothing of each other; with 50 keys, one block of keys and queries that see nothing."""
    run(emulated, *inputs(HALF[d // 8 % 2], 150, m, d, heads=2, kv_heads=1), causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("terms", ["bias", "mask", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_terms(emulated: Any, shape: tuple[int, ...], terms: str, causal: bool) -> None:
    dtype = HALF[causal]
    q, k, v = inputs(dtype, 70, 90, 16, batch=2, heads=4, kv_heads=2)
    bias = draw(shape, dtype if shape[3] == 90 else torch.float32, 3) if terms != "mask" else None
    mask = draw(shape, torch.float32, 4) > -0.5 if terms != "bias" else None
    run(emulated, q, k, v, bias, mask, causal)


BROADCAST = [(2, 1, 1, 1), (1, 4, 1, 1), (2, 4, 1, 40), (1, 4, 35, 40), (2, 1, 35, 40), (1, 1, 35, 1), (1, 4, 35, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", BROADCAST, ids=str)
def test_every_broadcast_of_a_bias(emulated: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    run(emulated, *inputs(dtype, 35, 40, 8, batch=2, heads=4, kv_heads=2), bias=draw(shape, torch.float32, 3))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_layouts(emulated: Any, dtype: torch.dtype) -> None:
    """Rows that begin anywhere, (B, N, H, D) memory, a head that is not a multiple of 8; nothing beyond the gradients is written."""
    for d, first in ((40, 0), (40, 1), (37, 2), (5, 0)):
        packed, storage = draw((2, 33, 12, d + 3), dtype, d), torch.full((2, 33, 9, d + 3), torch.nan, dtype=dtype)
        q, k, v, do = (packed[:, :, i : i + 3, first : first + d].transpose(1, 2) for i in (0, 3, 6, 9))
        into = [storage[:, :, i : i + 3, first : first + d].transpose(1, 2) for i in (0, 3, 6)]
        got = run(emulated, q, k, v, do=do, into=into, dlse=False)
        assert storage.isnan().sum() == storage.numel() - sum(t.numel() for t in got)
        plain = run(emulated, *(t.contiguous() for t in (q, k, v)), do=do.contiguous(), dlse=False)
        assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_queries_that_see_nothing(emulated: Any, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype, 100, 9, 16)
    dq = run(emulated, q, k, v, causal=True)[0]
    assert not dq[0, 0, :91].any() and dq[0, 0, 91:].any()
    hidden = torch.arange(100)[:, None].expand(100, 9) % 2 == 0
    dq, _, _, dbias = run(emulated, q, k, v, bias=torch.zeros(100, 9).masked_fill(hidden, -torch.inf))
    assert not dq[0, 0, ::2].any() and not dbias[::2].any()


@pytest.mark.parametrize("d", [5, 64, 72, 256])
def test_float32(emulated: Any, d: int) -> None:
    run(emulated, *inputs(torch.float32, 35, 40, d, heads=2, kv_heads=1), bias=draw((40,), torch.float32, 3), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(emulated: Any, scale: float) -> None:
    run(emulated, *inputs(torch.float16, 9, 64, 32), scale=scale)


def test_order_changes_no_bit(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(torch.bfloat16, 40, 100, 40, heads=2), draw((2, 1, 100), torch.float32, 3)
    first = run(emulated, *arguments[0], bias=arguments[1])
    for seed in (0, 9):
        monkeypatch.setenv("GENFAST_EMULATOR_SEED", str(seed))
        again = run(emulated, *arguments[0], bias=arguments[1])
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))
