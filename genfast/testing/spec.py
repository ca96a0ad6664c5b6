"""What an operator promises, as data; tests/test_specs.py holds it to that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One set of inputs: ``make(dtype)`` gives the operator's arguments by name, contiguous and on the CPU."""

    name: str
    make: Callable[[torch.dtype], Arguments]


@dataclass(frozen=True)
class BadInput:
    """A change to the first case's arguments, and the sentence that refuses it (a part of it)."""

    name: str
    change: Callable[[Arguments], Arguments]
    message: str
    error: type[Exception] = ValueError


@dataclass(frozen=True)
class OpSpec:
    """An operator's name in `genfast.ops` and `genfast.reference`, its inputs and its promises."""

    name: str
    cases: Sequence[Case]
    benchmarks: Sequence[Case]  # the shapes that are timed
    bad: Sequence[BadInput]
    batched: Sequence[str]  # arguments whose first dimension is the batch, or is a multiple of it
    dtypes: Sequence[torch.dtype] = FLOATS
    mutates: Sequence[str] = ()  # arguments that are overwritten; an operator without any returns its results
    stacked: Sequence[str] = ()  # arguments whose second dimension is the batch
    differentiable: Sequence[str] = ()  # arguments with derivatives
    twice: Sequence[str] = field(default=())  # names of the cases that are smooth, so that second derivatives can be checked
    bits: bool = True  # the results are the reference's, bit for bit; else as close as the oracle asks

    def call(self, namespace: ModuleType, arguments: Mapping[str, Any]) -> list[Tensor]:
        """What the operator in ``namespace`` gives; ``arguments`` stay as they are."""
        given = {key: copy(value) if key in self.mutates else value for key, value in arguments.items()}
        result = getattr(namespace, self.name)(**given)
        if self.mutates:
            return [t for key in self.mutates for t in tensors_in(given.get(key))]
        return tensors_in(result)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an argument: itself, a sequence's, or none."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list | tuple) else []


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to the tensors in it."""
    if isinstance(value, Tensor):
        return change(value)
    return [change(t) for t in value] if isinstance(value, list) and tensors_in(value) else value


def copy(value: Any) -> Any:
    return change_tensors(value, torch.clone)


def widened(arguments: Mapping[str, Any]) -> Arguments:
    """The same arguments in float64."""

    def widen(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    wide = {key: change_tensors(value, widen) for key, value in arguments.items()}
    return {key: torch.float64 if isinstance(value, torch.dtype) else value for key, value in wide.items()}


def laid_out(spec: OpSpec, arguments: Mapping[str, Any], layout: torch.memory_format) -> Arguments:
    """The same arguments with every image-shaped tensor, or the format asked for, in ``layout``."""

    def image(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=layout) if t.ndim == 4 and t.is_floating_point() else t

    def ring(t: Tensor) -> Tensor:
        return image(t.flatten(0, 1)).view(t.shape)

    def lay(key: str, value: Any) -> Any:
        if isinstance(value, torch.memory_format):
            return layout if len(arguments["shape"]) == 4 else value
        return change_tensors(value, ring if key in spec.stacked and isinstance(value, Tensor) and value.ndim == 5 else image)

    return {key: lay(key, value) for key, value in arguments.items()}
