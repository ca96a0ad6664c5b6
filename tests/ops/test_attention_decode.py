"""Decoding beyond its OpSpec: what follows from analysis, a sweep of shapes, threads, compilers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast import ops, reference
from genfast.testing import SPECS
from genfast.testing.oracle import assert_accurate, precision, same_bits
from genfast.testing.specs.attention_decode import Decode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"lengths": (300, 77, 1), "heads": 8, "n": 2, "capacity": 320, "d": 64, "kv_heads": 2, **changes}
    return Decode("", **settings).make(dtype)


# ---- identities --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_one_visible_key_returns_its_value(dtype: torch.dtype) -> None:
    a = case(dtype, lengths=(1, 1), n=1)
    o, lse = ops.attention_decode(**a)
    v = a["v_cache"][:, :, :1].repeat_interleave(4, 1)
    assert torch.equal(o, v)
    k = a["k_cache"][:, :, :1].repeat_interleave(4, 1)
    torch.testing.assert_close(lse, (a["q"].to(lse.dtype) * k.to(lse.dtype)).sum(-1) / 8)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("splits", [None, 4])
def test_what_lies_beyond_is_never_used(dtype: torch.dtype, splits: int | None) -> None:
    """NaN beyond the lengths changes no bit; a sample of length 0 gives zeros and -inf."""
    a = case(dtype, lengths=(300, 0, 17), bias=(3, 8, 2, 320), splits=splits)
    expected = ops.attention_decode(**a)
    for b, length in enumerate(a["lengths"].tolist()):
        a["k_cache"][b, :, length:] = a["v_cache"][b, :, length:] = torch.nan
        a["bias"][b, ..., length:] = torch.nan
    o, lse = ops.attention_decode(**a)
    assert same_bits(o, expected[0]) and same_bits(lse, expected[1])
    assert not o[1].any() and (lse[1] == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_is_the_last_rows_of_causal_attention(dtype: torch.dtype) -> None:
    a = case(dtype, lengths=(320,))
    q = torch.cat([a["q"].new_zeros(1, 8, 318, 64), a["q"]], 2)
    whole = ops.attention(q.double(), a["k_cache"].double(), a["v_cache"].double(), causal=True)
    assert_accurate("o", ops.attention_decode(**a)[0], reference.attention_decode(**a)[0], whole[:, :, -2:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_and_threads(dtype: torch.dtype) -> None:
    """Dividing the keys differently changes rounding alone; threads and the other samples change nothing."""
    a = case(dtype)
    exact, working = (
        reference.attention_decode(**(a | {k: a[k].to(t) for k in ("q", "k_cache", "v_cache")})) for t in (torch.float64, dtype)
    )
    before = torch.get_num_threads()
    for splits in (1, 2, 3, 8, 19, 64):
        a["splits"] = splits
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.attention_decode(**a))
        torch.set_num_threads(before)
        for got, again, plain, truth in zip(*results, working, exact, strict=True):
            assert same_bits(got, again)
            assert_accurate(f"{splits} parts", got, plain, truth, precision(SPECS["attention_decode"], dtype))
        alone = {key: t[1:2] if isinstance(t, Tensor) else t for key, t in a.items()}
        assert same_bits(ops.attention_decode(**alone)[0], results[0][0][1:2])


def strided(t: Tensor, how: int) -> Tensor:
    """The same numbers: as they are; (B, n, H, D) memory; between others; with gaps within rows."""
    if how == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 2:
        return torch.stack([t, -t], 3)[:, :, :, 0]
    return torch.stack([t, t], -1)[..., 0] if how == 3 else t


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sweep(dtype: torch.dtype, isa: str) -> None:
    """Shapes, strides, biases, parts: no further from float64 than torch's own arithmetic in the same dtype, twice over."""
    random = torch.Generator().manual_seed(3)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    for i in range(60):
        capacity, heads, kv_heads, n = pick(1, 5, 64, 130, 257), pick(1, 2, 3, 5, 8), pick(1, 2), pick(1, 2, 3, 7, 16)
        lengths = tuple(int(torch.randint(capacity + 1, (), generator=random)) for _ in range(pick(1, 2)))
        d, bias = pick(1, 8, 24, 40, 64, 72, 96, 128, 160, 256), pick(None, (1, heads * kv_heads, n, capacity), (n, 1))
        a = Decode(
            "", lengths, heads * kv_heads, n, capacity, d, kv_heads, bias, pick(True, False), pick(None, 0.2), pick(None, 1, 3)
        ).make(dtype)
        for j, name in enumerate(("q", "k_cache", "v_cache", "bias")):
            if a[name] is not None and a[name].ndim == 4:
                a[name] = strided(a[name], (i + j) % 4)
        if i % 2:
            a["lengths"] = a["lengths"].int()
        exact = reference.attention_decode(
            **{k: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for k, t in a.items()}
        )
        for got, plain, truth in zip(ops.attention_decode(**a), reference.attention_decode(**a), exact, strict=True):
            assert_accurate(f"{i}", got, plain, truth, precision(SPECS["attention_decode"], dtype))


# ---- derivatives and compilers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_without_gradients(backend: str) -> None:
    a = case()

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return ops.attention_decode(q * 1, k, v, lengths) * 1  # type: ignore[operator]

    given = (a["q"], a["k_cache"], a["v_cache"], a["lengths"])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(*given), step(*given))
    leaf = a["q"].clone().requires_grad_()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="aot_eager", fullgraph=True)(leaf, *given[1:])


def test_the_operator_refuses_derivatives() -> None:
    a = case(n=1)
    rest = (a["k_cache"], a["v_cache"], a["lengths"], None, True, 0.1, 1)
    with pytest.raises(ValueError, match=r"an input with a gradient, a tangent or inside a torch.func transform, supported: none of these"):
        torch.ops.genfast.attention_decode(a["q"].clone().requires_grad_(), *rest)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"call genfast.ops.attention_decode outside torch.compile"):
        torch.ops.genfast.attention_decode(forward_ad.make_dual(a["q"], a["q"]), *rest)


def test_opcheck() -> None:
    a = case()
    given = (a["q"], a["k_cache"], a["v_cache"], a["lengths"], None, True, 0.1, 3)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    assert set(torch.library.opcheck(torch.ops.genfast.attention_decode, given, test_utils=tests).values()) == {"SUCCESS"}
