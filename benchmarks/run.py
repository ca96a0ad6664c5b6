"""``python -m benchmarks.run``: genfast, its reference, torch.compile and each peer that is installed, side by side in one process.

Rows go to benchmarks/results/<suite>-<device>.jsonl (or --out DIR); ``python -m benchmarks.report`` makes the tables from them.
"""

from __future__ import annotations

import argparse
import itertools
import re
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import GUIDANCE, STEPS, StepCase, step_cases
from benchmarks.composites import CompiledRun, StockRun
from genfast import Sampler, ops, reference
from genfast.train import pictures

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


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
    if not quick:
        torch.compiler.reset()  # every case compiles afresh, within the limit of recompilations
        for name, mode in modes.items():
            p = fused.program
            runs[name] = CompiledRun(p.coef, p.index, fused.slots, guided=True, mode=mode)
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
        if name == "genfast":
            rate = fused.bytes_per_step / t.median
            row |= {"bytes": round(fused.bytes_per_step), "gb_per_s": round(rate / 1e3, 2), "share_of_copy": round(rate / copy_rate, 3)}
            difference = (results["genfast"] - results["reference"]).abs().max().item()
            row |= {"max_abs_difference_from_reference": difference}
        rows.append(row | facts)
    return rows


def stock_loop(net: Any, labels: Tensor, noise: Tensor) -> Callable[[], Tensor]:
    """The shipped model sampled the way a diffusers pipeline does it: cat, network, chunk, combine, scheduler.step."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler: Any = cast(Any, DPMSolverMultistepScheduler)(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    both = torch.cat([torch.full_like(labels, net.null_label), labels])

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(STEPS, device=noise.device)
        x = noise
        for t in scheduler.timesteps:
            uncond, cond = net(torch.cat([x, x]), t.float().expand(len(both)), both).chunk(2)
            x = scheduler.step(uncond + 2.5 * (cond - uncond), t, x, return_dict=False)[0]
        return x

    return run


def time_sampling(device: str, threads: int, command: str, quick: bool) -> list[Row]:
    """The shipped model, 20 steps of DPM++ 2M with guidance: microseconds per step, network included."""
    denoiser, about = pictures.load_denoiser(device=device)
    batch = 2 if quick else 16
    shape = (batch, 1, *about["size"])
    labels = torch.arange(batch, device=device) % len(about["classes"])
    cond, uncond = {"y": labels}, {"y": torch.full_like(labels, denoiser.net.null_label)}  # type: ignore[attr-defined]

    def drawn(**options: Any) -> Callable[[], Tensor]:
        sampler = Sampler("dpmpp_2m", STEPS, guidance_scale=2.5, progress=False, **options)
        return lambda: sampler(denoiser, shape, seeds=range(batch), cond=cond, uncond=uncond)

    variants: dict[str, Callable[[], Tensor]] = {"genfast": drawn(), "reference": drawn(impl="reference")}
    if device == "cuda":
        variants["genfast-captured"] = drawn(capture=True)
    else:
        torch.set_num_threads(threads)
    if not quick:
        noise = ops.normal(torch.arange(batch, device=device), shape)
        variants["diffusers"] = stock_loop(denoiser.net, labels, noise)
    samples = {name: run() for name, run in variants.items()}
    timings = timing.interleave(
        dict(variants), device=device, rounds=3 if quick else 11, round_seconds=0.0, calls_per_run=STEPS, quiet=not quick
    )
    facts = timing.environment(device) | {"command": command}
    rows = []
    for name, t in timings.items():
        row: Row = {"case": f"shipped model, {batch} images, {STEPS} steps", "variant": name, "shape": list(shape), "dtype": "float32"}
        row |= {"median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        rows.append(row | {"max_abs_difference_from_genfast": (samples[name] - samples["genfast"]).abs().max().item()} | facts)
    return rows


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


def show(rows: list[Row], label: str) -> None:
    ours = next(row for row in rows if row["variant"] == "genfast")
    share = f", {ours['share_of_copy']:.0%} of copy bandwidth" if "share_of_copy" in ours else ""
    print(f"{label}: {ours['median_us']:.1f} us a step{share}")
    for row in rows:
        if row is not ours:
            print(f"    {row['variant']:<16} {row['median_us']:>10.1f} us  {row['median_us'] / ours['median_us']:>6.2f}x")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="all", choices=["steps", "sampling", "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="CPU only: time with each number of threads"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the rows")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, small shapes, no peers: shows that it runs, times nothing worth keeping"
    )
    options = parser.parse_args(arguments)
    command = "python -m benchmarks.run " + " ".join(sys.argv[1:] if arguments is None else arguments)
    command = re.sub(r" --out \S+", "", command)  # where the rows went is not how they were made
    if options.device == "cuda":
        cases, dtypes = step_cases(pixels=(8, 3, 1024, 1024)), [torch.float32, torch.bfloat16]
    else:
        cases, dtypes = (step_cases((2, 3, 16, 16), (1, 4, 8, 8)) if options.quick else step_cases()), [torch.float32]
    threads = options.threads if options.device == "cpu" else [0]
    results = options.out / f"steps-{options.device}.jsonl"
    for case in cases if options.suite != "sampling" else []:
        for dtype, count in itertools.product(dtypes, threads) if options.filter in case.name else []:
            new = time_steps(case, dtype, options.device, count, command.strip(), options.quick)
            timing.append(results, new)
            show(new, f"{case.name}, {new[0]['dtype']}" + (f", {count} threads" if count else ""))
    if options.device == "cpu" and options.suite != "sampling" and not options.filter:
        new = heap_growth(command.strip(), 100 if options.quick else 1000)
        timing.append(results, new)
        print(f"{new[0]['case']}: {new[0]['growth_kib']} KiB")
    if options.suite != "steps" and options.filter in "shipped model":
        for count in threads:
            new = time_sampling(options.device, count, command.strip(), options.quick)
            timing.append(options.out / f"sampling-{options.device}.jsonl", new)
            show(new, new[0]["case"] + (f", {count} threads" if count else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
