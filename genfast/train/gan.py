"""Adversarial training of a generator."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from genfast.models import generators
from genfast.train import ema as averages
from genfast.train.adversarial import D_DRAW, G_DRAW, PATH, PATH_DRAW, AdversarialStep, Objective
from genfast.train.checkpoint import write_atomically
from genfast.train.pictures import grid
from genfast.train.run import (
    MODEL_NOISE,
    MOST_SEED,
    NOISE,
    TIMES,
    VALIDATION,
    DataOrder,
    Images,
    append,
    check_number,
    cut_log,
    digest,
    load_checkpoint,
    plot_log,
    sample_seeds,
    save_checkpoint,
    to_model,
)

NON_SATURATING = Objective()
CURVES = dict.fromkeys(("d_loss", "g_loss", "r1", "r2", "gradient_penalty", "path_length"), "-")


# fmt: off
def train_gan(
    generator: nn.Module,                             # of a family in genfast.models.generators, trained in place where it is
    discriminator: nn.Module,                         # on the same device
    images: Images,                                   # (N, H, W) or (N, C, H, W) uint8
    *,
    out: str | Path,                                  # directory of everything written; an interrupted run there is continued
    steps: int,                                       # steps of the generator
    batch: int = 64,                                  # images a step
    seed: int = 0,                                    # of the run: data order, latents and every other draw follow from it
    objective: Objective = NON_SATURATING,            # losses and penalties
    critic_steps: int = 1,                            # steps of the discriminator for one of the generator (5 is usual with "wgan")
    lr: float | tuple[float, float] = 2e-4,           # learning rate of Adam, for both networks or (generator's, discriminator's)
    betas: tuple[float, float] = (0.5, 0.999),        # of Adam
    ema: float = 0.05,                                # relative width of the power-function average of the weights (Karras et al. 2024)
    capture: bool = False,                            # each phase in a CUDA graph; CUDA only
    log_every: int = 50,                              # steps between rows of log.jsonl
    checkpoint_every: int = 500,                      # steps between checkpoints
    sample_every: int = 0,                            # steps between sample grids, of the averaged weights; 0: none
    impl: Literal["fused", "reference"] = "fused",    # of the noise; the bits are the same
    about: Mapping[str, Any] | None = None,           # further JSON-able words to save with the weights
    progress: bool = True,                            # a progress bar on stderr
) -> dict[str, Any]:
    # fmt: on
    """Train ``generator`` against ``discriminator``; ends with the averaged weights in ``generator`` and returns the last row of the log.

    Images are scaled to [-1, 1], latents are standard normal. One step is ``critic_steps`` updates of the discriminator, each on
    images and latents of its own, then one of the generator (`AdversarialStep`). The average holds the running statistics of the
    batch norms, too.

    ``out`` receives config.json, log.jsonl, loss.png (where matplotlib is installed), checkpoint.safetensors and the one before it,
    samples-STEP.png, and at the end ema.safetensors, the averaged generator that `genfast.models.generators.load` reads. A run that was
    killed at any moment continues from its last checkpoint when called again with the same arguments, and ends with the same
    bits as one that was not killed, on the same device with the same number of threads. A run that is finished returns at once.

    Every random number is a function of the seed and of the global number of the sample (docs/noise.md), so no generator is saved.

    Raises ValueError for bad arguments or if ``out`` holds a run with another configuration, and FloatingPointError if a loss
    or a weight is not finite.
    """
    made, judges = _check(generator, discriminator, images)
    for name, value in {"steps": steps, "batch": batch, "critic_steps": critic_steps, "log_every": log_every}.items():
        check_number(name, value, 1)
    check_number("checkpoint_every", checkpoint_every, 1)
    check_number("seed", seed, 0, MOST_SEED)
    check_number("steps * critic_steps * batch", steps * critic_steps * batch, 1, VALIDATION)
    gamma = averages.power_gamma(ema)
    device, latent = next(generator.parameters()).device, made.latent
    x_all = images[:, None] if images.ndim == 3 else images
    shape = (batch, *x_all.shape[1:])
    step = AdversarialStep(generator, discriminator, shape, latent, objective, lr=lr, betas=betas, capture=capture)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # What decides the bits of the weights; how often something is written does not.
    config: dict[str, Any] = {
        "generator": asdict(made), "discriminator": asdict(judges), "data": digest(images), "steps": steps,
        "batch": batch, "seed": seed, "objective": asdict(objective), "critic_steps": critic_steps, "lr": lr, "betas": betas,
        "ema": ema, "device": device.type,
    }  # fmt: skip
    config = json.loads(json.dumps(config))

    generator.train()
    discriminator.train()
    rng = import_module("genfast.reference.noise" if impl == "reference" else "genfast.ops.noise")
    done = 0
    found = load_checkpoint(out, config)
    if found is not None:
        tensors, done = found
        step.restore(tensors)
    write_atomically(out / "config.json", json.dumps(config, indent=1).encode())
    rows = cut_log(out / "log.jsonl", done)

    order = DataOrder(rng, seed, len(images))
    started, started_at = time.perf_counter(), done
    bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", disable=not progress, mininterval=1.0, dynamic_ncols=True)
    for number in bar:
        for update in range(number * critic_steps, (number + 1) * critic_steps):
            numbers = np.arange(update * batch, (update + 1) * batch)
            seeds = sample_seeds(seed, numbers).to(device)
            z = rng.normal(seeds, (batch, latent), stream=MODEL_NOISE, draw=D_DRAW)
            step.load(real=to_model(x_all[order(numbers)], device), z_d=z)
            if "seeds" in step.inputs:
                step.load(seeds=seeds)
            if "mix" in step.inputs:
                step.load(mix=rng.uniform(seeds, (batch, 1), stream=TIMES)[:, 0])
            step.run(objective.discriminator_phases(update))
        phases = objective.generator_phases(number)
        step.load(z_g=rng.normal(seeds, (batch, latent), stream=MODEL_NOISE, draw=G_DRAW))
        if PATH in phases or (objective.path_length and objective.g_every == 1):
            seeds = seeds[: batch // objective.path_shrink]
            z = rng.normal(seeds, (len(seeds), latent), stream=MODEL_NOISE, draw=PATH_DRAW)
            step.load(z_path=z, noise_path=rng.normal(seeds, (len(seeds), *shape[1:]), stream=NOISE))
        step.ema_weight.fill_(averages.power_weight(number + 1, gamma))
        step.run(phases)

        # What is written.
        done = number + 1
        last = done == steps
        if done % log_every == 0 or done % checkpoint_every == 0 or last:
            _check_finite(step, number, out)
        if done % log_every == 0 or last:
            row = {"step": done, **step.take_means()}
            rate = (done - started_at) * batch * critic_steps / (time.perf_counter() - started)
            append(out / "log.jsonl", rows, row | {"images_per_second": round(rate, 1)})
            plot_log(rows, out / "loss.png", {name: style for name, style in CURVES.items() if name in row}, "loss")
            bar.set_postfix(d=f"{row['d_loss']:.3f}", g=f"{row['g_loss']:.3f}", refresh=False)
        if sample_every and (done % sample_every == 0 or last):
            _sample_grid(generator, step.average, rng).save(out / f"samples-{done:06d}.png")
        if done % checkpoint_every == 0 or last:
            save_checkpoint(out, done, config, step.state())

    generators.save(generator, out / "ema.safetensors", step.average, **(about or {}))
    generator.load_state_dict(step.average)
    return rows[-1] if rows else {}


def _sample_grid(generator: nn.Module, average: dict[str, Tensor], rng: Any) -> Any:
    """Samples of the averaged generator with the seeds 0 to 63."""
    averaged = copy.deepcopy(generator)
    averaged.load_state_dict(average)
    config: Any = generator.config
    z = rng.normal(torch.arange(64), (64, config.latent))
    with torch.no_grad():
        return grid(averaged.eval()(z.to(next(generator.parameters()).device)), 8)


def _check(generator: nn.Module, discriminator: nn.Module, images: Images) -> tuple[Any, Any]:
    """Their configurations, if ``images`` are what they are for."""
    configs: tuple[Any, Any] = (generator.config, discriminator.config)
    for name, config in zip(("generator", "discriminator"), configs, strict=True):
        made = (config.image_channels, config.size, config.size)
        shape = (1, *images.shape[1:]) if images.ndim == 3 else images.shape[1:]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0 or shape != made:
            raise ValueError(
                f"images: got {images.dtype} of shape {images.shape}, supported by this {name}: uint8, at least one image of shape {made}"
            )
    return configs


def _check_finite(step: AdversarialStep, number: int, out: Path) -> None:
    tensors = {**step.sums, **step.state()}
    bad = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
    if bad is not None:
        raise FloatingPointError(
            f"step {number}: {bad} is not finite; {out} keeps the last good state; "
            "try a smaller lr in another directory"
        )
