"""The CPU's backward pass of attention: every instruction set, block boundaries, what the bias is summed over, threads, offsets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import ops, reference
from genfast.testing import SPECS
from genfast.testing.oracle import assert_accurate, precision, same_bits
from genfast.testing.specs.attention import Attention

DOUBLE = torch.float64


def cases(count: int) -> list[Attention]:
    """Sizes on both sides of the kernels' blocks: 24 and 96 or 32 and 128 queries, 64 or 128 keys, several ranges of queries."""
    random = torch.Generator().manual_seed(11)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    result = []
    for i in range(count):
        n, m, d = pick(1, 2, 23, 96, 97, 130, 200, 300), pick(2, 16, 63, 64, 65, 129, 200), pick(1, 3, 5, 16, 31, 40, 72, 100, 130)
        batch, groups, kv_heads = pick(1, 2), pick(1, 2, 3), pick(1, 2)
        broadcast = [(pick(1, batch), pick(1, kv_heads * groups), pick(1, n), pick(1, m, m)) for _ in range(2)]
        sized = {"bias": pick(None, broadcast[0], broadcast[0]), "mask": pick(None, broadcast[1]), "kv_heads": kv_heads}
        options = {"blind": pick(False, True), "causal": pick(False, True), "scale": pick(None, 0.3, -0.1)}
        result.append(Attention(f"backward {i}", batch, kv_heads * groups, n, m, d, **sized, **options))
    return result


def gradients(namespace: Any, arguments: dict[str, Any], weights: tuple[Tensor, Tensor], wide: torch.dtype) -> list[Tensor]:
    given = {key: t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for key, t in arguments.items()}
    leaves = [given[key].requires_grad_() for key in ("q", "k", "v", "bias") if given[key] is not None]
    o, lse = namespace.attention(**given)
    seen = lse > -torch.inf
    loss = (o * weights[0].to(wide)).sum() + (lse.masked_fill(~seen, 0) * weights[1].to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    # The gradients of q and k can be sums that cancel, so one bound serves those of q, k and v.
    return [torch.cat([g.flatten() for g in grads[:3]]), *grads[3:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sweep_of_gradients(dtype: torch.dtype, isa: str) -> None:
    """No further from float64 than torch's own arithmetic in the same dtype, twice over; the gradient of the log-sum-exp included."""
    eps = precision(SPECS["attention"], dtype)
    for case in cases(24):
        arguments = case.make(dtype)
        random = torch.Generator().manual_seed(case.n)
        o, lse = (torch.randn(*arguments["q"].shape[:dims], generator=random).mul(4).round().div(4) for dims in (4, 3))
        got, plain, exact = (
            gradients(namespace, arguments, (o, lse), wide) for namespace, wide in ((ops, dtype), (reference, dtype), (reference, DOUBLE))
        )
        # A bias of one key for all has the gradient of the log-sum-exp alone, of a size with what cancels: the scores' gradients.
        for what, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
            assert_accurate(f"{case}, {isa}, result {what}", g, p, e, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [(1, 1, 1, 70), (1, 2, 300, 70), (2, 1, 300, 1), (1, 1, 1, 1), None], ids=str)
def test_threads_and_runs_change_no_bit(bias: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    """Few heads and many queries, which several threads share, with what they all add to."""
    case = Attention("shared", 2, 2, 300, 70, 40, kv_heads=1, bias=bias, causal=True)
    arguments, weights = case.make(dtype), (torch.randn(2, 2, 300, 40), torch.randn(2, 2, 300))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(ops, arguments, weights, dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_query_that_sees_nothing_changes_nothing(dtype: torch.dtype) -> None:
    arguments = Attention("blind", 1, 2, 40, 30, 24, bias=(1, 2, 40, 30), mask=(1, 1, 40, 30)).make(dtype)
    arguments["mask"][..., [3, 17], :] = False
    leaves = [arguments[key].requires_grad_() for key in ("q", "k", "v", "bias")]
    weights = torch.randn(1, 2, 40, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    o, _ = ops.attention(**arguments)
    dq, dk, dv, dbias = torch.autograd.grad(o, leaves, weights)
    assert (dq[:, :, [3, 17]] == 0).all() and (dbias[:, :, [3, 17]] == 0).all()
    rows = [i for i in range(40) if i not in (3, 17)]
    part = {**arguments, "q": leaves[0][:, :, rows], "bias": leaves[3][:, :, rows], "mask": arguments["mask"][:, :, rows]}
    expected = torch.autograd.grad(ops.attention(**part)[0], leaves[1:3], weights[:, :, rows])
    for got, alone in zip((dk, dv), expected, strict=True):
        assert_accurate("dk, dv", got, alone, alone.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_offsets_beyond_two_to_the_31(dtype: torch.dtype) -> None:
    """Rows spread over more than 2^31 elements, of which the system hands out only the pages that are touched, give the same bits."""
    n, m, d, gap = 130, 140, 24, 2**24
    assert (n - 1) * gap > 2**31
    storage = torch.empty(m * gap, dtype=dtype)
    random = torch.Generator().manual_seed(0)
    q, do = (torch.randn(1, 1, n, d, generator=random).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 1, m, d, generator=random).to(dtype) for _ in range(2))
    bias = torch.randn(1, 1, n, m, generator=random).to(dtype)

    def run(spread: bool) -> list[Tensor]:
        place = iter(range(0, 2**20, 2**10))

        def put(t: Tensor) -> Tensor:
            return storage.as_strided(t.shape, (0, 0, gap, 1), next(place)).copy_(t) if spread else t.clone()

        inputs = [put(t) for t in (q, k, v, bias)]
        o, grads = put(torch.zeros_like(q)), [put(torch.zeros_like(t)) for t in (q, k, v)]
        lse, delta, dbias, row_stats = (torch.empty(shape) for shape in ((1, 1, n), (1, 1, n), bias.shape, (1, 1, n, 2)))
        torch.ops.genfast.attention_(o, lse, row_stats, *inputs, None, True, 0.2)
        torch.ops.genfast.attention_backward_(*grads, dbias, delta, put(do), None, *inputs, None, True, 0.2, o, row_stats)
        return [o, lse, *grads, dbias]

    for far, near in zip(run(True), run(False), strict=True):
        assert same_bits(far.clone(), near)


def test_explanation() -> None:
    q = torch.zeros(1, 2, 20, 8)
    assert "Backward: genfast (tiles of queries and keys)." in ops.explain_attention(q, q, q)
    assert "Backward: torch_cpu_flash (float64" in ops.explain_attention(q.double(), q.double(), q.double())
    assert "Backward: blocks (float64 with a bias" in ops.explain_attention(
        q.double(), q.double(), q.double(), q.new_zeros(20, dtype=DOUBLE)
    )
