"""Attention whose scores are large, for the tests of its kernels: inputs, masks of finite numbers, and an oracle.

The oracle is a softmax in float64 of scores that are rounded to float32 as any float32 arithmetic rounds them: products vanish beside a
mask of -1e9, which makes the rows that it hides means of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genfast.testing.oracle import error

DOUBLE = torch.float64
LOWEST = torch.finfo(torch.float32).min
TYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["-1e9", "-3e38", "lowest", "lowest of the dtype", "-3e38 and lowest", "1e9"]
# -65504 leaves a rest of the products: test_scores_that_are_rounded.
CASES = [(dtype, kind) for dtype in TYPES for kind in MASKS if (dtype, kind) != (torch.float16, "lowest of the dtype")]
# What 16-bit outputs and gradients may be off by, of the largest: the rounding of weights and slopes, and their own.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3, DOUBLE: 1e-12}


def draw(*shape: int, seed: int, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def inputs(dtype: torch.dtype, n: int, m: int = 50, d: int = 16, heads: int = 2, kv_heads: int = 1) -> list[Tensor]:
    return [draw(2, h, rows, d, seed=i, dtype=dtype) for i, (h, rows) in enumerate(((heads, n), (kv_heads, m), (kv_heads, m)))]


def masked(kind: str, n: int, m: int, dtype: torch.dtype) -> Tensor:
    """A bias that hides some keys of every row and all keys of the first one, the last and one between."""
    lowest = torch.finfo(dtype).min
    number = {"-1e9": -1e9, "-3e38": -3e38, "1e9": 1e9, "lowest of the dtype": lowest, "-1e4": -1e4}.get(kind, LOWEST)
    bias = torch.zeros(n, m)
    bias[:, ::3] = number
    bias[[0, n // 2, n - 1]] = number
    if kind == "-3e38 and lowest":
        bias[[0, n - 1], 1::2] = -3e38
    return bias.to(dtype) if kind == "lowest of the dtype" else bias


def visible(n: int, m: int) -> Tensor:
    return torch.ones(n, m, dtype=torch.bool).tril(m - n)


def oracle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool = False, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64, from scores that are rounded to float32 where they are not float64's own."""
    keys, values = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    s = (q.shape[3] ** -0.5 if scale is None else scale) * q @ keys.mT
    if bias is not None:
        s = s + bias
    s = s + (s.float().double() - s).detach()
    if causal:
        s = s.masked_fill(~visible(q.shape[2], k.shape[2]), -torch.inf)
    row_max = s.detach().amax(-1, keepdim=True)
    weights = (s - row_max).exp()
    row_sum = weights.sum(-1, keepdim=True)
    return weights @ values / row_sum, (row_max + row_sum.log()).squeeze(-1)


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.to(t.dtype if dtype is None else dtype).clone().requires_grad_() for t in tensors]


def close(what: str, got: Tensor, exact: Tensor, eps: float) -> None:
    assert error(got, exact) <= eps * float(exact.abs().max()), f"{what}: off by {error(got, exact):.3g} of {float(exact.abs().max()):.3g}"
