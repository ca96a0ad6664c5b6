"""R3GAN (Huang et al. 2024): residual blocks of grouped convolutions without normalisation, for the relativistic loss with R1 and R2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast import ops
from genfast.checks import settle, whole
from genfast.impl import NAMESPACES, check_impl
from genfast.models import pyramid
from genfast.models.family import Family, from_latents
from genfast.models.pyramid import Pyramid

TAPS = (1.0, 2.0, 1.0)  # of bilinear resampling
LRELU_GAIN = math.sqrt(2 / (1 + 0.2**2))  # keeps the second moment through a leaky ReLU (He et al. 2015, equation 15)

RANGES = pyramid.RANGES | {"blocks": whole(1), "expansion": whole(1), "group_channels": whole(1)}


@dataclass(frozen=True)
class R3GANConfig(Pyramid):
    """What a `Generator` and a `Discriminator` are made of; saved beside the generator's weights."""

    latent: int = 64  # length of the latents
    channel_base: int = 16384  # channels of a side times that side
    channel_max: int = 384  # channels of any side, at most
    blocks: int = 2  # of each side
    expansion: int = 2  # channels inside a block for one outside
    group_channels: int = 16  # channels inside a block that a 3x3 convolution sees

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, RANGES)
        for side in self.sides:
            if self.channels(side) * self.expansion % self.group_channels:
                raise ValueError(
                    f"group_channels: got {self.group_channels}, supported: a divisor of {self.channels(side) * self.expansion}, "
                    f"the channels inside a block at side {side}"
                )

    @property
    def residual_gain(self) -> float:
        """Of the weights inside a residual branch of three convolutions: L^(-1/4) for L blocks (Zhang et al. 2019, "Fixup", section 3)."""
        return float((self.blocks * len(self.sides)) ** -0.25)


def _weight(out_channels: int, channels: int, kernel: int, gain: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(out_channels, channels, kernel, kernel) * (gain / math.sqrt(channels * kernel**2)))


def _convolve(impl: str, x: Tensor, weight: Tensor, **options: int) -> Tensor:
    """`conv2d`; the fused one has a gradient of the gradient that R1 asks for in one convolution, not one a group."""
    convolve: Any = ops.conv2d_resample if impl == "fused" else F.conv2d
    y: Tensor = convolve(x, weight.to(x.dtype), **options)
    return y


class ResidualBlock(nn.Module):
    """``x + W3 a(W2 a(W1 x + b1) + b2)``: 1x1 to wide, grouped 3x3, 1x1 back, a the leaky ReLU: (B, channels, H, W) -> same.

    W3 starts at zero and W1, W2 with the gain ``gain``, which is what training without a norm needs (Zhang et al. 2019).
    """

    def __init__(self, channels: int, expansion: int = 2, group_channels: int = 16, gain: float = 1.0, impl: str = "fused") -> None:
        super().__init__()
        inner = channels * expansion
        self.groups, self.impl = inner // group_channels, check_impl(impl)
        self.weight1 = _weight(inner, channels, 1, LRELU_GAIN * gain)
        self.weight2 = _weight(inner, group_channels, 3, LRELU_GAIN * gain)
        self.weight3 = _weight(channels, inner, 1, 0.0)
        self.bias1, self.bias2 = (nn.Parameter(torch.zeros(inner)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        namespace = NAMESPACES[self.impl]
        y = _convolve(self.impl, x, self.weight1)
        y = namespace.bias_act(y, self.bias1.to(y.dtype), act="lrelu", gain=1.0)
        y = _convolve(self.impl, y, self.weight2, padding=1, groups=self.groups)
        y = namespace.bias_act(y, self.bias2.to(y.dtype), act="lrelu", gain=1.0)
        return x + _convolve(self.impl, y, self.weight3)


class Resample(nn.Module):
    """Bilinear halving, then a 1x1 convolution where channels change; ``up``: the convolution, then bilinear doubling."""

    taps: Tensor

    def __init__(self, channels: int, out_channels: int, up: bool, impl: str) -> None:
        super().__init__()
        self.up, self.impl = up, impl
        self.weight = _weight(out_channels, channels, 1, 1.0) if channels != out_channels else None
        self.register_buffer("taps", ops.setup_filter(TAPS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        namespace = NAMESPACES[self.impl]
        x = x if self.up else namespace.downsample2d(x, self.taps)
        x = x if self.weight is None else _convolve(self.impl, x, self.weight)
        return namespace.upsample2d(x, self.taps) if self.up else x


def _blocks(config: R3GANConfig, side: int, impl: str) -> Sequence[nn.Module]:
    return [
        ResidualBlock(config.channels(side), config.expansion, config.group_channels, config.residual_gain, impl)
        for _ in range(config.blocks)
    ]


class Generator(nn.Module):
    """Latents (B, latent) -> images (B, image_channels, size, size)."""

    def __init__(self, config: R3GANConfig = R3GANConfig(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        check_impl(impl)
        c = config.channels
        self.basis = nn.Parameter(torch.randn(c(4), 4, 4))
        self.latent = nn.Parameter(torch.randn(c(4), config.latent) / math.sqrt(config.latent))
        self.sides = nn.ModuleList()
        for side in config.sides:
            before = [] if side == 4 else [Resample(c(side // 2), c(side), True, impl)]
            self.sides.append(nn.Sequential(*before, *_blocks(config, side, impl)))
        self.weight = _weight(config.image_channels, c(config.size), 1, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        config = self.config
        if z.ndim != 2 or z.shape[1] != config.latent:
            raise ValueError(f"z: got shape {tuple(z.shape)}, supported: (B, {config.latent})")
        wide = self.basis.dtype
        x = (self.basis * F.linear(z, self.latent)[:, :, None, None]).contiguous(memory_format=torch.channels_last)
        for side, blocks in zip(config.sides, self.sides, strict=True):
            x = blocks(x.to(config.dtype(side, wide)))
        return F.conv2d(x, self.weight.to(x.dtype)).to(wide)


class Discriminator(nn.Module):
    """Images (B, image_channels, size, size) -> logits (B,), each sample alone."""

    def __init__(self, config: R3GANConfig = R3GANConfig(), impl: str = "fused") -> None:
        super().__init__()
        self.config = config
        check_impl(impl)
        c = config.channels
        self.weight = _weight(c(config.size), config.image_channels, 1, 1.0)
        self.sides = nn.ModuleList()
        for side in config.sides[::-1]:
            after = [] if side == 4 else [Resample(c(side), c(side // 2), False, impl)]
            self.sides.append(nn.Sequential(*_blocks(config, side, impl), *after))
        self.basis = _weight(c(4), 1, 4, 1.0)
        self.logit = nn.Parameter(torch.randn(1, c(4)) / math.sqrt(c(4)))

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        shape = (config.image_channels, config.size, config.size)
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, supported: (B, {', '.join(map(str, shape))})")
        wide = self.basis.dtype
        x = x.to(config.dtype(config.size, wide), memory_format=torch.channels_last)
        x = F.conv2d(x, self.weight.to(x.dtype))
        for side, blocks in zip(config.sides[::-1], self.sides, strict=True):
            x = blocks(x.to(config.dtype(side, wide)))
        features = F.conv2d(x.to(wide), self.basis, groups=config.channels(4)).flatten(1)
        return F.linear(features, self.logit)[:, 0].to(wide)


FAMILY = Family(R3GANConfig, Generator, from_latents, critic=Discriminator)
