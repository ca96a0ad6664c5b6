"""What networks over feature maps of the sides 4, 8, ..., size are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from genfast.checks import choice, settle, whole

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

RANGES = {
    "size": whole(1),
    "image_channels": whole(1),
    "latent": whole(1),
    "channel_base": whole(1),
    "channel_max": whole(1),
    "body": choice(*DTYPES),
    "body_sides": whole(1),
}


@dataclass(frozen=True)
class Pyramid:
    """The feature maps of side s have min(channel_base / s, channel_max) channels.

    ``body`` is the dtype of the ``body_sides`` largest sides above 4; "float32" stands for the parameters' own. Latents, pictures and
    logits have the parameters' dtype.
    """

    size: int = 256  # side of the images, a power of 2
    image_channels: int = 3  # of the images
    latent: int = 512  # length of the latents
    channel_base: int = 32768  # channels of a side times that side
    channel_max: int = 512  # channels of any side, at most
    body: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of the largest sides; "float32" stands for the parameters' own
    body_sides: int = 4  # how many of the largest sides have that dtype

    def __post_init__(self) -> None:
        settle(self, RANGES)
        if not 8 <= self.size <= 1024 or self.size & (self.size - 1):
            raise ValueError(f"size: got {self.size}, supported: a power of 2 from 8 to 1024")
        if self.channel_base < self.size:
            raise ValueError(f"channel_base: got {self.channel_base}, supported: size, {self.size}, or more")

    @property
    def sides(self) -> tuple[int, ...]:
        """4, 8, ..., size."""
        return tuple(2**k for k in range(2, self.size.bit_length()))

    def channels(self, side: int) -> int:
        return min(self.channel_base // side, self.channel_max)

    def dtype(self, side: int, wide: torch.dtype) -> torch.dtype:
        """Of the feature maps of this side, ``wide`` being that of the parameters."""
        body = DTYPES[self.body]
        return body if body is not None and side in self.sides[1:][-self.body_sides :] else wide
