"""Sampling: a plan, a denoiser, one kernel launch per evaluation of the network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from genfast.impl import NAMESPACES, check_impl
from genfast.ops._checks import check_dtype, versions
from genfast.reference.solver_step import layout_of, rescale_factor
from genfast.schedules import Grid, NoiseSchedule, Point, Sigmas, grid

from . import arguments, conditions
from .arguments import Generators, GuidanceScale, Scale, Seeds
from .brownian import BrownianPath, intervals
from .denoiser import Condition, Denoiser
from .first_order import ddim_inverse
from .plan import Plan, Program, Row, Table
from .rows import large_std, posterior_std
from .solvers import Solver, find_solver, make_plan

Callback = Callable[[int, float, Tensor, Tensor], None]

_CHANNELS_LAST = {torch.channels_last: 4, torch.channels_last_3d: 5}
_START = math.exp(5.1)  # sigma / alpha where the default grid of an epsilon network begins: docs/clipping.md
_GROWTH = 15.0  # what a step may multiply the network's error by without a warning
_NEVER = torch.iinfo(torch.int64).max  # what the watch holds while every state is finite


class Sampler:
    """A solver, a grid and the options of a run; calling it on a `Denoiser` draws samples.

    ``solver``: a name in `genfast.samplers.SOLVERS`, or a function from a `Grid` to rows; ``options`` are its own (``eta=``, ``order=``).
    ``steps``, ``sigmas``, ``timesteps``: the grid, as `genfast.schedules.grid` takes them.
    The default grid of an epsilon network without ``clip`` and ``threshold`` begins at sigma / alpha = 164, and a grid whose largest step
    would multiply the network's error by more than 15 gives a UserWarning (docs/clipping.md).
    ``guidance_scale``: g of uncond + g (cond - uncond) (Ho and Salimans 2022); or a list or tensor with one for each sample; or a function
    of sigma (sigma / alpha; for flows t) that returns either, such as a guidance interval. Where it is 1 for all samples the unconditional
    half is not evaluated. ``guidance_rescale``: phi of Lin et al. 2024, equation 16.
    ``clip``: clamp the denoised prediction to [-clip, clip]. ``threshold``: dynamic threshold at this quantile (Saharia et al. 2022),
    to at most ``max_threshold``.
    ``brownian``: the noise of the rows is the increments of one Brownian motion over sigma / alpha per seed (`BrownianPath`), so that grids
    which share points share its noise there; not for solvers that go back to more noise.
    ``impl``: "fused" (kernels) or "reference" (plain PyTorch); both give the same bits.
    ``callback``: called as ``callback(step, sigma, x, denoised)`` after every evaluation, with the state it led to and the denoised
    prediction at ``sigma``, both (B, \\*sample), overwritten by the next evaluation. It returns None. What it writes into x in place is
    where the run goes on; what it writes into denoised reaches nothing.
    ``capture``: record the network and the step in one CUDA graph and replay it; CUDA only, and the network must be capturable. The
    recording is kept for later calls of the same denoiser, shape and kind of condition; after replacing parameters, make a new Sampler.
    ``check_every``: look for states that are not finite after every so many evaluations (each look waits for the device), besides the end.
    ``dtype``: of the state and its history; ``memory_format``: of state and network input.
    """

    def __init__(
        self,
        solver: str | Solver = "dpmpp_2m",
        steps: int | None = None,
        *,
        sigmas: Sigmas = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: GuidanceScale = 1.0,
        guidance_rescale: float = 0.0,
        clip: float | None = None,
        threshold: float | None = None,
        max_threshold: float = math.inf,
        brownian: bool = False,
        impl: Literal["fused", "reference"] = "fused",
        progress: bool = True,
        callback: Callback | None = None,
        capture: bool = False,
        check_every: int | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        **options: Any,
    ) -> None:
        find_solver(solver, options)
        check_impl(impl)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: got {clip}, supported: None or a number above 0")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, supported: None or a quantile in (0, 1]")
        if not max_threshold >= 1:
            raise ValueError(f"max_threshold: got {max_threshold}, supported: a number of at least 1")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale: got {guidance_rescale}, supported: a number in [0, 1]")
        if check_every is not None and check_every < 1:
            raise ValueError(f"check_every: got {check_every}, supported: None or an integer of at least 1")
        check_dtype("dtype", dtype)
        if memory_format not in (torch.contiguous_format, *_CHANNELS_LAST):
            raise ValueError(f"memory_format: got {memory_format}, supported: contiguous_format, channels_last, channels_last_3d")
        self.solver, self.options = solver, options
        self.steps, self.sigmas, self.timesteps = steps, sigmas, timesteps
        self.guidance_scale = guidance_scale if callable(guidance_scale) else arguments.scale_of(guidance_scale)
        self.guidance_rescale = guidance_rescale
        self.clip, self.threshold, self.max_threshold = clip, threshold, max_threshold
        self.brownian = brownian
        self.impl, self.progress, self.callback = impl, progress, callback
        self.capture, self.check_every = capture, check_every
        self.dtype, self.memory_format = dtype, memory_format
        self.last_seeds: list[int] | None = None  # of the latest call; None after a call with a generator
        self._recorded: Run | None = None

    def plan(self, noise: NoiseSchedule | Denoiser) -> Plan:
        """The plan this sampler executes for a denoiser, or for any network of a process: inspect it with `Plan.table` and `Plan.plot`.

        Without the denoiser it is not known whether the network predicts epsilon, whose default grid may begin later.
        """
        if isinstance(noise, Denoiser):
            return self._plan(self._points(noise))
        if not isinstance(noise, NoiseSchedule):
            raise TypeError(f"noise: got a {type(noise).__name__}, supported: a Denoiser, or its NoiseSchedule, den.noise")
        return self._plan(self._grid(noise))

    def _plan(self, points: Grid) -> Plan:
        plan = make_plan(self.solver, points, **self.options)
        return plan if self.callback is None else plan.with_denoised()

    def _grid(self, noise: NoiseSchedule, steps: int | None = None) -> Grid:
        return grid(noise, steps or self.steps, sigmas=self.sigmas, timesteps=self.timesteps)

    def _exposed(self, den: Denoiser) -> bool:
        """Whether nothing but the grid keeps the network's errors from growing near alpha = 0."""
        return den.prediction == "epsilon" and self.clip is None and self.threshold is None

    def _start_of(self, den: Denoiser) -> Grid:
        """The grid for a denoiser: by default without the levels where the errors of an exposed one explode."""
        points = self._grid(den.noise)
        if self._exposed(den) and self.sigmas is None and self.timesteps is None and den.noise.kind == "vp":
            later = den.noise.up_to(_START)
            points = replace(self._grid(later, self.steps and min(self.steps, later.steps)), noise=den.noise)
        return points

    def _points(self, den: Denoiser) -> Grid:
        """The grid for a denoiser, with a warning where a step of it makes too much of the network's errors."""
        points = self._start_of(den)
        growth = den.error_growth(points) if self._exposed(den) else 0.0
        if growth > _GROWTH:
            warnings.warn(
                f"prediction: got 'epsilon' on a grid of which one step multiplies the network's error by {growth:.0f}, supported: clip= "
                f"or threshold= where the range of the data is known, a start at sigma <= {_START:.0f}, smaller steps (docs/clipping.md)",
                stacklevel=4,
            )
        return points

    def _scales(self, plan: Plan) -> list[Scale]:
        scale = self.guidance_scale
        if callable(scale):
            return [arguments.scale_of(scale(plan.noise.sigma_of(row.point))) for row in plan.rows]
        return [arguments.scale_of(scale)] * len(plan.rows)

    def _guided(self, scales: Sequence[Scale]) -> bool:
        """Whether any evaluation of the run is guided, where those of its plan have these scales."""
        return any(map(_guides, scales))

    @property
    def _run(self) -> type[Run]:
        return Run

    @torch.no_grad()
    def __call__(
        self,
        den: Denoiser,
        shape: Sequence[int],
        *,
        seeds: Seeds = None,
        generator: Generators = None,
        cond: Condition = None,
        uncond: Condition = None,
        init: Tensor | None = None,
        latent: Tensor | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> Tensor:
        """Draw samples of ``shape`` (B, \\*sample); returns them in the state's dtype.

        ``seeds``: B integers in [0, 2^63) (a list, a range or an int64 tensor), one per sample: sample i depends on its own seed alone.
        None draws them from torch's CPU generator; `last_seeds` reports them. ``generator``: draw all noise with torch instead, from one
        generator for the batch or from a list with one for each sample.
        ``cond``, ``uncond``: what `Denoiser` passes to the network, for the B samples; with guidance both halves run as one batch of 2B,
        the unconditional half first. A mapping may hold dicts, lists and tuples of tensors, which are stacked leaf by leaf.
        ``init`` (B, \\*sample): start from alpha init + sigma noise at the grid's first point. ``latent``: start from this state, as it is.
        ``known`` and ``mask`` in [0, 1], which broadcasts to the shape: inpainting. The denoised prediction becomes
        mask d + (1 - mask) known before the solver sees it, so that where mask is 0 the sample ends as ``known``.
        ``device``: where to run; default: that of the network's first parameter that is not on "meta".
        Raises ValueError for bad arguments (TypeError for a network without its `Denoiser`), before anything is drawn, and
        FloatingPointError naming the sample and the evaluation.
        """
        arguments.check_denoiser(den)
        shape, device = arguments.check_shape(shape), arguments.device_of(den, device, self.impl)
        points = self._points(den)
        plan = self._plan(points)
        plan = plan.without_uncond() if uncond is None else plan.with_uncond_slot()
        scales = self._scales(plan)
        guided = self._guided(scales) or plan.uncond_slot is not None
        tensors = {"init": init, "latent": latent, "known": known}
        self._check_call(shape, device, seeds, generator, (cond, uncond), tensors, mask, guided)
        arguments.check_scales(scales, shape[0])
        generators = arguments.generators_of(generator, shape[0])
        spans = intervals(plan, points.point(points.steps)) if self.brownian else None
        seed_values = None if generators is not None else arguments.seed_values(seeds, shape[0])
        self.last_seeds = None if seed_values is None else seed_values.tolist()
        both = conditions.stack(uncond, cond, shape[0]) if guided else cond
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype, device=device)
        if any(row.learned for row in plan.rows) and den.variance is None:
            raise ValueError("variance: got 'learned' for a network that returns none, supported: a Denoiser with variance=")
        deviations = _deviations(plan, points.point(points.steps))
        if generators is not None or spans is not None or deviations is not None:
            plan = plan.with_noise_slot()
        call = _Call(shape, device, seed_values, generators, spans, deviations, guided, (cond, both), tensors, mask)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            run = self._run(self, den, plan, scales, call)
            if self.capture:
                if self._recorded is not None and self._recorded.fits(run):
                    self._recorded.adopt(run)
                else:
                    self._recorded = run
                run = self._recorded
            return run.samples()

    def _check_call(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        seeds: Seeds,
        generator: Generators,
        conds: tuple[Condition, Condition],
        tensors: Mapping[str, Tensor | None],
        mask: Tensor | None,
        guided: bool,
    ) -> None:
        if seeds is not None and generator is not None:
            raise ValueError("generator: got one together with seeds, supported: one of the two")
        if self.brownian and generator is not None:
            raise ValueError("generator: got one with brownian=True, supported: seeds, because a generator draws in order")
        for name, condition in zip(("cond", "uncond"), conds, strict=True):
            conditions.check_condition(name, condition)
        if guided and conds[1] is None:
            raise ValueError(f"uncond: got None with guidance_scale {self.guidance_scale}, supported: the unconditional half's condition")
        arguments.check_tensors(shape, tensors)
        if tensors["init"] is not None and tensors["latent"] is not None:
            raise ValueError("latent: got one together with init, supported: one of the two")
        if self.solver in ("ddim_inverse", ddim_inverse) and tensors["latent"] is None:
            raise ValueError(f"latent: got None for 'ddim_inverse', supported: what to invert, a tensor of shape {shape}")
        if (tensors["known"] is None) != (mask is None):
            raise ValueError(
                f"mask: got {'None' if mask is None else 'one'} {'with' if mask is None else 'without'} known, supported: both or none"
            )
        if mask is not None:
            arguments.check_mask(mask, shape)
        if _CHANNELS_LAST.get(self.memory_format, len(shape)) != len(shape):
            raise ValueError(f"memory_format: got {self.memory_format} for {len(shape)} dimensions, supported: {_CHANNELS_LAST}")
        if self.capture and device.type != "cuda":
            raise ValueError(f"capture: got True on {device.type!r}, supported: CUDA devices, because it records a CUDA graph")
        if self.capture and self.impl != "fused":
            raise ValueError("capture: got True with impl='reference', supported: 'fused', because the reference reads rows on the host")


