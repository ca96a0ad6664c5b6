"""ConvBlock equals the three modules it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfast.nn import ConvBlock


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", ["batch", "group", None])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("transposed", "kernel", "stride"), [(False, 3, 1), (False, 4, 2), (True, 4, 2)])
def test_equals_the_modules(
    transposed: bool, kernel: int, stride: int, residual: bool, norm: str | None, layout: torch.memory_format
) -> None:
    """Values, gradients and running statistics, over two steps of training and one of evaluation."""
    torch.manual_seed(0)
    block = ConvBlock(6, 10, kernel, stride, transposed=transposed, norm=norm, norm_groups=5, act="lrelu").double()  # type: ignore[arg-type]
    module = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = module(6, 10, kernel, stride, 1, bias=norm is None).double()
    normed = nn.BatchNorm2d(10) if norm == "batch" else nn.GroupNorm(5, 10) if norm else nn.Identity()
    plain = nn.Sequential(conv, normed.double())
    state = {"0.weight": block.conv.weight}
    if norm:
        nn.init.normal_(block.norm.weight)
        nn.init.normal_(block.norm.bias)
        state |= {f"1.{name}": t for name, t in block.norm.state_dict().items()}
    else:
        nn.init.normal_(block.bias)
        state["0.bias"] = block.bias
    plain.load_state_dict(state)
    for step in range(3):
        block.train(step < 2)
        plain.train(step < 2)
        x = torch.randn(3, 6, 8, 8, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        more = torch.randn_like(plain.eval()(x)) if residual else None
        plain.train(step < 2)
        got, want = block(x, more), nn.functional.leaky_relu(plain(x) if more is None else plain(x) + more, 0.2)
        assert got.is_contiguous(memory_format=layout)
        dy = torch.randn_like(want)
        ours = torch.autograd.grad(got, [x, *block.parameters()], dy)
        theirs = torch.autograd.grad(want, [x, *plain.parameters()], dy)
        ours = sorted(ours, key=lambda t: (t.shape, t.flatten()[0].item()))
        theirs = sorted(theirs, key=lambda t: (t.shape, t.flatten()[0].item()))
        for a, b in zip((got, *ours), (want, *theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        for a, b in zip(block.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm: got 'layer', supported: 'batch', 'group' or None"):
        ConvBlock(3, 4, norm="layer")  # type: ignore[arg-type]
