"""Stock scheduler classes whose step is one kernel launch.

A fused class is a subclass of the installed stock class: configuration, tables, timesteps and attributes are diffusers' own. On the first
step of a trajectory the stock step is traced (trace.py) into a table of coefficient rows (table.py); that step and every one after it
execute their row. What a row cannot hold runs the stock step, and `FusedScheduler.fallback` says why.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from genfast.ops import _autograd, _backend, solver_step
from genfast.ops._checks import check_seeds
from genfast.reference.solver_step import layout_of
from genfast.samplers import BrownianPath

from .table import Table, build
from .trace import NotLinear, trace

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OWN = ("_run", "_index", "fallback", "seeds")  # what a fused class adds to the stock class's attributes
_SOURCES = ("timesteps", "sigmas", "_internal_dict")  # what a step depends on, besides `set_timesteps`
_MAX_TABLES = 64
_tables: OrderedDict[Any, Table | str] = OrderedDict()  # by what they were made from; a string says why there is none
_tables_lock = threading.Lock()


@dataclass(eq=False)
class Run:
    """One trajectory under way: a table, the values kept between its steps, and where it is."""

    table: Table
    begin: int
    times: list[float]  # of its steps, on the host
    timesteps: Tensor  # the same, on the device
    scales: Tensor  # the factors of scale_model_input, on the device
    kind: tuple[Any, ...]  # what `step` was called with, see _kind
    work: torch.dtype
    layout: torch.memory_format
    ring: list[Tensor]
    seeds: Tensor | None
    guided: bool
    counter: Tensor  # (1,) int64 on the device: the next row
    sources: tuple[Any, ...]  # the attributes that the table was made from
    path: BrownianPath | None = None  # where the noise of seeds comes from, if not from the kernel
    k: int = 0  # the next step, as far as the host knows
    on_device: bool = False  # deferred steps have run: only the counter knows the next one
    differentiable: bool = False  # the ring is part of an autograd graph, and no longer written in place

    def __getstate__(self) -> dict[str, Any]:
        # torch.save cannot write a memory format.
        return {**self.__dict__, "layout": str(self.layout).removeprefix("torch.")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, layout=getattr(torch, state["layout"]))

    def execute(self, k: int, model_output: Tensor, sample: Tensor, noise: Tensor | None) -> list[Tensor]:
        """Step ``k``, whose first row the counter points at: new tensors for the fields that it returns."""
        table = self.table
        cond, uncond = self._halves(model_output)
        x = self._worked(sample)
        noise = None if noise is None else self._worked(noise)
        if self.differentiable or _autograd.wanted((sample, model_output)):
            fields = self._differentiable(k, cond, uncond, x, noise)
        else:
            with torch._C._AutoDispatchBelowAutograd():  # no input asks for a derivative
                fields = self._launch(table.count[k], len(table.returned[k]), cond, uncond, x, noise)
        if table.launches > 1:
            self.counter += table.launches - table.count[k]
        self.k = k + 1
        return self._cast(table.returned[k], fields)

    def execute_any(self, model_output: Tensor, sample: Tensor) -> list[Tensor]:
        """The step that the counter points at, by the same operations whichever it is."""
        cond, uncond = self._halves(model_output)
        returned = self.table.returned[0]
        fields = self._launch(self.table.launches, len(returned), cond, uncond, self._worked(sample), None)
        return self._cast(returned, fields)

    def _cast(self, returned: Sequence[int], fields: list[Tensor]) -> list[Tensor]:
        dtypes = self.table.trace.dtypes
        return [t if dtypes[field] is self.work else t.to(dtypes[field]) for field, t in zip(returned, fields, strict=True)]

    def _launch(self, launches: int, returned: int, cond: Tensor, uncond: Tensor | None, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        table = self.table
        fields = [torch.empty_like(x) for _ in range(returned)]
        slots = [x, *self.ring, *([x if noise is None else noise] if table.noisy else []), *fields]
        for _ in range(launches):
            _backend.namespace.solver_step_slots_(
                slots, cond, uncond, table.coef, table.index, self.counter, self.seeds, None, None, False, table.threshold
            )
            self.counter += 1
        return fields

    def _differentiable(self, k: int, cond: Tensor, uncond: Tensor | None, x: Tensor, noise: Tensor | None) -> list[Tensor]:
        table = self.table
        slots = dict(enumerate([x, *self.ring, *([x if noise is None else noise] if table.noisy else [])]))
        for row in range(k * table.launches, k * table.launches + table.count[k]):
            _, outputs, terms, *used = table.index[row].tolist()
            written = solver_step(
                [x, *(slots[slot] for slot in used[:terms])],
                cond,
                table.coef[row],
                table.index[row],
                uncond=uncond,
                seeds=self.seeds,
                outputs=outputs,
                threshold=table.threshold,
            )
            slots.update(zip(used[6 : 6 + outputs], written, strict=True))
        self.counter += table.count[k]
        self.ring, self.differentiable = [slots[1 + j] for j in range(table.ring)], True
        first = 1 + table.ring + table.noisy
        return [slots[first + j] for j in range(len(table.returned[k]))]

    def _halves(self, model_output: Tensor) -> tuple[Tensor, Tensor | None]:
        if model_output.dtype in (torch.bfloat16, torch.float16) and self.work == torch.float64:
            model_output = model_output.float()  # exact; the kernel widens from there
        if not self.guided:
            return model_output.contiguous(memory_format=self.layout), None
        uncond, cond = model_output.contiguous(memory_format=self.layout).chunk(2)
        return cond, uncond

    def _worked(self, t: Tensor) -> Tensor:
        if t.dtype is not self.work:
            t = t.to(self.work)
        return t.contiguous(memory_format=self.layout)


class FusedScheduler:
    """In front of a stock scheduler class: `step`, `scale_model_input`, `add_noise` and `scale_noise` by genfast.

    `step` takes two more keywords than stock's. ``seeds`` (one integer per sample; default: the attribute of that name) makes the noise
    genfast's own, sample by sample (docs/noise.md); without it, the noise is torch's, drawn as the stock class draws it.
    ``guidance_scale`` takes a model output (2B, \\*sample), the unconditional half first, and applies classifier-free guidance in the same
    launch. Where the kernel cannot execute a step the stock one runs; ``fallback`` is then the reason, else None.
    """

    stock: ClassVar[Any]
    traced: ClassVar[Any]  # the stock class, or one of equal steps that is quicker to trace
    pathwise: ClassVar[bool] = False  # the noise of a step comes from a path
    stateless: ClassVar[bool] = False  # a step depends on its timestep alone
    timed: ClassVar[bool] = False  # a step reads its timestep even where it counts its steps
    scaled: ClassVar[bool] = False  # scale_model_input is not the identity
    lasting: ClassVar[str] = ""  # an attribute, a list of tensors, that a trajectory leaves to the next one
    extra_names: ClassVar[tuple[str, ...]]  # the parameters of step after sample

    seeds: Sequence[int] | Tensor | None = None
    fallback: str | None = None
    _run: Run | None = None
    _index: int | None = None

    @property
    def _step_index(self) -> int | None:
        run = self._run
        return self._index if run is None or self.stateless else run.begin + int(run.counter) // run.table.launches

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        run = self._run
        if value is not None and run is not None:
            if run.table.ring and 0 < run.k < len(run.times) and value != self._step_index:
                raise ValueError(f"_step_index: got {value}, supported: {self._step_index}, because the steps keep tensors, and None")
            run.k = value - run.begin
            run.counter.fill_(run.k * run.table.launches)
        if value is None and run is not None and self.lasting and (k := int(run.counter) // run.table.launches):
            held = run.table.trace.steps[k - 1].held
            kept = [run.ring[run.table.slots[number] - 1] for (name, _), number in held.items() if name == self.lasting]
            setattr(self, self.lasting, kept)
        self._index = value
        if value is None:
            self._run, self.fallback = None, None

    def __reduce__(self) -> tuple[Any, ...]:
        # The class bears the stock class's name and module, so that what is saved loads where genfast is absent.
        return _rebuild, (type(self).__name__, self.__dict__)

    def prepare(self, sample: Tensor, model_dtype: torch.dtype | None = None, **options: Any) -> None:
        """Make the tables and buffers for steps on tensors like ``sample`` (B, \\*sample), so that none is left to make in `step`.

        Needed before `step` is compiled or captured in a CUDA graph without a first step outside. ``options`` are those of `step`.
        Raises ValueError where the kernel cannot execute the steps.
        """
        seeds, guidance = options.pop("seeds", self.seeds), options.pop("guidance_scale", None)
        copies = 1 if guidance is None else 2
        model_output = sample.new_empty((copies * len(sample), *sample.shape[1:]), dtype=model_dtype or sample.dtype)
        timestep = self.timesteps[getattr(self, "begin_index", None) or 0]  # type: ignore[attr-defined]
        if "is_scale_input_called" in self.__dict__:
            self.is_scale_input_called = True  # it is called in the graph
        if self._start(model_output, timestep, sample, options, seeds, guidance) is None:
            raise ValueError(f"step: got {self.fallback}, supported here: steps that the kernel can execute")

    def _fused_step(self, model_output: Any, timestep: Any, sample: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        seeds, guidance = options.pop("seeds", self.seeds), options.pop("guidance_scale", None)
        if args:
            names = self.extra_names[: len(args)]
            if len(names) < len(args) or not options.keys().isdisjoint(names):
                return self.stock.step(self, model_output, timestep, sample, *args, **options)  # raises TypeError
            options.update(zip(names, args, strict=True))
        if not options.keys() <= set(self.extra_names):
            return self.stock.step(self, model_output, timestep, sample, **options)  # raises TypeError
        traced = dict(options)
        return_dict, generator = traced.pop("return_dict", True), traced.pop("generator", None)
        given = traced.pop("variance_noise", None)
        seeds = seeds if given is None else None
        run = self._run
        if run is None or not self._goes_on(run) or run.kind != _kind(model_output, timestep, sample, traced, seeds, guidance):
            run = self._start(model_output, timestep, sample, traced, seeds, guidance)
        if _deferred(sample):
            return self._deferred_step(run, model_output, timestep, sample, return_dict)
        k = None if run is None or (self.stateless and given is not None and generator is not None) else self._position(run, timestep)
        if run is None or k is None:
            if guidance is not None:
                uncond, cond = model_output.chunk(2)
                model_output = uncond + guidance * (cond - uncond)
            with nullcontext() if seeds is None else _NoNoise(self.fallback):
                return self.stock.step(self, model_output, timestep, sample, **options)
        noise = (
            self._noise(run, k, model_output, sample, generator) if given is None else given.expand_as(sample) if run.table.noisy else None
        )
        return _result(run.table, run.table.returned[k], run.execute(k, model_output, sample, noise), return_dict)

    def _deferred_step(self, run: Run | None, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool) -> Any:
        """For a compiler or a CUDA graph: nothing depends on which step it is but the device's counter."""
        if run is None or run.table.noisy or len(set(run.table.returned)) > 1:
            reason = self.fallback if run is None else "noise from a torch.Generator" if run.table.noisy else "steps of different results"
            where = "under torch.compile and in CUDA graphs"
            raise ValueError(f"step: got {reason} {where}, supported there: seeds= and steps that the kernel can execute")
        if _autograd.wanted((sample, model_output, *run.ring)):
            raise ValueError("step: got a tensor that requires grad under torch.compile, supported: tensors without, or the step outside")
        run.on_device = True
        if self.stateless:
            match = run.timesteps == timestep
            row = torch.where(match.any(), match.to(torch.uint8).argmax(), len(match)) * run.table.launches
            run.counter.copy_(row)
        return _result(run.table, run.table.returned[0], run.execute_any(model_output, sample), return_dict)

    def _position(self, run: Run, timestep: Any) -> int | None:
        """Which of the run's steps this is; None: one that only the stock class knows."""
        if not self.stateless:
            if run.on_device:
                run.k, run.on_device = int(run.counter) // run.table.launches, False
            if run.k < len(run.times) and not (self.timed and self._time(run, timestep) != run.times[run.k]):
                return run.k
            if run.table.ring and run.k < len(run.times):
                raise ValueError(f"timestep: got {timestep}, supported: {run.times[run.k]}, the next one of this trajectory")
            return None
        try:
            k = run.times.index(self._time(run, timestep))
        except ValueError:
            return None
        run.counter.fill_(k * run.table.launches)
        return k

    def _time(self, run: Run, timestep: Any) -> float:
        """The timestep on the host; for an element of ``timesteps`` on a GPU, without waiting for the device."""
        if isinstance(timestep, Tensor) and timestep.is_cuda:
            at = _element(self.timesteps, timestep)  # type: ignore[attr-defined]
            if at is not None:
                return run.times[at - run.begin] if 0 <= at - run.begin < len(run.times) else float("nan")
        return float(timestep)

    def _noise(self, run: Run, k: int, model_output: Tensor, sample: Tensor, generator: Any) -> Tensor | None:
        """The noise of step ``k`` from torch, drawn as the stock class draws it."""
        noise = None
        if self.pathwise and run.path is None:  # the stock class makes its path, and draws its seed, in steps without noise too
            self._path(model_output, sample, generator)
        for number, draw in enumerate(run.table.trace.steps[k].draws if run.table.noisy else ()):
            if draw.levels is not None and run.path is not None:
                a, b = map(float, draw.levels)
                drawn = run.path(a, b) / abs(a - b) ** 0.5
            elif draw.levels is None:
                drawn = randn_tensor(tuple(sample.shape), generator=generator, device=model_output.device, dtype=draw.dtype)
            else:
                drawn = self._path(model_output, sample, generator)(*draw.levels).to(model_output.device)
            if number == run.table.used[k]:
                noise = drawn
        return noise

    def _path(self, model_output: Tensor, sample: Tensor, generator: Any) -> Any:
        """The function of two noise levels that the stock class takes its noise from, where it does."""
        raise NotImplementedError

    @torch.compiler.disable(reason="the first step of a trajectory makes tables on the host; call prepare(sample) before")  # type: ignore[untyped-decorator]
    def _start(
        self, model_output: Any, timestep: Any, sample: Any, options: Mapping[str, Any], seeds: Any, guidance: float | None
    ) -> Run | None:
        """Begin a trajectory, or go on with it in another form; None, and `fallback`, where the stock step has to run."""
        run, self._run = self._run, None
        if run is None and self.fallback is not None and self._index is not None:
            return None  # the stock class is under way
        kind = _kind(model_output, timestep, sample, options, seeds, guidance)
        if seeds is not None and isinstance(sample, Tensor):
            seeds = torch.as_tensor(seeds).to(sample.device)
            check_seeds(seeds, len(sample), sample.device)
        try:
            begin = 0 if self.stateless else self._begin(timestep) if run is None else run.begin
            with torch.inference_mode(False):  # a later step may be differentiable
                new = self._new_run(begin, kind, model_output, timestep, sample, options, seeds, guidance)
        except Exception as error:
            self.fallback = str(error) or type(error).__name__
            if run is not None and run.k and run.table.ring:
                self._run = run
                raise  # what earlier steps kept is not where the stock class looks for it
            self._index = None if run is None or self.stateless else run.begin + run.k
            return None
        if run is not None and not self.stateless:
            if run.k and run.table.ring and run.table.index[:, 1:].tolist() != new.table.index[:, 1:].tolist():
                self._run = run
                raise ValueError("step: got options that change what is kept between steps, supported: the same in a whole trajectory")
            if run.k and run.ring and run.ring[0].shape != sample.shape:
                self._run = run
                kept = tuple(run.ring[0].shape)
                raise RuntimeError(f"sample: got shape {tuple(sample.shape)}, supported: {kept}, the shape of what earlier steps kept")
            new.k = run.k
            new.counter.copy_(run.counter)
            if run.k:
                new.ring, new.differentiable = [new._worked(t) for t in run.ring], run.differentiable
        self._run, self.fallback = new, None
        return new

    def _sources(self) -> tuple[Any, ...]:
        return tuple(map(self.__dict__.get, _SOURCES))

    def _goes_on(self, run: Run) -> bool:
        """Whether what the table was made from is still there. Pipelines replace it, even between two steps."""
        attributes = self.__dict__
        return all(attributes.get(name) is source for name, source in zip(_SOURCES, run.sources, strict=True))

    def _begin(self, timestep: Any) -> int:
        if self._index is not None:
            return self._index
        begin = getattr(self, "_begin_index", None)
        if begin is not None:
            return int(begin)
        timesteps = self.timesteps  # type: ignore[attr-defined]
        at = _element(timesteps, timestep)
        if at is not None and timesteps.is_cuda and at == 0:
            return 0
        if hasattr(self, "index_for_timestep"):
            return int(self.index_for_timestep(timestep))
        if at is not None:
            return at  # a timestep may occur twice
        return int((timesteps == timestep).nonzero()[0])

    def _new_run(
        self,
        begin: int,
        kind: tuple[Any, ...],
        model_output: Any,
        timestep: Any,
        sample: Any,
        options: Mapping[str, Any],
        seeds: Tensor | None,
        guidance: float | None,
    ) -> Run:
        copies = 1 if guidance is None else 2
        if not (isinstance(model_output, Tensor) and isinstance(sample, Tensor)):
            raise NotLinear("a model output or a sample that is not a tensor")
        if sample.dtype not in _DTYPES or model_output.dtype not in _DTYPES:
            raise NotLinear(f"dtypes {sample.dtype} and {model_output.dtype}")
        if sample.ndim < 2 or model_output.shape != (copies * len(sample), *sample.shape[1:]) or model_output.device != sample.device:
            raise NotLinear(f"a model output of shape {tuple(model_output.shape)} for a sample of shape {tuple(sample.shape)}")
        if any(isinstance(value, Tensor) for value in options.values()):
            raise NotLinear("an option that is a tensor")
        if not (isinstance(timestep, int | float) or (isinstance(timestep, Tensor) and timestep.ndim == 0)):
            raise NotLinear("a timestep that is not one number")
        state = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        if not self.stateless:
            state |= {"_step_index": None, "_begin_index": begin}
        if "is_scale_input_called" in state:
            if not state["is_scale_input_called"]:
                message = "%s: call scale_model_input before step, so that the model sees the input it was trained on"
                logging.getLogger(self.stock.__module__).warning(message, type(self).__name__)
            state["is_scale_input_called"] = True
        table, times = self._table(
            begin, state, timestep, sample, model_output.dtype, options, seeds is not None and not self.pathwise, guidance
        )
        dtypes = {sample.dtype, *table.trace.dtypes}
        work = functools.reduce(torch.promote_types, dtypes)
        if model_output.dtype == torch.float64:
            work = torch.float64
        layout = layout_of(sample)
        x = sample.detach().to(work).contiguous(memory_format=layout)
        ring = [torch.empty_like(x) for _ in range(table.ring)]
        for slot, (name, at) in table.initial.items():
            ring[slot - 1].copy_(state[name] if at is None else state[name][at])
        device = sample.device
        return Run(
            table=table,
            begin=begin,
            times=times,
            timesteps=torch.tensor(times, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device),
            scales=torch.tensor([step.scale for step in table.trace.steps], device=device),
            kind=kind,
            work=work,
            layout=layout,
            ring=ring,
            seeds=seeds,
            guided=guidance is not None,
            counter=torch.zeros(1, dtype=torch.int64, device=device),
            sources=self._sources(),
            path=None if seeds is None or not self.pathwise else BrownianPath(seeds, tuple(sample.shape)),
        )

    def _table(
        self,
        begin: int,
        state: Mapping[str, Any],
        timestep: Any,
        sample: Tensor,
        model_dtype: torch.dtype,
        options: Mapping[str, Any],
        seeded: bool,
        guidance: float | None,
    ) -> tuple[Table, list[float]]:
        shape = tuple(sample.shape)
        form = (type(timestep), timestep.dtype if isinstance(timestep, Tensor) else None)
        key: Any = (
            self.stock, begin, form, sample.dtype, model_dtype, sample.device, seeded, guidance,
            tuple(sorted(options.items())), tuple((name, _frozen(value, shape)) for name, value in state.items()),
        )  # fmt: skip
        host = self.timesteps.cpu()[begin:]  # type: ignore[attr-defined]
        found = _tables.get(key)
        if found is None:
            if isinstance(timestep, Tensor):
                times = list(host.to(timestep.dtype))
            else:
                times = [type(timestep)(t) for t in host.tolist()]
            try:
                traced = trace(
                    self.traced, state, times, options,
                    scaled=self.scaled, kept_shape=shape, sample_dtype=sample.dtype, model_dtype=model_dtype,
                )  # fmt: skip
                wide = torch.float64 if torch.float64 in (sample.dtype, model_dtype, *traced.dtypes) else torch.float32
                table = build(traced, seeded=seeded, guidance=guidance or 1.0, wide=wide, device=sample.device, lasting=self.lasting)
            except NotLinear as error:
                found = str(error)
            else:
                found = table
        with _tables_lock:
            _tables[key] = found
            _tables.move_to_end(key)
            if len(_tables) > _MAX_TABLES:
                _tables.popitem(last=False)
        if isinstance(found, str):
            raise NotLinear(found)
        return found, host.tolist()


