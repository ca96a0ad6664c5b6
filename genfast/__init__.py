"""genfast: the fast path for generative models in PyTorch."""

import importlib
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = version("genfast")

from genfast import ops, reference, schedules
from genfast.ops import explain_attention
from genfast.samplers import Denoiser, Plan, Sampler

if TYPE_CHECKING:
    from genfast import compat, data, models, nn, testing, train  # noqa: F401

__all__ = ["Denoiser", "Plan", "Sampler", "__version__", "explain_attention", "ops", "reference", "schedules"]

_ON_USE = ("compat", "data", "models", "nn", "testing", "train")  # so that a sampler does not pay for importing a trainer


def __getattr__(name: str) -> ModuleType:
    if name in _ON_USE:
        return importlib.import_module(f"genfast.{name}")
    raise AttributeError(f"module 'genfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_USE})
