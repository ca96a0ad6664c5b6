"""Solvers that evaluate the network several times a step.

A step from alpha = 0 or to sigma = 0 has no finite length in lambda and is Euler's, but for Heun's method, which refuses the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import numpy as np

from genfast.schedules import Array, Grid, Point

from .plan import Row, Term, Terms
from .rows import Churn, Rows, ancestral, ancestral_rf, choice, combine, ode_step, raise_noise, slope

Arrive = Callable[[dict[Term, float]], Terms]  # from the terms of a state to those of the state with its noise raised


def _trapezoid(p: Point, q: Point, scale: Callable[[Point], float], arrive: Arrive) -> Rows:
    """Heun's step on dy/du = (y - d) / u, y = x / s, u = sigma / s: s = alpha gives Karras's ODE, s = alpha + sigma the flow's."""
    if q.sigma == 0:
        yield Row(p, {0: ode_step(p, q)})
        return
    s, s_next = scale(p), scale(q)
    half = 0.5 * (q.sigma / p.sigma - s_next / s)  # s' (u' - u) / 2u / s; slot 1 keeps s' times y and half of the first slope
    yield Row(p, {0: ode_step(p, q), 1: {"x": s_next / s + half, "d": -half * s}})
    half = 0.5 * (1 - s_next * p.sigma / (s * q.sigma))  # (u' - u) / 2u'
    yield Row(q, {0: arrive({"x": half, "d": -half * s_next, 1: 1.0})})


