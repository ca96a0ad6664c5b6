"""Noise processes and sigma grids, in float64 numpy.

A noise process says how a clean sample becomes a noisy one, ``x_t = alpha(t) * x_0 + sigma(t) * n``.
It is a property of the trained network. A grid says which points of it a solver visits; it is the
user's choice. Nothing here touches torch.

"sigmas" given or reported to a user are ``sigma / alpha`` for variance preserving and exploding processes (the noise level
of Karras et al. 2022) and ``t`` for flow processes (the sigma of Esser et al. 2024), where sigma / alpha is infinite at t = 1.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Point(NamedTuple):
    """One point of a noise process: its time, and ``x = alpha * x_0 + sigma * n`` there."""

    time: float
    alpha: float
    sigma: float


def unknown_name(argument: str, got: object, names: Iterable[str]) -> ValueError:
    """The error for a name that is not one of ``names``; it offers the nearest ones."""
    names = sorted(names)
    near = difflib.get_close_matches(str(got), names, n=3, cutoff=0.5)
    meant = f" (did you mean {' or '.join(near)}?)" if near else ""
    return ValueError(f"{argument}: got {got!r}{meant}, supported: {', '.join(names)}")


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise process: ``x_t = alpha(t) * x_0 + sigma(t) * n``.

    ``kind`` is "vp" (variance preserving with ``steps`` discrete times 0 .. steps-1, tables given),
    "flow" (rectified flow: alpha = 1 - t, sigma = t, t in [0, 1]) or "ve" (alpha = 1, sigma = t).
    """

    name: str
    kind: Literal["vp", "flow", "ve"]
    alphas_cumprod: Array | None = field(default=None, repr=False)  # (steps,) for "vp", strictly decreasing
    sigma_min: float = 0.002  # "ve" only: the smallest and largest sigma of the default grid
    sigma_max: float = 80.0
    shift: float = 1.0  # "flow" only: t -> shift * t / (1 + (shift - 1) * t)

    @property
    def steps(self) -> int:
        """Number of discrete training times; 0 for a continuous process."""
        return 0 if self.alphas_cumprod is None else len(self.alphas_cumprod)

    def alpha_sigma(self, t: ArrayLike) -> tuple[Array, Array]:
        """alpha and sigma at times ``t`` (any shape). For "vp", fractional times interpolate log(sigma/alpha)."""
        t = np.asarray(t, np.float64)
        if self.kind == "ve":
            return np.ones_like(t), t.copy()
        if self.kind == "flow":
            return 1 - t, t.copy()
        whole = np.clip(np.rint(t).astype(np.int64), 0, self.steps - 1)
        assert self.alphas_cumprod is not None
        exact = t == whole  # a whole time reads its table entry, without a round trip through log and exp
        with np.errstate(invalid="ignore"):  # interp meets inf - inf where the last ratio is infinite; `exact` covers that entry
            ratio = np.exp(np.interp(t, np.arange(self.steps), np.log(self.sigma_ratios)))
        alpha, sigma = self.at_ratio(ratio)
        return np.where(exact, np.sqrt(self.alphas_cumprod[whole]), alpha), np.where(exact, np.sqrt(1 - self.alphas_cumprod[whole]), sigma)

    def at_ratio(self, ratio: ArrayLike) -> tuple[Array, Array]:
        """alpha and sigma where sigma / alpha is ``ratio`` (any shape, 0 and inf included except for "ve")."""
        ratio = np.asarray(ratio, np.float64)
        if self.kind == "ve":
            return np.ones_like(ratio), ratio.copy()
        with np.errstate(divide="ignore", over="ignore"):
            if self.kind == "flow":
                return 1 / (1 + ratio), 1 / (1 + 1 / ratio)
            return 1 / np.sqrt(1 + ratio**2), 1 / np.sqrt(1 + 1 / ratio**2)

    def at_sigmas(self, sigmas: ArrayLike) -> tuple[Array, Array, Array]:
        """Time, alpha and sigma at ``sigmas`` as users name them: sigma / alpha, for "flow" t. Times clamp to the process's range."""
        sigmas = np.asarray(sigmas, np.float64)
        if self.kind == "flow":
            return sigmas.copy(), 1 - sigmas, sigmas.copy()
        return self.time_of(sigmas), *self.at_ratio(sigmas)

    def sigma_of(self, point: Point) -> float:
        """The sigma of a point as users name it: sigma / alpha, for "flow" t; infinite where a "vp" process has alpha = 0."""
        if self.kind == "flow":
            return point.sigma / (point.alpha + point.sigma)
        return point.sigma / point.alpha if point.alpha else float("inf")

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Smallest and largest sigma, as users name it, of the default grids."""
        if self.kind == "vp":
            return float(self.sigma_ratios[0]), float(self.sigma_ratios[-1])
        return (0.001, 1.0) if self.kind == "flow" else (self.sigma_min, self.sigma_max)

    @property
    def sigma_ratios(self) -> Array:
        """sigma / alpha of every discrete time, (steps,), increasing ("vp" only)."""
        assert self.alphas_cumprod is not None
        with np.errstate(divide="ignore"):
            return np.sqrt((1 - self.alphas_cumprod) / self.alphas_cumprod)

    def up_to(self, ratio: float) -> NoiseSchedule:
        """The same "vp" process without the discrete times whose sigma / alpha is above ``ratio``; all of it where none is left."""
        if self.alphas_cumprod is None:
            raise ValueError(f"noise: got kind {self.kind!r}, supported: 'vp'")
        count = int((self.sigma_ratios <= ratio).sum())
        return replace(self, alphas_cumprod=self.alphas_cumprod[:count]) if count else self

    def time_of(self, ratio: ArrayLike) -> Array:
        """The time whose sigma / alpha is ``ratio``: the inverse of `alpha_sigma`, clamped to the process's range."""
        ratio = np.asarray(ratio, np.float64)
        if self.kind == "ve":
            return ratio.copy()
        if self.kind == "flow":
            return np.where(np.isinf(ratio), 1.0, ratio / (1 + np.where(np.isinf(ratio), 0.0, ratio)))
        with np.errstate(divide="ignore"):
            return np.asarray(np.interp(np.log(ratio), np.log(self.sigma_ratios), np.arange(self.steps, dtype=np.float64)), np.float64)

    def training_time(self, u: ArrayLike) -> Array:
        """Map uniform draws ``u`` in [0, 1) to training times: whole indices for "vp", shifted t for "flow"."""
        u = np.asarray(u, np.float64)
        if self.kind == "vp":
            return np.asarray(np.floor(u * self.steps), np.float64)
        if self.kind == "flow":
            return self.shift * u / (1 + (self.shift - 1) * u)
        return np.asarray(np.exp(np.log(self.sigma_min) + u * (np.log(self.sigma_max) - np.log(self.sigma_min))), np.float64)


