"""Convolution with weights of each sample's own, noise, bias and activation (docs/gan-ops.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.reference.modulated_conv2d import EPSILON
from genfast.reference.solver_step import layout_of
from genfast.reference.upfirdn2d import Pair

from ._checks import check_dtype, refusal
from .bias_act import bias_act
from .conv2d_resample import conv2d_resample


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
    fused_modconv: bool = True,
    *,
    input_gain: Tensor | None = None,
    bias: Tensor | None = None,
    act: str | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """`conv2d_resample` with ``weight`` scaled by each sample's ``styles``, then noise, bias and activation (Karras et al. 2020, section
    2.2).

    ``x`` (B, C, H, W), float32, float64, bfloat16 or float16; all else is cast to x's dtype where it meets x: ``weight`` (K, C, kh, kw);
    ``styles`` (B, C); ``noise`` broadcastable to the result, added to it; ``bias`` (K,). ``demodulate`` divides each output channel's
    weights by their norm (equation 3); ``input_gain`` broadcastable to (B, C), on the weights after that (Karras et al. 2021); ``act``
    (None: linear), ``gain`` and ``clamp`` as `bias_act`. ``fused_modconv`` True makes each sample's weights and convolves in groups, False
    scales the input by the styles and the output by the demodulation: the same function, one dense convolution. Returns (B, K, H', W') in
    x's dtype and memory format. Differentiable to every order in every tensor but the filter. Raises ValueError for anything else.
    """
    check_dtype("x", x.dtype)
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise refusal("weight", f"shape {tuple(weight.shape)} for x {tuple(x.shape)}", "(K, C, kh, kw) for (B, C, H, W)")
    if styles.shape != x.shape[:2]:
        raise refusal("styles", f"shape {tuple(styles.shape)}", f"(B, C): {tuple(x.shape[:2])}")
    if input_gain is not None and not _broadcasts(input_gain, x.shape[:2]):
        raise refusal("input_gain", f"shape {tuple(input_gain.shape)}", f"broadcastable to (B, C): {tuple(x.shape[:2])}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, styles = weight.to(wide), styles.to(wide)
    gains = None if input_gain is None else input_gain.to(wide).expand(x.shape[:2])
    # A group is no more than a sample, and no sample makes no group.
    way = _grouped if fused_modconv and x.shape[0] else _dense
    y, demodulation = way(x, weight, styles, gains, up, down, padding, resample_filter, demodulate, flip_weight)
    if noise is not None:
        if not _broadcasts(noise, y.shape):
            raise refusal("noise", f"shape {tuple(noise.shape)}", f"broadcastable to the result: {tuple(y.shape)}")
        noise = noise.to(y.dtype)
        y = y + noise if demodulation is None else torch.addcmul(noise, y, demodulation)
    elif demodulation is not None:
        y = y * demodulation
    if bias is None and act is None and gain is None and clamp is None:
        return y
    return bias_act(y, None if bias is None else bias.to(y.dtype), act="linear" if act is None else act, gain=gain, clamp=clamp)


def _broadcasts(t: Tensor, shape: torch.Size) -> bool:
    return t.ndim <= len(shape) and all(n in (1, m) for n, m in zip(reversed(t.shape), reversed(shape), strict=False))


def _grouped(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    gains: Tensor | None,
    up: int,
    down: int,
    padding: Pair,
    f: Tensor | None,
    demodulate: bool,
    flip_weight: bool,
) -> tuple[Tensor, None]:
    """The convolution by each sample's own weights, as groups of one picture."""
    batch = x.shape[0]
    w = weight * styles[:, None, :, None, None]
    if demodulate:
        w = w * (w.square().sum([2, 3, 4], keepdim=True) + EPSILON).rsqrt()
    if gains is not None:
        w = w * gains[:, None, :, None, None]
    y = conv2d_resample(x.flatten(0, 1)[None], w.flatten(0, 1).to(x.dtype), f, up, down, padding, batch, flip_weight)
    return y[0].unflatten(0, (batch, -1)).contiguous(memory_format=layout_of(x)), None


def _dense(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    gains: Tensor | None,
    up: int,
    down: int,
    padding: Pair,
    f: Tensor | None,
    demodulate: bool,
    flip_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The convolution by shared weights of the input scaled by the styles, and what its result is still to be scaled by."""
    demodulation = None
    if demodulate:
        epsilon: Tensor | float = EPSILON
        if x.dtype == torch.float16:
            # Its range is short: styles and weights are brought to about 1. The demodulation, epsilon included, takes that out again, so
            # the factors are constants to a derivative.
            tiny = torch.finfo(weight.dtype).tiny
            by_sample = 1 / styles.detach().abs().amax(1, keepdim=True).clamp(min=tiny)
            by_channel = 1 / weight.detach().abs().amax([1, 2, 3], keepdim=True).clamp(min=tiny) / weight[0].numel() ** 0.5
            styles, weight = styles * by_sample, weight * by_channel
            epsilon = EPSILON * (by_sample * by_channel.flatten()).square()
        norms = styles.square() @ weight.square().sum([2, 3]).t() + epsilon
        demodulation = norms.rsqrt()[:, :, None, None].to(x.dtype)
    styles = styles if gains is None else styles * gains
    y = conv2d_resample(x * styles.to(x.dtype)[:, :, None, None], weight.to(x.dtype), f, up, down, padding, flip_weight=flip_weight)
    return y, demodulation
