"""Progressive GAN (Karras et al. 2018): generator and discriminator that grow from 4x4 to the size of the images while they train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast.checks import Rule, settle, whole
from genfast.impl import NAMESPACES, check_impl
from genfast.models import pyramid
from genfast.models.family import Family, from_latents
from genfast.models.pyramid import Pyramid
from genfast.nn.style import EqualizedConv2d, EqualizedLinear

RANGES = pyramid.RANGES | {
    "stddev_group": whole(1),
    "growth": Rule("a share above 0 and up to 1", lambda value: isinstance(value, float | int) and 0 < value <= 1),
}


@dataclass(frozen=True)
class ProGANConfig(Pyramid):
    """What a `Generator` and a `Discriminator` are made of; saved beside the generator's weights."""

    size: int = 64  # side of the images, a power of 2
    latent: int = 128  # length of the latents
    channel_base: int = 2048  # channels of a side times that side
    channel_max: int = 128  # channels of any side, at most
    stddev_group: int = 4  # samples whose spread the discriminator sees
    growth: float = 0.6  # share of the run after which the networks are grown

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, RANGES)

    def stage(self, progress: float) -> float:
        """Where growth is at this share of the run: 1.25 shows a quarter of the third side and three quarters of the second.

        A new side fades in during one of two equal parts of its time, and trains alone with the smaller ones in the other
        (Karras et al. 2018, figure 2). It is a function of the step alone, so that a run continues at any moment.
        """
        parts = min(1.0, progress / self.growth) * 2 * (len(self.sides) - 1)
        whole_sides, part = divmod(parts, 2)
        return whole_sides + max(0.0, part - 1)


class _Growing(nn.Module):
    """What generator and discriminator share: ``stage``, which `grow` sets; a network that nobody grows is grown."""

    def __init__(self, config: ProGANConfig, impl: str) -> None:
        super().__init__()
        self.config, self.impl = config, check_impl(impl)
        self.stage = float(len(config.sides) - 1)

    def grow(self, progress: float) -> None:
        """Be as large as at this share of the run, from 0 to 1."""
        self.stage = self.config.stage(progress)

    @property
    def split(self) -> tuple[int, float]:
        """(number of sides in use, share of the largest one in the picture)."""
        sides = int(-(-self.stage // 1)) + 1
        return sides, 1.0 if self.stage == sides - 1 else self.stage - (sides - 2)

    def conv(self, channels: int, out_channels: int, kernel: int = 3, act: str = "lrelu") -> EqualizedConv2d:
        return EqualizedConv2d(channels, out_channels, kernel, act=act, impl=self.impl)


class PixelNorm(nn.Module):
    """`genfast.ops.pixel_norm` along the channels (Karras et al. 2018, section 4.2)."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self._pixel_norm: Any = NAMESPACES[impl].pixel_norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._pixel_norm(x)
        return y


class Generator(_Growing):
    """Latents (B, latent) -> images (B, image_channels, size, size), of whatever side has grown, enlarged by repeating pixels."""

    def __init__(self, config: ProGANConfig = ProGANConfig(), impl: str = "fused") -> None:
        super().__init__(config, impl)
        c = config.channels
        self.first = EqualizedLinear(config.latent, c(4) * 16, act="lrelu", impl=impl)
        self.blocks = nn.ModuleList()
        for side in config.sides:
            before = c(4) if side == 4 else c(side // 2)
            more = () if side == 4 else (self.conv(c(side), c(side)), PixelNorm(impl))
            self.blocks.append(nn.Sequential(self.conv(before, c(side)), PixelNorm(impl), *more))
        self.to_images = nn.ModuleList(self.conv(c(side), config.image_channels, 1, act="linear") for side in config.sides)

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim != 2 or z.shape[1] != self.config.latent:
            raise ValueError(f"z: got shape {tuple(z.shape)}, supported: (B, {self.config.latent})")
        namespace: Any = NAMESPACES[self.impl]
        config, (sides, share) = self.config, self.split
        x = namespace.pixel_norm(self.first(namespace.pixel_norm(z)).unflatten(1, (-1, 4, 4)))
        image: Tensor | None = None
        for number, side in enumerate(config.sides[:sides]):
            if number:
                if number == sides - 1 and share < 1:
                    image = self.to_images[number - 1](x).to(z.dtype)
                x = F.interpolate(x, scale_factor=2.0)
            x = x.to(config.dtype(side, z.dtype))
            x = self.blocks[number](x)
        newest = self.to_images[sides - 1](x).to(z.dtype)
        image = newest if image is None else torch.lerp(F.interpolate(image, scale_factor=2.0), newest, share)
        return F.interpolate(image, size=(config.size, config.size))


class Discriminator(_Growing):
    """Images (B, image_channels, size, size), reduced to the side that has grown, -> logits (B,)."""

    def __init__(self, config: ProGANConfig = ProGANConfig(), impl: str = "fused") -> None:
        super().__init__(config, impl)
        c = config.channels
        self.from_images = nn.ModuleList(self.conv(config.image_channels, c(side), 1) for side in config.sides)
        self.blocks = nn.ModuleList(
            nn.Sequential(self.conv(c(side), c(side)), self.conv(c(side), c(side // 2))) for side in config.sides[1:]
        )
        self.last = self.conv(c(4) + 1, c(4))
        self.hidden = EqualizedLinear(c(4) * 16, c(4), act="lrelu", impl=impl)
        self.logit = EqualizedLinear(c(4), 1, impl=impl)

    def softened(self, x: Tensor) -> Tensor:
        """Real images without the detail that the generator's newest side does not show yet: what it is compared with."""
        sides, share = self.split
        side = self.config.sides[sides - 1]
        x = F.avg_pool2d(x, self.config.size // side)
        if share < 1:
            x = torch.lerp(F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0), x, share)
        return F.interpolate(x, size=(self.config.size, self.config.size))

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.config.image_channels, self.config.size, self.config.size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, shape))})")
        config, (sides, share), dtype = self.config, self.split, self.logit.weight.dtype
        image = F.avg_pool2d(x, config.size // config.sides[sides - 1])
        features = self.from_images[sides - 1](image.to(config.dtype(config.sides[sides - 1], dtype)))
        for number in reversed(range(1, sides)):
            features = self.blocks[number - 1](features.to(config.dtype(config.sides[number], dtype)))
            features = F.avg_pool2d(features, 2).to(dtype)
            if number == sides - 1 and share < 1:
                smaller = self.from_images[number - 1](F.avg_pool2d(image, 2)).to(dtype)
                features = torch.lerp(smaller, features, share)
        features = NAMESPACES[self.impl].minibatch_stddev(features.to(dtype), config.stddev_group)
        logits: Tensor = self.logit(self.hidden(self.last(features).flatten(1)))
        return logits[:, 0]


FAMILY = Family(ProGANConfig, Generator, from_latents, critic=Discriminator)
