"""An epsilon network's error is divided by alpha: what the default grid leaves out, what warns, and what stays as it was."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import schedules
from genfast.samplers import SOLVERS, AdaptiveSampler, Denoiser, Sampler

COSINE = schedules.cosine(1000)
STD = 0.5  # of the data, N(0, 1/4) in two dimensions
SHAPE = (256, 2)


def network(noise: schedules.NoiseSchedule, prediction: str = "epsilon", error: float = 0.01) -> Denoiser:
    """The exact network of that data, each of whose outputs is wrong by 1%."""

    def net(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (torch.from_numpy(c).float()[:, None] for c in noise.alpha_sigma(t.double().numpy()))
        spread = STD**2 * alpha**2 + sigma**2
        d, n = STD**2 * alpha * x / spread, sigma * x / spread
        return (1 + error) * {"epsilon": n, "v": alpha * n - sigma * d, "x0": d}[prediction]

    return Denoiser(net, prediction, noise=noise, time="index")


def spread(draw: Sampler, den: Denoiser) -> float:
    return float(draw(den, SHAPE, seeds=range(SHAPE[0])).std())


@pytest.fixture(autouse=True)
def warnings_are_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"ddim_inverse"}))
@pytest.mark.parametrize("noise", [COSINE, schedules.cosine(4000), schedules.linear()], ids=lambda n: f"{n.name} {n.steps}")
def test_the_defaults_keep_an_error_of_one_percent_small(noise: schedules.NoiseSchedule, solver: str) -> None:
    """Was 26 (ddim) to 34,205 (heun) on cosine(1000). Solvers of first order fall short of the data's spread without an error, too."""
    exact = spread(Sampler(solver, 20, progress=False), network(noise, error=0.0))
    assert spread(Sampler(solver, 20, progress=False), network(noise)) == pytest.approx(exact, abs=0.35 if solver == "heun" else 0.25)
    assert 0.2 < exact < 0.7


@pytest.mark.parametrize("order", [2, 3])
def test_the_adaptive_sampler_starts_there_too(order: int) -> None:
    assert spread(AdaptiveSampler(order=order, progress=False), network(COSINE)) == pytest.approx(STD, abs=0.15)


@pytest.mark.parametrize("steps", [40, 500, 996, 1000])
def test_few_and_many_steps(steps: int) -> None:
    """There are 996 times up to the start; who asks for more gets these."""
    draw = Sampler("heun", steps, progress=False)
    assert len(draw.plan(network(COSINE)).rows) == 2 * min(steps, 996) - 1
    assert spread(draw, network(COSINE)) == pytest.approx(STD, abs=0.2)


@pytest.mark.parametrize(
    ("den", "options"),
    [
        (network(COSINE, "v"), {}),
        (network(COSINE, "x0"), {}),
        (Denoiser(torch.tanh, "edm", noise=COSINE), {}),
        (network(COSINE), {"clip": 1.0}),
        (network(COSINE), {"threshold": 0.99}),
        (network(schedules.linear()), {}),
        (network(schedules.scaled_linear()), {}),
        (network(schedules.sigmoid()), {}),
        (network(schedules.laplace()), {}),
        (Denoiser(torch.tanh, "epsilon", noise=schedules.edm()), {}),
        (network(COSINE), {"sigmas": "karras"}),
        (network(COSINE), {"sigmas": [150.0, 10.0, 1.0, 0.0]}),
    ],
)
def test_what_was_right_is_as_it_was(den: Denoiser, options: dict) -> None:
    """The rows are the process's own; no warning."""
    options = {"steps": None if isinstance(options.get("sigmas"), list) else 20, **options}
    draw = Sampler("dpmpp_2m", progress=False, **options)
    assert draw.plan(den).table() == draw.plan(den.noise).table()


@pytest.mark.parametrize(
    ("options", "growth"),
    [
        ({"steps": 20, "sigmas": "trailing"}, 1580),
        ({"steps": 20, "sigmas": "linspace"}, 1673),
        ({"steps": 1000, "sigmas": "trailing"}, 30.6),
        ({"timesteps": [999, 500, 0]}, 14236),
        ({"sigmas": [5000.0, 10.0, 0.0]}, 497),
        ({"steps": 20, "sigmas": "kl_optimal"}, 1595),
        ({"steps": 10}, 26),
        ({"steps": 1}, 160),
    ],
)
def test_other_grids_that_explode_warn_of_it(options: dict, growth: float) -> None:
    den, draw = network(COSINE), Sampler("ddim", progress=False, **options)
    with pytest.warns(
        UserWarning, match=r"prediction: got 'epsilon' on a grid of which one step multiplies the network's error by (\d+)"
    ) as seen:
        draw(den, SHAPE, seeds=range(256))
    assert seen[0].filename == __file__ and all(cure in str(seen[0].message) for cure in ("clip=", "threshold=", "sigma <= 164"))
    assert den.error_growth(draw._start_of(den)) == pytest.approx(growth, rel=0.05)


