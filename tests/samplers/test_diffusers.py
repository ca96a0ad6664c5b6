"""Solvers against diffusers' schedulers, with their noise."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from gaussian import execute

from genfast import schedules
from genfast.samplers import Denoiser, make_plan
from genfast.schedules import Point


def _diffusers(name: str, **config: object):
    diffusers = importlib.import_module("diffusers")
    return getattr(diffusers, name)(**config)


def _run_scheduler(scheduler, model, x: torch.Tensor, **options: object) -> torch.Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), float(t)), t, x, **options).prev_sample
    return x


BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("scheduler", "config", "solver", "options"),
    [
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, "ddim", {}),
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m", {}),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun", "timestep_spacing": "trailing"}, "dpmpp_2m", {"variant": "heun"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "dpmpp_2m", {"order": 3, "lower_order_final": True}),
        ("UniPCMultistepScheduler", {}, "unipc", {}),
        ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", {"order": 3}),
        *[("DEISMultistepScheduler", {"solver_order": k}, "deis", {"order": k}) for k in (1, 2, 3)],
        *[("DPMSolverSinglestepScheduler", {"solver_order": k}, "dpmpp_singlestep", {"order": k}) for k in (1, 2, 3)],
        ("DPMSolverSinglestepScheduler", {"solver_order": 2, "solver_type": "heun"}, "dpmpp_singlestep", {"variant": "heun"}),
        *[
            ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", **stock}, "dpm_solver", ours)
            for stock, ours in [
                ({"solver_order": 1}, {"order": 1}),
                ({"solver_order": 2, "solver_type": "heun"}, {"variant": "heun", "lower_order_final": True}),
                ({"solver_order": 3}, {"order": 3, "lower_order_final": True}),
            ]
        ],
        ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, "pndm", {}),
        ("PNDMScheduler", {"set_alpha_to_one": True}, "pndm", {"prk": True}),
        ("KDPM2DiscreteScheduler", {"timestep_spacing": "trailing"}, "dpm2", {}),
        ("TCDScheduler", {"original_inference_steps": 50}, "tcd", {"eta": 0.0}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler", {}),
        ("HeunDiscreteScheduler", {"timestep_spacing": "trailing"}, "heun", {}),
    ],
)
def test_equals_diffusers(scheduler: str, config: dict, solver: str, options: dict) -> None:
    stock = _diffusers(scheduler, **BETAS, **config)
    stock.set_timesteps(10)
    times = stock._timesteps[::-1] if scheduler == "PNDMScheduler" else list(dict.fromkeys(stock.timesteps.tolist()))
    noise = schedules.scaled_linear()
    grid = schedules.grid(noise, timesteps=times)
    if scheduler == "KDPM2DiscreteScheduler":  # its midpoints lie between
        grid = schedules.grid(noise, timesteps=times[::2])
    if (
        scheduler in ("DEISMultistepScheduler", "TCDScheduler") or "final_sigmas_type" in config
    ):  # they end at the smallest level of the process
        grid = schedules.grid(noise, sigmas=[*grid.ratio[:-1], noise.sigma_ratios[0]])
    plan = make_plan(solver, grid, **options)

    def epsilon(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(2 * x + t / 300) * 0.8 + 0.1 * x

    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3)))
    ours = execute(plan, lambda x, p: (x - p.sigma * epsilon(torch.from_numpy(x), p.time).numpy()) / p.alpha, x.numpy())
    # Some schedulers keep y = x / alpha and scale the network's input themselves.
    scaled = scheduler in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler")
    first = plan.rows[0].point
    theirs = _run_scheduler(stock, epsilon, x / first.alpha if scaled else x, **({"eta": 0.0} if solver == "tcd" else {}))
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=2e-4, atol=2e-4)


def _recorded_noise(stock, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the scheduler draws from now on, in order."""
    drawn: list[np.ndarray] = []

    def randn(shape, **_):
        drawn.append(np.random.default_rng(len(drawn)).standard_normal(shape))
        return torch.from_numpy(drawn[-1])

    monkeypatch.setattr(importlib.import_module(type(stock).__module__), "randn_tensor", randn)
    return drawn


