"""Weights and their description in one safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from genfast.checks import shown
from genfast.files import pack, unpack, write_atomically


def write(path: str | Path, tensors: Mapping[str, Tensor], family: str, config: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write ``tensors`` in float32 (integers as they are); an old file is replaced only once the new one is whole."""
    content = {name: (t.detach().float() if t.is_floating_point() else t.detach()).contiguous().cpu() for name, t in tensors.items()}
    write_atomically(Path(path), pack(content, "genfast", {"family": family, "config": config, "about": about}))


def read(path: str | Path, families: Collection[str], what: str) -> tuple[str, dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """What `write` wrote: (family, tensors on the CPU, config with its lists as tuples, about).

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged or not one of ``families``, called ``what``.
    """
    tensors, words = unpack(Path(path), "genfast")
    if not isinstance(words, dict) or words.get("family") not in families:
        holds = f" ({shown(words['family'])})" if isinstance(words, dict) and "family" in words else ""
        raise ValueError(f"path: got {path}, which is not {what} saved by genfast{holds}")
    config, about = words.get("config"), words.get("about")
    if not isinstance(config, dict) or not isinstance(about, dict):
        raise ValueError(f"path: got {path}, which has no description of its network, supported: what genfast saved")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return words["family"], tensors, config, about


def rebuild(path: str | Path, make: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network that ``make`` builds from a file's configuration, with the file's weights, in eval mode.

    Raises ValueError if this version cannot build it, or the weights are not this network's.
    """
    try:
        network = make()
        network.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"path: got {path}, whose network this version of genfast cannot rebuild ({reason})") from error
    return network.eval()
