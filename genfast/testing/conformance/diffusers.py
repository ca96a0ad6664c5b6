"""Schedulers of diffusers against their drop-ins, driven as pipelines drive them."""

from __future__ import annotations

import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .grid import Case, cover
from .judge import Outcome, Verdict, judge
from .report import Result
from .schedulers import axes_of

_SHAPE = (2, 4, 8, 8)


def classes() -> dict[str, tuple[type, type]]:
    """Every scheduler that `genfast.compat.diffusers` exports, by name: the stock class and the drop-in."""
    try:
        import diffusers
    except ImportError:
        raise ImportError("conformance: diffusers is not installed, supported: pip install 'diffusers>=0.31'") from None
    from genfast.compat import diffusers as compat

    stock = {name: getattr(diffusers, name, None) for name in compat.__all__}
    return {name: (cls, getattr(compat, name)) for name, cls in stock.items() if isinstance(cls, type) and hasattr(cls, "set_timesteps")}


def check_class(stock: type, ours: type, quick: bool) -> Iterator[Result]:
    """The results of every case of a class: its grid, wrong use, and noise by seeds where `step` takes them."""
    name = stock.__name__

    def accepts(case: Case) -> tuple[bool, tuple[Outcome, list[Tensor]]]:
        outcome, draws = run(stock, case)
        return outcome.usable, (outcome, draws)

    for case, accepted, (expected, draws) in cover(axes_of(name), 1 if quick else 2, accepts):
        got, _ = run(ours, case)
        exact = run(stock, case, exact=draws)[0] if accepted else expected
        yield Result(name, str(case), judge(case.merged("run")["dtype"], got, expected, exact), got.fused, accepted)
    for use, function in _WRONG.items():
        raised = [_raised(function, cls) for cls in (stock, ours)]
        problem = "" if raised[0] == raised[1] else f"raised {raised[1]}, stock {raised[0]}"
        yield Result(name, f"wrong use: {use}", Verdict(math.inf if problem else 0.0, problem), True, False)
    if "seeds" in inspect.signature(ours.step).parameters:  # type: ignore[attr-defined]
        problem = _seeds(ours)
        yield Result(name, "seeds: a sample of a batch is the sample alone", Verdict(math.inf if problem else 0.0, problem), True, True)


def run(cls: type, case: Case, exact: list[Tensor] | None = None) -> tuple[Outcome, list[Tensor]]:
    """One trajectory of ``case``, and the noise that its steps drew. Given that noise as ``exact`` it is in float64, tables and all."""
    outcome, draws = Outcome(), _Draws(exact)
    with _quiet():
        try:
            _trajectory(cls, case, draws, outcome)
        except Exception as error:
            outcome.raised = f"{type(error).__name__} in {draws.phase}"
    return outcome, draws.noise


