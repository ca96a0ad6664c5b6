"""The families of models, by name: every module of this folder that ends in ``FAMILY = Family(...)``."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

from genfast.models.family import Family, Model

_HERE = __name__.rpartition(".")[0]
_MODULES = {
    found.name: import_module(f"{_HERE}.{found.name}")
    for found in pkgutil.iter_modules(import_module(_HERE).__path__)
    if found.name not in ("families", "files")  # which come after them
}
FAMILIES: dict[str, Family] = {name: module.FAMILY for name, module in _MODULES.items() if hasattr(module, "FAMILY")}


def name_of(net: Any) -> str | None:
    """The name of the family that a network belongs to, or None for a network of your own."""
    config = type(getattr(net, "config", None))
    return next((name for name, family in FAMILIES.items() if family.config is config), None)


__all__ = ["FAMILIES", "Family", "Model", "name_of"]
