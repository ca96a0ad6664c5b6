"""Weights and their description in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor


def write(path: str | Path, tensors: Mapping[str, Tensor], family: str, config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write ``tensors`` in float32 (integers as they are); an old file is replaced only once the new one is whole."""
    content = {name: (t.detach().float() if t.is_floating_point() else t.detach()).contiguous().cpu() for name, t in tensors.items()}
    words = {"genfast": json.dumps({"family": family, "config": config, "about": about})}  # one key: safetensors shuffles several
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(serialize(content, words))
    temporary.replace(path)


def read(path: str | Path, families: Collection[str], what: str) -> tuple[str, dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """What `write` wrote: (family, tensors on the CPU, config with its lists as tuples, about).

    Raises FileNotFoundError if there is no such file, ValueError if it is not one of ``families``, called ``what``.
    """
    try:
        with safe_open(path, "pt") as file:
            words = json.loads((file.metadata() or {}).get("genfast", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: got {path}, which is not a safetensors file ({error})") from None
    if words.get("family") not in families:
        raise ValueError(f"path: got {path}, which is not {what} saved by genfast")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in words["config"].items()}
    return words["family"], tensors, config, words["about"]
