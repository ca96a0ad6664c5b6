"""When a drop-in's result is that of the stock class: element by element, never by a sum that zeros would pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from genfast.testing import oracle

# Largest difference of an element, in units of the largest element of the exact result, at least 1. In float64 the rounding of stock's
# own tables, which are float32, is left.
BOUNDS = {torch.float32: 2e-5, torch.float64: 1e-6}


@dataclass
class Outcome:
    """What a run returned: its tensors by name, in order, what must be equal exactly, or what it raised and where."""

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    facts: list[tuple[str, Any]] = field(default_factory=list)
    raised: str | None = None
    fused: bool = True

    @property
    def usable(self) -> bool:
        """Whether a wrong result could be told from it: it went through, in finite numbers, to an end that is not the same everywhere."""
        if self.raised is not None or not self.tensors:
            return False
        last = self.tensors[-1][1].double()
        finite = all(bool(value.isfinite().all()) for _, value in self.tensors)
        return finite and float(last.max() - last.min()) > 1e-2 * float(last.abs().max())


@dataclass(frozen=True)
class Verdict:
    """``worst`` is the largest error in units of what is allowed; ``problem`` says what is wrong, empty if nothing is."""

    worst: float
    problem: str


def judge(dtype: torch.dtype, ours: Outcome, stock: Outcome, exact: Outcome) -> Verdict:
    """Compare a drop-in's run with the stock one's in the same ``dtype``, and with the stock one in float64.

    In float32 and float64 every element is within `BOUNDS` of stock's or of the exact one; where stock itself is further off, and in half
    precision, its error is what stock's allows: `oracle.tolerance`, twice that in float32, where a row rounds two coefficients and
    stock one.
    """
    if ours.raised != stock.raised:
        return Verdict(float("inf"), f"raised {ours.raised or 'nothing'}, stock {stock.raised or 'nothing'}")
    if stock.raised is not None:
        return Verdict(0.0, "")
    for (name, value), (other, expected) in zip(ours.facts, stock.facts, strict=False):
        if name != other or not _equal(value, expected):
            return Verdict(float("inf"), f"{name}: {_short(value)}, stock {other}: {_short(expected)}")
    if len(ours.facts) != len(stock.facts) or [name for name, _ in ours.tensors] != [name for name, _ in stock.tensors]:
        return Verdict(float("inf"), "returned other fields than stock")
    if exact.raised is not None:
        return Verdict(float("inf"), f"the float64 run of stock raised {exact.raised}")
    worst, problem = 0.0, ""
    for (name, got), (_, working), (_, truth) in zip(ours.tensors, stock.tensors, exact.tensors, strict=True):
        if got.shape != working.shape or got.dtype != working.dtype:
            return Verdict(float("inf"), f"{name}: {got.dtype} {tuple(got.shape)}, stock {working.dtype} {tuple(working.shape)}")
        if not truth.isfinite().all():  # a rounding of float32 can be the square root of a negative number in float64
            truth = working.double()
            if dtype not in BOUNDS:
                continue
        error, allowed = oracle.error(got, truth), oracle.tolerance(working.to(dtype), truth)
        if dtype in BOUNDS:
            bound = BOUNDS[dtype] * max(1.0, float(truth.abs().max()))
            near = min(error, oracle.error(got, working))
            error, allowed = (near, bound) if near <= bound else (error, max(2 * allowed, bound))
        ratio = 0.0 if error == 0 else error / allowed if allowed > 0 else float("inf")
        if not ratio <= worst:
            worst = ratio
            problem = f"{name}: {error:.3g} away, allowed {allowed:.3g}" if not ratio <= 1 else ""
    if not problem and stock.usable and not ours.usable:
        return Verdict(float("inf"), "a result that is not finite or the same everywhere")
    return Verdict(worst, problem)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return oracle.same_bits(a, b)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    return f"{tuple(value.shape)} {value.flatten()[:4].tolist()}" if isinstance(value, Tensor) else repr(value)[:80]
