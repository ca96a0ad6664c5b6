"""The first GANs: a generator and a discriminator of fully connected layers (Goodfellow et al. 2014)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from genfast.checks import decay, each, flag, settle, whole
from genfast.impl import check_impl
from genfast.models.family import Family, from_latents
from genfast.nn.dropout import Dropout

RANGES = {
    "size": whole(1, 1024),
    "image_channels": whole(1),
    "latent": whole(1),
    "widths": each(whole(1)),
    "norm": flag(),
    "dropout": decay(),
}


@dataclass(frozen=True)
class MLPGANConfig:
    """What a `Generator` and a `Discriminator` are made of; saved beside the generator's weights."""

    size: int = 28  # side of the images
    image_channels: int = 1  # of the images
    latent: int = 100  # length of the latents
    widths: tuple[int, ...] = (256, 512, 1024)  # of the generator's hidden layers; the discriminator has them from the last to the first
    norm: bool = False  # batch normalisation in the generator's hidden layers
    dropout: float = 0.0  # share of the discriminator's hidden numbers that are set to 0 in training

    def __post_init__(self) -> None:
        settle(self, RANGES)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.image_channels, self.size, self.size


class Generator(nn.Module):
    """Latents (B, latent) -> images (B, image_channels, size, size) in [-1, 1]."""

    def __init__(self, config: MLPGANConfig = MLPGANConfig(), impl: str = "fused") -> None:
        super().__init__()
        check_impl(impl)  # both are torch's own matrix products, for which there is nothing to fuse
        self.config = config
        layers: list[nn.Module] = []
        for width, following in pairwise((config.latent, *config.widths)):
            norm = [nn.BatchNorm1d(following)] if config.norm else []
            layers += [nn.Linear(width, following), *norm, nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(
            *layers, nn.Linear(config.widths[-1], math.prod(config.shape)), nn.Tanh(), nn.Unflatten(1, config.shape)
        )

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.config.latent:
            raise ValueError(f"z: got shape {tuple(z.shape)}, supported: (B, {self.config.latent})")
        images: Tensor = self.layers(z)
        return images


class Discriminator(nn.Module):
    """Images (B, image_channels, size, size) -> logits (B,)."""

    def __init__(self, config: MLPGANConfig = MLPGANConfig(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        for width, following in pairwise((math.prod(config.shape), *reversed(config.widths))):
            layers += [nn.Linear(width, following), nn.LeakyReLU(0.2)]
            layers += [Dropout(config.dropout, impl)] if config.dropout else []
        self.layers = nn.Sequential(nn.Flatten(), *layers, nn.Linear(config.widths[0], 1), nn.Flatten(0))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != self.config.shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, self.config.shape))})")
        logits: Tensor = self.layers(x)
        return logits


FAMILY = Family(MLPGANConfig, Generator, from_latents, critic=Discriminator)
