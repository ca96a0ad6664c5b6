"""Brownian motion that belongs to the sample: increments between any two noise levels, the same for every grid that visits them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from genfast import ops, reference
from genfast.ops._checks import check_seeds, refusal
from genfast.schedules import Point
from genfast.streams import BROWNIAN

from .plan import Plan

DEPTH = 10  # halvings of an octave; times closer than 2^-10 of it may share a leaf, whose bridge has one normal for all of them
LOWEST, HIGHEST = -20, 20  # octaves [2^(e - 1), 2^e] for e above LOWEST; [0, 2^LOWEST] is the last one


class BrownianPath:
    """One Brownian motion W for each sample: ``path(a, b)`` is W(b) - W(a), of variance abs(b - a).

    An increment depends on the sample's seed and the two times and on nothing else, bit for bit: not on the grid, on what else was
    asked, on the batch or the device. So solvers on any two grids see the same increments between the times they share. Increments
    over disjoint intervals are independent, adjacent ones add up to float32 rounding, and path(b, a) = -path(a, b).

    ``seeds`` (B,) int64, each in [0, 2^63), on the device of the run; ``shape`` (B, \\*sample). Times are numbers in [0, 2^20], as exact
    as float64; samplers take sigma / alpha. Returns float32 of ``shape``. ``impl`` "fused" or "reference": the same bits.
    Raises ValueError for anything else.

    Levy's construction, octave by octave: W over [2^(e-1), 2^e] has one normal for its ends and one for every midpoint of ten
    halvings; the leaf has the Brownian bridge's exact variance from one more. All are draws of stream 6 (docs/noise.md). A new time
    costs twelve of them; the latest two times are kept.
    """

    def __init__(self, seeds: Tensor, shape: Sequence[int], *, impl: Literal["fused", "reference"] = "fused") -> None:
        if not isinstance(seeds, Tensor):
            raise refusal("seeds", f"a {type(seeds).__name__}", "an int64 tensor, one seed per sample")
        if len(shape) < 1:
            raise refusal("shape", tuple(shape), "(B, *sample)")
        check_seeds(seeds, shape[0], seeds.device)
        if impl not in ("fused", "reference"):
            raise refusal("impl", repr(impl), "fused, reference")
        self.seeds, self.shape = seeds, tuple(shape)
        self._normal = (ops if impl == "fused" else reference).normal
        self._kept: dict[float, Tensor] = {}

    def __call__(self, a: float, b: float) -> Tensor:
        """W(b) - W(a)."""
        a, b = float(a), float(b)
        for name, t in (("a", a), ("b", b)):
            if not 0 <= t <= 2.0**HIGHEST:
                raise refusal(name, f"{t:g}", f"a time in [0, 2^{HIGHEST}]")
        low, high = sorted((a, b))
        total = self._within(high)
        for e in range(_octave(low)[0], _octave(high)[0]):
            total = total + self._term(_node(e, 0), math.sqrt(_width(e)))
        total = total - self._within(low)
        return total if a <= b else total.neg_()

    def _within(self, t: float) -> Tensor:
        """W(t) less W at the bottom of t's octave."""
        if t not in self._kept:
            total = torch.zeros(self.shape, dtype=torch.float32, device=self.seeds.device)
            for node, coefficient in bridge(t):
                total += self._term(node, coefficient)
            self._kept = dict([*self._kept.items()][-1:]) | {t: total}
        return self._kept[t]

    def _term(self, node: int, coefficient: float) -> Tensor:
        # A product and a sum rounded apart: add_(alpha=) may fuse them on a GPU
        term: Tensor = self._normal(self.seeds, self.shape, draw=node, stream=BROWNIAN)
        return term.mul_(coefficient)


def bridge(t: float) -> list[tuple[int, float]]:
    """What W(t) gains over the bottom of its octave: the draws of stream 6 and their coefficients. Exact but for the square roots."""
    e, bottom = _octave(t)
    width, place = _width(e), (t - bottom) / _width(e)
    terms = [(_node(e, 0), place * math.sqrt(width))]
    k = 1  # the nodes of an octave are numbered as a heap: the whole is 0, its first midpoint 1, the leaves 2^DEPTH and on
    for _ in range(DEPTH):
        terms.append((_node(e, k), math.sqrt(width) / 2 * (1 - abs(2 * place - 1))))
        right = place >= 0.5
        width, place, k = width / 2, 2 * place - right, 2 * k + right
    terms.append((_node(e, k), math.sqrt(width * place * (1 - place))))
    return [(node, c) for node, c in terms if c != 0]


def _octave(t: float) -> tuple[int, float]:
    """The number of t's octave and its bottom."""
    e = math.frexp(max(t, 2.0 ** (LOWEST - 1)))[1]
    return e, 0.0 if e == LOWEST else 2.0 ** (e - 1)


def _width(e: int) -> float:
    return 2.0**e if e == LOWEST else 2.0 ** (e - 1)


def _node(e: int, k: int) -> int:
    return ((e - LOWEST) << (DEPTH + 1)) + k


def intervals(plan: Plan, end: Point) -> list[tuple[float, float]]:
    """For every row the times (from, to) whose increment is its noise, in sigma / alpha; ``end`` is where the sample is taken.

    A row's noise covers the way from where the last noise ended to the next evaluation, so that the steps of a solver use all of the
    motion once. Levels above 2^20, such as alpha = 0, count as 2^20. Raises ValueError where the level does not fall.
    """
    levels = [_level(row.point) for row in plan.rows] + [_level(end)]
    spans, start = [], levels[0]
    for row, level in zip(plan.rows, levels[1:], strict=True):
        spans.append((start, level))
        if row.noisy:
            if not level < start:
                raise refusal(
                    "brownian",
                    f"True for {plan.name!r}, whose noise leads from sigma {start:g} to {level:g}",
                    "solvers that never go back over a level",
                )
            start = level
    return spans


def _level(point: Point) -> float:
    return min(point.sigma / point.alpha if point.alpha else math.inf, 2.0**HIGHEST)
