"""Classifier-free guidance inside the step: the kernel combines both halves of the model output."""

from __future__ import annotations

import pytest
import torch

import genfast.compat.diffusers as gfd

STEPS, SCALE = 8, 3.5


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(1.3 * x + t.double().to(x.dtype) / 1000) + 0.1 * torch.sin(3 * x)


def trajectory(scheduler: object, fused_guidance: bool, dtype: torch.dtype) -> torch.Tensor:
    scheduler.set_timesteps(STEPS)  # type: ignore[attr-defined]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    for t in scheduler.timesteps:  # type: ignore[attr-defined]
        both = model(torch.cat([x, 0.5 * x + 0.1]), t)
        if fused_guidance:
            x = scheduler.step(both, t, x, guidance_scale=SCALE, return_dict=False)[0]  # type: ignore[attr-defined]
        else:
            uncond, cond = both.chunk(2)
            x = scheduler.step(uncond + SCALE * (cond - uncond), t, x, return_dict=False)[0]  # type: ignore[attr-defined]
    return x


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"thresholding": True, "prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {}),
        ("HeunDiscreteScheduler", {}),
    ],
)
def test_guidance_in_the_step_is_guidance_before_it(name: str, options: dict[str, object]) -> None:
    stock = trajectory(gfd.CLASSES[name].stock(**options), False, torch.float64)
    scheduler = gfd.CLASSES[name](**options)
    guided = trajectory(scheduler, True, torch.float64)
    assert scheduler.fallback is None
    assert (guided - stock).abs().max() < 1e-5 * stock.abs().max()  # stock's factors are float32
    single, stock_single = (
        trajectory(gfd.CLASSES[name](**options), True, torch.float32),
        trajectory(scheduler.stock(**options), False, torch.float32),
    )
    assert (single - stock).abs().max() <= 2 * (stock_single - stock).abs().max() + 1e-6  # what the model makes of rounding errors


def test_where_the_stock_step_runs_the_guidance_still_holds() -> None:
    """Learned variances: a model output of another shape than the kernel takes."""
    scheduler = gfd.DDPMScheduler(variance_type="learned_range")
    stock = gfd.DDPMScheduler.stock(variance_type="learned_range")
    for s in (scheduler, stock):
        s.set_timesteps(10)
    generator = torch.Generator().manual_seed(2)
    x, both = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(4, 6, 4, 4, generator=generator)
    uncond, cond = both.chunk(2)
    ours = scheduler.step(both, 500, x, generator=torch.Generator().manual_seed(3), guidance_scale=SCALE).prev_sample
    theirs = stock.step(uncond + SCALE * (cond - uncond), 500, x, generator=torch.Generator().manual_seed(3)).prev_sample
    assert (ours - theirs).abs().max() < 1e-6 and not torch.equal(ours, x)
