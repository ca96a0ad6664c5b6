"""Sampler: what a call promises about seeds, guidance, callbacks, failures and the two implementations."""

from __future__ import annotations

import importlib
import math

import gaussian
import numpy as np
import pytest
import torch
from recorder import install
from torch import Tensor

from genfast import reference, schedules
from genfast.samplers import SOLVERS, Denoiser, Sampler

VP, VE, FLOW = schedules.scaled_linear(), schedules.edm(), schedules.flow()
SHAPE = (3, 2, 4, 4)


def elementwise(x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
    """A network without any sum over elements or samples: its bits cannot depend on the batch."""
    t = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    out = x * 0.5 - x.abs() * 0.125 + t * 0.001
    return out if shift is None else out + shift.view(t.shape).to(x.dtype)


def vp(net: object = elementwise, prediction: str = "v", **options: object) -> Denoiser:
    return Denoiser(net, prediction, noise=VP, **options)


def sampler(solver: str = "dpmpp_2m", steps: int = 5, **options: object) -> Sampler:
    return Sampler(solver, steps, progress=False, **options)


def start(solver: str, shape: tuple[int, ...] = SHAPE) -> dict[str, Tensor]:
    """What a solver needs to start besides noise."""
    return {"latent": torch.linspace(-1, 1, math.prod(shape)).view(shape)} if solver == "ddim_inverse" else {}


def test_samples_of_a_gaussian_have_its_mean_and_variance() -> None:
    """End to end: 20000 samples of N(0.7, 0.6^2), stochastic solver, exact denoiser."""
    den = Denoiser(lambda x, t: torch.as_tensor(gaussian.denoise(x, gaussian.Point(0.0, 1.0, float(t[0])))), "x0", noise=VE, time="sigma")
    out = sampler("dpmpp_2m_sde", 40)(den, (20000, 1), seeds=range(20000)).double()
    assert out.mean().item() == pytest.approx(gaussian.MEAN, abs=5 * 0.6 / math.sqrt(20000))
    assert out.std().item() == pytest.approx(gaussian.STD, rel=0.02 + 5 / math.sqrt(40000))


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"ddim_inverse"}))
def test_a_batch_equals_its_samples_drawn_alone(solver: str) -> None:
    seeds = [3, 2**63 - 1, 0, 77]
    options = {"s_churn": 2.0} if solver in ("euler", "heun") else {}
    grid = {"sigmas": [20.0, 9.0, 3.0, 1.0, 0.0]}
    draw = Sampler(solver, progress=False, clip=2.0, **grid, **options)
    whole = draw(vp(), (4, 2, 5), seeds=seeds)
    assert draw.last_seeds == seeds
    for i, seed in enumerate(seeds):
        assert torch.equal(draw(vp(), (1, 2, 5), seeds=[seed])[0], whole[i])
    assert torch.equal(draw(vp(), (3, 2, 5), seeds=torch.tensor([77, 0, 3])), whole[[3, 2, 0]])
    assert whole.isfinite().all() and not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_fused_equals_reference(solver: str) -> None:
    shifts = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([-0.1, 0.0, 0.1])
    options = {"sigmas": [9.0, 4.0, 1.5, 0.4, 0.0], "guidance_scale": 2.5, "guidance_rescale": 0.6, "threshold": 0.9, "progress": False}
    for den in (vp(), Denoiser(elementwise, "edm", noise=VE)):
        fused, plain = (
            Sampler(solver, impl=impl, **options)(den, SHAPE, seeds=range(3), cond=shifts[0], uncond=shifts[1], **start(solver))
            for impl in ("fused", "reference")
        )
        assert fused.isfinite().all()
        assert torch.equal(fused, plain)


