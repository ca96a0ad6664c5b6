"""k-diffusion's samplers and sigma functions, with every update of the state in one kernel launch.

Names, signatures, callbacks and the use of torch's random numbers are those of Katherine Crowson's ``k_diffusion.sampling``, so
that one changed import keeps the pictures. What differs is listed in docs/k-diffusion.md.

Common to all ``sample_*``: ``model(x, sigma, **extra_args)`` returns the denoised x; ``x`` (B, \\*sample), float32, float64, bfloat16 or
float16, already scaled to ``sigmas[0]``; ``sigmas`` (N + 1,) strictly decreasing, its last entry (usually 0) is where the sample is taken;
``callback`` gets a dict with x, i, sigma, sigma_hat and denoised once a step; ``disable`` is tqdm's; ``noise_sampler(sigma, sigma_next)``
returns standard normal noise shaped like x. They run without gradients and return a new tensor of x's shape and dtype, or x itself where
``sigmas`` has a single entry. They raise ValueError for other dtypes, for other sigmas and for a model output that does not fit x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import trange

from genfast.ops import pack_row, solver_step
from genfast.ops._checks import check_dtype, refusal
from genfast.samplers import SOLVERS, Row, make_plan
from genfast.schedules import Grid, edm

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]
ExtraArgs = Mapping[str, Any] | None
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
# For every evaluation of one step, whether noise is drawn after it.
Draws = tuple[bool, ...]


# Sigmas


def append_zero(x: Tensor) -> Tensor:
    """``x`` (N,) with a zero behind it, (N + 1,)."""
    return torch.cat([x, x.new_zeros([1])])


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu") -> Tensor:
    """sigma^(1/rho) evenly spaced, then 0: (n + 1,) (Karras et al. 2022, equation 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return append_zero((high + torch.linspace(0, 1, n) * (low - high)) ** rho).to(device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """log(sigma) evenly spaced, then 0: (n + 1,)."""
    return append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp())


def get_sigmas_polyexponential(n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu") -> Tensor:
    """log(sigma) a polynomial of degree ``rho`` in the step, then 0: (n + 1,)."""
    ramp = torch.linspace(1, 0, n, device=device) ** rho
    return append_zero((ramp * (math.log(sigma_max) - math.log(sigma_min)) + math.log(sigma_min)).exp())


def get_sigmas_vp(n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu") -> Tensor:
    """The continuous variance preserving schedule at times evenly spaced from 1 to ``eps_s``, then 0: (n + 1,) (Song et al. 2021b)."""
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero((torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1).sqrt())


def append_dims(v: Tensor, ndim: int) -> Tensor:
    """``v`` with dimensions of size 1 behind it, ``ndim`` in all."""
    if v.ndim > ndim:
        raise refusal("sigma", f"{v.ndim} dimensions", f"at most those of x, {ndim}")
    return v[(..., *[None] * (ndim - v.ndim))]


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx / dsigma of the probability flow ODE, shaped like ``x``; ``sigma`` () or (B,) (Karras et al. 2022, equation 3)."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """The sigma to step down to, and the standard deviation of the noise that leads from there to ``sigma_to``. Floats or tensors ()."""
    if not eta:
        return sigma_to, 0.0
    sigma_up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


# Noise


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Noise from torch's global generator, shaped like ``x``, whatever the sigmas."""
    return lambda sigma, sigma_next: torch.randn_like(x)


class BatchedBrownianTree:
    """W(t1) - W(t0) of Brownian motions on ``t0`` .. ``t1``, shaped like ``x``; a list of seeds gives every sample its own motion.

    ``seed`` None draws one from torch's global generator. Needs torchsde (``pip install torchsde``).
    """

    def __init__(self, x: Tensor, t0: Tensor, t1: Tensor, seed: int | Sequence[int] | None = None, **kwargs: Any) -> None:
        try:
            import torchsde
        except ImportError:
            raise ImportError(
                "noise_sampler: got None and torchsde is not installed, supported: pip install torchsde, or a function"
            ) from None
        t0, t1, self.sign = self.sort(t0, t1)
        w0 = kwargs.pop("w0", torch.zeros_like(x))
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        self.batched = not isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if self.batched:
            if len(seeds) != x.shape[0]:
                raise refusal("seed", f"{len(seeds)} seeds", f"one, or one per sample, {x.shape[0]}")
            w0 = w0[0]
        self.trees = [torchsde.BrownianTree(t0, w0, t1, entropy=s, **kwargs) for s in seeds]

    @staticmethod
    def sort(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
        return (a, b, 1) if a < b else (b, a, -1)

    def __call__(self, t0: Tensor, t1: Tensor) -> Tensor:
        t0, t1, sign = self.sort(t0, t1)
        w = torch.stack([tree(t0, t1) for tree in self.trees]) * (self.sign * sign)
        return w if self.batched else w[0]


class BrownianTreeNoiseSampler:
    """A noise sampler from one Brownian path, so that nested grids see the same noise: W(sigma_next) - W(sigma), at unit variance.

    ``transform`` maps sigma to the path's time; ``seed`` as in `BatchedBrownianTree`.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Tensor | float,
        sigma_max: Tensor | float,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        self.tree = BatchedBrownianTree(x, transform(torch.as_tensor(sigma_min)), transform(torch.as_tensor(sigma_max)), seed)

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        t0, t1 = self.transform(torch.as_tensor(sigma)), self.transform(torch.as_tensor(sigma_next))
        return self.tree(t0, t1) / (t1 - t0).abs().sqrt()


def _brownian(x: Tensor, sigmas: Tensor) -> NoiseSampler:
    return BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max())


# The loop


def _grid(x: Tensor, sigmas: Tensor) -> Grid:
    """The grid of a list of sigmas, in float64: the one transfer to the host."""
    check_dtype("x", x.dtype)
    levels = sigmas.detach().to("cpu", torch.float64).numpy()
    return Grid(edm(), levels, np.ones_like(levels), levels)


def _sample(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    rows: Sequence[Row],
    draws: Sequence[Draws],
    noise_sampler: NoiseSampler,
    noise_slot: int | None,
    told: Tensor | None = None,
) -> Tensor:
    """Run the rows. ``draws`` groups them into steps; noise drawn after an evaluation is at hand to its row.

    ``told`` are the sigmas of the rows, and of the end, as ``noise_sampler`` gets them, where they are not those of ``sigmas``.

    A row's outputs are new tensors, as upstream's are, so that what a callback or the model keeps stays what it was.
    """
    extra_args = {} if extra_args is None else extra_args
    assert sum(map(len, draws)) == len(rows)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    packed = [pack_row(convert=(0.0, 1.0), outputs=row.outputs) for row in rows]
    coef = torch.tensor([floats for floats, _ in packed], dtype=wide).to(x.device)
    index = torch.tensor([integers for _, integers in packed]).to(x.device)
    points = torch.tensor([row.point.sigma for row in rows], dtype=torch.float64)
    levels = torch.cat([points.to(sigmas), sigmas[-1:].detach()])  # in the dtype of sigmas, where those of the grid have their own bits
    fed = levels.to(x)[:, None] * x.new_ones([x.shape[0]])  # (rows + 1, B), what the network is fed
    told = levels if told is None else told
    slots = {0: x}
    k = 0
    for i in trange(len(draws), disable=disable):
        first = k
        for drawn in draws[i]:
            denoised = model(slots[0], fed[k], **extra_args)
            _check_output(x, denoised)
            if callback is not None and k == first:
                callback({"x": slots[0], "i": i, "sigma": sigmas[i], "sigma_hat": levels[k], "denoised": denoised})
            if drawn:
                noise = noise_sampler(told[first], told[k + 1])
                if noise_slot is not None:
                    slots[noise_slot] = noise.to(x).expand_as(x)
            row = rows[k]
            read = [slots[0], *(slots[slot] for slot in row.reads)]
            written = solver_step(read, denoised, coef[k], index[k], outputs=len(row.outputs))
            slots.update(zip(row.outputs, written, strict=True))
            k += 1
    return slots[0]


def _check_output(x: Tensor, denoised: Tensor) -> None:
    if denoised.shape != x.shape:  # twice the batch would pass for both halves of guidance
        raise refusal("model", f"an output of shape {tuple(denoised.shape)}", f"{tuple(x.shape)}, that of x")
    if denoised.dtype == torch.float64 and x.dtype != torch.float64:
        raise refusal("model", f"an output in torch.float64 for x in {x.dtype}", "float32, bfloat16 or float16 for that x")


def _sample_plan(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    solver: str | Callable[..., Iterator[Row]],
    grid: Grid,
    draws: Sequence[Draws],
    noise_sampler: NoiseSampler,
    told: Tensor | None = None,
    **options: Any,
) -> Tensor:
    plan = make_plan(solver, grid, **options).with_noise_slot()
    return _sample(model, x, sigmas, extra_args, callback, disable, plan.rows, draws, noise_sampler, plan.noise_slot, told)


def _sample_churned(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
    solver: str | Callable[..., Iterator[Row]],
    evaluations: int,
) -> Tensor:
    """The samplers with churn. They draw noise at the start of every step, whether it is used or not.

    The noise of all steps but the first belongs to the row that arrives at the step, so that churn costs no launch.
    """
    if len(sigmas) < 2:
        return x
    grid = _grid(x, sigmas)
    # Upstream compares in the dtype of sigmas, where 0.1 may lie above 0.1.
    low, high = (float(torch.tensor(bound, dtype=sigmas.dtype)) for bound in (s_tmin, s_tmax))
    options = {"s_churn": s_churn, "s_tmin": low, "s_tmax": high, "s_noise": s_noise}
    plan = make_plan(solver, grid, **options).with_noise_slot()
    last = grid.steps - 1
    draws = [(False,) * ((evaluations if grid.sigma[i + 1] > 0 else 1) - 1) + (i < last,) for i in range(grid.steps)]
    noise = torch.randn_like(x)
    added = plan.rows[0].point.sigma ** 2 - grid.sigma[0] ** 2
    if added > 0:
        x = x + noise * (s_noise * math.sqrt(added))
    fresh = default_noise_sampler(x)
    return _sample(model, x, sigmas, extra_args, callback, disable, plan.rows, draws, fresh, plan.noise_slot)


# Samplers with churn


@torch.no_grad()
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method with churn (Karras et al. 2022, algorithm 2 without its correction)."""
    return _sample_churned(model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise, "euler", 1)


@torch.no_grad()
def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, algorithm 2)."""
    return _sample_churned(model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise, "heun", 2)


@torch.no_grad()
def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver-2, the midpoint method in log sigma (Lu et al. 2022a), with churn (Karras et al. 2022, algorithm 2)."""
    return _sample_churned(model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise, "dpm2", 2)


# Ancestral samplers


def _downs(grid: Grid, eta: float) -> list[float]:
    """The sigma that every step goes down to before its noise."""
    return [float(get_ancestral_step(float(s), float(to), eta)[0]) for s, to in pairwise(grid.sigma)]


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with Euler steps."""
    if len(sigmas) < 2:
        return x
    noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
    grid = _grid(x, sigmas)
    draws = [(bool(to > 0),) for to in grid.sigma[1:]]
    solver = "euler_ancestral"
    return _sample_plan(model, x, sigmas, extra_args, callback, disable, solver, grid, draws, noise_sampler, eta=eta, s_noise=s_noise)


def _dpm2_ancestral(g: Grid, *, eta: float, s_noise: float) -> Iterator[Row]:
    """`dpm2_ancestral`, without noise in the steps that go down to 0, where k-diffusion leaves it out whatever sigma_up is."""
    for row in SOLVERS["dpm2_ancestral"](g, eta=eta, s_noise=s_noise):
        one_evaluation = not row.reads and len(row.outputs) == 1
        yield replace(row, outputs={0: {"d": 1.0}}) if one_evaluation else row


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver-2 steps."""
    if len(sigmas) < 2:
        return x
    noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
    grid = _grid(x, sigmas)
    draws: list[Draws] = [(False, True) if down > 0 else (False,) for down in _downs(grid, eta)]
    solver = _dpm2_ancestral
    return _sample_plan(model, x, sigmas, extra_args, callback, disable, solver, grid, draws, noise_sampler, eta=eta, s_noise=s_noise)


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Ancestral sampling with DPM-Solver++(2S) steps (Lu et al. 2022b, algorithm 1)."""
    if len(sigmas) < 2:
        return x
    noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
    grid = _grid(x, sigmas)
    draws: list[Draws] = [
        (False, True) if down > 0 else (bool(to > 0),) for down, to in zip(_downs(grid, eta), grid.sigma[1:], strict=True)
    ]
    solver = "dpmpp_2s_ancestral"
    return _sample_plan(model, x, sigmas, extra_args, callback, disable, solver, grid, draws, noise_sampler, eta=eta, s_noise=s_noise)


# Samplers of the SDE: their noise defaults to one Brownian path


def _dpmpp_sde(g: Grid, *, eta: float, s_noise: float, r: float) -> Iterator[Row]:
    """The singlestep SDE form of DPM-Solver++ (k-diffusion): the second evaluation lies at r of the step in log sigma.

    `genfast.samplers` has it with the noises of one Brownian motion; here ``noise_sampler`` gives both, and r is free.
    """
    fac = 1 / (2 * r)
    for sigma, to in pairwise(map(float, g.sigma)):
        if to == 0:
            yield Row(g.at(sigma), {0: {"d": 1.0}})
            continue
        mid = sigma ** (1 - r) * to**r
        down_mid, up_mid = get_ancestral_step(sigma, mid, eta)
        down, up = get_ancestral_step(sigma, to, eta)
        gain = 1 - down / sigma
        saved: dict[str | int, float] = {"x": down / sigma, "d": gain * (1 - fac)}
        yield Row(g.at(sigma), {0: {"x": down_mid / sigma, "d": 1 - down_mid / sigma, "noise": s_noise * up_mid}, 1: saved})
        yield Row(g.at(mid), {0: {1: 1.0, "d": gain * fac, "noise": s_noise * up}})


@torch.no_grad()
def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """DPM-Solver++ (stochastic), two evaluations a step. Without ``noise_sampler`` it needs torchsde."""
    if len(sigmas) < 2:
        return x
    grid = _grid(x, sigmas)
    noise_sampler = _brownian(x, sigmas) if noise_sampler is None else noise_sampler
    draws: list[Draws] = [(True, True) if to > 0 else (False,) for to in grid.sigma[1:]]
    # Upstream's sigmas went through log and exp, and a Brownian path tells their last bits apart.
    t = -sigmas.log()
    told = torch.cat([torch.stack([t[:-1], t[:-1] + (t[1:] - t[:-1]) * r], 1).flatten(), t[-1:]]).neg().exp()
    options: dict[str, Any] = {"eta": eta, "s_noise": s_noise, "r": r}
    return _sample_plan(model, x, sigmas, extra_args, callback, disable, _dpmpp_sde, grid, draws, noise_sampler, told, **options)


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) SDE (Lu et al. 2022b, equation 19). Without ``noise_sampler`` it needs torchsde.

    ``solver_type`` "midpoint" or "heun" is how the last two evaluations are extrapolated.
    """
    if solver_type not in ("heun", "midpoint"):
        raise refusal("solver_type", repr(solver_type), "'heun', 'midpoint'")
    if len(sigmas) < 2:
        return x
    grid = _grid(x, sigmas)
    noise_sampler = _brownian(x, sigmas) if noise_sampler is None else noise_sampler
    draws = [(bool(eta and to > 0),) for to in grid.sigma[1:]]
    options: dict[str, Any] = {"eta": eta, "s_noise": s_noise, "variant": solver_type}
    return _sample_plan(model, x, sigmas, extra_args, callback, disable, "dpmpp_2m_sde", grid, draws, noise_sampler, **options)


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++(3M) SDE. Without ``noise_sampler`` it needs torchsde."""
    if len(sigmas) < 2:
        return x
    grid = _grid(x, sigmas)
    noise_sampler = _brownian(x, sigmas) if noise_sampler is None else noise_sampler
    draws = [(bool(eta and to > 0),) for to in grid.sigma[1:]]
    solver = "dpmpp_3m_sde"
    return _sample_plan(model, x, sigmas, extra_args, callback, disable, solver, grid, draws, noise_sampler, eta=eta, s_noise=s_noise)


# Multistep


@torch.no_grad()
def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep: the polynomial through the last ``order`` slopes, 1 to 4, integrated over sigma."""
    if len(sigmas) < 2:
        return x
    grid = _grid(x, sigmas)
    draws = [(False,)] * grid.steps
    return _sample_plan(model, x, sigmas, extra_args, callback, disable, "lms", grid, draws, default_noise_sampler(x), order=order)


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2)."""
    if len(sigmas) < 2:
        return x
    grid = _grid(x, sigmas)
    return _sample_plan(
        model, x, sigmas, extra_args, callback, disable, "dpmpp_2m", grid, [(False,)] * grid.steps, default_noise_sampler(x)
    )
