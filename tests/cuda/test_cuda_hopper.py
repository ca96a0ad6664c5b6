"""On a Hopper GPU: its attention kernel against float64, each head dimension in a process of its own that a hang ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.cuda
HEAD_DIMS = [64, 80, 96, 128, 160, 192, 256]


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_hopper_attention(d: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.hopper", str(tmp_path), "--only", "check", str(d)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90, cwd=Path(__file__).parents[2])
    if torch.cuda.get_device_capability() != (9, 0):
        assert "supported: sm_90" in done.stderr
        return
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
