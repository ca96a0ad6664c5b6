"""All rows that were traced, and how the one is found that fits a scheduler's attributes as they are."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .state import NotLinear, Stamps, content, fits
from .table import Row, pack, split
from .trace import Call, Reading, trace_scale, trace_step

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MAX_ROWS = 8192
_rows: dict[Any, list[Row]] = {}  # by what is cheap to know; which of them fits is seen from what it read
_seen: set[int] = set()  # hashes of steps that came up without a row
_lock = threading.Lock()


def clear() -> None:
    """Forget every row."""
    with _lock:
        _rows.clear()
        _seen.clear()


def when(timestep: Any, timesteps: Any, stamps: Stamps) -> Any:
    """The timestep on the host; for an element of ``timesteps`` on a GPU, without waiting for the device."""
    if not isinstance(timestep, Tensor):
        return timestep
    if timestep.is_cuda and (at := element(timesteps, timestep)) is not None:
        return stamps.host("timesteps", timesteps)[at]
    return timestep.item()


def element(tensor: Any, scalar: Any) -> int | None:
    """Which element of the vector ``tensor`` the scalar is a view of."""
    if not isinstance(scalar, Tensor) or not isinstance(tensor, Tensor) or scalar.ndim != 0 or scalar.dtype != tensor.dtype:
        return None
    if scalar.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return None
    at = int(scalar.storage_offset() - tensor.storage_offset())
    return at if 0 <= at < len(tensor) else None


def kind_of(
    model_output: Tensor, timestep: Any, sample: Tensor, options: Mapping[str, Any], seeded: bool, guidance: Any
) -> tuple[Any, ...]:
    """What a row of `step` is made for, apart from the scheduler's attributes. Raises NotLinear for options that no row can be made for."""
    form = (timestep.dtype, timestep.ndim) if isinstance(timestep, Tensor) else None
    if options:
        for value in options.values():
            if not isinstance(value, int | float | str | None):
                raise NotLinear(
                    "an option that is a tensor" if isinstance(value, Tensor) else f"an option that is a {type(value).__name__}"
                )
    return (
        sample.dtype, sample.device, sample.ndim > 1, model_output.dtype, model_output.device,
        type(timestep), form, tuple(sorted(options.items())) if options else (), seeded, guidance,
    )  # fmt: skip


def scale_kind_of(timestep: Any, sample: Tensor) -> tuple[Any, ...]:
    """The same for a row of scale_model_input."""
    return kind_of(sample, timestep, sample, {}, False, None)


def check(kind: tuple[Any, ...], timestep: Any) -> None:
    """Raise NotLinear for a call that no row can be made for."""
    sample_dtype, device, batched, model_dtype, model_device, _, form, *_ = kind
    if sample_dtype not in DTYPES or model_dtype not in DTYPES:
        raise NotLinear(f"dtypes {sample_dtype} and {model_dtype}")
    if model_device != device:
        raise NotLinear("a model output on another device than the sample")
    if not batched:
        raise NotLinear("a sample of one dimension")
    if form[1] != 0 if form else not isinstance(timestep, int | float):
        raise NotLinear("a timestep that is not one number")


def first_time(scheduler: Any, state: Mapping[str, Any], kind: tuple[Any, ...], timestep: Any) -> bool:
    """Whether no step was asked about before that was of the same class and kind, at the same place of the same grid and configuration."""
    tables = (content(t) for name in ("timesteps", "sigmas") if isinstance(t := state.get(name), Tensor) and t.is_cpu)
    index, number = _index(state), scheduler._stamps.hashed(state["_internal_dict"])
    key = hash((scheduler.stock, kind, index, when(timestep, state.get("timesteps"), scheduler._stamps), number, *tables))
    if key in _seen:
        return False
    with _lock:
        if len(_seen) >= 16 * _MAX_ROWS:
            _seen.clear()
        _seen.add(key)
    return True


def fit(row: Row, scheduler: Any, timestep: Any, sample: Tensor) -> bool:
    """Whether ``row`` is the one of this step."""
    state, stamps = scheduler.__dict__, scheduler._stamps
    return (row.time is None or row.time == when(timestep, state.get("timesteps"), stamps)) and fits(row.reads, state, sample, stamps)


def _index(state: Mapping[str, Any]) -> int | None:
    index = state.get("_step_index", state.get("counter"))
    return index if isinstance(index, int) else None


def find(scheduler: Any, state: Mapping[str, Any], method: str, kind: tuple[Any, ...], timestep: Any, sample: Tensor) -> Row | None:
    """A row of ``method`` that fits ``state``."""
    stamps, index = scheduler._stamps, _index(state)
    for time in (None, when(timestep, state.get("timesteps"), stamps)):
        for row in _rows.get((scheduler.stock, method, kind, index, time), ()):
            if fits(row.reads, state, sample, stamps):
                return row
    return None


def trace(
    scheduler: Any, state: Mapping[str, Any], method: str, kind: tuple[Any, ...], timestep: Any, sample: Tensor, options: Mapping[str, Any]
) -> Row:
    """A row of ``method`` from ``state``, traced now; where that fails, one that says why."""
    reading, row = Reading(), Row(kind=kind)
    stamps, timesteps = scheduler._stamps, state.get("timesteps")
    seeded, guidance = kind[-2:]
    call = Call(timestep, options, kind[0], kind[3], guidance is not None)
    try:
        with torch.inference_mode(False):  # a later step may be differentiable
            if method == "step":
                step = trace_step(scheduler.traced, state, sample.shape, call, stamps, reading)
                if seeded and step.draws:
                    row.draw = _draw(step.writes, call, timesteps, stamps)
                    if "_step_index" not in state:
                        reading.reads = (*reading.reads, ("timesteps", stamps.content("timesteps", timesteps)))
                pack(row, step, seeded, guidance or 1.0, sample.device, call)
            else:
                row.scale, writes = trace_scale(scheduler.stock, state, sample.shape, call, stamps, reading)
                row.plain, row.writes = split(writes)
    except Exception as error:
        row.refusal = str(error) or type(error).__name__
    row.reads = reading.reads
    row.time = when(call.timestep, timesteps, stamps) if reading.timed else None
    index = _index(state)
    with _lock:
        if sum(map(len, _rows.values())) >= _MAX_ROWS:
            _rows.clear()
        _rows.setdefault((scheduler.stock, method, kind, index, row.time), []).append(row)
    return row


def _draw(writes: Any, call: Call, timesteps: Any, stamps: Stamps) -> int:
    """The number of a step's noise: its place among the timesteps, from 1."""
    for name, item in writes:
        if name == "_step_index":
            return int(item.value)
    times = stamps.host("timesteps", timesteps)
    time = when(call.timestep, timesteps, stamps)
    if time not in times:
        raise NotLinear("a timestep that is not among the scheduler's")
    return times.index(time) + 1
