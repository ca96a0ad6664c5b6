"""`dnnlib` and `dnnlib.util`: what networks and training loops need of them to run."""

from __future__ import annotations

import importlib
from typing import Any


class EasyDict(dict[str, Any]):
    """A dict whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]


def get_obj_by_name(name: str) -> Any:
    """The object of the dotted ``name``: the longest part that is a module, then attributes."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise  # a module of that name is there, and misses another
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(f"name: got {name!r}, supported: module.object")


def call_func_by_name(*args: Any, func_name: str, **kwargs: Any) -> Any:
    """The function of the dotted name ``func_name``, called."""
    return get_obj_by_name(func_name)(*args, **kwargs)


def construct_class_by_name(*args: Any, class_name: str, **kwargs: Any) -> Any:
    """An object of the class of the dotted name ``class_name``."""
    return call_func_by_name(*args, func_name=class_name, **kwargs)


def format_time(seconds: float) -> str:
    """``seconds`` as days, hours, minutes and seconds, from the largest that is not zero; below a day two or three of them."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m"
