"""`attention_decode`: docs/attention.md, "Decoding"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


@dataclass(frozen=True)
class Decode:
    """A case: q (len(lengths), heads, n, d), caches (len(lengths), kv_heads, capacity, d), the shape of a bias or None."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    n: int
    capacity: int
    d: int
    kv_heads: int
    bias: tuple[int, ...] | None = None
    causal: bool = True
    scale: float | None = None
    splits: int | None = None

    def make(self, dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(self.n * 1000 + self.capacity + self.d)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        batch = len(self.lengths)
        q = draw(batch, self.heads, self.n, self.d)
        k, v = (draw(batch, self.kv_heads, self.capacity, self.d) for _ in range(2))
        bias = None if self.bias is None else draw(*self.bias)
        options = {"causal": self.causal, "scale": self.scale, "splits": self.splits, "return_lse": True}
        return {"q": q, "k_cache": k, "v_cache": v, "lengths": torch.tensor(self.lengths, dtype=torch.int64), "bias": bias, **options}


CASES = [
    Decode("plain", (7, 4), 4, 1, 9, 8, 2),
    Decode("many keys, parts", (300, 77), 8, 1, 300, 40, 2, splits=5),
    Decode("more parts than keys", (20, 16), 2, 2, 24, 16, 2, splits=40),
    Decode("sixteen queries, bias for each head", (140, 90), 2, 16, 140, 72, 1, bias=(1, 2, 16, 140), splits=2),
    Decode("five queries that see all, bias of one row", (33, 20), 3, 5, 40, 128, 3, bias=(2, 1, 1, 40), causal=False, scale=0.3),
    Decode("odd head dimension, three heads of a group", (11,), 3, 3, 12, 5, 1),
    Decode("wide heads", (65,), 2, 1, 70, 256, 1),
    Decode("wider heads", (9,), 1, 2, 10, 512, 1),
    Decode("a sample without keys, queries that see nothing: lse not finite", (0, 2, 9), 4, 4, 9, 16, 2, splits=2),
    Decode("empty batch", (), 2, 1, 4, 8, 1),
    Decode("empty cache: lse not finite", (0, 0), 2, 1, 0, 8, 1),
]


def _change(name: str, change: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, name: change(arguments[name])}


def _with(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


ATTENTION_DECODE = OpSpec(
    name="attention_decode",
    cases=[Case(case.name, case.make) for case in CASES],
    benchmarks=[],
    bad=[
        BadInput(
            "many queries", _change("q", lambda t: t.repeat(1, 1, 17, 1)), "q: got shape (2, 4, 17, 8), supported: (B, H, 1 to 16, D)"
        ),
        BadInput("no head dimension", _change("q", lambda t: t[..., :0]), "q: got a head dimension of 0, supported: 1 and more"),
        BadInput("integers", _change("q", torch.Tensor.int), "q: got torch.int32, supported: torch.float32"),
        BadInput(
            "heads",
            _change("k_cache", lambda t: t.repeat(1, 2, 1, 1)[:, :3]),
            "supported: (2, heads, capacity, 8) where heads divides q's 4",
        ),
        BadInput(
            "v of another length",
            _change("v_cache", lambda t: t[:, :, :6]),
            "v_cache: got shape (2, 2, 6, 8), supported: (2, 2, 9, 8), as k",
        ),
        BadInput("v in half", _change("v_cache", torch.Tensor.half), "v_cache: got torch.float16 on cpu, supported: torch.float32 on cpu"),
        BadInput(
            "k elsewhere", _change("k_cache", lambda t: t.to("meta")), "k_cache: got torch.float32 on meta, supported: torch.float32 on"
        ),
        BadInput(
            "one length for all", _change("lengths", lambda t: t[:1]), "lengths: got torch.int64 (1,) on cpu, supported: torch.int32 or"
        ),
        BadInput(
            "lengths of floats", _change("lengths", torch.Tensor.float), "lengths: got torch.float32 (2,) on cpu, supported: torch.int32"
        ),
        BadInput(
            "lengths beyond the cache", _change("lengths", lambda t: t + 3), "lengths: got 10, supported: 0 to 9, the cache's capacity"
        ),
        BadInput("a negative length", _change("lengths", lambda t: t - 5), "lengths: got -1, supported: 0 to 9, the cache's capacity"),
        BadInput("a wide bias", _with(bias=torch.zeros(9, dtype=torch.float64)), "bias: got torch.float64, supported: torch.float32"),
        BadInput(
            "a bias that does not fit", _with(bias=torch.zeros(8)), "bias: got shape (8,) on cpu, supported: a shape that broadcasts to"
        ),
        BadInput("a scale of no value", _with(scale=float("inf")), "scale: got inf, supported: a finite number"),
        BadInput("no parts", _with(splits=0), "splits: got 0, supported: 1 and more"),
    ],
    batched=[],
    differentiable=["q", "k_cache", "v_cache", "bias"],
    twice=["plain", "five queries that see all, bias of one row", "odd head dimension, three heads of a group"],
    bits=False,
)
