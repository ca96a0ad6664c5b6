"""Which operators the wrappers call, and what runs on a device that has no kernels."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from genfast import _library, reference
from genfast.reference.solver_step import layout_of

STEP_OPTIONS = (
    "Tensor cond, Tensor? uncond, Tensor coef, Tensor index, Tensor counter, Tensor? seeds, "
    "Tensor(b!)? model_input, Tensor(c!)? watch, bool rescale, bool threshold) -> ()"
)
SCHEMAS = {
    "noise_": "(Tensor(a!) out, Tensor seeds, int draw, int stream, bool uniform) -> ()",
    "solver_step_": f"(Tensor(a!) ring, {STEP_OPTIONS}",
    "solver_step_slots_": f"(Tensor(a!)[] slots, {STEP_OPTIONS}",
    "solver_step": "(Tensor[] inputs, Tensor cond, Tensor? uncond, Tensor coef, Tensor index, Tensor counter, Tensor? seeds, "
    "int outputs, bool rescale, bool threshold) -> Tensor[]",
}
for _name, _schema in SCHEMAS.items():
    _library.define(_name, _schema)
_library.load()

namespace: Any = torch.ops.genfast  # genfast.testing points it at the emulated CUDA kernels
implementations = torch.library.Library("genfast", "IMPL")
_warned: set[str] = set()


def define(schemas: dict[str, str], fallbacks: dict[str, Callable[..., Any]], fakes: dict[str, Callable[..., Any]]) -> None:
    """Define operators: their schemas, what runs where no kernel is loaded, and the fakes of those that return something."""
    for name, schema in schemas.items():
        _library.define(name, schema)
        implementations.impl(name, fallbacks[name], "CompositeExplicitAutograd")
        torch.library.register_fake(f"genfast::{name}", fakes.get(name, lambda *_: None), lib=implementations)


def reference_runs(device: torch.device) -> None:
    if device.type not in _warned:
        _warned.add(device.type)
        state = getattr(_library.loaded, device.type, "no kernels for this device type")
        warnings.warn(f"genfast: no kernels for {device.type!r} tensors ({state}); the pure PyTorch reference runs instead", stacklevel=2)


def _noise_(out: Tensor, seeds: Tensor, draw: int, stream: int, uniform: bool) -> None:
    reference_runs(out.device)
    fill = reference.uniform if uniform else reference.normal
    out.copy_(fill(seeds, out.shape, draw=draw, stream=stream, dtype=out.dtype))


def _check_row(index: Tensor, row: int, slots: int) -> None:
    """What the kernels' launchers check in host memory: Python's negative indices must not pass for slots or rows."""
    if not 0 <= row < len(index):
        raise RuntimeError(f"counter: got {row}, supported: 0 to {len(index) - 1}")
    draw, outputs, terms, *used = index[row].tolist()
    for slot in (*used[:terms], *used[6 : 6 + outputs]):
        if not 0 <= slot < slots:
            raise RuntimeError(f"index: got slot {slot}, supported: 0 to {slots - 1}")
    if not 0 <= draw < 2**32:
        raise RuntimeError(f"index: got draw {draw}, supported: 0 to 2**32 - 1")


def _solver_step_(
    ring: Tensor | list[Tensor],
    cond: Tensor,
    uncond: Tensor | None,
    coef: Tensor,
    index: Tensor,
    counter: Tensor,
    seeds: Tensor | None,
    model_input: Tensor | None,
    watch: Tensor | None,
    rescale: bool,
    threshold: bool,
) -> None:
    reference_runs(cond.device)
    _check_row(index, int(counter), len(ring))
    options = {"uncond": uncond, "seeds": seeds, "model_input": model_input, "watch": watch}
    reference.solver_step_(ring, cond, coef, index, counter, **options, rescale=rescale, threshold=threshold)


@functools.lru_cache
def _positions(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a row's integers are multiplied by and what is added, so that only the draw stays and slots count the given tensors."""
    history = list(range(1, inputs)) + [0] * (7 - inputs)
    written = list(range(inputs, inputs + outputs)) + [0] * (3 - outputs)
    keep = torch.tensor([1] + [0] * 11, device=device)
    return keep, torch.tensor([0, outputs, inputs - 1, *history, *written], device=device)


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))


def _solver_step(
    inputs: list[Tensor],
    cond: Tensor,
    uncond: Tensor | None,
    coef: Tensor,
    index: Tensor,
    counter: Tensor,
    seeds: Tensor | None,
    outputs: int,
    rescale: bool,
    threshold: bool,
) -> list[Tensor]:
    layout = layout_of(inputs[0])
    out = [_dense_like(inputs[0]) for _ in range(outputs)]
    slots = [t.contiguous(memory_format=layout) for t in inputs] + out
    cond = cond.contiguous(memory_format=layout)
    uncond = None if uncond is None else uncond.contiguous(memory_format=layout)
    keep, positions = _positions(len(inputs), outputs, index.device)
    index = index * keep + positions
    namespace.solver_step_slots_(slots, cond, uncond, coef, index, counter, seeds, None, None, rescale, threshold)
    return out


# A kernel loaded for a device takes precedence over these.
implementations.impl("noise_", _noise_, "CompositeExplicitAutograd")
implementations.impl("solver_step_", _solver_step_, "CompositeExplicitAutograd")
implementations.impl("solver_step_slots_", _solver_step_, "CompositeExplicitAutograd")
implementations.impl("solver_step", _solver_step, "CompositeExplicitAutograd")


def _fake_solver_step(inputs: list[Tensor], cond: Tensor, *options: object) -> list[Tensor]:
    outputs = options[5]
    assert isinstance(outputs, int)
    return [_dense_like(inputs[0]) for _ in range(outputs)]


for _name in ("noise_", "solver_step_", "solver_step_slots_"):
    torch.library.register_fake(f"genfast::{_name}", lambda *_: None, lib=implementations)
torch.library.register_fake("genfast::solver_step", _fake_solver_step, lib=implementations)
