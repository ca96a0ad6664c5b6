"""DCGAN (Radford et al. 2016): a generator of transposed convolutions and a discriminator of strided ones, for small images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from genfast.models import store


@dataclass(frozen=True)
class DCGANConfig:
    """What a `Generator` and a `Discriminator` are made of; saved beside the generator's weights."""

    size: int = 28  # side of the images: 4, 5, 6 or 7 times a power of 2, at least 8
    image_channels: int = 1
    latent: int = 100
    channels: int = 64  # at half the resolution; every halving doubles them
    discriminator_norm: bool = True  # batch normalisation in the discriminator; penalties of each sample's gradient need it off

    def __post_init__(self) -> None:
        if self.size < 8 or self.base not in (4, 5, 6, 7):
            raise ValueError(f"size: got {self.size}, supported: 4, 5, 6 or 7 times a power of 2, at least 8")

    @property
    def base(self) -> int:
        """Side of the smallest feature map."""
        side = self.size
        while side > 7 and side % 2 == 0:
            side //= 2
        return side

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the feature maps, from the base up to half the resolution."""
        levels = (self.size // self.base).bit_length() - 1
        return tuple(self.channels * 2**level for level in reversed(range(levels)))


class Generator(nn.Module):
    """Latents (B, latent) -> images (B, image_channels, size, size) in [-1, 1]."""

    def __init__(self, config: DCGANConfig = DCGANConfig()) -> None:
        super().__init__()
        self.config = config
        c = config.widths
        layers: list[nn.Module] = [nn.Unflatten(1, (config.latent, 1, 1)), nn.ConvTranspose2d(config.latent, c[0], config.base, bias=False)]
        for width, following in pairwise(c):
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, following, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(c[-1]), nn.ReLU(), nn.ConvTranspose2d(c[-1], config.image_channels, 4, 2, 1)]
        self.layers = nn.Sequential(*layers, nn.Tanh())
        self.apply(_initialise)

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.config.latent:
            raise ValueError(f"z: got shape {tuple(z.shape)}, supported: (B, {self.config.latent})")
        images: Tensor = self.layers(z)
        return images


class Discriminator(nn.Module):
    """Images (B, image_channels, size, size) -> logits (B,)."""

    def __init__(self, config: DCGANConfig = DCGANConfig()) -> None:
        super().__init__()
        self.config = config
        c = config.widths[::-1]
        layers: list[nn.Module] = [nn.Conv2d(config.image_channels, c[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for width, following in pairwise(c):
            norm = config.discriminator_norm
            layers += [
                nn.Conv2d(width, following, 4, 2, 1, bias=not norm),
                *([nn.BatchNorm2d(following)] if norm else []),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(c[-1], 1, config.base), nn.Flatten(0))
        self.apply(_initialise if config.discriminator_norm else _initialise_alone)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.config.image_channels, self.config.size, self.config.size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, shape))})")
        logits: Tensor = self.layers(x)
        return logits


def _initialise(module: nn.Module) -> None:
    """Radford et al. 2016, section 4: weights of standard deviation 0.02; norms around 1 as in their code."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def _initialise_alone(module: nn.Module) -> None:
    """Without a norm behind it a convolution must keep the variance itself (He et al. 2015, section 2.2)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, 0.2)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def save(generator: Generator, path: str | Path, state: dict[str, Tensor] | None = None, **about: Any) -> None:
    """Write a generator's weights and configuration as `genfast.models.save` does a U-Net's."""
    store.write(path, state or generator.state_dict(), "dcgan", asdict(generator.config), about)


def load(path: str | Path) -> tuple[Generator, dict[str, Any]]:
    """Rebuild a generator that `save` wrote, on the CPU in eval mode: (generator, about). Raises as `genfast.models.load` does."""
    tensors, config, about = store.read(path, "dcgan", "a DCGAN generator")
    generator = Generator(DCGANConfig(**config))
    generator.load_state_dict(tensors)
    return generator.eval(), about
