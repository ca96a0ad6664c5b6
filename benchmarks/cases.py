"""What is timed. A case is data: a solver on a shape, and the stock scheduler that does the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from genfast import schedules
from genfast.samplers import Denoiser, Plan
from genfast.samplers.solvers import make_plan

STEPS = 20
GUIDANCE = 7.5
LATENT_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class StepCase:
    """A run of `STEPS` solver steps with classifier-free guidance, epsilon prediction, on Stable Diffusion's noise schedule."""

    name: str
    solver: str
    stock: str  # class in diffusers
    shape: tuple[int, ...]
    sigmas: str = "leading"
    options: dict[str, Any] = field(default_factory=dict)
    stock_options: dict[str, Any] = field(default_factory=dict)
    threshold: float | None = None

    def plan(self) -> Plan:
        return make_plan(self.solver, schedules.grid(schedules.scaled_linear(1000), STEPS, sigmas=self.sigmas), **self.options)

    def denoiser(self) -> Denoiser:
        return Denoiser(lambda x, t: x, prediction="epsilon", noise=schedules.scaled_linear(1000))

    def stock_scheduler(self) -> Any:
        import diffusers

        return getattr(diffusers, self.stock)(num_train_timesteps=1000, **LATENT_BETAS, **self.stock_options)


PIXELS = (8, 3, 256, 256)
LATENT = (1, 4, 64, 64)


def step_cases(pixels: tuple[int, ...] = PIXELS, latent: tuple[int, ...] = LATENT) -> list[StepCase]:
    """The foundation's table, at ``pixels`` (bandwidth) and ``latent`` (overhead)."""
    ddim = {"clip_sample": False, "set_alpha_to_one": True}
    big, small = "x".join(map(str, pixels)), "x".join(map(str, latent))
    return [
        StepCase(f"CFG + DDIM, {big}", "ddim", "DDIMScheduler", pixels, stock_options=ddim),
        StepCase(f"CFG + DPM++ 2M, {big}", "dpmpp_2m", "DPMSolverMultistepScheduler", pixels),
        StepCase(f"CFG + Euler ancestral, {big}", "euler_ancestral", "EulerAncestralDiscreteScheduler", pixels),
        StepCase(
            f"CFG + DDIM + dynamic threshold, {big}",
            "ddim",
            "DDIMScheduler",
            pixels,
            stock_options={**ddim, "thresholding": True},
            threshold=0.995,
        ),
        StepCase(f"CFG + UniPC-2, {big}", "unipc", "UniPCMultistepScheduler", pixels),
        StepCase(f"CFG + DPM++ 2M, {small}", "dpmpp_2m", "DPMSolverMultistepScheduler", latent),
    ]
