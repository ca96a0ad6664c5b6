"""Grids against formulas written out here, diffusers' schedulers, and the errors they promise."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest

from genfast import schedules
from genfast.schedules import Grid, grid

VP, VE, FLOW = schedules.scaled_linear(), schedules.edm(), schedules.flow(3.0)


def test_karras_is_equation_5() -> None:
    n, rho = 7, 7
    expected = [(80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(n)]
    np.testing.assert_allclose(grid(VE, n).sigma, [*expected, 0], rtol=1e-13)
    g = grid(VP, n, sigmas=partial(schedules.karras, sigma_min=0.1, sigma_max=10.0, rho=3.0))
    np.testing.assert_allclose(g.ratio[[0, 3, -2]], [10, (0.5 * 10 ** (1 / 3) + 0.5 * 0.1 ** (1 / 3)) ** 3, 0.1], rtol=1e-12)
    np.testing.assert_allclose(g.alpha**2 + g.sigma**2, 1, rtol=1e-14)


def test_exponential_is_even_in_log_sigma() -> None:
    g = grid(VP, 9, sigmas="exponential")
    np.testing.assert_allclose(np.diff(g.log_snr[:-1]), np.diff(g.log_snr[:-1])[0], rtol=1e-10)
    np.testing.assert_allclose(g.time[[0, -2, -1]], [999, 0, 0], atol=1e-9)


@pytest.mark.parametrize(("name", "steps"), [("trailing", 10), ("trailing", 7), ("leading", 10), ("leading", 7), ("linspace", 10)])
def test_timesteps_equal_diffusers(name: str, steps: int) -> None:
    diffusers = importlib.import_module("diffusers")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=name)
    scheduler.set_timesteps(steps)
    g = grid(VP, steps, sigmas=name)
    assert g.time[:-1].tolist() == scheduler.timesteps.tolist()
    np.testing.assert_array_equal(g.alpha[:-1] ** 2, np.sqrt(VP.alphas_cumprod[g.time[:-1].astype(int)]) ** 2)
    assert g.alpha[-1] == 1 and g.sigma[-1] == 0


def test_leading_offset() -> None:
    assert grid(VP, 4, sigmas=partial(schedules.leading, offset=1)).time.tolist() == [751, 501, 251, 1, 0]


def test_flow_times_are_shifted() -> None:
    t = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(grid(FLOW, 4).time, 3 * t / (1 + 2 * t), rtol=1e-14)
    np.testing.assert_allclose(grid(FLOW, 4, sigmas=partial(schedules.trailing, shift=1.0)).time, t, rtol=1e-14)
    np.testing.assert_allclose(grid(FLOW, 4, sigmas="linspace").time[[0, -2]], [1, 0.003 / 1.002], rtol=1e-12)


def test_given_lists() -> None:
    g = grid(VP, sigmas=[5.0, 1.0, 0.2])
    assert g.steps == 2 and g.sigma[-1] > 0
    np.testing.assert_allclose(g.ratio, [5, 1, 0.2], rtol=1e-14)
    assert grid(VP, timesteps=[900, 400.5, 3]).time.tolist() == [900, 400.5, 3, 0]
    assert grid(FLOW, sigmas=[1.0, 0.5, 0.0]).alpha.tolist() == [0, 0.5, 1]


def test_points_off_the_grid() -> None:
    for noise in (VP, VE, FLOW):
        point = grid(noise, 5, sigmas="exponential").at(0.37)
        assert point.sigma / point.alpha == pytest.approx(0.37, rel=1e-12)
        alpha, sigma = noise.alpha_sigma(point.time)
        assert (alpha, sigma) == (pytest.approx(point.alpha, rel=1e-9), pytest.approx(point.sigma, rel=1e-9))
        assert noise.sigma_of(point) == pytest.approx(0.37 / 1.37 if noise is FLOW else 0.37)


def test_zero_terminal_snr_is_algorithm_1() -> None:
    noise = schedules.zero_terminal_snr(VP)
    alpha = np.sqrt(VP.alphas_cumprod)
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    np.testing.assert_allclose(np.sqrt(noise.alphas_cumprod), expected, rtol=1e-12, atol=1e-15)
    g = grid(noise, 5)
    assert g.alpha[0] == 0 and g.sigma[0] == 1 and np.isinf(g.ratio[0]) and g.log_snr[0] == -np.inf and g.time[0] == 999
    assert np.isfinite(noise.alpha_sigma([998.5, 999, 0])).all()


@pytest.mark.parametrize(
    ("noise", "arguments", "message"),
    [
        (VP, {"steps": 0}, "steps: got 0, supported: an integer of at least 1"),
        (VP, {"steps": -3}, "steps: got -3, supported: an integer of at least 1"),
        (VP, {"steps": 2.5}, "steps: got 2.5, supported: an integer of at least 1"),
        (VP, {}, "steps: got None, supported: an integer of at least 1"),
        (VP, {"steps": 1001}, "steps: got 1001, supported with sigmas='trailing': at most the process's 1000 times"),
        (
            VP,
            {"steps": 4, "sigmas": "karas"},
            r"sigmas: got 'karas' \(did you mean karras\?\), supported: ays_sd1, ays_sdxl, ays_svd, beta",
        ),
        (
            VE,
            {"steps": 4, "sigmas": "trailing"},
            "sigmas: got 'trailing' for the 'edm' process, supported there: exponential, karras, kl_optimal or a list",
        ),
        (
            FLOW,
            {"steps": 4, "sigmas": "leading"},
            "sigmas: got 'leading' for the 'flow' process, supported there: exponential, karras, kl_optimal, linspace",
        ),
        (VE, {"sigmas": [1.0, 2.0, 0.0]}, r"sigmas: got \[1. 2. 0.\], supported: strictly decreasing numbers"),
        (VE, {"sigmas": [2.0, 2.0, 0.0]}, "supported: strictly decreasing numbers"),
        (VE, {"sigmas": [2.0, 1.0, -1.0]}, "supported: at least two, strictly decreasing, none below 0"),
        (VE, {"sigmas": [2.0]}, "sigmas: got an array of shape"),
        (VE, {"sigmas": [np.nan, 1.0]}, "supported: a list of finite numbers"),
        (FLOW, {"sigmas": [1.2, 0.5, 0.0]}, "sigmas: got 0 to 1.2, supported by 'flow': 0 to 1"),
        (VP, {"timesteps": [1000, 500]}, "timesteps: got 500 to 1000, supported by 'scaled_linear': 0 to 999"),
        (VP, {"timesteps": [500, 700]}, "timesteps: got .* supported: strictly decreasing numbers"),
        (VP, {"timesteps": [500], "sigmas": "karras"}, "timesteps: got a list together with sigmas, supported: one of the two"),
        (VP, {"timesteps": [500, 100], "steps": 3}, "steps: got 3 with timesteps for 2"),
        (schedules.zero_terminal_snr(VP), {"steps": 3, "sigmas": "karras"}, "sigmas: got 'karras' from sigma_max inf"),
        (FLOW, {"steps": 3, "sigmas": "ays_sd1"}, "sigmas: got 'ays_sd1' for the 'flow' process, supported: variance preserving"),
        (VE, {"steps": 3, "sigmas": "beta"}, "sigmas: got 'beta' for the 'edm' process, supported there: exponential"),
        (FLOW, {"steps": 3, "sigmas": "ddim_uniform"}, "sigmas: got 'ddim_uniform' for the 'flow' process"),
        (VP, {"steps": 3, "sigmas": partial(schedules.beta, a=0.0)}, "a, b: got 0.0 and 0.6, supported: numbers above 0"),
        (VP, {"steps": 3, "sigmas": partial(schedules.trailing, terminal=0.1)}, "terminal: got 0.1 for the 'scaled_linear' process"),
        (
            FLOW,
            {"steps": 3, "sigmas": partial(schedules.linspace, terminal=1.0)},
            r"terminal: got 1.0, supported: None or a time in \(0, 1",
        ),
        (
            FLOW,
            {"steps": 4, "sigmas": partial(schedules.linear_quadratic, linear_steps=4)},
            "linear_steps: got 4 of 4 with threshold 0.025, supported: 1 to steps - 1",
        ),
    ],
)
def test_errors(noise: schedules.NoiseSchedule, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(noise, **arguments)


def test_grid_checks_itself() -> None:
    with pytest.raises(ValueError, match="strictly decreasing"):
        Grid(VE, np.array([1.0, 2.0]), np.ones(2), np.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="noise: got kind 've', supported: 'vp'"):
        schedules.zero_terminal_snr(VE)


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
def test_schedules_equal_diffusers(schedule: str) -> None:
    diffusers = importlib.import_module("diffusers")
    stock = diffusers.DDPMScheduler(beta_schedule=schedule).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(getattr(schedules, schedule)().alphas_cumprod, stock, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("ours", "stock"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2"), ("sigmoid", "sigmoid")]
)
def test_zero_terminal_snr_equals_diffusers(ours: str, stock: str) -> None:
    diffusers = importlib.import_module("diffusers")
    scheduler = diffusers.DDPMScheduler
    plain, rescaled = (scheduler(beta_schedule=stock, rescale_betas_zero_snr=z).alphas_cumprod.double().numpy() for z in (False, True))
    noise = getattr(schedules, ours)(**({"beta_start": 1e-4, "beta_end": 0.02} if ours == "scaled_linear" else {}))
    np.testing.assert_allclose(noise.alphas_cumprod, plain, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(schedules.zero_terminal_snr(noise).alphas_cumprod, rescaled, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config"), [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("lu", "use_lu_lambdas")]
)
def test_sigma_grids_equal_diffusers(name: str, config: str) -> None:
    """diffusers spaces between the levels of its times 0 and 999, as the defaults here do."""
    diffusers = importlib.import_module("diffusers")
    stock = diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="linspace", **{config: True}
    )
    stock.set_timesteps(9)
    np.testing.assert_allclose(grid(VP, 9, sigmas=name).ratio, stock.sigmas.double().numpy(), rtol=1e-5, atol=1e-6)


def test_polyexponential_and_lu() -> None:
    """k-diffusion's formula; rho = 1 and "lu" are even in log sigma."""
    ramp = (1 - np.arange(6) / 5) ** 2.5
    g = grid(VE, 6, sigmas=partial(schedules.polyexponential, rho=2.5))
    np.testing.assert_allclose(g.sigma[:-1], [np.exp(r * np.log(80 / 0.002)) * 0.002 for r in ramp], rtol=1e-12)
    for name in ("polyexponential", "lu"):
        np.testing.assert_allclose(grid(VP, 6, sigmas=name).ratio, grid(VP, 6, sigmas="exponential").ratio, rtol=1e-12)


