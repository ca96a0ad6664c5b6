"""Packed sequences beyond the OpSpec: equal to attention sequence by sequence, layouts, offsets of either width, compilers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genfast import ops
from genfast.testing.oracle import same_bits
from genfast.testing.specs.attention_varlen import Packed

CASE = Packed("", (20, 0, 33, 5), (31, 4, 33, 1), 4, 2, 16, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_is_attention_sequence_by_sequence(dtype: torch.dtype) -> None:
    a = CASE.make(dtype)
    o, lse = ops.attention_varlen(**a)
    first_q = first_k = 0
    for n, m in zip(CASE.queries, CASE.keys, strict=True):
        q, k, v = (
            t[first : first + rows].transpose(0, 1)[None]
            for t, first, rows in ((a["q"], first_q, n), (a["k"], first_k, m), (a["v"], first_k, m))
        )
        expected = ops.attention(q, k, v, causal=True, return_lse=True)
        assert same_bits(o[first_q : first_q + n].transpose(0, 1), expected[0][0])
        assert same_bits(lse[:, first_q : first_q + n], expected[1][0])
        first_q, first_k = first_q + n, first_k + m


def test_layouts_and_offsets_of_64_bits_change_nothing() -> None:
    a = CASE.make(torch.float32)
    expected = ops.attention_varlen(**a)
    for key in ("q", "k", "v"):
        a[key] = torch.stack([a[key], -a[key]], 1)[:, 0]
    a |= {"cu_seqlens_q": a["cu_seqlens_q"].long(), "max_seqlen_k": 1000}
    for got, e in zip(ops.attention_varlen(**a), expected, strict=True):
        assert same_bits(got, e)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_without_gradients(backend: str) -> None:
    a = CASE.make(torch.float32)

    def step(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> Tensor:
        return ops.attention_varlen(q * 1, k, v, cu_q, cu_k, 33, 33, causal=True) * 1  # type: ignore[operator]

    given = [a[key] for key in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(*given), step(*given))
    leaf = a["q"].clone().requires_grad_()
    got = torch.autograd.grad(torch.compile(step, backend="aot_eager")(leaf, *given[1:]).square().sum(), leaf)[0]
    torch.testing.assert_close(got, torch.autograd.grad(step(leaf, *given[1:]).square().sum(), leaf)[0])


def test_refusals() -> None:
    a = CASE.make(torch.float32)
    rest = (a["k"], a["v"], a["cu_seqlens_q"], a["cu_seqlens_k"])
    with pytest.raises(ValueError, match=r"an input with a gradient, a tangent or inside a torch.func transform, supported: none of these"):
        torch.ops.genfast.attention_varlen(a["q"].clone().requires_grad_(), *rest, 33, True, 0.1)
    with pytest.raises(ValueError, match=r"cu_seqlens_q and cu_seqlens_k: got a tensor inside a torch.func transform"):
        torch.vmap(lambda cu: ops.attention_varlen(a["q"], a["k"], a["v"], cu, a["cu_seqlens_k"], 33, 33))(a["cu_seqlens_q"].repeat(2, 1))


def test_opcheck() -> None:
    a = CASE.make(torch.float32)
    given = [a[key] for key in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(torch.library.opcheck(torch.ops.genfast.attention_varlen, (*given, 33, True, 0.1), test_utils=tests).values()) == {"SUCCESS"}
