"""The attributes of a scheduler as a stock step reads and writes them: told apart by content, copied while tracing, written after a step.

A traced step is good wherever everything that it read is as it was. So what it reads is recorded with what it held: numbers, strings and
tables by value, the tensors that earlier steps kept by their form alone, because their contents are inputs of the step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_numbers = itertools.count(1)
Path = tuple[str, int | None]  # an attribute, or an element of one that is a list

_PLAIN = (int, float, str, bool, type(None), np.generic, torch.dtype, torch.device)


class NotLinear(Exception):
    """The step is not of the form that a row can hold; the message says why."""


class Absent:
    """An attribute that is not there."""


class Content(NamedTuple):
    """A table: a tensor of at most one dimension or an array, by value."""

    dtype: Any
    ndim: int
    data: bytes


class Form(NamedTuple):
    """A table that the step moved, or whose length it asked for, without looking into it."""

    dtype: Any
    shape: torch.Size


class Kept(NamedTuple):
    """A tensor of the sample's shape: what an earlier step kept."""

    dtype: torch.dtype


class Config(NamedTuple):
    """A configuration: its attributes, which is how diffusers reads them (and how users edit them)."""

    values: dict[str, Any]
    number: int  # of its own


class Items(NamedTuple):
    """A list, element by element."""

    items: tuple[Any, ...]


class Answers(NamedTuple):
    """A function of the configuration (`SASolverScheduler` has one), by what it answered."""

    calls: tuple[tuple[tuple[Any, ...], Any], ...]


Reads = tuple[tuple[str, Any], ...]


def content(value: Tensor | np.ndarray) -> Content:
    """What a table holds. One on a GPU is copied to the host."""
    if isinstance(value, np.ndarray):
        return Content(value.dtype, value.ndim, value.tobytes())
    host = value if value.device.type == "cpu" and not value.requires_grad else value.detach().cpu()
    if host.dtype is torch.bfloat16:
        host = host.view(torch.int16)
    try:
        array = host.numpy()
    except RuntimeError:  # inside a torch.func transform
        array = np.array(host.tolist(), dtype=str(host.dtype).removeprefix("torch."))
    return Content(value.dtype, value.ndim, array.tobytes())


class Stamps:
    """The contents of tables on a GPU, read once for every object and version of it, so that a step does not wait for the device."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[Tensor, int, Content]] = {}
        self.times: tuple[Content | None, list[Any]] = None, []
        self.configuration = Config({}, 0)
        self.hash = 0, 0

    def __deepcopy__(self, memo: Any) -> Stamps:
        return Stamps()

    def content(self, name: str, value: Any) -> Content:
        if not isinstance(value, Tensor) or value.device.type == "cpu" or value.is_inference():
            return content(value)
        found = self.known.get(name)
        if found is None or found[0] is not value or found[1] != value._version:
            found = self.known[name] = value, value._version, content(value)
        return found[2]

    def config(self, value: Any) -> Config:
        if _differ(vars(value), self.configuration.values):
            values = {key: list(v) if isinstance(v, list) else v for key, v in vars(value).items()}
            self.configuration = Config(values, next(_numbers))
        return self.configuration

    def hashed(self, value: Any) -> int:
        """A hash of a configuration's contents."""
        found = self.config(value)
        if self.hash[0] != found.number:
            self.hash = found.number, hash(repr(found.values))
        return self.hash[1]

    def host(self, name: str, value: Tensor) -> list[Any]:
        """The elements of the table ``value``, held by the attribute ``name``."""
        now = self.content(name, value)
        if self.times[0] is not now and self.times[0] != now:
            self.times = now, value.tolist()
        return self.times[1]


def _differ(a: Any, b: Any) -> bool:
    try:
        return bool(a != b)
    except (ValueError, RuntimeError):  # two arrays or tensors among them, which are not one object
        return True


