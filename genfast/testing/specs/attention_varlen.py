"""`attention_varlen`: docs/attention.md, "Packed sequences"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast.testing.spec import Arguments, BadInput, Case, OpSpec


@dataclass(frozen=True)
class Packed:
    """A case: the numbers of queries and of keys of each sequence."""

    name: str
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    heads: int
    kv_heads: int
    d: int
    causal: bool = False
    scale: float | None = None

    def make(self, dtype: torch.dtype) -> Arguments:
        random = torch.Generator().manual_seed(sum(self.queries) * 100 + self.d)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        total_q, total_k = sum(self.queries), sum(self.keys)
        starts = {
            f"cu_seqlens_{name}": torch.tensor([0, *lengths]).cumsum(0).int() for name, lengths in (("q", self.queries), ("k", self.keys))
        }
        longest = {"max_seqlen_q": max(self.queries, default=0), "max_seqlen_k": max(self.keys, default=0)}
        options = {"causal": self.causal, "scale": self.scale, "return_lse": True}
        q, k, v = draw(total_q, self.heads, self.d), *(draw(total_k, self.kv_heads, self.d) for _ in range(2))
        return {"q": q, "k": k, "v": v, **starts, **longest, **options}


CASES = [
    Packed("plain", (5, 3, 7), (5, 3, 7), 2, 2, 8),
    Packed("causal, grouped heads, other keys", (20, 1, 33), (31, 40, 33), 4, 2, 16, causal=True),
    Packed("long", (130, 17), (90, 150), 2, 1, 40, scale=0.3),
    Packed("odd head dimension", (3, 2), (4, 2), 1, 1, 5, causal=True),
    Packed("wide heads", (20,), (25,), 2, 2, 256),
    Packed("sequences without queries or keys, queries that see nothing: lse not finite", (0, 3, 2, 9), (4, 0, 2, 5), 2, 1, 8, causal=True),
    Packed("empty batch", (), (), 2, 1, 8),
]


def _change(name: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, name: change(arguments[name])}


ATTENTION_VARLEN = OpSpec(
    name="attention_varlen",
    cases=[Case(case.name, case.make) for case in CASES],
    benchmarks=[],
    bad=[
        BadInput("four dimensions", _change("q", lambda t: t[None]), "q: got shape (1, 15, 2, 8), supported: (total_q, H, D)"),
        BadInput("integers", _change("q", torch.Tensor.int), "q: got torch.int32, supported: torch.float32"),
        BadInput("no head dimension", _change("q", lambda t: t[..., :0]), "q: got a head dimension of 0, supported: 1 and more"),
        BadInput("a narrow k", _change("k", lambda t: t[..., :4]), "k: got shape (15, 2, 4), supported: (total_k, heads, 8) where"),
        BadInput("v of another length", _change("v", lambda t: t[1:]), "v: got shape (14, 2, 8), supported: (15, 2, 8), as k"),
        BadInput("v in half", _change("v", torch.Tensor.half), "v: got torch.float16 on cpu, supported: torch.float32 on cpu, as q"),
        BadInput(
            "offsets of floats", _change("cu_seqlens_q", torch.Tensor.float), "cu_seqlens_q: got torch.float32 (4,) on cpu, supported:"
        ),
        BadInput("fewer sequences", _change("cu_seqlens_k", lambda t: t[:3]), "cu_seqlens_k: got torch.int32 (3,) on cpu, supported:"),
        BadInput("offsets elsewhere", _change("cu_seqlens_k", lambda t: t.to("meta")), "cu_seqlens_k: got torch.int32 (4,) on meta"),
        BadInput("a first that is not 0", _change("cu_seqlens_q", lambda t: t + 1), "cu_seqlens_q: got [1, 6, 9, 16], supported: numbers"),
        BadInput("offsets that fall", _change("cu_seqlens_k", lambda t: t[[0, 2, 1, 3]]), "supported: numbers that rise from 0 to 15"),
        BadInput("a short maximum", _change("max_seqlen_q", lambda _: 6), "max_seqlen_q: got 6, supported: 7 and more, the longest"),
        BadInput("a negative maximum", _change("max_seqlen_k", lambda _: -1), "max_seqlen_k: got -1, supported: 0 and more"),
        BadInput("a scale of no value", _change("scale", lambda _: float("nan")), "scale: got nan, supported: a finite number"),
    ],
    batched=[],
    differentiable=["q", "k", "v"],
    twice=["plain", "causal, grouped heads, other keys", "odd head dimension"],
    bits=False,
)
