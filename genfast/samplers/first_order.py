"""First-order solvers, deterministic and ancestral."""

from __future__ import annotations

import math
from typing import Literal

from genfast.schedules import Grid

from .plan import Row, Term
from .rows import Churn, Rows, ancestral_rf, choice, combine, large_std, ode_step, posterior_std, slope


def ddim(g: Grid, *, eta: float = 0.0, s_noise: float = 1.0) -> Rows:
    """DDIM (Song et al. 2021a, equations 12 and 16): eta = 0 is the ODE, eta = 1 ancestral sampling."""
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        std = min(eta * posterior_std(p, q), q.sigma)
        kept = math.sqrt(q.sigma**2 - std**2)  # the coefficient of the predicted noise (x - alpha d) / sigma
        yield Row(p, {0: {"x": kept / p.sigma, "d": q.alpha - p.alpha * kept / p.sigma, "noise": s_noise * std}})


def ddim_inverse(g: Grid) -> Rows:
    """DDIM's ODE followed backwards, from data to noise (Song et al. 2021a, section 4.3): inversion of a given sample.

    It starts from the state at the grid's last point, which `Sampler` takes as ``latent``, and visits the grid in reverse. At sigma 0
    the network says nothing about noise and is asked at the next point instead.
    """
    for i in range(g.steps, 0, -1):
        p, q = g.point(i), g.point(i - 1)
        if p.sigma == 0:
            yield Row(q, {0: combine((q.alpha, {"x": 1.0}), (q.sigma, slope(q)))})
        else:
            yield Row(p, {0: ode_step(p, q)})


def ddpm(g: Grid, *, variance: Literal["small", "large", "learned"] = "small") -> Rows:
    """DDPM ancestral sampling (Ho et al. 2020, equations 6 and 7); "large" takes beta, of section 3.2, for the variance.

    "learned" takes the network's (`Denoiser`'s ``variance``; Nichol and Dhariwal 2021, section 3.1).
    """
    choice("variance", variance, ("small", "large", "learned"))
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        std = posterior_std(p, q)
        kept = math.sqrt(max(q.sigma**2 - std**2, 0.0))
        out: dict[Term, float] = {"x": kept / p.sigma, "d": q.alpha - p.alpha * kept / p.sigma, "noise": std}
        if variance != "small" and q.sigma > 0:  # the last step draws no noise
            del out["noise"]
            out |= {"noise": large_std(p, q)} if variance == "large" else {"learned": 1.0}
        yield Row(p, {0: out})


def euler_ancestral(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Ancestral Euler (k-diffusion): an Euler step to sigma_down, then noise of sigma_up. The same update as DDIM's with eta."""
    yield from ddim(g, eta=eta, s_noise=s_noise)


def euler_ancestral_rf(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """Ancestral Euler for rectified flows (ComfyUI): `euler_ancestral` with `ancestral_rf`'s levels."""
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        down, up = ancestral_rf(p, q, eta)
        kept = q.alpha * down / p.sigma
        yield Row(p, {0: {"x": kept, "d": q.alpha - p.alpha * kept, "noise": q.alpha * up * s_noise}})


def consistency(g: Grid, *, epsilon: float = 0.0) -> Rows:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1): d, noised anew.

    ``epsilon`` is the level, in sigma / alpha, at which the model's boundary condition holds; no noise leads to it or below.
    """
    for i in range(g.steps):
        q = g.point(i + 1)
        std = math.sqrt(max((q.sigma / q.alpha) ** 2 - epsilon**2, 0.0))
        yield Row(g.point(i), {0: {"d": q.alpha, "noise": q.alpha * std}})


def lcm(g: Grid, *, timestep_scaling: float = math.inf, sigma_data: float = 0.5) -> Rows:
    """Latent consistency models' sampler (Luo et al. 2023): `consistency`, d being c_skip x + c_out d in the paper's appendix C.

    With s = ``timestep_scaling`` times the process's time, c_skip = sigma_data^2 / (s^2 + sigma_data^2) and c_out = sqrt(1 - c_skip).
    diffusers takes 10, which makes c_skip small; the default leaves it out.
    """
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        skip = 0.0 if timestep_scaling == math.inf else sigma_data**2 / ((timestep_scaling * p.time) ** 2 + sigma_data**2)
        yield Row(p, {0: {"x": q.alpha * skip, "d": q.alpha * math.sqrt(1 - skip), "noise": q.sigma}})


def tcd(g: Grid, *, eta: float = 0.3) -> Rows:
    """Strategic stochastic sampling of trajectory consistency models (Zheng et al. 2024); ``eta`` is the paper's gamma.

    The consistency function leads to the time (1 - gamma) t', down to a whole one where times are indices, and noise from there to t'.
    The last step leads to its end and draws nothing.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, supported: a number in [0, 1]")
    for i in range(g.steps):
        p, q = g.point(i), g.point(i + 1)
        if i + 1 == g.steps:
            yield Row(p, {0: ode_step(p, q)})
            continue
        s_alpha, s_sigma = q.alpha, q.sigma
        if eta > 0:
            time = math.floor((1 - eta) * q.time) if g.noise.kind == "vp" else (1 - eta) * q.time
            s_alpha, s_sigma = (float(v) for v in g.noise.alpha_sigma(time))
        keep = q.alpha / s_alpha
        kept = keep * s_sigma / p.sigma
        std = math.sqrt(max(q.sigma**2 - (keep * s_sigma) ** 2, 0.0))
        yield Row(p, {0: {"x": kept, "d": q.alpha - p.alpha * kept, "noise": std}})


def euler(g: Grid, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0) -> Rows:
    """Euler's method on dy/dr = (y - d) / r with y = x / alpha, with churn (Karras et al. 2022, algorithm 2 without its correction)."""
    churn = Churn(g, s_churn, s_tmin, s_tmax, s_noise)
    for i in range(g.steps):
        p, q = churn.points[i], g.point(i + 1)
        yield Row(p, {0: churn.arrive(i + 1, ode_step(p, q))})


def flow_euler(g: Grid) -> Rows:
    """Euler's method on dx/dt = v, v = n - x_0 (Liu et al. 2023), for any process in its coordinates x / (alpha + sigma).

    One first-order step is the same in every such coordinate: this is `euler` without churn.
    """
    yield from ddim(g)
