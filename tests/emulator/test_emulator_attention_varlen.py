"""Packed sequences in attention's CUDA kernels under the block emulator, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genfast import reference
from genfast.testing.oracle import assert_accurate
from genfast.testing.specs.attention_varlen import Packed

pytestmark = pytest.mark.usefixtures("schedule")
# Sequences without queries, without keys, of several blocks and of less than one; queries that see nothing.
QUERIES, KEYS = (70, 0, 3, 5, 17), (90, 4, 33, 0, 6)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    ("dtype", "d"),
    [
        *((torch.bfloat16, d) for d in (40, 64, 80)),
        *((torch.float16, d) for d in (128, 136, 256)),
        (torch.float32, 24),
        (torch.bfloat16, 5),
    ],
    ids=str,
)
def test_packed(emulated: Any, dtype: torch.dtype, d: int, causal: bool) -> None:
    a = Packed("", QUERIES, KEYS, 4, 2, d, causal).make(dtype)
    if causal:  # other layouts and offsets of 64 bits, a larger maximum
        a |= {key: torch.stack([a[key], torch.full_like(a[key], torch.nan)], 1)[:, 0] for key in ("q", "k", "v")}
        a |= {"cu_seqlens_q": a["cu_seqlens_q"].long(), "cu_seqlens_k": a["cu_seqlens_k"].long(), "max_seqlen_q": 300}
    total = sum(QUERIES)
    storage = torch.full((total + 2, 4, d), torch.nan, dtype=dtype)
    o, lse = storage[1:-1], torch.full((4, total), torch.nan)
    tensors = (a[key] for key in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
    emulated.attention_varlen_(o, lse, *tensors, a["max_seqlen_q"], causal, d**-0.5)
    working = reference.attention_varlen(**a)
    exact = reference.attention_varlen(**(a | {key: a[key].double() for key in ("q", "k", "v")}))
    assert_accurate("o", o, working[0], exact[0], torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1))
    assert_accurate("lse", lse, working[1], exact[1], 4 * torch.finfo(torch.float32).eps)
    assert storage[[0, -1]].isnan().all()


def test_offsets_out_of_range_touch_nothing_else(emulated: Any) -> None:
    """Nobody checks them on a device: rows beyond the tensors are neither read nor written."""
    a = Packed("", (20, 10), (20, 10), 2, 2, 16).make(torch.bfloat16)
    starts = torch.tensor([-5, 20, 1000], dtype=torch.int32)
    storage = torch.full((32, 2, 16), torch.nan, dtype=torch.bfloat16)
    lse = torch.full((2, 30), torch.nan)
    emulated.attention_varlen_(storage[1:-1], lse, a["q"], a["k"], a["v"], starts, starts, 20, False, 0.25)
    exact = reference.attention_varlen(**(a | {key: a[key].double() for key in ("q", "k", "v")}))
    working = reference.attention_varlen(**a)
    assert_accurate("o", storage[1:-1], working[0], exact[0])
    assert storage[[0, -1]].isnan().all()