def test_kl_optimal_is_even_in_the_arctangent() -> None:
    angles = np.arctan(grid(VE, 9, sigmas="kl_optimal").sigma)
    np.testing.assert_allclose(np.diff(angles[:-1]), (np.arctan(0.002) - np.arctan(80)) / 8, rtol=1e-12)
    assert angles[-1] == 0


@pytest.mark.parametrize(("steps", "linear"), [(10, 5), (7, 3), (64, 32), (9, 2)])
def test_linear_quadratic_is_mochis(steps: int, linear: int) -> None:
    """The coefficients as Genmo and diffusers write them."""
    threshold = 0.025
    difference = linear - threshold * steps
    a = difference / (linear * (steps - linear) ** 2)
    b = threshold / linear - 2 * difference / (steps - linear) ** 2
    c = a * linear**2
    path = [i * threshold / linear for i in range(linear)] + [a * i**2 + b * i + c for i in range(linear, steps)] + [1.0]
    name = "linear_quadratic" if linear == steps // 2 else partial(schedules.linear_quadratic, linear_steps=linear)
    np.testing.assert_allclose(grid(schedules.flow(), steps, sigmas=name).time, 1 - np.array(path), rtol=1e-9, atol=1e-12)
    assert grid(VE, steps, sigmas=name).sigma[0] == 80
    assert grid(VE, 1, sigmas="linear_quadratic").sigma.tolist() == [80, 0]