def _trajectory(cls: Any, case: Case, draws: _Draws, outcome: Outcome) -> None:
    how, exact = case.merged("run"), draws.exact is not None
    note = outcome.facts.append

    def tensor(seed: int) -> Tensor:
        value = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        value = value.to(how["dtype"]).to(memory_format=how["layout"])
        return value.double() if exact else value

    draws.phase = "__init__"
    scheduler = cls(**case.merged("init"))
    if hasattr(cls, "trace_from"):
        scheduler.trace_from = 0  # small tensors are left to the stock step at first
    draws.phase = "set_timesteps"
    grid = case.merged("grid")
    if not grid.keys() & {"timesteps", "sigmas"}:
        grid["num_inference_steps"] = how["steps"]
    scheduler.set_timesteps(**grid)
    timesteps, order = scheduler.timesteps, getattr(scheduler, "order", 1)
    note(("timesteps", timesteps))
    note(("sigmas", getattr(scheduler, "sigmas", None)))
    note(("init_noise_sigma", float(getattr(scheduler, "init_noise_sigma", 1.0))))
    note(("order and length", (order, len(scheduler))))
    process = _process(scheduler)
    draws.phase = "add_noise"
    begin = int(how["start"] * how["steps"]) * order
    clean, noise = tensor(1), tensor(2)
    if begin:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        at = timesteps[begin : begin + 1].expand(len(clean))
        x = scheduler.scale_noise(clean, at, noise) if hasattr(scheduler, "scale_noise") else scheduler.add_noise(clean, noise, at)
        outcome.tensors.append(("noised", x))
    else:
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    if exact:
        _widen(scheduler)
    options = case.merged("step")
    generators = [torch.Generator().manual_seed(3 + k) for k in range(len(clean))]
    if "generator" in inspect.signature(scheduler.step).parameters and how["generator"] != "global":
        options["generator"] = generators[0] if how["generator"] == "one" else generators
    torch.manual_seed(17)
    for k, t in enumerate(timesteps[begin:]):
        draws.phase = f"step {k}"
        if "variance_noise" in how:
            options["variance_noise"] = tensor(100 + k)
            options.pop("generator", None)
        with draws:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = _model(seen, float(t), process, scheduler.config, "learned" in how)
        with draws, draws.of_paths(cls):
            result = scheduler.step(output.to(x.dtype), t, x, return_dict=how["return_dict"], **options)
        note((f"result {k}", type(result).__name__ if how["return_dict"] else len(result)))
        note((f"step_index {k}", getattr(scheduler, "step_index", None)))
        fields = result.values() if how["return_dict"] else result
        outcome.tensors += [(f"step {k}, field {j}", value) for j, value in reversed(list(enumerate(fields))) if isinstance(value, Tensor)]
        x = result[0]
    note(("random state", (torch.get_rng_state(), *(generator.get_state() for generator in generators))))
    outcome.fused = getattr(scheduler, "fallback", None) is None


# A network: it predicts a smooth bounded x_0, in the terms that the scheduler asks for.


def _process(scheduler: Any) -> Callable[[float], tuple[float, float]] | None:
    """alpha and sigma of the process that the network was trained on, by timestep; None where any bounded output is as good."""
    if (hasattr(scheduler, "get_scalings_for_boundary_condition") and hasattr(scheduler, "sigma_to_t")) or hasattr(
        scheduler.config, "sigma_data"
    ):
        return None
    if getattr(scheduler.config, "use_flow_sigmas", False) or not hasattr(scheduler, "alphas_cumprod"):
        train = scheduler.config.num_train_timesteps
        if hasattr(scheduler, "ets"):  # improved PNDM
            return lambda t: (math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))
        return lambda t: (1 - t / train, t / train)
    table = scheduler.alphas_cumprod.double().numpy()

    def of(t: float) -> tuple[float, float]:
        square = float(np.interp(t, np.arange(len(table)), table))
        return math.sqrt(square), math.sqrt(1 - square)

    return of


def _model(x: Tensor, t: float, process: Callable[[float], tuple[float, float]] | None, config: Any, learned: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    data = 0.9 * torch.tanh(1.3 * wide) + 0.1 * torch.cos(3 * wide + t / 300)
    kind = getattr(config, "prediction_type", "flow_prediction")
    if process is None or kind == "sample":
        output = data
    else:
        a, s = process(t)
        eps = (wide - a * data) / max(s, 0.03)
        output = {"epsilon": eps, "v_prediction": a * eps - s * data}.get(kind, eps - data)
    return torch.cat([output, torch.sin(2 * wide)], dim=1) if learned else output


# Float64


class _Draws(TorchFunctionMode):
    """Notes the noise that is drawn. Given noise, it hands that out instead and computes in float64 what would be narrower."""

    def __init__(self, exact: list[Tensor] | None) -> None:
        super().__init__()
        self.exact = None if exact is None else iter(exact)
        self.noise: list[Tensor] = []
        self.phase = ""
        self.on_path = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like) and not self.on_path:
            return self._drawn(lambda: func(*args, **kwargs))
        if self.exact is None:
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.tensor and not kwargs.get("dtype"):
            result = func(*args, **kwargs)
            return func(*args, **{**kwargs, "dtype": torch.float64}) if result.dtype == torch.float32 else result
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **{key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()})

    def _drawn(self, draw: Callable[[], Tensor]) -> Tensor:
        if self.exact is not None:
            return next(self.exact).double()
        self.noise.append(draw())
        return self.noise[-1]

    @contextmanager
    def of_paths(self, cls: type) -> Iterator[None]:
        """Note what comes from the Brownian path of the class's module, if it has one, and not how the path was made."""
        path: Any = getattr(sys.modules[cls.__module__], "BrownianTreeNoiseSampler", None)
        if path is None:
            yield
            return
        stock = path.__call__

        def call(*args: Any) -> Tensor:
            self.on_path = True
            try:
                return self._drawn(lambda: stock(*args))
            finally:
                self.on_path = False

        path.__call__ = call
        try:
            yield
        finally:
            path.__call__ = stock


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: the grid goes where stock warns, too."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _widen(scheduler: Any) -> None:
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(scheduler, name, value.double())


