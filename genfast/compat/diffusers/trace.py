"""What a stock scheduler's step does, read off the stock class itself: the row of docs/solver-step.md that equals it.

Between its model output and what it returns and keeps, a step of a diffusers scheduler is linear in tensors: the sample, the model output,
what it kept of earlier steps and its noise; the one exception is the clipping or thresholding of a single prediction. So the stock code
is run on float64 tensors whose elements are the unit vectors of those inputs, and the coefficients are what it leaves in
them. The factors that it makes from its own tables stay in the tables' dtype, rounding and all: near t = 0 float32 cancels most of their
digits, and the picture is that of the digits that are left. One more element holds a random combination and one holds zero: a step that is
not linear is found out and left to the stock class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .state import Config, Item, Items, Kept, ListOf, NotLinear, Path, Reads, Source, Stamps, Writes, at_path, kept_paths, shadow_of

# A term is "x" the sample, "d" the clipped prediction, "m" the model output, "noise0" .. the draws, or the number of a kept tensor.
Term = str | int
Vector = dict[Term, float]

_SCRATCH = ("x", "m", "d", "noise0", "noise1", "noise2")
_RANK = 4  # of a basis tensor
_RANDN = (torch.randn, torch.randn_like)
# What the recorder does about a function: "form" is one that looks at a tensor's form alone.
_SPECIAL: dict[Any, str] = {
    **dict.fromkeys(_RANDN, "randn"),
    **dict.fromkeys(
        (torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.normal, torch.bernoulli), "other_noise"
    ),
    **dict.fromkeys((torch.clamp, torch.Tensor.clamp), "clamp"),
    **dict.fromkeys([getattr(torch.Tensor, name) for name in ("to", "float", "half", "bfloat16", "type", "type_as")], "cast"),
    **dict.fromkeys([getattr(torch.Tensor, name) for name in ("__len__", "size", "dim", "numel", "is_floating_point")], "form"),
    **dict.fromkeys([getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")], "form"),
    torch.is_floating_point: "form",
}


@dataclass(frozen=True)
class Draw:
    """One request for noise: of a dtype, or of a path between two ``levels``."""

    dtype: torch.dtype = torch.float32
    levels: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Step:
    """One step: what it returns, what it makes for keeping, what it asked for on the way, and the attributes that it leaves."""

    inputs: tuple[Path, ...]  # what the kept tensors of the terms are: number k is inputs[k]
    returned: tuple[Vector | None, ...]
    kept: tuple[Vector, ...]
    kept_dtypes: tuple[torch.dtype, ...]  # as the stock class keeps them
    writes: Writes
    convert: tuple[float, float]  # (ax, am) of d = ax * x + am * m
    clip: float
    quantile: float
    max_threshold: float
    draws: tuple[Draw, ...]
    output: type  # what step returns with return_dict=True
    in_tuple: int  # how many of its fields are in the tuple of return_dict=False
    dtypes: tuple[torch.dtype, ...]  # of the fields


@dataclass
class Reading:
    """What a step read of the state and whether it looked at its timestep: complete even where tracing failed."""

    reads: Reads = ()
    timed: bool = True


@dataclass(frozen=True)
class Call:
    """What a step is called with, apart from its tensors' elements."""

    timestep: Any
    options: Mapping[str, Any]
    sample_dtype: torch.dtype
    model_dtype: torch.dtype
    guided: bool = False


