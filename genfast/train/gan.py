"""Adversarial training of a generator."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from genfast import ranks
from genfast.checks import above, decay, each, either, instance, optional, settle, whole
from genfast.data.samples import Samples
from genfast.media import encoded, grid
from genfast.models.files import save as save_model
from genfast.streams import MODEL_NOISE, NOISE, SAMPLING, TIMES
from genfast.train import average as averages
from genfast.train.adversarial import D_DRAW, G_DRAW, PATH, PATH_DRAW, AdversarialStep, Objective
from genfast.train.directory import Row, check_words
from genfast.train.networks import check_module, description, probe
from genfast.train.objectives import network_input
from genfast.train.run import MOST, Run, check_length

# What each field of `GANTraining` may be.
RANGES = {
    "steps": whole(1, MOST),
    "batch": whole(1, MOST),
    "objective": instance(Objective),
    "critic_steps": whole(1, MOST),
    "lr": either(above(0), each(above(0), 2)),
    "betas": each(decay(), 2),
    "ema": averages.WIDTH,
    "latent_size": optional(whole(1)),
}


@dataclass(frozen=True)
class GANTraining:
    """Everything that decides the bits of a trained generator, besides the networks themselves, the data and the run's seed."""

    steps: int = 3000  # steps of the generator
    batch: int = 64  # images a step
    objective: Objective = field(default_factory=Objective)  # losses and penalties
    critic_steps: int = 1  # steps of the discriminator for one of the generator (5 is usual with "wgan")
    lr: float | tuple[float, float] = 2e-4  # learning rate of Adam, for both networks or (generator's, discriminator's)
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam
    ema: float = 0.05  # relative width of the power-function average of the weights (Karras et al. 2024)
    latent_size: int | None = None  # length of the latents; None: that of the generator's configuration

    def __post_init__(self) -> None:
        settle(self, RANGES)
        check_length(self.steps * self.critic_steps * self.batch, "steps * critic_steps * batch")


