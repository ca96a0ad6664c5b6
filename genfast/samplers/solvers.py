"""The solvers: pure functions from a grid to rows. docs/solvers.md derives them and says how to add one.

A solver reads a `Grid` (float64) and yields one `Row` per evaluation of the network. Notation, here and in the comments: the state
is x = alpha x_0 + sigma n, "d" the denoised prediction, r = sigma / alpha the noise level, lambda = -log r; a prime marks the
next point of the grid. Formulas are written so that alpha = 0 (zero terminal SNR, flows at t = 1) is never divided by
unless the method itself is undefined there; `assemble` reports those.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from genfast.schedules import Grid, Point, unknown_name

from .plan import Plan, Row, Term, assemble

Rows = Iterator[Row]
Solver = Callable[..., Rows]


def _decay(p: Point, q: Point) -> float:
    """r' / r = exp(-h), 0 from alpha = 0 or to sigma = 0."""
    return p.alpha * q.sigma / (q.alpha * p.sigma)


def _posterior_std(p: Point, q: Point) -> float:
    """Standard deviation of q(x' | x, x_0), the "small" variance of Ho et al. 2020, equation 7, for any alpha and sigma."""
    return q.sigma * math.sqrt(max(1 - _decay(p, q) ** 2, 0.0))


def _choice(name: str, got: object, supported: tuple[object, ...]) -> None:
    if got not in supported:
        raise ValueError(f"{name}: got {got!r}, supported: {', '.join(map(repr, supported))}")


# First order


def ddim(g: Grid, *, eta: float = 0.0, s_noise: float = 1.0) -> Rows:
    """DDIM (Song et al. 2021a, equations 12 and 16): eta = 0 is the ODE, eta = 1 ancestral sampling."""
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        std = min(eta * _posterior_std(p, q), q.sigma)
        kept = math.sqrt(q.sigma**2 - std**2)  # the coefficient of the predicted noise (x - alpha d) / sigma
        yield Row(p, {0: {"x": kept / p.sigma, "d": q.alpha - p.alpha * kept / p.sigma, "noise": s_noise * std}})


def ddpm(g: Grid, *, variance: Literal["small", "large"] = "small") -> Rows:
    """DDPM ancestral sampling (Ho et al. 2020, equations 6 and 7); "large" takes beta, of section 3.2, for the variance."""
    _choice("variance", variance, ("small", "large"))
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        std = _posterior_std(p, q)
        kept = math.sqrt(max(q.sigma**2 - std**2, 0.0))
        if variance == "large" and q.sigma > 0:  # the last step draws no noise
            std = math.sqrt(max(p.sigma**2 - (p.alpha / q.alpha * q.sigma) ** 2, 0.0))
        yield Row(p, {0: {"x": kept / p.sigma, "d": q.alpha - p.alpha * kept / p.sigma, "noise": std}})


def euler_ancestral(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Ancestral Euler (k-diffusion): an Euler step to sigma_down, then noise of sigma_up. The same update as DDIM's with eta."""
    yield from ddim(g, eta=eta, s_noise=s_noise)


def consistency(g: Grid) -> Rows:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1), as of latent consistency models (Luo et al. 2023): d, noised anew."""
    for i in range(g.steps):
        q = g.point(i + 1)
        yield Row(g.point(i), {0: {"d": q.alpha, "noise": q.sigma}})


class _Churn:
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
        if to == at:
            return terms
        added = math.sqrt((to.sigma / to.alpha) ** 2 - (at.sigma / at.alpha) ** 2)
        return {**{key: c * to.alpha / at.alpha for key, c in terms.items()}, "noise": to.alpha * added * self.s_noise}


def euler(g: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Rows:
    """Euler's method on dy/dr = (y - d) / r with y = x / alpha, with churn (Karras et al. 2022, algorithm 2 without its correction)."""
    churn = _Churn(g, s_churn, s_tmin, s_tmax, s_noise)
    for i in range(g.steps):
        p, q = churn.points[i], g.point(i + 1)
        yield Row(p, {0: churn.arrive(i + 1, {"x": q.sigma / p.sigma, "d": q.alpha - p.alpha * q.sigma / p.sigma})})


def flow_euler(g: Grid) -> Rows:
    """Euler's method on dx/dt = v, v = n - x_0 (Liu et al. 2023), for any process in its coordinates x / (alpha + sigma).

    One first-order step is the same in every such coordinate: this is `euler` without churn.
    """
    yield from ddim(g)


# Second order, two evaluations a step


def _trapezoid(g: Grid, scale: Callable[[Point], float], churn: _Churn) -> Rows:
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
    yield from _trapezoid(g, lambda p: p.alpha, _Churn(g, s_churn, s_tmin, s_tmax, s_noise))


