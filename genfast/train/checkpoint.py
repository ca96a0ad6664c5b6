"""Training checkpoints that survive a kill at any moment: tensors and JSON in one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: after a kill at any moment the file holds the old bytes or the new ones, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself
    finally:
        os.close(directory)


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``state`` to ``path``; the checkpoint that stood there becomes ``path`` + ".previous"."""
    content = save({name: t.detach().contiguous() for name, t in tensors.items()}, {"state": json.dumps(state)})
    if path.exists():
        os.replace(path, _previous(path))
    write_atomically(path, content)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint at ``path``, or None if there is none: (tensors on the CPU, state).

    Raises ValueError if files are there and none can be read.
    """
    problem: Exception | None = None
    for candidate in (path, _previous(path)):
        if not candidate.exists():
            continue
        try:
            with safe_open(candidate, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["state"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            problem = error
            warnings.warn(f"checkpoint: {candidate} cannot be read ({error}); trying the one before it", stacklevel=2)
    if problem is not None:
        raise ValueError(f"checkpoint: got {path}, which cannot be read ({problem}); delete it to start again, or choose another directory")
    return None


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")
