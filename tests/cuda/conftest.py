"""What is under test may destroy the device's context: then this process ends, rather than every test after it failing for nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def device_is_alive() -> Iterator[None]:
    yield
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)  # the others' processes go on, and this one gets a successor
        pytest.exit(f"the device is lost: {error}", returncode=3)
