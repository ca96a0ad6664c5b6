"""Hopper's attention kernel (wgmma, TMA) under the block emulator, against the float64 reference. docs/attention-hopper.md.

test_emulator_ops.py runs this file under AddressSanitizer too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulator.test_emulator_attention import HALF, draw, inputs, run

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