def heun(g: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Rows:
    """Heun's method with churn (Karras et al. 2022, algorithm 2); Euler's where the step ends at sigma 0."""
    churn = Churn(g, s_churn, s_tmin, s_tmax, s_noise)
    for i in range(g.steps):
        yield from _trapezoid(churn.points[i], g.point(i + 1), lambda p: p.alpha, partial(churn.arrive, i + 1))


def flow_heun(g: Grid) -> Rows:
    """Heun's method on the flow's dx/dt = v, for any process in its coordinates x / (alpha + sigma); Euler's where it ends at sigma 0."""
    for i in range(g.steps):
        yield from _trapezoid(g.point(i), g.point(i + 1), lambda p: p.alpha + p.sigma, dict)


def restart(g: Grid, *, intervals: Iterable[tuple[float, float, int, int]] = ((0.1, 2.0, 9, 1),), s_noise: float = 1.0) -> Rows:
    """Restart sampling (Xu et al. 2023): Heun's method that goes back to more noise.

    ``intervals`` holds (t_min, t_max, steps, times): at the point of the grid nearest to t_min (in sigma / alpha, neither the first
    nor sigma 0) the noise is raised to t_max and a Karras grid of ``steps`` points leads back, ``times`` times. The default is that of
    stable-diffusion-webui below 36 steps. A grid without such a point has no restart.
    """
    ahead: dict[int, list[list[Point]]] = {}
    inner = np.flatnonzero(g.ratio[1:-1] > 0) + 1
    for t_min, t_max, steps, times in intervals if len(inner) else ():
        i = int(inner[np.argmin(np.abs(g.ratio[inner] - t_min))])
        if not g.ratio[i] < t_max or steps < 2:
            got = f"({t_min:g}, {t_max:g}, {steps}, {times}) at the grid's sigma {g.ratio[i]:g}"
            raise ValueError(f"intervals: got {got}, supported: t_max above that sigma, and at least 2 steps")
        back = [*(g.at(float(r)) for r in _karras_levels(float(g.ratio[i]), t_max, steps)[:-1]), g.point(i)]
        ahead.setdefault(i, []).extend([back] * times)
    path: list[Point] = [g.point(0)]
    for i in range(1, g.steps + 1):
        path.append(g.point(i))
        for back in ahead.get(i, []):
            path += back
    for p, q, after in zip(path[:-1], path[1:], [*path[2:], path[-1]], strict=True):
        if q.sigma * p.alpha >= p.sigma * q.alpha:
            continue  # the noise was raised by the row before
        rises = after.sigma * q.alpha > q.sigma * after.alpha
        yield from _trapezoid(p, q, lambda p: p.alpha, partial(raise_noise, q, after, s_noise=s_noise) if rises else dict)


def _karras_levels(low: float, high: float, steps: int, rho: float = 7.0) -> Array:
    return np.asarray((high ** (1 / rho) + np.linspace(0, 1, steps) * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def heunpp2(g: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Rows:
    """Heun++ (Carzit, sd-webui-samplers-scheduler; ComfyUI), with churn: up to three slopes, weighted by their noise level over the first.

    The last step, whatever it leads to, is Euler's, and the one before has two slopes.
    """
    churn = Churn(g, s_churn, s_tmin, s_tmax, s_noise)
    top = float(g.ratio[0] if g.alpha[0] > 0 else g.ratio[1])
    for i in range(g.steps):
        p, q = churn.points[i], g.point(i + 1)
        if i + 1 == g.steps or p.alpha == 0:
            yield Row(p, {0: churn.arrive(i + 1, ode_step(p, q))})
            continue
        far = g.point(i + 2) if i + 2 < g.steps else None
        w2, w3 = (g.ratio[i + 1] / (2 * top), 0.0) if far is None else (g.ratio[i + 1] / (3 * top), g.ratio[i + 2] / (3 * top))
        step = q.alpha * (g.ratio[i + 1] - p.sigma / p.alpha)
        yield Row(p, {0: ode_step(p, q), 1: combine((q.alpha / p.alpha, {"x": 1.0}), (step * (1 - w2 - w3), slope(p)))})
        mixed = combine((1.0, {1: 1.0}), (step * w2, slope(q)))
        if far is None:
            yield Row(q, {0: churn.arrive(i + 1, mixed)})
            continue
        yield Row(q, {0: ode_step(q, far), 1: mixed})
        yield Row(far, {0: churn.arrive(i + 1, combine((1.0, {1: 1.0}), (step * w3, slope(far))))})


def _midpoint(g: Grid, p: Point, q: Point, down: float, up: float, exponential: bool) -> Rows:
    """A step to the level ``down``, by the slope at the geometric middle, and noise ``up`` on it.

    The slope is kept constant in r (DPM-Solver-2 of Karras et al. 2022), or d in lambda (``exponential``).
    """
    r = p.sigma / p.alpha
    mid = g.at(math.sqrt(r * down))
    yield Row(p, {0: ode_step(p, mid), 1: {"x": 1.0}})
    if exponential:
        out: dict[Term, float] = {1: q.alpha * down / p.sigma, "d": q.alpha * (1 - down / r)}
    else:
        out = combine((q.alpha / p.alpha, {1: 1.0}), (q.alpha * (down - r), slope(mid)))
    yield Row(mid, {0: {**out, "noise": q.alpha * up}})


def dpm2(g: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Rows:
    """DPM-Solver-2 in Karras's coordinates, with churn (k-diffusion; KDPM2 in diffusers): the midpoint method, even in log r."""
    churn = Churn(g, s_churn, s_tmin, s_tmax, s_noise)
    for i in range(g.steps):
        p, q = churn.points[i], g.point(i + 1)
        if q.sigma == 0 or p.alpha == 0:
            yield Row(p, {0: churn.arrive(i + 1, ode_step(p, q))})
            continue
        first, second = _midpoint(g, p, q, q.sigma / q.alpha, 0.0, exponential=False)
        yield first
        yield Row(second.point, {0: churn.arrive(i + 1, {key: c for key, c in second.outputs[0].items() if key != "noise"})})


def _ancestral_midpoint(g: Grid, levels: Callable[[Point, Point], tuple[float, float]], s_noise: float, exponential: bool) -> Rows:
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        down, up = levels(p, q)
        if p.alpha == 0 or down == 0:
            kept = q.alpha * down / p.sigma
            yield Row(p, {0: {"x": kept, "d": q.alpha - p.alpha * kept, "noise": q.alpha * up * s_noise}})
        else:
            yield from _midpoint(g, p, q, down, up * s_noise, exponential)


def _ratio(p: Point) -> float:
    return p.sigma / p.alpha if p.alpha else math.inf


def dpm2_ancestral(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Ancestral `dpm2` (k-diffusion; KDPM2Ancestral in diffusers)."""
    yield from _ancestral_midpoint(g, lambda p, q: ancestral(_ratio(p), _ratio(q), eta), s_noise, exponential=False)


def dpmpp_2s_ancestral(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Ancestral DPM-Solver++(2S) (k-diffusion; Lu et al. 2022b, algorithm 1 with r = 1/2)."""
    yield from _ancestral_midpoint(g, lambda p, q: ancestral(_ratio(p), _ratio(q), eta), s_noise, exponential=True)


def flow_midpoint(g: Grid) -> Rows:
    """The midpoint method on dx/dt = v (Liu et al. 2023), in any process's coordinates x / (alpha + sigma); to sigma 0, too."""
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        yield from _midpoint_in_t(g, p, q, q, (_t(p) + _t(q)) / 2, 0.0)


def dpm2_ancestral_rf(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Ancestral `dpm2` for rectified flows (ComfyUI): the midpoint method on dx/dt = v, the middle even in log t."""
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        down, up = ancestral_rf(p, q, eta)
        if down == 0:
            yield Row(p, {0: {"d": q.alpha, "noise": q.alpha * up * s_noise}})
        else:
            yield from _midpoint_in_t(g, p, q, g.at(down), math.sqrt(_t(p) * down / (1 + down)), up * s_noise)


def _t(p: Point) -> float:
    return p.sigma / (p.alpha + p.sigma)


def _midpoint_in_t(g: Grid, p: Point, q: Point, down: Point, t_mid: float, up: float) -> Rows:
    """A step to the point ``down`` by the slope at t_mid, then noise ``up`` to q; dz/dt = (z - d) / t in z = x / (alpha + sigma)."""
    mid = g.at(t_mid / (1 - t_mid))
    scale, keep = mid.alpha + mid.sigma, q.alpha / down.alpha * (down.alpha + down.sigma)
    weight = keep * (_t(down) - _t(p)) / t_mid
    yield Row(p, {0: ode_step(p, mid), 1: {"x": 1 / (p.alpha + p.sigma)}})
    yield Row(mid, {0: {1: keep, "x": weight / scale, "d": -weight, "noise": q.alpha * up}})


def dpmpp_2s_ancestral_rf(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Ancestral DPM-Solver++(2S) for rectified flows (ComfyUI); from alpha = 0 a step of first order."""
    yield from _ancestral_midpoint(g, lambda p, q: ancestral_rf(p, q, eta), s_noise, exponential=True)


def dpmpp_sde(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """DPM-Solver++ SDE, single step with r = 1/2 (k-diffusion; DPMSolverSDE in diffusers).

    As there, both noises of a step are increments over r of one Brownian motion, so that the second contains the first.
    """
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        r, r_next = float(g.ratio[i]), float(g.ratio[i + 1])
        down, up = ancestral(r, r_next, eta)
        if q.sigma == 0 or p.alpha == 0:
            kept = q.alpha * down / p.sigma
            yield Row(p, {0: {"x": kept, "d": q.alpha - p.alpha * kept, "noise": q.alpha * up * s_noise}})
            continue
        mid = g.at(math.sqrt(r * r_next))
        mid_down, mid_up = ancestral(r, mid.sigma / mid.alpha, eta)
        shared = math.sqrt((r - mid.sigma / mid.alpha) / (r - r_next))
        noise = q.alpha * up * s_noise
        to_mid: dict[Term, float] = {"x": mid.alpha * mid_down / p.sigma, "d": mid.alpha * (1 - mid_down / r)}
        to_mid["noise"] = mid.alpha * mid_up * s_noise
        keep: dict[Term, float] = {"x": q.alpha * down / p.sigma, "noise": noise * shared}
        yield Row(p, {0: to_mid, 1: keep})
        yield Row(mid, {0: {1: 1.0, "d": q.alpha * (1 - down / r), "noise": noise * math.sqrt(1 - shared**2)}})


def dpmpp_singlestep(g: Grid, *, order: int = 2, variant: Literal["midpoint", "heun"] = "midpoint", lower_order_final: bool = True) -> Rows:
    """Singlestep DPM-Solver++ (Lu et al. 2022b, algorithm 1; 3S as in diffusers): blocks of ``order`` steps of rising order.

    Every step of a block starts from the block's first state and uses the evaluations since. ``lower_order_final``: the last steps
    make shorter blocks, as in diffusers, so that the last one is of first order; a step to sigma 0 always is.
    """
    choice("order", order, (1, 2, 3))
    choice("variant", variant, ("midpoint", "heun"))
    n = g.steps
    places = [i % order for i in range(n)]
    if lower_order_final and order > 1 and n % order == 0:
        places[-1] = 0
    log_snr, start = g.log_snr, 0
    for i, place in enumerate(places):
        if place == 0 or g.alpha[start] == 0 or g.sigma[i + 1] == 0:
            start = i
        place = i - start
        p, q, first = g.point(i), g.point(i + 1), g.point(start)
        if place == 0:
            # Slot 1 is the block's first state, slot 2 its prediction, slot 3 that of the second step
            yield Row(p, {0: ode_step(p, q), **({1: {"x": 1.0}, 2: {"d": 1.0}} if order > 1 and i + 1 < n else {})})
            continue
        h = log_snr[i + 1] - log_snr[start]
        gain = q.alpha * -math.expm1(-h)
        phi2 = q.alpha - gain / h
        r0 = (log_snr[i] - log_snr[start]) / h
        weight = 0.5 * gain if place == 1 and variant == "midpoint" else phi2
        out: dict[Term, float] = {1: q.sigma / first.sigma, "d": weight / r0, 2: gain - weight / r0}
        if place == 2 and variant == "heun":
            r1 = (log_snr[i - 1] - log_snr[start]) / h
            phi3 = 2 * (phi2 / h - 0.5 * q.alpha) / (r0 - r1)  # of the second difference, 2 (D1_1 - D1_0) / (r0 - r1)
            near, newest = (phi2 * r0 / (r0 - r1) + phi3) / r1, (-phi2 * r1 / (r0 - r1) - phi3) / r0
            out = {1: q.sigma / first.sigma, 2: gain - near - newest, 3: near, "d": newest}
        yield Row(p, {0: out, **({3: {"d": 1.0}} if place == 1 and order == 3 else {})})


def _exponential_runge_kutta(
    g: Grid, nodes: tuple[float, ...], weights: Callable[[float], list[list[float]]], eta: float, s_noise: float
) -> Rows:
    """Exponential Runge-Kutta in lambda. Stage k lies at ``nodes[k]``; ``weights(H)[k]`` weighs d_0 ... d_k in the state after it.

    With H = (1 + eta) h. Slot 1 holds x and the noise so far, brought back to the step's start; the slots from 2 the evaluations.
    """
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        if q.sigma == 0 or p.alpha == 0:
            yield Row(p, {0: {"d": q.alpha, "noise": s_noise * q.sigma} if eta and q.sigma else ode_step(p, q)})
            continue
        h = float(g.log_snr[i + 1] - g.log_snr[i])
        ends = [g.at(math.exp(-(g.log_snr[i] + c * h))) for c in nodes[1:]] + [q]
        rows = weights((1 + eta) * h)
        at = p
        for k, end in enumerate(ends):
            c, c_next = nodes[k], [*nodes, 1.0][k + 1]
            std = s_noise * math.sqrt(-math.expm1(-2 * (c_next - c) * eta * h))
            base: dict[Term, float] = {("x" if k == 0 else 1): 1.0}
            earlier: dict[Term, float] = {2 + j: end.alpha * rows[k][j] for j in range(k)}
            out = {key: v * end.sigma / p.sigma * math.exp(-c_next * eta * h) for key, v in base.items()}
            out |= {**earlier, "d": end.alpha * rows[k][k], "noise": end.sigma * std}
            save: dict[int, Terms] = {}
            if k + 1 < len(ends):
                save[2 + k] = {"d": 1.0}
                if k == 0 or std:
                    save[1] = {**base, "noise": p.sigma * math.exp(c_next * eta * h) * std}
            yield Row(at, {0: out, **save})
            at = end


def seeds_2(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """SEEDS-2 (Gonzalez et al. 2023, in data prediction with r = 1/2 as in ComfyUI); eta = 0 is DPM-Solver++(2S)."""
    yield from _exponential_runge_kutta(g, (0.0, 0.5), lambda h: [[-math.expm1(-h / 2)], [0.0, -math.expm1(-h)]], eta, s_noise)


def seeds_3(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """SEEDS-3 (Gonzalez et al. 2023, in data prediction with r = 1/3, 2/3 as in ComfyUI); eta = 0 is DPM-Solver++(3S)."""

    def weights(h: float) -> list[list[float]]:
        third, two_thirds, whole = (-math.expm1(-c * h) for c in (1 / 3, 2 / 3, 1.0))
        second = 2 * (1 - two_thirds / (2 / 3 * h))
        last = 1.5 * (1 - whole / h)
        return [[third], [two_thirds - second, second], [whole - last, 0.0, last]]

    yield from _exponential_runge_kutta(g, (0.0, 1 / 3, 2 / 3), weights, eta, s_noise)