def test_equals_a_loop_written_out() -> None:
    """DDIM with guidance, clipping and eta, element by element in float64 from the documented noise."""
    seeds, g, eta = torch.arange(3), 3.0, 0.5
    cond, uncond = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([-0.1, 0.0, 0.1])
    draw = sampler("ddim", 4, guidance_scale=g, clip=1.0, eta=eta, dtype=torch.float64)
    got = draw(vp(prediction="epsilon"), SHAPE, seeds=seeds, cond=cond, uncond=uncond)
    x = reference.normal(seeds, SHAPE, dtype=torch.float64)
    times = [999, 749, 499, 249]
    for k, t in enumerate(times):
        a = VP.alphas_cumprod[t]
        a_next = VP.alphas_cumprod[times[k + 1]] if k < 3 else 1.0
        tt = torch.full((3,), float(t))
        eps_u, eps_c = elementwise(x, tt, uncond), elementwise(x, tt, cond)
        d = ((x - math.sqrt(1 - a) * (eps_u + g * (eps_c - eps_u))) / math.sqrt(a)).clamp(-1, 1)
        std = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))
        eps = (x - math.sqrt(a) * d) / math.sqrt(1 - a)
        x = math.sqrt(a_next) * d + math.sqrt(1 - a_next - std**2) * eps
        x = x + std * reference.normal(seeds, SHAPE, draw=k + 1, dtype=torch.float64)
    torch.testing.assert_close(got, x, rtol=1e-11, atol=1e-11)


def test_guidance_halves_run_as_one_batch_unconditional_first() -> None:
    calls = []

    def net(x: Tensor, t: Tensor, *, y: Tensor, scale: float) -> Tensor:
        calls.append((tuple(x.shape), tuple(t.shape), y.tolist(), scale, torch.equal(*x.chunk(2))))
        return elementwise(x, t)

    conditions = {"cond": {"y": torch.tensor([1, 2, 3]), "scale": 0.5}, "uncond": {"y": torch.tensor([10]), "scale": 0.5}}
    sampler(guidance_scale=2.0)(vp(net), SHAPE, seeds=range(3), **conditions)
    assert calls == [((6, 2, 4, 4), (6,), [10, 10, 10, 1, 2, 3], 0.5, True)] * 5


def test_guidance_interval_evaluates_only_what_it_needs() -> None:
    sizes = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return elementwise(x, t, y)

    y, null = torch.tensor([0.1, 0.2, 0.3]), torch.zeros(3)
    options = {"sigmas": [9.0, 5.0, 2.0, 1.0, 0.0], "progress": False}
    sigmas = []

    def interval(sigma: float) -> float:
        sigmas.append(sigma)
        return 3.0 if 1.5 < sigma < 6 else 1.0

    got = Sampler("euler", guidance_scale=interval, **options)(vp(net), SHAPE, seeds=range(3), cond=y, uncond=null)
    assert sigmas == pytest.approx([9, 5, 2, 1]) and sizes == [3, 6, 6, 3]
    never = Sampler("euler", guidance_scale=lambda sigma: 1.0, **options)(vp(net), SHAPE, seeds=range(3), cond=y, uncond=null)
    off = Sampler("euler", **options)(vp(net), SHAPE, seeds=range(3), cond=y)
    assert torch.equal(never, off) and not torch.equal(got, off)


