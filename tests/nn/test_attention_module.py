"""genfast.nn.Attention: torch's own module, the reference, compilers, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfast import ops
from genfast.nn import Attention


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def gradients(module: nn.Module, out: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((out * draw(*out.shape)).sum(), [*inputs, *module.parameters()]))


@pytest.mark.parametrize("cross", [False, True])
def test_torchs_module_with_the_same_weights(cross: bool) -> None:
    theirs = nn.MultiheadAttention(24, 3, kdim=16 if cross else None, vdim=16 if cross else None, batch_first=True, dtype=torch.float64)
    ours = Attention(24, 3, cross_dim=16 if cross else None).double()
    state = {"proj.weight": theirs.out_proj.weight, "proj.bias": theirs.out_proj.bias}
    if cross:
        q_bias, kv_bias = theirs.in_proj_bias.split([24, 48])
        state |= {"q.weight": theirs.q_proj_weight, "q.bias": q_bias, "kv.bias": kv_bias}
        state["kv.weight"] = torch.cat([theirs.k_proj_weight, theirs.v_proj_weight])
    else:
        state |= {"qkv.weight": theirs.in_proj_weight, "qkv.bias": theirs.in_proj_bias}
    ours.load_state_dict(state)
    x, context, mask = draw(2, 20, 24).requires_grad_(), draw(2, 18, 16).requires_grad_(), draw(20, 18 if cross else 20) > -1
    mask[:, 0] = True
    source = context if cross else x
    want = theirs(x, source, source, attn_mask=~mask, need_weights=False)[0]
    got = ours(x, context if cross else None, mask=mask)
    torch.testing.assert_close(got, want)
    inputs = (x, context) if cross else (x,)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "rms", "rope": "interleaved"},
        {"qk_norm": "layer", "rope": "half", "kv_heads": 2, "causal": True, "bias": False},
        {"qk_norm": "rms", "cross_dim": 8, "kv_heads": 1, "head_dim": 6},
        {"rope": "half"},
    ],
    ids=lambda o: ", ".join(o),
)
def test_reference(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    fused = Attention(32, 4, **options).double()
    plain = Attention(32, 4, **options, impl="reference").double()
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(fused.state_dict())
    x = draw(2, 20, 32).requires_grad_()
    context = draw(2, 5, 8) if "cross_dim" in options else None
    rope = ops.rope_table(torch.arange(20), 8, dtype=torch.float64) if "rope" in options else None
    got, want = (m(x, context, rope, bias=draw(20, 1)) for m in (fused, plain))
    torch.testing.assert_close(got, want)
    for a, b in zip(gradients(fused, got, x), gradients(plain, want, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_state_dict() -> None:
    names = {"qkv.weight", "qkv.bias", "q_norm.weight", "k_norm.weight", "proj.weight", "proj.bias"}  # timm's
    module = Attention(32, 4, kv_heads=2, qk_norm="rms")
    assert set(module.state_dict()) == names and module.qkv.weight.shape == (64, 32)
    assert set(Attention(32, 4, cross_dim=8, bias=False).state_dict()) == {"q.weight", "kv.weight", "proj.weight", "proj.bias"}


def test_autocast() -> None:
    module, x, rope = Attention(32, 4, qk_norm="rms", rope="half"), draw(2, 20, 32).float(), ops.rope_table(torch.arange(20), 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, rope=rope)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x, rope=rope), rtol=0, atol=0.03)


def test_compiled() -> None:
    module, x, rope = Attention(32, 4, qk_norm="rms", rope="half"), draw(2, 20, 32).float(), ops.rope_table(torch.arange(20), 8)
    with torch.no_grad():
        whole = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(x, rope=rope), module(x, rope=rope))
    torch.compiler.reset()
    compiled = torch.compile(module, backend="aot_eager")
    found = [torch.autograd.grad(m(x, rope=rope).square().sum(), list(module.parameters())) for m in (compiled, module)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads: got 5, supported: a divisor of dim 32, or head_dim given"),
        ({"kv_heads": 3}, "kv_heads: got 3, supported: a divisor of the 4 heads"),
        ({"qk_norm": "batch"}, "qk_norm: got 'batch', supported: 'rms', 'layer', None"),
        ({"rope": "2d"}, "rope: got '2d', supported: 'interleaved', 'half', None"),
        ({"impl": "fast"}, "impl: got 'fast', supported: 'fused', 'reference'"),
        ({"cross_dim": 8, "causal": True}, "cross_dim: got 8, supported: None with rope or causal, which cross-attention has not"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Attention(32, **{"heads": 4, **options})
    assert str(caught.value) == message


def test_wrong_inputs() -> None:
    x = draw(1, 3, 32).float()
    with pytest.raises(ValueError, match=r"^context: got \(1, 3, 32\), supported: a tensor where there is a cross_dim, else None$"):
        Attention(32, 4)(x, x)
    with pytest.raises(ValueError, match=r"^rope: got None, supported: a table where the module has a rope, else None$"):
        Attention(32, 4, rope="half")(x)
