"""DPM-Solver of orders 1 to 3 (Lu et al. 2022a) with a given number of evaluations, or with steps of its own choice.

Names and signatures are those of ``k_diffusion.sampling``. Time is t = -log(sigma). A step of order n evaluates the slopes
eps_j = (u_j - D(u_j, sigma(s_j))) / sigma(s_j) at n states, each of which is x plus a combination of the slopes before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from genfast.ops._checks import check_floating, refusal, versions
from genfast.samplers import Row
from genfast.samplers.adaptive import PIDStepSizeController
from genfast.schedules import Point

from .loop import STEP_START, Callback, ExtraArgs, Model, Packed, pack, run
from .noise import NoiseSampler, default_noise_sampler
from .sigmas import get_ancestral_step

_EPS_KEYS = ("eps", "eps_r1", "eps_r2")
_NODES = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}  # where in a step of an order the evaluations after the first lie
_LOW, _NOISE = 7, 8  # slots: the lower order's result, and the noise; slot 1 + j holds eps_j


def _weights(t: float, to: float, nodes: Sequence[float]) -> list[list[float]]:
    """What the slopes weigh in the states after x: one list for every state but the first, the last of them the step's result.

    ``nodes`` are r_1, .. of the evaluations inside the step (Lu et al. 2022a, algorithms 1, 2 and 5); without any the order is 1.
    """
    h, sigma = to - t, math.exp(-to)

    def euler(r: float) -> float:
        return -math.exp(-(t + r * h)) * math.expm1(r * h)

    def slope(r: float) -> float:
        return -math.exp(-(t + r * h)) * (math.expm1(r * h) / (r * h) - 1)

    if not nodes:
        return [[euler(1)]]
    if len(nodes) == 1:
        second = -sigma / (2 * nodes[0]) * math.expm1(h)
        return [[euler(nodes[0])], [euler(1) - second, second]]
    r1, r2 = nodes
    second, third = r2 / r1 * slope(r2), slope(1) / r2
    return [[euler(r1)], [euler(r2) - second, second], [euler(1) - third, 0.0, third]]


def _rows(t: float, to: float, nodes: Sequence[float], low: Sequence[float] | None = None, noise: float = 0.0) -> list[Row]:
    """A step's rows. ``low`` weighs the slopes for a lower order's result, left in slot `_LOW`; ``noise`` the noise in slot `_NOISE`."""
    states = _weights(t, to, nodes)
    times = [t, *(t + r * (to - t) for r in nodes)]
    rows = []
    for j, (time, weights) in enumerate(zip(times, states, strict=True)):
        sigma = math.exp(-time)
        eps: dict[str | int, float] = {"x": 1 / sigma, "d": -1 / sigma}

        def state(weights: Sequence[float], j: int = j, eps: dict[str | int, float] = eps) -> dict[str | int, float]:
            terms: dict[str | int, float] = {STEP_START: 1.0} if j else {"x": 1.0}
            terms |= {1 + i: w for i, w in enumerate(weights[:j])}
            return terms | {key: terms.get(key, 0.0) + weights[j] * c for key, c in eps.items()}

        outputs = {0: state(weights)}
        if any(later[j] for later in states[j + 1 :]):
            outputs[1 + j] = eps
        if low is not None and len(low) == j + 1:
            outputs[_LOW] = state(low)
        if j == len(nodes):
            outputs[0][_NOISE] = noise
        rows.append(Row(Point(time, 1.0, sigma), outputs))
    return rows


def _down(t: float, to: float, end: float, eta: float) -> tuple[float, float]:
    """The time that a step from ``t`` to ``to`` goes down to before its noise, and the noise's standard deviation."""
    if not eta:
        return to, 0.0
    sigma, _ = get_ancestral_step(math.exp(-t), math.exp(-to), eta)
    down = min(end, -math.log(sigma)) if sigma > 0 else end
    return down, math.sqrt(max(math.exp(-2 * to) - math.exp(-2 * down), 0.0))


@lru_cache(maxsize=64)
def _prepare(
    orders: tuple[int, ...], times: tuple[float, ...], eta: float, s_noise: float, dtype: torch.dtype, device: torch.device
) -> Packed:
    """The steps of `DPMSolver.dpm_solver_fast`, packed and kept for later calls."""
    rows: list[Row] = []
    for order, t, to in zip(orders, times[:-1], times[1:], strict=True):
        down, noise = _down(t, to, times[-1], eta)
        rows += _rows(t, down, _NODES[order], noise=noise * s_noise)
    return pack(rows, dtype, device)


def _never(i: int, first: int, k: int) -> Tensor:
    raise AssertionError("a step of the adaptive solver draws its noise when it is accepted")


