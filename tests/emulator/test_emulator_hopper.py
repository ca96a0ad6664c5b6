"""Hopper's attention kernel (wgmma, TMA) under the block emulator, against the float64 reference. docs/attention-hopper.md.

test_emulator_ops.py runs this file under AddressSanitizer too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator import test_emulator_attention_varlen
from emulator.test_emulator_attention import HALF, SHAPES, draw, inputs, run

from genfast.testing.oracle import same_bits

pytestmark = pytest.mark.usefixtures("schedule", "hopper")
WIDTHS = [64, 80, 96, 128, 160, 192, 256]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENFAST_EMULATOR_CAPABILITY", "90")
    monkeypatch.setenv("GENFAST_ATTENTION_HOPPER", "all")


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("d", WIDTHS)
def test_every_width(emulated: Any, d: int, causal: bool) -> None:
    """Two or three blocks of queries, the last with a few rows; three to five tiles of keys, the last with a few keys."""
    run(emulated, *inputs(HALF[causal], 260, 370, d), causal=causal)


@pytest.mark.parametrize("d", [56, 72, 88, 104, 136, 176, 200])
def test_narrower_heads(emulated: Any, d: int) -> None:
    run(emulated, *inputs(HALF[d // 8 % 2], 70, 200, d))


@pytest.mark.parametrize("schedule", range(4), indirect=True)
@pytest.mark.parametrize("d", [64, 256])
def test_long(emulated: Any, d: int) -> None:
    """Every slot of the ring is used several times, in two units of work of one persistent block."""
    run(emulated, *inputs(HALF[0], 100, 900, d, heads=2, kv_heads=1))


@pytest.mark.parametrize("processors", [3, 4, 64])
def test_units_of_a_persistent_grid(emulated: Any, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """18 units over 3 to 18 blocks: every unit is computed, wherever waves and sections end."""
    monkeypatch.setenv("GENFAST_EMULATOR_MULTIPROCESSORS", str(processors))
    run(emulated, *inputs(torch.bfloat16, 300, 140, 128, batch=2, heads=3, kv_heads=1), causal=True)


@pytest.mark.parametrize("terms", ["bias", "mask", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_terms(emulated: Any, shape: tuple[int, ...], terms: str) -> None:
    causal = terms != "mask"
    dtype = HALF[terms == "both"]
    q, k, v = inputs(dtype, 70, 90, 64, batch=2, heads=4, kv_heads=2)
    bias = draw(shape, dtype if shape[3] == 90 else torch.float32, 3) if terms != "mask" else None
    mask = draw(shape, torch.float32, 4) > -0.5 if terms != "bias" else None
    run(emulated, q, k, v, bias, mask, causal)


@pytest.mark.parametrize("d", WIDTHS)
def test_bias_of_every_width(emulated: Any, d: int) -> None:
    run(emulated, *inputs(HALF[d // 16 % 2], 70, 200, d), bias=draw((1, 1, 70, 200), torch.float32, 3), causal=True)


def test_layouts(emulated: Any) -> None:
    """(B, N, H, D) memory, rows that begin at any multiple of 16 bytes; nothing beyond the output is written."""
    packed = draw((2, 33, 9, 88), torch.bfloat16, 0)
    q, k, v = (packed[:, :, i : i + 3, 8:80].transpose(1, 2) for i in (0, 3, 6))
    storage = torch.full((2, 33, 3, 88), torch.nan, dtype=torch.bfloat16)
    o, lse = run(emulated, q, k, v, o=storage[..., 8:80].transpose(1, 2))
    assert storage.isnan().sum() == storage.numel() - o.numel()
    plain = run(emulated, *(t.contiguous() for t in (q, k, v)))
    assert same_bits(o, plain[0]) and same_bits(lse, plain[1])


def test_what_the_maps_cannot_describe(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not aligned, keys broadcast over heads and a negative scale take the mma.sync kernel, whose bits differ."""
    q, k, v = inputs(torch.bfloat16, 40, 100, 64, heads=2, kv_heads=2)
    cases = [
        ((q, draw((1, 2, 100, 65), torch.bfloat16, 7)[..., 1:], v), 0.125),
        ((q, k[:, :1].expand_as(k), v), 0.125),
        ((q, k, v), -0.125),
        ((q, k, v), 0.125),
    ]
    same = []
    for arguments, scale in cases:
        monkeypatch.setenv("GENFAST_ATTENTION_HOPPER", "all")
        o, _ = run(emulated, *arguments, scale=scale)
        monkeypatch.delenv("GENFAST_ATTENTION_HOPPER")
        same.append(same_bits(o, run(emulated, *arguments, scale=scale)[0]))
    assert same == [True, True, True, False]


def test_packed_sequences_take_the_other_kernel(emulated: Any) -> None:
    test_emulator_attention_varlen.test_packed(emulated, torch.bfloat16, 64, True)


def test_queries_that_see_nothing(emulated: Any) -> None:
    q, k, v = inputs(torch.bfloat16, 400, 9, 64)
    o, lse = run(emulated, q, k, v, causal=True)
    assert not o[0, 0, :391].any() and (lse[0, 0, :391] == -torch.inf).all() and o[0, 0, 391:].any()
    hidden = torch.arange(400)[:, None].expand(400, 9) % 2 == 0
    o, lse = run(emulated, q, k, v, bias=torch.zeros(400, 9).masked_fill(hidden, -torch.inf))
    assert not o[0, 0, ::2].any() and (lse[0, 0, ::2] == -torch.inf).all()


def test_nan_stays_with_its_query(emulated: Any) -> None:
    q, k, v = inputs(torch.bfloat16, 20, 190, 64)
    q[0, 0, 3, 5] = torch.nan
    o, lse = run(emulated, q, k, v)
    assert o[0, 0, 3].isnan().all() and lse[0, 0, 3].isnan() and not o[0, 0, :3].isnan().any() and not o[0, 0, 4:].isnan().any()


def test_order_changes_no_bit(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(torch.bfloat16, 140, 300, 80, heads=2)
    results = []
    for seed, processors in (0, 1), (7, 1), (9, 3):
        monkeypatch.setenv("GENFAST_EMULATOR_SEED", str(seed))
        monkeypatch.setenv("GENFAST_EMULATOR_MULTIPROCESSORS", str(processors))
        results.append(run(emulated, *arguments))
    assert all(same_bits(a, b) for again in results[1:] for a, b in zip(again, results[0], strict=True))