def test_generator_draws_the_noise() -> None:
    draw = sampler("euler_ancestral", 3)
    one, two = (draw(vp(), SHAPE, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and draw.last_seeds is None
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(3)]
    exact = sampler("euler_ancestral", 3, dtype=torch.float64)
    plan = exact.plan(VP)
    x = gaussian.execute(
        plan,
        lambda x, p: p.alpha * x - p.sigma * elementwise(torch.from_numpy(x), torch.full((3,), p.time)).numpy(),
        noise[0].numpy(),
        {k: noise[k].numpy() for k in (1, 2)},
    )
    got = exact(vp(), SHAPE, generator=torch.Generator().manual_seed(5))
    np.testing.assert_allclose(got.numpy(), x, rtol=1e-12, atol=1e-12)


def test_seeds_none_draws_and_reports_them() -> None:
    draw = sampler("ddpm")
    torch.manual_seed(1)
    first = draw(vp(), SHAPE)
    seeds = draw.last_seeds
    assert len(set(seeds)) == 3 and torch.equal(draw(vp(), SHAPE, seeds=seeds), first)
    torch.manual_seed(1)
    assert torch.equal(draw(vp(), SHAPE), first)


def test_callback_sees_the_state_and_the_denoised_prediction() -> None:
    seen = []
    den = Denoiser(lambda x, t: x * 0 + t.view(-1, 1) / 100, "x0", noise=VE, time="sigma")

    def callback(step: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        seen.append((step, sigma, x.clone(), denoised.clone()))

    for solver in sorted(SOLVERS):
        seen.clear()
        call = {"seeds": [1, 2], **start(solver, (2, 3))}
        out = Sampler(solver, sigmas=[8.0, 4.0, 1.0, 0.0], progress=False, callback=callback)(den, (2, 3), **call)
        assert torch.equal(out, Sampler(solver, sigmas=[8.0, 4.0, 1.0, 0.0], progress=False)(den, (2, 3), **call))
        assert [s[0] for s in seen] == list(range(len(seen)))
        for _, sigma, _, denoised in seen:
            torch.testing.assert_close(denoised, torch.full((2, 3), sigma / 100))
        assert torch.equal(seen[-1][2], out)
    with pytest.raises(TypeError, match="callback: returned a Tensor, supported: None"):
        sampler(callback=lambda step, sigma, x, denoised: x)(vp(), SHAPE, seeds=range(3))


@pytest.mark.parametrize("check_every", [None, 1])
def test_not_finite_is_an_error_that_names_sample_and_evaluation(check_every: int | None) -> None:
    calls = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        out = elementwise(x, t)
        if len(calls) == 3:
            out[1] = math.nan
        return out

    with pytest.raises(FloatingPointError, match=r"sample 1 \(seed 11\): not finite after evaluation 3 of 5, at sigma .*; 1 of 3 samples"):
        sampler(check_every=check_every)(vp(net), SHAPE, seeds=[10, 11, 12])
    assert len(calls) == (3 if check_every else 5)


def test_init_starts_from_a_noised_sample() -> None:
    x0 = torch.randn(SHAPE, dtype=torch.float64)
    states = []
    den = vp(lambda x, t: states.append(x.clone()) or elementwise(x, t))
    Sampler("ddim", timesteps=[500, 100], progress=False, dtype=torch.float64)(den, SHAPE, seeds=range(3), init=x0)
    a = VP.alphas_cumprod[500]
    expected = math.sqrt(a) * x0 + math.sqrt(1 - a) * reference.normal(torch.arange(3), SHAPE, dtype=torch.float64)
    torch.testing.assert_close(states[0], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm2", "dpmpp_2m", "unipc", "dpmpp_singlestep", "seeds_3"])
@pytest.mark.parametrize("noise", [VP, VE, FLOW], ids=["vp", "ve", "flow"])
def test_a_run_in_two_parts_is_the_run(solver: str, noise: schedules.NoiseSchedule) -> None:
    """End and start points: two one-step runs through ``latent`` equal a solver that keeps no history over the middle."""
    options = {"progress": False, "dtype": torch.float64} | ({"order": 1} if solver in ("unipc", "dpmpp_singlestep", "dpmpp_2m") else {})
    options |= {"corrector": False} if solver == "unipc" else {"eta": 0.0} if solver == "seeds_3" else {}
    den, sigmas = Denoiser(elementwise, "v", noise=noise, time=lambda p: 5 * p.sigma), [0.9, 0.5, 0.2]
    half = Sampler(solver, sigmas=sigmas[:2], **options)(den, SHAPE, seeds=range(3))
    rest = Sampler(solver, sigmas=sigmas[1:], **options)(den, SHAPE, seeds=range(3), latent=half)
    torch.testing.assert_close(rest, Sampler(solver, sigmas=sigmas, **options)(den, SHAPE, seeds=range(3)), rtol=1e-12, atol=1e-12)


def test_cfg_pp_takes_the_unconditional_half_where_it_is_given() -> None:
    """At scale 1, too, both halves run and the slope is the unconditional one's; without an unconditional half it is the base solver."""
    shifts, sizes = {"cond": torch.tensor([0.1, 0.2, 0.3]), "uncond": torch.tensor([-0.1, 0.0, 0.1])}, []
    den = vp(lambda x, t, y: sizes.append(len(x)) or elementwise(x, t, y))
    base, plus = (Sampler(name, sigmas=[4.0, 1.0, 0.0], progress=False) for name in ("euler", "euler_cfg_pp"))
    assert torch.equal(
        base(den, SHAPE, seeds=range(3), cond=shifts["cond"]),
        plus(den, SHAPE, seeds=range(3), cond=shifts["cond"]),
    )
    sizes.clear()
    got = plus(den, SHAPE, seeds=range(3), **shifts)
    assert sizes == [6, 3]  # a step to sigma 0 is the guided prediction alone
    p, q = (row.point for row in plus.plan(VP).rows)
    x = reference.normal(torch.arange(3), SHAPE, dtype=torch.float64)
    d, u = (p.alpha * x - p.sigma * elementwise(x, torch.full((3,), p.time), shifts[half]) for half in ("cond", "uncond"))
    x = q.alpha * d + q.sigma * (x - p.alpha * u) / p.sigma
    x = q.alpha * x - q.sigma * elementwise(x, torch.full((3,), q.time), shifts["cond"])
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)


KNOWN = torch.linspace(-0.9, 0.9, math.prod(SHAPE), dtype=torch.float64).view(SHAPE)
MASK = torch.tensor([0.0, 1.0, 0.25, 1.0], dtype=torch.float64)  # over the last dimension


@pytest.mark.parametrize("noise", [VP, VE, FLOW], ids=["vp", "ve", "flow"])
@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"ddim_inverse"}))
def test_inpainting_blends_the_denoised_prediction(solver: str, noise: schedules.NoiseSchedule) -> None:
    """The plan executed with the blended prediction, guided and clipped before, is what the sampler computes."""
    shifts = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([-0.1, 0.0, 0.1])
    den = Denoiser(elementwise, "v", noise=noise, time=lambda p: 5 * p.sigma)
    sigmas = [0.95, 0.7, 0.4, 0.2, 0.1, 0.0]
    draw = Sampler(solver, sigmas=sigmas, guidance_scale=2.5, clip=0.8, progress=False, dtype=torch.float64)
    call = {"seeds": range(3), "cond": shifts[0], "uncond": shifts[1], "known": KNOWN, "mask": MASK}
    got = draw(den, SHAPE, **call)
    plan, seeds = draw.plan(noise), torch.arange(3)

    def model(x: np.ndarray, point: schedules.Point) -> np.ndarray:
        x, t = torch.from_numpy(x), torch.full((3,), 5 * point.sigma)
        u, c = elementwise(x, t, shifts[1]), elementwise(x, t, shifts[0])
        ax, am = den.convert(point)
        return (MASK * (ax * x + am * (u + 2.5 * (c - u))).clamp(-0.8, 0.8) + (1 - MASK) * KNOWN).numpy()

    def unconditional(x: np.ndarray, point: schedules.Point) -> np.ndarray:
        ax, am = den.convert(point)
        return ax * x + am * elementwise(torch.from_numpy(x), torch.full((3,), 5 * point.sigma), shifts[1]).numpy()

    noises = {row.draw: reference.normal(seeds, SHAPE, draw=row.draw, dtype=torch.float64).numpy() for row in plan.rows if row.draw}
    first = plan.scale * reference.normal(seeds, SHAPE, dtype=torch.float64).numpy()
    np.testing.assert_allclose(got.numpy(), gaussian.execute(plan, model, first, noises, unconditional), rtol=1e-10, atol=1e-10)
    if solver != "ipndm" and solver != "lms" and solver != "pndm":  # whose last step is not the denoised prediction alone
        torch.testing.assert_close(got[..., 0], KNOWN[..., 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{"threshold": 0.9, "guidance_rescale": 0.6}, {"clip": 0.5}], ids=["threshold", "clip"])
