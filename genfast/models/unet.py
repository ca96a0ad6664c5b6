"""A class-conditional U-Net for small images (Ho et al. 2020, appendix B; Dhariwal and Nichol 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genfast.checks import above, each, flag, settle, whole
from genfast.models.denoising import from_noise
from genfast.models.family import Family
from genfast.nn import AttentionBlock, Downsample, ResBlock, TimeEmbedding, Upsample
from genfast.nn.layers import group_norm, zero_

CONFIG_RANGES = {
    "image_channels": whole(1),
    "channels": each(whole(4)),  # a group of the norms has at least 4
    "blocks": each(whole(0)),
    "attention": each(flag()),
    "head_dim": whole(1),
    "num_classes": whole(0),
    "time_scale": above(0),
}


@dataclass(frozen=True)
class UNetConfig:
    """What a `UNet` is made of; saved beside its weights."""

    image_channels: int = 1  # of the images
    channels: tuple[int, ...] = (32, 64, 96)  # of each level; every level after the first halves the resolution
    blocks: tuple[int, ...] = (1, 2, 1)  # residual blocks of each level, on the way down and again on the way up
    attention: tuple[bool, ...] = (False, False, True)  # self-attention after every block of the level
    head_dim: int = 32  # channels of an attention head
    num_classes: int = 10  # 0: unconditional
    time_scale: float = 1.0  # multiplies the time before its embedding: 1 for indices of 0 to 999, 1000 for flow times in [0, 1]

    def __post_init__(self) -> None:
        settle(self, CONFIG_RANGES)
        if not len(self.channels) == len(self.blocks) == len(self.attention) >= 1:
            raise ValueError(
                f"channels, blocks, attention: got {len(self.channels)}, {len(self.blocks)} and {len(self.attention)} levels, "
                "supported: the same number, at least 1"
            )
        for channels, attends in zip(self.channels, self.attention, strict=True):
            if attends and channels % max(1, channels // self.head_dim):
                raise ValueError(f"head_dim: got {self.head_dim}, supported: one that splits the {channels} channels into equal heads")


class UNet(nn.Module):
    """``net(x, t, y)``: the prediction for noisy images ``x`` at times ``t`` with labels ``y``.

    Shapes: x (B, image_channels, H, W) with H and W divisible by 2 per level after the first (4 for three levels);
    t (B,) float; y (B,) int64 in [0, num_classes], where the label ``num_classes`` means "no label" (the unconditional half
    of classifier-free guidance), or None for no label at all. Returns (B, image_channels, H, W).
    """

    def __init__(self, config: UNetConfig = UNetConfig()) -> None:
        super().__init__()
        self.config = config
        c = config.channels
        width = 4 * c[0]
        self.time = TimeEmbedding(width, scale=config.time_scale)
        self.label = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.stem = nn.Conv2d(config.image_channels, c[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level, blocks in enumerate(config.blocks):
            for _ in range(blocks):
                self.down.append(self._block(c[level], c[level], level))
            if level + 1 < len(c):
                self.down.append(Downsample(c[level], c[level + 1]))
        self.middle = self._block(c[-1], c[-1], len(c) - 1)
        for level in reversed(range(len(c))):
            for _ in range(config.blocks[level]):
                self.up.append(self._block(2 * c[level], c[level], level))
            if level:
                self.up.append(Upsample(c[level], c[level - 1]))
        self.norm = group_norm(c[0])
        self.out = zero_(nn.Conv2d(c[0], config.image_channels, 3, padding=1))

    def _block(self, channels: int, out_channels: int, level: int) -> nn.ModuleList:
        layers: list[nn.Module] = [ResBlock(channels, out_channels, 4 * self.config.channels[0])]
        if self.config.attention[level]:
            layers.append(AttentionBlock(out_channels, self.config.head_dim))
        return nn.ModuleList(layers)

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.config.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        multiple = 2 ** (len(self.config.channels) - 1)
        if x.ndim != 4 or x.shape[1] != self.config.image_channels or x.shape[2] % multiple or x.shape[3] % multiple:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, supported: (B, {self.config.image_channels}, H, W) with H and W divisible by {multiple}"
            )
        embedding = self.time(t)
        if self.label is not None:
            embedding = embedding + self.label(torch.full_like(t, self.null_label, dtype=torch.int64) if y is None else y)
        elif y is not None:
            raise ValueError("y: got labels, supported: None, as this network has num_classes=0")
        h = self.stem(x)
        skips: list[Tensor] = []
        for layer in self.down:
            if isinstance(layer, nn.ModuleList):
                h = _run(layer, h, embedding)
                skips.append(h)
            else:
                h = layer(h)
        h = _run(self.middle, h, embedding)
        for layer in self.up:
            h = _run(layer, torch.cat([h, skips.pop()], dim=1), embedding) if isinstance(layer, nn.ModuleList) else layer(h)
        out: Tensor = self.out(nn.functional.silu(self.norm(h)))
        return out


def _run(block: nn.ModuleList, h: Tensor, embedding: Tensor) -> Tensor:
    h = block[0](h, embedding)
    for layer in block[1:]:
        h = layer(h)
    return h


FAMILY = Family(UNetConfig, lambda config, impl: UNet(config), from_noise)
