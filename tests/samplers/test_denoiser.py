"""Denoiser: every prediction converts back to the clean sample, every time is what the convention says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genfast import schedules
from genfast.samplers import Denoiser
from genfast.schedules import Point

PROCESSES = [schedules.cosine(1000), schedules.edm(), schedules.flow()]


def points(noise: schedules.NoiseSchedule) -> list[Point]:
    return [Point(*(float(v) for v in noise.at_sigmas(s))) for s in (0.05, 0.4, 0.9)]


@pytest.mark.parametrize("noise", PROCESSES, ids=lambda n: n.kind)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "flow"])
def test_conversion_recovers_the_clean_sample(prediction: str, noise: schedules.NoiseSchedule) -> None:
    rng = np.random.default_rng(0)
    x0, n = rng.standard_normal((2, 5))
    den = Denoiser(lambda x, t: x, prediction, noise=noise)
    for point in points(noise):
        _, alpha, sigma = point
        m = {"epsilon": n, "v": alpha * n - sigma * x0, "x0": x0, "flow": n - x0}[prediction]
        ax, am = den.convert(point)
        np.testing.assert_allclose(ax * (alpha * x0 + sigma * n) + am * m, x0, rtol=1e-12, atol=1e-12)
        assert den.c_in(point) == 1


@pytest.mark.parametrize("noise", PROCESSES, ids=lambda n: n.kind)
def test_edm_is_table_1_of_karras(noise: schedules.NoiseSchedule) -> None:
    den = Denoiser(lambda x, t: x, "edm", noise=noise, time="c_noise", sigma_data=0.7)
    for point in points(noise):
        level, s = point.sigma / point.alpha, 0.7
        ax, am = den.convert(point)
        assert ax * point.alpha == pytest.approx(s**2 / (level**2 + s**2), rel=1e-12)
        assert am == pytest.approx(level * s / math.sqrt(s**2 + level**2), rel=1e-12)
        assert den.c_in(point) * point.alpha == pytest.approx(1 / math.sqrt(s**2 + level**2), rel=1e-12)
        assert den.time_value(point) == pytest.approx(math.log(level) / 4, rel=1e-12)


def test_times() -> None:
    vp, point = schedules.linear(), Point(250.0, 0.6, 0.8)

    def value(**options: object) -> float:
        return Denoiser(lambda x, t: x, "v", noise=vp, **options).time_value(point)

    assert value() == value(time="index") == 250
    assert value(time="sigma") == pytest.approx(4 / 3)
    assert value(time="flow") == pytest.approx(4 / 7)
    assert value(time=lambda p: 2 * p.time) == 500
    assert Denoiser(lambda x, t: x, "flow", noise=schedules.flow()).time_value(Point(0.3, 0.7, 0.3)) == 0.3
    assert Denoiser(lambda x, t: x, "edm", noise=schedules.edm()).time_value(Point(2.0, 1.0, 2.0)) == pytest.approx(math.log(2) / 4)


@pytest.mark.parametrize("prediction", ["epsilon", "edm"])
def test_alpha_zero_is_refused_where_it_is_divided_by(prediction: str) -> None:
    den = Denoiser(lambda x, t: x, prediction, noise=schedules.zero_terminal_snr(schedules.linear()))
    with pytest.raises(ValueError, match=f"prediction: got '{prediction}' at alpha = 0.*supported there: v, x0, flow"):
        den.convert(Point(999.0, 0.0, 1.0))


def test_direct_use_returns_the_denoised_prediction() -> None:
    x0, n = torch.randn(2, 3, 4, dtype=torch.float64)
    noise = schedules.edm()
    seen = {}

    def net(x: torch.Tensor, t: torch.Tensor, *, y: int) -> torch.Tensor:
        seen.update(x=x, t=t, y=y)
        return n

    den = Denoiser(net, "epsilon", noise=noise, time="sigma")
    torch.testing.assert_close(den(x0 + 2.5 * n, 2.5, {"y": 3}), x0)
    assert seen["t"].tolist() == [2.5] * 3 and seen["t"].dtype == torch.float32 and seen["y"] == 3


def test_input_dtype_is_the_networks() -> None:
    noise = schedules.edm()
    assert Denoiser(torch.nn.Linear(2, 2).bfloat16(), noise=noise).input_dtype(torch.float32) == torch.bfloat16
    assert Denoiser(torch.nn.Identity(), noise=noise).input_dtype(torch.float64) == torch.float64
    assert Denoiser(lambda x, t: x, noise=noise, dtype=torch.float16).input_dtype(torch.float32) == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "eps"}, "prediction: got 'eps', supported: epsilon, v, x0, flow, edm"),
        ({"noise": None}, "noise: got None, supported: a NoiseSchedule"),
        ({"time": "step"}, "time: got 'step', supported: index, sigma, c_noise, flow"),
        ({"time": "index", "noise": schedules.edm()}, "time: got 'index' for the 'edm' process"),
        ({"sigma_data": 0.0}, "sigma_data: got 0.0, supported: a number above 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoiser(lambda x, t: x, **{"noise": schedules.linear(), **arguments})
