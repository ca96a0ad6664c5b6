"""`torch_utils.custom_ops`: nothing is compiled at run time."""

from __future__ import annotations

from typing import NoReturn

verbosity = "brief"  # set by users; there is nothing to report


def get_plugin(module_name: str, *_: object, **__: object) -> NoReturn:
    """Refuses: genfast's kernels come with the package."""
    raise NotImplementedError(f"get_plugin: got {module_name!r}, supported: none, genfast's kernels are compiled already")
