"""`attention`: docs/attention.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


@dataclass(frozen=True)
class Attention:
    """A case: q (batch, heads, n, d), k and v (batch, kv_heads, m, d), with the shapes of bias and mask or None."""

    name: str
    batch: int
    heads: int
    n: int
    m: int
    d: int
    kv_heads: int | None = None
    bias: tuple[int, ...] | None = None
    mask: tuple[int, ...] | None = None
    blind: bool = False  # one query sees no key
    causal: bool = False
    scale: float | None = None

    def make(self, dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(self.n * 1000 + self.m + self.d)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        q = draw(self.batch, self.heads, self.n, self.d)
        k, v = (draw(self.batch, kv_heads, self.m, self.d) for _ in range(2))
        mask = None if self.mask is None else torch.rand(self.mask, generator=random) > 0.3
        if mask is not None:
            mask[..., 0] = True
            if self.blind:
                mask[..., 0, :] = False
        bias = None if self.bias is None else draw(*self.bias)
        options = {"causal": self.causal, "scale": self.scale, "return_lse": True}
        return {"q": q, "k": k, "v": v, "bias": bias, "mask": mask, **options}


CASES = [
    Attention("plain", 2, 3, 5, 7, 8),
    Attention("long, bias for each head", 1, 2, 70, 150, 40, bias=(1, 2, 70, 150)),
    Attention("causal, more keys", 2, 2, 33, 50, 16, causal=True),
    Attention("causal, square", 2, 2, 33, 33, 16, causal=True, scale=0.3),
    Attention("grouped heads, bias of one row", 2, 6, 9, 20, 24, kv_heads=2, bias=(2, 1, 1, 20)),
    Attention("mask for each sample", 2, 2, 17, 130, 72, mask=(2, 1, 17, 130)),
    Attention("mask and bias, causal, grouped", 2, 4, 19, 31, 8, kv_heads=1, bias=(19, 31), mask=(2, 1, 1, 31), causal=True),
    Attention("odd head dimension", 1, 2, 3, 4, 5, bias=(2, 3, 1)),
    Attention("one query", 2, 4, 1, 37, 64, kv_heads=2, causal=True),
    Attention("one of each", 1, 1, 1, 1, 1),
    Attention("short keys", 1, 2, 130, 77, 40),
    Attention("wide heads", 1, 1, 64, 64, 256, bias=(1, 1, 64, 64)),
    Attention("wider heads", 1, 1, 9, 10, 512),
    Attention("queries that see nothing: lse not finite", 2, 2, 6, 9, 16, mask=(2, 1, 6, 9), blind=True),
    Attention("more queries than keys, causal: lse not finite", 1, 2, 9, 4, 16, causal=True),
    Attention("empty batch", 0, 2, 3, 4, 8),
    Attention("empty queries", 2, 2, 0, 4, 8),
    Attention("empty keys: lse not finite", 2, 2, 3, 0, 8),
]


def _with(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


def _change(name: str, change: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, name: change(arguments[name])}


ATTENTION = OpSpec(
    name="attention",
    cases=[Case(case.name, case.make) for case in CASES],
    benchmarks=[],
    bad=[
        BadInput("three dimensions", _change("q", lambda t: t[0]), "q: got shape (3, 5, 8), supported: (B, H, N, D)"),
        BadInput("integers", _change("q", torch.Tensor.int), "q: got torch.int32, supported: torch.float32"),
        BadInput("no head dimension", _change("q", lambda t: t[..., :0]), "q: got a head dimension of 0, supported: 1 and more"),
        BadInput("a narrow k", _change("k", lambda t: t[..., :4]), "k: got shape (2, 3, 7, 4), supported: (2, heads, M, 8)"),
        BadInput("heads that do not divide", _change("k", lambda t: t[:, :2]), "k: got shape (2, 2, 7, 8), supported: (2, heads, M, 8)"),
        BadInput("v of another length", _change("v", lambda t: t[:, :, :6]), "v: got shape (2, 3, 6, 8), supported: (2, 3, 7, 8), as k"),
        BadInput("v in half", _change("v", torch.Tensor.half), "v: got torch.float16 on cpu, supported: torch.float32 on cpu, as q"),
        BadInput("k elsewhere", _change("k", lambda t: t.to("meta")), "k: got torch.float32 on meta, supported: torch.float32 on cpu"),
        BadInput("a wide bias", _with(bias=torch.zeros(7, dtype=torch.float64)), "bias: got torch.float64, supported: torch.float32"),
        BadInput("a bool bias", _with(bias=torch.ones(7, dtype=torch.bool)), "a bool tensor is a mask"),
        BadInput(
            "a bias that does not fit",
            _with(bias=torch.zeros(2, 1, 5, 6)),
            "bias: got shape (2, 1, 5, 6), supported: a shape that broadcasts to (2, 3, 5, 7)",
        ),
        BadInput("a mask of numbers", _with(mask=torch.zeros(7)), "mask: got torch.float32, supported: torch.bool, True where"),
        BadInput(
            "mask elsewhere", _with(mask=torch.ones(7, dtype=torch.bool, device="meta")), "mask: got a tensor on meta, supported: cpu"
        ),
        BadInput("a scale of no value", _with(scale=float("nan")), "scale: got nan, supported: a finite number"),
    ],
    batched=[],
    differentiable=["q", "k", "v", "bias"],
    twice=["plain", "causal, more keys", "grouped heads, bias of one row", "one query", "odd head dimension"],
    bits=False,
)
