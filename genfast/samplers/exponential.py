"""Multistep exponential integrators in lambda, on the denoised prediction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from genfast.schedules import Array, Grid, Point

from .plan import Row, Term
from .rows import Rows, ancestral, choice, combine, decay, ode_step, usable


def _dpmpp(g: Grid, order: int, variant: str, eta: float, s_noise: float, lower_order_final: bool, exact: bool = False) -> Rows:
    """Multistep DPM-Solver++: with h = lambda' - lambda and H = (1 + eta) h,

        x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^-H) D + sigma' sqrt(1 - e^(-2 eta h)) noise,

    where D extrapolates d from the history (Lu et al. 2022b, equations 14 and 19; with eta as in k-diffusion).
    """
    log_snr = g.log_snr
    kept = max(order - 1, 1)
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        e, h = decay(p, q), log_snr[i + 1] - log_snr[i]
        gain = q.alpha * (1 - e ** (1 + eta))
        out: dict[Term, float] = {"x": q.sigma / p.sigma * e**eta, "d": gain}
        out["noise"] = s_noise * q.sigma * math.sqrt(max(1 - e ** (2 * eta), 0.0))
        n = min(order, usable(g, i), g.steps - i if lower_order_final else order)
        if n > 1 and q.sigma > 0:
            phi2 = q.alpha - gain / ((1 + eta) * h)  # alpha' ((e^-H - 1) / H + 1)
            last, older = 1 + (i - 1) % kept, 1 + (i - 2) % kept
            r0 = (log_snr[i] - log_snr[i - 1]) / h
            if n == 2:
                slope = 0.5 * gain if variant == "midpoint" else phi2
                out |= {"d": gain + slope / r0, last: -slope / r0}
            else:
                phi3 = (2 if exact else 1) * (phi2 / ((1 + eta) * h) - 0.5 * q.alpha)
                r1 = (log_snr[i - 1] - log_snr[i - 2]) / h
                # D1 = a (d - last) / r0 + b (last - older) / r1 and D2 = the difference of the two slopes over r0 + r1
                a = phi2 * (1 + r0 / (r0 + r1)) - phi3 / (r0 + r1)
                b = phi2 * (-r0 / (r0 + r1)) + phi3 / (r0 + r1)
                out |= {"d": gain + a / r0, last: -a / r0 + b / r1, older: -b / r1}
        save: dict[int, dict[Term, float]] = {1 + i % kept: {"d": 1.0}} if order > 1 and i + 1 < g.steps else {}
        yield Row(p, {0: out, **save})


def dpmpp_2m(g: Grid, *, order: int = 2, variant: Literal["midpoint", "heun"] = "midpoint", lower_order_final: bool = False) -> Rows:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2). ``order`` 1 is DDIM, 3 the 3M form (see `dpmpp_3m_sde` for its order).

    ``lower_order_final`` lowers the order of the last steps, to end at first order; a step to sigma 0 always is.
    """
    choice("order", order, (1, 2, 3))
    choice("variant", variant, ("midpoint", "heun"))
    yield from _dpmpp(g, order, variant, 0.0, 1.0, lower_order_final)


def dpmpp_2m_sde(
    g: Grid,
    *,
    variant: Literal["midpoint", "heun"] = "midpoint",
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool = False,
) -> Rows:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, equation 19); eta = 1 is the paper's SDE, eta = 0 is `dpmpp_2m`."""
    choice("variant", variant, ("midpoint", "heun"))
    yield from _dpmpp(g, 2, variant, eta, s_noise, lower_order_final)


def dpmpp_3m_sde(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0, lower_order_final: bool = False, exact: bool = False) -> Rows:
    """The DPM-Solver++(3M) SDE of k-diffusion; eta = 0 is an ODE solver.

    The published weight of the second difference is half of what integrates a quadratic, so that the published method converges at
    second order. ``exact`` takes the whole weight, which makes the ODE solver third order (docs/solvers.md).
    """
    yield from _dpmpp(g, 3, "heun", eta, s_noise, lower_order_final, exact)


def _unipc_weights(g: Grid, i: int, order: int, variant: str, corrector: bool) -> dict[int, float]:
    """Weights of d_j, by j, in x_{i+1}: UniP of ``order``, or UniC, which adds d_{i+1} (Zhao et al. 2023, equations 3 and 9)."""
    log_snr, alpha = g.log_snr, float(g.alpha[i + 1])
    h = log_snr[i + 1] - log_snr[i]
    others = [i - k for k in range(1, order)] + [i + 1] * corrector
    nodes = np.array([(log_snr[j] - log_snr[i]) / h for j in others])
    weights = {i: -alpha * float(np.expm1(-h))}
    if not others:
        return weights
    big_b = -h if variant == "bh1" else np.expm1(-h)
    phi, factorial, rhs = np.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, len(others) + 1):
        rhs.append(phi * factorial / big_b)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    # One node alone takes 1/2, which is exact to the order needed and what the paper's code uses.
    rho = np.array([0.5]) if len(others) == 1 else np.linalg.solve(np.vander(nodes, increasing=True).T, rhs)
    for j, weight in zip(others, -alpha * big_b * rho / nodes, strict=True):
        weights[j] = float(weight)
        weights[i] -= float(weight)
    return weights


