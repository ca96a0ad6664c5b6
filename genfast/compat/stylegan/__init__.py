"""A drop-in for StyleGAN's `torch_utils` and `dnnlib`: the same imports, without a compiler at run time. docs/gan-ops.md."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from . import (
    bias_act,
    conv2d_gradfix,
    conv2d_resample,
    custom_ops,
    dnnlib,
    filtered_lrelu,
    fma,
    grid_sample_gradfix,
    misc,
    persistence,
    training_stats,
    upfirdn2d,
)

__all__ = ["install", "uninstall"]

_OPS = (bias_act, conv2d_gradfix, conv2d_resample, filtered_lrelu, fma, grid_sample_gradfix, upfirdn2d)
_UTILITIES = (custom_ops, misc, persistence, training_stats)
_installed: dict[str, ModuleType] = {}


def _last_name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _package(name: str, modules: tuple[ModuleType, ...], folders: list[str]) -> dict[str, ModuleType]:
    """A package ``name`` of ``modules``; what it lacks is looked for in ``folders``."""
    package = ModuleType(name)
    package.__path__ = folders
    for module in modules:
        setattr(package, _last_name(module), module)
    return {name: package} | {f"{name}.{_last_name(module)}": module for module in modules}


def install() -> None:
    """From here on `torch_utils`, `torch_utils.ops.*` and `dnnlib` are imported from genfast, with the originals' names and arguments.

    Modules of these packages that genfast does not have still come from the user's folder. Raises RuntimeError where the originals are
    imported already: what was taken from them would stay.
    """
    if _installed:
        return
    imported = sorted(name for name in sys.modules if name.split(".")[0] in ("torch_utils", "dnnlib"))
    if imported:
        raise RuntimeError(
            f"install: got {imported[0]} imported already, supported: a call before the first import of torch_utils or dnnlib"
        )
    found = importlib.util.find_spec("torch_utils")
    folders = list(found.submodule_search_locations or []) if found else []
    utilities = _package("torch_utils", _UTILITIES, folders)
    operators = _package("torch_utils.ops", _OPS, [f"{folder}/ops" for folder in folders])
    utilities["torch_utils"].ops = operators["torch_utils.ops"]  # type: ignore[attr-defined]
    tools = ModuleType("dnnlib")
    tools.__path__ = []
    tools.EasyDict, tools.util = dnnlib.EasyDict, dnnlib  # type: ignore[attr-defined]
    _installed.update(utilities | operators | {"dnnlib": tools, "dnnlib.util": dnnlib})
    sys.modules.update(_installed)


def uninstall() -> None:
    """Takes these modules away again, for imports to come; without `install` nothing."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()
