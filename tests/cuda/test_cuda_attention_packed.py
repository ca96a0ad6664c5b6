"""On a GPU: decoding and packed sequences against the float64 reference, the same bits on every run, in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from genfast import ops, reference
from genfast.testing.oracle import assert_accurate, same_bits
from genfast.testing.spec import Arguments
from genfast.testing.specs.attention_decode import Decode
from genfast.testing.specs.attention_varlen import Packed

pytestmark = pytest.mark.cuda
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FINE = {torch.float32: 4 * 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def moved(arguments: Arguments) -> Arguments:
    return {key: t.cuda() if isinstance(t, Tensor) else t for key, t in arguments.items()}


def widened(arguments: Arguments) -> Arguments:
    return {key: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for key, t in arguments.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "d", "splits"),
    [
        (8, 1, 1, 128, None),
        (32, 4, 1, 128, 7),
        (4, 4, 1, 64, 1),
        (6, 2, 5, 80, None),
        (2, 1, 16, 256, 3),
        (3, 3, 2, 40, 64),
        (4, 2, 1, 5, 2),
    ],
)
def test_decode(heads: int, kv_heads: int, n: int, d: int, splits: int | None, dtype: torch.dtype) -> None:
    a = Decode("", (3000, 0, 777, 5), heads, n, 3001, d, kv_heads, (4, 1, n, 3001) if n > 1 else None, splits=splits).make(dtype)
    exact, working = reference.attention_decode(**widened(a)), reference.attention_decode(**a)
    for b, length in enumerate(a["lengths"].tolist()):
        a["k_cache"][b, :, length:] = a["v_cache"][b, :, length:] = torch.nan
    device = moved(a)
    got = ops.attention_decode(**device)
    assert_accurate("o", got[0].cpu(), working[0], exact[0], FINE[dtype])
    assert_accurate("lse", got[1].cpu(), working[1], exact[1], FINE[torch.float32])
    for _ in range(3):
        assert all(same_bits(x.cpu(), y.cpu()) for x, y in zip(ops.attention_decode(**device), got, strict=True))


def test_a_captured_decode_follows_the_lengths() -> None:
    a = moved(Decode("", (100, 200), 8, 1, 1024, 128, 2).make(torch.bfloat16))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.attention_decode(**a)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = ops.attention_decode(**a)
    for lengths in ((100, 200), (101, 201), (1024, 0)):
        a["lengths"].copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        expected = ops.attention_decode(**a)
        assert same_bits(o.cpu(), expected[0].cpu()) and same_bits(lse.cpu(), expected[1].cpu())


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("d", [40, 64, 128, 160, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen(dtype: torch.dtype, d: int, causal: bool) -> None:
    a = Packed("", (300, 0, 17, 1000, 3), (300, 5, 90, 1100, 0), 4, 2, d, causal).make(dtype)
    exact, working, device = reference.attention_varlen(**widened(a)), reference.attention_varlen(**a), moved(a)
    got = ops.attention_varlen(**device)
    assert_accurate("o", got[0].cpu(), working[0], exact[0], FINE[dtype])
    assert_accurate("lse", got[1].cpu(), working[1], exact[1], FINE[torch.float32])
    for _ in range(3):
        assert all(same_bits(x.cpu(), y.cpu()) for x, y in zip(ops.attention_varlen(**device), got, strict=True))


def test_varlen_gradient() -> None:
    a = moved(Packed("", (70, 130), (90, 130), 4, 2, 64, True).make(torch.float32))
    keys, gradients = ("q", "k", "v"), []
    for namespace, arguments in ((ops, a), (reference, a), (reference, widened(a))):
        leaves = [arguments[key].clone().requires_grad_() for key in keys]
        o, _ = namespace.attention_varlen(**(arguments | dict(zip(keys, leaves, strict=True))))
        gradients.append(torch.autograd.grad(o.square().sum(), leaves))
    for got, working, exact in zip(*gradients, strict=True):
        assert_accurate("gradient", got, working, exact, FINE[torch.float32])
