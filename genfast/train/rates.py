"""Learning rates over the steps of a run."""

from __future__ import annotations

import math
from typing import Protocol


class Rates(Protocol):
    """The fields of a trainer's options that decide its learning rates."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def lr_schedule(self) -> str: ...
    @property
    def warmup(self) -> int: ...


def learning_rate(options: Rates, step: int) -> float:
    """Of the optimizer in this step, 0 being the first: a linear warm-up, then half a cosine that ends at 0, or a constant."""
    if step < options.warmup:
        return options.lr * ((step + 1) / options.warmup)
    if options.lr_schedule == "constant":
        return options.lr
    return options.lr * (0.5 * (1 + math.cos(math.pi * (step - options.warmup) / max(1, options.steps - options.warmup))))
