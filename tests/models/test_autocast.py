"""The networks, ConvBlock and the modulated convolution under torch.autocast: convolutions in its dtype, gradients in the parameters'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import ops
from genfast.models.dcgan import DCGANConfig
from genfast.models.families import FAMILIES
from genfast.models.r3gan import R3GANConfig
from genfast.models.stylegan2 import StyleGAN2Config
from genfast.nn import ConvBlock

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 0.06, torch.float16: 0.02}
CONFIGS: dict[str, Any] = {
    "dcgan": {"size": 16, "channels": 8, "discriminator_norm": False},
    "stylegan2": {"size": 16, "channel_base": 128, "channel_max": 8, "latent": 16, "mapping_layers": 2},
    "r3gan": {"size": 16, "channel_base": 256, "channel_max": 16, "latent": 16, "blocks": 1, "group_channels": 8},
}
CLASSES: dict[str, Any] = {"dcgan": DCGANConfig, "stylegan2": StyleGAN2Config, "r3gan": R3GANConfig}


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert (got - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_networks(family: str, dtype: torch.dtype, impl: str) -> None:
    """Pictures, logits, their gradients and those of R1."""
    torch.manual_seed(0)
    config = CLASSES[family](**CONFIGS[family])
    generator, discriminator = FAMILIES[family].build(config, impl), FAMILIES[family].critic(config, impl)
    z = torch.randn(4, config.latent)
    images, logits = generator.eval()(z), discriminator(generator(z))
    with torch.autocast("cpu", dtype):
        got = generator(z)
        x = images.detach().requires_grad_()
        scores = discriminator(x)
        (penalty,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        fake = discriminator(generator.train()(z))
    assert got.dtype == scores.dtype == torch.float32
    close(got, images, dtype)
    close(scores, logits, dtype)
    (fake.square().sum() + penalty.square().sum()).backward()
    for parameter in (*generator.parameters(), *discriminator.parameters()):
        if parameter.grad is not None:
            assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all()


@pytest.mark.parametrize("residual", [None, torch.float32, "same"], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", ["batch", "group", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_block(dtype: torch.dtype, norm: Any, training: bool, residual: Any) -> None:
    """As torch's modules under autocast, dtype of the result included."""
    torch.manual_seed(0)
    block = ConvBlock(6, 8, norm=norm, norm_groups=4).train(training)
    bias = torch.zeros(8) if block.bias is None else block.bias
    x = torch.randn(3, 6, 8, 8)
    more = None if residual is None else torch.randn(3, 8, 8, 8, dtype=dtype if residual == "same" else residual)
    with torch.autocast("cpu", dtype):
        got = block(x, more)
        y = F.conv2d(x, block.conv.weight, bias, padding=1)
        y = y if block.norm is None else block.norm(y)
        want = F.relu(y if more is None else y + more)
    assert got.dtype == want.dtype
    close(got.float(), want.float(), dtype)
    grads = torch.autograd.grad(got.float().square().sum(), list(block.parameters()))
    assert all(g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("fused", [True, False], ids=["grouped", "dense"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulated_conv2d(dtype: torch.dtype, fused: bool) -> None:
    """As if x came in autocast's dtype: the norms of the weights are not rounded to it."""
    x, weight, styles = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3).requires_grad_(), torch.randn(2, 8).requires_grad_()

    with torch.autocast("cpu", dtype):
        got = ops.modulated_conv2d(x, weight, styles, padding=1, fused_modconv=fused)
    want = ops.modulated_conv2d(x.to(dtype), weight, styles, padding=1, fused_modconv=fused)
    assert got.dtype == dtype and torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(y.float().square().sum(), (weight, styles)) for y in (got, want)), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"up": 2}, {"down": 2}, {"up": 2, "down": 2}], ids=str)
def test_conv2d_resample(options: dict[str, int]) -> None:
    x, weight, f = torch.randn(2, 4, 6, 6), torch.randn(5, 4, 3, 3).requires_grad_(), ops.setup_filter([1, 3, 3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.conv2d_resample(x, weight, f, padding=1, **options)
    assert got.dtype == torch.bfloat16
    want = ops.conv2d_resample(x, weight, f, padding=1, **options)
    close(got.float(), want, torch.bfloat16)
    assert torch.autograd.grad(got.float().sum(), weight)[0].dtype == torch.float32


def test_float64_is_left_alone() -> None:
    block, x = ConvBlock(3, 4).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    want = block.eval()(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), want)