def fits(reads: Reads, state: Mapping[str, Any], sample: Tensor, stamps: Stamps) -> bool:
    """Whether ``state`` holds what was read."""
    get = state.get
    for name, expected in reads:  # plain code: every step comes through here
        value = get(name, Absent)
        if value is expected:
            continue
        kind = type(expected)
        if kind is Config:
            if _differ(getattr(value, "__dict__", None), expected[0]):
                return False
        elif kind is Content:
            if type(value) is Tensor and value.dtype is expected[0] and value.is_cpu:
                try:
                    if value.numpy().tobytes() == expected[2] and value.ndim == expected[1]:
                        continue
                except (RuntimeError, TypeError):
                    pass
            if not isinstance(value, Tensor | np.ndarray) or stamps.content(name, value) != expected:
                return False
        elif not _matches(expected, value, sample):
            return False
    return True


def _matches(expected: Any, value: Any, sample: Tensor) -> bool:
    if value is expected:
        return True
    kind = type(expected)
    if kind is Kept:
        same = isinstance(value, Tensor) and value.dtype is expected[0]
        return same and value.shape == sample.shape and value.device == sample.device
    if kind is Items:
        items = expected[0]
        if type(value) is not list or len(value) != len(items):
            return False
        for e, v in zip(items, value, strict=True):  # noqa: SIM110
            if not _matches(e, v, sample):
                return False
        return True
    if kind is Form:
        return isinstance(value, Tensor) and value.dtype is expected[0] and value.shape == expected[1]
    if kind is Content:
        return isinstance(value, Tensor | np.ndarray) and content(value) == expected
    if kind is Answers:
        return callable(value) and all(value(*args) == answer for args, answer in expected[0])
    return type(value) is kind and bool(value == expected)


def kept_paths(state: Mapping[str, Any], shape: torch.Size) -> list[Path]:
    """Where ``state`` holds tensors of ``shape``: what earlier steps kept."""
    found: list[Path] = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.shape == shape:
                found.append((name, None))
        elif type(value) is list:
            found += [(name, at) for at, item in enumerate(value) if isinstance(item, Tensor) and item.shape == shape]
    return found


def at_path(state: Mapping[str, Any], path: Path) -> Any:
    name, at = path
    return state[name] if at is None else state[name][at]


class Source:
    """A state as a shadow reads it: attribute by attribute, copied and noted on the first access."""

    def __init__(self, state: Mapping[str, Any], shape: torch.Size, kept: Mapping[Path, Tensor], stamps: Stamps) -> None:
        self.state, self.shape, self.kept, self.stamps = state, shape, kept, stamps
        self.reads: dict[str, Any] = {}
        self.copies: dict[str, Any] = {}  # what the shadow got; of a list, its first elements
        self.loose: dict[int, Path] = {}  # the copies of tables, by identity
        self.versions: dict[int, int] = {}
        self.touched: set[int] = set()  # those of them that an operation looked into
        self.calls: dict[str, list[tuple[tuple[Any, ...], Any]]] = {}  # of functions

    def take(self, name: str) -> Any:
        value = self.state[name]
        if type(value) is list:
            pairs = [self._copied((name, at), item) for at, item in enumerate(value)]
            copy: Any = [c for c, _ in pairs]
            self.reads[name] = Items(tuple(e for _, e in pairs))
            self.copies[name] = copy, tuple(copy)
        else:
            copy, self.reads[name] = self._copied((name, None), value)
            self.copies[name] = copy, None
        return copy

    def _copied(self, path: Path, value: Any) -> tuple[Any, Any]:
        """A copy for the shadow, and what has to be there again."""
        name, at = path
        if isinstance(value, Tensor):
            if value.shape == self.shape:
                return self.kept[path], Kept(value.dtype)
            if value.ndim <= 1:
                copy = value.detach().to("cpu", copy=True)
                self.loose[id(copy)], self.versions[id(copy)] = path, copy._version  # of a tensor from inference mode not 0
                return copy, Form(value.dtype, value.shape)
            raise NotLinear(f"a tensor of shape {tuple(value.shape)} in {name}")
        if isinstance(value, np.ndarray):
            return value.copy(), content(value)
        if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value)):
            return value, value
        if name == "_internal_dict" and at is None:
            return value, self.stamps.config(value)
        if type(value) is list and all(isinstance(v, _PLAIN) for v in value):
            return list(value), Items(tuple(value))
        if callable(value) and name in self.state["_internal_dict"]:
            return functools.partial(self._call, name, value), Answers(())
        raise NotLinear(f"state in {name}, an object of class {type(value).__name__}")

    def _call(self, name: str, function: Any, *args: Any) -> Any:
        answer = function(*args)
        if not isinstance(answer, int | float):
            raise NotLinear(f"{name} with an answer of class {type(answer).__name__}")
        self.calls.setdefault(name, []).append((args, answer))
        return answer

    def result(self) -> Reads:
        """What was read."""
        for identity in self.touched:
            name, at = path = self.loose[identity]
            value = at_path(self.state, path)
            if at is None:
                self.reads[name] = self.stamps.content(name, value)
            else:
                items = list(self.reads[name].items)
                items[at] = content(value)
                self.reads[name] = Items(tuple(items))
        self.reads |= {name: Answers(tuple(calls)) for name, calls in self.calls.items()}
        return tuple(self.reads.items())