@pytest.mark.parametrize("options", [{"clip": 1.0}, {"threshold": 0.99}])
def test_a_clip_says_that_the_range_is_known(options: dict) -> None:
    """The whole grid, without a warning, and no explosion with the solvers that look at d alone."""
    for solver in ("ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc"):
        assert spread(Sampler(solver, 20, progress=False, **options), network(COSINE)) < 1


def test_the_growth_is_what_a_step_makes_of_an_error() -> None:
    """One step of Euler's from the same state with and without an error in epsilon, over the standard deviation where it arrives."""
    for noise, sigmas in ((COSINE, [300.0, 7.0]), (schedules.linear(), [20.0, 0.0]), (schedules.edm(), [80.0, 3.0])):
        grid, error = schedules.grid(noise, sigmas=sigmas), 0.01
        states = [
            Sampler("euler", sigmas=sigmas, progress=False, dtype=torch.float64, clip=1e9)(
                Denoiser(lambda x, t, e=e: torch.tanh(x) + e, "epsilon", noise=noise, time=lambda p: 0.0), (2, 3), seeds=[0, 1]
            )
            for e in (0.0, error)
        ]
        moved = float((states[1] - states[0]).abs().max()) / np.hypot(grid.alpha[-1], grid.sigma[-1])
        assert Denoiser(torch.tanh, "epsilon", noise=noise).error_growth(grid) == pytest.approx(moved / error, rel=1e-6)


def documented() -> list[tuple[str, dict, float, float]]:
    """The cells of docs/clipping.md's last table: solver, options, the network's error, and the spread."""
    lines = (Path(__file__).parents[2] / "docs" / "clipping.md").read_text().split("| grid and options |")[1].splitlines()
    solvers = re.findall(r"`(\w+)`", lines[0])
    names = {"functools": functools, "karras": schedules.karras}
    cells = []
    for line in lines[2:]:
        if line.startswith("|"):
            label, *values = (cell.strip() for cell in line.strip("|").split("|"))
            options = eval(f"dict({', '.join(re.findall('`(.*?)`', label))})", names)
            cells += [
                (s, options, 0.0 if "exact" in label else 0.01, float(v.replace(",", ""))) for s, v in zip(solvers, values, strict=True)
            ]
    return cells


@pytest.mark.parametrize(("solver", "options", "error", "expected"), documented())
def test_the_documented_spreads(solver: str, options: dict, error: float, expected: float) -> None:
    warnings.simplefilter("ignore", UserWarning)
    out = Sampler(solver, 20, progress=False, **options)(network(COSINE, error=error), (2000, 2), seeds=range(2000))
    assert float(out.std()) == pytest.approx(expected, rel=0.01, abs=0.006)


def test_zero_terminal_snr_starts_where_epsilon_can_be_read() -> None:
    noise = schedules.zero_terminal_snr(schedules.scaled_linear())
    draw = Sampler("ddim", 20, progress=False)
    assert draw.plan(noise).rows[0].point.alpha == 0 and draw.plan(network(noise)).rows[0].point.alpha > 1 / 165
    assert spread(draw, network(noise)) == pytest.approx(0.4, abs=0.15)
    with pytest.raises(ValueError, match="alpha = 0"), pytest.warns(UserWarning, match="error by inf"):
        Sampler("ddim", 20, sigmas="trailing", progress=False)(network(noise), SHAPE, seeds=range(256))


def test_the_rest_of_a_process() -> None:
    part = COSINE.up_to(164.0)
    assert part.steps == 996 and part.sigma_ratios[-1] <= 164 < COSINE.sigma_ratios[996]
    assert np.array_equal(part.sigma_ratios, COSINE.sigma_ratios[:996])
    assert schedules.linear().up_to(164.0).steps == 1000 and COSINE.up_to(1e-9).steps == 1000
    with pytest.raises(ValueError, match="noise: got kind 'flow', supported: 'vp'"):
        schedules.flow().up_to(1.0)
