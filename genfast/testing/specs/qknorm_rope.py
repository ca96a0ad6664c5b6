"""`qknorm_rope` and `qknorm_rope_attention`: docs/attention.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast.reference import rope_table
from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


@dataclass(frozen=True)
class QkNormRope:
    """A case: q (batch, heads, n, d) and k (batch, kv_heads, m, d); weights and biases as wide as given, or None."""

    name: str
    batch: int
    heads: int
    n: int
    d: int
    kv_heads: int | None = None
    m: int | None = None
    rotary: int | None = None  # None: all of d
    weight: str | None = "one"  # "one": (d,), "heads": (heads, d)
    bias: str | None = None
    tables: bool = False  # a table for each sample
    norm: str | None = "rms"
    across_heads: bool = False
    interleaved: bool = True

    def make(self, dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(self.n * 1000 + self.d)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        kv_heads, rotary = self.kv_heads or self.heads, self.d if self.rotary is None else self.rotary

        def parameter(kind: str | None, heads: int, mean: float) -> Tensor | None:
            shape = (self.d,) if kind == "one" else (heads, self.d)
            return None if kind is None else (mean + 0.3 * torch.randn(shape, generator=random, dtype=torch.float64)).to(dtype)

        cos = sin = None
        if rotary:
            positions = torch.arange(self.n) if not self.tables else torch.randint(50, (self.batch, self.n), generator=random)
            cos, sin = rope_table(positions, rotary, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        return {
            # Away from zero, so that the mean matters.
            "q": draw(self.batch, self.heads, self.n, self.d) + 0.5,
            "k": draw(self.batch, kv_heads, self.m or self.n, self.d) - 0.5,
            "q_weight": parameter(self.weight, self.heads, 1.0),
            "k_weight": parameter(self.weight, kv_heads, 1.0),
            "cos": cos,
            "sin": sin,
            "q_bias": parameter(self.bias, self.heads, 0.0),
            "k_bias": parameter(self.bias, kv_heads, 0.0),
            "norm": self.norm,
            "across_heads": self.across_heads,
            "interleaved": self.interleaved,
        }


def _with(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


def _change(name: str, change: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, name: change(arguments[name])}


CASES = [
    QkNormRope("rms, interleaved", 2, 3, 5, 8),
    QkNormRope("layer, grouped, part of the head", 2, 4, 5, 24, 2, rotary=16, bias="heads", tables=True, norm="layer", interleaved=False),
    QkNormRope("weights for each head, halves", 1, 2, 19, 72, weight="heads", interleaved=False),
    QkNormRope("norm alone, other keys", 2, 2, 3, 40, m=7, rotary=0, norm="layer", bias="one"),
    QkNormRope("rope alone, odd halves", 2, 2, 4, 10, weight=None, norm=None, interleaved=False),
    QkNormRope("across the heads", 2, 3, 5, 40, weight="heads", across_heads=True),
    QkNormRope("across the heads, layer, halves", 1, 2, 3, 16, kv_heads=1, bias="one", norm="layer", across_heads=True, interleaved=False),
    QkNormRope("odd head dimension, part of it", 1, 2, 3, 7, rotary=4, weight=None),
    QkNormRope("several chunks", 1, 2, 70, 128),
    QkNormRope("wide heads, halves", 1, 1, 3, 1024, interleaved=False),
    QkNormRope("empty", 2, 2, 0, 8),
]

QKNORM_ROPE = OpSpec(
    name="qknorm_rope",
    cases=[Case(case.name, case.make) for case in CASES],
    benchmarks=[],
    bad=[
        BadInput("three dimensions", _change("q", lambda t: t[0]), "q: got shape (3, 5, 8), supported: (B, H, N, D)"),
        BadInput("integers", _change("q", Tensor.int), "q: got torch.int32, supported: torch.float32"),
        BadInput("too wide", _with(q=torch.zeros(1, 1, 1, 1025)), "q: got a head dimension of 1025, supported: 1 to 1024"),
        BadInput("a narrow k", _change("k", lambda t: t[..., :4]), "k: got shape (2, 3, 5, 4), supported: (2, heads, M, 8)"),
        BadInput("k in half", _change("k", Tensor.half), "k: got torch.float16 on cpu, supported: torch.float32 on cpu, as q"),
        BadInput("an unknown norm", _with(norm="batch"), "norm: got 'batch', supported: 'rms', 'layer' or None"),
        BadInput("a weight without a norm", _with(norm=None), "q_weight: got a tensor, supported: None, where norm is None"),
        BadInput("a long weight", _with(k_weight=torch.ones(9)), "k_weight: got shape (9,) on cpu, supported: (8,) or (3, 8) on cpu"),
        BadInput("an integer bias", _with(q_bias=torch.ones(8, dtype=torch.int64)), "q_bias: got torch.int64, supported: torch.float32"),
        BadInput("no sines", _with(sin=None), "cos and sin: got one of them, supported: both or none"),
        BadInput("a table too long", _change("cos", lambda t: t.repeat(2, 1)), "cos: got shape (10, 4) on cpu, supported: (5, at most 4)"),
        BadInput("sines of another shape", _change("sin", lambda t: t[:, :3]), "sin: got shape (5, 3), supported: (5, 4), as cos"),
        BadInput("other keys", _change("k", lambda t: t[:, :, :4]), "cos: got a table for 5 queries and 4 keys, supported: None"),
    ],
    batched=[],
    differentiable=["q", "k", "q_weight", "k_weight", "q_bias", "k_bias"],
    twice=["rms, interleaved", CASES[1].name, "rope alone, odd halves", "across the heads, layer, halves"],
    bits=False,
)


def _packed(name: str, shape: tuple[int, ...], heads: int | None, kv_heads: int | None, d: int, **options: Any) -> Case:
    def make(dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(sum(shape))
        qkv, *weights = (torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in (shape, (d,), (d,)))
        cos, sin = rope_table(torch.arange(shape[1]), d, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        counts = {"heads": heads, "kv_heads": kv_heads}
        return {"qkv": qkv, "q_weight": weights[0], "k_weight": weights[1], "cos": cos, "sin": sin, **counts, **options}

    return Case(name, make)


def _three(dtype: torch.dtype) -> Arguments:
    random = torch.Generator().manual_seed(3)
    qkv = [torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for s in ((2, 4, 17, 24), (2, 2, 20, 24), (2, 2, 20, 24))]
    return {"qkv": qkv, "q_weight": None, "k_weight": None, "norm": "layer", "mask": torch.rand(17, 20, generator=random) > 0.2}


QKNORM_ROPE_ATTENTION = OpSpec(
    name="qknorm_rope_attention",
    cases=[
        _packed("packed by three", (2, 18, 3, 2, 16), None, None, 16, causal=True),
        _packed("packed by heads, grouped, halves", (1, 20, 8 * 24), 4, 2, 24, interleaved=False, scale=0.3),
        Case("three tensors, other keys", _three),
    ],
    benchmarks=[],
    bad=[
        BadInput("two tensors", _with(qkv=[torch.zeros(1, 1, 1, 8)] * 2), "qkv: got 2 tensors, supported: three, or one that holds them"),
        BadInput("packed by four", _with(qkv=torch.zeros(1, 2, 4, 1, 8)), "qkv: got shape (1, 2, 4, 1, 8), supported: (B, N, 3, H, D)"),
        BadInput("four dimensions", _with(qkv=torch.zeros(1, 2, 4, 8)), "qkv: got shape (1, 2, 4, 8), supported: (B, N, 3, H, D) or"),
        BadInput("no heads", _with(qkv=torch.zeros(1, 2, 24)), "heads: got None, supported: the number of q's heads"),
        BadInput("no whole heads", _with(qkv=torch.zeros(1, 2, 25), heads=1), "qkv: got shape (1, 2, 25), supported: (B, N, 3 D)"),
        BadInput("groups that do not divide", _with(qkv=torch.zeros(1, 2, 24), heads=3, kv_heads=2), "kv_heads: got 2, supported"),
        BadInput("heads said twice", _with(heads=2), "heads, kv_heads: got 2 and None, supported: None, where the shapes say it"),
    ],
    batched=[],
    differentiable=["qkv", "q_weight", "k_weight"],
    twice=["packed by three"],
    bits=False,
)
