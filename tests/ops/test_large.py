"""Pictures of more than 2^31 elements. Slow, and 4.3 GB of memory: inputs are mapped zeros but for the places that are looked at."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from genfast import ops, reference

pytestmark = pytest.mark.slow
BATCH, CHANNELS, SIDE = 2, 32, 5794  # 2^31 + 1,024,256 elements; the last plane, and the last sample, hold both 2^31 and the end
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])


def mapped(side: int, last: bool) -> Tensor:
    """Zeros (BATCH, CHANNELS, side, side) in bfloat16 that take no memory until they are written."""
    memory = mmap.mmap(-1, 2 * BATCH * CHANNELS * side * side)
    memory.madvise(mmap.MADV_HUGEPAGE)  # fewer faults
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    if last:
        return flat.view(BATCH, side, side, CHANNELS).permute(0, 3, 1, 2)
    return flat.view(BATCH, CHANNELS, side, side)


def flat(t: Tensor) -> Tensor:
    """The elements in the order of storage."""
    return t.as_strided((t.numel(),), (1,))


def places() -> list[slice]:
    total = BATCH * CHANNELS * SIDE * SIDE
    assert total > 2**31 > total - SIDE * SIDE
    return [slice(start, start + 5000) for start in (0, 2**31 - 2500, total - 5000)]


def channels_at(place: slice, last: bool) -> tuple[Tensor, Tensor]:
    """Sample and channel of each element there."""
    i = torch.arange(place.start, place.stop)
    return i // (CHANNELS * SIDE * SIDE), i % CHANNELS if last else i // (SIDE * SIDE) % CHANNELS


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@LAYOUTS
def test_bias_act(last: bool) -> None:
    x, b = mapped(SIDE, last), random(CHANNELS, seed=1)
    for place in places():
        flat(x)[place] = random(5000, seed=2)
    y = ops.bias_act(x, b, act="lrelu", clamp=1.5)
    for place in places():
        _, channel = channels_at(place, last)
        want = reference.bias_act(flat(x)[place].float() + b[channel].float(), act="lrelu", clamp=1.5).bfloat16()
        assert torch.equal(flat(y)[place], want)


@LAYOUTS
def test_modulate_bias_act(last: bool) -> None:
    """Results, gradients, and the sums, to which only the places contribute; the forward result is gone before the gradient is made."""
    x, dy = mapped(SIDE, last), mapped(SIDE, last)
    b, scale, post = torch.zeros(CHANNELS), random(BATCH, CHANNELS, seed=1).float(), random(BATCH, CHANNELS, seed=2).float()
    for k, place in enumerate(places()):
        flat(x)[place], flat(dy)[place] = random(5000, seed=3 + k), random(5000, seed=6 + k)
    curve = (2, 0.2, 1.0, None)
    want, sums = {}, torch.zeros(3, BATCH, CHANNELS, dtype=torch.float64)
    for place in places():
        index = channels_at(place, last)
        v, d, s, t = flat(x)[place].float(), flat(dy)[place].float(), scale[index], post[index]
        slope = torch.where(s * v > 0, 1.0, 0.2)
        value, g = slope * s * v, t * d * slope
        want[place.start] = ((t * value).bfloat16(), (g * s).bfloat16())
        for k, term in enumerate((g, g * v, d * value)):
            sums[k].index_put_(index, term.double(), accumulate=True)
    y = torch.ops.genfast.modulate_bias_act(x, b, scale, None, post, *curve)
    for place in places():
        torch.testing.assert_close(flat(y)[place], want[place.start][0], rtol=2**-7, atol=0)
    del y
    dx, got, _ = torch.ops.genfast.modulate_bias_act_backward(dy, x, b, scale, None, post, *curve, False)
    for place in places():
        torch.testing.assert_close(flat(dx)[place], want[place.start][1], rtol=2**-7, atol=0)
    torch.testing.assert_close(got, sums, rtol=1e-5, atol=1e-5 * float(sums.abs().max()))


@LAYOUTS
def test_upfirdn2d(last: bool) -> None:
    x, f = mapped(SIDE // 2, last), ops.setup_filter([1, 3, 3, 1])
    corners = [(0, 0, slice(0, 40), slice(0, 36)), (BATCH - 1, CHANNELS - 1, slice(-40, None), slice(-36, None))]
    for sample, channel, rows, columns in corners:
        x[sample, channel, rows, columns] = random(40, 36, seed=4)
    y = ops.upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), gain=4)
    for sample, channel, rows, columns in corners:
        part = x[sample, channel, rows, columns].float()[None, None]
        want = reference.upfirdn2d(part, f, up=2, padding=(2, 1, 2, 1), gain=4)[0, 0].bfloat16()
        inside = (slice(0, 76), slice(0, 68)) if channel == 0 else (slice(-76, None), slice(-68, None))
        assert torch.equal(y[sample, channel][inside], want[inside])