@dataclass(frozen=True)
class _Call:
    """What one call of a sampler asks for."""

    shape: tuple[int, ...]
    device: torch.device
    seeds: Tensor | None
    generator: torch.Generator | tuple[torch.Generator, ...] | None
    spans: list[tuple[float, float]] | None  # of every row, the levels whose Brownian increment is its noise
    deviations: list[tuple[float, float]] | None  # of every row, the logarithms of the standard deviations that a network chooses between
    guided: bool  # whether any evaluation takes both halves
    conditions: tuple[Condition, Condition]  # of the conditional half, and of both
    tensors: Mapping[str, Tensor | None]  # init, latent, known
    mask: Tensor | None


class Run:
    """The buffers of one call and the loop over them. Every buffer is written in place, so that a captured step can be replayed."""

    def __init__(
        self,
        sampler: Sampler,
        den: Denoiser,
        plan: Plan,
        scales: Sequence[Scale],
        call: _Call,
    ) -> None:
        shape, device, mask = call.shape, call.device, call.mask
        self.sampler, self.den, self.device = sampler, den, device
        self.batch, self.generator, self.conditions = shape[0], call.generator, call.conditions
        self.namespace = NAMESPACES[sampler.impl]
        self.rescale, self.threshold = sampler.guidance_rescale != 0, sampler.threshold is not None
        self.denoised_slot = None if mask is None else plan.slots
        input_dtype = den.input_dtype(sampler.dtype)
        # The state itself can be the network's input, unless it is scaled, cast or doubled.
        self.separate = call.guided or input_dtype != sampler.dtype or any(den.c_in(row.point) != 1 for row in plan.rows)
        self._load(plan, scales)
        self.seeds = None if call.seeds is None else call.seeds.to(device)
        self.spans = call.spans
        self.path = None if call.spans is None or self.seeds is None else BrownianPath(self.seeds, shape, impl=sampler.impl)
        self.ring = _ring(plan.slots + (mask is not None), shape, sampler.dtype, device, sampler.memory_format)
        # (rows, 2), the logarithms of the small and the large standard deviation, where the network says which
        self.deviations = None
        if call.deviations is not None:
            self.deviations = torch.tensor(call.deviations, dtype=self.program.coef.dtype, device=device)
        self._start(shape, call.tensors["init"], call.tensors["latent"])
        self.blend: tuple[Tensor, ...] = ()  # the mask, and what is known times one less it
        known = call.tensors["known"]
        if mask is not None and known is not None:
            mask = mask.to(self.ring, copy=True)  # later calls of a recording write theirs here
            self.blend = mask, known.to(self.ring) * (1 - mask)
        self.model_input: Tensor | None = None
        if self.separate:
            copies, layout = 2 if call.guided else 1, sampler.memory_format
            self.model_input = torch.empty((copies * shape[0], *shape[1:]), dtype=input_dtype, device=device, memory_format=layout)
            self._feed()
        self.counter = torch.zeros(1, dtype=torch.int64, device=device)
        self.watch = torch.full((shape[0],), _NEVER, dtype=torch.int64, device=device)
        self.warm: set[bool] = set()  # the kinds of step, guided or not, that have run
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        if sampler.capture:
            self.conditions = conditions.clone(call.conditions[0]), conditions.clone(call.conditions[1])  # later calls write theirs here

    def _load(self, plan: Plan, scales: Sequence[Scale]) -> None:
        self.plan = plan
        both = [plan.uncond_slot in row.reads for row in plan.rows]  # rows that need both halves at any scale
        self.guided = [_guides(scale) or needed for scale, needed in zip(scales, both, strict=True)]
        self.program: Program = plan.compile(
            self.den,
            dtype=self.sampler.dtype,
            device=self.device,
            guidance=[1.0 if isinstance(scale, tuple) else scale for scale in scales],
            guidance_rescale=self.sampler.guidance_rescale,
            clip=self.sampler.clip,
            threshold=self.sampler.threshold,
            max_threshold=self.sampler.max_threshold,
            model_input=self.separate,
            denoised_slot=self.denoised_slot,
        )
        # (rows, B) of a run in which the samples have scales of their own: the scales, and which samples take the conditional half alone
        self.scales: tuple[Tensor, Tensor] | None = None
        if any(isinstance(scale, tuple) for scale in scales):
            each = [scale if isinstance(scale, tuple) else (scale,) * self.batch for scale in scales]
            alone = [[g == 1 and not needed for g in row] for row, needed in zip(each, both, strict=True)]
            wide = self.program.coef.dtype
            self.scales = torch.tensor(each, dtype=wide, device=self.device), torch.tensor(alone, device=self.device)

    def _feed(self, k: int = 0) -> None:
        """Write evaluation k's input, where no row has: before the first one, and after somebody else may have changed the state."""
        if self.model_input is not None:
            state = self.ring[0].to(self.program.coef.dtype) * self.program.c_in[k]
            self.model_input.copy_(state.repeat(len(self.model_input) // self.batch, *[1] * (state.ndim - 1)))

    def _buffers(self) -> list[Tensor]:
        """Everything that a recorded step reads or writes."""
        fixed = [self.ring[0], self.counter, self.watch, self.program.coef, self.program.index, self.program.times]
        tables = [*(self.program.denoised or ()), *(self.program.uncond or ())]
        optional = [buffer for buffer in (self.seeds, self.model_input, self.deviations, *self.blend, *tables) if buffer is not None]
        return [*fixed, *optional, *(self.scales or ()), *(tensor for cond in self.conditions for tensor in conditions.tensors_of(cond))]

    def _signature(self) -> list[object]:
        values = [*map(conditions.signature, self.conditions), self.scales is None]
        baked = [len(self.ring), self.seeds is None, self.rescale, self.threshold, values]
        return [*baked, *((b.shape, b.stride(), b.dtype, b.device) for b in self._buffers())]

    def fits(self, other: Run) -> bool:
        """Whether a step recorded here is also the other run's."""
        return self.den is other.den and self._signature() == other._signature()

    def adopt(self, other: Run) -> None:
        """Become the other run, in this one's memory."""
        for mine, theirs in zip(self._buffers(), other._buffers(), strict=True):
            mine.copy_(theirs)
        self.plan, self.guided, self.generator = other.plan, other.guided, other.generator
        self.program = replace(self.program, c_in=other.program.c_in)
        self.spans, self.path = other.spans, other.path

    def _start(self, shape: tuple[int, ...], init: Tensor | None, latent: Tensor | None) -> None:
        state, point = self.ring[0], self.plan.rows[0].point
        if latent is not None:
            state.copy_(latent)
            return
        if self.seeds is None:
            self._draw(state)
        else:
            layout = self.sampler.memory_format
            state.copy_(self.namespace.normal(self.seeds, shape, dtype=state.dtype, memory_format=layout))
        if init is None:
            state.mul_(self.plan.scale)
        else:
            state.mul_(point.sigma).add_(init.to(state) * point.alpha)  # two roundings everywhere: add_(alpha=) may fuse them on a GPU

    def _fill_noise(self, k: int, out: Tensor) -> None:
        """What row k's slot of noise holds: the Brownian path's increment over its standard deviation, or what its seeds or torch draw."""
        if self.path is not None and self.spans is not None:
            a, b = self.spans[k]
            out.copy_(self.path(a, b).mul_(1 / math.sqrt(a - b)))
        elif self.seeds is not None:
            out.copy_(self.namespace.normal(self.seeds, out.shape, draw=self.plan.rows[k].draw, dtype=out.dtype))
        else:
            self._draw(out)

    def _draw(self, out: Tensor) -> None:
        """Normal noise of torch's: of one generator at once, or of each sample's own."""
        assert self.generator is not None
        parts = (
            [(self.generator, out)] if isinstance(self.generator, torch.Generator) else [*zip(self.generator, out.split(1), strict=True)]
        )
        for generator, part in parts:
            part.copy_(torch.randn(part.shape, generator=generator, device=generator.device, dtype=part.dtype))

    def _step(self, guided: bool) -> None:
        """Evaluate the network and execute the row the counter points at. Nothing here depends on the row."""
        x = self.ring[0] if self.model_input is None else self.model_input
        if self.model_input is not None and not guided:
            x = x[-self.batch :]  # the conditional half
        t = self.program.times.index_select(0, self.counter).expand(len(x))
        before = versions(self.ring)
        out = self.den.evaluate(x, t, self.conditions[guided])
        if self.model_input is None and versions(self.ring) != before:
            raise ValueError("net: wrote into its input, which is the state of the run, supported: networks that leave it as it is")
        if self.den.variance is not None:
            out, variance = out.chunk(2, 1)
            if self.deviations is not None:
                self._scale_noise(variance[-self.batch :])
        shaping = {"rescale": guided and self.rescale, "threshold": self.threshold}
        if guided and self.program.uncond is not None:
            self._execute(out[: self.batch], self.program.uncond)
        if guided and self.scales is not None:
            out, shaping["rescale"] = self._combine(out, *self.scales), False
        if self.program.denoised is not None:
            self._execute(out, self.program.denoised, **shaping)
            mask, kept = self.blend
            out, shaping = self.ring[-1].mul_(mask).add_(kept), {}
        rows = self.program.coef, self.program.index
        self._execute(out, rows, seeds=self.seeds, model_input=self.model_input, watch=self.watch, **shaping)
        self.counter += 1

    def _combine(self, out: Tensor, scales: Tensor, alone: Tensor) -> Tensor:
        """Both halves with every sample's own scale, in the kernel's arithmetic (docs/solver-step.md): each sample's bits are those of a
        run at its scale.
        """
        uncond, cond = out.to(scales.dtype).chunk(2)
        g, only_cond = (table.index_select(0, self.counter).view(-1, *[1] * (cond.ndim - 1)) for table in (scales, alone))
        mixed = (cond - uncond).mul_(g).add_(uncond)
        if self.rescale and mixed.numel():
            phi = float(torch.tensor(self.sampler.guidance_rescale, dtype=scales.dtype))
            factor = rescale_factor(cond, mixed, phi, layout_of(self.ring[0])).to(scales.dtype)
            mixed.mul_(factor.view(g.shape))
        return torch.where(only_cond, cond, mixed)

    def _scale_noise(self, variance: Tensor) -> None:
        """Give the noise the standard deviation that the network says (Nichol and Dhariwal 2021, equation 15)."""
        assert self.deviations is not None and self.plan.noise_slot is not None
        variance = variance.to(self.deviations.dtype)
        if self.den.variance == "learned":
            log_std = variance * 0.5
        else:
            small, large = self.deviations.index_select(0, self.counter)[0]
            share = (variance + 1) * 0.5
            log_std = share * large + (1 - share) * small
        self.ring[self.plan.noise_slot].mul_(log_std.exp())

    def _execute(self, out: Tensor, table: Table, **options: Any) -> None:
        self.namespace.solver_step_(self.ring, out, *table, self.counter, **options)

    def _captured_step(self, guided: bool) -> None:
        """The first step of a kind runs as it is and warms everything up, the second is recorded, and all from it on are replayed."""
        if guided not in self.warm:
            self.warm.add(guided)
            self._step(guided)
            return
        if guided not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step(guided)
            self.graphs[guided] = graph
        self.graphs[guided].replay()

    def samples(self) -> Tensor:
        rows = self.plan.rows
        for k in _bar(range(len(rows)), self.sampler.progress):
            row = rows[k]
            if self.plan.noise_slot in row.reads:
                self._fill_noise(k, self.ring[self.plan.noise_slot])
            if self.sampler.capture:
                self._captured_step(self.guided[k])
            else:
                self._step(self.guided[k])
            if self.sampler.callback is not None and row.denoised is not None:
                self._call_back(k, row.point, row.denoised)
                if k + 1 < len(rows):
                    self._feed(k + 1)  # whatever the callback did to the state reaches the network
            if self.sampler.check_every and (k + 1) % self.sampler.check_every == 0:
                self._check_finite()
        self._check_finite()
        return self.ring[0].clone()

    def _call_back(self, step: int, point: Point, denoised: int) -> None:
        assert self.sampler.callback is not None
        d = self.ring[denoised]
        if denoised == 0 or any(denoised in row.reads for row in self.plan.rows):
            d = d.clone()  # the state or the solver's history: what an edit of it would change depends on the solver
        returned = self.sampler.callback(step, self.den.noise.sigma_of(point), self.ring[0], d)  # type: ignore[func-returns-value]
        if returned is not None:
            raise TypeError(f"callback: returned a {type(returned).__name__}, supported: None")

    def _check_finite(self) -> None:
        watch = self.watch.cpu()
        if (watch != _NEVER).any():
            sample = int(watch.argmin())
            k = int(watch[sample])
            seed = "" if self.seeds is None else f" (seed {int(self.seeds[sample])})"
            sigma = self.den.noise.sigma_of(self.plan.rows[k].point)
            raise FloatingPointError(
                f"sample {sample}{seed}: not finite after evaluation {k + 1} of {len(self.plan.rows)}, at sigma {sigma:g}; "
                f"{int((watch != _NEVER).sum())} of {self.batch} samples are not finite"
            )


def _guides(scale: Scale) -> bool:
    """Whether a row at this scale takes both halves."""
    return any(g != 1 for g in scale) if isinstance(scale, tuple) else scale != 1


def _deviations(plan: Plan, end: Point) -> list[tuple[float, float]] | None:
    """For every row the logarithms of its small and its large standard deviation, where a plan lets the network choose."""
    if not any(row.learned for row in plan.rows):
        return None
    steps = zip(plan.rows, [*plan.rows[1:], Row(end, {})], strict=True)
    pairs = [(posterior_std(p.point, q.point), large_std(p.point, q.point)) if p.learned else (1.0, 1.0) for p, q in steps]
    return [(math.log(small), math.log(large)) for small, large in pairs]


def _ring(slots: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: torch.memory_format) -> Tensor:
    if layout == torch.contiguous_format:
        return torch.empty((slots, *shape), dtype=dtype, device=device)
    return torch.empty((slots, shape[0], *shape[2:], shape[1]), dtype=dtype, device=device).movedim(-1, 2)


def _bar(rows: range, progress: bool) -> Any:
    if not progress:
        return rows
    from tqdm import tqdm

    return tqdm(rows, disable=None, leave=False)  # None: only on a terminal
