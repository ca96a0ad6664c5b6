"""Loads the kernel libraries and defines the operators' schemas.

Schemas live in Python (`define`), kernels in C++ (`STABLE_TORCH_LIBRARY_IMPL`): docs/adr/002-schemas-in-python.md says why.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Loaded:
    """What was found and loaded; `genfast info` prints it."""

    directory: Path
    cpu: str = "not loaded"
    cuda: str = "not loaded"
    schemas: dict[str, str] = field(default_factory=dict)


def _directory() -> Path:
    # The libraries are installed beside the extension module, which in an editable install is not where this file is.
    spec = importlib.util.find_spec("genfast._C")
    return Path(spec.origin).parent if spec and spec.origin else Path(__file__).parent


loaded = Loaded(_directory())
_definitions = torch.library.Library("genfast", "DEF")


def define(name: str, schema: str) -> None:
    """Define ``genfast::name``. Kernels already loaded for that name attach to it."""
    loaded.schemas[name] = schema
    _definitions.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))


def load() -> None:
    """Load the CPU library, and the CUDA library where this torch is a CUDA build. A failure is one warning, never an error."""
    for device, wanted in (("cpu", True), ("cuda", torch.version.cuda is not None)):
        path = loaded.directory / f"libgenfast_{device}.so"
        if not path.exists():
            state = "not built"
        elif not wanted:
            state = "built, not loaded: this torch is a CPU build"
        elif os.environ.get("GENFAST_DISABLE_KERNELS") == "1":
            state = "built, not loaded: GENFAST_DISABLE_KERNELS=1"
        else:
            try:
                torch.ops.load_library(str(path))
                state = "loaded"
            except OSError as error:
                state = f"failed to load: {error}"
                warnings.warn(f"genfast: {path.name} {state}; the pure PyTorch reference runs instead", stacklevel=2)
        setattr(loaded, device, state)


def has_kernels(device_type: str) -> bool:
    """Whether compiled kernels serve tensors on ``device_type`` ("cpu" or "cuda")."""
    return getattr(loaded, device_type, "") == "loaded"
