"""The loop of every sampler: evaluate the network, execute one row of the plan, and draw noise where upstream draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast.ops import _backend, pack_row, solver_step
from genfast.ops._checks import check_floating, refusal
from genfast.reference.solver_step import layout_of
from genfast.samplers import Row

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]
ExtraArgs = Mapping[str, Any] | None
# For every evaluation of one step, whether noise is drawn after it.
Draws = tuple[bool, ...]

STEP_START = -1  # the slot that holds the state as it was at the start of the step; rows read it and never write it


@dataclass(frozen=True)
class Packed:
    """Rows ready for the kernel. Their integers count the tensors of a launch: the state, what the row reads, what it writes."""

    coef: Tensor  # (rows, 40), float64 for float64 states, else float32
    index: Tensor  # (rows, 12) int64
    counters: Sequence[Tensor]  # (1,) int64, the number of every row
    sigma: Tensor  # (rows,) float64 in host memory, where the network is evaluated
    reads: Sequence[Sequence[int]]
    writes: Sequence[Sequence[int]]


@lru_cache(maxsize=64)
def _counters(rows: int, device: torch.device) -> Sequence[Tensor]:
    return list(torch.arange(rows, device=device).split(1))


def pack(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> Packed:
    """Pack rows for states of ``dtype`` on ``device`` and a network that returns the denoised x. Terms of zero are left out."""
    outputs = [{slot: {key: c for key, c in terms.items() if c != 0} for slot, terms in row.outputs.items()} for row in rows]
    reads = [list(dict.fromkeys(key for terms in out.values() for key in terms if isinstance(key, int))) for out in outputs]
    packed = []
    for out, read in zip(outputs, reads, strict=True):
        at = {slot: 1 + j for j, slot in enumerate(read)}
        renumbered = {
            1 + len(read) + j: {at[key] if isinstance(key, int) else key: c for key, c in terms.items()}
            for j, terms in enumerate(out.values())
        }
        packed.append(pack_row(convert=(0.0, 1.0), outputs=renumbered))
    wide = np.float64 if dtype == torch.float64 else np.float32  # by numpy, which reads lists faster
    return Packed(
        torch.from_numpy(np.array([floats for floats, _ in packed], dtype=wide)).to(device),
        torch.from_numpy(np.array([integers for _, integers in packed])).to(device),
        _counters(len(rows), device),
        torch.tensor([row.point.sigma for row in rows], dtype=torch.float64),
        reads,
        [list(out) for out in outputs],
    )


def _derivatives() -> bool:
    """Whether a derivative may be wanted: the samplers' no_grad does not stop forward-mode tangents."""
    tangents = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return tangents or torch.is_grad_enabled() or torch.compiler.is_compiling()


class Launcher:
    """Executes packed rows on states like ``x``. A row's outputs are new tensors, as upstream's are: what a callback keeps stays.

    What does not change from row to row is looked at once: with small latents the checks would take longer than the kernel.
    """

    def __init__(self, x: Tensor, rows: Packed) -> None:
        self.like, self.layout, self.rows = x, layout_of(x), rows
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.derivatives = _derivatives()
        self.launch = _backend.namespace.solver_step_slots_

    def dense(self, t: Tensor) -> Tensor:
        """``t`` in the dtype, shape and layout of the state."""
        return t.to(self.like).expand_as(self.like).contiguous(memory_format=self.layout)

    def _fit(self, denoised: Tensor) -> Tensor:
        if denoised.shape != self.shape:  # twice the batch would pass for both halves of guidance
            raise refusal("model", f"an output of shape {tuple(denoised.shape)}", f"{tuple(self.shape)}, that of x")
        if denoised.device != self.device:
            raise refusal("model", f"an output on {denoised.device}", f"{self.device}, the device of x")
        check_floating("model", denoised)
        if denoised.dtype == torch.float64:
            raise refusal("model", f"an output in torch.float64 for x in {self.dtype}", "float32, bfloat16 or float16 for that x")
        return denoised.double() if self.dtype == torch.float64 else denoised

    def __call__(self, k: int, slots: dict[int, Tensor], denoised: Tensor) -> None:
        """Row ``k``: replace what it writes in ``slots``. Raises ValueError for a ``denoised`` that does not fit the state."""
        if denoised.dtype != self.dtype or denoised.shape != self.shape or denoised.device != self.device:
            denoised = self._fit(denoised)
        rows, writes = self.rows, self.rows.writes[k]
        read = [slots[0], *[slots[slot] for slot in rows.reads[k]]]
        if self.derivatives:
            new = solver_step(read, denoised, rows.coef[k], rows.index[k], outputs=len(writes))
        else:
            new = [torch.empty_like(self.like, memory_format=self.layout) for _ in writes]
            denoised = denoised.contiguous(memory_format=self.layout)
            arguments = (None, rows.coef, rows.index, rows.counters[k], None, None, None, False, False)
            with torch._C._AutoDispatchBelowAutograd():  # no derivative is wanted, and nobody else holds the new tensors
                self.launch(read + new, denoised, *arguments)
        for slot, tensor in zip(writes, new, strict=True):
            slots[slot] = tensor


def run(
    model: Model,
    x: Tensor,
    rows: Packed,
    draws: Sequence[Draws],
    levels: Tensor,
    extra_args: ExtraArgs,
    bar: Iterable[int],
    draw: Callable[[int, int, int], Tensor],
    noise_slot: int | None,
    on_step: Callable[[int, int, Tensor, Tensor], object] | None,
    on_evaluation: Callable[[], object] | None = None,
    slope_first: bool = False,
) -> dict[int, Tensor]:
    """Run the rows and return the slots as they end; slot 0 is the state.

    ``draws`` groups the rows into steps, over which ``bar`` counts; noise drawn after an evaluation is at hand to its row.
    ``levels`` (rows,) are the sigmas the network is fed, in x's dtype. ``draw(i, first, k)`` draws for row k of step i, which row
    ``first`` starts. ``on_step(i, first, x, denoised)`` is called after the first evaluation of every step, ``on_evaluation()`` after each.
    What on_step writes into its tensors counts, as it does upstream: with ``slope_first`` for the state alone, because there the slope
    (x - denoised) / sigma is taken before the callback.
    """
    extra_args = {} if extra_args is None else extra_args
    launch = Launcher(x, rows)
    fed = (levels[:, None] * x.new_ones([x.shape[0]])).unbind()
    slots = {0: x.contiguous(memory_format=launch.layout)}
    k = 0
    for i in bar:
        first, slots[STEP_START] = k, slots[0]
        for drawn in draws[i]:
            denoised = model(slots[0], fed[k], **extra_args)
            if not isinstance(denoised, Tensor):
                raise refusal("model", f"an output that is a {type(denoised).__name__}", "a tensor shaped like x")
            if on_evaluation is not None:
                on_evaluation()
            if on_step is not None and k == first:
                before = (slots[0].clone(), denoised.clone()) if slope_first and denoised.shape == x.shape else None
                on_step(i, k, slots[0], denoised)
                if before is not None:
                    denoised = before[1] + (slots[0] - before[0])  # the old slope at the state as it is now; exact where nothing changed
            if drawn:
                noise = draw(i, first, k)
                if noise_slot is not None:
                    slots[noise_slot] = launch.dense(noise)
            launch(k, slots, denoised)
            k += 1
    return slots
