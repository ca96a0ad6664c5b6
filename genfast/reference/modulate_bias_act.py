"""What stands after a modulated convolution, in pure PyTorch (docs/gan-ops.md)."""

from __future__ import annotations

from torch import Tensor

from .bias_act import bias_act


def modulate_bias_act(
    x: Tensor,
    b: Tensor | None = None,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    post_scale: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """``post_scale * bias_act(scale * x + noise, b)`` (Karras et al. 2020, section 2.2, its layer read from right to left).

    ``x`` (B, C, H, W); ``scale`` and ``post_scale`` (B, C); ``noise`` (B, 1, H, W) or (1, 1, H, W); ``b`` (C,); ``act``, ``alpha``,
    ``gain`` and ``clamp`` as `bias_act`. Returns x's shape and dtype.
    """
    y = x if scale is None else x * scale.to(x.dtype)[:, :, None, None]
    y = y if noise is None else y + noise.to(x.dtype)
    y = bias_act(y, None if b is None else b.to(x.dtype), 1, act, alpha, gain, clamp)
    return y if post_scale is None else y * post_scale.to(x.dtype)[:, :, None, None]
