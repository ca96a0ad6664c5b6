"""The spread of a batch as further channels (docs/gan-ops.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_floating, refusal


def minibatch_stddev(x: Tensor, group_size: int | None = 4, num_channels: int = 1, eps: float = 1e-8) -> Tensor:
    """``x`` (B, C, H, W) with ``num_channels`` more channels: (B, C + num_channels, H, W) (Karras et al. 2018, section 3).

    Samples i, i + B / g, i + 2 B / g, ... are a group of g = min(group_size, B) (None: the batch), as in StyleGAN2; g must divide B. New
    channel k of each is ``sqrt(var + eps)`` over the group, averaged over pixels and the k-th of ``num_channels`` equal parts of the
    channels. float32, float64, bfloat16 or float16; the statistics in float32 (float64 for float64). Returns x's dtype. Differentiable to
    every order. Raises ValueError for anything else.
    """
    check_floating("x", x)
    if x.ndim != 4:
        raise refusal("x", f"{x.ndim} dimensions", "4: (B, C, H, W)")
    batch, channels, height, width = x.shape
    if batch == 0:
        raise refusal("x", "an empty batch", "at least one sample")
    size = min(batch if group_size is None else group_size, batch)
    if size < 1 or batch % size:
        raise refusal("group_size", group_size, f"None, or a divisor of the batch {batch}, or more than it")
    if num_channels < 1 or channels % num_channels:
        raise refusal("num_channels", num_channels, f"a divisor of x's {channels} channels")
    wide = x if x.dtype == torch.float64 else x.float()
    variance = wide.unflatten(0, (size, -1)).var(0, correction=0)
    spread = (variance + eps).sqrt().unflatten(1, (num_channels, -1)).mean([2, 3, 4])
    more = spread.to(x.dtype).repeat(size, 1)[:, :, None, None].expand(-1, -1, height, width)
    return torch.cat([x, more], 1)