@pytest.mark.parametrize(
    ("name", "key"),
    [("ays_sd1", "StableDiffusionSigmas"), ("ays_sdxl", "StableDiffusionXLSigmas"), ("ays_svd", "StableDiffusionVideoSigmas")],
)
def test_align_your_steps(name: str, key: str) -> None:
    tables = importlib.import_module("diffusers.schedulers").AysSchedules
    np.testing.assert_allclose(grid(VE, 10, sigmas=name).sigma, tables[key], rtol=1e-12)
    between = grid(VP, 20, sigmas=name)
    np.testing.assert_allclose(between.ratio[:-1:2], tables[key][:-1], rtol=1e-12)
    np.testing.assert_allclose(between.ratio[1:-2:2], np.sqrt(between.ratio[:-3:2] * between.ratio[2:-1:2]), rtol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 0.9), (2.0, 1.5)])
def test_beta_is_its_quantiles(a: float, b: float) -> None:
    stats = importlib.import_module("scipy.stats")
    expected = stats.beta.ppf(1 - np.arange(12) / 12, a, b)
    sigmas = partial(schedules.beta, a=a, b=b)
    np.testing.assert_allclose(grid(VP, 12, sigmas=sigmas).time[:-1], 999 * expected, rtol=1e-9)
    np.testing.assert_allclose(grid(FLOW, 12, sigmas=sigmas).time[:-1], 3 * expected / (1 + 2 * expected), rtol=1e-9)


