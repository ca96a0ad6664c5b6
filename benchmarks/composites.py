"""What genfast is measured against: the stock schedulers of diffusers, and the same arithmetic as one torch.compile'd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., list[Tensor]]


def expression(coef: Tensor, index: Tensor, guided: bool) -> tuple[tuple[Any, ...], Step]:
    """One row as a plain torch function of tensors and 0-dim coefficients, written for the compiler: only present terms, no branches.

    Returns (structure, function); rows of equal structure share one compiled function. ``coef`` (40,), ``index`` (12,) as
    docs/solver-step.md lays them out. The function takes (x, cond, uncond, coefficients (40,), history list, noise or None).
    """
    c, i = coef.tolist(), index.tolist()
    outputs, history = i[1], i[2]
    terms = tuple(tuple(t for t in range(10) if c[8 + 10 * k + t] != 0) for k in range(outputs))
    has_ax, has_am, threshold = c[0] != 0, c[1] != 0, c[6] != 0
    structure = (outputs, history, terms, has_ax, has_am, guided, threshold)

    def step(x: Tensor, cond: Tensor, uncond: Tensor | None, s: Tensor, h: list[Tensor], noise: Tensor | None) -> list[Tensor]:
        m = uncond + s[2] * (cond - uncond) if uncond is not None else cond
        parts = ([s[0] * x] if has_ax else []) + ([s[1] * m] if has_am else [])
        d = parts[0] + parts[1] if len(parts) == 2 else parts[0]
        if threshold:
            bound = torch.quantile(d.abs().flatten(1), s[6], dim=1).clamp(min=1).minimum(s[7]).view(-1, *[1] * (d.dim() - 1))
            d = d.clamp(-bound, bound) / bound
        values: dict[int, Tensor] = {0: x, 1: d, 2: m, **{3 + j: v for j, v in enumerate(h)}}
        if noise is not None:
            values[9] = noise
        return [sum((s[8 + 10 * k + t] * values[t] for t in ts[1:]), s[8 + 10 * k + ts[0]] * values[ts[0]]) for k, ts in enumerate(terms)]

    return structure, step


class CompiledRun:
    """A whole run of rows through torch.compile'd expressions, history rotated by Python as a hand-written loop does."""

    def __init__(self, coef: Tensor, index: Tensor, slots: int, guided: bool, mode: str | None) -> None:
        self.slots, self.graphs = slots, mode == "reduce-overhead"
        self.rows: list[tuple[Step, Tensor, list[int], list[int], bool]] = []
        compiled: dict[tuple[Any, ...], Step] = {}
        for row in range(len(coef)):
            structure, step = expression(coef[row], index[row], guided)
            if structure not in compiled:
                compiled[structure] = torch.compile(step, fullgraph=True, dynamic=False, mode=mode)
            i = index[row].tolist()
            self.rows.append((compiled[structure], coef[row].clone(), i[3 : 3 + i[2]], i[9 : 9 + i[1]], 9 in structure[2][0]))

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        state: list[Tensor] = [x] * self.slots
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what a row returns is read by the next: one generation of graph memory a run
        for step, coefficients, reads, writes, draws in self.rows:
            # Drawn outside: torch's own generator fills a tensor far faster than the compiler's code does.
            noise = torch.randn_like(x) if draws else None
            for slot, value in zip(writes, step(state[0], cond, uncond, coefficients, [state[j] for j in reads], noise), strict=True):
                state[slot] = value
        return state[0]


class StockRun:
    """A whole run of a diffusers scheduler, guidance combined as its pipelines do, state reset as between two images."""

    def __init__(self, scheduler: Any, steps: int, guidance_scale: float) -> None:
        self.scheduler, self.guidance_scale = scheduler, guidance_scale
        scheduler.set_timesteps(steps)
        scheduler.is_scale_input_called = True  # the pipeline calls it; here it would only time a warning
        self.timesteps = list(scheduler.timesteps)
        self.fresh = {k: v for k, v in vars(scheduler).items() if k in ("lower_order_nums", "last_sample", "_step_index", "this_order")}

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor | None) -> Tensor:
        scheduler = self.scheduler
        vars(scheduler).update(self.fresh)
        for name in ("model_outputs", "timestep_list"):
            if hasattr(scheduler, name):
                setattr(scheduler, name, [None] * len(getattr(scheduler, name)))
        for t in self.timesteps:
            m = uncond + self.guidance_scale * (cond - uncond) if uncond is not None else cond
            x = scheduler.step(m, t, x, return_dict=False)[0]
        return x
