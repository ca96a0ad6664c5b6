"""What a stock scheduler's step does, read off the stock class itself: the rows of docs/solver-step.md that equal it.

Between its model output and what it returns and keeps, a step of a diffusers scheduler is linear in tensors: the sample, the model output,
what it kept of earlier steps and its noise; the one exception is the clipping or thresholding of a single prediction. So the stock code
is run once per step on float64 tensors whose elements are the unit vectors of those inputs, and the coefficients are what it leaves in
them. The factors that it makes from its own tables stay in the tables' dtype, rounding and all: near t = 0 float32 cancels most of their
digits, and the picture is that of the digits that are left. One more element holds a random combination and one holds zero: a step that is
not linear is found out and left to the stock class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# A term is "x" the sample, "d" the clipped prediction, "m" the model output, "noise", or the number of a value kept from an earlier step.
Term = str | int
Vector = dict[Term, float]

_OTHER_NOISE = {torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.normal, torch.bernoulli}
_SCRATCH = ("x", "m", "d", "noise0", "noise1", "noise2")


class NotLinear(Exception):
    """The step is not of the form that a row can hold; the message says why."""


@dataclass(frozen=True)
class Draw:
    """One request for noise: of a dtype, or of a path between two ``levels``."""

    dtype: torch.dtype = torch.float32
    levels: tuple[Any, Any] | None = None


@dataclass(frozen=True)
class Step:
    """One step: what it returns, what it keeps (by value number), and what it asked for on the way."""

    returned: tuple[Vector | None, ...]
    kept: Mapping[int, Vector]
    held: Mapping[tuple[str, int | None], int]  # the attributes that hold values after it, and which
    scale: float  # of scale_model_input
    convert: tuple[float, float]  # (ax, am) of d = ax * x + am * m
    clip: float
    quantile: float
    max_threshold: float
    draws: tuple[Draw, ...]


@dataclass(frozen=True)
class Trace:
    """The steps of one trajectory. ``initial`` maps the value numbers that were there at its start to the attributes that held them."""

    steps: Sequence[Step]
    initial: Mapping[int, tuple[str, int | None]]
    output: type  # what step returns with return_dict=True
    in_tuple: int  # how many of its fields are in the tuple of return_dict=False
    dtypes: tuple[torch.dtype, ...]  # of the fields, for the dtypes of sample and model output that were traced


def trace(
    stock: type,
    state: Mapping[str, Any],
    timesteps: Sequence[Any],
    options: Mapping[str, Any],
    *,
    scaled: bool,
    kept_shape: Sequence[int],
    sample_dtype: torch.dtype,
    model_dtype: torch.dtype,
) -> Trace:
    """Run ``stock``'s steps from ``state``, its ``__dict__``, over ``timesteps``; ``options`` go to `step`.

    ``kept_shape`` is the shape of a tensor in ``state`` that counts as a value from an earlier step. Raises NotLinear for a step that a row
    cannot hold, and whatever the stock class raises.
    """
    shadow = _shadow(stock, state)
    values = {path: k for k, path in enumerate(_tensors(shadow, tuple(kept_shape)))}
    initial = {k: path for path, k in values.items()}
    output, in_tuple, dtypes, requests = _real(stock, state, timesteps, options, tuple(kept_shape), sample_dtype, model_dtype)
    steps: list[Step] = []
    known = len(initial)
    for k, timestep in enumerate(timesteps):
        basis = _Basis(sorted(set(values.values())))
        for (name, at), value in values.items():
            _put(shadow, name, at, basis.unit(value))
        recorder = _Recorder(basis, shadow)
        with recorder:
            scale = _scale(stock, shadow, basis, timestep) if scaled else 1.0
            result = stock.step(shadow, basis.unit("m"), timestep, basis.unit("x"), **options)  # type: ignore[attr-defined]
        returned = tuple(None if field is None else basis.read(field) for field in result.values())
        kept: dict[int, Vector] = {}
        after: dict[tuple[str, int | None], int] = {}
        for path, tensor in _tensors(shadow, basis.shape).items():
            vector = basis.read(tensor)
            same = next((number for number, v in kept.items() if v == vector), None)
            if len(vector) == 1 and isinstance(key := next(iter(vector)), int) and vector[key] == 1.0:
                same = key
            if same is None:
                same, known = known, known + 1
                kept[same] = vector
            after[path] = same
        values = after
        if len(requests[k]) != recorder.draws:
            raise NotLinear("noise that depends on the values of the tensors")
        draws = tuple(requests[k])
        steps.append(Step(returned, kept, after, scale, recorder.convert, recorder.clip, recorder.quantile, recorder.max_threshold, draws))
    return Trace(steps, initial, output, in_tuple, dtypes)


class _Basis:
    """Tensors (1, n, 1, 1) whose elements are the unit vectors of the inputs, then a random combination, then zero."""

    def __init__(self, values: Sequence[int]) -> None:
        self.terms: list[Term] = [*_SCRATCH, *values]
        self.shape = (1, len(self.terms) + 2, 1, 1)
        generator = torch.Generator().manual_seed(len(self.terms))
        self.weights = torch.randn(len(self.terms), generator=generator, dtype=torch.float64)

    def unit(self, term: Term) -> Tensor:
        k = self.terms.index(term)
        vector = torch.zeros(self.shape, dtype=torch.float64)
        vector[0, k], vector[0, -2] = 1.0, self.weights[k]
        return vector

    def read(self, tensor: Tensor) -> Vector:
        if tensor.shape != self.shape:
            raise NotLinear(f"a tensor of shape {tuple(tensor.shape)} where one of {self.shape} went in")
        *coefficients, combined, constant = tensor.detach().double().flatten().tolist()
        size = max(map(abs, coefficients))
        if not all(map(math.isfinite, (*coefficients, combined))):
            raise NotLinear("factors that are not finite")
        expected = math.fsum(c * w for c, w in zip(coefficients, self.weights.tolist(), strict=True))
        scale = math.fsum(abs(c * w) for c, w in zip(coefficients, self.weights.tolist(), strict=True))
        if constant != 0 or abs(combined - expected) > 1e-6 * scale:
            raise NotLinear("a result that is not linear in the sample, the model output and the noise")
        # What cancelled to rounding error is not there; 1.0 is exactly an input.
        return {term: c for term, c in zip(self.terms, coefficients, strict=True) if abs(c) > 1e-13 * size}


class _Recorder(TorchFunctionMode):
    """Answers the stock code's requests for noise and for a clipped prediction with fresh inputs, and computes the rest in float64."""

    def __init__(self, basis: _Basis, shadow: Any) -> None:
        super().__init__()
        self.basis = basis
        self.convert, self.clip, self.quantile, self.max_threshold = (0.0, 0.0), 0.0, 0.0, math.inf
        self.clipped = False
        self.draws = 0
        if hasattr(shadow, "_threshold_sample"):
            shadow._threshold_sample = lambda sample: self._threshold(sample, shadow.config)
        if "noise_sampler" in shadow.__dict__:
            shadow.noise_sampler = self._noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like):
            shape = args[0].shape if func is torch.randn_like else args if isinstance(args[0], int) else args[0]
            if tuple(shape) != self.basis.shape:
                raise NotLinear(f"noise of shape {tuple(shape)}")
            return self._noise()
        if func in (torch.Tensor.clamp, torch.clamp) and args[0].shape == self.basis.shape:
            return self._clamp(*args, **kwargs)
        if not self._holds_a_vector([args, list(kwargs.values())]):
            return func(*args, **kwargs)  # the stock class's factors, as it computes them
        result = func(*_wide(args), **{key: _wide(value) for key, value in kwargs.items()})
        return result.double() if isinstance(result, Tensor) and result.dtype == torch.float32 else result

    def _holds_a_vector(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(map(self._holds_a_vector, value))
        return isinstance(value, Tensor) and value.ndim >= len(self.basis.shape)

    def _noise(self, *levels: Any) -> Tensor:
        if self.draws == 3:
            raise NotLinear("more than three draws of noise in a step")
        self.draws += 1
        return self.basis.unit(f"noise{self.draws - 1}")

    def _predicted(self, sample: Tensor) -> Tensor:
        if self.clipped:
            raise NotLinear("two clipped predictions in a step")
        self.clipped = True
        vector = self.basis.read(sample)
        if not vector.keys() <= {"x", "m"}:
            raise NotLinear("a clipped prediction that depends on more than the sample and the model output")
        self.convert = vector.get("x", 0.0), vector.get("m", 0.0)
        return self.basis.unit("d")

    def _clamp(self, sample: Tensor, low: Any = None, high: Any = None, **named: Any) -> Tensor:
        low, high = named.get("min", low), named.get("max", high)
        if low is None or high is None or float(low) != -float(high) or float(high) <= 0:
            raise NotLinear(f"a clip to {low} .. {high}")
        self.clip = float(high)
        return self._predicted(sample)

    def _threshold(self, sample: Tensor, config: Any) -> Tensor:
        self.quantile, self.max_threshold = float(config.dynamic_thresholding_ratio), float(config.sample_max_value)
        return self._predicted(sample)


def _wide(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_wide, value))
    if isinstance(value, Tensor) and value.dtype == torch.float32 and value.ndim:
        return value.double()
    return torch.float64 if value is torch.float32 else value


