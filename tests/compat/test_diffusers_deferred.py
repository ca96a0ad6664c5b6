"""Fused diffusers steps that run later: compiled, or recorded in a CUDA graph."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from fused_runs import NOISY, make, start
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import genfast.compat.diffusers as fused
from genfast.compat.diffusers import scheduler as room

pytestmark = pytest.mark.filterwarnings("ignore")

ONE_GRAPH = [
    "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "SASolverScheduler",
]  # fmt: skip


def denoise(s: Any, x: Tensor, t: Tensor, **options: Any) -> Tensor:
    scaled = s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x
    return s.step(torch.tanh(scaled * 1.3 + t.float() / 1000), t, x, return_dict=False, **options)[0]


def eager_states(s: Any, options: dict[str, Any], steps: int) -> list[Tensor]:
    s.set_timesteps(steps)
    states = [start(s)]
    s.prepare(states[0], **options)
    for t in s.timesteps:
        states.append(denoise(s, states[-1], t, **options))
    return states


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ONE_GRAPH)
def test_one_graph_over_all_steps(name: str, backend: str) -> None:
    """Denoiser, scaling and step; twice over, and then steps outside the graph from where it stopped."""
    options = {"seeds": [3, 4]} if name in NOISY else {}
    s = make(fused, name)
    states = eager_states(s, options, 12)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []
    inner = torch._dynamo.lookup_backend(backend)

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return inner(graph, inputs)

    step = torch.compile(lambda x, t: denoise(s, x, t, **options), backend=count, fullgraph=True)
    with torch.no_grad():
        for stop in (len(s.timesteps), 7):
            s.set_timesteps(12)
            s.prepare(states[0], **options)
            x = states[0]
            for k, t in enumerate(s.timesteps[:stop]):
                x = step(x, t)
                assert torch.equal(x, states[k + 1])
        assert len(graphs) == 1
        for k, t in enumerate(s.timesteps[stop:], stop):
            x = denoise(s, x, t, **options)
            assert torch.equal(x, states[k + 1])
    torch._dynamo.reset()


def test_compiled_without_preparation() -> None:
    """The first step then breaks the graph; in one that may not break, the message says what to call."""
    s = make(fused, "DPMSolverMultistepScheduler")
    states = eager_states(s, {}, 5)
    for whole in (False, True):
        torch._dynamo.reset()
        s.set_timesteps(5)
        step = torch.compile(s.step, backend="eager", fullgraph=whole)
        with pytest.raises(Exception, match="call prepare") if whole else contextlib.nullcontext():
            x = states[0]
            for k, t in enumerate(s.timesteps):
                x = step(torch.tanh(x * 1.3 + t.float() / 1000), t, x, return_dict=False)[0]
                assert torch.equal(x, states[k + 1])
    torch._dynamo.reset()


def test_a_compiled_step_refuses_a_gradient() -> None:
    s = make(fused, "DPMSolverMultistepScheduler")
    s.set_timesteps(5)
    x = start(s)
    s.prepare(x)
    step = torch.compile(lambda out, t: s.step(out, t, x, return_dict=False)[0], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a tensor that requires grad"):
        step(x.clone().requires_grad_(), s.timesteps[0])
    torch._dynamo.reset()


class Recorder(TorchDispatchMode):
    """A stand-in for a CUDA graph: replays the recorded operators on the same memory, with every Python value baked in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if isinstance(out, Tensor) and new.data_ptr() != out.data_ptr():
                out.copy_(new)


