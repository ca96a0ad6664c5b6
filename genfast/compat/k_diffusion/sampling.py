"""k-diffusion's samplers and sigma functions, with every update of the state in one kernel launch.

Names, signatures, callbacks and the use of torch's random numbers are those of Katherine Crowson's ``k_diffusion.sampling``, so
that one changed import keeps the pictures. What differs is listed in docs/k-diffusion.md.

Common to all ``sample_*``: ``model(x, sigma, **extra_args)`` returns the denoised x; ``x`` (B, \\*sample), float32, float64, bfloat16 or
float16, already scaled to the first sigma; ``sigmas`` (N + 1,) strictly decreasing, the last (usually 0) where the sample is taken;
``callback`` gets a dict with x, i, sigma, sigma_hat and denoised once a step, and what it writes into x and
denoised in place counts as it does upstream; ``disable`` is tqdm's; ``noise_sampler(sigma, sigma_next)``
returns standard normal noise shaped like x. They run without gradients and return a new tensor of x's shape and dtype, or x itself where
``sigmas`` has a single entry. They raise ValueError for other dtypes, for other sigmas and for a model output that does not fit x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import trange

from genfast.ops._checks import check_floating, refusal, versions
from genfast.samplers import SOLVERS, Plan, Row, Solver, make_plan
from genfast.samplers.adaptive import PIDStepSizeController
from genfast.schedules import Grid, edm

from .dpm_solver import DPMSolver, sample_dpm_adaptive, sample_dpm_fast
from .likelihood import log_likelihood
from .loop import Callback, Draws, ExtraArgs, Model, Packed, pack, run
from .noise import BatchedBrownianTree, BrownianTreeNoiseSampler, NoiseSampler, brownian, default_noise_sampler
from .sigmas import (
    append_zero,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    to_d,
)

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "DPMSolver",
    "PIDStepSizeController",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "log_likelihood",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]


# The samplers as data


def _dpm2_ancestral(g: Grid, *, eta: float, s_noise: float) -> Iterator[Row]:
    """`dpm2_ancestral`, without noise in the steps that go down to 0, where k-diffusion leaves it out whatever sigma_up is."""
    for row in SOLVERS["dpm2_ancestral"](g, eta=eta, s_noise=s_noise):
        one_evaluation = not row.reads and len(row.outputs) == 1
        yield replace(row, outputs={0: {"d": 1.0}}) if one_evaluation else row


def _dpmpp_sde(g: Grid, *, eta: float, s_noise: float, r: float) -> Iterator[Row]:
    """The singlestep SDE form of DPM-Solver++ (k-diffusion): the second evaluation lies at r of the step in log sigma.

    `genfast.samplers` has it with the noises of one Brownian motion; here ``noise_sampler`` gives both, and r is free.
    """
    fac = 1 / (2 * r)
    for sigma, to in pairwise(map(float, g.sigma)):
        if to == 0:
            yield Row(g.at(sigma), {0: {"d": 1.0}})
            continue
        mid = sigma ** (1 - r) * to**r
        down_mid, up_mid = get_ancestral_step(sigma, mid, eta)
        down, up = get_ancestral_step(sigma, to, eta)
        gain = 1 - down / sigma
        saved: dict[str | int, float] = {"x": down / sigma, "d": gain * (1 - fac)}
        yield Row(g.at(sigma), {0: {"x": down_mid / sigma, "d": 1 - down_mid / sigma, "noise": s_noise * up_mid}, 1: saved})
        yield Row(g.at(mid), {0: {1: 1.0, "d": gain * fac, "noise": s_noise * up}})


@dataclass(frozen=True)
class _Sampler:
    """A solver, and what noise k-diffusion draws in a step to sigma ``to`` that goes down to ``down`` before its noise, used or not."""

    solver: str | Solver
    draws: Callable[[float, float, float], Draws]  # of to, down and eta


_SAMPLERS = {
    "euler_ancestral": _Sampler("euler_ancestral", lambda to, down, eta: (to > 0,)),
    "dpm_2_ancestral": _Sampler(_dpm2_ancestral, lambda to, down, eta: (False, True) if down > 0 else (False,)),
    "dpmpp_2s_ancestral": _Sampler("dpmpp_2s_ancestral", lambda to, down, eta: (False, True) if down > 0 else (to > 0,)),
    "dpmpp_sde": _Sampler(_dpmpp_sde, lambda to, down, eta: (True, True) if to > 0 else (False,)),
    "dpmpp_2m_sde": _Sampler("dpmpp_2m_sde", lambda to, down, eta: (eta != 0 and to > 0,)),
    "dpmpp_3m_sde": _Sampler("dpmpp_3m_sde", lambda to, down, eta: (eta != 0 and to > 0,)),
    "lms": _Sampler("lms", lambda to, down, eta: (False,)),
    "dpmpp_2m": _Sampler("dpmpp_2m", lambda to, down, eta: (False,)),
    # With churn, noise is drawn at the start of every step. Here it belongs to the row that arrives there, so that churn costs no launch;
    # that of the first step is drawn apart, and the last row draws none.
    "euler": _Sampler("euler", lambda to, down, eta: (True,)),
    "heun": _Sampler("heun", lambda to, down, eta: (False, True) if to > 0 else (True,)),
    "dpm_2": _Sampler("dpm2", lambda to, down, eta: (False, True) if to > 0 else (True,)),
}
_CHURN = ("euler", "heun", "dpm_2")
_SLOPE_FIRST = (*_CHURN, "lms")  # upstream takes the slope before it calls back


@lru_cache(maxsize=64)
def _prepare(
    name: str, sigmas: tuple[float, ...], options: tuple[tuple[str, Any], ...], dtype: torch.dtype, device: torch.device
) -> tuple[Plan, Packed, list[Draws]]:
    """The plan of a sampler, packed, and its draws. Kept for later calls: writing a plan takes longer than executing a small one."""
    levels, eta = np.array(sigmas), dict(options).get("eta", 0.0)
    sampler = _SAMPLERS[name]
    plan = make_plan(sampler.solver, Grid(edm(), levels, np.ones_like(levels), levels), **dict(options)).with_noise_slot()
    draws = [sampler.draws(to, get_ancestral_step(s, to, eta)[0], eta) for s, to in pairwise(sigmas)]
    if name in _CHURN:
        draws[-1] = (False,) * len(draws[-1])
    assert sum(map(len, draws)) == len(plan.rows)
    return plan, pack(plan.rows, dtype, device), draws


def _sample(
    name: str,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None,
    told: Tensor | None,
    **options: Any,
) -> Tensor:
    """Run a sampler. ``told`` are the sigmas of the rows, and of the end, as ``noise_sampler`` gets them, where they are not those fed."""
    if len(sigmas) < 2:
        return x
    check_floating("x", x)
    on_host = sigmas.detach().to("cpu", torch.float64).tolist()  # the one transfer to the host
    plan, rows, draws = _prepare(name, tuple(on_host), tuple(options.items()), x.dtype, x.device)
    if name in _CHURN:
        noise = torch.randn_like(x)
        added = plan.rows[0].point.sigma ** 2 - on_host[0] ** 2
        if added > 0:
            x = x + noise * (options["s_noise"] * math.sqrt(added))
    # In the dtype of sigmas, where those of the grid have their own bits.
    levels = torch.cat([rows.sigma.to(sigmas), sigmas[-1:].detach()])
    told = levels if told is None else told
    draw_noise = default_noise_sampler(x) if noise_sampler is None else noise_sampler

    def draw(i: int, first: int, k: int) -> Tensor:
        return draw_noise(told[first], told[k + 1])

    def on_step(i: int, first: int, x: Tensor, denoised: Tensor) -> None:
        assert callback is not None
        before = versions(sigmas, levels)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": levels[first], "denoised": denoised})
        if versions(sigmas, levels) != before:
            raise refusal("callback", "one that writes into sigmas", "one that writes into x and denoised, as the sigmas are on the host")

    bar, told_to = trange(len(draws), disable=disable), on_step if callback is not None else None
    first = name in _SLOPE_FIRST
    return run(model, x, rows, draws, levels[:-1].to(x), extra_args, bar, draw, plan.noise_slot, told_to, slope_first=first)[0]


# Samplers with churn (Karras et al. 2022, algorithm 2)


def _sample_churned(
    name: str,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> Tensor:
    # Upstream compares in the dtype of sigmas, where 0.1 may lie above 0.1.
    low, high = (float(torch.tensor(bound, dtype=sigmas.dtype)) for bound in (s_tmin, s_tmax))
    churn = {"s_churn": s_churn, "s_tmin": low, "s_tmax": high, "s_noise": s_noise}
    return _sample(name, model, x, sigmas, extra_args, callback, disable, None, None, **churn)


@torch.no_grad()
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method with churn, the algorithm without its correction."""
    return _sample_churned("euler", model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method with churn."""
    return _sample_churned("heun", model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver-2, the midpoint method in log sigma (Lu et al. 2022a), with churn."""
    return _sample_churned("dpm_2", model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise)


# Ancestral samplers


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with Euler steps."""
    return _sample("euler_ancestral", model, x, sigmas, extra_args, callback, disable, noise_sampler, None, eta=eta, s_noise=s_noise)


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver-2 steps."""
    return _sample("dpm_2_ancestral", model, x, sigmas, extra_args, callback, disable, noise_sampler, None, eta=eta, s_noise=s_noise)


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver++(2S) steps (Lu et al. 2022b, algorithm 1)."""
    return _sample("dpmpp_2s_ancestral", model, x, sigmas, extra_args, callback, disable, noise_sampler, None, eta=eta, s_noise=s_noise)


# Samplers of the SDE: their noise defaults to one Brownian path, for which they need torchsde


@torch.no_grad()
def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """DPM-Solver++ (stochastic), two evaluations a step."""
    if len(sigmas) < 2:
        return x
    noise_sampler = brownian(x, sigmas) if noise_sampler is None else noise_sampler
    # Upstream's sigmas went through log and exp, and a Brownian path tells their last bits apart.
    t = -sigmas.log()
    told = torch.cat([torch.stack([t[:-1], t[:-1] + (t[1:] - t[:-1]) * r], 1).flatten(), t[-1:]]).neg().exp()
    return _sample("dpmpp_sde", model, x, sigmas, extra_args, callback, disable, noise_sampler, told, eta=eta, s_noise=s_noise, r=r)


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) SDE (Lu et al. 2022b, equation 19).

    ``solver_type`` "midpoint" or "heun" is how the last two evaluations are extrapolated.
    """
    if solver_type not in ("heun", "midpoint"):
        raise refusal("solver_type", repr(solver_type), "'heun', 'midpoint'")
    if len(sigmas) < 2:
        return x
    noise_sampler = brownian(x, sigmas) if noise_sampler is None else noise_sampler
    return _sample(
        "dpmpp_2m_sde", model, x, sigmas, extra_args, callback, disable, noise_sampler, None, eta=eta, s_noise=s_noise, variant=solver_type
    )


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(3M) SDE."""
    if len(sigmas) < 2:
        return x
    noise_sampler = brownian(x, sigmas) if noise_sampler is None else noise_sampler
    return _sample("dpmpp_3m_sde", model, x, sigmas, extra_args, callback, disable, noise_sampler, None, eta=eta, s_noise=s_noise)


# Multistep


@torch.no_grad()
def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep: the polynomial through the last ``order`` slopes, 1 to 4, integrated over sigma."""
    return _sample("lms", model, x, sigmas, extra_args, callback, disable, None, None, order=order)


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""
    return _sample("dpmpp_2m", model, x, sigmas, extra_args, callback, disable, None, None)
