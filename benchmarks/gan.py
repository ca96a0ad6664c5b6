"""Suite "gan": the operators of docs/gan-ops.md, forward and backward, beside torch's composites and the compiled reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import Options, Row
from genfast import ops, reference

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class GanCase:
    """``call(namespace, x, *parameters)`` on x of ``shape``; parameters are (C,). ``composites``: the same by torch's own operators."""

    name: str
    shape: tuple[int, int, int, int]
    call: Callable[..., Tensor]
    parameters: int
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


def _filtered(namespace: Any, x: Tensor, b: Tensor) -> Tensor:
    f = ops.setup_filter(torch.hann_window(14, periodic=False)[1:-1].tolist(), device=x.device)
    y: Tensor = namespace.filtered_lrelu(x, f, f, b, up=2, down=2, padding=(11, 10, 11, 10), clamp=256.0)
    return y


def _bias_act(act: str, clamp: float | None) -> Callable[..., Tensor]:
    return lambda namespace, x, b: namespace.bias_act(x, b, act=act, clamp=clamp)


def _bn(namespace: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = namespace.bn_act(x, weight, bias)
    return y


def _group_norm(namespace: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y: Tensor = namespace.group_norm_silu(x, x.shape[1] // 4, weight, bias)
    return y


def gan_cases(scale: int = 1) -> list[GanCase]:
    """The shapes of issue and docs; ``scale`` divides the sides."""
    last = torch.channels_last

    def shape(batch: int, channels: int, side: int) -> tuple[int, int, int, int]:
        return batch, channels, side // scale, side // scale

    return [
        GanCase("bias_act, lrelu, clamp 256", shape(8, 64, 128), _bias_act("lrelu", 256.0), 1, {}),
        GanCase("bias_act, lrelu", shape(8, 64, 128), _bias_act("lrelu", None), 1, {}),
        GanCase("bias_act, lrelu, channels last", shape(8, 64, 128), _bias_act("lrelu", None), 1, {}, last),
        GanCase("bias_act, swish", shape(8, 64, 128), _bias_act("swish", None), 1, {}),
        GanCase("upfirdn2d, 4x4, up 2", shape(8, 64, 128), _up2, 0, {"conv_transpose2d": _transposed}),
        GanCase("upfirdn2d, 4x4, up 2, channels last", shape(8, 64, 128), _up2, 0, {"conv_transpose2d": _transposed}, last),
        GanCase("upfirdn2d, 4x4, down 2", shape(8, 64, 256), _down2, 0, {"conv2d": _strided}),
        GanCase("upfirdn2d, 4x4, down 2, channels last", shape(8, 64, 256), _down2, 0, {"conv2d": _strided}, last),
        GanCase("filtered_lrelu, 12 taps, up 2, down 2", shape(4, 64, 64), _filtered, 1, {}),
        GanCase("bn_act, relu", shape(32, 64, 64), _bn, 2, {}),
        GanCase("bn_act, relu, channels last", shape(32, 64, 64), _bn, 2, {}, last),
        GanCase("group_norm_silu, channels last", shape(16, 128, 32), _group_norm, 2, {}, last),
    ]


def time_case(case: GanCase, backward: bool, device: str, threads: int, command: str, quick: bool) -> list[Row]:
    """Microseconds of the forward pass, or of forward and backward, of every variant."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device).requires_grad_(backward)

    x = draw(*case.shape).detach().contiguous(memory_format=case.layout).requires_grad_(backward)
    inputs = [x, *(draw(case.shape[1]) for _ in range(case.parameters))]
    calls: dict[str, Call] = {"genfast": lambda *t: case.call(ops, *t), "reference": lambda *t: case.call(reference, *t), **case.composites}
    if not quick:
        torch.compiler.reset()
        calls["compiled"] = torch.compile(calls["reference"], dynamic=False)
    y = calls["reference"](*inputs)
    dy = torch.randn(y.shape, generator=generator).to(device).contiguous(memory_format=case.layout)
    for name, call in calls.items():
        error = (call(*inputs) - y).abs().max() / y.abs().max()
        if not error < 1e-5:
            raise RuntimeError(f"{case.name}: {name} differs from the reference by {float(error):.1e} on the timed inputs")

    def variant(call: Call) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(*inputs), inputs, dy) if backward else call(*inputs)

    if device == "cpu":
        torch.set_num_threads(threads)
    results = timing.interleave(
        {name: variant(call) for name, call in calls.items()},
        device=device,
        rounds=3 if quick else 11,
        round_seconds=0.005 if quick else 0.05,
        quiet=not quick,
    )
    facts = timing.environment(device) | {"command": command}
    label = f"{case.name}, {'forward and backward' if backward else 'forward'}, {'x'.join(map(str, case.shape))}"
    rows = []
    for name, t in results.items():
        row: Row = {"case": label, "variant": name, "shape": list(case.shape), "dtype": "float32", "median_us": round(t.median, 3)}
        rows.append(row | {"iqr_us": round(t.iqr, 3), "rounds": t.rounds, "discarded": t.discarded} | facts)
    return rows


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    for case in gan_cases(8 if options.quick else 1):
        for backward in (False, True):
            for threads in options.threads if options.filter in case.name else []:
                rows = time_case(case, backward, options.device, threads, options.command, options.quick)
                yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