def _deferred(sample: Any) -> bool:
    """Whether what is called now runs later, any number of times: compiled, or recorded in a CUDA graph."""
    return torch.compiler.is_compiling() or (isinstance(sample, Tensor) and sample.is_cuda and torch.cuda.is_current_stream_capturing())


def _kind(model_output: Any, timestep: Any, sample: Any, options: Mapping[str, Any], seeds: Any, guidance: float | None) -> tuple[Any, ...]:
    """What a run was made for; a call of another kind needs another one."""
    return (
        getattr(sample, "shape", None), getattr(sample, "dtype", None), getattr(sample, "device", None),
        getattr(model_output, "shape", None), getattr(model_output, "dtype", None), getattr(model_output, "device", None),
        type(timestep), getattr(timestep, "dtype", None), options, id(seeds) if isinstance(seeds, Tensor) else seeds, guidance,
    )  # fmt: skip


def _result(table: Table, returned: Sequence[int], fields: Sequence[Tensor], return_dict: bool) -> Any:
    values: list[Tensor | None] = [None] * len(table.trace.dtypes)
    for field, value in zip(returned, fields, strict=True):
        values[field] = value
    return table.trace.output(*values) if return_dict else tuple(values[: table.trace.in_tuple])


def _mix(stock: Callable[[Tensor, Tensor, Tensor], Tensor], original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """a * original + s * noise, with the factors that ``stock`` multiplies the unit vectors by."""
    if original.ndim < 2 or original.dtype != noise.dtype or original.shape != noise.shape:
        return stock(original, noise, timesteps)
    units = torch.eye(2, dtype=original.dtype, device=original.device).view(2, 1, 2, *[1] * (original.ndim - 2))
    a, s = stock(units[0], units[1], timesteps).chunk(2, dim=1)
    return torch.addcmul(original * a, noise, s)


def _scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As the stock class's. One multiplication, once the trajectory has begun."""
    run: Run | None = self._run
    scaled: Tensor
    if run is not None and (_deferred(sample) or run.on_device):
        scaled = sample * run.scales.index_select(0, run.counter // run.table.launches).to(sample.dtype)
    elif run is not None and run.k < len(run.times) and self._goes_on(run):
        self.is_scale_input_called = True
        scaled = sample * run.table.trace.steps[run.k].scale
    else:
        scaled = self.stock.scale_model_input(self, sample, *args, **kwargs)
    return scaled


def _add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """As the stock class's: its own factors, and two passes over the tensors."""
    return _mix(functools.partial(self.stock.add_noise, self), original_samples, noise, timesteps)


def _scale_noise(self: Any, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
    """As the stock class's: its own factors, and two passes over the tensors."""
    if noise is None:
        scaled: Tensor = self.stock.scale_noise(self, sample, timestep, noise)
        return scaled
    return _mix(lambda x, n, t: self.stock.scale_noise(self, x, t, n), sample, noise, timestep)


def _element(tensor: Tensor, element: Any) -> int | None:
    """Which element of the vector ``tensor`` the scalar is a view of."""
    if not isinstance(element, Tensor) or element.ndim != 0 or element.dtype != tensor.dtype:
        return None
    if element.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
        return None
    at = int(element.storage_offset() - tensor.storage_offset())
    return at if 0 <= at < len(tensor) else None


def _frozen(value: Any, shape: tuple[int, ...]) -> Any:
    """``value`` as part of a key. What earlier steps kept is an input of the trace, whatever it holds."""
    if isinstance(value, Tensor):
        return "kept" if value.shape == shape else (str(value.dtype), value.cpu().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tobytes()  # its repr leaves out the middle
    if isinstance(value, list):
        return tuple(_frozen(v, shape) for v in value)
    return value if isinstance(value, int | float | str | bool | None) else repr(value)


class _NoNoise(TorchFunctionMode):
    """Refuses a stock step that draws noise where seeds were given: nothing else could be told from their noise."""

    def __init__(self, reason: str | None) -> None:
        super().__init__()
        self.reason = reason

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like):
            raise ValueError(f"seeds: got some for {self.reason or 'a step after the last'}, supported: steps that the kernel can execute")
        return func(*args, **(kwargs or {}))


def _rebuild(name: str, state: dict[str, Any]) -> Any:
    from genfast.compat.diffusers import CLASSES

    scheduler = object.__new__(CLASSES[name])
    scheduler.__dict__.update(state)
    return scheduler


def fuse(stock: Any, **traits: Any) -> Any:
    """The fused class of a stock scheduler class. ``traits`` are class attributes of `FusedScheduler`."""
    parameters = list(inspect.signature(stock.step).parameters.values())
    extra = [p.name for p in parameters[4:] if p.kind == p.POSITIONAL_OR_KEYWORD]
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("seeds", "guidance_scale")]

    @functools.wraps(stock.step)
    def step(self: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **options: Any) -> Any:
        return self._fused_step(model_output, timestep, sample, args, options)

    @functools.wraps(stock.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        self._run, self._index, self.fallback = None, None, None
        stock.set_timesteps(self, *args, **kwargs)

    step.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    body = {
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        "stock": stock,
        "traced": stock,
        "extra_names": tuple(extra),
        "step": step,
        "set_timesteps": set_timesteps,
        **traits,
    }
    if body.get("scaled"):
        body["scale_model_input"] = _scale_model_input
    if "scale_noise" in vars(stock):
        body["scale_noise"] = _scale_noise
    if hasattr(stock, "add_noise"):
        body["add_noise"] = _add_noise
    return type(stock.__name__, (FusedScheduler, stock), body)