class DPMSolver(nn.Module):
    """DPM-Solver for ``model(x, sigma, **extra_args)``, which returns the denoised x.

    ``eps_callback()`` is called after every evaluation of the network, ``info_callback(info)`` once a step.
    """

    def __init__(
        self,
        model: Model,
        extra_args: ExtraArgs = None,
        eps_callback: Callable[[], object] | None = None,
        info_callback: Callback | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.extra_args = {} if extra_args is None else extra_args
        self.eps_callback = eps_callback
        self.info_callback = info_callback

    def t(self, sigma: Tensor) -> Tensor:
        return -sigma.log()

    def sigma(self, t: Tensor) -> Tensor:
        return t.neg().exp()

    def eps(
        self, eps_cache: Mapping[str, Tensor], key: str, x: Tensor, t: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The slope at ``x`` and time ``t``, from ``eps_cache`` if it holds ``key``, and the cache with it."""
        if key in eps_cache:
            return eps_cache[key], eps_cache
        denoised = self.model(x, self.sigma(t) * x.new_ones([x.shape[0]]), *args, **self.extra_args, **kwargs)
        eps = (x - denoised) / self.sigma(t)
        if self.eps_callback is not None:
            self.eps_callback()
        return eps, {key: eps, **eps_cache}

    def _step(
        self, x: Tensor, t: Tensor, t_next: Tensor, nodes: Sequence[float], eps_cache: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        cache: Mapping[str, Tensor] = {} if eps_cache is None else eps_cache
        times = [t, *(t + r * (t_next - t) for r in nodes)]
        state, slopes = x, []
        for key, time, weights in zip(_EPS_KEYS, times, _weights(float(t), float(t_next), nodes), strict=False):
            eps, cache = self.eps(cache, key, state, time)
            slopes.append(eps)
            state = x + sum(w * slope for w, slope in zip(weights, slopes, strict=True) if w)
        return state, cache

    def dpm_solver_1_step(
        self, x: Tensor, t: Tensor, t_next: Tensor, eps_cache: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A step of order 1 from time ``t`` to ``t_next``, both (), and the slopes it knows, for another step from there."""
        return self._step(x, t, t_next, (), eps_cache)

    def dpm_solver_2_step(
        self, x: Tensor, t: Tensor, t_next: Tensor, r1: float = 1 / 2, eps_cache: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A step of order 2, with its second evaluation at ``r1`` of the step."""
        return self._step(x, t, t_next, (r1,), eps_cache)

    def dpm_solver_3_step(
        self,
        x: Tensor,
        t: Tensor,
        t_next: Tensor,
        r1: float = 1 / 3,
        r2: float = 2 / 3,
        eps_cache: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A step of order 3, with its evaluations at ``r1`` and ``r2`` of the step."""
        return self._step(x, t, t_next, (r1, r2), eps_cache)

    def dpm_solver_fast(
        self,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
        nfe: int,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> Tensor:
        """From ``t_start`` to ``t_end``, both (), with ``nfe`` evaluations: steps of order 3, and lower ones for the rest.

        ``eta`` > 0 steps further down and adds noise. Noise is drawn every step, used or not.
        """
        check_floating("x", x)
        noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
        forward = bool(t_end > t_start)
        if not forward and eta:
            raise refusal("eta", eta, "0 where sigma rises")
        steps = nfe // 3 + 1
        orders = (3,) * (steps - 2) + (2, 1) if nfe % 3 == 0 else (3,) * (steps - 1) + (nfe % 3,)
        ts = torch.linspace(t_start, t_end, steps + 1, device=x.device)
        sigmas = self.sigma(ts)
        packed = _prepare(orders, tuple(ts.tolist()), eta, s_noise, x.dtype, x.device)
        draws = [(False,) * (order - 1) + (True,) for order in orders]

        def draw(i: int, first: int, k: int) -> Tensor:
            return noise_sampler(sigmas[i], sigmas[i + 1])

        def on_step(i: int, first: int, x: Tensor, denoised: Tensor) -> None:
            assert self.info_callback is not None
            before = versions(ts)
            self.info_callback({"x": x, "i": i, "t": ts[i], "t_up": ts[i], "denoised": denoised.clone()})
            if versions(ts) != before:
                raise refusal("callback", "one that writes into t", "one that writes into x, as the times are on the host")

        levels, slot, told = packed.sigma.to(x), _NOISE if eta else None, on_step if self.info_callback is not None else None
        arguments = (self.model, x, packed, draws, levels, self.extra_args, range(steps), draw, slot, told, self.eps_callback)
        return run(*arguments, slope_first=True)[0]  # upstream caches the first slope of a step before it calls back

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        t_start: Tensor,
        t_end: Tensor,
        order: int = 3,
        rtol: float = 0.05,
        atol: float = 0.0078,
        h_init: float = 0.05,
        pcoeff: float = 0.0,
        icoeff: float = 1.0,
        dcoeff: float = 0.0,
        accept_safety: float = 0.81,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> tuple[Tensor, dict[str, int]]:
        """From ``t_start`` to ``t_end``, both (), in steps of ``order`` 2 or 3 whose error against one order less is at most
        max(``atol``, ``rtol`` abs(x)), root mean square over all of x. Returns the state and how many steps and evaluations it took.

        ``h_init`` is the first step; ``pcoeff``, ``icoeff``, ``dcoeff`` and ``accept_safety`` are `PIDStepSizeController`'s.
        """
        check_floating("x", x)
        noise_sampler = default_noise_sampler(x) if noise_sampler is None else noise_sampler
        if order not in (2, 3):
            raise refusal("order", order, "2, 3")
        forward = bool(t_end > t_start)
        if not forward and eta:
            raise refusal("eta", eta, "0 where sigma rises")
        pid = PIDStepSizeController(abs(h_init) * (1 if forward else -1), pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety)
        info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
        s, x_prev = t_start, x
        seen: list[Tensor] = []  # the denoised of every step's first evaluation, the last in use

        def on_step(i: int, first: int, x: Tensor, denoised: Tensor) -> None:
            if self.info_callback is not None:
                seen[:] = [denoised.clone()]  # the network may use its memory again before the callback sees this

        while s < t_end - 1e-5 if forward else s > t_end + 1e-5:
            t = torch.minimum(t_end, s + pid.h) if forward else torch.maximum(t_end, s + pid.h)
            down, noise = _down(float(s), float(t), float(t_end), eta)
            low = _weights(float(s), down, _NODES[3][:1] if order == 3 else ())[-1]
            packed = pack(_rows(float(s), down, _NODES[order], low), x.dtype, x.device)
            draws = [(False,) * order]
            levels = packed.sigma.to(x)
            slots = run(self.model, x, packed, draws, levels, self.extra_args, range(1), _never, None, on_step, self.eps_callback)
            x_low, x_high = slots[_LOW], slots[0]
            allowed = torch.maximum(x_low.abs(), x_prev.abs()).mul_(rtol).clamp_(min=atol)
            error = torch.linalg.norm((x_low - x_high) / allowed) / x.numel() ** 0.5
            if pid.propose_step(error):
                x_prev, x = x_low, x_high
                drawn = noise_sampler(self.sigma(s), self.sigma(t))
                if noise:
                    x = x + noise * s_noise * drawn
                s = t
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            if self.info_callback is not None:
                told = {"x": x, "i": info["steps"] - 1, "t": s, "t_up": s, "denoised": seen[0], "error": error, "h": pid.h}
                self.info_callback({**told, **info})
        return x, info


def _check_ends(sigma_min: float, sigma_max: float) -> None:
    if sigma_min <= 0 or sigma_max <= 0:
        raise refusal("sigma_min and sigma_max", f"{float(sigma_min)} and {float(sigma_max)}", "numbers above 0")


def _solver(
    model: Model, extra_args: ExtraArgs, callback: Callback | None, bar: Any, sigma_min: float, sigma_max: float
) -> tuple[DPMSolver, Tensor, Tensor]:
    """The solver, and the times it starts and ends at."""
    solver = DPMSolver(model, extra_args, eps_callback=bar.update)
    if callback is not None:
        solver.info_callback = lambda info: callback({"sigma": solver.sigma(info["t"]), "sigma_hat": solver.sigma(info["t_up"]), **info})
    return solver, solver.t(torch.as_tensor(sigma_max)), solver.t(torch.as_tensor(sigma_min))


@torch.no_grad()
def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-Fast: ``n`` evaluations, evenly spaced in log sigma. The callback's dict has t and t_up besides."""
    _check_ends(sigma_min, sigma_max)
    with tqdm(total=n, disable=disable) as bar:
        solver, start, end = _solver(model, extra_args, callback, bar, sigma_min, sigma_max)
        return solver.dpm_solver_fast(x, start, end, n, eta, s_noise, noise_sampler)


@torch.no_grad()
def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, dict[str, int]]:
    """DPM-Solver-12 and 23: it chooses its steps, and waits for the device after each. ``return_info`` returns the counts of steps too.

    The callback's dict has t, t_up, error, h, steps, nfe, n_accept and n_reject besides.
    """
    _check_ends(sigma_min, sigma_max)
    with tqdm(disable=disable) as bar:
        solver, start, end = _solver(model, extra_args, callback, bar, sigma_min, sigma_max)
        x, info = solver.dpm_solver_adaptive(
            x, start, end, order, rtol, atol, h_init, pcoeff, icoeff, dcoeff, accept_safety, eta, s_noise, noise_sampler
        )
    return (x, info) if return_info else x
