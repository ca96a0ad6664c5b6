"""Autoencoders against torch.distributions in float64 and models whose evidence is known, and how their training runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import tiny_vae
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal, kl_divergence

from genfast.data import ArraySamples
from genfast.generate import generate, open_model
from genfast.models.autoencoder import Autoencoder, AutoencoderConfig
from genfast.request import Request, SamplingOptions
from genfast.train import Run, VAETraining, train_vae, vae

CONFIGS = {
    "conv": tiny_vae.CONFIG,
    "dense": replace(tiny_vae.CONFIG, layers="dense", channels=1),
    "gaussian": replace(tiny_vae.CONFIG, likelihood="gaussian"),
    "plain": replace(tiny_vae.CONFIG, variational=False),
}


def network(config: AutoencoderConfig, impl: str = "fused") -> Any:
    torch.manual_seed(0)
    net = Autoencoder(config, impl).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def pictures(count: int = 5, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("name", CONFIGS)
def test_costs_are_those_of_the_distributions(name: str) -> None:
    """float32 at the end of the network is by design: losses are summed in it."""
    config, x = CONFIGS[name], pictures()
    net = network(config)
    n = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z, cost = net.bottleneck(x, n)
    mean, log_variance = net.encode(x)
    if config.variational:
        posterior = Normal(mean, (log_variance / 2).exp())
        torch.testing.assert_close(cost.double(), kl_divergence(posterior, Normal(0.0, 1.0)), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(z.double(), mean + posterior.stddev * n, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(z, mean) and not cost.any()
    decoded, target = net.decode(z.double()), (x + 1) / 2
    if config.likelihood == "bernoulli":
        likelihood: Any = Bernoulli(logits=decoded, validate_args=False)
        expected_picture = 2 * likelihood.mean - 1
    else:
        likelihood = Normal(decoded, net.log_sigma.exp())
        expected_picture = 2 * decoded - 1
    expected = -Independent(likelihood, 3, validate_args=False).log_prob(target)
    torch.testing.assert_close(net.reconstruction_loss(x, decoded).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(net.images(decoded).double(), expected_picture, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_and_reference_networks_agree(name: str) -> None:
    x, n = pictures(), torch.zeros(5, 3, dtype=torch.float64)
    found = []
    for impl in ("fused", "reference"):
        net = network(CONFIGS[name], impl)
        reconstruction, cost = vae.negative_elbo(net, x, n)
        (reconstruction.sum() + cost.sum()).backward()
        found.append([reconstruction, cost, *[p.grad for p in net.parameters()]])
    assert len(found[0]) == len(found[1]) > 8
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class Linear(nn.Module):
    """Probabilistic principal components: x = W z + b + sigma e, whose evidence and posterior are known."""

    noise_shape = (2,)

    def __init__(self, exact: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(12, 2, generator=g, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(12, generator=g, dtype=torch.float64))
        self.sigma, self.exact = 0.7, exact
        with torch.no_grad():
            self.w[:, 1] = self.w[:, 0] + 0.3 * self.w[:, 1]  # whose posterior does not factorise at all
        precision = torch.eye(2, dtype=torch.float64) + self.w.T @ self.w / self.sigma**2
        if exact:  # a posterior that factorises: columns of W at right angles
            with torch.no_grad():
                self.w.copy_(torch.linalg.qr(self.w)[0] * torch.tensor([1.5, 0.6]))
            precision = torch.eye(2, dtype=torch.float64) + self.w.T @ self.w / self.sigma**2
        self.covariance = precision.inverse().detach()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x.double().flatten(1) - self.b) @ self.w @ self.covariance / self.sigma**2
        return mean, self.covariance.diagonal().log().expand_as(mean)

    def bottleneck(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encode(x)
        return mean + (log_variance / 2).exp() * n, (mean.square() + log_variance.exp() - log_variance - 1) / 2

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.w.T + self.b

    def reconstruction_loss(self, x: Tensor, decoded: Tensor) -> Tensor:
        return -Normal(decoded, self.sigma).log_prob(x.double().flatten(1)).sum(1)

    def evidence(self, x: Tensor) -> Tensor:
        covariance = self.w @ self.w.T + self.sigma**2 * torch.eye(12, dtype=torch.float64)
        return MultivariateNormal(self.b, covariance).log_prob(x.double().flatten(1))


def test_the_bounds_are_the_evidence_where_the_posterior_is_exact(tmp_path: Path) -> None:
    """With the true posterior every importance weight is the evidence itself; the negative ELBO only in its expectation over z."""
    latents = ArraySamples(torch.randint(0, 256, (200, 1, 3, 4), generator=torch.Generator().manual_seed(4)).byte().numpy())
    net = Linear(exact=True)
    x = torch.from_numpy(latents.images).double() / 127.5 - 1
    expected = -net.evidence(x).mean().item()
    run = Run(tmp_path)
    assert vae.bound(net, latents, run, importance=3) == pytest.approx(expected, rel=1e-6)
    assert vae.bound(net, latents, run) == pytest.approx(expected, rel=0.02)


def test_more_latents_tighten_the_bound(tmp_path: Path) -> None:
    samples = ArraySamples(torch.randint(0, 256, (200, 1, 3, 4), generator=torch.Generator().manual_seed(4)).byte().numpy())
    net, run = Linear(exact=False), Run(tmp_path)
    evidence = -net.evidence(torch.from_numpy(samples.images).double() / 127.5 - 1).mean().item()
    one, ten, thousand = (vae.bound(net, samples, run, importance=k) for k in (1, 10, 1000))
    assert one > ten > thousand and thousand == pytest.approx(evidence, abs=0.01)


def test_the_bound_has_the_same_noise_at_every_call_and_for_any_batch(tmp_path: Path) -> None:
    net, samples, run = Autoencoder(tiny_vae.CONFIG).eval(), tiny_run.samples(12), Run(tmp_path)
    first = vae.bound(net, samples, run)
    assert vae.bound(net, samples, run) == first
    assert vae.bound(net, samples, run, batch=5) == pytest.approx(first, rel=1e-6)


def test_a_plain_autoencoder_samples_from_the_gaussian_of_its_latents(tmp_path: Path) -> None:
    net, _ = tiny_vae.run(tmp_path, replace(tiny_vae.CONFIG, variational=False), steps=20)
    samples = tiny_run.samples()
    x = torch.from_numpy(samples.images).float() / 127.5 - 1
    latents = net.eval().encode(x)[0].double()
    torch.testing.assert_close(net.prior_mean.double(), latents.mean(0), rtol=1e-4, atol=1e-5)
    covariance = net.prior_factor.double() @ net.prior_factor.double().T
    torch.testing.assert_close(covariance, latents.T.cov(), rtol=1e-3, atol=1e-4)
    model = open_model(tmp_path)
    drawn = generate(model, Request(range(4), options=SamplingOptions(batch=3)))
    assert drawn.shape == (4, 1, 8, 8) and drawn.abs().max() <= 1 and drawn.std(0).max() > 0
    torch.testing.assert_close(generate(model, Request([2])), drawn[2:3], atol=1e-5, rtol=0)


def test_beta_and_free_nats_reach_the_loss(tmp_path: Path) -> None:
    """A row of the log against the definition: loss = reconstruction + beta * warm-up * sum of max(cost, free) in the mean of the batch."""
    tiny_vae.run(tmp_path / "a", steps=1, log_every=1, beta=3.0, beta_warmup=4, free_nats=0.0)
    tiny_vae.run(tmp_path / "b", steps=1, log_every=1, beta=3.0, beta_warmup=0, free_nats=50.0)
    a, b = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("a", "b"))
    assert a["loss"] == pytest.approx(a["reconstruction_loss"] + 3 / 4 * a["kl"], rel=1e-6)
    assert b["loss"] == pytest.approx(b["reconstruction_loss"] + 3 * 3 * 50, rel=1e-6)


def test_training_finds_the_bars(tmp_path: Path) -> None:
    """The negative ELBO falls well below that of each pixel's own mean, which knows nothing of the labels."""
    _, row = tiny_vae.run(tmp_path, steps=400, lr=3e-3, validate_every=400, free_nats=0.0)
    share = torch.from_numpy(tiny_run.samples(12).images).double().div(255)
    mean = torch.from_numpy(tiny_run.samples().images).double().div(255).mean(0)
    alone = -(share * mean.log() + (1 - share) * (1 - mean).log()).flatten(1).sum(1).mean().item()
    assert row["validation_loss"] < 0.85 * alone


def test_bits_per_dimension() -> None:
    """A uniform density over [0, 1] costs 0 nats and log2(255) bits for a level of width 1/255; a fair coin one bit."""
    net = Autoencoder(replace(tiny_vae.CONFIG, likelihood="gaussian"))
    assert net.bits_per_dimension(0.0) == math.log2(255)
    assert Autoencoder(tiny_vae.CONFIG).bits_per_dimension(64 * math.log(2)) == pytest.approx(1)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    samples = tiny_run.samples()
    with pytest.raises(ValueError, match=r"net: got a Linear without 'bottleneck', supported: a network with the methods of an Autoenc"):
        train_vae(nn.Linear(2, 2), samples, VAETraining(steps=1, warmup=0), Run(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"net: it does not take what it is given .*supported: one that maps samples of shape \(1, 8, 8\)"):
        train_vae(Autoencoder(replace(tiny_vae.CONFIG, size=12)), samples, VAETraining(steps=1, warmup=0), Run(tmp_path / "a"))
    with pytest.raises(ValueError, match="size: got 10, supported with layers='conv': a multiple of 4"):
        AutoencoderConfig(size=10)
    assert not (tmp_path / "a").exists()
