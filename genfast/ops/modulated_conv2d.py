"""Convolution with weights of each sample's own, noise, bias and activation (docs/gan-ops.md)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from genfast.reference.modulated_conv2d import EPSILON
from genfast.reference.solver_step import layout_of
from genfast.reference.upfirdn2d import Pair

from ._checks import check_floating, refusal
from ._convolution import autocast_dtype
from .conv2d_resample import conv2d_resample
from .modulate_bias_act import modulate_bias_act


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

    ``x`` (B, C, H, W), float32, float64, bfloat16 or float16; the convolution takes all else in x's dtype, the rest in float32: ``weight``
    (K, C, kh, kw); ``styles`` (B, C); ``noise`` broadcastable to the result, added to it; ``bias`` (K,). ``demodulate`` divides each output
    channel's weights by their norm (equation 3); ``input_gain`` broadcastable to (B, C), on the weights after that (Karras et al. 2021);
    ``act`` (None: linear), ``gain`` and ``clamp`` as `bias_act`. ``fused_modconv`` True makes each sample's weights and convolves in
    groups, False scales the input by the styles and the output by the demodulation, the same function with one dense convolution; None
    takes what is faster. ``post_scale`` (B, K) multiplies the result: styles, times input gain, of a next layer, which then is called with
    ``prescaled=True`` and reads its input once less. Returns (B, K, H', W') in x's dtype, under torch.autocast in that, and x's memory
    format. Differentiable to every order in every tensor but the filter. Raises ValueError for anything else.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    check_floating("styles", styles)
    for name, t in (("noise", noise), ("input_gain", input_gain), ("bias", bias)):
        if t is not None:
            check_floating(name, t)
    if x.ndim != 4 or weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise refusal("weight", f"shape {tuple(weight.shape)} for x {tuple(x.shape)}", "(K, C, kh, kw) for (B, C, H, W)")
    if styles.shape != x.shape[:2]:
        raise refusal("styles", f"shape {tuple(styles.shape)}", f"(B, C): {tuple(x.shape[:2])}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise refusal("bias", f"shape {tuple(bias.shape)}", f"(K,): {tuple(weight.shape[:1])}")
    if input_gain is not None and not _broadcasts(input_gain, x.shape[:2]):
        raise refusal("input_gain", f"shape {tuple(input_gain.shape)}", f"broadcastable to (B, C): {tuple(x.shape[:2])}")
    dtype = autocast_dtype(x)
    x = x if dtype is None else x.to(dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, styles = weight.to(wide), styles.to(wide)
    gains = None if input_gain is None else input_gain.to(wide).expand(x.shape[:2])
    grouped = _groups_pay(x, weight) if fused_modconv is None else fused_modconv
    # A group is no more than a sample, and no sample makes no group.
    way = _grouped if grouped and x.shape[0] else _dense
    with nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False):  # the norms are not a 16-bit product
        y, demodulation = way(x, weight, styles, gains, up, down, padding, resample_filter, demodulate, flip_weight, prescaled)
    if noise is not None:
        if not _broadcasts(noise, y.shape):
            raise refusal("noise", f"shape {tuple(noise.shape)}", f"broadcastable to the result: {tuple(y.shape)}")
        noise = noise[(None,) * (4 - noise.ndim)]
        if noise.shape[1] == 1:
            noise = noise.expand(-1, -1, *y.shape[2:])
        else:  # noise of each channel is no noise of StyleGAN's, and is added by torch
            y = (y if demodulation is None else modulate_bias_act(y, scale=demodulation)) + noise.to(y.dtype)
            noise = demodulation = None
    if act is None and gain is None and clamp is None and all(t is None for t in (demodulation, noise, bias, post_scale)):
        return y
    return modulate_bias_act(y, bias, demodulation, noise, post_scale, "linear" if act is None else act, gain=gain, clamp=clamp)


def _groups_pay(x: Tensor, weight: Tensor) -> bool:
    """One sample's own weights cost no pass over its picture, and on the CPU torch multiplies matrices for 1x1 groups of planes."""
    return len(x) == 1 or (x.is_cpu and weight.shape[2:] == (1, 1) and x.is_contiguous())


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
    prescaled: bool,
) -> tuple[Tensor, None]:
    """The convolution by each sample's own weights, as groups of one picture."""
    batch = x.shape[0]
    if demodulate:
        by_sample = _by_sample(styles)
        styles = styles * by_sample
    modulated = weight * styles[:, None, :, None, None]
    w = weight[None].expand_as(modulated) if prescaled else modulated
    if demodulate:
        demodulation = _rsqrt(modulated.square().sum([2, 3, 4]) + EPSILON * by_sample.square())
        w = w * (demodulation * by_sample if prescaled else demodulation)[:, :, None, None, None]
    if gains is not None and not prescaled:
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
    prescaled: bool,
) -> tuple[Tensor, Tensor | None]:
    """The convolution by shared weights of the input scaled by the styles, and what its result is still to be scaled by, (B, K)."""
    demodulation = None
    if demodulate:
        squares = weight.square().sum([2, 3])
        if x.dtype == torch.float16:
            by_sample, by_channel = _short_ranges(squares.detach(), styles.detach(), weight[0].numel())
            weight, squares = weight * by_channel[:, None, None, None], squares * by_channel.square()[:, None]
            constants = by_sample * by_channel
        else:
            constants = by_sample = _by_sample(styles)
        styles = styles * by_sample
        demodulation = _rsqrt(styles.square() @ squares.t() + EPSILON * constants.square())
        if prescaled:  # x has the styles as they were
            demodulation = demodulation * by_sample
    if not prescaled:
        x = modulate_bias_act(x, scale=styles if gains is None else styles * gains)
    return conv2d_resample(x, weight.to(x.dtype), f, up, down, padding, flip_weight=flip_weight), demodulation


def _by_sample(styles: Tensor) -> Tensor:
    """Constants (B, 1) that bring the styles of each sample to 1, or up to it, so that no square leaves the range of float32. Demodulation,
    with epsilon multiplied as well, takes them out again: they are constants to a derivative."""
    return 1 / styles.detach().abs().amax(1, keepdim=True).clamp(min=EPSILON**0.5)


def _rsqrt(norms: Tensor) -> Tensor:
    """1 / sqrt(norms), whose derivative does not go through norms^(-3/2), which would leave the range of float32."""
    near = norms.detach().rsqrt()
    return near * (norms * near * near).rsqrt()


def _short_ranges(squares: Tensor, styles: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """Constants (B, 1) and (K,) for styles and weights that keep a convolution in the range of float16, in both directions.

    ``squares`` (K, C): of the weights, summed over the taps; ``elements`` of one channel's weights. The constants bring the largest style
    of a sample to 1, and so the largest norm that a channel's weights may have. Where these are small the product of both stays at
    1 / sqrt(epsilon), by which gradients grow at zero styles or weights: beyond it the steps between would leave the range. The
    gradients of styles and weights are right in proportion to the larger of both.
    """
    most = EPSILON**-0.5
    s, w = styles.abs().amax(1, keepdim=True), (squares.amax(1) * elements).sqrt()
    # A sample or a channel that is not a number leaves the others alone.
    s_floor, w_floor = (1 / (most * t.nan_to_num(0.0, 0.0).amax().clamp(min=most**-0.5)) for t in (w, s))
    return 1 / torch.maximum(s, s_floor), 1 / torch.maximum(w, w_floor)
