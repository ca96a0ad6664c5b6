"""Training checkpoints that survive a kill at any moment: tensors and JSON in one safetensors file, replaced atomically."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from genfast.files import pack, unpack, write_atomically


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``state`` to ``path``; the checkpoint that stood there becomes ``path`` + ".previous"."""
    write_atomically(path, pack(tensors, "state", state), _previous(path))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint at ``path``, or None if there is none: (tensors on the CPU, state).

    Raises ValueError if files are there and none can be read.
    """
    candidates = [candidate for candidate in (path, _previous(path)) if candidate.exists()]
    for candidate in candidates:
        try:
            tensors, state = unpack(candidate, "state", "checkpoint")
            if not isinstance(state, dict):
                raise ValueError(f"checkpoint: got {candidate}, which was not written by a training run")
            return tensors, state
        except ValueError as error:
            if candidate is candidates[-1]:
                raise ValueError(f"{error}; delete it to start again, or choose another directory") from None
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    return None


def check_fits(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError unless a checkpoint's ``tensors`` hold all of the names of ``shapes``, in these shapes."""
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != tuple(shape):
            got = f"shape {tuple(tensors[name].shape)}" if name in tensors else "none"
            raise ValueError(f"checkpoint: got {got} for {name}, supported by this run: shape {tuple(shape)}")


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")
