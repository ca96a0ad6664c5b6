"""Derivatives of fused diffusers steps, through the sample, the model output and what earlier steps kept: those of stock, or refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import pytest
import torch
from fused_runs import CLASSES, NOISY, PATHWISE, gen, make
from torch import Tensor

import genfast.compat.diffusers as fused

pytestmark = pytest.mark.filterwarnings("ignore")


def through(s: Any, x: Tensor, outs: Sequence[Tensor]) -> Tensor:
    for t, out in zip(s.timesteps, outs, strict=False):
        if hasattr(s, "scale_model_input"):
            x = x + 0.1 * s.scale_model_input(x, t)
        x = s.step(out, t, x, return_dict=False)[0]
    return x


def tensors(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = gen(4)
    return [torch.randn(1, 2, 2, 2, generator=g, dtype=dtype, requires_grad=True) for _ in range(count)]


DIFFERENTIABLE = [name for name in CLASSES if name not in NOISY | PATHWISE]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_stock(name: str) -> None:
    """Through the history, with every input and with a single one that requires grad."""
    inputs = tensors(6)
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 2, 2)
    for wanted in (range(6), [0], [2], [1, 4]):
        gradients = []
        for module in (diffusers, fused):
            s = make(module, name)
            s.set_timesteps(8)
            given = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(inputs)]
            out = through(s, given[0], given[1:])
            gradients.append(torch.autograd.grad((out * weight).sum(), [given[k] for k in wanted]))
        for p, q in zip(*gradients, strict=True):
            assert float((p - q).abs().max()) < 2e-5 * max(1, float(p.abs().max()))


@pytest.mark.parametrize("config", [{}, {"thresholding": True}, {"solver_order": 3}], ids=str)
@pytest.mark.parametrize("without", [None, 2])
def test_gradients_through_what_is_kept(config: dict[str, Any], without: int | None) -> None:
    """The sample is cut off between steps, and one step records nothing: what is left goes through the history alone."""
    inputs, weight = tensors(7), torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 2, 2)
    gradients = []
    for module in (diffusers, fused):
        s = make(module, "DPMSolverMultistepScheduler", **config)
        s.set_timesteps(8)
        given = [t.detach().requires_grad_() for t in inputs]
        x, total = given[0], torch.zeros((), dtype=torch.float64)
        for k, t in enumerate(s.timesteps[:6]):
            with torch.set_grad_enabled(k != without):
                x = s.step(given[k + 1], t, x.detach(), return_dict=False)[0]
            total = total + (x * weight).sum() * (k + 1)
        gradients.append(torch.autograd.grad(total, given[1:], allow_unused=True, materialize_grads=True))
    for p, q in zip(*gradients, strict=True):
        assert float((p - q).abs().max()) < 2e-5 * max(1, float(p.abs().max()))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_gradcheck(name: str) -> None:
    def function(x: Tensor, *outs: Tensor) -> Tensor:
        s = make(fused, name)
        s.set_timesteps(8)
        result = through(s, x, outs)
        assert s.fallback is None
        return result

    assert torch.autograd.gradcheck(function, tensors(5))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_transforms_are_exact(name: str) -> None:
    """torch.func, from a scheduler that has begun outside and from one that begins inside."""
    x, *outs = (t.detach() for t in tensors(4))
    tangents = [t.detach() for t in tensors(8)[4:]]

    def function(module: Any, first: int) -> Callable[..., Tensor]:
        schedulers = []
        for _ in range(4):
            s = make(module, name)
            s.set_timesteps(8)
            schedulers.append(s)

        def call(x: Tensor, *outs: Tensor) -> Tensor:
            s = schedulers.pop()
            begun = s.step(outs[0].new_full((1, 2, 2, 2), 0.3), s.timesteps[0], x, return_dict=False)[0] if first else x
            for t, out in zip(s.timesteps[first:], outs, strict=False):
                begun = s.step(out, t, begun, return_dict=False)[0]
            return begun

        return call

    for first in (0, 1):
        results = []
        for module in (diffusers, fused):
            f = function(module, first)
            gradients = torch.func.grad(lambda *z, f=f: f(*z).square().sum(), argnums=(0, 1))(x, *outs)
            value, tangent = torch.func.jvp(function(module, first), (x, *outs), tuple(tangents))
            mapped = torch.func.vmap(lambda m, f=f: f(x, m, *outs[1:]))(torch.stack(outs[:2]))
            results.append([*gradients, value, tangent, mapped])
        for p, q in zip(*results, strict=True):
            assert float((p - q).abs().max()) < 2e-5 * max(1, float(p.abs().max()))