def trace_step(stock: type, state: Mapping[str, Any], shape: torch.Size, call: Call, stamps: Stamps, reading: Reading) -> Step:
    """The step of ``stock`` from ``state``, its ``__dict__``, on samples of ``shape``. Fills in ``reading``, whatever happens.

    Raises NotLinear for a step that a row cannot hold, and whatever the stock class raises.
    """
    paths = kept_paths(state, shape)
    basis = _Basis(len(paths))
    kept = {path: basis.unit(k) for k, path in enumerate(paths)}
    source = Source(state, shape, kept, stamps)
    recorder = _Recorder(basis, call, source)
    try:
        shadow = shadow_of(stock, source)
        recorder.attach(shadow)
        with recorder:
            result = stock.step(shadow, recorder.m, recorder.timestep, recorder.x, **call.options)  # type: ignore[attr-defined]
        fields = tuple(result.values())
        returned = tuple(None if field is None else basis.read(field) for field in fields)
        writes, made = _Leavings(shadow, source, recorder, fields, call).all()
        vectors = tuple(map(basis.read, made))
    finally:
        reading.reads, reading.timed = source.result(), recorder.timed
    form = _form(stock, state, shape, call, reading.reads, writes, tuple(f is None for f in returned), len(recorder.draws))
    dtypes, kept_dtypes, drawn, in_tuple = form
    if len(recorder.draws) != len(drawn):
        raise NotLinear("noise that depends on the values of the tensors")
    draws = tuple(Draw(dtype, levels) for dtype, levels in zip(drawn, recorder.draws, strict=True))
    return Step(
        inputs=tuple(paths), returned=returned, kept=vectors, kept_dtypes=kept_dtypes, writes=writes, convert=recorder.convert,
        clip=recorder.clip, quantile=recorder.quantile, max_threshold=recorder.max_threshold, draws=draws, output=type(result),
        in_tuple=in_tuple, dtypes=dtypes,
    )  # fmt: skip


def trace_scale(
    stock: Any, state: Mapping[str, Any], shape: torch.Size, call: Call, stamps: Stamps, reading: Reading
) -> tuple[float, Writes]:
    """The factor of ``stock``'s scale_model_input, and the attributes that it leaves; as `trace_step`."""
    basis = _Basis(0)
    source = Source(state, shape, {path: basis.unit("d") for path in kept_paths(state, shape)}, stamps)
    recorder = _Recorder(basis, call, source)
    try:
        shadow = shadow_of(stock, source)
        with recorder:
            vector = basis.read(stock.scale_model_input(shadow, recorder.x, recorder.timestep))
        writes, made = _Leavings(shadow, source, recorder, (), call).all()
    finally:
        reading.reads, reading.timed = source.result(), recorder.timed
    if vector.keys() != {"x"} or made:
        raise NotLinear("scale_model_input is more than a factor")
    return vector["x"], writes


@functools.cache
def _units(count: int) -> tuple[Tensor, list[float]]:
    """The unit vectors of ``count`` terms as rows, each with its weight in the combination and with zero; and the weights."""
    weights = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    rows = torch.zeros(count, count + 2, dtype=torch.float64)
    rows[:, :count], rows[:, count] = torch.eye(count, dtype=torch.float64), weights
    return rows.view(count, 1, count + 2, 1, 1), weights.tolist()


class _Basis:
    """Tensors (1, n, 1, 1) whose elements are the unit vectors of the inputs, then a random combination, then zero."""

    def __init__(self, kept: int) -> None:
        self.terms: list[Term] = [*_SCRATCH, *range(kept)]
        self.units, self.weights = _units(len(self.terms))
        self.shape = self.units.shape[1:]

    def unit(self, term: Term) -> Tensor:
        return self.units[term + len(_SCRATCH) if isinstance(term, int) else _SCRATCH.index(term)].clone()

    def read(self, tensor: Tensor) -> Vector:
        if tensor.shape != self.shape:
            raise NotLinear(f"a tensor of shape {tuple(tensor.shape)} where one of {tuple(self.shape)} went in")
        *coefficients, combined, constant = tensor.detach().double().flatten().tolist()
        size = max(map(abs, coefficients))
        if not (math.isfinite(combined) and all(map(math.isfinite, coefficients))):
            raise NotLinear("factors that are not finite")
        products = [c * w for c, w in zip(coefficients, self.weights, strict=True)]
        if constant != 0 or abs(combined - math.fsum(products)) > 1e-6 * math.fsum(map(abs, products)):
            raise NotLinear("a result that is not linear in the sample, the model output and the noise")
        # What cancelled to rounding error is not there; 1.0 is exactly an input.
        return {term: c for term, c in zip(self.terms, coefficients, strict=True) if abs(c) > 1e-13 * size}


