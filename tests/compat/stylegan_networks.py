"""A small generator and discriminator written against `torch_utils` and `dnnlib`, imported by the test after `install`."""

from __future__ import annotations

from typing import Any

import dnnlib
import numpy as np
import torch
from torch_utils import misc, persistence
from torch_utils.ops import bias_act, conv2d_resample, fma, upfirdn2d

IMPL = "cuda"  # what every impl= below is


@misc.profiled_function
def normalize_2nd_moment(x: torch.Tensor, dim: int = 1, eps: float = 1e-8) -> torch.Tensor:
    return x * (x.square().mean(dim=dim, keepdim=True) + eps).rsqrt()


@misc.profiled_function
def modulated_conv2d(
    x: Any,
    weight: Any,
    styles: Any,
    noise: Any = None,
    up: int = 1,
    padding: int = 0,
    f: Any = None,
    demodulate: bool = True,
    fused: Any = True,
) -> Any:
    batch, flip = x.shape[0], up == 1
    with misc.suppress_tracer_warnings():
        batch = int(batch)
    misc.assert_shape(weight, [None, x.shape[1], None, None])
    misc.assert_shape(styles, [batch, x.shape[1]])
    w = weight[None] * styles.reshape(batch, 1, -1, 1, 1)
    dcoefs = (w.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt() if demodulate else None
    if not fused:
        x = x * styles.reshape(batch, -1, 1, 1)
        x = conv2d_resample.conv2d_resample(x=x, w=weight.to(x.dtype), f=f, up=up, padding=padding, flip_weight=flip)
        if demodulate and noise is not None:
            return fma.fma(x, dcoefs.to(x.dtype).reshape(batch, -1, 1, 1), noise.to(x.dtype))  # type: ignore[union-attr]
        return x if dcoefs is None else x * dcoefs.reshape(batch, -1, 1, 1)
    w = w if dcoefs is None else w * dcoefs.reshape(batch, -1, 1, 1, 1)
    x, w = x.reshape(1, -1, *x.shape[2:]), w.reshape(-1, *weight.shape[1:])
    x = conv2d_resample.conv2d_resample(x=x, w=w.to(x.dtype), f=f, up=up, padding=padding, groups=batch, flip_weight=flip)
    x = x.reshape(batch, -1, *x.shape[2:])
    return x if noise is None else x.add_(noise)


@persistence.persistent_class
class Dense(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, activation: str = "linear", bias_init: float = 0) -> None:
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([outputs, inputs]))
        self.bias = torch.nn.Parameter(torch.full([outputs], np.float32(bias_init)))
        self.gain = 1 / np.sqrt(inputs)

    def forward(self, x: Any) -> Any:
        return bias_act.bias_act(x.matmul((self.weight * self.gain).t()), self.bias, act=self.activation, impl=IMPL)


@persistence.persistent_class
class Conv(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True, activation: str = "linear", down: int = 1) -> None:
        super().__init__()
        self.activation, self.down, self.padding = activation, down, kernel // 2
        self.register_buffer("f", upfirdn2d.setup_filter([1, 3, 3, 1]))
        self.weight = torch.nn.Parameter(torch.randn([outputs, inputs, kernel, kernel]))
        self.bias = torch.nn.Parameter(torch.zeros([outputs])) if bias else None
        self.gain, self.act_gain = 1 / np.sqrt(inputs * kernel**2), bias_act.activation_funcs[activation].def_gain

    def forward(self, x: Any, gain: float = 1) -> Any:
        x = conv2d_resample.conv2d_resample(x=x, w=self.weight * self.gain, f=self.f, down=self.down, padding=self.padding)
        return bias_act.bias_act(x, self.bias, act=self.activation, gain=self.act_gain * gain, clamp=256 * gain, impl=IMPL)


