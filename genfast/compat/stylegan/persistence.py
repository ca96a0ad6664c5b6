"""`torch_utils.persistence` without its pickles: classes remember what they were made with, and that is all."""

from __future__ import annotations

import copy
import functools
from typing import Any, NoReturn, TypeVar

from .dnnlib import EasyDict

_Class = TypeVar("_Class", bound=type[Any])
_MARK = "_genfast_persistent"


def persistent_class(cls: _Class) -> _Class:
    """``cls`` itself, whose objects have ``init_args`` and ``init_kwargs``: copies of the constructor's arguments.

    Pickling stays Python's own, by the class's name; source code is neither stored nor run.
    """
    construct = cls.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        self.__dict__["_init_args"] = copy.deepcopy(args)  # after the constructor: that of the outermost class stays
        self.__dict__["_init_kwargs"] = copy.deepcopy(kwargs)

    cls.__init__ = __init__
    cls.init_args = property(lambda self: copy.deepcopy(self._init_args))
    cls.init_kwargs = property(lambda self: EasyDict(copy.deepcopy(self._init_kwargs)))
    setattr(cls, _MARK, True)
    return cls


def is_persistent(obj: object) -> bool:
    """Whether ``obj`` is a class, or an object of one, that `persistent_class` has seen."""
    return bool(getattr(obj, _MARK, False))


def _reconstruct_persistent_obj(meta: object) -> NoReturn:
    """The name by which the original's pickles ask for an object. They hold source code to be run."""
    raise NotImplementedError(
        "pickle: got one of StyleGAN's persistent classes, which runs the source code stored in it, supported: state_dict of the original, "
        "loaded into a network made here"
    )
