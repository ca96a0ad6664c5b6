"""Autoencoders of pictures: plain, variational (Kingma and Welling 2014), and what a VAE-GAN (Larsen et al. 2016) trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.checks import choice, flag, settle, whole
from genfast.impl import NAMESPACES, check_impl
from genfast.models.dcgan import TorchBlock
from genfast.models.family import Family, Model
from genfast.nn.conv import ConvBlock
from genfast.streams import SAMPLING

if TYPE_CHECKING:
    from genfast.request import Request

RANGES = {
    "size": whole(4, 1024),
    "image_channels": whole(1),
    "latent": whole(1),
    "channels": whole(1),
    "layers": choice("conv", "dense"),
    "variational": flag(),
    "likelihood": choice("bernoulli", "gaussian"),
}
LEAST_LOG_SIGMA = -6.0  # of the Gaussian likelihood, as in Rybkin et al. 2021: pictures without noise would make it minus infinity


@dataclass(frozen=True)
class AutoencoderConfig:
    """What an `Autoencoder` is made of; saved beside its weights."""

    size: int = 28  # side of the images; of "conv" a multiple of 4
    image_channels: int = 1  # of the images
    latent: int = 16  # length of the latents
    channels: int = 32  # of "conv" at half the resolution, twice as many at a quarter; of "dense" a sixteenth of the hidden layers' width
    layers: Literal["conv", "dense"] = "conv"  # strided convolutions, or two fully connected hidden layers
    variational: bool = True  # latents are distributions; without it they are points, and sampling fits a Gaussian to them
    likelihood: Literal["bernoulli", "gaussian"] = "bernoulli"  # of a pixel in [0, 1]; the Gaussian's one sigma is learned

    def __post_init__(self) -> None:
        settle(self, RANGES)
        if self.layers == "conv" and self.size % 4:
            raise ValueError(f"size: got {self.size}, supported with layers='conv': a multiple of 4")

    @property
    def dimensions(self) -> int:
        """Numbers in one picture."""
        return self.image_channels * self.size**2


class Autoencoder(nn.Module):
    """Images (B, image_channels, size, size) in [-1, 1] to latents (B, latent) and back.

    No layer looks at two samples at once, so that a batch may be split over processes. ``prior_mean`` (L,) and ``prior_factor`` (L, L)
    say where latents lie: z = prior_mean + prior_factor e with e standard normal. They are 0 and the identity for a variational one.
    """

    prior_mean: Tensor
    prior_factor: Tensor

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        outputs = 2 * config.latent if config.variational else config.latent
        self.encoder, self.decoder = (_conv if config.layers == "conv" else _dense)(config, outputs, impl)
        self.log_sigma = nn.Parameter(torch.zeros(())) if config.likelihood == "gaussian" else None
        self.register_buffer("prior_mean", torch.zeros(config.latent))
        self.register_buffer("prior_factor", torch.eye(config.latent))
        self.apply(initialise)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of the standard normal noise that `bottleneck` takes, for one sample."""
        return (self.config.latent,)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(mean (B, L), logarithm of the variance (B, L)) of the latents of images; without ``variational`` (latents, None)."""
        shape = (self.config.image_channels, self.config.size, self.config.size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, shape))})")
        output: Tensor = self.encoder(x)
        if not self.config.variational:
            return output, None
        mean, log_variance = output.chunk(2, dim=1)
        return mean, log_variance

    def bottleneck(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        """(latents z (B, L), what they cost (B, L) in nats) of images, with standard normal noise ``n`` (B, L).

        The cost is KL(q(z_i | x) || N(0, 1)) of each dimension (Kingma and Welling 2014, appendix B), or 0 without ``variational``.
        """
        mean, log_variance = self.encode(x)
        if log_variance is None:
            return mean, torch.zeros_like(mean)
        mean, log_variance = mean.float(), log_variance.float()
        return mean + (log_variance / 2).exp() * n, (mean.square() + log_variance.exp() - log_variance - 1) / 2

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameter for each number of a picture, like the images: logits, or means in units of [0, 1]."""
        output: Tensor = self.decoder(z)
        return output

    def reconstruction_loss(self, x: Tensor, decoded: Tensor) -> Tensor:
        """-log p(x | z) of each image, (B,) float32 in nats, for pixels in [0, 1]; the Gaussian's is a density."""
        target, decoded = (x.float() + 1) / 2, decoded.float()
        if self.log_sigma is None:
            return F.binary_cross_entropy_with_logits(decoded, target, reduction="none").flatten(1).sum(1)
        log_sigma = self.log_sigma.clamp(min=LEAST_LOG_SIGMA)
        errors = ((target - decoded) * (-log_sigma).exp()).square() / 2 + log_sigma + math.log(2 * math.pi) / 2
        return errors.flatten(1).sum(1)

    def images(self, decoded: Tensor) -> Tensor:
        """The expected picture in [-1, 1] of what `decode` gave."""
        return 2 * (decoded.float().sigmoid() if self.log_sigma is None else decoded.float()) - 1

    def bits_per_dimension(self, nats: float) -> float:
        """Bits for each number of a picture of 256 levels, of so many nats a picture.

        The Gaussian's density is multiplied by the width of a level, 1/255; the Bernoulli's is no likelihood of levels, so that its bits
        compare only with its own.
        """
        bits = nats / self.config.dimensions / math.log(2)
        return bits if self.log_sigma is None else bits + math.log2(255)

    @torch.no_grad()
    def fit_prior(self, latents: Tensor) -> None:
        """Let sampling draw from a Gaussian with the mean and covariance of ``latents`` (N, L) (ex-post density estimation, Ghosh et al.
        2020).
        """
        latents = latents.double()
        centred = latents - latents.mean(0)
        covariance = centred.T @ centred / max(1, len(latents) - 1)
        values, vectors = torch.linalg.eigh(covariance)
        self.prior_mean.copy_(latents.mean(0))
        self.prior_factor.copy_(vectors * values.clamp(min=0).sqrt())

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, image_channels, size, size) in [-1, 1] from standard normal numbers (B, L)."""
        return self.images(self.decode(self.prior_mean + z @ self.prior_factor.T))


def _conv(config: AutoencoderConfig, outputs: int, impl: str) -> tuple[nn.Module, nn.Module]:
    block = ConvBlock if check_impl(impl) == "fused" else TorchBlock
    c, side = config.channels, config.size // 4
    encoder = nn.Sequential(
        block(config.image_channels, c, 4, 2, padding=1, norm=None, act="lrelu", alpha=0.2),
        block(c, 2 * c, 4, 2, padding=1, norm=None, act="lrelu", alpha=0.2),
        block(2 * c, 2 * c, 3, 1, padding=1, norm=None, act="lrelu", alpha=0.2),
        nn.Flatten(),
        nn.Linear(2 * c * side**2, outputs),
    )
    decoder = nn.Sequential(
        nn.Linear(config.latent, 2 * c * side**2),
        nn.Unflatten(1, (2 * c, side, side)),
        block(2 * c, 2 * c, 3, 1, padding=1, norm=None, act="lrelu", alpha=0.2),
        block(2 * c, c, 4, 2, padding=1, transposed=True, norm=None, act="lrelu", alpha=0.2),
        block(c, config.image_channels, 4, 2, padding=1, transposed=True, norm=None, act="linear"),
    )
    return encoder, decoder


def _dense(config: AutoencoderConfig, outputs: int, impl: str) -> tuple[nn.Module, nn.Module]:
    check_impl(impl)
    width, shape = 16 * config.channels, (config.image_channels, config.size, config.size)

    def layers(*widths: int) -> list[nn.Module]:
        hidden: list[nn.Module] = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.LeakyReLU(0.2))]
        return hidden[:-1]

    encoder = nn.Sequential(nn.Flatten(), *layers(config.dimensions, width, width, outputs))
    decoder = nn.Sequential(*layers(config.latent, width, width, config.dimensions), nn.Unflatten(1, shape))
    return encoder, decoder


def initialise(module: nn.Module) -> None:
    """Without norms every layer must keep the variance itself (He et al. 2015, section 2.2)."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, 0.2)
    elif isinstance(module, nn.ConvTranspose2d):  # each output sums kernel * kernel / stride^2 products for each channel
        fan = module.in_channels * module.kernel_size[0] ** 2 / module.stride[0] ** 2
        nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (1 + 0.2**2) / fan))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def from_prior(model: Model, request: Request) -> Tensor:
    """What an `Autoencoder` makes of latents from its prior, each by its seed (stream 0, draw 0)."""
    seeds = torch.tensor(request.seeds, device=model.device)
    rng = NAMESPACES[request.options.impl]
    images: Tensor = model.net(rng.normal(seeds, (len(seeds), model.net.config.latent), stream=SAMPLING) * request.options.truncation)
    return images


FAMILY = Family(AutoencoderConfig, Autoencoder, from_prior)
