"""The Brownian path: what an increment is, that nothing else changes its bits, and what it does for solvers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import sys
import types
from itertools import pairwise

import gaussian
import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import reference, schedules
from genfast.samplers import BrownianPath, Denoiser, Sampler, brownian

SEEDS = torch.tensor([3, 2**63 - 1, 77])
TIMES = [14.6, 9.0, 8.0, 3.3, 1.0, 0.75, 0.031, 2.0**-20, 1e-7, 0.0]


def coefficients(a: float, b: float) -> dict[int, float]:
    """W(b) - W(a) over the independent normals it is made of, by node."""
    total: dict[int, float] = {}
    whole = [(brownian._node(e, 0), math.sqrt(brownian._width(e))) for e in range(brownian._octave(a)[0], brownian._octave(b)[0])]
    for sign, terms in ((1, brownian.bridge(b)), (1, whole), (-1, brownian.bridge(a))):
        for node, c in terms:
            total[node] = total.get(node, 0.0) + sign * c
    return total


def covariance(one: dict[int, float], two: dict[int, float]) -> float:
    return sum(c * two.get(node, 0.0) for node, c in one.items())


def test_increments_have_the_covariance_of_brownian_motion() -> None:
    """Exactly, from the coefficients: the variance is the time between, and disjoint intervals are uncorrelated."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        a, b, c, d = sorted(np.exp(rng.uniform(-9, 5, 4)))
        one, two = coefficients(a, b), coefficients(c, d)
        assert covariance(one, one) == pytest.approx(b - a, rel=1e-12)
        assert abs(covariance(one, two)) < 1e-12 * math.sqrt((b - a) * (d - c))
        assert covariance(coefficients(a, c), coefficients(b, d)) == pytest.approx(c - b, rel=1e-11)


def test_an_increment_is_the_sum_of_its_normals() -> None:
    for a, b in [(0.75, 9.0), (3.3, 3.4), (0.0, 14.6), (1e-7, 0.5)]:
        got = BrownianPath(SEEDS, (3, 2, 5))(a, b)
        terms = [c * reference.normal(SEEDS, (3, 2, 5), draw=node, stream=6, dtype=torch.float64) for node, c in coefficients(a, b).items()]
        torch.testing.assert_close(got.double(), torch.stack(terms).sum(0), rtol=1e-5, atol=3e-6 * math.sqrt(b))


def test_its_values_are_normal() -> None:
    path = BrownianPath(torch.arange(20000), (20000, 1))
    steps = torch.cat([path(a, b) / math.sqrt(b - a) for b, a in pairwise(TIMES[:7])], 1).double()
    cov = steps.T @ steps / len(steps)
    torch.testing.assert_close(cov, torch.eye(6, dtype=torch.float64), rtol=0, atol=5 / math.sqrt(20000))
    assert (steps.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.005)


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_nothing_but_seed_and_times_matters(impl: str) -> None:
    shape = (3, 2, 5)
    path = BrownianPath(SEEDS, shape)
    expected = {(a, b): path(a, b) for a in TIMES for b in TIMES}
    fresh = {(a, b): BrownianPath(SEEDS[[2, 0]], (2, 2, 5), impl=impl)(a, b) for a in TIMES[::2] for b in TIMES[::3]}
    for (a, b), value in fresh.items():
        assert torch.equal(value, expected[a, b][[2, 0]])
        assert torch.equal(-value, expected[b, a][[2, 0]])
    for a, b, c in [(14.6, 3.3, 0.75), (9.0, 8.0, 1.0), (0.0, 1.0, 14.6)]:
        torch.testing.assert_close(expected[a, b] + expected[b, c], expected[a, c], rtol=0, atol=2e-6)
    assert not torch.equal(expected[9.0, 8.0][0], expected[9.0, 8.0][1])