def unipc(
    g: Grid, *, order: int = 2, variant: Literal["bh1", "bh2"] = "bh2", corrector: bool = True, lower_order_final: bool = True
) -> Rows:
    """UniPC, data prediction, multistep (Zhao et al. 2023, algorithms 5 and 6).

    Row i first corrects x_i with the new evaluation, then predicts x_{i+1} from it. Slot 1 holds the corrected state before, the
    slots from 2 the last ``order`` evaluations.
    """
    choice("order", order, (1, 2, 3))
    choice("variant", variant, ("bh1", "bh2"))
    used = 0
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        key: dict[int, Term] = {i: "d", **{j: 2 + j % order for j in range(max(i - order, 0), i)}}
        state: dict[Term, float] = {"x": 1.0}
        if corrector and i > 0 and g.alpha[i - 1] > 0:
            weights = _unipc_weights(g, i - 1, used, variant, corrector=True)
            state = {1: p.sigma / float(g.sigma[i - 1]), **{key[j]: w for j, w in weights.items()}}
        used = 1 if q.sigma == 0 else min(order, usable(g, i), g.steps - i if lower_order_final else order)
        out = {term: c * q.sigma / p.sigma for term, c in state.items()}
        for j, w in _unipc_weights(g, i, used, variant, corrector=False).items():
            out[key[j]] = out.get(key[j], 0.0) + w
        more = i + 1 < g.steps
        save: dict[int, dict[Term, float]] = {2 + i % order: {"d": 1.0}} if more else {}
        yield Row(p, {0: out, **({1: state} if more and corrector else {}), **save})


def res_multistep(g: Grid, *, eta: float = 0.0, s_noise: float = 1.0) -> Rows:
    """RES, second order, multistep (Zhang et al. 2023, as in ComfyUI): d along the line through two evaluations, integrated in lambda.

    ``eta`` > 0 is the ancestral form: the ODE to sigma_down, then noise. With eta = 0 it equals `dpmpp_2m` of variant "heun".
    """
    reached = math.nan  # lambda where the last ODE step ended
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        down, up = ancestral(float(g.ratio[i]), float(g.ratio[i + 1]), eta)
        e = p.alpha * down / p.sigma
        out: dict[Term, float] = {"x": q.alpha * down / p.sigma, "d": q.alpha * (1 - e), "noise": q.alpha * up * s_noise}
        if usable(g, i) > 1 and down > 0:
            second = q.alpha * (1 + (1 - e) / math.log(e)) * -math.log(e) / (reached - float(g.log_snr[i - 1]))
            out |= {"d": out["d"] + second, 1: -second}
        reached = -math.log(down) if down > 0 else math.inf
        yield Row(p, {0: out, **({1: {"d": 1.0}} if i + 1 < g.steps else {})})


def er_sde(g: Grid, *, order: int = 3, s_noise: float = 1.0) -> Rows:
    """ER-SDE-Solver (Cui et al. 2023), of ``order`` 1 to 3, with the noise scale r (exp(r^0.3) + 10) it proposes.

    Its integrals are the published sums over 200 points.
    """
    choice("order", order, (1, 2, 3))

    def scale(r: Array | float) -> Array:
        return np.asarray(r * (np.exp(np.power(r, 0.3)) + 10))

    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        save: dict[int, dict[Term, float]] = {1 + i % 2: {"d": 1.0}} if order > 1 and i + 1 < g.steps else {}
        if q.sigma == 0 or p.alpha == 0:
            yield Row(p, {0: {"d": q.alpha, "noise": q.sigma * s_noise}, **save})
            continue
        r, r_next = float(g.ratio[i]), float(g.ratio[i + 1])
        kept = float(scale(r_next) / scale(r))
        std = s_noise * math.sqrt(max(r_next**2 - (r * kept) ** 2, 0.0))
        out: dict[Term, float] = {"x": q.alpha / p.alpha * kept, "d": q.alpha * (1 - kept), "noise": q.alpha * std}
        n = min(order, usable(g, i))
        levels = r_next + np.arange(200) / 200 * (r - r_next)
        inverse = scale(r_next) / scale(levels) * (r - r_next) / 200
        if n > 1:
            r1 = float(g.ratio[i - 1])
            first = q.alpha * float(r_next - r + inverse.sum()) / (r - r1)  # of d - last
            out |= {"d": out["d"] + first, 1 + (i - 1) % 2: -first}
        if n > 2:
            r2 = float(g.ratio[i - 2])
            second = q.alpha * float((r_next - r) ** 2 / 2 + np.sum((levels - r) * inverse)) / ((r - r2) / 2)
            near, far = second / (r - r1), second / (r1 - r2)  # of (d - last) / (r - r1) - (last - older) / (r1 - r2)
            out |= {"d": out["d"] + near, 1 + (i - 1) % 2: -first - near - far}
            out[1 + i % 2] = far  # read before this row's d overwrites it
        yield Row(p, {0: out, **save})


