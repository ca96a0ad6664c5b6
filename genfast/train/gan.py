"""Adversarial training of a generator."""

from __future__ import annotations

import copy
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

from genfast.checks import above, check, choice, decay, each, either, flag, instance, plain, whole
from genfast.data.arrays import check_images, picture_tensor
from genfast.files import write_atomically
from genfast.models import generators
from genfast.train import ema as averages
from genfast.train.adversarial import D_DRAW, G_DRAW, PATH, PATH_DRAW, AdversarialStep, Objective
from genfast.train.lock import hold
from genfast.train.pictures import encoded, grid
from genfast.train.run import (
    MODEL_NOISE,
    MOST,
    MOST_SEED,
    NOISE,
    TIMES,
    VALIDATION,
    DataOrder,
    Images,
    append,
    check_words,
    described,
    digest,
    load_checkpoint,
    plot_log,
    read_log,
    sample_seeds,
    save_checkpoint,
    write_start,
)

# What each argument of `train_gan` may be, besides the objects it is given.
RANGES = {
    "steps": whole(1, MOST),
    "batch": whole(1, MOST),
    "seed": whole(0, MOST_SEED),
    "objective": instance(Objective),
    "critic_steps": whole(1, MOST),
    "lr": either(above(0), each(above(0), 2)),
    "betas": each(decay(), 2),
    "ema": averages.WIDTH,
    "capture": flag(),
    "log_every": whole(1, MOST),
    "checkpoint_every": whole(1, MOST),
    "sample_every": whole(0, MOST),
    "impl": choice("fused", "reference"),
    "progress": flag(),
}
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
    check(RANGES, locals())
    steps, batch, seed, critic_steps, lr, betas, ema = plain((steps, batch, seed, critic_steps, lr, betas, ema))
    made, judges = _check(generator, discriminator, images, batch)
    samples = steps * critic_steps * batch
    check({"steps * critic_steps * batch": whole(1, VALIDATION)}, {"steps * critic_steps * batch": samples})
    check_words(about)
    device, latent = next(generator.parameters()).device, made.latent
    x_all = images[:, None] if images.ndim == 3 else images
    shape = (batch, *x_all.shape[1:])
    step = AdversarialStep(generator, discriminator, shape, latent, objective, lr=lr, betas=betas, capture=capture)
    # What decides the bits of the weights; how often something is written does not.
    config = described({
        "generator": asdict(made), "discriminator": asdict(judges), "data": digest(images), "steps": steps,
        "batch": batch, "seed": seed, "objective": asdict(objective), "critic_steps": critic_steps, "lr": lr, "betas": betas,
        "ema": ema, "device": device.type,
    })  # fmt: skip

    generator.train()
    discriminator.train()
    rng = import_module("genfast.reference.noise" if impl == "reference" else "genfast.ops.noise")
    order, gamma = DataOrder(rng, seed, len(images)), averages.power_gamma(ema)

    with hold(out) as out:
        done = 0
        found = load_checkpoint(out, config)
        if found is not None:
            tensors, done = found
            step.restore(tensors)
        rows = read_log(out / "log.jsonl", done)
        write_start(out, config, rows)

        started, started_at = time.perf_counter(), done
        bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", disable=not progress, mininterval=1.0, dynamic_ncols=True)
        for number in bar:
            for update in range(number * critic_steps, (number + 1) * critic_steps):
                numbers = np.arange(update * batch, (update + 1) * batch)
                seeds = sample_seeds(seed, numbers).to(device)
                z = rng.normal(seeds, (batch, latent), stream=MODEL_NOISE, draw=D_DRAW)
                step.load(real=picture_tensor(x_all[order(numbers)], device), z_d=z)
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
                write_atomically(out / f"samples-{done:06d}.png", encoded(_sample_grid(generator, step.average, rng)))
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


def _check(generator: Any, discriminator: Any, images: Any, batch: int) -> tuple[Any, Any]:
    """Their configurations. Raises ValueError unless networks, images and batch fit each other."""
    check_images("images", images)
    for name, network in {"generator": generator, "discriminator": discriminator}.items():
        if not any(isinstance(network, getattr(family, name)) for family in generators.FAMILIES.values()):
            raise ValueError(f"{name}: got a {type(network).__name__}, supported: the {name} of a family in genfast.models.generators")
        made = (network.config.image_channels, network.config.size, network.config.size)
        shape = (1, *images.shape[1:]) if images.ndim == 3 else images.shape[1:]
        if shape != made:
            raise ValueError(f"images: got shape {images.shape}, supported by this {name}: images of shape {made}")
    group = getattr(discriminator.config, "stddev_group", 1)
    if batch > group and batch % group:
        raise ValueError(f"batch: got {batch}, supported by this discriminator: 1 to {group}, or a multiple of {group}")
    return generator.config, discriminator.config


def _check_finite(step: AdversarialStep, number: int, out: Path) -> None:
    tensors = {**step.sums, **step.state()}
    bad = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
    if bad is not None:
        raise FloatingPointError(
            f"step {number}: {bad} is not finite; {out} keeps the last good state; "
            "try a smaller lr in another directory"
        )