@pytest.mark.parametrize(
    ("scheduler", "config", "solver", "options"),
    [
        ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral", {}),
        ("KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "dpm2_ancestral", {}),
        ("LCMScheduler", {"original_inference_steps": 50, "timestep_scaling": 0.01}, "lcm", {"timestep_scaling": 0.01}),
        ("TCDScheduler", {"original_inference_steps": 50}, "tcd", {"eta": 0.3}),
        ("TCDScheduler", {"original_inference_steps": 50}, "tcd", {"eta": 1.0}),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}, "ddpm", {}),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small_log"}, "ddpm", {}),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}, "ddpm", {"variance": "large"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, "dpmpp_2m_sde", {"variant": "heun"}),
        ("SASolverScheduler", {"tau_func": lambda t: 1.0}, "sa_solver", {"corrector_order": 1, "exact": False}),
        (
            "SASolverScheduler",
            {"predictor_order": 3, "corrector_order": 4, "tau_func": lambda t: 0.6},
            "sa_solver",
            {"predictor_order": 3, "corrector_order": 3, "tau": 0.6, "exact": False},
        ),
        (
            "SASolverScheduler",
            {"predictor_order": 2, "corrector_order": 3},
            "sa_solver",
            {"corrector_order": 2, "tau": lambda p: float(200 <= p.time <= 800), "exact": False},
        ),
    ],
)
def test_equals_diffusers_with_its_noise(scheduler: str, config: dict, solver: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = _diffusers(scheduler, **BETAS, **config)
    stock.set_timesteps(8)
    drawn = _recorded_noise(stock, monkeypatch)
    noise = schedules.scaled_linear()
    times = list(dict.fromkeys(stock.timesteps.tolist()))
    if scheduler == "KDPM2AncestralDiscreteScheduler":
        times = stock.timesteps.tolist()[::2]  # its midpoints lie between
    grid = schedules.grid(noise, timesteps=times)
    if scheduler in ("TCDScheduler", "SASolverScheduler"):  # they end at the smallest level of the process
        grid = schedules.grid(noise, sigmas=[*grid.ratio[:-1], noise.sigma_ratios[0]])
    if solver == "sa_solver":
        options = {**options, "lower_order_final": True}
    plan = make_plan(solver, grid, **options)

    def epsilon(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(2 * x + t / 300) * 0.8 + 0.1 * x

    x = torch.from_numpy(np.random.default_rng(99).standard_normal((2, 3)))
    scaled = scheduler in ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")  # they keep y = x / alpha
    theirs = _run_scheduler(
        stock, epsilon, x / plan.rows[0].point.alpha if scaled else x, **({"eta": options["eta"]} if solver == "tcd" else {})
    )
    rows = len(plan.rows) // 7  # of a step
    draws = {row.draw: drawn[row.draw // rows - 1] for row in plan.rows if row.draw}
    assert len(draws) >= 5 and len(drawn) in (7, 8)  # some draw where nothing is added
    ours = execute(plan, lambda x, p: (x - p.sigma * epsilon(torch.from_numpy(x), p.time).numpy()) / p.alpha, x.numpy(), draws)
    np.testing.assert_allclose(
        ours / plan.noise.at_ratio(grid.ratio[-1])[0] if scaled else ours, theirs.double().numpy(), rtol=4e-4, atol=4e-4
    )


@pytest.mark.parametrize(
    ("scheduler", "config", "solver", "options", "sigmas"),
    [
        ("EDMEulerScheduler", {}, "euler", {}, "karras"),
        ("EDMDPMSolverMultistepScheduler", {"euler_at_final": True}, "dpmpp_2m", {}, "karras"),
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "dpmpp_2m", {"order": 3}, "karras"),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True}, "dpmpp_2m_sde", {}, "karras"),
        ("CosineDPMSolverMultistepScheduler", {"prediction_type": "epsilon", "euler_at_final": True}, "dpmpp_2m_sde", {}, "exponential"),
    ],
)
def test_edm_schedulers_are_solvers_on_the_edm_process(
    scheduler: str, config: dict, solver: str, options: dict, sigmas: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' EDM and cosine classes: a solver here, with prediction "edm" (and time atan(sigma) 2 / pi for the cosine one)."""
    stock = _diffusers(scheduler, sigma_min=0.01, sigma_max=50.0, sigma_data=0.4, **config)
    stock.set_timesteps(8)
    cosine = scheduler.startswith("Cosine")
    drawn = [] if cosine else _recorded_noise(stock, monkeypatch)

    def brownian(*_: object) -> torch.Tensor:
        drawn.append(np.random.default_rng(len(drawn)).standard_normal(6))
        return torch.from_numpy(drawn[-1])

    stock.noise_sampler = brownian
    noise = schedules.edm(0.01, 50.0)
    den = Denoiser(lambda *_: None, "edm", noise=noise, sigma_data=0.4, time=(lambda p: np.arctan(p.sigma) / np.pi * 2) if cosine else None)
    plan = make_plan(solver, schedules.grid(noise, 8, sigmas=sigmas), **options)

    def net(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(2 * x + t) * 0.8 + 0.1 * x

    def model(x: np.ndarray, point: Point) -> np.ndarray:
        ax, am = den.convert(point)
        return ax * x + am * net(torch.from_numpy(den.c_in(point) * x), den.time_value(point)).numpy()

    x = torch.from_numpy(np.random.default_rng(99).standard_normal(6)) * 50
    theirs = _run_scheduler(stock, net, x)
    ours = execute(plan, model, x.numpy(), dict(zip([row.draw for row in plan.rows if row.draw], drawn, strict=False)))
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=4e-4, atol=4e-4)


def test_equals_diffusers_flow_match_euler() -> None:
    stock = _diffusers("FlowMatchEulerDiscreteScheduler", shift=3.0)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / 10, 10))
    grid = schedules.grid(schedules.flow(3.0), 10)
    np.testing.assert_allclose(grid.time, stock.sigmas.double().numpy(), atol=1e-7)

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(2 * x + t) * 0.8

    x = torch.from_numpy(np.random.default_rng(0).standard_normal(6))
    theirs = x.clone()
    for t in stock.timesteps:
        theirs = stock.step(velocity(theirs, float(t) / 1000), t, theirs).prev_sample
    ours = execute(make_plan("flow_euler", grid), lambda x, p: x - p.time * velocity(torch.from_numpy(x), p.time).numpy(), x.numpy())
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=1e-5, atol=1e-5)


def test_inverse_equals_diffusers() -> None:
    """A network that knows no time, as diffusers asks it at the time that a step leads to and `ddim_inverse` where the state lies."""
    stock = _diffusers("DDIMInverseScheduler", **BETAS, clip_sample=False)
    stock.set_timesteps(8)
    plan = make_plan("ddim_inverse", schedules.grid(schedules.scaled_linear(), timesteps=stock.timesteps.tolist()[::-1]))

    def epsilon(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(2 * x) * 0.8 + 0.1 * x

    x = torch.from_numpy(np.random.default_rng(0).standard_normal(6))
    theirs = x.clone()
    for t in stock.timesteps:
        theirs = stock.step(epsilon(theirs), t, theirs).prev_sample
    ours = execute(plan, lambda x, p: (x - p.sigma * epsilon(torch.from_numpy(x)).numpy()) / p.alpha, x.numpy())
    np.testing.assert_allclose(ours, theirs.double().numpy(), rtol=1e-4, atol=1e-4)