def _sa_weights(g: Grid, i: int, nodes: list[int], tau: float, exact: bool) -> dict[int, float]:
    """Weights of d_j, by j, in x_{i+1}: alpha' times the integral of the polynomial through the nodes.

    It is taken in lambda, under (1 + tau^2) exp(-(1 + tau^2) (lambda' - lambda)). Where not ``exact``, two nodes weigh their slope
    without the exponential.
    """
    h, kind = g.log_snr[i + 1] - g.log_snr[i], 1 + tau**2
    points, gauss = np.polynomial.legendre.leggauss(32)
    u = (points + 1) / 2
    density = gauss / 2 * h * kind * np.exp(-kind * h * (1 - u))
    at = np.array([(g.log_snr[j] - g.log_snr[i]) / h for j in nodes])
    moments = [np.sum(density * u**k) for k in range(len(nodes))]
    if len(nodes) == 2 and not exact:
        moments[1] = kind * h / 2
    weights = float(g.alpha[i + 1]) * np.linalg.solve(np.vander(at, increasing=True).T, moments)
    return {j: float(w) for j, w in zip(nodes, weights, strict=True)}


def sa_solver(
    g: Grid,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Callable[[Point], float] = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool = False,
    exact: bool = True,
) -> Rows:
    """SA-Solver, a stochastic Adams predictor and corrector (Xue et al. 2023, algorithm 1, data prediction).

    ``tau`` is a number or a function of a step's first point. The weights are integrated exactly; the authors' code, and diffusers with it,
    approximates those of two evaluations (``exact=False``), which keeps the order. ``lower_order_final`` lowers the orders of the
    last steps. The orders are the numbers of evaluations a predictor uses, and a corrector beside the newest;
    ``corrector_order`` 0 leaves the corrector out. Predictor and corrector of a step share their noise. Slot 1 holds all of the
    corrected state but the evaluation still to come. A step to sigma 0 returns the prediction there.
    """
    choice("predictor_order", predictor_order, (1, 2, 3))
    choice("corrector_order", corrector_order, (0, 1, 2, 3))
    kept = max(predictor_order, corrector_order)
    pending = 0.0  # the newest evaluation's weight in the corrected state; 0: there is nothing to correct
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        strength = tau(p) if callable(tau) else tau
        most = g.steps - i if lower_order_final else 3
        state: dict[Term, float] = {1: 1.0, "d": pending} if pending else {"x": 1.0}
        pending = 0.0
        save: dict[int, dict[Term, float]] = {2 + i % kept: {"d": 1.0}} if i + 1 < g.steps else {}
        key: dict[int, Term] = {i: "d", **{j: 2 + j % kept for j in range(max(i - kept + 1, 0), i)}}
        if q.sigma == 0 or p.alpha == 0:
            yield Row(p, {0: {"d": q.alpha, "noise": q.sigma * s_noise} if strength else ode_step(p, q), **save})
            continue
        decayed = decay(p, q) ** (strength**2)
        drift = combine((q.sigma / p.sigma * decayed, state), (s_noise * q.sigma * math.sqrt(1 - decayed**2), {"noise": 1.0}))
        used = [i - k for k in range(min(predictor_order, usable(g, i), most))]
        predicted = combine((1.0, drift), *((w, {key[j]: 1.0}) for j, w in _sa_weights(g, i, used, strength, exact).items()))
        if corrector_order and i + 1 < g.steps:
            used = [i - k for k in range(min(corrector_order, usable(g, i), most))]
            weights = _sa_weights(g, i, [*used, i + 1], strength, exact)
            pending = weights.pop(i + 1)
            save[1] = combine((1.0, drift), *((w, {key[j]: 1.0}) for j, w in weights.items()))
        yield Row(p, {0: predicted, **save})