class _Recorder(TorchFunctionMode):
    """Answers the stock code's requests for noise and for a clipped prediction with fresh inputs, and keeps vectors in float64."""

    def __init__(self, basis: _Basis, call: Call, source: Source) -> None:
        super().__init__()
        self.basis, self.source = basis, source
        self.x, self.m = basis.unit("x"), basis.unit("m")
        self.timestep = call.timestep.detach().to("cpu", copy=True) if isinstance(call.timestep, Tensor) else call.timestep
        self.timed = not isinstance(self.timestep, Tensor)  # of a number, nobody sees whether it is looked at
        self.convert, self.clip, self.quantile, self.max_threshold = (0.0, 0.0), 0.0, 0.0, math.inf
        self.clipped = False
        self.draws: list[tuple[Any, Any] | None] = []  # the levels of each

    def attach(self, shadow: Any) -> None:
        if hasattr(type(shadow), "_threshold_sample"):
            shadow.__dict__["_threshold_sample"] = lambda sample: self._threshold(sample, shadow.config)
        if "noise_sampler" in self.source.state:
            shadow.__dict__["noise_sampler"] = lambda *levels: self._noise(levels)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        special = _SPECIAL.get(func)  # plain code: a step makes a hundred calls
        if special != "form":
            self._look(args)
            if kwargs:
                self._look(kwargs.values())
        kwargs = kwargs or {}
        if special is None or special == "form":
            try:
                return func(*args, **kwargs)
            except RuntimeError:  # a product of a vector with factors of another dtype, which has to be one of equal dtypes
                return func(*_wide(args), **{key: _wide(value) for key, value in kwargs.items()})
        return getattr(self, "_" + special)(func, *args, **kwargs)

    def _look(self, args: Any) -> None:
        """Note which tables an operation looks into, and whether it looks at the timestep."""
        for value in args:
            if isinstance(value, Tensor):
                if value is self.timestep:
                    self.timed = True
                elif id(value) in self.source.loose:
                    self.source.touched.add(id(value))
            elif isinstance(value, list | tuple):
                self._look(value)

    def _randn(self, func: Any, *args: Any, **kwargs: Any) -> Tensor:
        shape = args[0].shape if func is torch.randn_like else args if isinstance(args[0], int) else args[0]
        if tuple(shape) != tuple(self.basis.shape):
            raise NotLinear(f"noise of shape {tuple(shape)}")
        return self._noise(None)

    def _other_noise(self, *args: Any, **kwargs: Any) -> Any:
        raise NotLinear("noise that is not normal")

    def _cast(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.ndim == _RANK else func(tensor, *args, **kwargs)

    def _clamp(self, func: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if sample.shape != self.basis.shape:
            clamped: Tensor = func(sample, *args, **kwargs)
            return clamped
        low, high = kwargs.get("min", args[0] if args else None), kwargs.get("max", args[1] if len(args) > 1 else None)
        if low is None or high is None or float(low) != -float(high) or float(high) <= 0:
            raise NotLinear(f"a clip to {low} .. {high}")
        self.clip = float(high)
        return self._predicted(sample)

    def _noise(self, levels: Any) -> Tensor:
        if len(self.draws) == 3:
            raise NotLinear("more than three draws of noise in a step")
        self.draws.append(levels)
        return self.basis.unit(f"noise{len(self.draws) - 1}")

    def _predicted(self, sample: Tensor) -> Tensor:
        if self.clipped:
            raise NotLinear("two clipped predictions in a step")
        self.clipped = True
        vector = self.basis.read(sample)
        if not vector.keys() <= {"x", "m"}:
            raise NotLinear("a clipped prediction that depends on more than the sample and the model output")
        self.convert = vector.get("x", 0.0), vector.get("m", 0.0)
        return self.basis.unit("d")

    def _threshold(self, sample: Tensor, config: Any) -> Tensor:
        self.quantile, self.max_threshold = float(config.dynamic_thresholding_ratio), float(config.sample_max_value)
        return self._predicted(sample)


def _wide(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_wide, value))
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim:
        return value.double()
    return value


_OURS = ("_source", "_threshold_sample", "noise_sampler")


class _Leavings:
    """What a shadow's attributes hold after the step, as recipes; and the tensors that it made for keeping."""

    def __init__(self, shadow: Any, source: Source, recorder: _Recorder, fields: tuple[Any, ...], call: Call) -> None:
        self.shadow, self.source, self.shape = shadow, source, recorder.basis.shape
        self.made: list[Tensor] = []
        self.known = {id(recorder.timestep): Item("time")} if isinstance(recorder.timestep, Tensor) else {}
        if call.sample_dtype == call.model_dtype == torch.float32:  # else stock may have converted them on the way
            self.known |= {id(field): Item("field", k) for k, field in enumerate(fields) if isinstance(field, Tensor)}
            self._know(recorder.x, Item("sample"))
            if not call.guided:
                self._know(recorder.m, Item("model"))
        for path, tensor in source.kept.items():
            self._know(tensor, Item("held", path))
        self.known |= {identity: Item("held", path) for identity, path in source.loose.items()}  # tables that were moved

    def _know(self, tensor: Tensor, item: Item) -> None:
        if tensor._version == 0:  # not written in place
            self.known[id(tensor)] = item

    def all(self) -> tuple[Writes, list[Tensor]]:
        writes: list[tuple[str, Item | ListOf]] = []
        for name, value in self.shadow.__dict__.items():
            if name in _OURS:
                continue
            before, first = self.source.copies.get(name, (self, None))
            if type(value) is list:
                items = tuple(map(self._item, value))
                same = value is before
                if not (same and items == tuple(map(self._unchanged, range(len(first)), first, [name] * len(first)))):
                    writes.append((name, ListOf(items, same)))
            elif value is not before or (isinstance(value, Tensor) and value._version != self.source.versions.get(id(value), 0)):
                if isinstance(value, Tensor) and value is before and value.ndim <= 1:
                    raise NotLinear(f"a step that edits {name} in place")
                writes.append((name, self._item(value)))
        return writes, self.made

    def _unchanged(self, at: int, value: Any, name: str) -> Item:
        return Item("held", (name, at)) if isinstance(value, Tensor) else Item("const", value)

    def _item(self, value: Any) -> Item:
        if not isinstance(value, Tensor):
            if isinstance(value, torch.Size):
                if value != self.shape[-len(value) :]:
                    raise NotLinear("a size that it keeps")
                return Item("size", -len(value))
            if value is not None and not isinstance(value, int | float | str | bool):
                raise NotLinear(f"an object of class {type(value).__name__} that it keeps")
            return Item("const", value)
        if id(value) not in self.known:
            if value.shape == self.shape:
                self.known[id(value)] = Item("new", len(self.made))
                self.made.append(value)
            elif value.ndim <= 1:
                self.known[id(value)] = Item("const", value.detach().clone())
            else:
                raise NotLinear(f"a tensor of shape {tuple(value.shape)} that it keeps")
        return self.known[id(value)]


# What is the same in all steps of one form: dtypes, and the length of a result.

Form = tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...], tuple[torch.dtype, ...], int]
_forms: dict[Any, Form] = {}


