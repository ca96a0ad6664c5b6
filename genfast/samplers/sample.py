"""Sampling: a plan, a denoiser, one kernel launch per evaluation of the network."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from genfast import ops, reference
from genfast.schedules import Grid, NoiseSchedule, Point, Sigmas, grid

from .brownian import BrownianPath, intervals
from .denoiser import Condition, Denoiser
from .first_order import ddim_inverse
from .plan import Plan, Program, Row, Table
from .rows import large_std, posterior_std
from .solvers import Solver, find_solver, make_plan

Callback = Callable[[int, float, Tensor, Tensor], None]
Seeds = Sequence[int] | Tensor | None

_NAMESPACES: dict[str, ModuleType] = {"fused": ops, "reference": reference}
_CHANNELS_LAST = {torch.channels_last: 4, torch.channels_last_3d: 5}
_NEVER = torch.iinfo(torch.int64).max  # what the watch holds while every state is finite


class Sampler:
    """A solver, a grid and the options of a run; calling it on a `Denoiser` draws samples.

    ``solver``: a name in `genfast.samplers.SOLVERS`, or a function from a `Grid` to rows; ``options`` are its own (``eta=``, ``order=``).
    ``steps``, ``sigmas``, ``timesteps``: the grid, as `genfast.schedules.grid` takes them.
    ``guidance_scale``: g of uncond + g (cond - uncond) (Ho and Salimans 2022), or a function of sigma (sigma / alpha; for flows t), such as
    a guidance interval. Where it is 1 the unconditional half is not evaluated. ``guidance_rescale``: phi of Lin et al. 2024, equation 16.
    ``clip``: clamp the denoised prediction to [-clip, clip]. ``threshold``: dynamic threshold at this quantile (Saharia et al. 2022),
    to at most ``max_threshold``.
    ``brownian``: the noise of the rows is the increments of one Brownian motion over sigma / alpha per seed (`BrownianPath`), so that grids
    which share points share its noise there; not for solvers that go back to more noise.
    ``impl``: "fused" (kernels) or "reference" (plain PyTorch); both give the same bits.
    ``callback``: called as ``callback(step, sigma, x, denoised)`` after every evaluation, with the state it led to and the denoised
    prediction at ``sigma``, both (B, \\*sample) views that the next evaluation overwrites. It returns None.
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
        guidance_scale: float | Callable[[float], float] = 1.0,
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
        if impl not in _NAMESPACES:
            raise ValueError(f"impl: got {impl!r}, supported: fused, reference")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: got {clip}, supported: None or a number above 0")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, supported: None or a quantile in (0, 1]")
        if not max_threshold >= 1:
            raise ValueError(f"max_threshold: got {max_threshold}, supported: a number of at least 1")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale: got {guidance_rescale}, supported: a number in [0, 1]")
        if not (callable(guidance_scale) or math.isfinite(guidance_scale)):
            raise ValueError(f"guidance_scale: got {guidance_scale}, supported: a finite number or a function of sigma")
        if check_every is not None and check_every < 1:
            raise ValueError(f"check_every: got {check_every}, supported: None or an integer of at least 1")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, supported: a floating point dtype")
        if memory_format not in (torch.contiguous_format, *_CHANNELS_LAST):
            raise ValueError(f"memory_format: got {memory_format}, supported: contiguous_format, channels_last, channels_last_3d")
        self.solver, self.options = solver, options
        self.steps, self.sigmas, self.timesteps = steps, sigmas, timesteps
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.clip, self.threshold, self.max_threshold = clip, threshold, max_threshold
        self.brownian = brownian
        self.impl, self.progress, self.callback = impl, progress, callback
        self.capture, self.check_every = capture, check_every
        self.dtype, self.memory_format = dtype, memory_format
        self.last_seeds: list[int] | None = None  # of the latest call; None after a call with a generator
        self._recorded: Run | None = None

    def plan(self, noise: NoiseSchedule) -> Plan:
        """The plan this sampler executes on a process: inspect it with `Plan.table` and `Plan.plot`."""
        return self._plan(self._grid(noise))

    def _plan(self, points: Grid) -> Plan:
        plan = make_plan(self.solver, points, **self.options)
        return plan if self.callback is None else plan.with_denoised()

    def _grid(self, noise: NoiseSchedule) -> Grid:
        return grid(noise, self.steps, sigmas=self.sigmas, timesteps=self.timesteps)

    def _scales(self, plan: Plan) -> list[float]:
        scale = self.guidance_scale
        return [float(scale(plan.noise.sigma_of(row.point)) if callable(scale) else scale) for row in plan.rows]

    def _guided(self, scales: list[float]) -> bool:
        """Whether any evaluation of the run is guided, where those of its plan have these scales."""
        return any(g != 1 for g in scales)

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
        generator: torch.Generator | None = None,
        cond: Condition = None,
        uncond: Condition = None,
        init: Tensor | None = None,
        latent: Tensor | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw samples of ``shape`` (B, \\*sample); returns them in the state's dtype.

        ``seeds``: B integers in [0, 2^63) (a list, a range or an int64 tensor), one per sample: sample i depends on its own seed alone.
        None draws them from torch's CPU generator; `last_seeds` reports them. ``generator``: draw all noise with torch instead.
        ``cond``, ``uncond``: what `Denoiser` passes to the network, for the B samples; with guidance both halves run as one batch of 2B,
        the unconditional half first.
        ``init`` (B, \\*sample): start from alpha init + sigma noise at the grid's first point. ``latent``: start from this state, as it is.
        ``known`` and ``mask``, which broadcasts to the shape: inpainting. The denoised prediction becomes mask d + (1 - mask) known
        before the solver sees it, so that where mask is 0 the sample ends as ``known``.
        Raises ValueError for bad arguments, before anything is drawn, and FloatingPointError naming the sample and the evaluation.
        """
        shape, device = _check_shape(shape), _device(den, device)
        points = self._grid(den.noise)
        plan = self._plan(points)
        plan = plan.without_uncond() if uncond is None else plan.with_uncond_slot()
        scales = self._scales(plan)
        guided = self._guided(scales) or plan.uncond_slot is not None
        tensors = {"init": init, "latent": latent, "known": known}
        self._check_call(shape, device, seeds, generator, uncond, tensors, mask, guided)
        spans = intervals(plan, points.point(points.steps)) if self.brownian else None
        seed_values = None if generator is not None else _seed_values(seeds, shape[0])
        self.last_seeds = None if seed_values is None else seed_values.tolist()
        both = _stack(uncond, cond, shape[0]) if guided else cond
        if 0 in shape:
            return torch.empty(shape, dtype=self.dtype, device=device)
        if any(row.learned for row in plan.rows) and den.variance is None:
            raise ValueError("variance: got 'learned' for a network that returns none, supported: a Denoiser with variance=")
        deviations = _deviations(plan, points.point(points.steps))
        if generator is not None or spans is not None or deviations is not None:
            plan = plan.with_noise_slot()
        call = _Call(shape, device, seed_values, generator, spans, deviations, guided, (cond, both), tensors, mask)
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
        generator: torch.Generator | None,
        uncond: Condition,
        tensors: Mapping[str, Tensor | None],
        mask: Tensor | None,
        guided: bool,
    ) -> None:
        if seeds is not None and generator is not None:
            raise ValueError("generator: got one together with seeds, supported: one of the two")
        if self.brownian and generator is not None:
            raise ValueError("generator: got one with brownian=True, supported: seeds, because a generator draws in order")
        if guided and uncond is None:
            raise ValueError(f"uncond: got None with guidance_scale {self.guidance_scale}, supported: the unconditional half's condition")
        for name, tensor in tensors.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, supported: {shape}")
        if tensors["init"] is not None and tensors["latent"] is not None:
            raise ValueError("latent: got one together with init, supported: one of the two")
        if self.solver in ("ddim_inverse", ddim_inverse) and tensors["latent"] is None:
            raise ValueError(f"latent: got None for 'ddim_inverse', supported: what to invert, a tensor of shape {shape}")
        if (tensors["known"] is None) != (mask is None):
            raise ValueError(
                f"mask: got {'None' if mask is None else 'one'} {'with' if mask is None else 'without'} known, supported: both or none"
            )
        if mask is not None and not _broadcasts(mask, shape):
            raise ValueError(f"mask: got shape {tuple(mask.shape)}, supported: one that broadcasts to {shape}")
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
    generator: torch.Generator | None
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
        scales: list[float],
        call: _Call,
    ) -> None:
        shape, device, mask, conditions = call.shape, call.device, call.mask, call.conditions
        self.sampler, self.den, self.device = sampler, den, device
        self.batch, self.generator, self.conditions = shape[0], call.generator, conditions
        self.namespace = _NAMESPACES[sampler.impl]
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
            self.conditions = _clone(conditions[0]), _clone(conditions[1])  # later calls write theirs here

    def _load(self, plan: Plan, scales: list[float]) -> None:
        self.plan = plan
        self.guided = [g != 1 or plan.uncond_slot in row.reads for g, row in zip(scales, plan.rows, strict=True)]
        self.program: Program = plan.compile(
            self.den,
            dtype=self.sampler.dtype,
            device=self.device,
            guidance=scales,
            guidance_rescale=self.sampler.guidance_rescale,
            clip=self.sampler.clip,
            threshold=self.sampler.threshold,
            max_threshold=self.sampler.max_threshold,
            model_input=self.separate,
            denoised_slot=self.denoised_slot,
        )

    def _feed(self) -> None:
        """Write the first evaluation's input, which no row before it has written."""
        if self.model_input is not None:
            first = self.ring[0].to(self.program.coef.dtype) * self.program.c_in[0]
            self.model_input.copy_(first.repeat(len(self.model_input) // self.batch, *[1] * (first.ndim - 1)))

    def _buffers(self) -> list[Tensor]:
        """Everything that a recorded step reads or writes."""
        fixed = [self.ring[0], self.counter, self.watch, self.program.coef, self.program.index, self.program.times]
        tables = [*(self.program.denoised or ()), *(self.program.uncond or ())]
        optional = [buffer for buffer in (self.seeds, self.model_input, self.deviations, *self.blend, *tables) if buffer is not None]
        return [*fixed, *optional, *(value for cond in self.conditions for value in _parts(cond).values() if isinstance(value, Tensor))]

    def _signature(self) -> list[object]:
        values = [(key, v) for cond in self.conditions for key, v in _parts(cond).items() if not isinstance(v, Tensor)]
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
        assert self.generator is not None
        out.copy_(torch.randn(out.shape, generator=self.generator, device=self.generator.device, dtype=out.dtype))

    def _step(self, guided: bool) -> None:
        """Evaluate the network and execute the row the counter points at. Nothing here depends on the row."""
        x = self.ring[0] if self.model_input is None else self.model_input
        if self.model_input is not None and not guided:
            x = x[-self.batch :]  # the conditional half
        t = self.program.times.index_select(0, self.counter).expand(len(x))
        out = self.den.evaluate(x, t, self.conditions[guided])
        if self.den.variance is not None:
            out, variance = out.chunk(2, 1)
            if self.deviations is not None:
                self._scale_noise(variance[-self.batch :])
        shaping = {"rescale": guided and self.rescale, "threshold": self.threshold}
        if guided and self.program.uncond is not None:
            self._execute(out[: self.batch], self.program.uncond)
        if self.program.denoised is not None:
            self._execute(out, self.program.denoised, **shaping)
            mask, kept = self.blend
            out, shaping = self.ring[-1].mul_(mask).add_(kept), {}
        rows = self.program.coef, self.program.index
        self._execute(out, rows, seeds=self.seeds, model_input=self.model_input, watch=self.watch, **shaping)
        self.counter += 1

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
            if self.sampler.check_every and (k + 1) % self.sampler.check_every == 0:
                self._check_finite()
        self._check_finite()
        return self.ring[0].clone()

    def _call_back(self, step: int, point: Point, denoised: int) -> None:
        assert self.sampler.callback is not None
        returned = self.sampler.callback(step, self.den.noise.sigma_of(point), self.ring[0], self.ring[denoised])  # type: ignore[func-returns-value]
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


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(n) for n in shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 0:
        raise ValueError(f"shape: got {shape}, supported: (B, *sample), integers of at least 0")
    return sizes


def _deviations(plan: Plan, end: Point) -> list[tuple[float, float]] | None:
    """For every row the logarithms of its small and its large standard deviation, where a plan lets the network choose."""
    if not any(row.learned for row in plan.rows):
        return None
    steps = zip(plan.rows, [*plan.rows[1:], Row(end, {})], strict=True)
    pairs = [(posterior_std(p.point, q.point), large_std(p.point, q.point)) if p.learned else (1.0, 1.0) for p, q in steps]
    return [(math.log(small), math.log(large)) for small, large in pairs]


def _broadcasts(mask: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(mask.shape, shape)) == shape
    except RuntimeError:
        return False


def _device(den: Denoiser, device: torch.device | str | None) -> torch.device:
    if device is None and isinstance(den.net, torch.nn.Module):
        device = next((p.device for p in den.net.parameters()), None)
    return torch.device(device or "cpu")


def _seed_values(seeds: Seeds, batch: int) -> Tensor:
    if seeds is None:
        return torch.randint(0, 2**63 - 1, (batch,), dtype=torch.int64)
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim != 1:
            raise ValueError(f"seeds: got {seeds.dtype} of shape {tuple(seeds.shape)}, supported: torch.int64 ({batch},)")
        values = seeds.tolist()
    else:
        try:
            values = [operator.index(seed) for seed in seeds]
        except TypeError:
            raise ValueError(f"seeds: got {seeds!r}, supported: {batch} integers, one per sample, or None") from None
    if len(values) != batch:
        raise ValueError(f"seeds: got {len(values)}, supported: {batch}, one per sample")
    wrong = [seed for seed in values if not 0 <= seed < 2**63]
    if wrong:
        raise ValueError(f"seeds: got {wrong[0]}, supported: integers in [0, 2^63)")
    return torch.tensor(values, dtype=torch.int64)


def _stack(uncond: Condition, cond: Condition, batch: int) -> Condition:
    """Both halves' condition as one, the unconditional first. Tensors are stacked along the batch; anything else must be the same."""
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return _stack_tensors("cond", uncond, cond, batch)
    if not (isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys()):
        raise ValueError(f"uncond: got {_kind(uncond)} with cond {_kind(cond)}, supported: two tensors, or two mappings with the same keys")
    stacked: dict[str, Any] = {}
    for key, value in cond.items():
        if isinstance(value, Tensor) and isinstance(uncond[key], Tensor):
            stacked[key] = _stack_tensors(f"cond[{key!r}]", uncond[key], value, batch)
        elif type(value) is type(uncond[key]) and value == uncond[key]:
            stacked[key] = value
        else:
            raise ValueError(f"uncond[{key!r}]: got {uncond[key]!r} with cond {value!r}, supported: two tensors, or equal values")
    return stacked


def _parts(cond: Condition) -> Mapping[str, Any]:
    return cond if isinstance(cond, Mapping) else {"": cond}


def _clone(cond: Condition) -> Condition:
    if isinstance(cond, Mapping):
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in cond.items()}
    return None if cond is None else cond.clone()


def _kind(cond: Condition) -> str:
    return f"a mapping of {sorted(cond)}" if isinstance(cond, Mapping) else f"a {type(cond).__name__}"


def _stack_tensors(name: str, uncond: Tensor, cond: Tensor, batch: int) -> Tensor:
    if cond.shape[:1] != (batch,):
        raise ValueError(f"{name}: got shape {tuple(cond.shape)}, supported: ({batch}, ...), one entry per sample")
    if uncond.shape != cond.shape:
        if uncond.shape[1:] != cond.shape[1:] or uncond.shape[:1] != (1,):
            raise ValueError(f"un{name}: got shape {tuple(uncond.shape)}, supported: {tuple(cond.shape)}, or 1 for its batch")
        uncond = uncond.expand_as(cond)
    return torch.cat([uncond, cond])


def _ring(slots: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: torch.memory_format) -> Tensor:
    if layout == torch.contiguous_format:
        return torch.empty((slots, *shape), dtype=dtype, device=device)
    return torch.empty((slots, shape[0], *shape[2:], shape[1]), dtype=dtype, device=device).movedim(-1, 2)


def _bar(rows: range, progress: bool) -> Any:
    if not progress:
        return rows
    from tqdm import tqdm

    return tqdm(rows, disable=None, leave=False)  # None: only on a terminal
