"""Suite "gan": the operators of docs/gan-ops.md, forward and backward, beside torch's composites and the compiled reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.gan_training import flop
from benchmarks.timing import Options, Row
from genfast import ops, reference

Call = Callable[..., Tensor]
# Compiling takes most of a GPU's minutes, so there the reference is compiled for these cases alone.
COMPILED = ("bias_act, lrelu, clamp 256", "modulate_bias_act, lrelu, clamp 256", "bn_act, relu", "group_norm_silu, channels last")


@dataclass(frozen=True)
class GanCase:
    """``call(namespace, x, *parameters)`` on x of ``shape``, with parameters of the given shapes.

    ``composites``: the same by torch's own fast operators ("torch"), or in another way.
    """

    name: str
    shape: tuple[int, int, int, int]
    call: Callable[..., Tensor]
    parameters: Sequence[tuple[int, ...]]
    composites: dict[str, Call]
    layout: torch.memory_format = torch.contiguous_format


def _stylegan_filter(like: Tensor) -> Tensor:
    return ops.setup_filter([1, 3, 3, 1], device=like.device)


def _up2(namespace: Any, x: Tensor) -> Tensor:
    y: Tensor = namespace.upfirdn2d(x, _stylegan_filter(x), up=2, padding=(2, 1, 2, 1), gain=4)
    return y


def _transposed(x: Tensor) -> Tensor:
    taps = (4 * _stylegan_filter(x)).to(x.dtype).expand(x.shape[1], 1, 4, 4)
    return F.conv_transpose2d(x, taps, stride=2, padding=1, groups=x.shape[1])


def _down2(namespace: Any, x: Tensor) -> Tensor:
    y: Tensor = namespace.upfirdn2d(x, _stylegan_filter(x), down=2, padding=1)
    return y


def _strided(x: Tensor) -> Tensor:
    return F.conv2d(x, _stylegan_filter(x).to(x.dtype).expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])


def _lowpass(like: Tensor) -> Tensor:
    return ops.setup_filter(torch.hann_window(14, periodic=False)[1:-1].tolist(), device=like.device)


def _filtered(namespace: Any, x: Tensor, b: Tensor) -> Tensor:
    f = _lowpass(x)
    y: Tensor = namespace.filtered_lrelu(x, f, f, b, up=2, down=2, padding=(11, 10, 11, 10), clamp=256.0)
    return y


def _filtered_composite(x: Tensor, b: Tensor) -> Tensor:
    channels, taps = x.shape[1], _lowpass(x).to(x.dtype)
    along = [taps.view(shape).expand(channels, 1, -1, -1) for shape in ((1, 1, 1, -1), (1, 1, -1, 1))]
    y = x + b[:, None, None]
    for f, stride in zip(along, ((1, 2), (2, 1)), strict=True):
        y = F.conv_transpose2d(y, 2 * f, stride=stride, groups=channels)
    y = (F.leaky_relu(y, 0.2) * 2**0.5).clamp(-256, 256)
    for f, stride in zip(along, ((1, 2), (2, 1)), strict=True):
        y = F.conv2d(y, f, stride=stride, groups=channels)
    return y


def _modulate(namespace: Any, x: Tensor, b: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    y: Tensor = namespace.modulate_bias_act(x, b, scale, noise, act="lrelu", clamp=256.0)
    return y


def _modulated(up: int, **options: Any) -> Callable[..., Tensor]:
    def call(namespace: Any, x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor, bias: Tensor) -> Tensor:
        f = _stylegan_filter(x)
        padding = weight.shape[2] // 2
        y: Tensor = namespace.modulated_conv2d(
            x, weight, styles, noise, up=up, padding=padding, resample_filter=f, bias=bias, act="lrelu", clamp=256.0, **options
        )
        return y

    return call


def _modulated_composite(grouped: bool, up: int) -> Call:
    """All of torch's own operators, as a StyleGAN2 layer without its CUDA extension; ``grouped``: its fused_modconv."""

    def call(x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor, bias: Tensor) -> Tensor:
        batch, channels, padding = len(x), len(weight), weight.shape[2] // 2
        w = weight * styles[:, None, :, None, None]
        demodulation = (w.square().sum([2, 3, 4]) + 1e-8).rsqrt()
        if grouped:
            w, x = (w * demodulation[:, :, None, None, None]).flatten(0, 1), x.reshape(1, -1, *x.shape[2:])
        else:
            w, x = weight, x * styles[:, :, None, None]
        groups = batch if grouped else 1
        if up == 1:
            y = F.conv2d(x, w, padding=padding, groups=groups)
        else:
            transposed = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip([2, 3])
            y = F.conv_transpose2d(x, transposed, stride=2, groups=groups)
            taps = (4 * _stylegan_filter(x)).to(x.dtype).expand(y.shape[1], 1, 4, 4)
            y = F.conv2d(y, taps, padding=1, groups=y.shape[1])
        y = y.reshape(batch, channels, *y.shape[2:]) if grouped else y * demodulation[:, :, None, None]
        y = y + noise + bias[:, None, None]
        return (F.leaky_relu(y, 0.2) * 2**0.5).clamp(-256, 256)

    return call


