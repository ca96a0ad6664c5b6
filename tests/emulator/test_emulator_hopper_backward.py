"""Hopper's backward kernels (wgmma, TMA) under the block emulator, against autograd through the float64 reference.

test_emulator_ops.py runs this file under AddressSanitizer too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.test_emulator_attention import HALF, draw, inputs
from emulator.test_emulator_attention_backward import run
from emulator.test_emulator_hopper import hopper as hopper

from genfast.testing.oracle import same_bits

pytestmark = pytest.mark.usefixtures("schedule", "hopper")


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("d", [64, 128])
def test_every_width(emulated: Any, d: int, causal: bool) -> None:
    """Two blocks of either side, the second with a few rows; several tiles, the last with a few rows; every slot used twice."""
    run(emulated, *inputs(HALF[causal], 150, 270, d), causal=causal)


@pytest.mark.parametrize("schedule", range(3), indirect=True)
@pytest.mark.parametrize("d", [64, 128])
def test_long(emulated: Any, d: int, schedule: None) -> None:
    """The ring turns more than twice, over the heads of a group."""
    run(emulated, *inputs(HALF[1], 330, 70, d, heads=2, kv_heads=1), causal=False)


@pytest.mark.parametrize(("n", "m"), [(70, 200), (200, 70), (1, 1)], ids=str)
def test_causal_groups(emulated: Any, n: int, m: int) -> None:
    """Tiles and warpgroups that see nothing of each other; with fewer keys, queries that see nothing."""
    run(emulated, *inputs(HALF[n == 70], n, m, 64, batch=2, heads=4, kv_heads=2), causal=True, dlse=n > 1)


@pytest.mark.parametrize("d", [8, 56, 72, 120])
def test_narrower_heads(emulated: Any, d: int) -> None:
    run(emulated, *inputs(HALF[d // 8 % 2], 40, 100, d))


def test_layouts(emulated: Any) -> None:
    """(B, N, H, D) memory, rows that begin at any multiple of 16 bytes; nothing beyond the gradients is written."""
    packed, storage = draw((2, 33, 12, 88), torch.bfloat16, 0), torch.full((2, 33, 9, 88), torch.nan, dtype=torch.bfloat16)
    q, k, v, do = (packed[:, :, i : i + 3, 8:80].transpose(1, 2) for i in (0, 3, 6, 9))
    into = [storage[:, :, i : i + 3, 8:80].transpose(1, 2) for i in (0, 3, 6)]
    got = run(emulated, q, k, v, do=do, into=into, dlse=False)
    assert storage.isnan().sum() == storage.numel() - sum(t.numel() for t in got)
    plain = run(emulated, *(t.contiguous() for t in (q, k, v)), do=do.contiguous(), dlse=False)
    assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True))


def test_keys_and_queries_that_see_nothing(emulated: Any) -> None:
    """A block of queries without a tile, and rows of the block beside it."""
    dq, _, _ = run(emulated, *inputs(torch.bfloat16, 300, 9, 64), causal=True)
    assert not dq[0, 0, :291].any() and dq[0, 0, 291:].any()


def test_keys_beyond_the_last(emulated: Any) -> None:
    """They arrive as zeros, whose scores tower above those of the real keys."""
    q, k, v = inputs(torch.bfloat16, 20, 150, 64)
    run(emulated, q - 4, k + 4, v)


def test_nan_stays_with_its_query(emulated: Any) -> None:
    q, k, v = inputs(torch.bfloat16, 20, 150, 64)
    do = draw((1, 1, 20, 64), torch.bfloat16, 10)
    clean = gradients(emulated, q, k, v, do)
    do[0, 0, 3, 5] = torch.nan
    dq, dk, dv = gradients(emulated, q, k, v, do)
    others = torch.arange(20) != 3
    assert dq[0, 0, 3].isnan().all() and same_bits(dq[:, :, others], clean[0][:, :, others])
    assert dk.isnan().all() and dv[..., 5].isnan().all() and same_bits(dv[..., :5], clean[2][..., :5])


def gradients(emulated: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, do: torch.Tensor) -> list[torch.Tensor]:
    o, lse, row_stats = torch.full_like(q, torch.nan), *(torch.full((*q.shape[:3], *more), torch.nan) for more in ((), (2,)))
    got = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    emulated.attention_(o, lse, row_stats, q, k, v, None, None, False, 0.125)
    emulated.attention_backward_(*got, None, torch.full_like(lse, torch.nan), do, None, q, k, v, None, None, False, 0.125, o, row_stats)
    return got


def test_what_takes_the_other_kernel(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms, wider heads, keys broadcast over heads and a negative scale take the mma.sync kernels, whose bits differ."""
    q, k, v = inputs(torch.bfloat16, 40, 100, 64, heads=2, kv_heads=2)
    cases: list[tuple[Any, dict[str, Any]]] = [
        ((q, k, v), {"mask": draw((40, 100), torch.float32, 4) > -0.5}),
        (inputs(torch.bfloat16, 40, 100, 136), {}),
        ((q, k[:, :1].expand_as(k), v), {"into": [torch.full_like(t, torch.nan) for t in (q, v, v)]}),
        ((q, k, v), {"scale": -0.125}),
        ((q, k, v), {}),
    ]
    same = []
    for arguments, more in cases:
        monkeypatch.setenv("GENFAST_ATTENTION_HOPPER", "all")
        got = [t.clone() for t in run(emulated, *arguments, **more)]
        monkeypatch.delenv("GENFAST_ATTENTION_HOPPER")
        same.append(all(same_bits(a, b) for a, b in zip(got, run(emulated, *arguments, **more), strict=True)))
    assert same == [True, True, True, True, False]


def test_order_changes_no_bit(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(torch.bfloat16, 140, 100, 64, heads=2)
    first = run(emulated, *arguments)
    for seed in (0, 9):
        monkeypatch.setenv("GENFAST_EMULATOR_SEED", str(seed))
        assert all(same_bits(a, b) for a, b in zip(first, run(emulated, *arguments), strict=True))
