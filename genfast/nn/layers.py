"""Convolutional layers of diffusion U-Nets (Ho et al. 2020; Dhariwal and Nichol 2021, section 3)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm over groups of at least 4 channels, at most 32 groups."""
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


def zero_(module: nn.Module) -> nn.Module:
    """Zero a module's parameters: a residual branch that ends in it starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time, then a two-layer perceptron: (B,) -> (B, channels).

    Frequencies are geometric from 1 to 1/10000 (Vaswani et al. 2017, section 3.5), made for times of 0 to about 1000;
    ``scale`` multiplies the time first, for processes whose time runs over another range (1000 for t in [0, 1]).
    """

    frequencies: Tensor

    def __init__(self, channels: int, width: int = 64, scale: float = 1.0) -> None:
        super().__init__()
        frequencies = scale * torch.exp(torch.arange(width // 2) * (-math.log(10000) / (width // 2)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.project = nn.Sequential(nn.Linear(width, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        embedding: Tensor = self.project(torch.cat([angle.cos(), angle.sin()], dim=1))
        return embedding


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a skip; the embedding scales and shifts the second norm (Dhariwal and Nichol 2021, section 4.3).

    (B, channels, H, W), (B, embedding) -> (B, out_channels, H, W).
    """

    def __init__(self, channels: int, out_channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulate(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        out: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return out


class AttentionBlock(nn.Module):
    """Self-attention over the pixels with a skip: (B, channels, H, W) -> same (Ho et al. 2020, appendix B)."""

    def __init__(self, channels: int, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        q, k, v = tokens.reshape(batch, height * width, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).reshape(batch, height, width, channels)
        out: Tensor = x + self.out(h.permute(0, 3, 1, 2))
        return out


class Downsample(nn.Module):
    """Strided 3x3 convolution: (B, channels, H, W) -> (B, out_channels, H/2, W/2), H and W even."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: (B, channels, H, W) -> (B, out_channels, 2H, 2W)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out
