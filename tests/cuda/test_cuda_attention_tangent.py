"""The tangent of attention on a GPU, against the float64 reference's forward mode."""

from __future__ import annotations

import pytest
import torch

from genfast import ops, reference
from genfast.testing.oracle import assert_accurate, same_bits

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("d", [40, 64, 72, 128, 160, 256])
def test_attention_jvp(d: int, causal: bool) -> None:
    dtype = torch.float16 if causal else torch.bfloat16
    draw = torch.Generator().manual_seed(d)
    shapes = [(2, 4, 150, d), (2, 2, 200, d), (2, 2, 200, d)] * 2
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]
    bias = torch.randn(4, 150, 200, generator=draw, dtype=torch.float64).to(dtype)

    def expected(wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        primals, tangents = (tuple(t.to(wide) for t in group) for group in (tensors[:3], tensors[3:]))
        return torch.func.jvp(lambda *t: reference.attention(*t, bias.to(wide), None, causal), primals, tangents)  # type: ignore[no-any-return]

    runs = [ops.attention_jvp(*(t.cuda() for t in tensors), bias.cuda(), None, causal) for _ in range(3)]
    o, to = (t.cpu() for t in runs[0])
    for name, got, working, exact in zip(("o", "to"), (o, to), expected(dtype), expected(torch.float64), strict=True):
        assert_accurate(name, got, working, exact, torch.finfo(dtype).eps)
    assert all(same_bits(a.cpu(), b) for run in runs for a, b in zip(run, (o, to), strict=True))
