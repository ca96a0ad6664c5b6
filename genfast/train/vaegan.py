"""Training of a VAE-GAN: encoder, decoder and discriminator together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import ranks
from genfast.checks import above, at_least, decay, each, settle, whole
from genfast.data.samples import Samples
from genfast.models.files import save
from genfast.streams import MODEL_NOISE, NOISE
from genfast.train import average as averages
from genfast.train.adversarial import D_DRAW
from genfast.train.directory import Row
from genfast.train.networks import check_module, description, probe
from genfast.train.objectives import network_input
from genfast.train.run import MOST, Run, check_length
from genfast.train.vae import check_autoencoder, preview

# What each field of `VAEGANTraining` may be.
RANGES = {
    "steps": whole(1, MOST),
    "batch": whole(1, MOST),
    "beta": at_least(0),
    "gamma": at_least(0),
    "lr": above(0),
    "betas": each(decay(), 2),
    "ema": averages.WIDTH,
}


@dataclass(frozen=True)
class VAEGANTraining:
    """Everything that decides the bits of a trained VAE-GAN, besides the networks themselves, the data and the run's seed."""

    steps: int = 6000  # steps of Adam, in each of the three networks
    batch: int = 64  # images a step
    beta: float = 1.0  # weight of the KL term in the encoder's loss
    gamma: float = 0.01  # weight of the features' distance beside the discriminator's verdict in the decoder's loss
    lr: float = 3e-4  # learning rate of Adam
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam
    ema: float = 0.05  # relative width of the power-function average of the weights (Karras et al. 2024)

    def __post_init__(self) -> None:
        settle(self, RANGES)
        check_length(self.steps * self.batch, "steps * batch")


def train_vaegan(
    net: Any,
    discriminator: Any,
    samples: Samples,
    options: VAEGANTraining,
    run: Run,
    *,
    validation: Samples | None = None,
    about: Mapping[str, Any] | None = None,
) -> Row:
    """Train an autoencoder by a discriminator's features; ends with the averaged weights in ``net``; returns the last row of the log.

    ``net`` has the methods of `genfast.models.autoencoder.Autoencoder`, with its two parts as ``encoder`` and ``decoder``, and
    ``discriminator`` the method ``features(x)``: logits (B,) and what two pictures are compared by. ``validation`` are held-out samples,
    whose loss is the mean squared error of their reconstructions' pixels in [-1, 1]. ``about`` are further JSON-able words to save.

    One step is algorithm 1 of Larsen et al. 2016. With the features' distance d = |f(x) - f(x')|^2 / 2 of reconstructions x', the encoder
    minimises beta KL + d, the decoder gamma d and the logistic loss that does not saturate, on reconstructions and on pictures from the
    prior; the discriminator tells both from real pictures.

    What the run's directory receives, and how a run continues, is as for `train_vae`. Raises ValueError for bad arguments or if the
    directory holds a run with another configuration, and FloatingPointError if a loss or a weight is not finite.
    """
    device, rng = check_module("net", net), run.rng
    _check(net, discriminator, samples, validation, about, run)
    average = averages.Average(net, options.ema)
    parts = {"encoder": net.encoder, "decoder": net.decoder, "discriminator": discriminator}
    optimizers = {name: torch.optim.Adam(part.parameters(), lr=options.lr, betas=options.betas) for name, part in parts.items()}
    decided: Row = {"network": description(net), "discriminator": description(discriminator), "data": samples.digest, "device": device.type}
    objects = {"net": net, "discriminator": discriminator, "average": average, **{f"{name}'s adam": a for name, a in optimizers.items()}}
    net.train()
    discriminator.train()

    with run.begin(options, decided, objects, lambda path: save(average.net, path, **(about or {})), extend=True):
        for step in run.steps(options.steps):
            # The batch, the noise of its latents, and as many latents from the prior.
            numbers = run.numbers(step, options.batch)
            seeds, data = run.seeds(numbers), samples.batch(numbers, run.seed)
            x = network_input(data.x, device)
            n = rng.normal(seeds, (len(seeds), *net.noise_shape), stream=NOISE, device=device)
            prior = rng.normal(seeds, (len(seeds), *net.noise_shape), stream=MODEL_NOISE, draw=D_DRAW, device=device)

            # The losses of the three networks, all before any of them moves.
            z, cost = net.bottleneck(x, n)
            again, drawn = net.images(net.decode(z)), net.images(net.decode(prior))
            (real, features), (fake, their_features), (fresh, _) = map(discriminator.features, (x, again, drawn))
            distance = (their_features - features.detach()).square().flatten(1).sum(1).mean() / 2
            kl = cost.flatten(1).sum(1).mean()
            told = (F.softplus(-fake) + F.softplus(-fresh)).mean() / 2
            losses = {"encoder": options.beta * kl + distance, "decoder": options.gamma * distance + told}
            gradients = {name: torch.autograd.grad(loss, [*parts[name].parameters()], retain_graph=True) for name, loss in losses.items()}
            fake, fresh = discriminator(again.detach()), discriminator(drawn.detach())
            losses["discriminator"] = (F.softplus(-real) + (F.softplus(fake) + F.softplus(fresh)) / 2).mean()
            gradients["discriminator"] = torch.autograd.grad(losses["discriminator"], [*discriminator.parameters()])

            # One step of Adam in each.
            for name, part in parts.items():
                for parameter, gradient in zip(part.parameters(), gradients[name], strict=True):
                    parameter.grad = gradient
            ranks.average_(gradient for several in gradients.values() for gradient in several)
            for optimizer in optimizers.values():
                optimizer.step()
            average.update(net, step + 1)
            reported = {f"{name}_loss": loss for name, loss in losses.items()}
            run.log(**reported, kl=kl, feature_distance=distance, d_real=real.mean(), d_fake=fake.mean(), d_prior=fresh.mean())

            # What is written.
            if validation is not None and run.due(run.validate_every):
                run.validated(_pixel_error(average.net, validation, run))
            if run.due(run.sample_every):
                run.picture(preview(average.net, samples, run))
        net.load_state_dict(average.state_dict())
        return run.finish()


@torch.no_grad()
def _pixel_error(net: Any, samples: Samples, run: Run, batch: int = 250) -> float:
    """The mean squared error of reconstructions from the means of their latents, over pixels in [-1, 1]."""
    device, total = next(net.parameters()).device, 0.0
    for start in ranks.share(range(0, len(samples), batch)):
        x = network_input(samples.batch(np.arange(start, min(start + batch, len(samples))), run.seed).x, device)
        z, _ = net.bottleneck(x, torch.zeros(len(x), *net.noise_shape, device=device))
        total += (net.images(net.decode(z)) - x).square().flatten(1).mean(1).double().sum().item()
    return ranks.means([total])[0] * ranks.count() / len(samples)


def _check(net: Any, discriminator: Any, samples: Any, validation: Any, about: Any, run: Run) -> None:
    """Raises ValueError unless the objects that training is given fit each other."""
    device = check_module("discriminator", discriminator)
    check_autoencoder(net, samples, validation, about, run, device)
    for name, part in (("net", "encoder"), ("net", "decoder"), ("discriminator", "features")):
        if not hasattr(net if name == "net" else discriminator, part):
            raise ValueError(f"{name}: got one without {part!r}, supported: networks with the methods of those in genfast.models.vaegan")
    x = torch.zeros(1, *samples.shape, device=device)
    supported = f"a network that maps samples of shape {tuple(samples.shape)} to logits (B,) and features"

    def logits() -> Tensor:
        found: Tensor = discriminator.features(x)[0]
        return found

    probe("discriminator", discriminator, logits, (1,), supported)
