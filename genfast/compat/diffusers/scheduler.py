"""Stock scheduler classes whose step is one kernel launch.

A fused class is a subclass of the installed stock class: configuration, tables, timesteps and attributes are diffusers' own, before a step
and after it. A step is traced (trace.py) into a row of coefficients (table.py) from the attributes as they are; the row serves wherever
everything that the step read is as it was (state.py). What a row cannot hold runs the stock step on the same attributes, and
`FusedScheduler.fallback` says why.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from genfast.ops import _autograd
from genfast.ops._checks import check_seeds
from genfast.reference.solver_step import layout_of
from genfast.samplers import BrownianPath

from . import rows
from .run import Run, execute
from .state import NotLinear, Stamps, kept_paths, write
from .table import Row, table

_CACHES = ("_run", "_row", "_scaling", "_stamps", "_checked", "_seed_path")  # what a fused class can make again


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
    scaled: ClassVar[bool] = False  # scale_model_input is not the identity
    extra_names: ClassVar[tuple[str, ...]]  # the parameters of step after sample, in order
    known: ClassVar[frozenset[str]]  # the same
    methods: ClassVar[frozenset[str]]  # the stock methods that a step may call
    own_methods: ClassVar[Any]  # those of a class: a function of it
    original_methods: ClassVar[Any]  # those of the stock class when it was fused
    originals: ClassVar[dict[str, Any]]  # the same by name
    original_entries: ClassVar[dict[str, Any]]  # the stock methods that a fused class calls by name, when it was fused

    # From this number of elements on a step is traced when it first comes up, smaller ones when they come up again: until then the stock
    # step runs, which takes less time than to trace it.
    trace_from: int = 1 << 14
    seeds: Sequence[int] | Tensor | None = None
    fallback: str | None = None
    _run: Run | None = None  # a trajectory prepared for steps that run later
    _under_way: bool = False  # the last step of the trajectory was a row
    _row: Row | None = None  # it, or the last of the trajectory before
    _scaling: Row | None = None  # the last row of scale_model_input
    _checked: tuple[Any, Tensor] | None = None  # seeds that were checked, and the tensor of them
    _seed_path: tuple[Tensor, torch.Size, BrownianPath] | None = None

    @property
    def _step_index(self) -> int | None:
        self._settle()
        index: int | None = self.__dict__.get("_step_index")
        return index

    @_step_index.setter
    def _step_index(self, value: int | None) -> None:
        self._settle()
        self._run = None  # prepared steps would go on from where they were
        self.__dict__["_step_index"] = value

    @functools.cached_property
    def _stamps(self) -> Stamps:
        return Stamps()

    def _settle(self) -> None:
        """Let the attributes catch up with steps that ran on the device alone."""
        run = self._run
        if run is not None and run.on_device and not self.stateless:
            run.settle(self.__dict__, self.timesteps)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        # The class bears the stock class's name and module, so that what is saved loads where genfast is absent.
        self._settle()
        state = {name: value for name, value in self.__dict__.items() if name not in _CACHES}
        return _rebuild, (type(self).__name__, state)

    def prepare(self, sample: Tensor, model_dtype: torch.dtype | None = None, **options: Any) -> None:
        """Make the tables and buffers of the steps to come, on tensors like ``sample`` (B, \\*sample).

        Needed before `step` is compiled in one graph or captured in a CUDA graph. ``options`` are those of `step`.
        Raises ValueError where the kernel cannot execute the steps.
        """
        seeds, guidance = options.pop("seeds", self.seeds), options.pop("guidance_scale", None)
        copies = 1 if guidance is None else 2
        model_output = sample.new_empty((copies * len(sample), *sample.shape[1:]), dtype=model_dtype or sample.dtype)
        if "is_scale_input_called" in self.__dict__:
            self.is_scale_input_called = True  # it is called in the graph
        self._settle()
        timestep = self.timesteps[self._at(None)]  # type: ignore[attr-defined]
        if self._start(model_output, timestep, sample, options, seeds, guidance) is None:
            raise ValueError(f"step: got {self.fallback}, supported here: steps that the kernel can execute")

    def _fused_step(self, model_output: Any, timestep: Any, sample: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        seeds, guidance = options.pop("seeds", self.seeds), options.pop("guidance_scale", None)
        if args:
            names = self.extra_names[: len(args)]
            if len(names) < len(args) or not options.keys().isdisjoint(names):
                return self.stock.step(self, model_output, timestep, sample, *args, **options)  # raises TypeError
            options.update(zip(names, args, strict=True))
        traced, return_dict, generator, given = {}, True, None, None
        for name, value in options.items():
            if name == "return_dict":
                return_dict = value
            elif name == "generator":
                generator = value
            elif name == "variance_noise":
                given, seeds = value, seeds if value is None else None
            else:
                traced[name] = value
            if name not in self.known:
                return self.stock.step(self, model_output, timestep, sample, **options)  # raises TypeError
        if _deferred(sample):
            return self._deferred_step(model_output, timestep, sample, traced, seeds, guidance, return_dict)
        run = self._run
        if run is not None:
            self._settle()
        row, reason = None, None
        try:
            row = self._fitting(model_output, timestep, sample, traced, seeds, guidance)
            if given is not None and generator is not None and row is not None and row.noisy:
                raise NotLinear("noise and a generator")  # some stock classes refuse that
        except NotLinear as error:
            row, reason = None, str(error)
        if row is None:
            self.fallback, self._under_way, self._row, self._run = reason, False, None, None
            if guidance is not None:
                uncond, cond = model_output.chunk(2)
                model_output = uncond + guidance * (cond - uncond)
            with nullcontext() if seeds is None else _NoNoise(self.fallback):
                return self.stock.step(self, model_output, timestep, sample, **options)
        seeds = None if seeds is None else self._seed_tensor(seeds, sample)
        if given is not None:
            noise = given.expand_as(sample) if row.noisy else None
        else:
            noise = self._noise(row, model_output, sample, generator, seeds) if row.noisy or self.pathwise else None
        fields = execute(row, self.__dict__, model_output, timestep, sample, noise, seeds, guidance is not None)
        self._row, self._under_way, self.fallback = row, True, None
        if run is not None and not self.stateless:
            self._follow(run, row)
        return _result(row, fields, return_dict)

    def _fitting(
        self, model_output: Any, timestep: Any, sample: Any, options: Mapping[str, Any], seeds: Any, guidance: float | None
    ) -> Row | None:
        """The row of this step: the one that came next last time, another one that fits, or one traced now; None before it is worth it.

        Raises NotLinear where there cannot be one.
        """
        if not (isinstance(model_output, Tensor) and isinstance(sample, Tensor)):
            raise NotLinear("a model output or a sample that is not a tensor")
        if model_output.shape != (sample.shape if guidance is None else (2 * len(sample), *sample.shape[1:])):
            raise NotLinear(f"a model output of shape {tuple(model_output.shape)} for a sample of shape {tuple(sample.shape)}")
        if (name := self._replaced("step")) != "":
            raise NotLinear(f"a method that is not the stock class's: {name}")
        kind = rows.kind_of(model_output, timestep, sample, options, seeds is not None and not self.pathwise, guidance)
        row, last = None, self._row
        if last is not None:
            row = last.next
        if row is None or row.kind != kind or not rows.fit(row, self, timestep, sample):
            state = self.__dict__
            rows.check(kind, timestep)
            row = rows.find(self, state, "step", kind, timestep, sample)
            if row is None:
                if seeds is None and sample.numel() < self.trace_from and rows.first_time(self, state, kind, timestep):
                    return None
                row = rows.trace(self, state, "step", kind, timestep, sample, options)
            if last is not None:
                last.next = row
        if row.refusal:
            raise NotLinear(row.refusal)
        return row

    def _replaced(self, entry: str) -> str:
        """The name of a method that is not the stock class's, among ``entry`` and those that it comes to; or nothing."""
        if self.original_entries[entry] is not getattr(self.stock, entry):
            return entry
        cls = type(self)
        if self.methods.isdisjoint(self.__dict__) and self.own_methods(cls) == self.original_methods:
            return ""
        return next(n for n in sorted(self.methods) if n in self.__dict__ or getattr(cls, n) is not self.originals[n])

    def _seed_tensor(self, seeds: Any, sample: Tensor) -> Tensor:
        """The seeds as a tensor beside ``sample``, checked."""
        given, known = list(seeds) if isinstance(seeds, list | tuple) else None, self._checked
        if given is not None and known is not None and known[0] == given and known[1].device == sample.device and len(given) == len(sample):
            return known[1]
        tensor = torch.as_tensor(seeds).to(sample.device)
        check_seeds(tensor, len(sample), sample.device)
        if given is not None:
            self._checked = given, tensor
        return tensor

    def _noise(self, row: Row, model_output: Tensor, sample: Tensor, generator: Any, seeds: Tensor | None) -> Tensor | None:
        """The noise of a step from torch, drawn as the stock class draws it, or from the path of the seeds."""
        noise, path = None, None
        if self.pathwise and seeds is not None:
            known = self._seed_path
            if known is None or known[1] != sample.shape or not torch.equal(known[0], seeds):
                known = self._seed_path = seeds.clone(), sample.shape, BrownianPath(seeds, tuple(sample.shape))
            path = known[2]
        elif self.pathwise:  # the stock class makes its path, and draws its seed, in steps without noise too
            self._path(model_output, sample, generator)
        for number, draw in enumerate(row.step.draws):
            if draw.levels is None:
                drawn = randn_tensor(tuple(sample.shape), generator=generator, device=model_output.device, dtype=draw.dtype)
            elif path is not None:
                a, b = map(float, draw.levels)
                drawn = path(a, b) / abs(a - b) ** 0.5
            else:
                drawn = self._path(model_output, sample, generator)(*draw.levels).to(model_output.device)
            if number == row.used:
                noise = drawn
        return noise

    def _path(self, model_output: Tensor, sample: Tensor, generator: Any) -> Any:
        """The function of two noise levels that the stock class takes its noise from, where it does."""
        raise NotImplementedError

    # Steps that run later

    def _deferred_step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        options: dict[str, Any],
        seeds: Any,
        guidance: float | None,
        return_dict: bool,
    ) -> Any:
        """For a compiler or a CUDA graph: nothing depends on which step it is but the device's counter."""
        run = self._run
        if run is None or not self._goes_on(run) or run.kind != _run_kind(model_output, timestep, sample, options, seeds, guidance):
            if not torch.compiler.is_compiling():
                raise ValueError("step: got steps that are not prepared, in a CUDA graph capture, supported there: prepare(sample) before")
            run = self._start(model_output, timestep, sample, options, seeds, guidance)
        several = run is not None and len({row.returned for row in run.table.rows}) > 1
        if run is None or several or any(row.noisy for row in run.table.rows):
            reason = self.fallback if run is None else "steps of different results" if several else "noise from a torch.Generator"
            where = "under torch.compile and in CUDA graphs"
            raise ValueError(f"step: got {reason} {where}, supported there: seeds= and steps that the kernel can execute")
        if run.attached or _autograd.wanted((sample, model_output)):
            raise ValueError("step: got a tensor that requires grad under torch.compile, supported: tensors without, or the step outside")
        run.on_device = True
        if self.stateless:
            match = run.timesteps == timestep
            row = torch.where(match.any(), match.to(torch.uint8).argmax(), len(match)) * run.table.launches
            run.counter.copy_(row)
        return _result(run.table.rows[0], run.execute(model_output, sample), return_dict)

    @torch.compiler.disable(reason="the first step of a trajectory makes tables on the host; call prepare(sample) before")  # type: ignore[untyped-decorator]
    def _start(
        self, model_output: Any, timestep: Any, sample: Any, options: Mapping[str, Any], seeds: Any, guidance: float | None
    ) -> Run | None:
        """Trace the steps to come, for running them later; None, and `fallback`, where the stock step has to run."""
        self._settle()
        self._run = None
        kind = _run_kind(model_output, timestep, sample, options, seeds, guidance)
        if seeds is not None:
            seeds = self._seed_tensor(seeds, sample)
        try:
            if (name := self._replaced("step")) != "":
                raise NotLinear(f"a method that is not the stock class's: {name}")
            begin = 0 if self.stateless else self._at(timestep)
            seeded = seeds is not None and not self.pathwise
            steps = rows.kind_of(model_output, timestep, sample, options, seeded, guidance)
            found, scales = self._rows_to_come(begin, steps, timestep, sample, options)
            with torch.inference_mode(False):  # a later step may be differentiable
                self._run = self._new_run(begin, kind, found, scales, sample, seeds, guidance)
        except Exception as error:
            self.fallback = str(error) or type(error).__name__
            return None
        self.fallback = None
        return self._run

    def _rows_to_come(
        self, begin: int, kind: tuple[Any, ...], timestep: Any, sample: Tensor, options: Mapping[str, Any]
    ) -> tuple[list[Row], list[float]]:
        """The rows of all steps from ``begin`` on, and the factors of scale_model_input, from a state that the attributes do not see."""
        state = {name: list(value) if type(value) is list else value for name, value in self.__dict__.items()}
        if "is_scale_input_called" in state:
            state["is_scale_input_called"] = True
        found: list[Row] = []
        scales: list[float] = []
        like = {dtype: torch.zeros((), dtype=dtype, device=sample.device).expand(sample.shape) for dtype in rows.DTYPES}
        scaling = rows.scale_kind_of(timestep, sample)
        for some in (kind, scaling):
            rows.check(some, timestep)

        def row_of(method: str, kind: tuple[Any, ...], time: Any, options: Mapping[str, Any]) -> Row:
            row = rows.find(self, state, method, kind, time, sample) or rows.trace(self, state, method, kind, time, sample, options)
            if row.refusal:
                raise NotLinear(row.refusal)
            return row

        for t in self.timesteps[begin:]:  # type: ignore[attr-defined]
            time = t.to(timestep.dtype) if isinstance(timestep, Tensor) else type(timestep)(t)
            if self.scaled:
                row = row_of("scale_model_input", scaling, time, {})
                write(state, row.writes, {"time": time})
                state.update(row.plain)
                scales.append(row.scale)
            row = row_of("step", kind, time, options)
            field = {k: like[row.step.dtypes[k]] for k in row.returned}
            kept = {"sample": like[sample.dtype], "model": like[kind[3]], "new": [like[dtype] for dtype in row.step.kept_dtypes]}
            write(state, row.writes, kept | {"field": field, "time": time, "shape": sample.shape})
            state.update(row.plain)
            found.append(row)
        return found, scales or [1.0] * len(found)

    def _new_run(
        self,
        begin: int,
        kind: tuple[Any, ...],
        found: list[Row],
        scales: list[float],
        sample: Tensor,
        seeds: Tensor | None,
        guidance: float | None,
    ) -> Run:
        for row, following in itertools.pairwise(found):
            row.next = following
        self._row = Row(kind=(), next=found[0])
        device, work, layout = sample.device, found[0].work, layout_of(sample)
        made = table(
            found,
            kept_paths(self.__dict__, sample.shape),
            seeded=seeds is not None and not self.pathwise,
            guidance=guidance or 1.0,
            device=device,
        )
        x = torch.empty_like(sample.detach(), dtype=work).contiguous(memory_format=layout)
        run = Run(
            table=made,
            begin=begin,
            timesteps=self.timesteps[begin:].to(device, torch.float64 if device.type == "cpu" else torch.float32),  # type: ignore[attr-defined]
            scales=torch.tensor(scales, device=device),
            kind=kind,
            sources=self._sources(),
            shape=sample.shape,
            layout=layout,
            ring=[torch.empty_like(x) for _ in range(made.ring)],
            seeds=None if self.pathwise else seeds,
            guided=guidance is not None,
            counter=torch.zeros(1, dtype=torch.int64, device=device),
        )
        run.load(self.__dict__)
        return run

    def _follow(self, run: Run, row: Row) -> None:
        """After a step that ran at once: the prepared trajectory goes on from there, if it is the step that it had next."""
        if run.k < len(run.table.rows) and run.table.rows[run.k] is row:
            run.k += 1
            run.load(self.__dict__)
        else:
            self._run = None

    def _sources(self) -> tuple[Any, ...]:
        return self.__dict__.get("timesteps"), self.__dict__.get("sigmas"), self.__dict__.get("_internal_dict")

    def _goes_on(self, run: Run) -> bool:
        """Whether what the table was made from is still there, as far as compiled code can see."""
        get, (timesteps, sigmas, config) = self.__dict__.get, run.sources
        return get("timesteps") is timesteps and get("sigmas") is sigmas and get("_internal_dict") is config

    def _at(self, timestep: Any) -> int:
        """Which of the timesteps is next."""
        for name in ("_step_index", "counter", "_begin_index"):
            if self.__dict__.get(name) is not None:
                return int(self.__dict__[name])
        timesteps = self.timesteps  # type: ignore[attr-defined]
        if timestep is None:
            return 0
        at = rows.element(timesteps, timestep)
        if at is not None and timesteps.is_cuda and at == 0:
            return 0
        if hasattr(self, "index_for_timestep"):
            return int(self.index_for_timestep(timestep))
        if at is not None:
            return at  # a timestep may occur twice
        return int((timesteps == timestep).nonzero()[0])


