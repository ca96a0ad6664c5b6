"""Solvers that evaluate the network several times a step."""

from __future__ import annotations

import math
from collections.abc import Callable

from genfast.schedules import Grid, Point

from .plan import Row, Term
from .rows import Churn, Rows


def _trapezoid(g: Grid, scale: Callable[[Point], float], churn: Churn) -> Rows:
    """Heun's method on dy/du = (y - d) / u, y = x / s, u = sigma / s: s = alpha gives Karras's ODE, s = alpha + sigma the flow's."""
    for i in range(g.steps):
        p, q = churn.points[i], g.point(i + 1)
        euler_step: dict[Term, float] = {"x": q.sigma / p.sigma, "d": q.alpha - p.alpha * q.sigma / p.sigma}
        if q.sigma == 0:
            yield Row(p, {0: euler_step})
            continue
        s, s_next = scale(p), scale(q)
        half = 0.5 * (q.sigma / p.sigma - s_next / s)  # s' (u' - u) / 2u / s; slot 1 keeps s' times y and half of the first slope
        yield Row(p, {0: euler_step, 1: {"x": s_next / s + half, "d": -half * s}})
        half = 0.5 * (1 - s_next * p.sigma / (s * q.sigma))  # (u' - u) / 2u'
        yield Row(q, {0: churn.arrive(i + 1, {"x": half, "d": -half * s_next, 1: 1.0})})


def heun(g: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Rows:
    """Heun's method with churn (Karras et al. 2022, algorithm 2); Euler's where the step ends at sigma 0."""
    yield from _trapezoid(g, lambda p: p.alpha, Churn(g, s_churn, s_tmin, s_tmax, s_noise))


def flow_heun(g: Grid) -> Rows:
    """Heun's method on the flow's dx/dt = v, for any process in its coordinates x / (alpha + sigma); Euler's where it ends at sigma 0."""
    yield from _trapezoid(g, lambda p: p.alpha + p.sigma, Churn(g, 0.0, 0.0, 0.0, 0.0))
