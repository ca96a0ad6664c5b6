"""Multistep solvers on the predicted noise, the slope (y - d) / r of the ODE in y = x / alpha."""

from __future__ import annotations

import numpy as np

from genfast.schedules import Grid

from .plan import Row, Term
from .rows import Rows, choice, usable


def lms(g: Grid, *, order: int = 4) -> Rows:
    """Linear multistep (Adams-Bashforth on any grid, as in k-diffusion): integrates the polynomial through the last slopes (y - d) / r."""
    choice("order", order, (1, 2, 3, 4))
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        euler_step: dict[Term, float] = {"x": q.sigma / p.sigma, "d": q.alpha - p.alpha * q.sigma / p.sigma}
        n = min(order, usable(g, i))
        kept = max(order - 1, 1)
        slope: dict[Term, float] = {"x": 1 / p.sigma, "d": -p.alpha / p.sigma}
        save: dict[int, dict[Term, float]] = {1 + i % kept: slope} if order > 1 and i + 1 < g.steps else {}
        if n == 1:
            yield Row(p, {0: euler_step, **save})
            continue
        dr = g.ratio[i + 1] - g.ratio[i]
        nodes = (g.ratio[i - np.arange(n)] - g.ratio[i]) / dr
        weights = q.alpha * dr * np.linalg.solve(np.vander(nodes, increasing=True).T, 1 / np.arange(1, n + 1))
        out: dict[Term, float] = {"x": q.alpha / p.alpha + weights[0] / p.sigma, "d": -weights[0] * p.alpha / p.sigma}
        yield Row(p, {0: out | {1 + (i - j) % kept: weights[j] for j in range(1, n)}, **save})
