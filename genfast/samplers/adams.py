"""Multistep solvers on the predicted noise, the slope (y - d) / r of the ODE in y = x / alpha."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from genfast.schedules import Array, Grid, Point

from .plan import Row, Term
from .rows import Rows, choice, combine, ode_step, slope, usable

_FIXED = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}  # Adams-Bashforth


def _multistep(
    g: Grid, order: int, weights: Callable[[int, int], Array], *, first: int = 0, count: Callable[[int], int] | None = None
) -> Rows:
    """y' = y + the sum of ``weights(i, n)`` times the last n slopes, the newest first; n is at most order and ``count(i)``.

    The slope of step i lies in slot 1 + i % (order - 1). ``first`` is where this starts, with ``count`` slopes before it.
    """
    kept = max(order - 1, 1)
    for i in range(first, g.steps):
        p, q = g.point(i), g.point(i + 1)
        n = min(order, usable(g, i), count(i) if count else order)
        save: dict[int, dict[Term, float]] = {1 + i % kept: slope(p)} if order > 1 and i + 1 < g.steps else {}
        if n == 1:
            yield Row(p, {0: ode_step(p, q), **save})
            continue
        w = q.alpha * weights(i, n)
        out: dict[Term, float] = {"x": q.alpha / p.alpha + w[0] / p.sigma, "d": -w[0] * p.alpha / p.sigma}
        yield Row(p, {0: out | {1 + (i - j) % kept: w[j] for j in range(1, n)}, **save})


def lms(g: Grid, *, order: int = 4) -> Rows:
    """Linear multistep (Adams-Bashforth on any grid, as in k-diffusion): integrates the polynomial through the last slopes (y - d) / r."""
    choice("order", order, (1, 2, 3, 4))

    def weights(i: int, n: int) -> Array:
        dr = g.ratio[i + 1] - g.ratio[i]
        nodes = (g.ratio[i - np.arange(n)] - g.ratio[i]) / dr
        return np.asarray(dr * np.linalg.solve(np.vander(nodes, increasing=True).T, 1 / np.arange(1, n + 1)))

    yield from _multistep(g, order, weights)


def deis(g: Grid, *, order: int = 3, lower_order_final: bool = True) -> Rows:
    """DEIS, tAB in log rho (Zhang and Chen 2023; as in diffusers): the polynomial in log r, integrated over r.

    A step to sigma 0 is of first order; ``lower_order_final`` lowers the order of those before it, one by one.
    """
    choice("order", order, (1, 2, 3))
    points, gauss = np.polynomial.legendre.leggauss(32)
    u, gauss = (points + 1) / 2, gauss / 2

    def weights(i: int, n: int) -> Array:
        h = g.log_snr[i + 1] - g.log_snr[i]
        nodes = (g.log_snr[i - np.arange(n)] - g.log_snr[i]) / h
        moments = [-h * g.ratio[i] * np.sum(gauss * u**k * np.exp(-h * u)) for k in range(n)]  # of dr = -h r exp(-h u) du
        return np.asarray(np.linalg.solve(np.vander(nodes, increasing=True).T, moments))

    yield from _multistep(g, order, weights, count=lambda i: _final(g, i, order, lower_order_final))


def _final(g: Grid, i: int, order: int, lower: bool) -> int:
    return 1 if g.sigma[i + 1] == 0 else g.steps - i if lower else order


def dpm_solver(
    g: Grid,
    *,
    order: int = 2,
    variant: Literal["midpoint", "heun"] = "midpoint",
    lower_order_final: bool = False,
    exact: bool = False,
) -> Rows:
    """DPM-Solver, multistep, on the predicted noise (Lu et al. 2022a, in the multistep form of diffusers' algorithm "dpmsolver").

    ``variant`` weighs the second term; order 3 has one form, whose published third term is half of what integrates a quadratic
    (``exact`` takes the whole, as in `dpmpp_3m_sde`). A step to sigma 0 is of first order.
    """
    choice("order", order, (1, 2, 3))
    choice("variant", variant, ("midpoint", "heun"))

    def weights(i: int, n: int) -> Array:
        r, log_snr = g.ratio[i + 1], g.log_snr
        h = log_snr[i + 1] - log_snr[i]
        gain = -r * np.expm1(h)
        phi2 = gain / h + r
        r0 = (log_snr[i] - log_snr[i - 1]) / h
        if n == 2:
            second = (0.5 * gain if variant == "midpoint" else phi2) / r0
            return np.array([gain + second, -second])
        phi3 = (2 if exact else 1) * (phi2 + 0.5 * r * h) / h  # -r ((e^h - 1 - h) / h^2 - 1/2)
        r1 = (log_snr[i - 1] - log_snr[i - 2]) / h
        a, b = (phi2 * (1 + r0 / (r0 + r1)) + phi3 / (r0 + r1)) / r0, (-phi2 * r0 / (r0 + r1) - phi3 / (r0 + r1)) / r1
        return np.array([gain + a, -a + b, -b])

    yield from _multistep(g, order, weights, count=lambda i: _final(g, i, order, lower_order_final))


def _fixed(g: Grid, i: int, n: int) -> Array:
    return np.asarray(np.array(_FIXED[n]) * (g.ratio[i + 1] - g.ratio[i]))


def ipndm(g: Grid, *, order: int = 4) -> Rows:
    """Improved PNDM (Zhang and Chen 2023, in ComfyUI's form): Adams-Bashforth with the weights of an even grid."""
    choice("order", order, (1, 2, 3, 4))
    yield from _multistep(g, order, lambda i, n: _fixed(g, i, n))


def gradient_estimation(g: Grid, *, gamma: float = 2.0) -> Rows:
    """Gradient estimation (Permenter and Yuan 2024): the slope gamma e_i + (1 - gamma) e_{i-1}; to sigma 0 Euler's step."""
    yield from _multistep(
        g, 2, lambda i, n: np.array([gamma, 1 - gamma]) * (g.ratio[i + 1] - g.ratio[i]), count=lambda i: _final(g, i, 2, False)
    )


def pndm(g: Grid, *, prk: bool = False) -> Rows:
    """PNDM (Liu et al. 2022): the fixed weights of `ipndm`, with a start of higher order.

    The first step is Heun's, as in latent diffusion and diffusers (``skip_prk_steps``), or with ``prk`` the first three are the paper's
    pseudo Runge-Kutta steps. A start from alpha = 0 or to sigma 0 is Euler's.
    """
    start = min(3 if prk else 1, g.steps)
    for i in range(start):
        p, q = g.point(i), g.point(i + 1)
        if p.alpha == 0 or q.sigma == 0:
            yield Row(p, {0: ode_step(p, q), 1 + i: slope(p)})
        else:
            yield from (_runge_kutta if prk else _heun_start)(g, i)
    yield from _multistep(g, 4, lambda i, n: _fixed(g, i, n), first=start)


def _heun_start(g: Grid, i: int) -> Rows:
    """Heun's step in r. Slot 1 + i keeps the slope; what Euler's step added of it is halved again in the second row."""
    p, q = g.point(i), g.point(i + 1)
    half = 0.5 * q.alpha * float(g.ratio[i + 1] - g.ratio[i])
    yield Row(p, {0: ode_step(p, q), 1 + i: slope(p)})
    yield Row(q, {0: combine((1.0, {"x": 1.0, 1 + i: -half}), (half, slope(q)))})


def _runge_kutta(g: Grid, i: int) -> Rows:
    """The classical method in r, whose middle lies in the middle of the time (Liu et al. 2022). Slot 1 + i keeps e_1."""
    p, q, e1 = g.point(i), g.point(i + 1), 1 + i
    time = (p.time + q.time) / 2
    mid = Point(time, *(float(v) for v in g.noise.alpha_sigma(time)))
    r = float(g.ratio[i])
    dm, dr = mid.sigma / mid.alpha - r, float(g.ratio[i + 1]) - r
    start: dict[Term, float] = {"x": 1 / mid.alpha, e1: -dm}  # y at p, out of the state after the first row
    yield Row(p, {0: ode_step(p, mid), e1: slope(p)})
    yield Row(mid, {0: combine((mid.alpha, start), (mid.alpha * dm, slope(mid))), 4: start})
    e2: dict[Term, float] = {"x": 1 / mid.alpha / dm, 4: -1 / dm}
    yield Row(
        mid,
        {
            0: combine((q.alpha, {4: 1.0}), (q.alpha * dr, slope(mid))),
            5: combine((1.0, {4: 1.0, e1: dr / 6}), (dr / 3, e2), (dr / 3, slope(mid))),
        },
    )
    yield Row(q, {0: combine((q.alpha, {5: 1.0}), (q.alpha * dr / 6, slope(q)))})
