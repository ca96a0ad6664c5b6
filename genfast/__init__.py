"""genfast: the fast path for generative models in PyTorch.

Everything is imported on its first use: ``genfast --help`` does not pay for torch, nor a sampler for a trainer.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genfast import compat, data, models, nn, ops, reference, samplers, schedules, testing, train  # noqa: F401
    from genfast.ops import explain_attention
    from genfast.samplers import Denoiser, Plan, Sampler

    __version__: str

__all__ = ["Denoiser", "Plan", "Sampler", "__version__", "explain_attention", "ops", "reference", "schedules"]

_NAMES = {"Denoiser": "samplers", "Plan": "samplers", "Sampler": "samplers", "explain_attention": "ops"}
_MODULES = ("compat", "data", "models", "nn", "ops", "reference", "samplers", "schedules", "testing", "train")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"genfast.{name}")
    if name in _NAMES:
        value: Any = getattr(import_module(f"genfast.{_NAMES[name]}"), name)
    elif name == "__version__":
        value = version("genfast")
    else:
        raise AttributeError(f"module 'genfast' has no attribute {name!r}")
    globals()[name] = value  # the next use finds it there
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NAMES, "__version__"})
