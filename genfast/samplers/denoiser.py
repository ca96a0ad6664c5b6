"""What a network returns, as a prediction of the clean sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genfast.ops._checks import DTYPES, check_dtype, number
from genfast.schedules import Grid, NoiseSchedule, Point

Condition = Tensor | Mapping[str, Any] | None
Prediction = Literal["epsilon", "v", "x0", "flow", "edm"]
Variance = Literal["learned", "learned_range"]
Time = Literal["index", "sigma", "c_noise", "flow"] | Callable[[Point], float]

_PREDICTIONS = ("epsilon", "v", "x0", "flow", "edm")
_TIMES = ("index", "sigma", "c_noise", "flow")
_TIME_OF_KIND: dict[str, Time] = {"vp": "index", "flow": "flow", "ve": "c_noise"}


@dataclass(frozen=True)
class Denoiser:
    """A network together with the process it was trained on: calls ``net(c_in * x, t, **cond)`` and converts what it returns.

    ``net`` takes x (B, \\*sample), t (B,) float32 and the condition, and returns (B, \\*sample). A condition is a mapping (passed as
    keyword arguments), a tensor (passed third), or None.
    ``prediction`` says what it returns, with x = alpha x_0 + sigma n:
    "epsilon" n (Ho et al. 2020); "v" alpha n - sigma x_0 (Salimans and Ho 2022); "x0" the clean sample; "flow" n - x_0 (Liu et al.
    2023); "edm" the raw network F of Karras et al. 2022, equation 7, with the preconditioning of its table 1.
    ``time`` says what t is: "index" the process's own time, a (possibly fractional) index for a discrete process; "sigma" the
    noise level sigma / alpha; "c_noise" log(sigma / alpha) / 4 (Karras et al. 2022, table 1); "flow" sigma / (alpha + sigma); or a
    function of the `Point`. Default: "index" for variance preserving, "c_noise" for variance exploding, "flow" for flow processes.
    ``variance``: the network returns twice the channels (dimension 1), the second half of which says the variance of ancestral steps:
    "learned", its logarithm, or "learned_range", where between the two of `ddpm` it lies, -1 small and 1 large (Nichol and Dhariwal 2021,
    equation 15). Only ``ddpm(variance="learned")`` reads it; other solvers leave it out.
    ``sigma_data`` is the data's standard deviation ("edm" only). ``dtype`` is the network's input dtype; default: that of its
    first parameter in a dtype that networks compute in, float32, float64, bfloat16 or float16, else the state's.
    Raises ValueError where all of its floating point parameters are in dtypes for storage, such as float8: give ``dtype`` then.
    """

    net: Callable[..., Tensor]
    prediction: Prediction = "epsilon"
    noise: NoiseSchedule = field(kw_only=True)
    time: Time | None = None
    variance: Variance | None = field(default=None, kw_only=True)
    sigma_data: float = 0.5
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not callable(self.net) or isinstance(self.net, Denoiser):
            raise ValueError(f"net: got a {type(self.net).__name__}, supported: a network, called as net(x, t, **cond)")
        if self.dtype is not None:
            check_dtype("dtype", self.dtype)
        if self.prediction not in _PREDICTIONS:
            raise ValueError(f"prediction: got {self.prediction!r}, supported: {', '.join(_PREDICTIONS)}")
        if self.variance not in (None, "learned", "learned_range"):
            raise ValueError(f"variance: got {self.variance!r}, supported: None, learned, learned_range")
        if not isinstance(self.noise, NoiseSchedule):
            raise ValueError(f"noise: got {self.noise!r}, supported: a NoiseSchedule, for example genfast.schedules.cosine(1000)")
        if self.time is not None and not callable(self.time) and self.time not in _TIMES:
            raise ValueError(f"time: got {self.time!r}, supported: {', '.join(_TIMES)} or a function of a Point")
        if self.time == "index" and self.noise.kind != "vp":
            raise ValueError(f"time: got 'index' for the {self.noise.name!r} process, which has no index, supported: sigma, c_noise, flow")
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data: got {self.sigma_data}, supported: a number above 0")

    def convert(self, point: Point) -> tuple[float, float]:
        """(ax, am) of the denoised prediction d = ax * x + am * m at ``point``, where the network returned m."""
        _, alpha, sigma = point
        if self.prediction == "x0":
            return 0.0, 1.0
        if self.prediction == "v":
            return alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)
        if self.prediction == "flow":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
        if alpha == 0:
            raise ValueError(f"prediction: got {self.prediction!r} at alpha = 0 (zero terminal SNR), supported there: v, x0, flow")
        if self.prediction == "epsilon":
            return 1 / alpha, -sigma / alpha
        level, s = sigma / alpha, self.sigma_data
        return s**2 / (level**2 + s**2) / alpha, level * s / math.sqrt(level**2 + s**2)

    def c_in(self, point: Point) -> float:
        """The factor from the state to the network's input: 1, but for "edm" 1 / sqrt(sigma^2 + sigma_data^2) (and 1 / alpha)."""
        if self.prediction != "edm":
            return 1.0
        return 1 / math.sqrt(point.sigma**2 + (point.alpha * self.sigma_data) ** 2)

    def time_value(self, point: Point) -> float:
        """What the network is fed for its time at ``point``."""
        time = self.time or _TIME_OF_KIND[self.noise.kind]
        if callable(time):
            return float(time(point))
        if time == "index":
            return point.time
        if time == "flow":
            return point.sigma / (point.alpha + point.sigma)
        if point.alpha == 0:
            raise ValueError(f"time: got {time!r} at alpha = 0 (zero terminal SNR), supported there: index, flow")
        return point.sigma / point.alpha if time == "sigma" else math.log(point.sigma / point.alpha) / 4

    def input_dtype(self, state: torch.dtype) -> torch.dtype:
        """The dtype of the network's input, where the state has dtype ``state``."""
        if self.dtype is not None:
            return self.dtype
        storage = None
        for tensor in self.net.parameters() if isinstance(self.net, torch.nn.Module) else ():
            if tensor.dtype in DTYPES:
                return tensor.dtype
            storage = storage or (tensor.dtype if tensor.is_floating_point() else None)
        if storage is not None:
            got = f"a network that stores its parameters in {storage}"
            raise ValueError(f"dtype: got None for {got}, supported: Denoiser(dtype=...), the dtype that it computes in")
        return state

    @property
    def device(self) -> torch.device | None:
        """Where the network is: the device of its first parameter (else buffer) with memory; None where all are on "meta"."""
        device = torch.device("cpu")  # of a function, or of a network without any
        if isinstance(self.net, torch.nn.Module):
            for tensor in chain(self.net.parameters(), self.net.buffers()):
                device = tensor.device
                if device.type != "meta":
                    break
        return None if device.type == "meta" else device

    def error_growth(self, points: Grid) -> float:
        """What the largest step of ``points`` multiplies an error of the network by, in standard deviations of the state it leads to.

        An epsilon network's error e is one of sigma / alpha e in d. The step from r = sigma / alpha to r' makes (r - r') e of it in
        x / alpha, where the state has the standard deviation sqrt(1 + r'^2) for data of variance 1. The other predictions divide by
        nothing that vanishes: 0.
        """
        if self.prediction != "epsilon":
            return 0.0
        r, after = points.ratio[:-1], points.ratio[1:]
        with np.errstate(invalid="ignore"):
            return float(np.max((r - after) / np.sqrt(1 + after**2)))

    def evaluate(self, model_input: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """Call the network on an input already scaled by c_in; checks the shape of what it returns: the variance's channels included."""
        if cond is None:
            out = self.net(model_input, t)
        elif isinstance(cond, Tensor):
            out = self.net(model_input, t, cond)
        else:
            out = self.net(model_input, t, **cond)
        shape, what = tuple(model_input.shape), "the input's shape"
        if self.variance is not None:
            shape, what = (*shape[:1], 2 * shape[1], *shape[2:]), "twice the input's channels, shape"
        if not isinstance(out, Tensor) or out.shape != shape:
            got = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(f"net: returned {got}, supported: a tensor of {what} {shape}")
        if out.device != model_input.device:
            where = f"{model_input.device}, the input's device (a sampler's device= chooses another)"
            raise ValueError(f"net: returned a tensor on {out.device}, supported: {where}")
        if out.dtype not in DTYPES:
            raise ValueError(f"net: returned {out.dtype}, supported: {', '.join(map(str, DTYPES))}")
        return out

    def __call__(self, x: Tensor, sigma: float, cond: Condition = None) -> Tensor:
        """The denoised prediction for ``x`` (B, \\*sample) at one ``sigma`` (sigma / alpha; for flows t). Differentiable."""
        point = Point(*(float(v) for v in self.noise.at_sigmas(number("sigma", sigma))))
        t = torch.full((len(x),), self.time_value(point), device=x.device)
        m = self.evaluate((self.c_in(point) * x).to(self.input_dtype(x.dtype)), t, cond).to(x.dtype)
        m = m if self.variance is None else m.chunk(2, 1)[0]
        ax, am = self.convert(point)
        return ax * x + am * m
