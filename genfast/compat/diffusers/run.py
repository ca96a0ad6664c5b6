"""One trajectory under way: what a fused step keeps between its calls, and the launch itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast.ops import _autograd, _backend, solver_step
from genfast.samplers import BrownianPath

from .table import Table


@dataclass(eq=False)
class Run:
    """One trajectory under way: a table, the values kept between its steps, and where it is."""

    table: Table
    begin: int
    times: list[float]  # of its steps, on the host
    timesteps: Tensor  # the same, on the device
    scales: Tensor  # the factors of scale_model_input, on the device
    kind: tuple[Any, ...]  # what `step` was called with, see _kind
    work: torch.dtype
    layout: torch.memory_format
    ring: list[Tensor]
    seeds: Tensor | None
    guided: bool
    counter: Tensor  # (1,) int64 on the device: the next row
    sources: tuple[Any, ...]  # the attributes that the table was made from
    path: BrownianPath | None = None  # where the noise of seeds comes from, if not from the kernel
    k: int = 0  # the next step, as far as the host knows
    on_device: bool = False  # deferred steps have run: only the counter knows the next one
    differentiable: bool = False  # the ring is part of an autograd graph, and no longer written in place

    def __getstate__(self) -> dict[str, Any]:
        # torch.save cannot write a memory format.
        return {**self.__dict__, "layout": str(self.layout).removeprefix("torch.")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, layout=getattr(torch, state["layout"]))

    def execute(self, k: int, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> list[Tensor]:
        """Step ``k``, whose first row the counter points at: new tensors for the fields that it returns."""
        table = self.table
        cond, uncond = self._halves(model_output)
        x = self._worked(sample)
        noise = None if noise is None else self._worked(noise)
        if self.differentiable or _autograd.wanted((sample, model_output)):
            fields = self._differentiable(k, cond, uncond, x, noise)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # no input asks for a derivative
                fields = self._launch(table.count[k], len(table.returned[k]), cond, uncond, x, noise)
        if table.launches > 1:
            self.counter += table.launches - table.count[k]
        self.k = k + 1
        return self._cast(table.returned[k], fields)

    def execute_any(self, model_output: Tensor, sample: Tensor) -> list[Tensor]:
        """The step that the counter points at, by the same operations whichever it is."""
        cond, uncond = self._halves(model_output)
        returned = self.table.returned[0]
        fields = self._launch(self.table.launches, len(returned), cond, uncond, self._worked(sample), None)
        return self._cast(returned, fields)

    def _cast(self, returned: Sequence[int], fields: list[Tensor]) -> list[Tensor]:
        dtypes = self.table.trace.dtypes
        return [t if dtypes[field] is self.work else t.to(dtypes[field]) for field, t in zip(returned, fields, strict=True)]

    def _launch(self, launches: int, returned: int, cond: Tensor, uncond: Tensor | None, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        table = self.table
        fields = [torch.empty_like(x) for _ in range(returned)]
        slots = [x, *self.ring, *([x if noise is None else noise] if table.noisy else []), *fields]
        for _ in range(launches):
            _backend.namespace.solver_step_slots_(
                slots, cond, uncond, table.coef, table.index, self.counter, self.seeds, None, None, False, table.threshold
            )
            self.counter += 1
        return fields

    def _differentiable(self, k: int, cond: Tensor, uncond: Tensor | None, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        table = self.table
        slots = dict(enumerate([x, *self.ring, *([x if noise is None else noise] if table.noisy else [])]))
        for row in range(k * table.launches, k * table.launches + table.count[k]):
            _, outputs, terms, *used = table.index[row].tolist()
            written = solver_step(
                [x, *(slots[slot] for slot in used[:terms])],
                cond,
                table.coef[row],
                table.index[row],
                uncond=uncond,
                seeds=self.seeds,
                outputs=outputs,
                threshold=table.threshold,
            )
            slots.update(zip(used[6 : 6 + outputs], written, strict=True))
        self.counter += table.count[k]
        self.ring, self.differentiable = [slots[1 + j] for j in range(table.ring)], True
        first = 1 + table.ring + table.noisy
        return [slots[first + j] for j in range(len(table.returned[k]))]

    def _halves(self, model_output: Tensor) -> tuple[Tensor, Tensor | None]:
        if model_output.dtype in (torch.bfloat16, torch.float16) and self.work == torch.float64:
            model_output = model_output.float()  # exact; the kernel widens from there
        if not self.guided:
            return model_output.contiguous(memory_format=self.layout), None
        uncond, cond = model_output.contiguous(memory_format=self.layout).chunk(2)
        return cond, uncond

    def _worked(self, t: Tensor) -> Tensor:
        if t.dtype is not self.work:
            t = t.to(self.work)
        return t.contiguous(memory_format=self.layout)