def _deferred(sample: Any) -> bool:
    """Whether what is called now runs later, any number of times: compiled, or recorded in a CUDA graph."""
    return torch.compiler.is_compiling() or (isinstance(sample, Tensor) and sample.is_cuda and torch.cuda.is_current_stream_capturing())


def _run_kind(
    model_output: Any, timestep: Any, sample: Any, options: Mapping[str, Any], seeds: Any, guidance: float | None
) -> tuple[Any, ...]:
    """What a run was made for; a call of another kind needs another one."""
    return (
        sample.shape, sample.dtype, sample.device, model_output.shape, model_output.dtype, model_output.device,
        type(timestep), getattr(timestep, "dtype", None), options, id(seeds) if isinstance(seeds, Tensor) else seeds, guidance,
    )  # fmt: skip


def _result(row: Row, fields: Sequence[Tensor], return_dict: bool) -> Any:
    step = row.step
    if not return_dict and len(fields) == step.in_tuple == len(step.dtypes):
        return tuple(fields)
    values: list[Tensor | None] = [None] * len(step.dtypes)
    for field, value in zip(row.returned, fields, strict=True):
        values[field] = value
    return step.output(*values) if return_dict else tuple(values[: step.in_tuple])


def _mix(stock: Callable[[Tensor, Tensor, Tensor], Tensor], original: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """a * original + s * noise, with the factors that ``stock`` multiplies the unit vectors by."""
    if original.ndim < 2 or original.dtype != noise.dtype or original.shape != noise.shape:
        return stock(original, noise, timesteps)
    units = torch.eye(2, dtype=original.dtype, device=original.device).view(2, 1, 2, *[1] * (original.ndim - 2))
    a, s = stock(units[0], units[1], timesteps).chunk(2, dim=1)
    return torch.addcmul(original * a, noise, s)


def _scale_model_input(self: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As the stock class's, by one multiplication."""
    run: Run | None = self._run
    if run is not None and _deferred(sample):
        return sample * run.scales.index_select(0, run.counter // run.table.launches).to(sample.dtype)
    self._settle()
    stock = self.stock.scale_model_input
    timestep = args[0] if args else kwargs.get("timestep")
    # Where the stock step runs its input is stock's, to the bit; what the first step does is not known yet.
    at_once = self._under_way or run is not None
    if not at_once or len(args) + len(kwargs) != 1 or timestep is None or self._replaced("scale_model_input"):
        return stock(self, sample, *args, **kwargs)  # type: ignore[no-any-return]
    try:
        kind = rows.scale_kind_of(timestep, sample)
        row, last = None, self._scaling
        if last is not None:
            row = last.next
        if row is None or row.kind != kind or not rows.fit(row, self, timestep, sample):
            rows.check(kind, timestep)
            place = self, self.__dict__, "scale_model_input", kind, timestep, sample
            row = rows.find(*place) or rows.trace(*place, {})
            if last is not None:
                last.next = row
        if row.refusal:
            raise NotLinear(row.refusal)
    except NotLinear:
        self._scaling = None
        return stock(self, sample, *args, **kwargs)  # type: ignore[no-any-return]
    if row.writes:
        write(self.__dict__, row.writes, {"time": timestep})
    self.__dict__.update(row.plain)
    self._scaling = row
    return sample * row.scale


def _add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """As the stock class's: its own factors, and two passes over the tensors."""
    stock = functools.partial(self.stock.add_noise, self)
    if self._replaced("add_noise"):
        noised: Tensor = stock(original_samples, noise, timesteps)
        return noised
    return _mix(stock, original_samples, noise, timesteps)


def _scale_noise(self: Any, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
    """As the stock class's: its own factors, and two passes over the tensors."""
    if noise is None or self._replaced("scale_noise"):
        scaled: Tensor = self.stock.scale_noise(self, sample, timestep, noise)
        return scaled
    return _mix(lambda x, n, t: self.stock.scale_noise(self, x, t, n), sample, noise, timestep)


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


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _called(stock: type, entries: Sequence[str]) -> set[str]:
    """The methods and properties of ``stock`` that ``entries`` may come to, directly or through one another, by the names in their code."""
    found: set[str] = set()
    queue = [getattr(stock, entry) for entry in entries]
    while queue:
        function = inspect.unwrap(queue.pop())
        for code in _codes(function.__code__) if hasattr(function, "__code__") else ():
            for name in {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))} - found:
                attribute = getattr(stock, name, None)
                if isinstance(attribute, property) and attribute.fget is not None:
                    found.add(name)
                    queue.append(attribute.fget)
                elif inspect.isfunction(attribute) and not name.startswith("__"):
                    found.add(name)
                    queue.append(attribute)
    return found


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
        self._run, self._under_way, self.fallback = None, False, None
        stock.set_timesteps(self, *args, **kwargs)

    step.__signature__ = inspect.Signature([*parameters, *own])  # type: ignore[attr-defined]
    entries = [name for name in ("step", "scale_model_input", "add_noise", "scale_noise") if hasattr(stock, name)]
    methods = sorted(_called(stock, ["step", *(["scale_model_input"] if traits.get("scaled") else [])]) - {*entries, "set_timesteps"})
    own_methods: Any = attrgetter(*methods) if len(methods) > 1 else lambda cls: tuple(getattr(cls, name) for name in methods)
    body = {
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        "stock": stock,
        "traced": stock,
        "extra_names": tuple(extra),
        "known": frozenset(extra),
        "methods": frozenset(methods),
        "own_methods": staticmethod(own_methods),
        "original_methods": own_methods(stock),
        "originals": {name: getattr(stock, name) for name in methods},
        "original_entries": {name: getattr(stock, name) for name in entries},
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
