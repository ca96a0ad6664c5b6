"""A pipeline's loop over a scheduler, stock or fused, and what two of them differ by."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import genfast.compat.diffusers as fused

CLASSES = list(fused.CLASSES)
PATHWISE = {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}
NOISY = {
    "CMStochasticIterativeScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler", "LCMScheduler", "SASolverScheduler", "TCDScheduler",
}  # fmt: skip
SHAPE = (2, 3, 4, 4)
Outputs = list[tuple[Tensor, ...]]


def make(module: Any, name: str, **config: Any) -> Any:
    return getattr(module, name)(**({"noise_sampler_seed": 3} if name == "DPMSolverSDEScheduler" else {}), **config)


def gen(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def net(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x * 1.3 + float(t) / 1000) + 0.1 * torch.sin(3 * x)


def start(s: Any, shape: Sequence[int] = SHAPE, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=gen(seed)) * float(getattr(s, "init_noise_sigma", 1.0))).to(dtype)


def run(s: Any, x: Tensor, times: Iterable[Any], generator: Any = None, model_dtype: torch.dtype | None = None, **options: Any) -> Outputs:
    """A pipeline's loop; every field of every step's result."""
    outputs = []
    if generator is not None and "generator" in inspect.signature(s.step).parameters:
        options["generator"] = generator
    for t in times:
        out = net(s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x, t).to(model_dtype or x.dtype)
        result = s.step(out, t, x, **options)
        outputs.append(tuple(field for field in result.values() if field is not None))
        x = result.prev_sample
    return outputs


def difference(a: Outputs, b: Outputs) -> float:
    """The largest elementwise difference, relative to the largest element where that is above 1."""
    assert len(a) == len(b)
    worst = 0.0
    for p, q in zip(a, b, strict=True):
        for u, v in zip(p, q, strict=True):
            assert u.shape == v.shape and u.dtype == v.dtype
            if u.numel():
                worst = max(worst, float((u.double() - v.double()).abs().max() / u.double().abs().max().clamp(min=1)))
    return worst
