"""Operators made of bias_act, upfirdn2d and torch's convolution: conv2d_resample and filtered_lrelu."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import ops, reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 5), (2, 2)], ids=str)
@pytest.mark.parametrize("down", [1, 2])
@pytest.mark.parametrize("up", [1, 2, 3])
def test_conv2d_resample(up: int, down: int, kernel: tuple[int, int]) -> None:
    """Every order of the three maps gives the plain one's values and gradients, for 12 draws of the rest."""
    random = np.random.default_rng(up + 10 * down)
    for draw in range(12):
        groups = int(random.choice([1, 2]))
        f = [None, normal(4, 4, seed=1), normal(3, 2, seed=2), normal(6, seed=3)][draw % 4]
        padding = [0, 1, (2, 1), (1, 0, 2, 3), (-1, 2, 0, 1)][int(random.integers(5))]
        x, w = normal(2, 4, 9, 8, seed=draw).requires_grad_(), normal(6, 4 // groups, *kernel, seed=4).requires_grad_()
        options: dict[str, Any] = {"f": f, "up": up, "down": down, "padding": padding, "groups": groups}
        options |= {"flip_weight": bool(random.integers(2)), "flip_filter": bool(random.integers(2))}
        got, want = ops.conv2d_resample(x, w, **options), reference.conv2d_resample(x, w, **options)
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        dy = normal(*want.shape, seed=5)
        for a, b in zip(torch.autograd.grad(got, (x, w), dy), torch.autograd.grad(want, (x, w), dy), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv2d_resample_keeps_the_place(kernel: int) -> None:
    """With the filters' padding and "same" padding of the convolution the size is the scaled one."""
    x, w, f = normal(1, 3, 8, 10), normal(5, 3, kernel, kernel), ops.setup_filter([1, 3, 3, 1])
    assert ops.conv2d_resample(x, w, f, up=2, padding=kernel // 2).shape == (1, 5, 16, 20)
    assert ops.conv2d_resample(x, w, f, down=2, padding=kernel // 2).shape == (1, 5, 4, 5)


def filtered(count: int) -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    random = np.random.default_rng(2)
    cases = []
    while len(cases) < count:
        up, down = (int(n) for n in random.integers(1, 5, 2))
        fu, fd = (normal(*random.integers(1, 9, int(random.integers(1, 3))), seed=len(cases)) / 2 for _ in range(2))
        padding = random.integers(0, 10, 4).tolist()
        options = {"fu": fu, "fd": fd, "up": up, "down": down, "padding": padding, "gain": 1.3, "slope": 0.1}
        options |= {"clamp": [None, 0.6][len(cases) % 2], "flip_filter": bool(random.integers(2))}
        height, width = 7 * up + sum(padding[2:]) - len(fu) + 1, 9 * up + sum(padding[:2]) - fu.shape[-1] + 1
        if height >= len(fd) and width >= fd.shape[-1]:
            cases.append(((2, 3, 7, 9), options))
    return cases


def test_filtered_lrelu() -> None:
    """Values and three orders of gradients over 24 draws."""

    def chain(namespace: Any, shape: tuple[int, ...], options: dict[str, Any]) -> list[Tensor]:
        given = [normal(*shape, seed=6).requires_grad_(), normal(3, seed=7).requires_grad_()]
        y = namespace.filtered_lrelu(given[0], b=given[1], **options)
        results, loss = [y], (y**4).sum()
        for _ in range(3):
            found = torch.autograd.grad(loss, given, create_graph=True)
            results += found
            loss = sum((g**2).sum() for g in found)  # type: ignore[assignment]
        return [r.detach() for r in results]

    for shape, options in filtered(24):
        for got, want in zip(chain(ops, shape, options), chain(reference, shape, options), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max().clamp(min=1)))