def _form(
    stock: Any, state: Mapping[str, Any], shape: torch.Size, call: Call, reads: Reads, writes: Writes, missing: tuple[bool, ...], draws: int
) -> Form:
    """The dtypes of the fields, of what is kept and of the noise, and the length of the tuple: of one step on tensors of the real dtypes.

    They follow the way that the step took, which its configuration and the form of what it read, kept, drew and returned stand for.
    """
    kinds = tuple((name, _kind(recipe)) for name, recipe in writes)
    found = tuple((name, expected.number if type(expected) is Config else _kind_read(expected)) for name, expected in reads)
    timestep = type(call.timestep), getattr(call.timestep, "dtype", None)
    options = tuple(sorted(call.options.items()))
    key = stock, found, kinds, missing, draws, options, call.sample_dtype, call.model_dtype, timestep
    if key not in _forms:
        if len(_forms) > 1000:
            _forms.clear()
        _forms[key] = _real(stock, state, shape, call, writes)
    return _forms[key]


def _kind(recipe: Item | ListOf) -> Any:
    return tuple(item.kind for item in recipe.items) if isinstance(recipe, ListOf) else recipe.kind


def _kind_read(expected: Any) -> Any:
    if type(expected) is Items:
        return tuple(map(_kind_read, expected.items))
    return expected.dtype if type(expected) is Kept else expected is None


