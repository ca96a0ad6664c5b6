"""The adaptive sampler against k-diffusion's loop written out, the known solution, and its promises."""

from __future__ import annotations

import math

import gaussian
import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import reference, schedules
from genfast.samplers import AdaptiveSampler, BrownianPath, Denoiser, sample

SEEDS = torch.tensor([3, 2**63 - 1, 77])
SHAPE = (3, 2, 4)


def literal(D, y, r_start, r_end, noise, order=3, rtol=0.05, atol=0.0078, h=0.05, icoeff=1.0, pcoeff=0.0, dcoeff=0.0, safety=0.81, eta=0.0):
    """k-diffusion's dpm_solver_adaptive; noise(k, a, b) is the k-th accepted step's. Returns y and (evaluations, accepted, rejected)."""
    t, t_end, counts, errs, before = -math.log(r_start), -math.log(r_end), [0, 0, 0], None, y

    def eps(u, s):
        counts[0] += 1
        return (u - D(u, math.exp(-s))) / math.exp(-s)

    while t < t_end - 1e-5:
        t_next = min(t_end, t + h)
        r, r_next = math.exp(-t), math.exp(-t_next)
        t_down, up = t_next, 0.0
        if eta:
            sigma_up = min(r_next, eta * math.sqrt(r_next**2 * (r**2 - r_next**2) / r**2))
            down = math.sqrt(r_next**2 - sigma_up**2)
            t_down = t_end if down == 0 else min(t_end, -math.log(down))
            up = math.sqrt(r_next**2 - math.exp(-t_down) ** 2)
        step = t_down - t

        def at(c, t=t, step=step):
            return math.exp(-(t + c * step))

        e0 = eps(y, t)
        if order == 2:
            low = y - at(1) * math.expm1(step) * e0
            e1 = eps(y - at(0.5) * math.expm1(step / 2) * e0, t + step / 2)
            high = y - at(1) * math.expm1(step) * e0 - at(1) * math.expm1(step) * (e1 - e0)
        else:
            e1 = eps(y - at(1 / 3) * math.expm1(step / 3) * e0, t + step / 3)
            low = y - at(1) * math.expm1(step) * e0 - at(1) * 1.5 * math.expm1(step) * (e1 - e0)
            c = 2 / 3 * step
            u2 = y - at(2 / 3) * math.expm1(c) * e0 - at(2 / 3) * 2 * (math.expm1(c) / c - 1) * (e1 - e0)
            high = y - at(1) * math.expm1(step) * e0 - at(1) * 1.5 * (math.expm1(step) / step - 1) * (eps(u2, t + c) - e0)
        delta = np.maximum(atol, rtol * np.maximum(np.abs(low), np.abs(before)))
        inverse = 1 / (math.sqrt((((low - high) / delta) ** 2).mean()) + 1e-8)
        errs = errs or [inverse] * 3
        errs[0] = inverse
        power = 1.5 if eta else order
        factor = errs[0] ** ((pcoeff + icoeff + dcoeff) / power) * errs[1] ** (-(pcoeff + 2 * dcoeff) / power) * errs[2] ** (dcoeff / power)
        factor = 1 + math.atan(factor - 1)
        h *= factor
        if factor >= safety:
            errs[2], errs[1] = errs[1], errs[0]
            counts[1] += 1
            before, y, t = low, high + (up * noise(counts[1], r, r_next) if up else 0), t_next
        else:
            counts[2] += 1
    return y, tuple(counts)


def model(y: np.ndarray, level: float) -> np.ndarray:
    return np.tanh(2 * y / (0.3 + level)) + 0.3 * np.cos(3 * level)


def denoiser(noise: schedules.NoiseSchedule) -> Denoiser:
    """Its network returns v, so that the conversions are exercised; its time is the number of the point asked for, exact in float32."""
    points: list[schedules.Point] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        _, alpha, sigma = points[int(t[0])]
        d = torch.from_numpy(model(x.numpy() / alpha, sigma / alpha))
        return (alpha * x - (alpha**2 + sigma**2) * d) / sigma

    return Denoiser(net, "v", noise=noise, time=lambda p: points.append(p) or len(points) - 1)


OPTIONS = [
    {},
    {"order": 2},
    {"rtol": 0.004, "atol": 0.001, "pcoeff": 0.2, "icoeff": 0.4, "dcoeff": 0.1},
    {"order": 2, "rtol": 0.01, "h_init": 1.5},
    {"eta": 1.0},
    {"order": 2, "eta": 0.5},
]