def train_gan(
    generator: Any,
    discriminator: Any,
    samples: Samples,
    options: GANTraining,
    run: Run,
    *,
    about: Mapping[str, Any] | None = None,
) -> Row:
    """Train ``generator`` against ``discriminator``; ends with the averaged weights in ``generator`` and returns the last row of the log.

    Both are any torch modules, trained in place, on one device: latents (B, L) to samples (B, C, H, W), and those to logits (B,) or (B, 1).
    ``about`` are further JSON-able words to save with the weights. Images are scaled to [-1, 1], latents are standard normal. One step is
    ``critic_steps`` updates of the discriminator, each on images and latents of its own, then one of the generator (`AdversarialStep`).
    The average holds the running statistics of the batch norms, too. Networks with ``grow(progress)``, as `genfast.models.progan` has
    them, are told the share of the run before each step, and real images go through the discriminator's ``softened``.

    The run's directory receives what docs/training.md lists, at the end the averaged generator as ema.safetensors, which
    `genfast.models.load` reads. A run that was killed at any moment continues from its last checkpoint when called again
    with the same arguments, and ends with the same bits as one that was not killed, on the same device with the same number of threads. A
    run that is finished returns at once. Every random number is a function of the run's seed and of the global number of the sample
    (docs/noise.md), so no generator is saved.

    Raises ValueError for bad arguments or if the directory holds a run with another configuration, and FloatingPointError if a loss
    or a weight is not finite.
    """
    check_words(about)
    latent = _check(generator, discriminator, samples, options, run)
    device, rng, objective = next(generator.parameters()).device, run.rng, options.objective
    shape, gamma = (options.batch // ranks.count(), *samples.shape), averages.power_gamma(options.ema)
    step = AdversarialStep(generator, discriminator, shape, latent, objective, lr=options.lr, betas=options.betas, capture=run.capture)
    decided: Row = {"generator": description(generator), "discriminator": description(discriminator), "objective": asdict(objective)}
    decided |= {"data": samples.digest, "device": device.type, "latent": latent}
    growing: Any = hasattr(generator, "grow") and hasattr(discriminator, "softened")
    generator.train()
    discriminator.train()

    def save(path: Any) -> None:
        save_model(generator, path, step.average, **(about or {}))

    with run.begin(options, decided, {"step": step}, save, extend=not growing):
        for number in run.steps(options.steps):
            if growing:  # networks that grow say how large they are at this share of the run
                for network in (generator, discriminator):
                    network.grow(number / options.steps)

            # The discriminator's updates, each on samples of its own, and everything random about them.
            for update in range(number * options.critic_steps, (number + 1) * options.critic_steps):
                numbers = run.numbers(update, options.batch)
                seeds = run.seeds(numbers).to(device)
                z = rng.normal(seeds, (len(seeds), latent), stream=MODEL_NOISE, draw=D_DRAW)
                real = network_input(samples.batch(numbers, run.seed).x, device)
                step.load(real=discriminator.softened(real) if growing else real, z_d=z)
                if "seeds" in step.inputs:
                    step.load(seeds=seeds)
                if "mix" in step.inputs:
                    step.load(mix=rng.uniform(seeds, (len(seeds), 1), stream=TIMES)[:, 0])
                step.run(objective.discriminator_phases(update))

            # The generator's update, with the seeds of the discriminator's last one.
            phases = objective.generator_phases(number)
            step.load(z_g=rng.normal(seeds, (len(seeds), latent), stream=MODEL_NOISE, draw=G_DRAW))
            if PATH in phases or (objective.path_length and objective.g_every == 1):
                seeds = seeds[: len(seeds) // objective.path_shrink]
                z = rng.normal(seeds, (len(seeds), latent), stream=MODEL_NOISE, draw=PATH_DRAW)
                step.load(z_path=z, noise_path=rng.normal(seeds, (len(seeds), *shape[1:]), stream=NOISE))
            step.ema_weight.fill_(averages.power_weight(number + 1, gamma))
            step.run(phases)

            # What is written.
            if run.due(run.log_every):
                run.log(**step.take_means())
            if run.due(run.sample_every):
                run.picture(_preview(generator, step.average, latent, rng))
        generator.load_state_dict(step.average)
        return run.finish()


def _preview(generator: nn.Module, average: dict[str, Tensor], latent: int, rng: Any) -> bytes:
    """A PNG of what `genfast sample` draws from the averaged weights: the seeds 0 to 63."""
    averaged = copy.deepcopy(generator)
    averaged.load_state_dict(average)
    z = rng.normal(torch.arange(64), (64, latent), stream=SAMPLING)
    with torch.no_grad():
        return encoded(grid(averaged.eval()(z.to(next(generator.parameters()).device)), 8))


def _check(generator: Any, discriminator: Any, samples: Any, options: GANTraining, run: Run) -> int:
    """The length of the latents. Raises ValueError unless networks, samples and batch fit each other."""
    if not isinstance(samples, Samples):
        raise ValueError(f"samples: got a {type(samples).__name__}, supported: samples of genfast.data, such as ArraySamples(images)")
    device = check_module("generator", generator)
    check_module("discriminator", discriminator)
    latent = options.latent_size or getattr(getattr(generator, "config", None), "latent", None)
    if latent is None:
        raise ValueError("latent_size: got None, supported: the length of the generator's latents, because the generator does not tell it")
    z, x = torch.zeros(1, latent, device=device), torch.zeros(1, *samples.shape, device=device)
    supported = f"a network that maps latents (B, {latent}) to samples of shape {tuple(samples.shape)}"
    probe("generator", generator, lambda: generator(z), tuple(x.shape), supported)
    supported = f"a network that maps samples of shape {tuple(samples.shape)} to logits (B,) or (B, 1)"
    probe("discriminator", discriminator, lambda: discriminator(x).flatten(), (1,), supported)
    group = getattr(getattr(discriminator, "config", None), "stddev_group", 1)
    if (share := options.batch // ranks.count()) > group and share % group:
        raise ValueError(f"batch: got {share}, supported by this discriminator: 1 to {group}, or a multiple of {group}")
    run.check_pictures(samples.shape)
    if run.capture and hasattr(generator, "grow"):
        raise ValueError("capture: got True with networks that grow, supported: False, because a graph replays what it recorded")
    return int(latent)
