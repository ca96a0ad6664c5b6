"""Trained weights and their description in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from genfast.checks import shown
from genfast.files import pack, unpack, write_atomically
from genfast.impl import check_impl
from genfast.models.families import FAMILIES, Model, name_of


def save(net: nn.Module, path: str | Path, state: Mapping[str, Tensor] | None = None, **about: Any) -> None:
    """Write a network's weights in float32 (integers as they are) and its configuration; an old file is replaced once the new one is whole.

    ``state`` replaces the network's own weights (an average of them, say). ``about`` is any JSON-able description of how to use the
    weights (prediction, noise process, class names, ...); `load` returns it. Of a network of your own only the weights and ``about``
    are written: `read` gives them back.
    """
    content = {name: t.detach().float() if t.is_floating_point() else t.detach() for name, t in (state or net.state_dict()).items()}
    family = name_of(net)
    config: Any = None if family is None else asdict(net.config)  # type: ignore[call-overload]
    words = {"family": family, "config": config, "about": about}
    write_atomically(Path(path), pack({name: t.contiguous().cpu() for name, t in content.items()}, "genfast", words))


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save` wrote: (tensors on the CPU, {"family": name or None, "config": its fields or None, "about": dictionary}).

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged or was not written by `save`.
    """
    tensors, words = unpack(Path(path), "genfast")
    if not isinstance(words, dict) or "family" not in words:
        raise ValueError(f"path: got {path}, which holds no weights saved by genfast")
    config = words.get("config")
    if not isinstance(words.get("about"), dict) or not isinstance(config, dict | None) or (config is None) != (words["family"] is None):
        raise ValueError(f"path: got {path}, which has no description of its network, supported: what genfast saved")
    if config is not None:
        config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return tensors, {"family": words["family"], "config": config, "about": words["about"]}


def load_model(path: str | Path, impl: str = "fused") -> Model:
    """Rebuild a model that `save` wrote, on the CPU in eval mode. ``impl``: of the network's operators, where its family has both.

    Raises FileNotFoundError if there is no such file, ValueError if it is damaged, of a family that this version does not have, or of
    a network of your own, which this function cannot build.
    """
    check_impl(impl)
    tensors, words = read(path)
    if words["family"] is None:
        raise ValueError(f"path: got {path}, which holds a network of your own, supported: networks of {', '.join(FAMILIES)}")
    if words["family"] not in FAMILIES:
        raise ValueError(f"path: got {path}, which holds a network of {shown(words['family'])}, supported: {', '.join(FAMILIES)}")
    family = FAMILIES[words["family"]]
    try:
        net = family.build(family.config(**words["config"]), impl)
        net.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"path: got {path}, whose network this version of genfast cannot rebuild ({reason})") from error
    return Model(net.eval(), words["about"], family, Path(path))


def load(path: str | Path, impl: str = "fused") -> tuple[Any, dict[str, Any]]:
    """(network, about) of `load_model`."""
    model = load_model(path, impl)
    return model.net, model.about
