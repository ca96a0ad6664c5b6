"""Suite "steps": microseconds per solver step with guidance, every variant on the same inputs."""

from __future__ import annotations

import itertools
import resource
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import GUIDANCE, STEPS, StepCase, step_cases
from benchmarks.composites import CompiledRun, StockRun
from benchmarks.timing import Options, Row
from genfast import ops, reference


class Fused:
    """A whole run of a plan through the operator a user calls, in ``impl`` genfast.ops or genfast.reference."""

    def __init__(self, case: StepCase, impl: Any, dtype: torch.dtype, device: str) -> None:
        plan = case.plan()
        self.program = plan.compile(
            case.denoiser(), dtype=dtype, device=device, guidance=GUIDANCE, threshold=case.threshold, max_threshold=1.0, model_input=False
        )
        self.impl, self.threshold, self.slots = impl, case.threshold is not None, plan.slots
        self.counters = list(torch.arange(len(plan.rows), device=device).split(1))
        self.seeds = torch.arange(case.shape[0], device=device) if any(row.noisy for row in plan.rows) else None
        self.ring = torch.zeros(plan.slots, *case.shape, dtype=dtype, device=device)
        # The fewest bytes a step can move: every live tensor read once, every output written once, averaged over the plan.
        element = self.ring.element_size() * self.ring[0].numel()
        touched = [(any("x" in t or "d" in t for t in row.outputs.values())) + 2 + len(row.reads) + len(row.outputs) for row in plan.rows]
        self.bytes_per_step = element * sum(touched) / len(touched)

    def __call__(self, x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        self.ring[0].copy_(x)
        p = self.program
        for counter in self.counters:
            self.impl.solver_step_(self.ring, cond, p.coef, p.index, counter, uncond=uncond, seeds=self.seeds, threshold=self.threshold)
        return self.ring[0]


def time_steps(case: StepCase, dtype: torch.dtype, device: str, threads: int, command: str, quick: bool) -> list[Row]:
    """The rows of one case: microseconds per step of every variant, interleaved in one process."""
    generator = torch.Generator().manual_seed(0)
    x, cond, uncond = (torch.randn(case.shape, generator=generator).to(device, dtype) for _ in range(3))
    fused, plain = Fused(case, ops, dtype, device), Fused(case, reference, dtype, device)
    runs: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"genfast": fused, "reference": plain}
    modes = {"compiled": None, **({"compiled-graphs": "reduce-overhead"} if device == "cuda" else {})}
    if not quick and (device == "cpu" or dtype == torch.float32):  # compiling takes most of a GPU's minutes
        torch.compiler.reset()  # every case compiles afresh, within the limit of recompilations
        for name, mode in modes.items():
            p = fused.program
            runs[name] = CompiledRun(p.coef, p.index, fused.slots, guided=True, mode=mode)
    if not quick:
        try:
            import diffusers  # noqa: F401

            runs["diffusers"] = StockRun(case.stock_scheduler(), STEPS, GUIDANCE)
        except ImportError:
            print("diffusers is not installed: its rows are left out", file=sys.stderr)
    target = torch.empty_like(x)
    variants: dict[str, Callable[[], object]] = {name: partial(run, x, cond, uncond) for name, run in runs.items()}
    variants["copy"] = lambda: [target.copy_(x) for _ in range(STEPS)]
    results = {name: run(x, cond, uncond).double().clone() for name, run in runs.items()}
    if "compiled" in results and not any(row.noisy for row in case.plan().rows):
        error = (results["genfast"] - results["compiled"]).abs().max() / results["compiled"].abs().max()
        if not error < (1e-4 if dtype == torch.float32 else 5e-2):
            raise RuntimeError(f"{case.name}: genfast and the compiled expression differ by {error:.1e} on the timed inputs")
    if device == "cpu":
        torch.set_num_threads(threads)
    timings = timing.interleave(
        variants, device=device, rounds=3 if quick else 21, round_seconds=0.005 if quick else 0.05, calls_per_run=STEPS, quiet=not quick
    )
    copy_rate = 2 * x.numel() * x.element_size() / timings["copy"].median
    facts = timing.environment(device) | {"command": command}
    rows = []
    for name, t in timings.items():
        row: Row = {"case": case.name, "variant": name, "shape": list(case.shape), "dtype": str(dtype).removeprefix("torch.")}
        row |= {"median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        row |= {"bytes": 2 * x.numel() * x.element_size() if name == "copy" else round(fused.bytes_per_step)}
        if name == "genfast":
            rate = fused.bytes_per_step / t.median
            row |= {"gb_per_s": round(rate / 1e3, 2), "share_of_copy": round(rate / copy_rate, 3)}
            difference = (results["genfast"] - results["reference"]).abs().max().item()
            row |= {"max_abs_difference_from_reference": difference}
        rows.append(row | facts)
    return rows


def time_noise(dtype: torch.dtype, device: str, threads: int, command: str, quick: bool) -> list[Row]:
    """Microseconds of filling a tensor with the samples' own noise, beside torch's generator and writing a constant."""
    shape = (2, 3, 16, 16) if quick else (8, 3, 1024, 1024)
    seeds, target = torch.arange(shape[0], device=device), torch.empty(shape, dtype=dtype, device=device)
    variants: dict[str, Callable[[], object]] = {
        "genfast": lambda: ops.normal(seeds, shape, dtype=dtype),
        "genfast, uniform": lambda: ops.uniform(seeds, shape, dtype=dtype),
        "torch": lambda: torch.randn(shape, dtype=dtype, device=device),
        "fill": lambda: target.fill_(1.0),
    }
    if device == "cpu":
        torch.set_num_threads(threads)
    times = timing.interleave(variants, device=device, rounds=3 if quick else 11, round_seconds=0.005 if quick else 0.05, quiet=not quick)
    kind = str(dtype).removeprefix("torch.")
    case: Row = {"case": f"noise, {'x'.join(map(str, shape))}, {kind}", "shape": list(shape), "dtype": kind, "bytes": target.nbytes}
    facts = timing.environment(device) | {"command": command}
    return [
        case
        | {"variant": name, "median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        | {"gb_per_s": round(target.nbytes / t.median / 1e3, 2)}
        | facts
        for name, t in times.items()
    ]


def heap_growth(command: str, steps: int) -> list[Row]:
    """Growth of the process over ``steps`` guided DPM++ 2M steps, in KiB: the peak may not move once the first run is done."""
    case = step_cases()[-1]
    run = Fused(case, ops, torch.float32, "cpu")
    x, cond, uncond = (torch.randn(case.shape) for _ in range(3))
    for _ in range(5):
        run(x, cond, uncond)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(max(1, steps // STEPS)):
        run(x, cond, uncond)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    row: Row = {"case": f"heap growth over {steps} steps", "variant": "genfast-heap", "growth_kib": growth}
    return [row | timing.environment("cpu") | {"command": command}]


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """Every case, in every dtype and with every number of threads."""
    dtypes = [torch.float32, torch.bfloat16] if options.device == "cuda" else [torch.float32]
    cases = step_cases(pixels=(8, 3, 1024, 1024)) if options.device == "cuda" else step_cases()
    if options.quick:
        cases = step_cases((2, 3, 16, 16), (1, 4, 8, 8))
    for case in cases:
        for dtype, threads in itertools.product(dtypes, options.threads) if options.filter in case.name else []:
            label = f"{case.name}, {str(dtype).removeprefix('torch.')}" + (f", {threads} threads" if threads else "")
            rows = options.attempt(label, partial(time_steps, case, dtype, options.device, threads, options.command, options.quick))
            if rows:
                yield label, rows
    for dtype, threads in itertools.product(dtypes, options.threads) if options.filter in "noise" else []:
        label = f"noise, {str(dtype).removeprefix('torch.')}" + (f", {threads} threads" if threads else "")
        rows = options.attempt(label, partial(time_noise, dtype, options.device, threads, options.command, options.quick))
        if rows:
            yield label, rows
    if options.device == "cpu" and not options.filter:
        rows = heap_growth(options.command, 100 if options.quick else 1000)
        yield rows[0]["case"], rows
