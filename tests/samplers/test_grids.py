"""Grids against formulas written out here, diffusers' schedulers, and the errors they promise."""

from __future__ import annotations

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
    diffusers = pytest.importorskip("diffusers")
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
        (VP, {"steps": 4, "sigmas": "karas"}, r"sigmas: got 'karas' \(did you mean karras\?\), supported: exponential, karras, leading"),
        (
            VE,
            {"steps": 4, "sigmas": "trailing"},
            "sigmas: got 'trailing' for the 'edm' process, supported there: exponential, karras or a list",
        ),
        (
            FLOW,
            {"steps": 4, "sigmas": "leading"},
            "sigmas: got 'leading' for the 'flow' process, supported there: exponential, karras, linspace",
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
