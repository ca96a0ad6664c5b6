"""Convolution with up- and downsampling: torch's convolution, in the order that does the least (docs/gan-ops.md)."""

from __future__ import annotations

from torch import Tensor

from genfast.reference.conv2d_resample import resample_padding
from genfast.reference.upfirdn2d import Pair

from ._checks import check_bytes, check_count, check_is_tensor, check_padding, refusal
from ._convolution import convolution
from .upfirdn2d import check_filter, upfirdn2d


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

    ``x`` (B, C, H, W); ``w`` (K, C / groups, kh, kw), cast to x's dtype; ``f`` as `upfirdn2d`; ``padding`` of the upsampled picture,
    besides what the filters need to keep the picture in its place; ``flip_weight`` True correlates as torch does, False convolves. All maps
    are linear and shift together, so the convolution is done where the picture is small: a 1x1 one after downsampling or before upsampling,
    an upsampling one as a transposed convolution, a downsampling one with a stride. Derivatives are torch's and `upfirdn2d`'s.
    """
    check_filter("f", f, x)
    check_is_tensor("w", w)
    for name, number in (("up", up), ("down", down), ("groups", groups)):
        check_count(name, number)
    if x.ndim != 4 or w.ndim != 4 or w.shape[1] * groups != x.shape[1]:
        raise refusal("w", f"shape {tuple(w.shape)} for x {tuple(x.shape)} in {groups} groups", "(K, C / groups, kh, kw) for (B, C, H, W)")
    w = w.to(x.dtype)
    height, width = w.shape[2:]
    around = resample_padding(f, padding, up, down)
    check_padding(padding, around)
    left, right, top, bottom = around
    largest = (len(x), max(len(w), x.shape[1]), x.shape[2] * up + top + bottom, x.shape[3] * up + left + right)
    check_bytes("up and padding", largest, x)
    correlated = w if flip_weight else w.flip([2, 3])
    if up == 1 and down > 1 and height == width == 1:
        return convolution(upfirdn2d(x, f, down=down, padding=around, flip_filter=flip_filter), w, groups=groups)
    if up == 1 and down > 1:
        return convolution(upfirdn2d(x, f, padding=around, flip_filter=flip_filter), correlated, stride=down, groups=groups)
    if up == 1:
        if left == right >= 0 and top == bottom >= 0:
            return convolution(x, correlated, padding=(top, left), groups=groups)
        return convolution(upfirdn2d(x, None, padding=around), correlated, groups=groups)
    if height == width == 1:
        y = upfirdn2d(convolution(x, w, groups=groups), f, up=up, padding=around, flip_filter=flip_filter, gain=up**2)
    else:
        # Zeros inserted and correlated with w: the transposed convolution with w flipped, kw - 1 elements longer on the left and
        # kw - up on the right than the padded picture wants. What both sides have too much of is never computed.
        longer = [width - 1, width - up, height - 1, height - up]
        crop = [n - p for n, p in zip(longer, around, strict=True)]
        spared = [max(min(crop[2 * i], crop[2 * i + 1]), 0) for i in (0, 1)]
        transposed = correlated.flip([2, 3]).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        y = convolution(x, transposed, up, (spared[1], spared[0]), groups, transposed=True)
        rest = [spared[i // 2] - c for i, c in enumerate(crop)]
        y = upfirdn2d(y, f, padding=rest, flip_filter=flip_filter, gain=up**2)
    return upfirdn2d(y, f, down=down, flip_filter=flip_filter) if down > 1 else y