def _real(stock: Any, state: Mapping[str, Any], shape: torch.Size, call: Call, writes: Writes) -> Form:
    timestep = call.timestep.detach().cpu() if isinstance(call.timestep, Tensor) else call.timestep
    sample, model = (torch.ones(1, 2, 1, 1, dtype=dtype) for dtype in (call.sample_dtype, call.model_dtype))

    if "is_scale_input_called" in state:
        state = {**state, "is_scale_input_called": True}  # stock has warned already

    def run(**options: Any) -> tuple[Any, Any, list[torch.dtype]]:
        kept = {path: torch.zeros(1, 2, 1, 1, dtype=at_path(state, path).dtype) for path in kept_paths(state, shape)}
        shadow = shadow_of(stock, Source(state, shape, kept, Stamps()))
        with _Requests(shadow, state, torch.promote_types(call.sample_dtype, call.model_dtype)) as requests:
            return stock.step(shadow, model, timestep, sample, **call.options, **options), shadow, requests.drawn

    structured, shadow, drawn = run()
    plain, *_ = run(return_dict=False)
    kept: dict[int, torch.dtype] = {}
    inputs = shadow.__dict__["_source"].kept
    for name, recipe in writes:
        for at, item in enumerate(recipe.items) if isinstance(recipe, ListOf) else [(None, recipe)]:
            value = at_path(shadow.__dict__, (name, at))
            if item.kind == "new":
                kept[item.value] = value.dtype
            elif item.kind == "held" and value is not inputs.get(item.value, value):
                raise NotLinear(f"a tensor in {name} that changes its dtype")
    dtypes = tuple(call.sample_dtype if field is None else field.dtype for field in structured.values())
    return dtypes, tuple(kept[k] for k in sorted(kept)), tuple(drawn), len(plain)


class _Requests(TorchFunctionMode):
    """Notes the dtype of the noise that is asked for, and leaves the random generators alone."""

    def __init__(self, shadow: Any, state: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.drawn: list[torch.dtype] = []
        self.dtype = dtype  # of noise from a path
        if "noise_sampler" in state:
            shadow.__dict__["noise_sampler"] = self._from_path

    def _from_path(self, sigma: Any, sigma_next: Any) -> Tensor:
        self.drawn.append(self.dtype)
        return torch.zeros(1, 2, 1, 1, dtype=self.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RANDN:
            return func(*args, **(kwargs or {}))
        options = {key: value for key, value in (kwargs or {}).items() if key != "generator"}
        zeros: Tensor = (torch.zeros if func is torch.randn else torch.zeros_like)(*args, **options)
        self.drawn.append(zeros.dtype)
        return zeros
