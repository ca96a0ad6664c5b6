"""Traced steps packed into the coefficient rows of docs/solver-step.md: one by one, and a whole trajectory in one table."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genfast.ops.solver_step import MAX_OUTPUTS, MAX_SLOTS, ROW_FLOATS, pack_row

from .state import Item, ListOf, NotLinear, Path, Reads, Writes
from .trace import Call, Step, Term, Vector

Outputs = list[tuple[int, dict[Term, float]]]  # slots with their terms


@dataclass(eq=False)
class Row:
    """One step that was traced: what it read, and the launches that equal it. Nothing in it changes but ``next``.

    The slots are the sample, the kept tensors that are read, one of noise if ``noisy``, what is returned and what is made for keeping.
    """

    kind: tuple[Any, ...]  # what the step was called with
    reads: Reads = ()
    time: Any = None  # the timestep, where the step looked at it
    refusal: str = ""  # why the stock step runs instead
    step: Any = None  # the Step
    draw: int = 0
    scale: float = 1.0  # of a row of scale_model_input
    plain: dict[str, Any] = field(default_factory=dict)  # numbers and the like that attributes hold afterwards
    writes: Writes = ()  # the other attributes
    outputs: int = 0
    slope: Tensor | None = None  # () on the CPU: the step is x + slope * m, in float32 or float64, and no more
    launches: Sequence[tuple[Tensor, Tensor, Tensor]] = ()  # coef (1, 40), index (1, 12), counter (1,)
    inputs: Sequence[Path] = ()  # the kept tensors that the launches read, slots 1 ..
    returned: Sequence[int] = ()  # the fields that are not None
    used: int | None = None  # the draw that the launches read
    noisy: bool = False
    threshold: bool = False
    work: torch.dtype = torch.float32
    casts: bool = False  # some output is not of the dtype that the launches work in
    next: Row | None = field(default=None, repr=False)  # the row that came after this one last time

    def __deepcopy__(self, memo: Any) -> Row:
        return self


def split(writes: Writes) -> tuple[dict[str, Any], Writes]:
    """The attributes that are left with a number, a string or nothing, and the others."""
    plain = {name: i.value for name, i in writes if isinstance(i, Item) and i.kind == "const" and not isinstance(i.value, Tensor)}
    return plain, [(name, recipe) for name, recipe in writes if name not in plain]


@functools.cache
def _counter(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


def pack(row: Row, step: Step, seeded: bool, guidance: float, device: torch.device, call: Call) -> None:
    """Fill in the launches of ``row``. ``seeded``: the kernel makes the noise of draw ``row.draw``; else it is read from a slot.

    Raises NotLinear where the step needs more than rows hold.
    """
    row.step, row.outputs = step, len(_vectors(step))
    row.plain, row.writes = split(step.writes)
    used = sorted({term for vector in _vectors(step) for term in vector if isinstance(term, int)})
    row.inputs = [step.inputs[k] for k in used]
    row.used = _used_draw(step)
    row.noisy = not seeded and bool(step.draws)
    row.returned = tuple(k for k, f in enumerate(step.returned) if f is not None)
    row.threshold = step.quantile > 0
    row.work = functools.reduce(torch.promote_types, step.dtypes, call.sample_dtype)
    if call.model_dtype == torch.float64:
        row.work = torch.float64
    row.casts = {*step.dtypes, *step.kept_dtypes} != {row.work}
    vector = (step.returned[0] or {}) if row.outputs == 1 else {}
    exact = call.sample_dtype == call.model_dtype in (torch.float32, torch.float64) and not row.casts
    if exact and vector.keys() == {"x", "m"} and vector["x"] == 1.0 and not (row.writes or row.noisy):
        row.slope = torch.tensor(vector["m"], dtype=call.sample_dtype)
    slots = {k: 1 + at for at, k in enumerate(used)}
    noise: Term = "noise" if seeded else 1 + len(used)
    first = 1 + len(used) + row.noisy
    vectors = [step.returned[k] or {} for k in row.returned] + list(step.kept)
    if first + len(vectors) > MAX_SLOTS:
        raise NotLinear(f"{len(used)} tensors kept between steps")
    outputs = [(first + at, _terms(vector, slots, noise)) for at, vector in enumerate(vectors)]
    wide = row.work if row.work == torch.float64 else torch.float32
    row.launches = []
    with torch.inference_mode(False):
        for k in range(0, len(outputs), MAX_OUTPUTS):
            floats, integers = _packed(step, outputs[k : k + MAX_OUTPUTS], guidance, row.draw if seeded else 0)
            coef, index = torch.tensor([floats], dtype=wide).to(device), torch.tensor([integers]).to(device)
            row.launches.append((coef, index, _counter(device)))


def _packed(step: Step, outputs: Outputs, guidance: float, draw: int) -> tuple[list[float], list[int]]:
    try:
        return pack_row(
            outputs=dict(outputs), guidance=guidance, draw=draw, convert=step.convert, clip=step.clip, quantile=step.quantile,
            max_threshold=step.max_threshold,
        )  # fmt: skip
    except ValueError as error:
        raise NotLinear(str(error)) from None


def _vectors(step: Step) -> list[Vector]:
    return [f for f in step.returned if f is not None] + list(step.kept)


def _terms(vector: Vector, slots: Mapping[int, int], noise: Term) -> dict[Term, float]:
    terms: dict[Term, float] = {}
    for term, c in vector.items():
        key: Term = slots[term] if isinstance(term, int) else noise if term.startswith("noise") else term
        terms[key] = c
    return terms


def _used_draw(step: Step) -> int | None:
    used = {int(term[5:]) for vector in _vectors(step) for term in vector if isinstance(term, str) and term.startswith("noise")}
    if len(used) > 1:
        raise NotLinear("two draws of noise in one step")
    return next(iter(used), None)


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a trajectory, ``launches`` to a step, for steps that run later, whichever they then are.

    The slots are the sample, the ring, and what is returned. What earlier steps kept is in the ring.
    """

    rows: Sequence[Row]
    coef: Tensor  # (steps * launches + 1, 40), the last row all NaN: for a timestep that is not there
    index: Tensor  # (steps * launches + 1, 12)
    launches: int
    ring: int
    held: Sequence[Mapping[Path, int]]  # before every step and after the last, which slot of the ring (1 ..) an attribute's tensor is in
    created: Sequence[Mapping[Item, int]]  # of every step, the slots that it writes

    def __deepcopy__(self, memo: Any) -> Table:
        return self