def _bias_act(act: str, clamp: float | None) -> Callable[..., Tensor]:
    return lambda namespace, x, b: namespace.bias_act(x, b, act=act, clamp=clamp)


def _bn(namespace: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = namespace.bn_act(x, weight, bias)
    return y


def _group_norm(namespace: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = namespace.group_norm_silu(x, 32, weight, bias)
    return y


def _batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, weight, bias, training=True))


def _group_norm_composite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 32, weight, bias))


def gan_cases(scale: int = 1, times: int = 1) -> list[GanCase]:
    """The shapes of docs/gan-ops.md; ``scale`` divides the sides, and a convolution's channels; ``times`` multiplies the batches of the
    operators that move memory, beyond a GPU's last cache."""
    last = torch.channels_last

    def shape(batch: int, channels: int, side: int) -> tuple[int, int, int, int]:
        return times * batch, channels, side // scale, side // scale

    def layer(name: str, channels: int, side: int, up: int, layout: torch.memory_format) -> GanCase:
        channels //= scale
        x = (8, *shape(8, channels, side)[1:])
        parameters = [(channels, channels, 3, 3), (8, channels), (8, 1, up * x[2], up * x[3]), (channels,)]
        composites = {"torch, grouped": _modulated_composite(True, up), "torch": _modulated_composite(False, up)}
        grouped = _modulated(up, fused_modconv=True)
        composites["genfast, grouped"] = lambda *t: grouped(ops, *t)
        return GanCase(f"modulated_conv2d, {name}", x, _modulated(up), parameters, composites, layout)

    norm, group, transposed = {"torch": _batch_norm}, {"torch": _group_norm_composite}, {"torch": _transposed}
    around = [(128,), (8 * times, 128), (8 * times, 1, 64 // scale, 64 // scale)]
    return [
        GanCase("bias_act, lrelu, clamp 256", shape(8, 64, 128), _bias_act("lrelu", 256.0), [(64,)], {}),
        GanCase("bias_act, lrelu", shape(8, 64, 128), _bias_act("lrelu", None), [(64,)], {}),
        GanCase("bias_act, lrelu, channels last", shape(8, 64, 128), _bias_act("lrelu", None), [(64,)], {}, last),
        GanCase("bias_act, swish", shape(8, 64, 128), _bias_act("swish", None), [(64,)], {}),
        GanCase("modulate_bias_act, lrelu, clamp 256", shape(8, 128, 64), _modulate, around, {}),
        GanCase("modulate_bias_act, lrelu, clamp 256, channels last", shape(8, 128, 64), _modulate, around, {}, last),
        layer("3x3, channels last", 512, 16, 1, last),
        layer("3x3", 256, 64, 1, torch.contiguous_format),
        layer("3x3, channels last", 256, 64, 1, last),
        layer("3x3, up 2, channels last", 128, 64, 2, last),
        GanCase("upfirdn2d, 4x4, up 2", shape(8, 64, 128), _up2, [], transposed),
        GanCase("upfirdn2d, 4x4, up 2, channels last", shape(8, 64, 128), _up2, [], transposed, last),
        GanCase("upfirdn2d, 4x4, down 2", shape(8, 64, 256), _down2, [], {"torch": _strided}),
        GanCase("upfirdn2d, 4x4, down 2, channels last", shape(8, 64, 256), _down2, [], {"torch": _strided}, last),
        GanCase("filtered_lrelu, 12 taps, up 2, down 2", shape(4, 64, 64), _filtered, [(64,)], {"torch": _filtered_composite}),
        GanCase("bn_act, relu", shape(32, 64, 64), _bn, [(64,)] * 2, norm),
        GanCase("bn_act, relu, channels last", shape(32, 64, 64), _bn, [(64,)] * 2, norm, last),
        GanCase("bn_act, relu", shape(64, 256, 16), _bn, [(256,)] * 2, norm),  # from here on the middle of a DCGAN, of a U-Net
        GanCase("bn_act, relu, channels last", shape(64, 256, 16), _bn, [(256,)] * 2, norm, last),
        GanCase("group_norm_silu", shape(2, 320, 64), _group_norm, [(320,)] * 2, group),
        GanCase("group_norm_silu, channels last", shape(2, 320, 64), _group_norm, [(320,)] * 2, group, last),
        GanCase("group_norm_silu, channels last", shape(16, 128, 32), _group_norm, [(128,)] * 2, group, last),
    ]


def exact_convolutions() -> AbstractContextManager[None]:
    """cuDNN without TF32, which torch lets it use and which is what is timed: it rounds to 10 bits."""
    context: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return context


def time_case(case: GanCase, backward: bool, device: str, threads: int, command: str, quick: bool) -> list[Row]:
    """Microseconds of the forward pass, or of forward and backward, of every variant."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x = draw(*case.shape).contiguous(memory_format=case.layout)
    inputs = [t.requires_grad_(backward) for t in (x, *(draw(*shape) for shape in case.parameters))]

    def plain(*t: Tensor) -> Tensor:
        return case.call(reference, *t)

    calls: dict[str, Call] = {"genfast": lambda *t: case.call(ops, *t), **case.composites, "reference": plain}
    if not quick and (device == "cpu" or case.name in COMPILED):
        torch.compiler.reset()
        calls["compiled"] = torch.compile(plain, dynamic=False)
    with torch.no_grad(), exact_convolutions():
        y = plain(*inputs)
    dy = torch.randn(y.shape, generator=generator).to(device).contiguous(memory_format=case.layout)
    for name, call in calls.items():
        with torch.set_grad_enabled(backward), exact_convolutions():
            error = (call(*inputs).detach() - y).abs().max() / y.abs().max()
        if not error < (1e-5 if device == "cpu" else 1e-4):  # cuDNN may choose transforms, which round more
            raise RuntimeError(f"{case.name}: {name} differs from the reference by {float(error):.1e} on the timed inputs")

    def variant(call: Call) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(*inputs), inputs, dy) if backward else call(*inputs)

    # The least a call can do: every input read and every output written once, with gradients once more; a layer's convolution.
    size = sum(t.nbytes for t in (*inputs, y)) * (2 if backward else 1)
    operations = flop(variant(plain)) if "modulated_conv2d" in case.name else 0.0
    if device == "cpu":
        torch.set_num_threads(threads)
    results = timing.interleave(
        {name: variant(call) for name, call in calls.items()},
        device=device,
        rounds=3 if quick else 9,
        round_seconds=0.005 if quick else 0.05,
        slow_seconds=2.5,
        quiet=not quick,
    )
    facts = timing.environment(device) | {"command": command}
    label = f"{case.name}, {'forward and backward' if backward else 'forward'}, {'x'.join(map(str, case.shape))}"
    rows = []
    for name, t in results.items():
        row: Row = {"case": label, "variant": name, "shape": list(case.shape), "dtype": "float32", "median_us": round(t.median, 3)}
        row |= {"iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded}
        rows.append(row | {"bytes": size, "gflop": round(operations / 1e9, 3)} | facts)
    return rows


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    for case in gan_cases(8 if options.quick else 1, 8 if options.device == "cuda" and not options.quick else 1):
        for backward in (False, True):
            for threads in options.threads if options.filter in case.name else []:
                label = f"{case.name}, {'forward and backward' if backward else 'forward'}"
                rows = options.attempt(label, partial(time_case, case, backward, options.device, threads, options.command, options.quick))
                if rows:
                    yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
