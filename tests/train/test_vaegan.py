"""The three losses of a VAE-GAN against its paper, and how its training runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import tiny_vae
import tiny_vaegan
import torch
from safetensors.torch import load_file
from torch.distributions import Independent, Normal, kl_divergence

from genfast import ops
from genfast.models.autoencoder import Autoencoder
from genfast.models.vaegan import Discriminator, VAEGANConfig
from genfast.streams import MODEL_NOISE, NOISE
from genfast.train import Run, VAEGANTraining, train_vaegan


def test_the_first_step_is_algorithm_1(tmp_path: Path) -> None:
    """Losses and the first step of each Adam, in float64 from the definitions; Adam's first step is lr times the sign of the gradient."""
    lr, beta, gamma = 1e-3, 0.7, 0.3
    torch.manual_seed(0)
    net, critic = Autoencoder(tiny_vaegan.CONFIG, "reference").double(), Discriminator(tiny_vaegan.CONFIG, "reference").double()
    net_before = {name: p.detach().clone() for name, p in net.named_parameters()}
    critic_before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    tiny_vaegan.run(tmp_path, steps=1, log_every=1, beta=beta, gamma=gamma, lr=lr, validation=None)
    seeds, places = torch.arange(8), np.arange(8)
    x = tiny_run.samples().batch(places, 0).x.double() / 127.5 - 1
    n = ops.normal(seeds, (8, 3), stream=NOISE).double()
    z_prior = ops.normal(seeds, (8, 3), stream=MODEL_NOISE).double()
    mean, log_variance = net.encode(x)
    posterior = Normal(mean, (log_variance / 2).exp())
    kl = kl_divergence(Independent(posterior, 1), Independent(Normal(torch.zeros_like(mean), 1.0), 1)).mean()
    again, drawn = (2 * net.decoder(z).sigmoid() - 1 for z in (mean + posterior.stddev * n, z_prior))

    def log_sigmoid(logits: torch.Tensor) -> torch.Tensor:
        return -(1 + (-logits).exp()).log()

    distance = (critic.layers(again) - critic.layers(x)).square().flatten(1).sum(1).mean() / 2
    encoder = beta * kl + distance
    decoder = gamma * distance - (log_sigmoid(critic(again)) + log_sigmoid(critic(drawn))).mean() / 2
    told = log_sigmoid(critic(x)) + (log_sigmoid(-critic(again.detach())) + log_sigmoid(-critic(drawn.detach()))) / 2
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    for name, expected in {"encoder_loss": encoder, "decoder_loss": decoder, "discriminator_loss": -told.mean(), "kl": kl}.items():
        assert row[name] == pytest.approx(expected.item(), rel=1e-5), name
    after = load_file(tmp_path / "checkpoint.safetensors")
    moved = 0
    for prefix, loss, part in (("encoder.", encoder, net.encoder), ("decoder.", decoder, net.decoder), ("", -told.mean(), critic)):
        before, where = (critic_before, "discriminator") if prefix == "" else (net_before, "net")
        gradients = torch.autograd.grad(loss, [*part.parameters()], retain_graph=True)
        for (name, _), gradient in zip(part.named_parameters(), gradients, strict=True):
            clear = gradient.abs() > 1e-4 * gradient.abs().max()  # float32 may not know the sign of the others
            step = before[prefix + name].float() - after[f"{where}/{prefix}{name}"]
            torch.testing.assert_close(step[clear], (lr * gradient.sign()).float()[clear], rtol=1e-2, atol=1e-6)
            moved += int(clear.sum())
    assert moved > 0.5 * sum(p.numel() for p in [*net_before.values(), *critic_before.values()])


@pytest.mark.parametrize("trainer", [tiny_vae, tiny_vaegan], ids=["vae", "vaegan"])
@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, trainer: Any) -> None:
    trainer.run(tmp_path / "straight")
    tiny_run.kill_at_random(trainer.__file__, tmp_path / "killed")
    trainer.run(tmp_path / "killed")
    tiny_run.assert_same_bits(tmp_path / "straight", tmp_path / "killed")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    samples, options = tiny_run.samples(), VAEGANTraining(steps=1)
    net = Autoencoder(tiny_vaegan.CONFIG)
    other = Discriminator(replace(tiny_vaegan.CONFIG, size=12))
    with pytest.raises(ValueError, match=r"discriminator: it does not take what it is given .*supported: a network that maps samples of"):
        train_vaegan(net, other, samples, options, Run(tmp_path / "a"))
    with pytest.raises(ValueError, match="discriminator: got one without 'features', supported: networks with the methods of those in"):
        train_vaegan(net, torch.nn.Linear(1, 1), samples, options, Run(tmp_path / "a"))
    with pytest.raises(ValueError, match="variational: got False and a size of 28, supported: True, and a size that is a multiple of 4"):
        VAEGANConfig(variational=False)
    with pytest.raises(ValueError, match="gamma: got nan"):
        VAEGANTraining(gamma=math.nan)
    assert not (tmp_path / "a").exists()