def test_inpainting_everything_or_nothing(options: dict) -> None:
    """A mask of ones is the run without one, bit for bit, thresholds included; zeros give what is known; the reference agrees."""
    shifts = {"cond": torch.tensor([0.1, 0.2, 0.3]), "uncond": torch.tensor([-0.1, 0.0, 0.1])}
    known = KNOWN.float()
    for solver in ("dpmpp_2m", "heun", "euler_ancestral"):
        draw = sampler(solver, guidance_scale=2.5, **options)
        if solver == "heun":
            draw.sigmas = "karras"
        plain = draw(vp(), SHAPE, seeds=range(3), **shifts)
        mask = torch.zeros(1, 1, 4, 4)
        mask[..., :2] = 1
        results = [draw(vp(), SHAPE, seeds=range(3), known=known, mask=m, **shifts) for m in (torch.ones(1), torch.zeros(1), mask)]
        assert torch.equal(results[0], plain) and torch.equal(results[1], known)
        assert torch.equal(results[2][..., 2:], known[..., 2:]) and not torch.equal(results[2][..., :2], plain[..., :2].abs() * 0)
        draw.impl = "reference"
        assert torch.equal(draw(vp(), SHAPE, seeds=range(3), known=known, mask=mask, **shifts), results[2])


@pytest.mark.parametrize("kind", gaussian.PROCESSES)
def test_inversion_and_back(kind: str) -> None:
    """DDIM inverse, then DDIM from the latent: near the image, the distance halves as the steps double. The latent is the ODE's."""
    noise = gaussian.PROCESSES[kind]

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.as_tensor(gaussian.denoise(x, gaussian.Point(0.0, *(float(v) for v in noise.alpha_sigma(float(t[0]))))))

    den = Denoiser(net, "x0", noise=noise, time=lambda p: p.time)
    image = torch.tensor([[-0.6], [0.4], [1.9]], dtype=torch.float64)
    errors, latents = [], []
    for n in (64, 128):
        grid = gaussian.through_ratios(noise, np.append(np.geomspace(8.0, 0.02, n), 0.0))
        options = {"sigmas": [noise.sigma_of(grid.point(i)) for i in range(n + 1)], "progress": False, "dtype": torch.float64}
        latent = Sampler("ddim_inverse", **options)(den, (3, 1), latent=image)
        back = Sampler("ddim", **options)(den, (3, 1), latent=latent)
        exact = gaussian.exact(image.numpy(), grid.point(n), grid.point(0))
        errors.append((back - image).abs().max().item())
        latents.append(np.abs(latent.numpy() - exact).max() / grid.sigma[0])
    assert errors[1] < 0.05 and latents[1] < 0.1
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.2) and math.log2(latents[0] / latents[1]) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
@pytest.mark.parametrize("guided", [False, True])
def test_learned_variances(kind: str, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nichol and Dhariwal 2021, equations 14 and 15, written out; the variance is the conditional half's. diffusers agrees on the range."""
    shifts = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([-0.1, 0.0, 0.1])

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        v = torch.sin(3 * x + (t / 300 + shift).view(-1, 1, 1, 1))
        return torch.cat([elementwise(x, t, shift), v - 2 if kind == "learned" else v], 1)

    den = vp(net, "epsilon", variance=kind)
    call = {"cond": shifts[0]} | ({"uncond": shifts[1]} if guided else {})
    times = [800, 600, 400, 200, 0]
    draw = Sampler("ddpm", timesteps=times, variance="learned", guidance_scale=2.0 if guided else 1.0, dtype=torch.float64, progress=False)
    got = draw(den, SHAPE, seeds=range(3), **call)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    stock = importlib.import_module("diffusers").DDPMScheduler(**betas, variance_type=kind, clip_sample=False)
    stock.set_timesteps(5)
    seeds = torch.arange(3)
    x = y = reference.normal(seeds, SHAPE, dtype=torch.float64)
    for k, t in enumerate(times):
        a, a_next = VP.alphas_cumprod[t], VP.alphas_cumprod[times[k + 1]] if k < 4 else 1.0
        tt, n = torch.full((3,), float(t)), reference.normal(seeds, SHAPE, draw=k + 1, dtype=torch.float64)
        eps, v = net(x, tt, shifts[0]).chunk(2, 1)
        if guided:
            other = net(x, tt, shifts[1]).chunk(2, 1)[0]
            eps = other + 2.0 * (eps - other)
        beta, alpha = 1 - a / a_next, a / a_next
        small = (1 - a_next) / (1 - a) * beta
        mean = (x - beta / math.sqrt(1 - a) * eps) / math.sqrt(alpha)
        if k < 4:
            share = (v + 1) / 2
            log_variance = v if kind == "learned" else share * math.log(beta) + (1 - share) * math.log(small)
            mean = mean + n * (log_variance / 2).exp()
        x = mean
        if kind == "learned_range" and not guided:
            monkeypatch.setattr(importlib.import_module(type(stock).__module__), "randn_tensor", lambda *_, n=n, **__: n)
            y = stock.step(net(y, tt, shifts[0]), t, y).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)
    if kind == "learned_range" and not guided:
        torch.testing.assert_close(got, y.double(), rtol=1e-4, atol=1e-4)
    assert sampler("dpmpp_2m")(den, SHAPE, seeds=range(3), cond=shifts[0]).shape == SHAPE  # others leave the variance out
    with pytest.raises(ValueError, match="variance: got 'learned' for a network that returns none"):
        draw(vp(), SHAPE, seeds=range(3), **call)
    with pytest.raises(ValueError, match=r"net: returned a tensor of shape .* supported: a tensor of twice the input's channels"):
        draw(vp(lambda x, t, y: x, variance=kind), SHAPE, seeds=range(3), **call)


