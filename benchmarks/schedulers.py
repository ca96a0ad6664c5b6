"""Suite "schedulers": the step of every class of genfast.compat.diffusers beside the stock class's."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import LATENT, PIXELS, STEPS
from benchmarks.timing import Options, Row

# What a class needs to be told; everything else is its default configuration.
CONFIGURATION: dict[str, dict[str, Any]] = {"DPMSolverSDEScheduler": {"noise_sampler_seed": 0}, "PNDMScheduler": {"skip_prk_steps": True}}


def trajectory(scheduler: Any, sample: Tensor, model_output: Tensor) -> Callable[[], float]:
    """Seconds of the steps of one trajectory, all but its first, without guidance and without a network."""
    generator = torch.Generator(sample.device).manual_seed(0)
    options: dict[str, Any] = {"return_dict": False}
    if "generator" in inspect.signature(scheduler.step).parameters and getattr(scheduler, "seeds", None) is None:
        options["generator"] = generator
    synchronize: Callable[[], None] = torch.cuda.synchronize if sample.is_cuda else lambda: None

    def run() -> float:
        scheduler.set_timesteps(STEPS, device=sample.device)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, scheduler.timesteps[0])
        scheduler.step(model_output, scheduler.timesteps[0], sample, **options)
        synchronize()
        start = time.perf_counter()
        for t in scheduler.timesteps[1:]:
            scheduler.step(model_output, t, sample, **options)
        synchronize()
        return time.perf_counter() - start

    return run


def time_class(name: str, shape: tuple[int, ...], threads: int, options: Options) -> list[Row]:
    """Microseconds per step of the stock class, the fused class, and the fused class with noise of its own where it draws any."""
    import diffusers

    from genfast.compat import diffusers as fused

    generator = torch.Generator().manual_seed(0)
    sample, model_output = (torch.randn(shape, generator=generator).to(options.device) for _ in range(2))
    configuration = CONFIGURATION.get(name, {})
    schedulers = {kind: getattr(module, name)(**configuration) for kind, module in (("diffusers", diffusers), ("genfast", fused))}
    schedulers["genfast"].trace_from = 0  # the quick shape is one that is left to the stock step at first
    first = {}
    for kind, scheduler in schedulers.items():
        scheduler.set_timesteps(STEPS, device=options.device)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, scheduler.timesteps[0])
        torch.manual_seed(0)
        first[kind] = scheduler.step(model_output, scheduler.timesteps[0], sample).prev_sample
    difference = (first["genfast"] - first["diffusers"]).abs().max() / max(first["diffusers"].abs().max().item(), 1.0)
    if schedulers["genfast"].fallback or not difference < 2e-5:
        raise RuntimeError(f"{name}: fallback {schedulers['genfast'].fallback}, first step differs by {difference:.1e}")
    steps = len(schedulers["genfast"].timesteps) - 1
    if schedulers["genfast"]._row.step.draws:
        schedulers["genfast-seeds"] = getattr(fused, name)(**configuration)
        schedulers["genfast-seeds"].seeds = list(range(shape[0]))
    if options.device == "cpu":
        torch.set_num_threads(threads)
    timings = timing.interleave(
        {kind: trajectory(scheduler, sample, model_output) for kind, scheduler in schedulers.items()},
        device=options.device,
        rounds=3 if options.quick else 11,
        round_seconds=0.0 if options.quick else 0.02,
        calls_per_run=steps,
        quiet=not options.quick,
        counts_itself=True,
    )
    facts = timing.environment(options.device) | {"command": options.command}
    case: Row = {"case": f"{name}, {'x'.join(map(str, shape))}", "shape": list(shape), "dtype": "float32"}
    case |= {"bytes": 3 * 4 * sample.numel()}  # the least of any solver: sample and model output in, sample out
    return [
        case
        | {"variant": kind, "median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        | {"first_step_difference": float(difference)}
        | facts
        for kind, t in timings.items()
    ]


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """Every class at a shape that is bound by bandwidth and at one that is bound by overhead."""
    try:
        from genfast.compat.diffusers import CLASSES
    except ImportError:
        print("diffusers is not installed: its schedulers are left out", file=sys.stderr)
        return
    for shape in ((1, 4, 8, 8),) if options.quick else (PIXELS, LATENT):
        for name, fused in CLASSES.items():
            if fused.pathwise and shape == PIXELS:  # torchsde takes seconds a step there, whoever calls it
                continue
            for threads in options.threads if options.filter in f"{name}, {'x'.join(map(str, shape))}" else []:
                rows = options.attempt(f"{name}, {'x'.join(map(str, shape))}", partial(time_class, name, shape, threads, options))
                if rows:
                    yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
