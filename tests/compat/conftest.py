from __future__ import annotations

import pytest

from genfast.compat.diffusers import FusedScheduler, attention


@pytest.fixture(autouse=True)
def _traced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of tests are small: without this, first trajectories would be stock's own (test_diffusers_state.py has some that are)."""
    monkeypatch.setattr(FusedScheduler, "trace_from", 0)
    monkeypatch.setattr(attention, "SMALL", 0)  # and attention would be torch's
