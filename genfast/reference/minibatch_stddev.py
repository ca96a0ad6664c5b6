"""The spread of a batch as further channels, in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def minibatch_stddev(x: Tensor, group_size: int | None = 4, num_channels: int = 1, eps: float = 1e-8) -> Tensor:
    """``x`` (B, C, H, W) with ``num_channels`` more channels: (B, C + num_channels, H, W) (Karras et al. 2018, section 3).

    Samples i, i + B / g, i + 2 B / g, ... are a group of g = min(group_size, B) (None: the batch), as in StyleGAN2. New channel k of each
    is ``sqrt(var + eps)`` over the group, averaged over pixels and the k-th of ``num_channels`` equal parts of the channels.
    """
    batch, _, height, width = x.shape
    groups = batch // min(batch if group_size is None else group_size, batch)
    more = x.new_zeros(batch, num_channels, height, width)
    for start in range(groups):
        for k, part in enumerate(x[start::groups].chunk(num_channels, 1)):
            more[start::groups, k] = (part.var(0, correction=0) + eps).sqrt().mean()
    return torch.cat([x, more], 1)