@pytest.mark.parametrize("name", ONE_GRAPH)
def test_one_recorded_step_serves_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What capture relies on, shown without a GPU: nothing in a step is baked in that belongs to its number."""
    options = {"seeds": [3, 4]} if name in NOISY else {}
    s = make(fused, name)
    states = eager_states(s, options, 8)
    s.set_timesteps(8)
    s.prepare(states[0], **options)
    x, t = states[0].clone(), s.timesteps[0].clone()
    before = [tensor.clone() for tensor in (*s._run.ring, s._run.counter)]
    with monkeypatch.context() as patch:
        patch.setattr(room, "_deferred", lambda sample: True)
        with Recorder() as graph:
            x.copy_(denoise(s, x, t, **options))
    for tensor, values in zip((*s._run.ring, s._run.counter, x), (*before, states[0]), strict=True):
        tensor.copy_(values)  # recording a CUDA graph executes nothing
    for k, timestep in enumerate(s.timesteps):
        t.copy_(timestep)
        graph.replay()
        assert torch.equal(x, states[k + 1])


@pytest.mark.parametrize("name", [*ONE_GRAPH, "DEISMultistepScheduler", "LMSDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_the_attributes_catch_up_with_the_graph(name: str) -> None:
    """Half a trajectory compiled: then they are what the same steps leave that run at once, and what they keep may be edited."""
    options = {"seeds": [3, 4]} if name in NOISY else {}
    pair = [make(fused, name) for _ in range(2)]
    xs = []
    torch._dynamo.reset()
    for k, s in enumerate(pair):
        s.set_timesteps(12)
        x = start(s)
        s.prepare(x, **options)
        step = torch.compile(lambda x, t, s=s: denoise(s, x, t, **options), backend="eager", fullgraph=True) if k else None
        with torch.no_grad():
            for t in s.timesteps[:5]:
                x = step(x, t) if step else denoise(s, x, t, **options)
        assert getattr(s, "_step_index", None) in (None, 5)
        xs.append(x)
    for attribute, expected in pair[0].__dict__.items():
        if attribute.startswith("_") or attribute in ("fallback", "seeds"):
            continue
        found = pair[1].__dict__[attribute]
        values = zip(expected, found, strict=True) if isinstance(expected, list) else [(expected, found)]
        assert all(torch.equal(e, f) if isinstance(e, Tensor) and e.ndim != 1 else type(e) is type(f) for e, f in values), attribute
    for s in pair:
        for value in s.__dict__.values():
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, Tensor) and item.shape == x.shape:
                    item.mul_(0.5)
    for t in pair[0].timesteps[5:]:
        xs = [denoise(s, x, t, **options) for s, x in zip(pair, xs, strict=True)]
        assert torch.equal(*xs)
    torch._dynamo.reset()


@pytest.mark.parametrize("change", [lambda s: s.model_outputs.__setitem__(0, 0), lambda s: setattr(s, "lower_order_nums", 1)])
def test_a_change_of_attributes_that_are_behind_is_refused(change: Any) -> None:
    s = make(fused, "DPMSolverMultistepScheduler")
    s.set_timesteps(12)
    x = start(s)
    s.prepare(x)
    torch._dynamo.reset()
    step = torch.compile(lambda x, t: denoise(s, x, t), backend="eager", fullgraph=True)
    with torch.no_grad():
        for t in s.timesteps[:4]:
            x = step(x, t)
    change(s)
    with pytest.raises(ValueError, match=r"^(model_outputs|lower_order_nums): got a change while the attributes were behind"):
        denoise(s, x, s.timesteps[4])
    torch._dynamo.reset()


def test_a_capture_without_preparation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    s = make(fused, "DPMSolverMultistepScheduler")
    s.set_timesteps(12)
    x = denoise(s, start(s), s.timesteps[0])
    monkeypatch.setattr(room, "_deferred", lambda sample: True)
    with pytest.raises(ValueError, match=r"^step: got steps that are not prepared, in a CUDA graph capture"):
        denoise(s, x, s.timesteps[1])


def test_an_index_set_between_compiled_steps() -> None:
    """What was prepared is for other steps; prepared again, the trajectory goes on from the index, with what was kept."""
    s, at_once = (make(fused, "DPMSolverMultistepScheduler") for _ in range(2))
    x = y = start(s)
    torch._dynamo.reset()
    step = torch.compile(lambda x, t: denoise(s, x, t), backend="eager", fullgraph=True)
    for scheduler in (s, at_once):
        scheduler.set_timesteps(12)
    s.prepare(x)
    with torch.no_grad():
        for k, index in ((0, 0), (1, 1), (2, 2), (1, 1), (2, 2)):
            if k == 1 and s._step_index == 3:
                s._step_index = at_once._step_index = index
                s.prepare(x)
            x, y = step(x, s.timesteps[k]), denoise(at_once, y, at_once.timesteps[k])
            assert torch.equal(x, y)
    torch._dynamo.reset()
