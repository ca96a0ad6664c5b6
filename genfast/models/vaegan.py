"""VAE-GAN (Larsen et al. 2016): an `Autoencoder` and a discriminator whose features say how alike two pictures are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from genfast.checks import settle, whole
from genfast.impl import check_impl
from genfast.models import autoencoder
from genfast.models.autoencoder import Autoencoder, AutoencoderConfig, from_prior, initialise
from genfast.models.dcgan import TorchBlock
from genfast.models.family import Family
from genfast.nn.conv import ConvBlock

RANGES = autoencoder.RANGES | {"critic_channels": whole(1)}


@dataclass(frozen=True)
class VAEGANConfig(AutoencoderConfig):
    """What an `Autoencoder` and its `Discriminator` are made of; saved beside the autoencoder's weights."""

    critic_channels: int = 32  # of the discriminator at half the resolution, twice as many at a quarter

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, RANGES)
        if not self.variational or self.size % 4:
            got = f"{self.variational} and a size of {self.size}"
            raise ValueError(f"variational: got {got}, supported: True, and a size that is a multiple of 4")


class Discriminator(nn.Module):
    """Images (B, image_channels, size, size) -> logits (B,). No layer looks at two samples at once."""

    def __init__(self, config: VAEGANConfig = VAEGANConfig(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        block = ConvBlock if check_impl(impl) == "fused" else TorchBlock
        c, side = config.critic_channels, config.size // 4
        self.layers = nn.Sequential(
            block(config.image_channels, c, 4, 2, padding=1, norm=None, act="lrelu", alpha=0.2),
            block(c, 2 * c, 4, 2, padding=1, norm=None, act="lrelu", alpha=0.2),
            block(2 * c, 2 * c, 3, 1, padding=1, norm=None, act="lrelu", alpha=0.2),
        )
        self.last = nn.Linear(2 * c * side**2, 1)
        self.apply(initialise)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits (B,), the last feature map (B, 2 critic_channels, size / 4, size / 4))."""
        shape = (self.config.image_channels, self.config.size, self.config.size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, shape))})")
        features = self.layers(x)
        logits: Tensor = self.last(features.flatten(1))[:, 0]
        return logits, features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[0]


FAMILY = Family(VAEGANConfig, Autoencoder, from_prior, critic=Discriminator)