def test_network_in_bfloat16_keeps_a_float32_state() -> None:
    seen = []
    den = vp(lambda x, t: seen.append((x.dtype, t.dtype)) or elementwise(x, t), dtype=torch.bfloat16)
    out = sampler()(den, SHAPE, seeds=range(3))
    assert out.dtype == torch.float32 and set(seen) == {(torch.bfloat16, torch.float32)}
    assert (out - sampler()(vp(), SHAPE, seeds=range(3))).abs().max() < 0.1


def test_edm_input_is_scaled() -> None:
    seen = []
    den = Denoiser(lambda x, t: seen.append(x.clone()) or 0.1 * x, "edm", noise=VE)
    Sampler("euler", sigmas=[8.0, 2.0, 0.0], progress=False, dtype=torch.float64)(den, (2, 3), seeds=[0, 1])
    x = 8 * reference.normal(torch.tensor([0, 1]), (2, 3), dtype=torch.float64)
    torch.testing.assert_close(seen[0], x / math.sqrt(64.25))
    d = 0.25 / 64.25 * x + 8 * 0.5 / math.sqrt(64.25) * 0.1 * seen[0]
    torch.testing.assert_close(seen[1], (d + 0.25 * (x - d)) / math.sqrt(4.25))


def test_memory_format_changes_layout_not_bits() -> None:
    strides = set()

    def net(x: Tensor, t: Tensor) -> Tensor:
        strides.add(x.is_contiguous(memory_format=torch.channels_last))
        return elementwise(x, t)

    plain = sampler("ddpm")(vp(), SHAPE, seeds=range(3))
    last = sampler("ddpm", memory_format=torch.channels_last)(vp(net), SHAPE, seeds=range(3))
    assert strides == {True} and torch.equal(plain, last) and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 3, 4, 5, 6), (0, 3), (2, 0, 4)])
