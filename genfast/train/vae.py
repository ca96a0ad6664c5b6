"""Training of autoencoders: plain, variational and with a codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genfast import ranks
from genfast.checks import above, above_or_infinite, at_least, check, choice, decay, each, optional, settle, whole
from genfast.data.samples import Samples
from genfast.media import encoded, grid
from genfast.models.files import save
from genfast.streams import NOISE, RUN, SAMPLING, VALIDATION
from genfast.train import average as averages
from genfast.train.directory import Row, check_words
from genfast.train.networks import check_module, description, gradients_and_buffers, probe
from genfast.train.objectives import network_input
from genfast.train.rates import learning_rate
from genfast.train.run import MOST, Run, check_length

# What each field of `VAETraining` may be.
RANGES = {
    "steps": whole(1, MOST),
    "batch": whole(1, MOST),
    "beta": at_least(0),
    "beta_warmup": whole(0, MOST),
    "free_nats": at_least(0),
    "lr": above(0),
    "lr_schedule": choice("cosine", "constant"),
    "warmup": whole(0, MOST),
    "betas": each(decay(), 2),
    "weight_decay": at_least(0),
    "clip_grad": above_or_infinite(0),
    "ema": averages.WIDTH,
    "autocast": optional(choice("bfloat16")),
}
FITTED = 10_000  # samples whose latents a plain autoencoder's Gaussian is fitted to


@dataclass(frozen=True)
class VAETraining:
    """Everything that decides the bits of a trained autoencoder, besides the network itself, the data and the run's seed."""

    steps: int = 3000  # optimizer steps
    batch: int = 128  # images a step
    beta: float = 1.0  # weight of what the latents cost: 1 is the ELBO (Kingma and Welling 2014), above it a beta-VAE (Higgins et al. 2017)
    beta_warmup: int = 0  # steps in which that weight grows from 0 (Sonderby et al. 2016)
    free_nats: float = 0.0  # nats of each latent dimension, in the mean of a batch, that cost nothing (Kingma et al. 2016)
    lr: float = 1e-3  # peak learning rate of AdamW
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up: half a cosine down to 0, or flat
    warmup: int = 100  # steps of linear warm-up
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    weight_decay: float = 0.0  # of AdamW
    clip_grad: float = math.inf  # largest norm of the gradient
    ema: float = 0.05  # relative width of the power-function average of the weights (Karras et al. 2024)
    autocast: Literal["bfloat16"] | None = None  # dtype of the network's matrix products; weights and state stay float32

    def __post_init__(self) -> None:
        settle(self, RANGES)
        check({"warmup": whole(0, self.steps)}, {"warmup": self.warmup})
        check_length(self.steps * self.batch, "steps * batch")


def train_vae(
    net: Any,
    samples: Samples,
    options: VAETraining,
    run: Run,
    *,
    validation: Samples | None = None,
    about: Mapping[str, Any] | None = None,
) -> Row:
    """Train an autoencoder; ends with the averaged weights in ``net`` and returns the last row of the log.

    ``net`` is a torch module, trained in place, with the methods of `genfast.models.autoencoder.Autoencoder`: ``bottleneck(x, n)`` gives
    latents and what each dimension of them costs in nats, ``decode(z)`` and ``reconstruction_loss(x, decoded)`` what the pictures cost;
    ``noise_shape`` is the shape of a sample's ``n``. If it has ``fit_prior(latents)``, that is called in the end where latents cost
    nothing; if it has ``learn_codes(rng, seed, step)``, after each step. ``validation`` are held-out samples, whose loss is the negative
    ELBO in nats. ``about`` are further JSON-able words to save with the weights.

    The loss is the mean over the batch of the reconstruction loss, plus ``beta`` times the sum over the dimensions of what they cost.

    The run's directory receives what docs/training.md lists, at the end the averaged weights as ema.safetensors. A run that was killed
    at any moment continues when called again with the same arguments, and ends with the same bits as one that was not killed, on the same
    device with the same number of threads. Every random number is a function of the run's seed and of the global number of the sample.

    Raises ValueError for bad arguments or if the directory holds a run with another configuration, and FloatingPointError if the loss
    or a gradient is not finite.
    """
    device, rng = check_module("net", net), run.rng
    check_autoencoder(net, samples, validation, about, run, device)
    average = averages.Average(net, options.ema)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    decided: Row = {"network": description(net), "data": samples.digest, "device": device.type}
    net.train()

    with run.begin(
        options,
        decided,
        {"model": net, "optimizer": optimizer, "average": average},
        lambda path: save(average.net, path, **(about or {})),
        extend=options.lr_schedule == "constant",
    ):
        for step in run.steps(options.steps):
            # The batch, and the noise of its latents.
            numbers = run.numbers(step, options.batch)
            seeds, data = run.seeds(numbers), samples.batch(numbers, run.seed)
            x = network_input(data.x, device)
            n = rng.normal(seeds, (len(seeds), *net.noise_shape), stream=NOISE, device=device)

            # One step of AdamW.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            optimizer.zero_grad()
            reconstruction, cost = negative_elbo(net, x, n, options.autocast)
            beta = options.beta * min(1.0, (step + 1) / max(1, options.beta_warmup))
            charged = ranks.mean(cost.mean(0)).clamp(min=options.free_nats).sum()
            loss = reconstruction.mean() + beta * charged
            loss.backward()  # type: ignore[no-untyped-call]
            ranks.average_(gradients_and_buffers(net))
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), options.clip_grad)
            run.log(loss=loss, reconstruction_loss=reconstruction.mean(), kl=cost.flatten(1).sum(1).mean(), grad_norm=norm, lr=group["lr"])
            optimizer.step()
            if hasattr(net, "learn_codes"):
                net.learn_codes(rng, run.seed, step)
            average.update(net, step + 1)

            # What is written.
            last, validating = step + 1 == options.steps, validation is not None and run.due(run.validate_every)
            if (last or validating or run.due(run.sample_every)) and hasattr(net, "fit_prior") and not cost.any():
                average.net.fit_prior(_latents(average.net, samples, run))
            if validation is not None and validating:
                nats = bound(average.net, validation, run)
                run.validated(nats, bits_per_dimension=net.bits_per_dimension(nats))
            if run.due(run.sample_every):
                run.picture(preview(average.net, samples, run))
        net.load_state_dict(average.state_dict())
        return run.finish()


