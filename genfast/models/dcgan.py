"""DCGAN (Radford et al. 2016): a generator of transposed convolutions and a discriminator of strided ones, for small images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genfast.checks import choice, flag, settle, whole
from genfast.impl import check_impl
from genfast.models.family import Family, from_latents
from genfast.models.pyramid import DTYPES
from genfast.nn.conv import ConvBlock
from genfast.nn.plain import call

RANGES = {
    "size": whole(1, 1024),
    "image_channels": whole(1),
    "latent": whole(1),
    "channels": whole(1),
    "discriminator_norm": flag(),
    "body": choice(*DTYPES),
}


@dataclass(frozen=True)
class DCGANConfig:
    """What a `Generator` and a `Discriminator` are made of; saved beside the generator's weights."""

    size: int = 28  # side of the images: 4, 5, 6 or 7 times a power of 2, at least 8
    image_channels: int = 1  # of the images
    latent: int = 100  # length of the latents
    channels: int = 64  # at half the resolution; every halving doubles them
    discriminator_norm: bool = True  # batch normalisation in the discriminator; penalties of each sample's gradient need it off
    body: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of feature maps; "float32" stands for the parameters' own

    def __post_init__(self) -> None:
        settle(self, RANGES)
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

    def __init__(self, config: DCGANConfig = DCGANConfig(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        block = _block(impl)
        c = config.widths
        layers = [block(config.latent, c[0], config.base, padding=0, transposed=True)]
        layers += [block(width, following, 4, 2, transposed=True) for width, following in pairwise(c)]
        self.layers = nn.Sequential(*layers, block(c[-1], config.image_channels, 4, 2, transposed=True, norm=None, act="tanh"))
        self.apply(_initialise)

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.config.latent:
            raise ValueError(f"z: got shape {tuple(z.shape)}, supported: (B, {self.config.latent})")
        images: Tensor = self.layers(z[:, :, None, None].to(DTYPES[self.config.body] or z.dtype))
        return images.to(z.dtype)


class Discriminator(nn.Module):
    """Images (B, image_channels, size, size) -> logits (B,)."""

    def __init__(self, config: DCGANConfig = DCGANConfig(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        block = _block(impl)
        c = config.widths[::-1]
        leaky: dict[str, Any] = {"act": "lrelu", "alpha": 0.2}
        layers: list[nn.Module] = [block(config.image_channels, c[0], 4, 2, norm=None, **leaky)]
        norm = "batch" if config.discriminator_norm else None
        layers += [block(width, following, 4, 2, norm=norm, **leaky) for width, following in pairwise(c)]
        self.layers = nn.Sequential(*layers, block(c[-1], 1, config.base, padding=0, norm=None, act="linear"), nn.Flatten(0))
        self.apply(_initialise if config.discriminator_norm else _initialise_alone)

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.config.image_channels, self.config.size, self.config.size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, shape))})")
        logits: Tensor = self.layers(x.to(DTYPES[self.config.body] or x.dtype))
        return logits.to(x.dtype)


class TorchBlock(nn.Module):
    """`genfast.nn.ConvBlock` by torch's own modules, with the same parameters."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        padding: int = 1,
        transposed: bool = False,
        norm: str | None = "batch",
        act: str = "relu",
        alpha: float = 0.2,
    ) -> None:
        super().__init__()
        self.conv = (nn.ConvTranspose2d if transposed else nn.Conv2d)(channels, out_channels, kernel, stride, padding, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm else None
        self.bias = None if norm else nn.Parameter(torch.zeros(out_channels))
        self.act = {"relu": nn.ReLU(), "lrelu": nn.LeakyReLU(alpha), "tanh": nn.Tanh(), "linear": nn.Identity()}[act]

    def forward(self, x: Tensor) -> Tensor:
        y = call(self.conv, x)
        if self.norm is not None:
            y = self.norm(y)
        elif self.bias is not None:
            y = y + self.bias.to(y.dtype)[:, None, None]
        activated: Tensor = self.act(y)
        return activated


def _block(impl: str) -> Any:
    return ConvBlock if check_impl(impl) == "fused" else TorchBlock


def _initialise(module: nn.Module) -> None:
    """Radford et al. 2016, section 4: weights of standard deviation 0.02; norms around 1 as in their code."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)


def _initialise_alone(module: nn.Module) -> None:
    """Without a norm behind it a convolution must keep the variance itself (He et al. 2015, section 2.2)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, 0.2)


FAMILY = Family(DCGANConfig, Generator, from_latents, critic=Discriminator)