def test_any_rank_and_empty_batches(shape: tuple[int, ...]) -> None:
    out = sampler("euler_ancestral", guidance_scale=2.0)(
        vp(), shape, seeds=range(shape[0]), cond=torch.zeros(shape[0]), uncond=torch.zeros(1)
    )
    assert out.shape == shape and out.isfinite().all()


def test_one_step_and_the_terminal_point_of_a_flow() -> None:
    out = sampler("flow_euler", 1)(Denoiser(lambda x, t: x - 2.0, "flow", noise=FLOW), (2, 3), seeds=[1, 2])
    torch.testing.assert_close(out, torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"solver": "dpm"}, {}, "solver: got 'dpm'.*supported: consistency, ddim"),
        ({"impl": "fast"}, {}, "impl: got 'fast', supported: 'fused', 'reference'"),
        ({"steps": 0}, {}, "steps: got 0"),
        ({"clip": 0.0}, {}, "clip: got 0.0, supported: None or a number above 0"),
        ({"threshold": 1.5}, {}, "threshold: got 1.5"),
        ({"max_threshold": 0.5}, {}, "max_threshold: got 0.5"),
        ({"guidance_rescale": -1.0}, {}, "guidance_rescale: got -1.0"),
        ({"guidance_scale": math.nan}, {}, "guidance_scale: got nan"),
        ({"check_every": 0}, {}, "check_every: got 0"),
        ({"dtype": torch.int64}, {}, "dtype: got torch.int64"),
        ({"memory_format": torch.preserve_format}, {}, "memory_format: got torch.preserve_format"),
        ({"memory_format": torch.channels_last_3d}, {}, "memory_format: got torch.channels_last_3d for 4 dimensions"),
        ({"capture": True}, {}, "capture: got True on 'cpu', supported: CUDA devices, because it records a CUDA graph"),
        ({}, {"seeds": [1, 2]}, "seeds: got 2, supported: 3, one per sample"),
        ({}, {"seeds": [1, -2, 3]}, r"seeds: got -2, supported: integers in \[0, 2\^63\)"),
        ({}, {"seeds": [1, 2, 2**63]}, r"seeds: got 9223372036854775808"),
        ({}, {"seeds": 7}, "seeds: got 7, supported: 3 integers"),
        ({}, {"seeds": torch.zeros(3)}, r"seeds: got torch.float32 of shape \(3,\)"),
        ({}, {"generator": torch.Generator()}, "generator: got one together with seeds, supported: one of the two"),
        ({}, {"shape": (3, -1)}, r"shape: got \(3, -1\), supported: \(B, \*sample\)"),
        ({}, {"shape": ()}, r"shape: got \(\)"),
        ({}, {"init": torch.zeros(3, 1)}, r"init: got shape \(3, 1\), supported: \(3, 2, 4, 4\)"),
        ({}, {"latent": torch.zeros(SHAPE), "init": torch.zeros(SHAPE)}, "latent: got one together with init"),
        ({}, {"latent": torch.zeros(1)}, r"latent: got shape \(1,\)"),
        ({"solver": "ddim_inverse"}, {}, "latent: got None for 'ddim_inverse', supported: what to invert"),
        ({}, {"known": torch.zeros(SHAPE)}, "mask: got None with known, supported: both or none"),
        ({}, {"mask": torch.zeros(SHAPE)}, "mask: got one without known, supported: both or none"),
        (
            {},
            {"known": torch.zeros(SHAPE), "mask": torch.zeros(3)},
            r"mask: got shape \(3,\), supported: one that broadcasts to \(3, 2, 4, 4\)",
        ),
        ({"guidance_scale": 2.0}, {"cond": torch.zeros(3)}, "uncond: got None with guidance_scale 2.0"),
        ({"guidance_scale": 2.0}, {"cond": torch.zeros(3), "uncond": {"y": 1}}, r"uncond: got a mapping of \['y'\] with cond a Tensor"),
        ({"guidance_scale": 2.0}, {"cond": torch.zeros(2), "uncond": torch.zeros(2)}, r"cond: got shape \(2,\), supported: \(3, ...\)"),
        ({"guidance_scale": 2.0}, {"cond": torch.zeros(3), "uncond": torch.zeros(2)}, r"uncond: got shape \(2,\), supported: \(3,\)"),
        ({"guidance_scale": 2.0}, {"cond": {"y": 1}, "uncond": {"y": 2}}, r"uncond\['y'\]: got 2 with cond 1"),
    ],
)
def test_bad_arguments(options: dict, call: dict, message: str) -> None:
    calls = []
    with pytest.raises(ValueError, match=message):
        Sampler(**{"steps": 4, "progress": False, **options})(vp(lambda *a: calls.append(a)), **{"shape": SHAPE, "seeds": range(3), **call})
    assert not calls