def _vp(name: str, betas: Array) -> NoiseSchedule:
    return NoiseSchedule(name, "vp", alphas_cumprod=np.cumprod(1 - betas, dtype=np.float64))


def linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """DDPM's schedule: betas evenly spaced (Ho et al. 2020, section 4)."""
    return _vp("linear", np.linspace(beta_start, beta_end, steps))


def scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Latent diffusion's schedule: square roots of the betas evenly spaced (Rombach et al. 2022)."""
    return _vp("scaled_linear", np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2)


def cosine(steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """Improved DDPM's cosine schedule (Nichol and Dhariwal 2021, equation 17)."""
    t = np.arange(steps + 1) / steps
    f = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2
    return _vp("cosine", np.minimum(1 - f[1:] / f[:-1], max_beta))


def sigmoid(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """GeoDiff's schedule: betas along a sigmoid from -6 to 6 (Xu et al. 2022, as in diffusers)."""
    return _vp("sigmoid", beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, steps))))


def laplace(steps: int = 1000, mu: float = 0.0, b: float = 0.5, max_beta: float = 0.999) -> NoiseSchedule:
    """log SNR along the quantiles of Laplace's distribution (Hang et al. 2024), which diffusers takes for that of alpha-bar squared."""
    t = np.arange(steps + 1) / steps
    log_snr = mu - b * np.copysign(1.0, 0.5 - t) * np.log(1 - 2 * np.abs(0.5 - t) + 1e-6)
    f = np.sqrt(1 / (1 + np.exp(-log_snr)))
    return _vp("laplace", np.minimum(1 - f[1:] / f[:-1], max_beta))