def _shadow(stock: type, state: Mapping[str, Any]) -> Any:
    """An instance of the stock class in the given state, on the CPU."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        return [copied(v) for v in value] if isinstance(value, list) else value

    shadow: Any = object.__new__(stock)
    shadow.__dict__.update({name: copied(value) for name, value in state.items()})
    return shadow


def _tensors(scheduler: Any, shape: tuple[int, ...]) -> dict[tuple[str, int | None], Tensor]:
    """The attributes, and the elements of attributes, that are tensors of ``shape``."""
    found: dict[tuple[str, int | None], Tensor] = {}
    for name, value in scheduler.__dict__.items():
        for at, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(item, Tensor) and item.shape == shape:
                found[name, at] = item
    return found


def _put(scheduler: Any, name: str, at: int | None, value: Tensor) -> None:
    if at is None:
        scheduler.__dict__[name] = value
    else:
        scheduler.__dict__[name][at] = value


def _scale(stock: Any, shadow: Any, basis: _Basis, timestep: Any) -> float:
    vector = basis.read(stock.scale_model_input(shadow, basis.unit("x"), timestep))
    if vector.keys() != {"x"}:
        raise NotLinear("scale_model_input is more than a factor")
    return vector["x"]


class _Requests(TorchFunctionMode):
    """Notes the noise that is asked for, and leaves the random generators alone."""

    def __init__(self, shadow: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.dtype = dtype  # of noise from a path
        if "noise_sampler" in shadow.__dict__:
            shadow.noise_sampler = self._from_path

    def _from_path(self, sigma: Any, sigma_next: Any) -> Tensor:
        self.draws.append(Draw(levels=(sigma, sigma_next)))
        return torch.zeros(1, 2, 1, 1, dtype=self.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OTHER_NOISE:
            raise NotLinear("noise that is not normal")
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **(kwargs or {}))
        options = {key: value for key, value in (kwargs or {}).items() if key != "generator"}
        zeros = (torch.zeros if func is torch.randn else torch.zeros_like)(*args, **options)
        self.draws.append(Draw(dtype=zeros.dtype))
        return zeros


def _real(
    stock: Any,
    state: Mapping[str, Any],
    timesteps: Sequence[Any],
    options: Mapping[str, Any],
    kept_shape: tuple[int, ...],
    sample_dtype: torch.dtype,
    model_dtype: torch.dtype,
) -> tuple[type, int, tuple[torch.dtype, ...], list[list[Draw]]]:
    """The steps on tensors of the real dtypes: the class of a result, the length of its tuple, its fields' dtypes, every step's draws."""

    def start() -> Any:
        shadow = _shadow(stock, state)
        for name, at in _tensors(shadow, kept_shape):
            _put(shadow, name, at, torch.zeros(1, 2, 1, 1, dtype=model_dtype))
        return shadow

    sample, model = torch.ones(1, 2, 1, 1, dtype=sample_dtype), torch.ones(1, 2, 1, 1, dtype=model_dtype)
    dtype = torch.promote_types(sample_dtype, model_dtype)
    shadow: Any = start()
    with _Requests(shadow, dtype):
        plain = stock.step(shadow, model, timesteps[0], sample, **options, return_dict=False)
    shadow = start()
    structured: Any = None
    draws: list[list[Draw]] = []
    for timestep in timesteps:
        with _Requests(shadow, dtype) as requests:
            result = stock.step(shadow, model, timestep, sample, **options)
        structured = result if structured is None else structured
        draws.append(requests.draws)
    assert structured is not None
    dtypes = tuple(sample_dtype if field is None else field.dtype for field in structured.values())
    return type(structured), len(plain), dtypes, draws