# Wrong use


def _raised(function: Callable[[Any], object], cls: Any) -> str:
    with _quiet():
        try:
            function(cls)
        except Exception as error:
            return type(error).__name__
    return "nothing"


def _stepped(cls: Any, change: Callable[[dict[str, Any]], object]) -> None:
    """The first step of four, after a change of its arguments."""
    scheduler = cls()
    scheduler.set_timesteps(4)
    x = torch.linspace(-1, 1, 128).view(2, 4, 4, 4)
    if hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input(x, scheduler.timesteps[0])
    arguments = {"model_output": x.sin(), "timestep": scheduler.timesteps[0], "sample": x}
    change(arguments)
    scheduler.step(**arguments)


def _too_many(cls: Any) -> None:
    cls().set_timesteps(1100)


def _unprepared(cls: Any) -> None:
    x = torch.zeros(1, 4, 4, 4)
    cls().step(x, 10, x)


def _both(cls: Any) -> None:
    cls().set_timesteps(4, timesteps=[900, 500, 100], sigmas=[3.0, 1.0, 0.1])


_WRONG: dict[str, Callable[[Any], object]] = {
    "step before set_timesteps": _unprepared,
    "more steps than trained": _too_many,
    "two grids at once": _both,
    "no grid": lambda cls: cls().set_timesteps(None),
    "an unknown option": lambda cls: _stepped(cls, lambda a: a.update(no_such_option=1)),
    "a timestep that is not there": lambda cls: _stepped(cls, lambda a: a.update(timestep=123456)),
    "an integer timestep": lambda cls: _stepped(cls, lambda a: a.update(timestep=int(a["timestep"]))),
    "shapes that do not fit": lambda cls: _stepped(cls, lambda a: a.update(sample=a["sample"][:, :3])),
    "no sample": lambda cls: _stepped(cls, lambda a: a.update(sample=None)),
    "three generators for two samples": lambda cls: _stepped(cls, lambda a: a.update(generator=[torch.Generator() for _ in range(3)])),
}


# Noise by seeds


def _seeds(cls: Any) -> str:
    def samples(seeds: list[int], rows: slice) -> Tensor:
        scheduler = cls()
        scheduler.set_timesteps(5)
        x = torch.linspace(-1, 1, 3 * 64).view(3, 4, 4, 4)[rows] * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(torch.sin(3 * seen), t, x, seeds=seeds)[0]
        return x

    seeds = [5, 7, 2**40]
    with _quiet():
        try:
            together = samples(seeds, slice(None))
            for k, seed in enumerate(seeds):
                alone = samples([seed], slice(k, k + 1))
                if not together.isfinite().all() or not torch.equal(alone[0], together[k]):
                    return f"sample {k} differs by {float((alone[0] - together[k]).abs().max()):.3g}"
        except ImportError as error:
            return "" if "torchsde" in str(error) else str(error)
        except Exception as error:
            return f"raised {type(error).__name__}: {error}"
    return ""