def from_betas(betas: ArrayLike) -> NoiseSchedule:
    """A schedule from given betas, each in (0, 1)."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas: got shape {betas.shape}, supported: a 1-D list of numbers in (0, 1)")
    return _vp("betas", betas)


def flow(shift: float = 1.0) -> NoiseSchedule:
    """Rectified flow: x_t = (1 - t) x_0 + t n (Liu et al. 2023); ``shift`` as in Esser et al. 2024, equation 23."""
    if not shift > 0:
        raise ValueError(f"shift: got {shift}, supported: a number above 0")
    return NoiseSchedule("flow", "flow", shift=shift)


def dynamic_shift(
    tokens: int, *, base_tokens: int = 256, max_tokens: int = 4096, base_shift: float = 0.5, max_shift: float = 1.15
) -> float:
    """The ``shift`` of a flow for images of this many tokens: exp(mu), mu linear in their number (Black Forest Labs, FLUX.1)."""
    mu = base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(np.exp(mu))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
    """Variance exploding, alpha = 1 (Karras et al. 2022, table 1)."""
    return NoiseSchedule("edm", "ve", sigma_min=sigma_min, sigma_max=sigma_max)


def zero_terminal_snr(noise: NoiseSchedule) -> NoiseSchedule:
    """The same "vp" process, shifted and scaled so that its last alpha is 0 (Lin et al. 2024, algorithm 1)."""
    if noise.kind != "vp" or noise.alphas_cumprod is None:
        raise ValueError(f"noise: got kind {noise.kind!r}, supported: 'vp'")
    alpha = np.sqrt(noise.alphas_cumprod)
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return NoiseSchedule(f"{noise.name}_zero_snr", "vp", alphas_cumprod=alpha**2)


@dataclass(frozen=True)
class Grid:
    """The points a solver visits, from noise to data: N + 1 of them for N steps; the last is where the sample is taken, usually sigma 0."""

    noise: NoiseSchedule
    time: Array  # (N + 1,)
    alpha: Array  # (N + 1,)
    sigma: Array  # (N + 1,)

    def __post_init__(self) -> None:
        with np.errstate(divide="ignore"):
            ratio = self.sigma / self.alpha
        if len(ratio) < 2 or np.isnan(ratio).any() or not (np.diff(ratio) < 0).all() or not ratio[-1] >= 0:
            shown = np.array2string(ratio, precision=4, threshold=8)
            raise ValueError(f"sigmas: got sigma / alpha of {shown}, supported: at least two, strictly decreasing, none below 0")

    @property
    def steps(self) -> int:
        return len(self.sigma) - 1

    @property
    def ratio(self) -> Array:
        """sigma / alpha, (N + 1,), decreasing; inf where alpha = 0."""
        with np.errstate(divide="ignore"):
            return self.sigma / self.alpha

    @property
    def log_snr(self) -> Array:
        """lambda = log(alpha / sigma) (Lu et al. 2022), (N + 1,), increasing; -inf where alpha = 0, inf where sigma = 0."""
        with np.errstate(divide="ignore"):
            return -np.log(self.ratio)

    def point(self, i: int) -> Point:
        return Point(float(self.time[i]), float(self.alpha[i]), float(self.sigma[i]))

    def at(self, ratio: float) -> Point:
        """The point of the process whose sigma / alpha is ``ratio``, on the grid or not."""
        alpha, sigma = self.noise.at_ratio(ratio)
        return Point(float(self.noise.time_of(ratio)), float(alpha), float(sigma))


def _through_sigmas(noise: NoiseSchedule, sigmas: Array) -> Grid:
    return Grid(noise, *noise.at_sigmas(sigmas))


def _through_times(noise: NoiseSchedule, times: Array) -> Grid:
    """Evaluate at ``times``, then arrive at sigma 0."""
    alpha, sigma = noise.alpha_sigma(times)
    return Grid(noise, np.append(times, 0.0), np.append(alpha, 1.0), np.append(sigma, 0.0))


def _sigma_range(noise: NoiseSchedule, name: str, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    low, high = noise.sigma_range
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    if not 0 < low < high < float("inf"):
        raise ValueError(f"sigmas: got {name!r} from sigma_max {high:g} to sigma_min {low:g}, supported: 0 < sigma_min < sigma_max < inf")
    return low, high


def karras(noise: NoiseSchedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 7.0) -> Grid:
    """sigma^(1/rho) evenly spaced, then 0 (Karras et al. 2022, equation 5). The range defaults to the process's own."""
    low, high = _sigma_range(noise, "karras", sigma_min, sigma_max)
    ramp = np.linspace(0, 1, steps)
    return _through_sigmas(noise, np.append((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho, 0.0))


def exponential(noise: NoiseSchedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None) -> Grid:
    """log(sigma) evenly spaced, then 0. The range defaults to the process's own."""
    low, high = _sigma_range(noise, "exponential", sigma_min, sigma_max)
    return _through_sigmas(noise, np.append(np.exp(np.linspace(np.log(high), np.log(low), steps)), 0.0))


def polyexponential(
    noise: NoiseSchedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 1.0
) -> Grid:
    """log(sigma) along a ramp to the power rho, then 0 (k-diffusion); rho = 1 is `exponential`."""
    low, high = _sigma_range(noise, "polyexponential", sigma_min, sigma_max)
    ramp = np.linspace(1, 0, steps) ** rho
    return _through_sigmas(noise, np.append(np.exp(np.log(low) + ramp * (np.log(high) - np.log(low))), 0.0))


def kl_optimal(noise: NoiseSchedule, steps: int, *, sigma_min: float | None = None, sigma_max: float | None = None) -> Grid:
    """arctan(sigma) evenly spaced, then 0 (Sabour et al. 2024, the closed form for Gaussian data)."""
    low, high = _sigma_range(noise, "kl_optimal", sigma_min, sigma_max)
    return _through_sigmas(noise, np.append(np.tan(np.linspace(np.arctan(high), np.arctan(low), steps)), 0.0))


def linear_quadratic(noise: NoiseSchedule, steps: int, *, threshold: float = 0.025, linear_steps: int | None = None) -> Grid:
    """Half of the steps in the first ``threshold`` of the way, the rest quadratic (Genmo, Mochi 1).

    Meant for flows; elsewhere the same fractions of the process's largest sigma, as in ComfyUI. ``linear_steps`` defaults to steps // 2.
    """
    _, high = _sigma_range(noise, "linear_quadratic", None, None)
    n = steps // 2 if linear_steps is None else linear_steps
    if not (0 < n < steps or steps == 1) or not 0 < threshold < 1:
        raise ValueError(f"linear_steps: got {n} of {steps} with threshold {threshold:g}, supported: 1 to steps - 1, threshold in (0, 1)")
    if steps == 1:
        return _through_sigmas(noise, np.array([high, 0.0]))
    # A parabola that continues the line with its slope and reaches 1 after all steps
    slope, rest = threshold / n, steps - n
    k = np.arange(rest + 1)
    curve = threshold + slope * k + (1 - threshold - slope * rest) * (k / rest) ** 2
    return _through_sigmas(noise, high * (1 - np.append(slope * np.arange(n), curve)))


_AYS = {
    "ays_sd1": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "ays_sdxl": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    "ays_svd": [700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}


def _align_your_steps(noise: NoiseSchedule, steps: int, name: str) -> Grid:
    """Through a published table of 10 steps, log-linearly interpolated to others; the last sigma becomes 0."""
    if noise.kind == "flow":
        raise ValueError(f"sigmas: got {name!r} for the {noise.name!r} process, supported: variance preserving and exploding processes")
    table = np.log(_AYS[name])
    sigmas = np.exp(np.interp(np.linspace(0, len(table) - 1, steps + 1), np.arange(len(table)), table))
    return _through_sigmas(noise, np.append(sigmas[:-1], 0.0))


def ays_sd1(noise: NoiseSchedule, steps: int) -> Grid:
    """Align Your Steps for Stable Diffusion 1.5 (Sabour et al. 2024, published table)."""
    return _align_your_steps(noise, steps, "ays_sd1")


def ays_sdxl(noise: NoiseSchedule, steps: int) -> Grid:
    """Align Your Steps for Stable Diffusion XL (Sabour et al. 2024, published table)."""
    return _align_your_steps(noise, steps, "ays_sdxl")


def ays_svd(noise: NoiseSchedule, steps: int) -> Grid:
    """Align Your Steps for Stable Video Diffusion (Sabour et al. 2024, published table)."""
    return _align_your_steps(noise, steps, "ays_svd")


def _through_spaced(
    noise: NoiseSchedule,
    steps: int,
    name: str,
    vp: Callable[[int], Array],
    flow: Array | None,
    shift: float | None = None,
    terminal: float | None = None,
) -> Grid:
    """A grid evenly spaced in time: whole times from ``vp``, which takes their number, or unit times ``flow``, which are shifted."""
    if noise.kind == "ve" or (noise.kind == "flow" and flow is None):
        others = ", ".join(sorted({"exponential", "karras", "kl_optimal"} | ({"linspace", "trailing"} if noise.kind == "flow" else set())))
        raise ValueError(f"sigmas: got {name!r} for the {noise.name!r} process, supported there: {others} or a list of sigmas")
    if noise.kind == "flow":
        assert flow is not None
        shift = noise.shift if shift is None else shift
        times = shift * flow / (1 + (shift - 1) * flow)
        if terminal is not None and steps > 1:
            times = 1 - (1 - times) * ((1 - terminal) / (1 - times[-1]))
        return _through_times(noise, times)
    if terminal is not None:
        raise ValueError(f"terminal: got {terminal} for the {noise.name!r} process, supported: None, or a flow process")
    if steps > noise.steps:
        raise ValueError(f"steps: got {steps}, supported with sigmas={name!r}: at most the process's {noise.steps} times")
    return _through_times(noise, vp(noise.steps))


def trailing(noise: NoiseSchedule, steps: int, *, shift: float | None = None, terminal: float | None = None) -> Grid:
    """Times evenly spaced from the last one down (Lin et al. 2024, table 2); for flow t = 1, 1 - 1/steps, ..., shifted.

    ``shift`` (flow only) replaces the process's own; ``terminal`` (flow only) stretches the times so that the last evaluation lies
    there (Lightricks, LTX-Video).
    """
    _check_terminal(terminal)
    remaining = np.arange(steps, 0, -1, dtype=np.float64)
    return _through_spaced(noise, steps, "trailing", lambda n: np.rint(remaining * (n / steps)) - 1, remaining / steps, shift, terminal)


def _check_terminal(terminal: float | None) -> None:
    if terminal is not None and not 0 < terminal < 1:
        raise ValueError(f"terminal: got {terminal}, supported: None or a time in (0, 1)")


def leading(noise: NoiseSchedule, steps: int, *, offset: int = 0) -> Grid:
    """Times 0, c, 2c, ... with c = floor(T / steps), plus ``offset``, from the last down (Lin et al. 2024, table 2). "vp" only."""
    return _through_spaced(noise, steps, "leading", lambda n: np.arange(steps, dtype=np.float64)[::-1] * (n // steps) + offset, None)


def ddim_uniform(noise: NoiseSchedule, steps: int) -> Grid:
    """`leading` with offset 1, as in latent diffusion's DDIM and ComfyUI's "ddim_uniform". "vp" only."""
    return _through_spaced(noise, steps, "ddim_uniform", lambda n: np.arange(steps, dtype=np.float64)[::-1] * (n // steps) + 1, None)


def linspace(noise: NoiseSchedule, steps: int, *, shift: float | None = None, terminal: float | None = None) -> Grid:
    """Times from the last to the first, both included (Lin et al. 2024, table 2); for flow from t = 1 to 0.001, shifted.

    ``shift`` and ``terminal`` as in `trailing`.
    """
    _check_terminal(terminal)
    unit = np.linspace(1, 0.001, steps, dtype=np.float64)
    return _through_spaced(noise, steps, "linspace", lambda n: np.rint(np.linspace(n - 1, 0, steps)), unit, shift, terminal)


def sgm_uniform(noise: NoiseSchedule, steps: int, *, shift: float | None = None) -> Grid:
    """Like `linspace` with one more time, the last of which is left out (Stability AI's generative-models); times may be fractional."""
    unit = np.linspace(1, 0.001, steps + 1, dtype=np.float64)[:-1]
    return _through_spaced(noise, steps, "sgm_uniform", lambda n: np.linspace(n - 1, 0, steps + 1)[:-1], unit, shift)


def _beta_quantile(q: Array, a: float, b: float) -> Array:
    """Quantiles of the Beta(a, b) distribution: its series (Abramowitz and Stegun, 26.5.4 expanded), bisected."""

    def lower(x: Array, a: float, b: float) -> Array:
        """The integral of t^(a-1) (1-t)^(b-1) to x <= 1/2, by expanding (1-t)^(b-1)."""
        total, term = np.zeros_like(x), np.ones_like(x)
        for n in range(64):
            total, term = total + term / (a + n), term * x * (n + 1 - b) / (n + 1)
        return np.asarray(x**a * total)

    half = np.array(0.5)
    whole = lower(half, a, b) + lower(half, b, a)
    low, high = np.zeros_like(q), np.ones_like(q)
    for _ in range(64):
        x = (low + high) / 2
        below = np.where(x <= 0.5, lower(np.minimum(x, 0.5), a, b), whole - lower(np.minimum(1 - x, 0.5), b, a)) < q * whole
        low, high = np.where(below, x, low), np.where(below, high, x)
    return np.where(q >= 1, 1.0, (low + high) / 2)


def beta(noise: NoiseSchedule, steps: int, *, a: float = 0.6, b: float = 0.6, shift: float | None = None) -> Grid:
    """Times at quantiles of a Beta(a, b) distribution, denser at both ends (Lee et al. 2024, "Beta sampling is all you need").

    The quantiles are 1, 1 - 1/steps, ..., 1/steps, as in ComfyUI, whose whole times these are before rounding.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"a, b: got {a} and {b}, supported: numbers above 0")
    unit = _beta_quantile(np.arange(steps, 0, -1) / steps, a, b)
    return _through_spaced(noise, steps, "beta", lambda n: unit * (n - 1), unit, shift)


_GRIDS = (
    karras,
    exponential,
    polyexponential,
    kl_optimal,
    linear_quadratic,
    trailing,
    leading,
    linspace,
    ddim_uniform,
    sgm_uniform,
    beta,
    ays_sd1,
    ays_sdxl,
    ays_svd,
)
# DPM-Solver's grid, even in log SNR (Lu et al. 2022), is the exponential one; diffusers calls it "lu".
GRIDS: dict[str, Callable[..., Grid]] = {**{f.__name__: f for f in _GRIDS}, "lu": exponential}
Sigmas = str | Sequence[float] | Array | Callable[[NoiseSchedule, int], Grid] | None


def grid(
    noise: NoiseSchedule, steps: int | None = None, *, sigmas: Sigmas = None, timesteps: Sequence[float] | Array | None = None
) -> Grid:
    """The grid a user asked for.

    ``sigmas`` is a name in `GRIDS`, a function ``(noise, steps) -> Grid`` such as ``functools.partial(karras, rho=5)``, or the
    whole list of sigmas from the first evaluation to where the sample is taken (usually 0). ``timesteps`` is the list of times at
    which the network is evaluated; sigma 0 follows. Default: "karras" for variance exploding processes, "trailing" for others.
    Raises ValueError for bad steps, unknown names, both lists, lists that are not strictly decreasing or leave the process.
    """
    if sigmas is not None and timesteps is not None:
        raise ValueError("timesteps: got a list together with sigmas, supported: one of the two")
    if sigmas is None:
        sigmas = "karras" if noise.kind == "ve" else "trailing"
    if timesteps is not None or not (isinstance(sigmas, str) or callable(sigmas)):
        name, given = ("sigmas", sigmas) if timesteps is None else ("timesteps", timesteps)
        values = np.asarray(given, np.float64)
        if values.ndim != 1 or len(values) < (2 if timesteps is None else 1) or not np.isfinite(values).all():
            raise ValueError(f"{name}: got an array of shape {values.shape}, supported: a list of finite numbers")
        if not (np.diff(values) < 0).all():
            raise ValueError(f"{name}: got {np.array2string(values, precision=4, threshold=8)}, supported: strictly decreasing numbers")
        count = len(values) - (timesteps is None)
        if steps is not None and steps != count:
            raise ValueError(f"steps: got {steps} with {name} for {count}, supported: leave steps out, or {count}")
        low, high = {"vp": (0, noise.steps - 1), "flow": (0, 1), "ve": (0, np.inf)}[noise.kind]
        if (timesteps is not None or noise.kind == "flow") and (values[-1] < low or values[0] > high):
            raise ValueError(f"{name}: got {values[-1]:g} to {values[0]:g}, supported by {noise.name!r}: {low:g} to {high:g}")
        return _through_sigmas(noise, values) if timesteps is None else _through_times(noise, values)
    if isinstance(sigmas, str) and sigmas not in GRIDS:
        raise unknown_name("sigmas", sigmas, GRIDS)
    try:
        count = operator.index(steps)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1 or isinstance(steps, bool):
        raise ValueError(f"steps: got {steps}, supported: an integer of at least 1")
    return (GRIDS[sigmas] if isinstance(sigmas, str) else sigmas)(noise, count)
