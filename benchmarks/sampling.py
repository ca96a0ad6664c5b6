"""Suite "sampling": the shipped model's whole loop, network included."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import STEPS
from benchmarks.gan_training import flop
from benchmarks.timing import Options, Row
from genfast import Sampler, ops
from genfast.generate import open_model
from genfast.models.denoising import denoiser_of


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


def time_sampling(device: str, threads: int, command: str, quick: bool, batch: int) -> list[Row]:
    """The shipped model, 20 steps of DPM++ 2M with guidance: microseconds per step, network included."""
    model = open_model(device=device)
    denoiser, about = denoiser_of(model), model.about
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
        try:
            variants["diffusers"] = stock_loop(denoiser.net, labels, noise)
        except ImportError:
            print("diffusers is not installed: its rows are left out", file=sys.stderr)
    samples = {name: run() for name, run in variants.items()}
    timings = timing.interleave(
        dict(variants), device=device, rounds=3 if quick else 11, round_seconds=0.0, calls_per_run=STEPS, quiet=not quick
    )
    # The network's convolutions and products, of both halves of the guidance.
    operations = flop(
        lambda: denoiser.net(torch.zeros(2 * batch, *shape[1:], device=device), torch.ones(2 * batch, device=device), labels.repeat(2))
    )
    facts = timing.environment(device) | {"command": command, "gflop": round(operations / 1e9, 3)}
    rows = []
    for name, t in timings.items():
        row: Row = {"case": _case(batch), "variant": name, "shape": list(shape), "dtype": "float32"}
        row |= {"median_us": round(t.median, 3), "iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        rows.append(row | {"max_abs_difference_from_genfast": (samples[name] - samples["genfast"]).abs().max().item()} | facts)
    return rows


def _case(batch: int) -> str:
    return f"shipped model, {batch} image{'s' * (batch > 1)}, {STEPS} steps"


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    """The shipped model, a batch and one image, with every number of threads."""
    for batch in (2,) if options.quick else (16, 1):
        for threads in options.threads if options.filter in _case(batch) else []:
            timed = partial(time_sampling, options.device, threads, options.command, options.quick, batch)
            if rows := options.attempt(_case(batch), timed):
                yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
