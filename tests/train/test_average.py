from __future__ import annotations

import math

import pytest
import torch

from genfast.train import average as averages


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.15])
def test_profile_has_the_stated_width(sigma_rel: float) -> None:
    """Averaging t and t^2 over 4000 steps gives the mean and the variance of the profile that weights the steps."""
    gamma, steps = averages.power_gamma(sigma_rel), 4000
    first, second = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step in range(1, steps + 1):
        t = torch.tensor(step / steps, dtype=torch.float64)
        averages.update([first, second], [t, t * t], step, gamma)
    assert math.sqrt(second - first**2) == pytest.approx(sigma_rel, rel=1e-3)
    assert first.item() == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_first_step_copies_whatever_was_there() -> None:
    average, weights = torch.full((3,), 7.0), torch.tensor([1.0, -2.0, 3.0])
    averages.update([average], [weights], 1, averages.power_gamma(0.1))
    assert torch.equal(average, weights)


def test_bad_width_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"ema: got 0.5, supported: a relative width above 0 and below 0.28"):
        averages.power_gamma(0.5)