def test_networks_that_return_something_else() -> None:
    with pytest.raises(ValueError, match=r"net: returned a tensor of shape \(3, 4, 4, 4\), supported: a tensor of the input's shape"):
        sampler()(vp(lambda x, t: torch.cat([x, x], 1)), SHAPE, seeds=range(3))
    with pytest.raises(ValueError, match="net: returned a dict"):
        sampler()(vp(lambda x, t: {"sample": x}), SHAPE, seeds=range(3))


def test_progress_bar_and_gradients_stay_out_of_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    net = torch.nn.Conv2d(2, 2, 1)
    out = Sampler("ddim", 3)(vp(lambda x, t: net(x)), SHAPE, seeds=range(3))
    assert not out.requires_grad and capsys.readouterr().err == ""


def test_plan_prints_and_plots(tmp_path: object) -> None:
    plan = sampler("heun", 3, s_churn=1.0).plan(VE)
    lines = plan.table().splitlines()
    assert lines[0].startswith("heun: 5 evaluations, 2 slots") and len(lines) == 7 and "noise" in lines[3] and "s1" in lines[2]
    matplotlib = importlib.import_module("matplotlib")
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    ax = matplotlib.figure.Figure().add_subplot()
    assert plan.plot(ax) is ax


@pytest.mark.cuda
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral", "heun", "unipc"])
def test_capture_equals_the_loop(solver: str) -> None:
    net = torch.nn.Conv2d(2, 2, 3, padding=1).cuda()
    den = vp(lambda x, t: net(x) + t.view(-1, 1, 1, 1) * 1e-3)
    options = {"sigmas": [9.0, 5.0, 2.0, 1.0, 0.5, 0.0], "guidance_scale": lambda s: 3.0 if s < 6 else 1.0, "progress": False}
    arguments = {"seeds": range(3), "device": "cuda", "cond": None, "uncond": None}
    den = vp(lambda x, t, y: net(x) + (t * 1e-3 + y).view(-1, 1, 1, 1))
    arguments |= {"cond": torch.ones(3, device="cuda"), "uncond": torch.zeros(3, device="cuda")}
    plain = Sampler(solver, **options)(den, SHAPE, **arguments)
    captured = Sampler(solver, capture=True, **options)(den, SHAPE, **arguments)
    torch.testing.assert_close(captured, plain, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    again = Sampler(solver, capture=True, **options)(
        den, SHAPE, generator=generator, **{k: v for k, v in arguments.items() if k != "seeds"}
    )
    assert again.isfinite().all()


@pytest.mark.parametrize("noisy", ["kernel", "generator", "kernel, inpainting"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler_ancestral", "heun", "unipc"])
def test_one_recorded_step_serves_every_row_and_call(solver: str, noisy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What capture relies on, shown without a GPU: nothing in a step is baked in that belongs to its row, seeds or condition."""
    states: list[tuple[Tensor, Tensor]] = []
    den, shifts = vp(), torch.tensor([0.1, 0.2, 0.3])

    def make(capture: bool) -> Sampler:
        return Sampler(
            solver,
            sigmas=[9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.0],
            guidance_scale=lambda sigma: 3.0 if 0.8 < sigma < 6 else 1.0,
            progress=False,
            capture=capture,
            callback=lambda step, sigma, x, denoised: states.append((x.clone(), denoised.clone())),
        )

    def call(draw: Sampler, number: int) -> Tensor:
        noise = {"generator": torch.Generator().manual_seed(number)} if noisy == "generator" else {"seeds": range(number, number + 3)}
        if noisy == "kernel, inpainting":
            noise |= {"known": KNOWN.float() * number, "mask": MASK.float() / number}
        return draw(den, SHAPE, cond={"shift": shifts * number}, uncond={"shift": shifts * 0}, **noise)

    plain = make(capture=False)
    expected, expected_states = [call(plain, 1), call(plain, 2)], list(states)
    states.clear()

    draw = make(capture=True)
    graphs = install(monkeypatch, lambda: draw._recorded)
    assert all(torch.equal(call(draw, 1 + k), expected[k]) for k in (0, 1))
    assert len(graphs) == 2 and sum(graph.replays for graph in graphs) == 2 * len(plain.plan(VP).rows) - 2
    assert all(torch.equal(a, b) for one, two in zip(states, expected_states, strict=True) for a, b in zip(one, two, strict=True))
    assert torch.equal(shifts, torch.tensor([0.1, 0.2, 0.3]))
    four = {"seeds": range(4), "cond": {"shift": torch.zeros(4)}, "uncond": {"shift": torch.zeros(4)}}
    assert draw(den, (4, *SHAPE[1:]), **four).shape[0] == 4 and len(graphs) == 4
    draw.threshold = 0.9  # decides the launches of a step, so what was recorded does not serve it
    assert draw(den, (4, *SHAPE[1:]), **four).shape[0] == 4 and len(graphs) == 6