@pytest.mark.cuda
def test_the_same_bits_on_cuda() -> None:
    cpu, cuda = BrownianPath(SEEDS, (3, 2, 5)), BrownianPath(SEEDS.cuda(), (3, 2, 5))
    assert all(torch.equal(cpu(a, b), cuda(a, b).cpu()) for a, b in pairwise(TIMES))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BrownianPath(SEEDS, (2, 3)), r"seeds: got torch.int64 \(3,\) on cpu, supported: torch.int64 \(2,\)"),
        (lambda: BrownianPath([1, 2], (2, 3)), "seeds: got a list, supported: an int64 tensor"),
        (lambda: BrownianPath(SEEDS, ()), r"shape: got \(\), supported: \(B, \*sample\)"),
        (lambda: BrownianPath(SEEDS, (3,), impl="fast"), "impl: got 'fast', supported: fused, reference"),
        (lambda: BrownianPath(SEEDS, (3,))(-1.0, 2.0), r"a: got -1, supported: a time in \[0, 2\^20\]"),
        (lambda: BrownianPath(SEEDS, (3,))(1.0, math.inf), "b: got inf"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


NOISY = [
    *[(name, {}) for name in ("ddpm", "euler_ancestral", "consistency", "tcd", "dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")],
    *[(name, {}) for name in ("seeds_2", "seeds_3", "dpmpp_2m_sde", "dpmpp_3m_sde", "er_sde", "sa_solver")],
    ("sa_solver", {"predictor_order": 3, "corrector_order": 3}),
    ("res_multistep", {"eta": 1.0}),
    ("heun", {"s_churn": 2.0}),
]


def net(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5 - x.abs() * 0.125 + t.view(-1, *[1] * (x.ndim - 1)) * 0.001


@pytest.mark.parametrize(("solver", "options"), NOISY, ids=str)
def test_the_sampler_draws_increments(solver: str, options: dict) -> None:
    """Every row's noise is the normalised increment from the last noise's end to the next evaluation: all of the motion, once."""
    den, sigmas = Denoiser(net, "v", noise=schedules.edm()), [9.0, 4.0, 1.5, 0.4, 0.1]
    draw = Sampler(solver, sigmas=sigmas, brownian=True, progress=False, dtype=torch.float64, **options)
    plan, path, noise = draw.plan(den.noise), BrownianPath(SEEDS, (3, 2)), {}
    start = plan.rows[0].point.sigma
    for row, end in zip(plan.rows, [*(row.point.sigma for row in plan.rows[1:]), 0.1], strict=True):
        if row.draw:
            noise[row.draw] = (path(start, end).double() / math.sqrt(start - end)).numpy()
            start = end
    x = plan.scale * reference.normal(SEEDS, (3, 2), dtype=torch.float64).numpy()

    def model(x: np.ndarray, p: schedules.Point) -> np.ndarray:
        return den(torch.from_numpy(x), p.sigma).numpy()

    np.testing.assert_allclose(draw(den, (3, 2), seeds=SEEDS).numpy(), gaussian.execute(plan, model, x, noise), rtol=2e-6, atol=2e-6)
    plain = Sampler(solver, sigmas=sigmas, progress=False, **options)(den, (3, 2), seeds=SEEDS)
    assert not torch.allclose(plain, draw(den, (3, 2), seeds=SEEDS).float(), atol=1e-2)
    fused, same = (Sampler(solver, sigmas=sigmas, brownian=True, impl=i, progress=False, **options) for i in ("fused", "reference"))
    assert torch.equal(fused(den, (3, 2), seeds=SEEDS), same(den, (3, 2), seeds=SEEDS))


def test_diffusers_sde_scheduler_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """DPMSolverSDE with the path for its Brownian tree makes what `dpmpp_sde` makes with brownian=True."""
    if importlib.util.find_spec("torchsde") is None:  # only its Brownian tree is used, which the path replaces
        stand_in = types.ModuleType("torchsde")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("torchsde", None)
        monkeypatch.setitem(sys.modules, "torchsde", stand_in)
    scheduler = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    stock = scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing")
    stock.set_timesteps(8)
    path = BrownianPath(SEEDS, (3, 2))
    stock.noise_sampler = lambda a, b: path(float(a), float(b)).double() / math.sqrt(abs(float(a) - float(b)))
    noise = schedules.scaled_linear()
    den = Denoiser(lambda x, t: torch.sin(2 * x + t.view(-1, 1) / 300) * 0.8, "epsilon", noise=noise)
    draw = Sampler("dpmpp_sde", timesteps=stock.timesteps.tolist()[::2], brownian=True, progress=False, dtype=torch.float64)
    y = reference.normal(SEEDS, (3, 2), dtype=torch.float64) / draw.plan(noise).rows[0].point.alpha
    for t in stock.timesteps:
        y = stock.step(den.net(stock.scale_model_input(y, t), t.view(1)), t, y).prev_sample
    torch.testing.assert_close(draw(den, (3, 2), seeds=SEEDS), y.double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("solver", "order"), [("dpmpp_2m_sde", 1), ("dpmpp_sde", 1), ("seeds_2", 1)])
def test_one_path_has_one_solution(solver: str, order: float) -> None:
    """Strong convergence: on one path, halving the steps halves the distance to the finest grid. Independent noise would never agree."""
    den = Denoiser(
        lambda x, t: torch.as_tensor(gaussian.denoise(x, gaussian.Point(0.0, 1.0, float(t[0])))), "x0", noise=schedules.edm(), time="sigma"
    )

    def run(steps: int) -> Tensor:
        sigmas = np.geomspace(10.0, 0.1, steps + 1)
        return Sampler(solver, sigmas=sigmas, brownian=True, progress=False, dtype=torch.float64)(den, (500, 1), seeds=range(500))

    finest = run(512)
    errors = [(run(n) - finest).square().mean().sqrt().item() for n in (8, 32)]
    assert math.log2(errors[0] / errors[1]) / 2 == pytest.approx(order, abs=0.3), errors


def test_the_start_at_alpha_zero_and_solvers_that_go_back() -> None:
    out = Sampler("dpmpp_2m_sde", 6, brownian=True, progress=False)(Denoiser(net, "flow", noise=schedules.flow()), (3, 2), seeds=SEEDS)
    assert out.isfinite().all()
    den = Denoiser(net, "v", noise=schedules.edm())
    with pytest.raises(
        ValueError, match=r"brownian: got True for 'restart', whose noise leads from sigma .* supported: solvers that never"
    ):
        Sampler("restart", 8, brownian=True, intervals=((0.5, 3.0, 4, 2),), progress=False)(den, (3, 2), seeds=SEEDS)
    with pytest.raises(ValueError, match="generator: got one with brownian=True"):
        Sampler("ddpm", 4, brownian=True)(den, (3, 2), generator=torch.Generator())
