"""Convolution with weights of each sample's own in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from .bias_act import bias_act
from .conv2d_resample import conv2d_resample
from .upfirdn2d import Pair

EPSILON = 1e-8


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    resample_filter: Tensor | None = None,
    demodulate: bool = True,
    flip_weight: bool = True,
    fused_modconv: bool | None = None,
    *,
    input_gain: Tensor | None = None,
    bias: Tensor | None = None,
    act: str | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    prescaled: bool = False,
    post_scale: Tensor | None = None,
) -> Tensor:
    """`conv2d_resample` with ``weight`` scaled by each sample's ``styles``, then noise, bias and activation (Karras et al. 2020, section
    2.2).

    ``x`` (B, C, H, W); ``weight`` (K, C, kh, kw); ``styles`` (B, C); ``noise`` broadcastable to the result, added to it; ``demodulate``
    divides each output channel's weights by their norm (equation 3); ``input_gain`` broadcastable to (B, C), on the weights after that
    (Karras et al. 2021); ``bias`` (K,), ``act`` (None: linear), ``gain`` and ``clamp`` as `bias_act`. ``prescaled``: ``x`` is multiplied
    by the styles and the input gain already; ``post_scale`` (B, K) multiplies the result. ``fused_modconv`` changes no result.
    """
    results = []
    gains = None if input_gain is None else input_gain.expand(x.shape[0], x.shape[1])
    for i in range(x.shape[0]):
        modulated = weight * styles[i, None, :, None, None]
        w = weight if prescaled else modulated
        if demodulate:
            w = w / (modulated.square().sum([1, 2, 3], keepdim=True) + EPSILON).sqrt()
        if gains is not None and not prescaled:
            w = w * gains[i, None, :, None, None]
        results.append(conv2d_resample(x[i : i + 1], w, resample_filter, up, down, padding, flip_weight=flip_weight))
    y = torch.cat(results)
    y = y if noise is None else y + noise.to(y.dtype)
    y = bias_act(y, None if bias is None else bias.to(y.dtype), act="linear" if act is None else act, gain=gain, clamp=clamp)
    return y if post_scale is None else y * post_scale.to(y.dtype)[:, :, None, None]
