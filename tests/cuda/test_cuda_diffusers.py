"""On a GPU: fused diffusers steps wait for nothing, and one captured step replays every step of a trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import genfast.compat.diffusers as fused

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]
SHAPE = (2, 4, 32, 32)
NAMES = [
    "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "SASolverScheduler",
]  # fmt: skip
SEEDED = {"EulerAncestralDiscreteScheduler": {"seeds": [3, 4]}, "SASolverScheduler": {"seeds": [3, 4]}}


def denoise(s: Any, x: Tensor, t: Tensor, **options: Any) -> Tensor:
    scaled = s.scale_model_input(x, t)
    return s.step(torch.tanh(scaled * 1.3 + t.float() / 1000), t, x, return_dict=False, **options)[0]


def states(s: Any, options: dict[str, Any], device: str) -> list[Tensor]:
    s.set_timesteps(20, device=device)
    found = [(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * float(s.init_noise_sigma)).to(device)]
    s.prepare(found[0], **options)
    for t in s.timesteps:
        found.append(denoise(s, found[-1], t, **options))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_without_a_sync_and_equal_to_the_cpu(name: str) -> None:
    options, s = SEEDED.get(name, {}), fused.CLASSES[name]()
    host = states(s, options, "cpu")
    x = host[0].cuda()
    s.set_timesteps(20, device="cuda")
    s.prepare(x, **options)
    times = list(s.timesteps)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t in times:
            x = denoise(s, x, t, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert s.fallback is None
    assert float((x.cpu() - host[-1]).abs().max()) < 1e-3 * max(1.0, float(host[-1].abs().max()))  # tanh differs in its last bits


@pytest.mark.parametrize("name", NAMES)
def test_a_captured_step_replays_every_step(name: str) -> None:
    options, s = SEEDED.get(name, {}), fused.CLASSES[name]()
    expected = states(s, options, "cuda")
    x, t = expected[0].clone(), torch.zeros_like(s.timesteps[0])
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        t.copy_(s.timesteps[0])
        s.set_timesteps(20, device="cuda")
        s.prepare(x, **options)
        denoise(s, x, s.timesteps[0], **options)
    torch.cuda.current_stream().wait_stream(warm)
    s.set_timesteps(20, device="cuda")
    s.prepare(x, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(denoise(s, x, t, **options))
    for k, timestep in enumerate(s.timesteps):
        t.copy_(timestep)
        graph.replay()
        assert torch.equal(x, expected[k + 1])
    assert s._step_index in (None, len(s.timesteps))
