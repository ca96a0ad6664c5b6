"""DPM-Solver-12 and 23: steps of their own choice, by the same kernel. The host looks at the error of every step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genfast.schedules import Grid, NoiseSchedule, Point, grid

from .arguments import Scale
from .denoiser import Denoiser
from .plan import Plan, Row, Terms, assemble
from .rows import ancestral, choice, combine, ode_step, slope
from .sample import Run, Sampler

_START, _SLOPE, _LOW, _DENOISED, _SLOTS = 1, 2, 3, 4, 5
_FIRST_LEVEL = 999.0  # sigma / alpha where a run starts whose process begins at alpha = 0; t = 0.999 of a flow


class PIDStepSizeController:
    """The size ``h`` of the next step from the errors of the last ones (Hairer and Wanner 1996, section IV.2); k-diffusion's, name and all.

    ``order`` is the error's. ``errs``: the inverse errors of this step and of the last two accepted ones.
    """

    def __init__(
        self, h: float, pcoeff: float, icoeff: float, dcoeff: float, order: float = 1, accept_safety: float = 0.81, eps: float = 1e-8
    ) -> None:
        self.h = h
        self.b1 = (pcoeff + icoeff + dcoeff) / order
        self.b2 = -(pcoeff + 2 * dcoeff) / order
        self.b3 = dcoeff / order
        self.accept_safety = accept_safety
        self.eps = eps
        self.errs: list[float] = []

    def limiter(self, x: float) -> float:
        return 1 + math.atan(x - 1)

    def propose_step(self, error: Tensor | float) -> bool:
        """Whether a step with this ``error``, 1 the allowed one, is accepted; ``h`` becomes the next one to try."""
        inverse = 1 / (float(error) + self.eps)
        self.errs = [inverse, *self.errs[1:]] if self.errs else [inverse] * 3
        factor = self.limiter(self.errs[0] ** self.b1 * self.errs[1] ** self.b2 * self.errs[2] ** self.b3)
        accept = factor >= self.accept_safety
        if accept:
            self.errs[1:] = self.errs[:2]
        self.h *= factor
        return accept


def dpm_solver_step(g: Grid, p: Point, down: float, q: Point, order: int) -> list[Row]:
    """One step from ``p`` to the level ``down`` (sigma / alpha), in the coordinates of ``q`` (Lu et al. 2022a, algorithms 1 and 2).

    Slot 1 keeps the state it starts from, slot 2 the first slope, slot 3 gets the result of the order below and slot 4 the last denoised
    prediction.
    """
    r = p.sigma / p.alpha
    h = math.log(r / down)
    grow = math.expm1(h)
    start: Terms = {_START: 1 / p.alpha}
    if order == 2:
        mid = g.at(r * math.exp(-h / 2))
        low = combine((q.alpha / p.alpha, {"x": 1.0}), (-q.alpha * down * grow, slope(p)))
        high = combine((q.alpha, start), (-q.alpha * down * grow, slope(mid)))
        return [Row(p, {0: ode_step(p, mid), _START: {"x": 1.0}, _LOW: low}), Row(mid, {0: high, _DENOISED: {"d": 1.0}})]
    first, second = g.at(r * math.exp(-h / 3)), g.at(r * math.exp(-2 * h / 3))
    base: Terms = {_SLOPE: 1.0}
    bend = 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1)
    whole = math.expm1(2 * h / 3)
    to_second = combine((second.alpha, start), (-second.sigma * (whole - bend), base), (-second.sigma * bend, slope(first)))
    low = combine((q.alpha, start), (-q.alpha * down * (grow - 1.5 * grow), base), (-q.alpha * down * 1.5 * grow, slope(first)))
    last = 1.5 * (grow / h - 1)
    high = combine((q.alpha, start), (-q.alpha * down * (grow - last), base), (-q.alpha * down * last, slope(second)))
    return [
        Row(p, {0: ode_step(p, first), _START: {"x": 1.0}, _SLOPE: slope(p)}),
        Row(first, {0: to_second, _LOW: low}),
        Row(second, {0: high, _DENOISED: {"d": 1.0}}),
    ]


class AdaptiveSampler(Sampler):
    """DPM-Solver-12 or 23 with adaptive steps (Lu et al. 2022a, appendix C), the controller and error norm of k-diffusion.

    ``order`` is 2 or 3. The error of a step is the root mean square over the batch of (x_low - x_high) / max(atol, rtol max(abs(x_low),
    abs(x_before))), x in the coordinates x / alpha; so the steps belong to the batch, and a sample drawn alone takes others. ``h_init`` is
    the first step in lambda; ``pcoeff``, ``icoeff``, ``dcoeff``, ``accept_safety`` the controller's. ``eta`` > 0 follows the ODE below
    the next level and adds noise: draw k for the k-th accepted step, or the Brownian path's. Of ``sigmas`` (or ``timesteps``) the
    largest and the smallest above 0 count; default: the process's own, then 0, to which the last step is Euler's.
    The other arguments are `Sampler`'s. After a call, `last_info` has "evaluations", "accepted" and "rejected".
    Raises RuntimeError where ``max_evaluations`` do not suffice.
    """

    def __init__(
        self,
        *,
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
        max_evaluations: int = 10_000,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        choice("order", order, (2, 3))
        if options.get("steps") is not None:
            raise ValueError(f"steps: got {options['steps']}, supported: None, as the steps are chosen from the errors")
        for name, value in (("rtol", rtol), ("atol", atol), ("h_init", h_init)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, supported: a number above 0")
        if options.get("capture"):
            raise ValueError("capture: got True, supported: False, because the host looks at the error of every step")
        super().__init__("ddim", sigmas=sigmas, timesteps=timesteps, **options)
        self.order, self.rtol, self.atol, self.eta, self.s_noise = order, rtol, atol, eta, s_noise
        self.controller = h_init, pcoeff, icoeff, dcoeff, 1.5 if eta else float(order), accept_safety
        self.max_evaluations = max_evaluations
        self.last_info: dict[str, int] = {}

    def _points(self, den: Denoiser) -> Grid:
        return self._start_of(den)  # between its ends the steps are chosen from the errors

    def _grid(self, noise: NoiseSchedule, steps: int | None = None) -> Grid:
        if self.sigmas is not None or self.timesteps is not None:
            return grid(noise, sigmas=self.sigmas, timesteps=self.timesteps)
        low, high = noise.sigma_range
        if noise.at_sigmas(high)[1] == 0:
            high = noise.sigma_of(Point(0.0, *(float(v) for v in noise.at_ratio(_FIRST_LEVEL))))
        return grid(noise, sigmas=[high, low, 0.0])

    def _plan(self, points: Grid) -> Plan:
        """The first step that is tried."""
        if points.alpha[0] == 0:
            raise ValueError("sigmas: got a start at alpha = 0, supported: a finite sigma / alpha, as steps are taken in its logarithm")
        return self.attempt(points, points.point(0), self.controller[0])[0]

    def attempt(self, points: Grid, p: Point, h: float) -> tuple[Plan, Point, float]:
        """A step of size ``h`` in lambda from ``p``: its rows, where it ends, and the standard deviation of its noise over alpha there."""
        end = float(points.ratio[points.ratio > 0][-1])
        r = p.sigma / p.alpha
        r_next = max(r * math.exp(-h), end)
        q = points.at(r_next)
        down = max(ancestral(r, r_next, self.eta)[0], end)
        up = math.sqrt(max(r_next**2 - down**2, 0.0))
        rows = dpm_solver_step(points, p, down, q, self.order)
        return assemble(f"dpm_solver_{self.order - 1}{self.order}", points.noise, rows), q, up

    def _guided(self, scales: Sequence[Scale]) -> bool:
        return callable(self.guidance_scale) or super()._guided(scales)

    @property
    def _run(self) -> type[Run]:
        return _AdaptiveRun


class _AdaptiveRun(Run):
    sampler: AdaptiveSampler

    def samples(self) -> Tensor:
        sampler, sigma_of = self.sampler, self.den.noise.sigma_of
        points = sampler._points(self.den)
        end = float(points.ratio[points.ratio > 0][-1])
        pid = PIDStepSizeController(*sampler.controller)
        info = {"evaluations": 0, "accepted": 0, "rejected": 0}
        p, before = points.point(0), self._over_alpha(0, points.point(0))
        while math.log(p.sigma / p.alpha / end) > 1e-5:
            if info["evaluations"] >= sampler.max_evaluations:
                got = f"{sampler.max_evaluations}, which led to sigma {sigma_of(p):g}"
                raise RuntimeError(f"max_evaluations: got {got}, supported: more, or a larger rtol")
            plan, q, up = sampler.attempt(points, p, pid.h)
            self._execute_all(plan)
            info["evaluations"] += sampler.order
            low, high = self._over_alpha(_LOW, q), self._over_alpha(0, q)
            allowed = (sampler.rtol * torch.maximum(low.abs(), before.abs())).clamp(min=sampler.atol)
            error = ((low - high) / allowed).square().mean().sqrt().item()
            if not math.isfinite(error):
                self._check_finite()
                raise FloatingPointError(f"error: got {error} for the step from sigma {sigma_of(p):g}, supported: a finite one")
            if not pid.propose_step(error):
                info["rejected"] += 1
                self.ring[0].copy_(self.ring[_START])
                continue
            if up > 0:
                self.ring[0].add_(self._noise(info["accepted"] + 1, p, q).mul_(q.alpha * up * sampler.s_noise))
            before, p = low, q
            if sampler.callback is not None:
                self._call_back(info["accepted"], plan.rows[-1].point, _DENOISED)
            info["accepted"] += 1
        last = points.point(points.steps)
        if last.sigma == 0:
            self._execute_all(assemble("euler", points.noise, [Row(p, {0: ode_step(p, last), _DENOISED: {"d": 1.0}})]))
            info["evaluations"] += 1
            if sampler.callback is not None:
                self._call_back(info["accepted"], p, _DENOISED)
        self._check_finite()
        sampler.last_info = info
        return self.ring[0].clone()

    def _execute_all(self, plan: Plan) -> None:
        self._load(plan, self.sampler._scales(plan))
        self.counter.zero_()
        self._feed()
        for guided in self.guided:
            self._step(guided)

    def _over_alpha(self, slot: int, point: Point) -> Tensor:
        return self.ring[slot].double() / point.alpha

    def _noise(self, draw: int, p: Point, q: Point) -> Tensor:
        out = torch.empty_like(self.ring[0])
        if self.path is not None:
            a, b = p.sigma / p.alpha, q.sigma / q.alpha
            return out.copy_(self.path(a, b).mul_(1 / math.sqrt(a - b)))
        if self.seeds is not None:
            return out.copy_(self.namespace.normal(self.seeds, out.shape, draw=draw, dtype=out.dtype))
        self._draw(out)
        return out