_shadows: dict[type, type] = {}


def shadow_of(stock: type, source: Source) -> Any:
    """An object of ``stock`` that takes its attributes from ``source`` and changes nothing outside itself."""
    if stock not in _shadows:

        def __getattr__(self: Any, name: str) -> Any:
            source = self.__dict__["_source"]
            if name in source.state:
                value = self.__dict__[name] = source.take(name)
                return value
            if not name.startswith("__"):
                source.reads[name] = Absent
            return stock.__getattr__(self, name)  # type: ignore[attr-defined]

        _shadows[stock] = type(stock.__name__, (stock,), {"__getattr__": __getattr__, "__module__": stock.__module__})
    shadow: Any = object.__new__(_shadows[stock])
    shadow.__dict__["_source"] = source
    for name in source.state:
        if name == "_internal_dict" or (hasattr(stock, name) and not callable(getattr(stock, name))):
            shadow.__dict__[name] = source.take(name)  # the class has an attribute of that name, so no access would be missed
    return shadow


# What an attribute holds after a step: a recipe, or several in a list.


@dataclass(frozen=True)
class Item:
    """One tensor or number that a step leaves behind, by where it comes from.

    ``kind``: "const" (``value`` itself), "sample", "model", "time", "size" (the last ``-value`` numbers of the shape), "field" and "new"
    (the tensor of that number among those returned and those made for keeping), "held" (what the path ``value`` held before).
    """

    kind: str
    value: Any = None


@dataclass(frozen=True)
class ListOf:
    """A list: the old one with other elements if ``same``, else another one."""

    items: tuple[Item, ...]
    same: bool


Writes = Sequence[tuple[str, Item | ListOf]]


def write(state: dict[str, Any], writes: Writes, tensors: Mapping[str, Any]) -> None:
    """Leave in ``state`` what a step leaves. ``tensors`` holds what the kinds of `Item` refer to, "field" and "new" as sequences."""

    def made(item: Item) -> Any:
        kind, value = item.kind, item.value
        if kind == "const":
            return value.clone() if isinstance(value, Tensor) else value
        if kind == "held":
            return at_path(state, value)
        if kind == "size":
            return tensors["shape"][value:]
        return tensors[kind] if value is None else tensors[kind][value]

    values = [(name, [made(i) for i in recipe.items] if type(recipe) is ListOf else made(recipe)) for name, recipe in writes]  # type: ignore[arg-type]
    for (name, recipe), (_, value) in zip(writes, values, strict=True):
        if type(recipe) is ListOf and recipe.same:
            state[name][:] = value
        else:
            state[name] = value
