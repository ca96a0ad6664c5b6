"""Decoding's CUDA kernels under the block emulator, against the float64 reference. docs/emulator.md says what that shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import ops, reference
from genfast.testing import operators_from
from genfast.testing.oracle import assert_accurate, same_bits

pytestmark = pytest.mark.usefixtures("schedule")
HALF = [torch.bfloat16, torch.float16]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype, lengths: list[int], n: int, capacity: int, d: int, heads: int = 1, kv_heads: int = 1) -> dict[str, Tensor]:
    """What lies beyond the lengths is NaN."""
    batch = len(lengths)
    q, k, v = (draw(shape, dtype, i) for i, shape in enumerate([(batch, heads, n, d), *[(batch, kv_heads, capacity, d)] * 2]))
    for b, length in enumerate(lengths):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    return {"q": q, "k_cache": k, "v_cache": v, "lengths": torch.tensor(lengths)}


def run(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    with operators_from("genfast_emulator"):
        o, lse = ops.attention_decode(**given, **options, return_lse=True)
    wide = {key: t.double() if t.is_floating_point() else t for key, t in given.items()}
    exact_options = {key: t.double() if isinstance(t, Tensor) else t for key, t in options.items()}
    working = reference.attention_decode(**given, **options, return_lse=True)
    exact = reference.attention_decode(**wide, **exact_options, return_lse=True)
    dtype = given["q"].dtype
    assert_accurate("o", o, working[0], exact[0], torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1))
    assert_accurate("lse", lse, working[1], exact[1], 4 * torch.finfo(torch.float32).eps)
    return o, lse


@pytest.mark.parametrize("d", [8, 16, 40, 64, 72, 80, 96, 128, 136, 160, 256])
def test_every_head(emulated: Any, d: int) -> None:
    """Both 16-bit dtypes; 150 keys are two turns of the block's four warps, and a part of a third."""
    for dtype in HALF:
        run(inputs(dtype, [150], 1, 160, d, heads=2, kv_heads=2), splits=1)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "heads", "kv_heads"), [(1, 8, 1), (5, 4, 2), (16, 2, 1)])
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_rows_and_parts(emulated: Any, n: int, heads: int, kv_heads: int, splits: int, dtype: torch.dtype) -> None:
    """Groups of rows below, at and above a block's; lengths with parts that are empty, samples that are, and queries that see nothing."""
    bias = draw((3, heads, n, 1), torch.float32, 5) * torch.linspace(-1, 1, 100) if splits == 2 else None
    o, lse = run(inputs(dtype, [100, 0, 3], n, 100, 24, heads, kv_heads), splits=splits, bias=bias, causal=splits != 7)
    assert not o[1].any() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("d", [5, 72, 200])
def test_fused_multiply_adds(emulated: Any, d: int) -> None:
    given = inputs(torch.float32, [60, 33], 2, 60, d, heads=3)
    bias = draw((1, 3, 1, 60), torch.float32, 7)
    run(given, splits=2, bias=bias)
    run({key: t.bfloat16() if t.is_floating_point() else t for key, t in given.items()}, splits=1, bias=bias.bfloat16())


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_layouts(emulated: Any, dtype: torch.dtype) -> None:
    """(B, capacity, H, D) memory, rows that begin anywhere, int32 lengths."""
    plain = inputs(dtype, [50, 20], 3, 64, 32, heads=4, kv_heads=2)
    expected = run(plain, splits=3)
    for first in (0, 1):
        moved = {"lengths": plain["lengths"].int()}
        for key in ("q", "k_cache", "v_cache"):
            b, h, n, d = plain[key].shape
            storage = torch.full((b, n, h, d + 8), torch.nan, dtype=dtype)
            moved[key] = storage[..., first : first + d].transpose(1, 2).copy_(plain[key])
        got = run(moved, splits=3)
        if first == 0 or dtype == torch.float32:  # else fused multiply-adds, where the plain rows go to the tensor cores
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_order_changes_no_bit(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(torch.bfloat16, [130, 90], 2, 130, 40, heads=2)
    expected = run(given, splits=3)
    for seed in (0, 9):
        monkeypatch.setenv("GENFAST_EMULATOR_SEED", str(seed))
        assert all(same_bits(a, b) for a, b in zip(run(given, splits=3), expected, strict=True))


def test_nan_stays_with_its_query(emulated: Any) -> None:
    given = inputs(torch.float16, [70], 4, 70, 16)
    given["q"][0, 0, 2, 5] = torch.nan
    o, lse = run(given, splits=2)
    assert o[0, 0, 2].isnan().all() and lse[0, 0, 2].isnan() and not o[0, 0, [0, 1, 3]].isnan().any()
