"""Training checkpoints that survive a kill at any moment: the state of named objects in one safetensors file, replaced atomically."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from genfast.files import pack, unpack, write_atomically


class Stateful(Protocol):
    """Anything that continues from a state: networks, optimizers, averages."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON-able ``state`` to ``path``; the checkpoint that stood there becomes ``path`` + ".previous"."""
    write_atomically(path, pack(tensors, "state", state), _previous(path))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable checkpoint at ``path``, or None if there is none: (tensors on the CPU, state).

    Raises ValueError if files are there and none can be read.
    """
    candidates = [candidate for candidate in (path, _previous(path)) if candidate.exists()]
    for candidate in candidates:
        try:
            tensors, state = unpack(candidate, "state", "checkpoint")
            if not isinstance(state, dict):
                raise ValueError(f"checkpoint: got {candidate}, which was not written by a training run")
            return tensors, state
        except ValueError as error:
            if candidate is candidates[-1]:
                raise ValueError(f"{error}; delete it to start again, or choose another directory") from None
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    return None


def keep_copies(path: Path, step: int, count: int) -> None:
    """Let the checkpoint at ``path`` stay as ``checkpoint-STEP.safetensors`` too, and of such files the newest ``count``."""
    copy = path.with_name(f"{path.stem}-{step:06d}{path.suffix}")
    copy.unlink(missing_ok=True)
    try:
        os.link(path, copy)  # a second name of the same bytes, which costs no space until the first one moves on
    except OSError:  # a file system without links
        shutil.copyfile(path, copy)
    kept = {found.stem.rpartition("-")[2]: found for found in path.parent.glob(f"{path.stem}-*{path.suffix}")}
    for old in sorted(filter(str.isdecimal, kept), key=int)[:-count]:
        kept[old].unlink()


def flatten(objects: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of named objects: (tensors by path, such as "optimizer/state/0/exp_avg", JSON that says where each of them belongs)."""
    tensors: dict[str, Tensor] = {}
    return tensors, {name: _split(thing.state_dict(), name, tensors) for name, thing in objects.items()}


def restore(objects: Mapping[str, Stateful], tensors: Mapping[str, Tensor], structure: Any) -> None:
    """Give named objects the state that `flatten` took. Raises ValueError, and changes nothing, unless it is of such objects."""
    if not isinstance(structure, dict) or structure.keys() != objects.keys():
        raise ValueError(f"checkpoint: got one of other objects, supported by this run: {', '.join(objects)}")
    check_fits(tensors, dict(_declared(structure)) | {name: t.shape for name, t in flatten(objects)[0].items()})
    for name, thing in objects.items():
        thing.load_state_dict(_join(structure[name], tensors))


def check_fits(tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError unless a checkpoint's ``tensors`` hold all of the names of ``shapes``, in these shapes."""
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != tuple(shape):
            got = f"shape {tuple(tensors[name].shape)}" if name in tensors else "none"
            raise ValueError(f"checkpoint: got {got} for {name}, supported by this run: shape {tuple(shape)}")


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a nested state. Tensors move to ``tensors``; dictionaries become pairs, because JSON makes strings of the keys 0, 1, ..."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path, "shape": [*value.shape]}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _split(inner, f"{path}/{key}", tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(inner, f"{path}/{i}", tensors) for i, inner in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_split` split, with lists for tuples."""
    if isinstance(value, list):
        return [_join(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    return tensors[value["tensor"]] if "tensor" in value else {key: _join(inner, tensors) for key, inner in value["pairs"]}


def _declared(value: Any) -> Iterator[tuple[str, Sequence[int]]]:
    """Path and shape of every tensor that a structure speaks of."""
    if isinstance(value, dict) and "tensor" in value:
        yield value["tensor"], value["shape"]
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _declared(inner)


def _previous(path: Path) -> Path:
    return path.with_name(path.name + ".previous")
