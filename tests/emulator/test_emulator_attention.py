"""The CUDA attention kernel under the block emulator, every head dimension and kind of mask at small sizes, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from genfast import reference
from genfast.testing.oracle import assert_accurate
from genfast.testing.specs.attention import Attention

MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"bias": (2, 1, 1, 40)},
    {"bias": (1, 2, 37, 40), "mask": (2, 1, 37, 40), "blind": True},
    {"mask": (2, 1, 37, 40), "causal": True, "blind": True},
]
CASES = [
    *(Attention(f"d{d}", 2, 2, 37, 40, d, kv_heads=1, **MASKS[i % len(MASKS)]) for i, d in enumerate(range(8, 257, 8))),
    *(Attention(f"mask {i}", 2, 2, 37, 40, 24, **mask) for i, mask in enumerate(MASKS)),
    Attention("several blocks of queries and keys, causal", 1, 2, 150, 200, 16, causal=True),
    Attention("several blocks, wide", 1, 1, 70, 100, 136, bias=(1, 1, 70, 100)),
    Attention("more queries than keys, causal", 1, 1, 140, 9, 16, causal=True),
    Attention("one query, one key", 1, 1, 1, 1, 8),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(emulated: Any, schedule: None, case: Attention, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and case.name.startswith("d") and case.d % 16:
        return  # what differs between the two are the instructions, not the padding
    given = case.make(dtype)
    q, k, v, bias, mask = (given[name] for name in ("q", "k", "v", "bias", "mask"))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    o, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
    scores = (*q.shape[:3], k.shape[2])
    full = [None if t is None else t.expand(scores) for t in (bias, mask)]
    emulated.attention_(o, lse, q, k, v, *full, case.causal, q.shape[3] ** -0.5)
    working = reference.attention(**given)
    exact = reference.attention(**{n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in given.items()})
    assert_accurate(case.name, o, working[0], exact[0])
    assert_accurate(case.name, lse, working[1], exact[1], 8 * torch.finfo(torch.float32).eps)
