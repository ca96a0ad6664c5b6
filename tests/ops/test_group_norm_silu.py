"""What follows from analysis for group_norm_silu: derivatives of derivatives, layouts, a mean far from zero, compilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import ops, reference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_third_order(layout: torch.memory_format, isa: str) -> None:
    def chain(namespace: Any) -> list[Tensor]:
        x = normal(3, 6, 5, 7).contiguous(memory_format=layout)
        given = [t.requires_grad_() for t in (x, 1 + normal(6, seed=1), normal(6, seed=2))]
        y = namespace.group_norm_silu(given[0], 2, *given[1:])
        results, loss = [y], (y**3).sum()
        for _ in range(3):
            first = torch.autograd.grad(loss, given, retain_graph=True)
            found = torch.autograd.grad(loss, given, create_graph=True)
            results += [*first, *found]
            loss = sum((g**2).sum() for g in found)  # type: ignore[assignment]
        return [r.detach() for r in results]

    for got, want in zip(chain(ops), chain(reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


def test_layouts_are_kept_and_samples_stand_alone() -> None:
    x = normal(4, 8, 6, 5)
    y = ops.group_norm_silu(x, 4)
    last = ops.group_norm_silu(x.contiguous(memory_format=torch.channels_last), 4)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ops.group_norm_silu(x[2:3], 4), y[2:3], rtol=1e-13, atol=1e-13)


def test_a_large_mean_does_not_cancel() -> None:
    """Channels of a group with means far apart and far from zero, in float32."""
    x = (normal(2, 4, 20, 20) + torch.tensor([1000.0, 1003.0, 998.0, 1001.0])[:, None, None]).float()
    want = reference.group_norm_silu(x.double(), 2)
    torch.testing.assert_close(ops.group_norm_silu(x, 2).double(), want, rtol=1e-3, atol=1e-3)


def test_compiled() -> None:
    x, weight, bias = normal(4, 6, 5, 5), normal(6, seed=1), normal(6, seed=2)

    def both(x: Tensor) -> Tensor:
        return ops.group_norm_silu(2 * x, 3, weight, bias) + 1

    torch.testing.assert_close(torch.compile(both, fullgraph=True)(x), both(x))
    with pytest.raises(Exception, match=r"torch\.compiler\.disable|genfast"):
        torch.compile(both, fullgraph=True)(x.requires_grad_())