@persistence.persistent_class
class Synthesis(torch.nn.Module):
    """One resolution: modulated convolutions with noise, to RGB, skip."""

    def __init__(self, inputs: int, outputs: int, w_dim: int, resolution: int, up: int = 2) -> None:
        super().__init__()
        self.resolution, self.up = resolution, up
        self.register_buffer("f", upfirdn2d.setup_filter([1, 3, 3, 1]))
        sizes = [(inputs, outputs, 3), (outputs, outputs, 3), (outputs, 3, 1)]
        self.weights = torch.nn.ParameterList(torch.randn([o, i, k, k]) for i, o, k in sizes)
        self.biases = torch.nn.ParameterList(torch.zeros([o]) for _, o, _ in sizes)
        self.affines = torch.nn.ModuleList(Dense(w_dim, i, bias_init=1) for i, _, _ in sizes)
        self.register_buffer("noises", torch.randn([2, resolution, resolution]))
        self.noise_strength = torch.nn.Parameter(torch.full([], 0.1))

    def forward(self, x: Any, img: Any, w: Any, fused: bool) -> Any:
        for i in range(2):
            up = self.up if i == 0 else 1
            noise = self.noises[i] * self.noise_strength  # type: ignore[index]
            x = modulated_conv2d(x, self.weights[i], self.affines[i](w), noise, up=up, padding=1, f=self.f, fused=fused)
            x = bias_act.bias_act(x, self.biases[i].to(x.dtype), act="lrelu", gain=np.sqrt(2), clamp=256, impl=IMPL)
        misc.assert_shape(x, [None, None, self.resolution, self.resolution])
        styles = self.affines[2](w) / np.sqrt(x.shape[1])
        y = modulated_conv2d(x, self.weights[2], styles, demodulate=False, fused=fused)
        y = bias_act.bias_act(y, self.biases[2], clamp=256, impl=IMPL)
        return x, y if img is None else upfirdn2d.upsample2d(img, self.f, impl=IMPL) + y


@persistence.persistent_class
class Generator(torch.nn.Module):
    def __init__(self, z_dim: int = 8, w_dim: int = 8, channels: int = 8) -> None:
        super().__init__()
        self.mapping = torch.nn.Sequential(Dense(z_dim, w_dim, "lrelu"), Dense(w_dim, w_dim, "lrelu"))
        self.const = torch.nn.Parameter(torch.randn([channels, 4, 4]))
        self.blocks = torch.nn.ModuleList([Synthesis(channels, channels, w_dim, 4, up=1), Synthesis(channels, channels // 2, w_dim, 8)])

    def synthesis(self, ws: Any, fused: bool = True) -> Any:
        x, img = self.const[None].repeat(ws.shape[0], 1, 1, 1), None
        for block, w in zip(self.blocks, ws.unbind(1), strict=True):
            x, img = block(x, img, w, fused)
        return img

    def forward(self, z: Any, fused: bool = True) -> Any:
        w = self.mapping(normalize_2nd_moment(z))
        return self.synthesis(w[:, None].repeat(1, 2, 1), fused)


@persistence.persistent_class
class Discriminator(torch.nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        kwargs = dnnlib.EasyDict(class_name=f"{__name__}.Conv", activation="lrelu")
        self.from_rgb = dnnlib.util.construct_class_by_name(3, channels, 1, **kwargs)
        self.conv0 = dnnlib.util.construct_class_by_name(channels, channels, 3, **kwargs)
        self.conv1 = dnnlib.util.construct_class_by_name(channels, channels, 3, down=2, **kwargs)
        self.skip = Conv(channels, channels, 1, bias=False, down=2)
        self.last = Conv(channels + 1, channels, 3, activation="lrelu")
        self.out = Dense(channels * 16, 1)

    def forward(self, img: Any) -> Any:
        x = self.from_rgb(img)
        y = self.skip(x, gain=np.sqrt(0.5))
        x = y.add_(self.conv1(self.conv0(x), gain=np.sqrt(0.5)))
        group = min(2, x.shape[0])
        spread = x.reshape(group, -1, *x.shape[1:])
        spread = ((spread - spread.mean(0)).square().mean(0) + 1e-8).sqrt().mean([1, 2, 3])
        x = torch.cat([x, spread.reshape(-1, 1, 1, 1).repeat(group, 1, *x.shape[2:])], 1)
        return self.out(self.last(x).flatten(1)) + misc.const_like(x, 0.5, shape=[1, 1])
