"""On a GPU: attention and its gradients against the float64 reference, the same bits on every run, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from emulator.test_emulator_attention import HEADS, draw, inputs
from emulator.test_emulator_attention_backward import NAMES, gradients
from torch import Tensor

from genfast import ops
from genfast.testing.oracle import assert_accurate, same_bits

pytestmark = pytest.mark.cuda
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# batch, heads, kv heads, queries, keys, head dimension; shape of the bias; mask; causal
CASES = {
    "whole bias": ((2, 4, 2, 70, 90, 40), (2, 4, 70, 90), False, False),
    "bias of a key": ((2, 4, 4, 130, 77, 64), (77,), False, False),
    "bias of a head": ((2, 4, 4, 64, 256, 72), (1, 4, 1, 1), False, False),
    "bias of all samples and heads": ((2, 4, 4, 200, 200, 128), (200, 200), True, True),
    "mask": ((2, 2, 1, 300, 170, 80), None, True, False),
    "causal, grouped heads": ((1, 8, 2, 257, 300, 128), None, False, True),
    "queries that see nothing": ((1, 2, 2, 150, 40, 160), None, False, True),
    "tokens of an image": ((1, 2, 2, 256, 256, 256), None, False, False),
    "a head that is no multiple of 8": ((1, 2, 1, 65, 33, 37), (65, 33), True, False),
}


def on_gpu(
    tensors: list[Tensor], bias: Tensor | None, mask: Tensor | None, causal: bool, do: Tensor, dlse: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """What `ops.attention` gives on the GPU, and its gradients."""
    leaves = [t.cuda().requires_grad_() for t in (*tensors, *([] if bias is None else [bias]))]
    options = {"mask": None if mask is None else mask.cuda(), "causal": causal, "return_lse": True}
    o, lse = ops.attention(*leaves[:3], None if bias is None else leaves[3], **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad([o, lse], leaves, [do.cuda(), dlse.cuda()])
    return [o.detach(), lse.detach()], list(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients(case: tuple[tuple[int, ...], tuple[int, ...] | None, bool, bool], dtype: torch.dtype) -> None:
    (batch, heads, kv_heads, n, m, d), shape, masked, causal = case
    tensors = inputs(dtype, n, m, d, batch, heads, kv_heads)
    bias = None if shape is None else draw(shape, torch.float32, 3)
    mask = draw((batch, 1, n, m), torch.float32, 4) > -0.5 if masked else None
    do, dlse = draw((batch, heads, n, d), dtype, 5), draw((batch, heads, n), torch.float32, 6)
    assert ops.explain_attention(*(t.cuda() for t in tensors)).count("genfast (") == 2
    outputs, grads = on_gpu(tensors, bias, mask, causal, do, dlse)
    working = gradients(*tensors, bias, do, dlse, mask, causal)
    wide = [None if t is None else t.double() for t in (*tensors, bias, do, dlse)]
    exact = gradients(*wide, mask, causal)  # type: ignore[arg-type]
    eps = torch.finfo(dtype).eps * (4 if dtype == torch.float32 else 1)
    for name, got, plain, truth in zip(["o", "lse", *NAMES], outputs + grads, working, exact, strict=False):
        assert_accurate(name, got.cpu(), plain, truth, eps)
    for _ in range(2):
        again = on_gpu(tensors, bias, mask, causal, do, dlse)
        assert all(same_bits(a, b) for a, b in zip(outputs + grads, again[0] + again[1], strict=True))


@pytest.mark.parametrize("d", HEADS)
def test_every_head(d: int) -> None:
    test_gradients(((1, 2, 2, 150, 90, d), (150, 90), False, False), torch.bfloat16)


def test_a_captured_backward_replays() -> None:
    q, k, v = (t.cuda().requires_grad_() for t in inputs(torch.bfloat16, 130, 130, 64, heads=2))
    do = draw((1, 2, 130, 64), torch.bfloat16, 5).cuda()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.attention(q, k, v), (q, k, v), do)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
