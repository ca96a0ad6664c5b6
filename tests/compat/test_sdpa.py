"""The drop-in against torch's own function, and that nothing it is given is dropped."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.compat import sdpa


def inputs(heads: int = 4, m: int = 30, d: int = 24, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 20, d), (2, heads, m, d), (2, heads, m, d)]
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


MASK = torch.rand(2, 1, 20, 30, generator=torch.Generator().manual_seed(2)) > 0.3
OURS: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "plain": (inputs(), {}),
    "scale": (inputs(), {"scale": 0.1}),
    "bias": (inputs(), {"attn_mask": torch.linspace(-2, 2, 600).view(20, 30)}),
    "mask": (inputs(), {"attn_mask": MASK}),
    "causal, aligned at the top left": (inputs(), {"is_causal": True}),
    "causal, square": (inputs(m=20), {"is_causal": True}),
    "groups": (inputs(heads=2), {"enable_gqa": True}),
}
THEIRS: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "three dimensions": ([t[0] for t in inputs()], {}),
    "float64": (inputs(dtype=torch.float64), {}),
    "another head dimension of v": ([*inputs()[:2], inputs()[2][..., :8]], {}),
    "mask and causality": (inputs(), {"attn_mask": MASK, "is_causal": True}),
    "few queries": ([inputs()[0][:, :, :2], *inputs()[1:]], {}),
}


@pytest.mark.parametrize("case", OURS)
def test_computed_by_genfast(case: str) -> None:
    tensors, options = OURS[case]
    expected = F.scaled_dot_product_attention(*tensors, **options)
    with patch.object(sdpa, "_torch_attention", side_effect=AssertionError), sdpa.patched():
        got = F.scaled_dot_product_attention(*tensors, **options)
    torch.testing.assert_close(got, expected)
    assert F.scaled_dot_product_attention is sdpa._torch_attention


@pytest.mark.parametrize("case", THEIRS)
def test_left_to_torch(case: str) -> None:
    tensors, options = THEIRS[case]
    with patch.object(sdpa.ops, "attention", side_effect=AssertionError):
        got = sdpa.scaled_dot_product_attention(*tensors, **options)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors, **options))


def test_dropout_is_torchs() -> None:
    tensors = inputs()
    torch.manual_seed(3)
    expected = F.scaled_dot_product_attention(*tensors, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(sdpa.scaled_dot_product_attention(*tensors, dropout_p=0.5), expected)


def test_gradients() -> None:
    grads = []
    for function in (F.scaled_dot_product_attention, sdpa.scaled_dot_product_attention):
        leaves = [t.requires_grad_() for t in inputs()]
        bias = torch.linspace(-2, 2, 600).view(20, 30).requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves, attn_mask=bias).square().sum(), [*leaves, bias]))
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)
