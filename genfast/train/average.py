"""Moving averages of weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genfast.checks import Rule, above, check

WIDTH = Rule("a relative width above 0 and below 0.28", above(0, 0.28).accepts)


def power_gamma(sigma_rel: float) -> float:
    """The exponent of the power-function average whose profile has relative width ``sigma_rel``.

    Karras et al. 2024 ("Analyzing and Improving the Training Dynamics of Diffusion Models"), section 3.1: the average at step t
    weights the step s as s^gamma, and sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved here for gamma.
    """
    check({"ema": WIDTH}, {"ema": sigma_rel})
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_weight(step: int, gamma: float) -> float:
    """The share of the weights after optimizer step ``step`` (1 is the first) in the average, 1 - (1 - 1/step)^(gamma + 1).

    Karras et al. 2024, equation 7. The first step's is 1.
    """
    return 1 - float((1 - 1 / step) ** (gamma + 1))


@torch.no_grad()
def update(average: Iterable[Tensor], weights: Iterable[Tensor], step: int, gamma: float) -> None:
    """Fold the weights after optimizer step ``step`` into the average, in place: average = lerp(average, weights, `power_weight`)."""
    torch._foreach_lerp_(list(average), list(weights), power_weight(step, gamma))


class Average:
    """The power-function average of a network's parameters and buffers, as a network of its own: ``net``, in eval mode.

    ``width`` is the relative width of the profile (`power_gamma`). Integers, such as the count of a batch norm, are copied.
    """

    def __init__(self, net: nn.Module, width: float) -> None:
        self.net: Any = copy.deepcopy(net).eval().requires_grad_(False)
        self.gamma = power_gamma(width)

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """Fold in the weights of ``net`` after optimizer step ``step`` (1 is the first)."""
        pairs = [*zip(self.net.state_dict().values(), net.state_dict().values(), strict=True)]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        update([a for a, _ in floats], [b for _, b in floats], step, self.gamma)
        for a, b in pairs:
            if not a.is_floating_point():
                a.copy_(b)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.net.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.net.load_state_dict(state)
