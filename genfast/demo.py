"""``python -m genfast.demo``: pictures from the shipped Fashion-MNIST model, and the fused path against the reference on the same seeds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfast.device import usable
from genfast.failure import Parser, guarded
from genfast.files import write_atomically
from genfast.generate import generate, open_model
from genfast.impl import NAMESPACES
from genfast.media import encoded, grid
from genfast.models import Model
from genfast.models.denoising import denoiser_of
from genfast.request import SamplingOptions, every
from genfast.samplers import Denoiser, Sampler

COLUMNS, STEPS, GUIDANCE, SOLVER = 8, 20, 2.5, "dpmpp_2m"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the grid, then measure; about half a minute on two CPU cores."""
    parser = Parser(prog="genfast.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="the PNG to write")
    parser.add_argument("--device", help="where to run; cuda if torch sees one, else cpu, when not given")
    arguments = parser.parse_args(argv)

    model = open_model(device=usable(arguments.device))
    classes = model.classes
    print(f"{len(classes)} classes x {COLUMNS} seeds: {SOLVER}, {STEPS} steps, guidance {GUIDANCE}, on {model.device}")
    x = generate(model, every(range(len(classes)), range(COLUMNS), SamplingOptions(SOLVER, STEPS, guidance_scale=GUIDANCE)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out, encoded(grid(x, COLUMNS, classes)))
    print(f"wrote {arguments.out}\n")
    compare(model)
    return 0


def compare(model: Model, rounds: int = 3) -> None:
    """Print what fused and reference cost and how far apart their samples are, one image a class with the same seeds."""
    classes, size, denoiser = len(model.classes), model.about["size"], denoiser_of(model)
    labels = torch.arange(classes, device=model.device)
    null, shape = torch.full_like(labels, model.net.null_label), (classes, model.net.config.image_channels, *size)
    samplers = {impl: _sampler(denoiser, progress=False, impl=impl) for impl in ("fused", "reference")}
    draws = {impl: partial(sampler, denoiser, shape, seeds=[0] * classes, cond=labels, uncond=null) for impl, sampler in samplers.items()}
    draws["fused"]()  # warms up; not counted
    whole, samples = _interleaved(draws, rounds)
    steps, _ = _interleaved({impl: _step_alone(denoiser, impl, classes * COLUMNS, size) for impl in samplers}, 20 * rounds)

    print(f"the same {classes} seeds and labels, medians of {rounds} interleaved rounds, {torch.get_num_threads()} threads:\n")
    print(f"{'':40}{'fused':>12}{'reference':>12}")
    print(_line(f"solver step of {classes * COLUMNS} pictures, us", 1e6 / STEPS, steps))
    print(_line(f"one picture, {STEPS} steps and network, ms", 1e3 / classes, whole))
    difference = (samples["fused"] - samples["reference"]).abs().max().item()
    print(f"{'largest difference of a pixel':40}{difference:>12g}\n")
    reference = statistics.median(steps["reference"]) / STEPS / classes / COLUMNS
    share = reference / (statistics.median(whole["reference"]) / STEPS / classes)
    print(
        "Fused is the solver step as one kernel, reference the same step in PyTorch operators. Both columns run the same PyTorch network."
    )
    print(f"The reference's solver step takes {share:.1%} of a picture here: with this network and device the kernel can save no more.")


def _sampler(denoiser: Denoiser, **options: Any) -> Sampler:
    """The demo's sampler; on a GPU the fused one records network and step in one CUDA graph."""
    capture = _parameter(denoiser).is_cuda and options.get("impl") != "reference"
    return Sampler(SOLVER, STEPS, guidance_scale=GUIDANCE, capture=capture, **options)


def _parameter(denoiser: Denoiser) -> Tensor:
    net: Any = denoiser.net
    parameter: Tensor = next(net.parameters())
    return parameter


def _line(name: str, scale: float, seconds: dict[str, list[float]]) -> str:
    fused, reference = (statistics.median(seconds[impl]) for impl in ("fused", "reference"))
    return f"{name:40}{fused * scale:>12,.1f}{reference * scale:>12,.1f}{reference / fused:>10.1f}x"


def _interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every round of every call, taken in turns, and what the calls returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    returned: dict[str, Any] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            returned[name] = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds, returned


def _step_alone(denoiser: Denoiser, impl: str, batch: int, size: Sequence[int]) -> Callable[[], None]:
    """All rows of the plan on fixed tensors, without the network."""
    plan = Sampler(SOLVER, STEPS).plan(denoiser.noise)
    net: Any = denoiser.net
    device = _parameter(denoiser).device
    program = plan.compile(denoiser, device=device, guidance=GUIDANCE)
    ring = torch.zeros(plan.slots, batch, net.config.image_channels, *size, device=device)
    output: Tensor = torch.zeros(2 * batch, *ring.shape[2:], device=device)
    model_input = torch.empty_like(output)
    counters = list(torch.arange(len(plan.rows), device=device)[:, None])

    def run() -> None:
        for counter in counters:
            NAMESPACES[impl].solver_step_(ring, output, program.coef, program.index, counter, model_input=model_input)

    return run


if __name__ == "__main__":
    sys.exit(guarded(main))
