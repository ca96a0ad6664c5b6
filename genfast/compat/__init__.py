"""Drop-ins for other libraries: change one import, keep the rest. docs/diffusers.md, docs/k-diffusion.md, docs/gan-ops.md."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genfast.compat import diffusers, k_diffusion, sdpa, stylegan  # noqa: F401

_ON_USE = ("diffusers", "k_diffusion", "sdpa", "stylegan")  # each needs only its own library


def __getattr__(name: str) -> ModuleType:
    if name in _ON_USE:
        return importlib.import_module(f"genfast.compat.{name}")
    raise AttributeError(f"module 'genfast.compat' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_USE})
