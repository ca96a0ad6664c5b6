"""Filters of any strides, and integers that lead out of the range: the right answer or one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import ops, reference

X, F, W = torch.randn(1, 1, 3, 3), torch.rand(2, 2), torch.ones(1, 1, 3, 3)
HUGE = [2**28, 2**31, 2**62, 2**63, 2**70, 2**2000]
CALLS: dict[str, Callable[[int], Any]] = {
    "upfirdn2d, up": lambda n: ops.upfirdn2d(X, F, up=n),
    "upfirdn2d, padding": lambda n: ops.upfirdn2d(X, F, padding=n),
    "upfirdn2d, crop": lambda n: ops.upfirdn2d(X, F, padding=-n),
    "filter2d, padding": lambda n: ops.filter2d(X, F, padding=n),
    "upsample2d, up": lambda n: ops.upsample2d(X, F, up=n),
    "downsample2d, down": lambda n: ops.downsample2d(X, F, down=n),
    "conv2d_resample, up": lambda n: ops.conv2d_resample(X, W, F, up=n),
    "conv2d_resample, up, one tap": lambda n: ops.conv2d_resample(X, W[:, :, :1, :1], F, up=n),
    "conv2d_resample, down": lambda n: ops.conv2d_resample(X, W, F, down=n),
    "conv2d_resample, padding": lambda n: ops.conv2d_resample(X, W, F, padding=n),
    "conv2d_resample, groups": lambda n: ops.conv2d_resample(X, W, F, groups=n),
    "modulated_conv2d, up": lambda n: ops.modulated_conv2d(X, W, torch.ones(1, 1), up=n),
    "filtered_lrelu, up": lambda n: ops.filtered_lrelu(X, F, F, up=n),
    "filtered_lrelu, padding": lambda n: ops.filtered_lrelu(X, F, F, padding=n),
    "conv_block, padding": lambda n: ops.conv_block(X, W, padding=n),
    "conv_block, transposed": lambda n: ops.conv_block(X, W, stride=n, transposed=True),
    "conv_block, groups": lambda n: ops.conv_block(X, W, groups=n),
}


@pytest.mark.parametrize("n", HUGE, ids=["2**28", "2**31", "2**62", "2**63", "2**70", "2**2000"])
@pytest.mark.parametrize("call", CALLS)
def test_refused(call: str, n: int) -> None:
    if call == "conv_block, groups" and n < 2**31:
        return  # a convolution of torch's, which refuses it itself
    with pytest.raises(ValueError, match=r"(?s)^[a-z_ ]+: got .*supported: "):
        CALLS[call](n)


@pytest.mark.parametrize("call", [lambda n: ops.upfirdn2d(X, F, down=n), lambda n: ops.filtered_lrelu(X, None, F, down=n)])
def test_down(call: Callable[[int], Tensor]) -> None:
    for n in (2**28, 2**31 - 1):
        assert torch.equal(call(n), call(3))
    for n in HUGE[1:]:
        with pytest.raises(ValueError, match=r"(?s)^down: got .*supported: integers from 1 to 2147483647$"):
            call(n)


def by_definition(x: Tensor, f: Tensor, up: int, down: int, padding: tuple[int, int, int, int]) -> Tensor:
    """Each output alone, in NumPy; nothing is laid out."""
    left, right, top, bottom = padding
    (height, width), (fh, fw) = x.shape[2:], f.shape
    size = [(n * up + a + b - t + down) // down for n, a, b, t in ((height, top, bottom, fh), (width, left, right, fw))]
    out = np.zeros(size)
    for i, j in np.ndindex(*size):
        for a, b in np.ndindex(fh, fw):
            y, z = i * down + a - top, j * down + b - left
            if y % up == 0 and z % up == 0 and 0 <= y // up < height and 0 <= z // up < width:
                out[i, j] += float(f.flip([0, 1])[a, b]) * float(x[0, 0, y // up, z // up])
    return torch.from_numpy(out)[None, None]


FAR: list[tuple[int, int, tuple[int, int, int, int]]] = [
    (1, 2**28, (2**28, 2**28, 2**28, 2**28)),
    (1, 2**20, (2**21 + 1, 2**20, 2**20, 0)),
    (2**28, 2**28, (0, 0, 0, 0)),
    (2**29, 1, (0, -3 * 2**29 + 5, 0, -3 * 2**29 + 5)),
    (2**29, 1, (-(2**29) + 2, -(2**30) + 4, 0, -3 * 2**29 + 5)),
    (2**30, 2**30 - 1, (0, 0, 0, 0)),
    (3, 1, (5000, -4990, 2, -3)),
    (1, 1, (3, 3, 4000, -3996)),
    (1, 1, (4000, -4000, 1, 1)),
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("up", "down", "padding"), FAR, ids=str)
def test_far_from_the_picture(up: int, down: int, padding: tuple[int, int, int, int], layout: torch.memory_format) -> None:
    x, f = torch.randn(1, 2, 3, 3, dtype=torch.float64).contiguous(memory_format=layout), torch.randn(4, 3, dtype=torch.float64)
    got = ops.upfirdn2d(x.requires_grad_(), f, up=up, down=down, padding=padding)
    want = torch.cat([by_definition(x.detach()[:, c : c + 1], f, up, down, padding) for c in range(2)], 1)
    torch.testing.assert_close(got, want)
    dy = torch.randn_like(got)
    (dx,) = torch.autograd.grad(got, x, dy)
    probe = torch.randn_like(x)  # the map is linear: (dy, A probe) = (A^T dy, probe)
    torch.testing.assert_close((dx * probe).sum(), (dy * ops.upfirdn2d(probe, f, up=up, down=down, padding=padding)).sum())


STRIDED: dict[str, Tensor] = {
    "transposed": torch.randn(4, 3).t(),
    "expanded": torch.randn(1, 3).expand(4, 3),
    "every second": torch.randn(8, 6)[::2, ::2],
    "one number": torch.ones(()).expand(3, 3),
    "one number, separable": torch.ones(()).expand(5),
    "a column": torch.randn(5, 4)[:, 1],
}


@pytest.mark.parametrize("flip", [False, True], ids=["convolved", "correlated"])
@pytest.mark.parametrize("name", STRIDED)
def test_filters_of_any_strides(name: str, flip: bool) -> None:
    x, f = torch.randn(2, 3, 6, 6, dtype=torch.float64).requires_grad_(), STRIDED[name]
    for given in (f, f.double(), f.bfloat16()):
        options: dict[str, Any] = {"up": 2, "padding": 4, "flip_filter": flip, "gain": 1.5}
        got, want = ops.upfirdn2d(x, given, **options), reference.upfirdn2d(x, given.contiguous(), **options)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))


@pytest.mark.parametrize("f", [[], [[]], [0, 0], [1, -1], torch.ones(2, 2, 2), "abc", [[1], [1, 2]], [float("nan")], 10**400, 1e39])
def test_setup_filter_refuses(f: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)^f: got .*supported: "):
        ops.setup_filter(f)
    with pytest.raises(ValueError, match=r"(?s)^gain: got .*supported: "):
        ops.setup_filter([1, 2], gain=10**400)
