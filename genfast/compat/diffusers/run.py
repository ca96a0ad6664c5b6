"""Rows executed: one at a time on the scheduler's own attributes, and by a counter on the device for steps that run later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genfast.ops import _autograd, _backend, solver_step
from genfast.reference.solver_step import layout_of

from .state import at_path, write
from .table import Row, Table

_SMALL = 1 << 16  # elements


def execute(
    row: Row,
    state: dict[str, Any],
    model_output: Tensor,
    timestep: Any,
    sample: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    guided: bool,
) -> list[Tensor]:
    """One step: new tensors for the fields that it returns, and ``state`` as the stock step leaves it."""
    if row.slope is not None and not guided and sample.numel() <= _SMALL:
        state.update(row.plain)
        return [sample + model_output * row.slope]  # the same bits; a launch takes longer to call
    work, layout = row.work, torch.contiguous_format if sample.is_contiguous() else layout_of(sample)
    cond, uncond = halves(model_output, guided, work, layout)
    slots = [in_form(sample, work, layout)]
    for path in row.inputs:
        slots.append(in_form(at_path(state, path), work, layout))
    if row.noisy:
        slots.append(slots[0] if noise is None else in_form(noise, work, layout))
    if _autograd.wanted((model_output, *slots)):
        made = _differentiable(row, slots, cond, uncond, seeds)
    else:
        made = [torch.empty_like(slots[0]) for _ in range(row.outputs)]
        slots += made
        launch = _backend.namespace.solver_step_slots_
        with torch._C._AutoDispatchBelowAutograd():  # no input asks for a derivative
            for coef, index, counter in row.launches:
                launch(slots, cond, uncond, coef, index, counter, seeds, None, None, False, row.threshold)
    step = row.step
    if row.casts:
        dtypes = [step.dtypes[k] for k in row.returned] + list(step.kept_dtypes)
        made = [t.to(dtype) for t, dtype in zip(made, dtypes, strict=True)]
    fields = made[: len(row.returned)]
    if row.writes:
        named = {"sample": sample, "model": model_output, "time": timestep, "shape": sample.shape, "new": made[len(fields) :]}
        named["field"] = dict(zip(row.returned, fields, strict=True))
        write(state, row.writes, named)
    state.update(row.plain)
    return fields


def _differentiable(row: Row, slots: Sequence[Tensor], cond: Tensor, uncond: Tensor | None, seeds: Tensor | None) -> list[Tensor]:
    made: list[Tensor] = []
    for coef, index, _ in row.launches:
        _, outputs, terms, *used = index[0].tolist()
        made += solver_step(
            [slots[0], *(slots[slot] for slot in used[:terms])], cond, coef, index,
            uncond=uncond, seeds=seeds, outputs=outputs, threshold=row.threshold,
        )  # fmt: skip
    return made


def halves(model_output: Tensor, guided: bool, work: torch.dtype, layout: torch.memory_format) -> tuple[Tensor, Tensor | None]:
    if work is torch.float64 and model_output.dtype in (torch.bfloat16, torch.float16):
        model_output = model_output.float()  # exact; the kernel widens from there
    if not guided:
        return model_output.contiguous(memory_format=layout), None
    uncond, cond = model_output.contiguous(memory_format=layout).chunk(2)
    return cond, uncond


def in_form(t: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return (t if t.dtype is dtype else t.to(dtype)).contiguous(memory_format=layout)


@dataclass(eq=False)
class Run:
    """A trajectory prepared for steps that run later, compiled or in a CUDA graph: only ``counter`` depends on which it is.

    What is kept between those steps is in ``ring``; the scheduler's attributes are as after step ``k`` and catch up later.
    """

    table: Table
    begin: int  # its first step among the timesteps
    timesteps: Tensor  # of its steps, on the device
    scales: Tensor  # the factors of scale_model_input, on the device
    kind: tuple[Any, ...]  # what `step` was called with
    sources: tuple[Any, ...]  # the attributes that compiled code looks at, by identity
    shape: torch.Size
    layout: torch.memory_format
    ring: list[Tensor]
    seeds: Tensor | None
    guided: bool
    counter: Tensor  # (1,) int64 on the device: the next row
    k: int = 0
    on_device: bool = False  # deferred steps have run: only the counter knows the next one
    attached: bool = False  # what is kept is part of an autograd graph
    left: dict[str, Any] = field(default_factory=dict)  # what the attributes held when they were last those of step `k`

    def __getstate__(self) -> dict[str, Any]:
        # torch.save cannot write a memory format.
        return {**self.__dict__, "layout": str(self.layout).removeprefix("torch.")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, layout=getattr(torch, state["layout"]))

    def execute(self, model_output: Tensor, sample: Tensor) -> list[Tensor]:
        """The step that the counter points at, by the same operations whichever it is."""
        table, row = self.table, self.table.rows[0]
        cond, uncond = halves(model_output, self.guided, row.work, self.layout)
        x = in_form(sample, row.work, self.layout)
        fields = [torch.empty_like(x) for _ in row.returned]
        slots = [x, *self.ring, *fields]
        for _ in range(table.launches):
            _backend.namespace.solver_step_slots_(
                slots, cond, uncond, table.coef, table.index, self.counter, self.seeds, None, None, False, row.threshold
            )
            self.counter += 1
        return [t.to(row.step.dtypes[k]) for k, t in zip(row.returned, fields, strict=True)]

    def load(self, state: Mapping[str, Any]) -> None:
        """Step ``k`` is next, and the ring holds what the attributes do."""
        with torch.no_grad():
            for path, slot in self.table.held[self.k].items():
                kept = at_path(state, path)
                if kept is not self.ring[slot - 1]:
                    self.ring[slot - 1].copy_(kept)
                self.attached |= kept.requires_grad
        self.counter.fill_(self.k * self.table.launches)
        self.left = self._now(state)

    def _now(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What the attributes that the steps write hold, by identity and version."""
        now = {}
        for name in {name for row in self.table.rows for name in (*row.plain, *(name for name, _ in row.writes))}:
            value = state.get(name)
            items = value if type(value) is list else [value]
            now[name] = [(i, i._version if isinstance(i, Tensor) and not i.is_inference() else 0) for i in items]
        return now

    def _check_untouched(self, state: Mapping[str, Any]) -> None:
        for name, now in self._now(state).items():
            was = self.left[name]
            if len(was) != len(now) or any(a is not b or m != n for (a, m), (b, n) in zip(was, now, strict=True)):
                got = "a change while the attributes were behind the steps that ran under torch.compile or in a CUDA graph"
                raise ValueError(f"{name}: got {got}, supported: one after _step_index was read")

    def settle(self, state: dict[str, Any], timesteps: Tensor) -> None:
        """Leave in ``state`` what the steps that ran on the device have left. Waits for it.

        Raises ValueError if somebody changed one of the attributes meanwhile.
        """
        self._check_untouched(state)
        done = int(self.counter) // self.table.launches
        for k in range(self.k, done):
            row = self.table.rows[k]
            named: dict[str, Any] = {"time": timesteps[self.begin + k], "shape": self.shape, "field": {}, "new": {}}
            for item, slot in self.table.created[k].items():
                kept = self.ring[slot - 1]
                if item.kind == "new":
                    kept = kept.to(row.step.kept_dtypes[item.value])
                if item.value is None:
                    named[item.kind] = kept
                else:
                    named[item.kind][item.value] = kept
            write(state, row.writes, named)
            state.update(row.plain)
        self.k, self.on_device, self.left = done, False, self._now(state)