def test_uniform_grids() -> None:
    np.testing.assert_allclose(grid(VP, 4, sigmas="sgm_uniform").time, [999, 749.25, 499.5, 249.75, 0], rtol=1e-14)
    np.testing.assert_allclose(grid(schedules.flow(), 3, sigmas="sgm_uniform").time, [1, 0.667, 0.334, 0], rtol=1e-12)
    assert grid(VP, 4, sigmas="ddim_uniform").time.tolist() == [751, 501, 251, 1, 0]


def test_shifts_of_flows_equal_diffusers() -> None:
    """Dynamic shift is the time shift by exp(mu); the terminal shift stretches the times."""
    diffusers = importlib.import_module("diffusers")
    assert np.log([schedules.dynamic_shift(n) for n in (256, 4096, 2176)]) == pytest.approx([0.5, 1.15, 0.825], rel=1e-12)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    stock.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=np.log(schedules.dynamic_shift(1024)))
    g = grid(schedules.flow(schedules.dynamic_shift(1024)), 8, sigmas=partial(schedules.trailing, terminal=0.1))
    np.testing.assert_allclose(g.time, stock.sigmas.double().numpy(), atol=1e-6)
    assert g.time[-2] == pytest.approx(0.1, rel=1e-12)
    assert grid(FLOW, 5, sigmas=partial(schedules.linspace, terminal=0.2)).time[-2] == pytest.approx(0.2, rel=1e-12)
    assert grid(FLOW, 1, sigmas=partial(schedules.trailing, terminal=0.1)).time.tolist() == [1, 0]


@pytest.mark.parametrize("name", sorted(schedules.GRIDS))
def test_every_grid_has_the_steps_asked_for(name: str) -> None:
    for steps in (1, 2, 5, 30, 100):
        g = grid(VP, steps, sigmas=name)
        assert g.steps == steps and g.sigma[-1] == 0
