"""Dropout whose masks are a part of the network's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from genfast import ranks
from genfast.impl import NAMESPACES, check_impl
from genfast.streams import MODEL_NOISE

DRAW = 2**31  # apart from the draws of the latents in this stream


class Dropout(nn.Module):
    """Numbers (B, \\*sample) that are set to 0 in training with probability ``p``, and else divided by 1 - p (Srivastava et al. 2014).

    torch's dropout draws from the generator of the device, which no checkpoint holds, so that a run that was killed would end with other
    bits. Here the mask is a function of how often the layer was called, which is a buffer, and of the sample's place in the batch of all
    ranks. The count begins at a random number, so that two layers do not share their masks.
    """

    calls: Tensor

    def __init__(self, p: float = 0.5, impl: str = "fused") -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p: got {p}, supported: a share from 0 up to, but not, 1")
        self.p = p
        self._rng: Any = NAMESPACES[check_impl(impl)]
        self.register_buffer("calls", torch.randint(2**30, ()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        places = ranks.rank() + ranks.count() * torch.arange(len(x), device=x.device)
        keep = self._rng.uniform(self.calls * 2**24 + places, tuple(x.shape), draw=DRAW, stream=MODEL_NOISE) >= self.p
        self.calls += 1
        kept: Tensor = x * keep / (1 - self.p)
        return kept

    def extra_repr(self) -> str:
        return f"p={self.p}"
