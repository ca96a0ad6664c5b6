"""A problem with a known solution (Gaussian data), and an interpreter of plans in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from genfast import schedules
from genfast.samplers import Plan
from genfast.schedules import Array, Grid, NoiseSchedule, Point

MEAN, STD = 0.7, 0.6

PROCESSES: dict[str, NoiseSchedule] = {"vp": schedules.linear(), "ve": schedules.edm(), "flow": schedules.flow()}


def denoise(x: Array, point: Point, mean: float = MEAN, std: float = STD) -> Array:
    """E[x_0 | x] for data N(mean, std^2)."""
    _, alpha, sigma = point
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)


def exact(x: Array, p: Point, q: Point) -> Array:
    """Where the probability flow ODE takes x from p to q: the quantile of the marginal is kept."""
    spread = [np.sqrt(point.alpha**2 * STD**2 + point.sigma**2) for point in (p, q)]
    return q.alpha * MEAN + (x - p.alpha * MEAN) * spread[1] / spread[0]


Model = Callable[[Array, Point], Array]


def execute(plan: Plan, model: Model, x: Array, noise: Mapping[int, Array] | None = None, unconditional: Model | None = None) -> Array:
    """Run a plan from the state ``x``; ``noise`` maps draw numbers to noise. Without ``unconditional`` the model is that too."""
    slots = {0: x}
    for row in plan.rows:
        values = {**slots, "x": slots[0], "d": model(slots[0], row.point), "u": (unconditional or model)(slots[0], row.point)}
        if row.draw:
            assert noise is not None
            values["noise"] = noise[row.draw]
        slots |= {slot: sum(c * values[key] for key, c in terms.items()) + np.zeros_like(x) for slot, terms in row.outputs.items()}
    return slots[0]


def through_ratios(noise: NoiseSchedule, ratios: Array) -> Grid:
    """The grid through the given sigma / alpha."""
    return schedules.grid(noise, sigmas=ratios / (1 + ratios) if noise.kind == "flow" else ratios)