def table(rows: Sequence[Row], paths: Sequence[Path], *, seeded: bool, guidance: float, device: torch.device) -> Table:
    """``rows`` in one table. ``paths`` are the attributes that hold a kept tensor before the first.

    Raises NotLinear where the ring has too many slots.
    """
    held: list[dict[Path, int]] = [{path: 1 + k for k, path in enumerate(paths)}]
    created: list[dict[Item, int]] = []
    for row in rows:
        after, new = _placed(row, held[-1])
        held.append(after)
        created.append(new)
    ring = max((slot for slots in held for slot in slots.values()), default=0)
    if 1 + ring + max(len(row.returned) for row in rows) > MAX_SLOTS:
        raise NotLinear(f"{ring} tensors kept between steps")
    groups: list[list[Outputs]] = []
    for row, before, new in zip(rows, held, created, strict=False):
        slots = {k: before[path] for k, path in enumerate(row.step.inputs) if path in before}
        outputs = [(1 + ring + at, _terms(row.step.returned[k], slots, "noise")) for at, k in enumerate(row.returned)]
        outputs += [(slot, _terms(_vector(row.step, item), slots, "noise")) for item, slot in new.items()]
        groups.append([outputs[k : k + MAX_OUTPUTS] for k in range(0, len(outputs), MAX_OUTPUTS)])
    launches = max(map(len, groups))
    packed = []
    for row, several in zip(rows, groups, strict=True):
        nothing: Outputs = [(1 + ring, {1 + ring: 1.0})]
        for outputs in several + [nothing] * (launches - len(several)):
            packed.append(_packed(row.step, outputs, guidance, row.draw if seeded else 0))
    missing = pack_row(convert=(0.0, 0.0), outputs={1 + ring + k: {"x": 1.0} for k in range(len(rows[0].returned))})
    wide = torch.float64 if rows[0].work == torch.float64 else torch.float32
    coef = torch.tensor([floats for floats, _ in packed] + [[float("nan")] * ROW_FLOATS], dtype=wide)
    index = torch.tensor([integers for _, integers in [*packed, missing]])
    return Table(rows, coef.to(device), index.to(device), launches, ring, held, created)


def _vector(step: Step, item: Item) -> Vector:
    if item.kind == "field":
        return step.returned[item.value] or {}
    return {"x": 1.0} if item.kind == "sample" else {"m": 1.0} if item.kind == "model" else step.kept[item.value]


def _placed(row: Row, before: Mapping[Path, int]) -> tuple[dict[Path, int], dict[Item, int]]:
    """Where the ring holds the attributes' tensors after ``row``, and the slots that it writes. What is not held any more makes room."""
    moved, made = {path: slot for path, slot in before.items() if path[0] not in row.plain}, []
    for name, recipe in row.writes:
        moved = {path: slot for path, slot in moved.items() if path[0] != name}
        for at, item in enumerate(recipe.items) if isinstance(recipe, ListOf) else [(None, recipe)]:
            path = name, at
            if item.kind == "held" and item.value in before:
                moved[path] = before[item.value]
            elif item.kind in ("sample", "model", "field", "new"):
                made.append((path, item))
    # With several launches a step, a slot that a later one reads must not be written by an earlier one.
    several = len(made) + len(row.returned) > MAX_OUTPUTS
    taken = {*moved.values(), *(before.values() if several else ())}
    slots: dict[Item, int] = {}
    for path, item in made:
        if item not in slots:
            slots[item] = next(k for k in range(1, len(taken) + 2) if k not in taken)
            taken.add(slots[item])
        moved[path] = slots[item]
    return moved, slots
