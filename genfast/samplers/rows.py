"""What the solvers share. The notation is that of the package's docstring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from genfast.schedules import Grid, Point

from .plan import Row, Term, Terms

Rows = Iterator[Row]
Solver = Callable[..., Rows]


def decay(p: Point, q: Point) -> float:
    """r' / r = exp(-h), 0 from alpha = 0 or to sigma = 0."""
    return p.alpha * q.sigma / (q.alpha * p.sigma)


def posterior_std(p: Point, q: Point) -> float:
    """Standard deviation of q(x' | x, x_0), the "small" variance of Ho et al. 2020, equation 7, for any alpha and sigma."""
    return q.sigma * math.sqrt(max(1 - decay(p, q) ** 2, 0.0))


def large_std(p: Point, q: Point) -> float:
    """Standard deviation of the "large" variance, beta (Ho et al. 2020, section 3.2): the noise that the process adds from q to p."""
    return math.sqrt(max(p.sigma**2 - (p.alpha / q.alpha * q.sigma) ** 2, 0.0))


def combine(*parts: tuple[float, Terms]) -> dict[Term, float]:
    """The weighted sum of linear combinations."""
    total: dict[Term, float] = {}
    for weight, terms in parts:
        for key, c in terms.items():
            total[key] = total.get(key, 0.0) + weight * c
    return total


def ode_step(p: Point, q: Point) -> dict[Term, float]:
    """Euler's step from p to q; also from alpha = 0 and to sigma = 0."""
    return {"x": q.sigma / p.sigma, "d": q.alpha - p.alpha * q.sigma / p.sigma}


def slope(p: Point) -> dict[Term, float]:
    """The slope (y - d) / r of the ODE in y = x / alpha, which is the predicted noise."""
    return {"x": 1 / p.sigma, "d": -p.alpha / p.sigma}


def ancestral(r: float, r_next: float, eta: float) -> tuple[float, float]:
    """k-diffusion's sigma_down and sigma_up: the ODE is followed to the one, noise of the other leads to r'."""
    up = min(r_next, eta * r_next * math.sqrt(max(1 - (r_next / r) ** 2, 0.0)))
    return math.sqrt(r_next**2 - up**2), up


def ancestral_rf(p: Point, q: Point, eta: float) -> tuple[float, float]:
    """ComfyUI's for rectified flows: down lies at t' (1 - eta (1 - t' / t)), t = sigma / (alpha + sigma); both as sigma / alpha."""
    t, t_next = p.sigma / (p.alpha + p.sigma), q.sigma / (q.alpha + q.sigma)
    if not eta:
        return q.sigma / q.alpha, 0.0
    t_down = t_next * (1 - eta * (1 - t_next / t))
    down = t_down / (1 - t_down)
    return down, math.sqrt(max((q.sigma / q.alpha) ** 2 - down**2, 0.0))


def raise_noise(at: Point, to: Point, terms: Terms, s_noise: float) -> dict[Term, float]:
    """The terms of a state at ``at``, noised further to ``to``."""
    added = math.sqrt((to.sigma / to.alpha) ** 2 - (at.sigma / at.alpha) ** 2)
    return {**{key: c * to.alpha / at.alpha for key, c in terms.items()}, "noise": to.alpha * added * s_noise}


def choice(name: str, got: object, supported: tuple[object, ...]) -> None:
    if got not in supported:
        raise ValueError(f"{name}: got {got!r}, supported: {', '.join(map(repr, supported))}")


def usable(g: Grid, i: int) -> int:
    """How many evaluations a multistep method can use at step i: this one and the earlier ones at a finite lambda."""
    return i + 1 - int(i > 0 and g.alpha[0] == 0)


class Churn:
    """The noise increase of Karras et al. 2022, algorithm 2, lines 4 to 6, folded into the row that arrives at the point.

    ``points[i]`` is where the network is evaluated at step i; ``arrive`` turns the terms of a state at grid point i into those of the
    churned state. The first increase is part of the initial noise (without s_noise).
    """

    def __init__(self, g: Grid, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> None:
        gamma = min(s_churn / g.steps, math.sqrt(2) - 1)
        churned = [gamma > 0 and s_tmin <= r <= s_tmax and 0 < r < math.inf for r in g.ratio[:-1]]
        self.points = [g.at((1 + gamma) * float(g.ratio[i])) if churned[i] else g.point(i) for i in range(g.steps)] + [g.point(g.steps)]
        self.grid, self.s_noise = g, s_noise

    def arrive(self, i: int, terms: dict[Term, float]) -> dict[Term, float]:
        at, to = self.grid.point(i), self.points[i]
        return terms if to == at else raise_noise(at, to, terms, self.s_noise)