def flow_heun(g: Grid) -> Rows:
    """Heun's method on the flow's dx/dt = v, for any process in its coordinates x / (alpha + sigma); Euler's where it ends at sigma 0."""
    yield from _trapezoid(g, lambda p: p.alpha + p.sigma, _Churn(g, 0.0, 0.0, 0.0, 0.0))


# Multistep


def _usable(g: Grid, i: int) -> int:
    """How many evaluations a multistep method can use at step i: this one and the earlier ones at a finite lambda."""
    return i + 1 - int(i > 0 and g.alpha[0] == 0)


def lms(g: Grid, *, order: int = 4) -> Rows:
    """Linear multistep (Adams-Bashforth on any grid, as in k-diffusion): integrates the polynomial through the last slopes (y - d) / r."""
    _choice("order", order, (1, 2, 3, 4))
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        euler_step: dict[Term, float] = {"x": q.sigma / p.sigma, "d": q.alpha - p.alpha * q.sigma / p.sigma}
        n = min(order, _usable(g, i))
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


def _dpmpp(g: Grid, order: int, variant: str, eta: float, s_noise: float, lower_order_final: bool, exact: bool = False) -> Rows:
    """Multistep DPM-Solver++: with h = lambda' - lambda and H = (1 + eta) h,

        x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^-H) D + sigma' sqrt(1 - e^(-2 eta h)) noise,

    where D extrapolates d from the history (Lu et al. 2022b, equations 14 and 19; with eta as in k-diffusion).
    """
    log_snr = g.log_snr
    kept = max(order - 1, 1)
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        e, h = _decay(p, q), log_snr[i + 1] - log_snr[i]
        gain = q.alpha * (1 - e ** (1 + eta))
        out: dict[Term, float] = {"x": q.sigma / p.sigma * e**eta, "d": gain}
        out["noise"] = s_noise * q.sigma * math.sqrt(max(1 - e ** (2 * eta), 0.0))
        n = min(order, _usable(g, i), g.steps - i if lower_order_final else order)
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
    _choice("order", order, (1, 2, 3))
    _choice("variant", variant, ("midpoint", "heun"))
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
    _choice("variant", variant, ("midpoint", "heun"))
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
    _choice("order", order, (1, 2, 3))
    _choice("variant", variant, ("bh1", "bh2"))
    used = 0
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        key: dict[int, Term] = {i: "d", **{j: 2 + j % order for j in range(max(i - order, 0), i)}}
        state: dict[Term, float] = {"x": 1.0}
        if corrector and i > 0 and g.alpha[i - 1] > 0:
            weights = _unipc_weights(g, i - 1, used, variant, corrector=True)
            state = {1: p.sigma / float(g.sigma[i - 1]), **{key[j]: w for j, w in weights.items()}}
        used = 1 if q.sigma == 0 else min(order, _usable(g, i), g.steps - i if lower_order_final else order)
        out = {term: c * q.sigma / p.sigma for term, c in state.items()}
        for j, w in _unipc_weights(g, i, used, variant, corrector=False).items():
            out[key[j]] = out.get(key[j], 0.0) + w
        more = i + 1 < g.steps
        save: dict[int, dict[Term, float]] = {2 + i % order: {"d": 1.0}} if more else {}
        yield Row(p, {0: out, **({1: state} if more and corrector else {}), **save})


SOLVERS: dict[str, Solver] = {
    f.__name__: f
    for f in (
        ddim,
        ddpm,
        euler,
        euler_ancestral,
        consistency,
        heun,
        lms,
        dpmpp_2m,
        dpmpp_2m_sde,
        dpmpp_3m_sde,
        unipc,
        flow_euler,
        flow_heun,
    )
}


def make_plan(solver: str | Solver, grid: Grid, **options: Any) -> Plan:
    """The plan of a solver, by name or as a function ``(grid, **options) -> iterator of Row``, on a grid.

    Raises ValueError for unknown solvers and options, with the nearest names, and for rows that cannot be executed.
    """
    function = find_solver(solver, options)
    name = solver if isinstance(solver, str) else getattr(solver, "__name__", "custom")
    return assemble(name, grid.noise, function(grid, **options))


def find_solver(solver: str | Solver, options: dict[str, Any]) -> Solver:
    """The solver's function, once its name and the names of its options are known to be right."""
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise unknown_name("solver", solver, SOLVERS)
        solver = SOLVERS[solver]
    parameters = inspect.signature(solver).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in names and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            if not names:
                raise ValueError(f"options: got {option!r}, supported: none for this solver")
            raise unknown_name("options", option, names)
    return solver