def negative_elbo(net: Any, x: Tensor, n: Tensor, autocast: str | None = None) -> tuple[Tensor, Tensor]:
    """What samples ``x`` cost with noise ``n``, in nats: (-log p(x | z) (B,), of each latent dimension (B, ...)), both float32."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast == "bfloat16"):
        z, cost = net.bottleneck(x, n)
        decoded = net.decode(z)
    return net.reconstruction_loss(x, decoded), cost.float()


@torch.no_grad()
def bound(net: Any, samples: Samples, run: Run, importance: int = 1, batch: int = 250) -> float:
    """The mean over all samples of an upper bound on -log p(x), in nats: the negative ELBO, or with ``importance`` latents for each sample
    the importance-weighted bound -log mean_k p(x | z_k) p(z_k) / q(z_k | x) (Burda et al. 2016, equation 8).

    The noise is the same at every call. The bound with many latents is for networks with ``encode`` that are variational.
    """
    device, total = next(net.parameters()).device, 0.0
    for start in ranks.share(range(0, len(samples), batch)):
        numbers = np.arange(start, min(start + batch, len(samples)))
        x = network_input(samples.batch(numbers, run.seed).x, device)
        seeds = torch.from_numpy(numbers + run.seed * RUN + VALIDATION)
        noise = run.rng.normal(seeds, (len(seeds), importance, *net.noise_shape), stream=NOISE, device=device)
        if importance == 1:
            reconstruction, cost = negative_elbo(net, x, noise[:, 0])
            total += (reconstruction.double() + cost.double().flatten(1).sum(1)).sum().item()
        else:
            total -= torch.stack([_log_weight(net, x, n) for n in noise.unbind(1)]).logsumexp(0).sub(math.log(importance)).sum().item()
    return ranks.means([total])[0] * ranks.count() / len(samples)


def _log_weight(net: Any, x: Tensor, n: Tensor) -> Tensor:
    """log p(x | z) p(z) / q(z | x) of each sample, (B,) float64, at the z that the noise ``n`` makes."""
    mean, log_variance = net.encode(x)
    z = mean + (log_variance / 2).exp() * n
    log_ratio = ((n.square() + log_variance) / 2 - z.square() / 2).double().flatten(1).sum(1)
    log_weight: Tensor = log_ratio - net.reconstruction_loss(x, net.decode(z)).double()
    return log_weight


@torch.no_grad()
def _latents(net: Any, samples: Samples, run: Run, batch: int = 250) -> Tensor:
    """The latents of the first samples, (N, L)."""
    device = next(net.parameters()).device
    places = range(0, min(len(samples), FITTED), batch)
    batches = (samples.batch(np.arange(start, min(start + batch, len(samples))), run.seed).x for start in places)
    latents: Tensor = torch.cat([net.encode(network_input(x, device))[0] for x in batches])
    return latents


@torch.no_grad()
def preview(net: Any, samples: Samples, run: Run) -> bytes:
    """A PNG: 32 pictures with their reconstructions below each row, then 32 samples as `genfast sample` draws them."""
    device = next(net.parameters()).device
    x = network_input(samples.batch(np.arange(32), run.seed).x, device)
    z, _ = net.bottleneck(x, torch.zeros(len(x), *net.noise_shape, device=device))
    again = net.images(net.decode(z))
    rows = [part for pair in zip(x.split(8), again.split(8), strict=True) for part in pair]
    if hasattr(net, "prior_mean"):
        rows.append(net(run.rng.normal(torch.arange(32), (32, net.config.latent), stream=SAMPLING).to(device)))
    return encoded(grid(torch.cat(rows), 8))


def _there_and_back(net: Any, x: Tensor, n: Tensor) -> Any:
    z, _ = net.bottleneck(x, n)
    return net.decode(z)


def check_autoencoder(net: Any, samples: Any, validation: Any, about: Any, run: Run, device: torch.device) -> None:
    """Raises ValueError unless the objects that training is given fit each other."""
    check_words(about)
    for name in ("bottleneck", "decode", "reconstruction_loss", "noise_shape"):
        if not hasattr(net, name):
            raise ValueError(f"net: got a {type(net).__name__} without {name!r}, supported: a network with the methods of an Autoencoder")
    for name, data in (("samples", samples), ("validation", samples if validation is None else validation)):
        if not isinstance(data, Samples):
            raise ValueError(f"{name}: got a {type(data).__name__}, supported: samples of genfast.data, such as ArraySamples(images)")
        x, n = torch.zeros(1, *data.shape, device=device), torch.zeros(1, *net.noise_shape, device=device)
        supported = f"one that maps {name} of shape {tuple(data.shape)} to latents and back"
        probe("net", net, partial(_there_and_back, net, x, n), tuple(x.shape), supported)
    run.check_pictures(samples.shape)
    if run.capture:
        raise ValueError("capture: got True, supported: False, because only adversarial training has phases to capture")
