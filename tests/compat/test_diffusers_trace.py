"""Reading a stock step's rows off the stock class: what a row cannot hold is found out, and the stock step runs instead."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from genfast.compat.diffusers import table as tables
from genfast.compat.diffusers.scheduler import fuse
from genfast.compat.diffusers.trace import NotLinear, Trace, trace

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
    assert scheduler._run.table.launches == (2 if change is _half_kept else 1)
    for u, v in zip(expected, found, strict=True):
        assert float((u - v).abs().max()) < 2e-5 * max(1.0, float(u.abs().max()))


def traced(stock: type, steps: int = 4, **config: Any) -> Trace:
    s = stock(**config)
    s.set_timesteps(steps)
    state = s.__dict__ | ({"_step_index": None, "_begin_index": 0} if "_step_index" in s.__dict__ else {})
    return trace(
        stock, state, list(s.timesteps), {}, scaled=hasattr(s, "is_scale_input_called"), kept_shape=SHAPE,
        sample_dtype=torch.float32, model_dtype=torch.float32,
    )  # fmt: skip


def test_a_trace_is_the_formula() -> None:
    """Euler: x + (sigma' - sigma) eps, and its input scale; DDIM's clipped x0 of equation 12 (Song et al. 2021)."""
    s = EulerDiscreteScheduler()
    s.set_timesteps(4)
    sigmas = s.sigmas.double().tolist()
    for k, step in enumerate(traced(EulerDiscreteScheduler).steps):
        vector = step.returned[0]
        assert vector == {"x": 1.0, "m": pytest.approx(sigmas[k + 1] - sigmas[k], rel=1e-6)}
        assert step.scale == pytest.approx((sigmas[k] ** 2 + 1) ** -0.5, rel=1e-6)
        assert not step.draws
    d = DDIMScheduler()
    d.set_timesteps(4)
    for t, step in zip(d.timesteps.tolist(), traced(DDIMScheduler).steps, strict=True):
        a = float(d.alphas_cumprod[t])
        before = float(d.alphas_cumprod[t - 250]) if t >= 250 else float(d.final_alpha_cumprod)
        assert step.clip == 1.0
        assert step.convert == pytest.approx((a**-0.5, -(((1 - a) / a) ** 0.5)), rel=1e-5)
        assert step.returned[1] == {"d": 1.0}
        expected = {"d": pytest.approx(before**0.5, rel=1e-5), "m": pytest.approx((1 - before) ** 0.5, rel=1e-5)}
        assert step.returned[0] == {term: c for term, c in expected.items() if before < 1 or term == "d"}


def test_what_no_later_step_reads_is_not_kept() -> None:
    """DPM-Solver++ 2M needs one prediction of the step before; the last step keeps nothing."""
    steps = traced(DPMSolverMultistepScheduler)
    live = tables._live(steps)
    assert [len(alive) for alive in live] == [1, 1, 0, 0]  # the last step is of first order
    assert tables.build(steps, seeded=False, guidance=1.0, wide=torch.float32, device=torch.device("cpu")).ring == 1


def test_a_ring_larger_than_the_slots() -> None:
    """Sixteen slots hold the sample, what is kept and what is returned."""
    value = SimpleNamespace(returned=({"x": 1.0, 0: 1.0},), draws=(), convert=(0.0, 0.0), clip=0.0, quantile=0.0, max_threshold=1.0)
    first = SimpleNamespace(**{**vars(value), "returned": ({"x": 1.0},), "kept": {k: {"m": float(k + 1)} for k in range(15)}})
    rest = [SimpleNamespace(**{**vars(value), "returned": ({"x": 1.0, k: 1.0},), "kept": {}}) for k in range(15)]
    with pytest.raises(NotLinear, match="15 tensors kept between steps"):
        tables.build(
            SimpleNamespace(steps=[first, *rest], initial={}),  # type: ignore[arg-type]
            seeded=False, guidance=1.0, wide=torch.float32, device=torch.device("cpu"),
        )  # fmt: skip
