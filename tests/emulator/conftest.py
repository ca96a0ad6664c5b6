"""The CUDA kernels as a torch library, for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator import emulator_build

from genfast import _library

_schemas = torch.library.Library("genfast_emulator", "DEF")
SANITIZED = os.environ.get("GENFAST_EMULATOR_SANITIZE") == "1"


@pytest.fixture(scope="session")
def emulated() -> Any:
    """torch.ops.genfast_emulator: the CUDA kernels on CPU tensors."""
    path = os.environ.get("GENFAST_EMULATOR_LIBRARY") or str(emulator_build.library(sanitize=SANITIZED))
    for name, schema in _library.loaded.schemas.items():
        if name.endswith("_"):
            _schemas.define(name + schema)
    torch.ops.load_library(path)
    return torch.ops.genfast_emulator


@pytest.fixture
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GENFAST_EMULATOR_SEED", str(getattr(request, "param", 1)))
    yield
