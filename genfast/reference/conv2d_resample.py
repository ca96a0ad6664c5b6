"""Convolution with up- and downsampling in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .upfirdn2d import Pair, same_padding, upfirdn2d


def resample_padding(f: Tensor | None, padding: Pair, up: int, down: int) -> tuple[int, int, int, int]:
    """``padding`` of the upsampled picture, with what the filter needs to multiply the size by ``up`` and divide it by ``down``."""
    padding = same_padding(f, padding, (up, up), (1, 1), "up") if up > 1 else padding
    return same_padding(f, padding, (1, 1), (down, down), "down") if down > 1 else same_padding(None, padding, (1, 1), (1, 1), "filter")


def conv2d_resample(
    x: Tensor,
    w: Tensor,
    f: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
) -> Tensor:
    """Upsampling by ``f``, convolution, downsampling by ``f`` (Karras et al. 2020, StyleGAN2).

    ``x`` (B, C, H, W); ``w`` (K, C / groups, kh, kw); ``f`` as `upfirdn2d`; ``padding`` of the upsampled picture, besides what the filters
    need to keep the picture in its place; ``flip_weight`` True correlates as torch does, False convolves.
    """
    y = upfirdn2d(x, f if up > 1 else None, up=up, padding=resample_padding(f, padding, up, down), flip_filter=flip_filter, gain=up**2)
    y = F.conv2d(y, w.to(y.dtype) if flip_weight else w.to(y.dtype).flip([2, 3]), groups=groups)
    return upfirdn2d(y, f, down=down, flip_filter=flip_filter) if down > 1 else y
