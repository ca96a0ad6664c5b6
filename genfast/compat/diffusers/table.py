"""A trace packed into the coefficient rows of docs/solver-step.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast.ops.solver_step import MAX_OUTPUTS, MAX_SLOTS, ROW_FLOATS, pack_row

from .trace import NotLinear, Step, Term, Trace


@dataclass(frozen=True)
class Table:
    """The rows of one trajectory, ``launches`` to a step.

    The slots are the sample, the ring, one of noise if ``noisy``, and what is returned.
    """

    trace: Trace
    coef: Tensor  # (steps * launches + 1, 40), the last row all NaN: for a timestep that is not there
    index: Tensor  # (steps * launches + 1, 12)
    launches: int
    count: Sequence[int]  # of every step, how many of its launches do something
    returned: Sequence[tuple[int, ...]]  # of every step, the fields that are not None
    used: Sequence[int | None]  # of every step, the draw that its rows read
    ring: int
    slots: Mapping[int, int]  # of every value that is kept
    initial: Mapping[int, tuple[str, int | None]]  # slots that hold an attribute's value at the start
    noisy: bool
    threshold: bool

    def __deepcopy__(self, memo: Any) -> Table:
        return self


def build(trace: Trace, *, seeded: bool, guidance: float, wide: torch.dtype, device: torch.device, lasting: str = "") -> Table:
    """Pack ``trace``. ``seeded``: the kernel makes the noise, draw k + 1 in step k; else it is read from a slot.

    What the attribute ``lasting`` holds at the end is kept as well.

    Raises NotLinear where a step needs more than a row holds.
    """
    left = {value for (name, _), value in trace.steps[-1].held.items() if name == lasting} if lasting else set()
    live = _live(trace, left)
    slots, ring = _allocate(trace, live)
    used = [_used_draw(step) for step in trace.steps]
    noisy = not seeded and any(step.draws for step in trace.steps)
    first_returned = 1 + ring + noisy
    returned = [tuple(k for k, field in enumerate(step.returned) if field is not None) for step in trace.steps]
    if first_returned + max(map(len, returned)) > MAX_SLOTS:
        raise NotLinear(f"{ring} tensors kept between steps")

    def row_terms(vector: Mapping[Term, float]) -> dict[Term, float]:
        terms: dict[Term, float] = {}
        for term, c in vector.items():
            if isinstance(term, int):
                terms[slots[term]] = c
            elif term.startswith("noise"):
                terms["noise" if seeded else 1 + ring] = c
            else:
                terms[term] = c
        return terms

    steps: list[list[dict[int, dict[Term, float]]]] = []
    for step, fields, alive in zip(trace.steps, returned, live, strict=True):
        outputs: list[tuple[int, dict[Term, float]]] = [
            (first_returned + at, row_terms(step.returned[field] or {})) for at, field in enumerate(fields)
        ]
        outputs += [(slots[value], row_terms(vector)) for value, vector in step.kept.items() if value in alive]
        steps.append([dict(outputs[k : k + MAX_OUTPUTS]) for k in range(0, len(outputs), MAX_OUTPUTS)])
    launches = max(map(len, steps))
    rows = []
    try:
        for k, (step, groups) in enumerate(zip(trace.steps, steps, strict=True)):
            convert = {"convert": step.convert, "clip": step.clip, "quantile": step.quantile, "max_threshold": step.max_threshold}
            nothing = [{first_returned: {first_returned: 1.0}}] * (launches - len(groups))
            for group in [*groups, *nothing]:
                rows.append(pack_row(outputs=group, guidance=guidance, draw=k + 1 if seeded else 0, **convert))  # type: ignore[arg-type]
    except ValueError as error:
        raise NotLinear(str(error)) from None
    missing = pack_row(convert=(0.0, 0.0), outputs={first_returned + k: {"x": 1.0} for k in range(len(returned[0]))})
    coef = torch.tensor([floats for floats, _ in rows] + [[float("nan")] * ROW_FLOATS], dtype=wide)
    return Table(
        trace=trace,
        coef=coef.to(device),
        index=torch.tensor([integers for _, integers in [*rows, missing]]).to(device),
        launches=launches,
        count=[len(groups) for groups in steps],
        returned=returned,
        used=used,
        ring=ring,
        slots=slots,
        initial={slots[value]: path for value, path in trace.initial.items() if value in slots},
        noisy=noisy,
        threshold=any(step.quantile for step in trace.steps),
    )


def _reads(step: Step, alive: set[int]) -> set[int]:
    vectors = [field for field in step.returned if field is not None] + [v for value, v in step.kept.items() if value in alive]
    return {term for vector in vectors for term in vector if isinstance(term, int)}


def _live(trace: Trace, left: Set[int] = frozenset()) -> list[set[int]]:
    """For every step, the values that some later step reads or that are ``left`` at the end."""
    alive = set(left)
    result = []
    for step in reversed(trace.steps):
        result.append(set(alive))
        alive = alive - step.kept.keys() | _reads(step, alive)
    return result[::-1]


def _allocate(trace: Trace, live: list[set[int]]) -> tuple[dict[int, int], int]:
    """A slot of the ring for every value that is read, reused as soon as its value is not needed; and how many there are."""
    before = live[0] - trace.steps[0].kept.keys() | _reads(trace.steps[0], live[0])
    slots = {value: k + 1 for k, value in enumerate(sorted(before))}
    held = dict(slots)
    for step, alive in zip(trace.steps, live, strict=True):
        created = [value for value in step.kept if value in alive]
        # With several launches a step, a slot that a later one reads must not be written by an earlier one.
        several = len(created) + sum(field is not None for field in step.returned) > MAX_OUTPUTS
        busy = alive | (_reads(step, alive) if several else set())
        taken = {slot for value, slot in held.items() if value in busy}
        held = {value: slot for value, slot in held.items() if value in alive}
        for value in created:
            slot = next(k for k in range(1, len(taken) + 2) if k not in taken)
            taken.add(slot)
            slots[value] = held[value] = slot
    return slots, max(slots.values(), default=0)


def _used_draw(step: Step) -> int | None:
    vectors = [field for field in step.returned if field is not None] + list(step.kept.values())
    used = {int(term[5:]) for vector in vectors for term in vector if isinstance(term, str) and term.startswith("noise")}
    if len(used) > 1:
        raise NotLinear("two draws of noise in one step")
    return next(iter(used), None)
