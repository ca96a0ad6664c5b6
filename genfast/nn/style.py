"""Layers of StyleGAN2's networks (Karras et al. 2020): equalised learning rates, modulated convolutions, residual blocks.

Parameters stay in their own dtype, float32 as a rule; a layer computes and answers in the dtype of what it is given. Parameters are stored
at a scale of their own, so that Adam's step does not depend on the layer's size (Karras et al. 2018, section 4.1) and ``lr`` makes a
layer learn slower. ``impl``: of `genfast.impl.NAMESPACES`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genfast import ops
from genfast.impl import NAMESPACES


class EqualizedLinear(nn.Module):
    """``act(x W^T / sqrt(channels) + b)``: (B, channels) -> (B, out_channels); ``act`` as `genfast.ops.bias_act`."""

    def __init__(
        self, channels: int, out_channels: int, *, act: str = "linear", bias: float = 0.0, lr: float = 1.0, impl: str = "fused"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels) / lr)
        self.bias = nn.Parameter(torch.full((out_channels,), bias / lr))
        self.act, self.lr, self.scale, self.impl = act, lr, lr / math.sqrt(channels), impl

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, (self.weight * self.scale).to(x.dtype))
        bias = self.bias if self.lr == 1 else self.bias * self.lr
        activated: Tensor = NAMESPACES[self.impl].bias_act(y, bias.to(y.dtype), act=self.act)
        return activated


class EqualizedConv2d(nn.Module):
    """Convolution, or filter and strided convolution (``down``), then bias and activation.

    (B, channels, H, W) -> (B, out_channels, H / down, W / down), ``gain`` times ``act``'s own. ``taps``: of the filter.
    """

    taps: Tensor

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int,
        *,
        down: int = 1,
        bias: bool = True,
        act: str = "linear",
        gain: float = 1.0,
        clamp: float | None = None,
        taps: Sequence[float] = (1, 3, 3, 1),
        impl: str = "fused",
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("taps", ops.setup_filter(taps) if down > 1 else None, persistent=False)
        self.down, self.act, self.clamp, self.impl = down, act, clamp, impl
        # A linear map needs no pass of its own for the gain.
        inside = gain if act == "linear" else 1.0
        self.scale = inside / math.sqrt(channels * kernel**2)
        self.gain = gain / inside * (math.sqrt(2) if act == "lrelu" else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        namespace = NAMESPACES[self.impl]
        y: Tensor = namespace.conv2d_resample(
            x, (self.weight * self.scale).to(x.dtype), self.taps, down=self.down, padding=self.weight.shape[-1] // 2
        )
        if self.bias is None and self.act == "linear" and self.clamp is None:
            return y
        bias = None if self.bias is None else self.bias.to(y.dtype)
        y = namespace.bias_act(y, bias, act=self.act, gain=self.gain, clamp=self.clamp)
        return y


class ModulatedConv2d(nn.Module):
    """A convolution whose weights each sample scales by a style of its w: (B, channels, H, W), (B, style) -> (B, out_channels, H up, W up).

    With ``noise`` the layer of the synthesis network: noise of learned strength, bias, leaky ReLU, gain sqrt(2). Without, the
    layer that makes a picture: no demodulation, no activation (Karras et al. 2020, figure 7).
    """

    taps: Tensor

    def __init__(
        self,
        channels: int,
        out_channels: int,
        style: int,
        kernel: int,
        *,
        up: int = 1,
        noise: bool = True,
        clamp: float | None = None,
        taps: Sequence[float] = (1, 3, 3, 1),
        impl: str = "fused",
    ) -> None:
        super().__init__()
        self.affine = EqualizedLinear(style, channels, bias=1.0, impl=impl)
        self.weight = nn.Parameter(torch.randn(out_channels, channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(())) if noise else None
        self.register_buffer("taps", ops.setup_filter(taps) if up > 1 else None, persistent=False)
        # Demodulation takes any constant out of the weights; where there is none they are equalised.
        self.scale = 1.0 if noise else 1 / math.sqrt(channels * kernel**2)
        self.act = "lrelu" if noise else "linear"
        self.up, self.clamp, self.impl = up, clamp, impl

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None = None) -> Tensor:
        """``noise``: broadcastable to the result, standard normal, or None."""
        demodulate = self.noise_strength is not None
        if noise is not None and self.noise_strength is not None:
            noise = noise * self.noise_strength
        y: Tensor = NAMESPACES[self.impl].modulated_conv2d(
            x,
            self.weight,
            self.affine(w) * self.scale,
            noise,
            up=self.up,
            padding=self.weight.shape[-1] // 2,
            resample_filter=self.taps,
            demodulate=demodulate,
            fused_modconv=False,
            bias=self.bias,
            act=self.act,
            clamp=self.clamp,
        )
        return y


class ResidualDown(nn.Module):
    """Two 3x3 convolutions, the second halving the size, beside a 1x1 one: (B, channels, H, W) -> (B, out_channels, H / 2, W / 2).

    Both ways are scaled by sqrt(1/2), so that the sum keeps the variance (Karras et al. 2020, figure 7).
    """

    def __init__(self, channels: int, out_channels: int, *, clamp: float | None = None, impl: str = "fused") -> None:
        super().__init__()
        half = math.sqrt(0.5)
        clamped = None if clamp is None else clamp * half
        self.conv0 = EqualizedConv2d(channels, channels, 3, act="lrelu", clamp=clamp, impl=impl)
        self.conv1 = EqualizedConv2d(channels, out_channels, 3, down=2, act="lrelu", gain=half, clamp=clamped, impl=impl)
        self.skip = EqualizedConv2d(channels, out_channels, 1, down=2, bias=False, gain=half, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.skip(x) + self.conv1(self.conv0(x))
        return y
