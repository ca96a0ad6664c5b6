"""Reading a stock step's rows off the stock class: what a row cannot hold is found out, and the stock step runs instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

import genfast.compat.diffusers as fused
from genfast.compat.diffusers import rows
from genfast.compat.diffusers import table as tables
from genfast.compat.diffusers.scheduler import fuse
from genfast.compat.diffusers.state import NotLinear

SHAPE = (2, 3, 4, 4)


def planted(change: Callable[[Any, Tensor, Tensor, Tensor], Tensor], base: type = EulerDiscreteScheduler) -> type:
    """A stock class whose step ends with ``change(scheduler, model_output, sample, prev_sample)``."""

    def step(self: Any, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True) -> Any:
        (prev, *_) = base.step(self, model_output, timestep, sample, return_dict=False)
        prev = change(self, model_output, sample, prev)
        return SchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        self.kept = [torch.zeros(SHAPE) for _ in range(8)]
        base.set_timesteps(self, *args, **options)

    def init(self: Any, *args: Any, **options: Any) -> None:
        base.__init__(self, *args, **options)

    return type(base.__name__, (base,), {"step": step, "set_timesteps": set_timesteps, "__init__": init})


def _half_kept(scheduler: Any, model_output: Tensor, sample: Tensor, prev: Tensor) -> Tensor:
    """Three fields more to keep than one row writes."""
    older = scheduler.kept
    scheduler.kept = [model_output, sample + model_output, model_output - sample, 2 * sample, *older[:4]]
    return prev + 0.01 * (older[0] + older[1] + older[2] + older[3])


def _seven_terms(scheduler: Any, model_output: Tensor, sample: Tensor, prev: Tensor) -> Tensor:
    older = scheduler.kept
    scheduler.kept = [model_output, *older[:7]]
    return prev + 0.01 * sum(older[:7])


def _two_clips(scheduler: Any, model_output: Tensor, sample: Tensor, prev: Tensor) -> Tensor:
    return prev.clamp(-1, 1) + (2 * prev).clamp(-1, 1)


REFUSED: dict[str, tuple[Callable[[Any, Tensor, Tensor, Tensor], Tensor], str]] = {
    "square": (lambda s, m, x, p: p + 0.01 * m * m, "not linear"),
    "absolute value": (lambda s, m, x, p: p + 0.1 * x.abs(), "not linear"),
    "small sine": (lambda s, m, x, p: p + 1e-3 * torch.sin(m), "not linear"),
    "product": (lambda s, m, x, p: p + 0.01 * m * x, "not linear"),
    "constant": (lambda s, m, x, p: p + 1e-3, "not linear"),
    "mean over elements": (lambda s, m, x, p: p - x.mean(), "not linear"),
    "neighbours": (lambda s, m, x, p: p + 0.1 * m.roll(1, 1), "not linear"),
    "other shape": (lambda s, m, x, p: p[:, :1], "shape"),
    "rounding": (lambda s, m, x, p: p.round(), "not linear"),
    "one-sided clip": (lambda s, m, x, p: p.clamp(min=-1.0), "clip"),
    "uneven clip": (lambda s, m, x, p: p.clamp(-1.0, 2.0), "clip"),
    "two clips": (_two_clips, "two clipped predictions"),
    "two draws": (lambda s, m, x, p: p + torch.randn_like(p) - torch.randn_like(p), "two draws of noise"),
    "noise of another shape": (lambda s, m, x, p: p + torch.randn(1), "noise of shape"),
    "uniform noise": (lambda s, m, x, p: p + 0.1 * torch.rand_like(p), "noise that is not normal"),
    "seven kept terms": (_seven_terms, "at most 6 distinct ones"),
}


def states(scheduler: Any, steps: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    scheduler.set_timesteps(steps)
    x, found = torch.randn(SHAPE), []
    for t in scheduler.timesteps:
        out = torch.tanh(scheduler.scale_model_input(x, t)) + 0.1
        x = scheduler.step(out, t, x, return_dict=False)[0]
        found.append(x)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_row_cannot_hold_runs_the_stock_step(kind: str) -> None:
    change, reason = REFUSED[kind]
    stock = planted(change)
    steps = 1 if kind == "other shape" else 8
    expected = states(stock(), steps)
    scheduler = fuse(stock, scaled=True)()
    found = states(scheduler, steps)
    assert reason in scheduler.fallback
    assert all(torch.equal(u, v) for u, v in zip(expected, found, strict=True))


@pytest.mark.parametrize("change", [_half_kept, lambda s, m, x, p: 0.5 * p + 0.1 * m + 0.2 * torch.randn_like(p)])
def test_what_rows_can_hold_is_held(change: Any) -> None:
    """Five outputs of a step take two launches; a draw of noise is a term."""
    stock = planted(change)
    expected = states(stock())
    scheduler = fuse(stock, scaled=True)()
    found = states(scheduler)
    assert scheduler.fallback is None
    assert len(scheduler._row.launches) == (2 if change is _half_kept else 1)
    for u, v in zip(expected, found, strict=True):
        assert float((u - v).abs().max()) < 2e-5 * max(1.0, float(u.abs().max()))


def traced(name: str, steps: int = 4, **config: Any) -> tuple[Any, list[tables.Row], list[float]]:
    """A fused scheduler, the rows of its trajectory and the factors of its scale_model_input."""
    s = getattr(fused, name)(**config)
    s.set_timesteps(steps)
    x, t = torch.zeros(SHAPE), s.timesteps[0]
    return s, *s._rows_to_come(0, rows.kind_of(x, t, x, {}, False, None), t, x, {})


def test_a_trace_is_the_formula() -> None:
    """Euler: x + (sigma' - sigma) eps, and its input scale; DDIM's clipped x0 of equation 12 (Song et al. 2021)."""
    s, found, scales = traced("EulerDiscreteScheduler")
    sigmas = s.sigmas.double().tolist()
    for k, (row, scale) in enumerate(zip(found, scales, strict=True)):
        vector = row.step.returned[0]
        assert vector == {"x": 1.0, "m": pytest.approx(sigmas[k + 1] - sigmas[k], rel=1e-6)}
        assert scale == pytest.approx((sigmas[k] ** 2 + 1) ** -0.5, rel=1e-6)
        assert not row.step.draws
    d, found, _ = traced("DDIMScheduler")
    for t, row in zip(d.timesteps.tolist(), found, strict=True):
        step = row.step
        a = float(d.alphas_cumprod[t])
        before = float(d.alphas_cumprod[t - 250]) if t >= 250 else float(d.final_alpha_cumprod)
        assert step.clip == 1.0
        assert step.convert == pytest.approx((a**-0.5, -(((1 - a) / a) ** 0.5)), rel=1e-5)
        assert step.returned[1] == {"d": 1.0}
        expected = {"d": pytest.approx(before**0.5, rel=1e-5), "m": pytest.approx((1 - before) ** 0.5, rel=1e-5)}
        assert step.returned[0] == {term: c for term, c in expected.items() if before < 1 or term == "d"}


def test_what_is_kept_is_what_the_attributes_hold() -> None:
    """DPM-Solver++ 2M holds two predictions and reads one of them; a prepared trajectory has a slot of its ring for either."""
    _, found, _ = traced("DPMSolverMultistepScheduler")
    assert [len(row.inputs) for row in found] == [0, 1, 1, 0]  # the last step is of first order
    assert [len(row.step.kept) for row in found] == [1, 1, 1, 1]
    table = tables.table(found, [], seeded=False, guidance=1.0, device=torch.device("cpu"))
    assert table.ring == 2 and [len(held) for held in table.held] == [0, 1, 2, 2, 2]
    for held in table.held[2:]:
        assert {*held} == {("model_outputs", 0), ("model_outputs", 1)} and {*held.values()} == {1, 2}


def test_a_ring_larger_than_the_slots() -> None:
    """Sixteen slots hold the sample, what is kept and what is returned."""
    _, found, _ = traced("EulerDiscreteScheduler")
    paths = [("kept", k) for k in range(14)]
    with pytest.raises(NotLinear, match="14 tensors kept between steps"):
        tables.table(found, paths, seeded=False, guidance=1.0, device=torch.device("cpu"))
    assert tables.table(found, paths[:13], seeded=False, guidance=1.0, device=torch.device("cpu")).ring == 13