@pytest.mark.parametrize("kind", gaussian.PROCESSES)
@pytest.mark.parametrize(("options", "brownian"), [*((o, False) for o in OPTIONS), *((o, True) for o in OPTIONS if "eta" in o)], ids=str)
def test_equals_the_literal_loop(options: dict, brownian: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise, asked = gaussian.PROCESSES[kind], []
    levels = np.array([9.0, 0.05])
    sigmas = levels / (1 + levels) if kind == "flow" else levels

    class Recorded(BrownianPath):
        def __call__(self, a: float, b: float) -> Tensor:
            asked.append((a, b, super().__call__(a, b)))
            return asked[-1][2].clone()

    monkeypatch.setattr(sample, "BrownianPath", Recorded)
    draw = AdaptiveSampler(sigmas=sigmas, dtype=torch.float64, progress=False, brownian=brownian, **options)
    got = draw(denoiser(noise), SHAPE, seeds=SEEDS)

    def noises(k: int, a: float, b: float) -> np.ndarray:
        if brownian:  # the steps depend on the path and it on them: compare on the sampler's own
            assert asked[k - 1][:2] == pytest.approx((a, b), rel=1e-4)  # the path is float32
            return asked[k - 1][2].double().numpy() / math.sqrt(a - b)
        return reference.normal(SEEDS, SHAPE, draw=k, dtype=torch.float64).numpy()

    (alpha, end), first = (noise.at_ratio(level)[0] for level in levels), reference.normal(SEEDS, SHAPE, dtype=torch.float64).numpy()
    y = first * (1.0 if kind == "vp" else noise.at_ratio(9.0)[1]) / alpha
    expected, counts = literal(model, y, 9.0, 0.05, noises, **{"h" if k == "h_init" else k: v for k, v in options.items()})
    assert tuple(draw.last_info.values()) == counts and counts[1] > 5
    if "h_init" in options:
        assert counts[2] > 0  # a step is rejected
    tolerance = 1e-4 if brownian else 1e-9
    np.testing.assert_allclose(got.numpy() / end, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", [2, 3])
def test_a_smaller_tolerance_comes_nearer_to_the_solution(order: int) -> None:
    noise = gaussian.PROCESSES["flow"]
    den = Denoiser(lambda x, t: torch.as_tensor(gaussian.denoise(x, gaussian.Point(0.0, 1 - float(t[0]), float(t[0])))), "x0", noise=noise)
    errors, evaluations = [], []
    for rtol in (0.05, 0.0005):
        draw = AdaptiveSampler(order=order, sigmas=[0.9, 0.02], rtol=rtol, atol=rtol / 10, dtype=torch.float64, progress=False)
        got = draw(den, SHAPE, seeds=SEEDS).numpy()
        grid = schedules.grid(noise, sigmas=[0.9, 0.02])
        x = 0.9 * reference.normal(SEEDS, SHAPE, dtype=torch.float64).numpy()
        errors.append(np.abs(got - gaussian.exact(x, grid.point(0), grid.point(1))).max())
        evaluations.append(draw.last_info["evaluations"])
    assert errors[1] < 0.1 * errors[0] < 0.01 and evaluations[1] > 2 * evaluations[0]


@pytest.mark.parametrize("kind", gaussian.PROCESSES)
def test_default_range_guidance_masks_and_callbacks(kind: str) -> None:
    """From the process's largest level to 0, guided at some levels only, inpainting; fused and reference to the same bits."""
    noise = gaussian.PROCESSES[kind]
    seen: list[tuple[int, float]] = []

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return 0.3 * x.tanh() + (shift + t * 0.01).view(-1, 1, 1)

    den = Denoiser(net, "x0", noise=noise, time=lambda p: p.sigma)
    known, mask = torch.linspace(-1, 1, 24).view(SHAPE), torch.tensor([0.0, 1.0, 1.0, 0.0])
    results = []
    for impl in ("fused", "reference"):
        draw = AdaptiveSampler(
            guidance_scale=lambda s: 2.0 if 0.1 < s < 5 else 1.0,
            clip=1.5,
            impl=impl,
            progress=False,
            callback=lambda k, s, x, d: seen.append((k, s)),
        )
        call = {"cond": torch.tensor([0.1, 0.2, 0.3]), "uncond": torch.zeros(3), "known": known, "mask": mask}
        results.append(draw(den, SHAPE, seeds=SEEDS, **call))
    assert torch.equal(*results) and torch.equal(results[0][..., [0, 3]], known[..., [0, 3]])
    half = len(seen) // 2
    assert seen[:half] == seen[half:] and [k for k, _ in seen[:half]] == list(range(half)) and half == draw.last_info["accepted"] + 1
    assert (np.diff([s for _, s in seen[:half]]) < 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order: got 4, supported: 2, 3"),
        ({"rtol": 0.0}, "rtol: got 0.0, supported: a number above 0"),
        ({"steps": 5}, "steps: got 5, supported: None"),
        ({"capture": True}, "capture: got True, supported: False"),
        ({"sigmas": [1.0, 0.5]}, "sigmas: got a start at alpha = 0, supported: a finite sigma / alpha"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveSampler(**options)(Denoiser(lambda x, t: x, "v", noise=schedules.flow()), SHAPE, seeds=SEEDS)


def test_what_cannot_end_is_an_error() -> None:
    den = Denoiser(lambda x, t: x * math.nan, "x0", noise=schedules.edm())
    tanh = Denoiser(lambda x, t: x.tanh(), "x0", noise=schedules.edm())
    with pytest.raises(FloatingPointError, match="sample 0"):
        AdaptiveSampler(progress=False)(den, SHAPE, seeds=SEEDS)
    with pytest.raises(RuntimeError, match=r"max_evaluations: got 6, which led to sigma .* supported: more, or a larger rtol"):
        AdaptiveSampler(max_evaluations=6, progress=False)(tanh, SHAPE, seeds=SEEDS)
