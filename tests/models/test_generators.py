"""The GAN families against networks written out, published sizes, and the promises of their docstrings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from genfast import models
from genfast.models import r3gan, stylegan2
from genfast.models.dcgan import DCGANConfig
from genfast.models.families import FAMILIES
from genfast.models.r3gan import R3GANConfig
from genfast.models.stylegan2 import StyleGAN2Config
from genfast.nn.style import EqualizedConv2d, ModulatedConv2d
from genfast.reference import noise as rng

TINY = {
    "dcgan": DCGANConfig(size=16, image_channels=3, latent=6, channels=4),
    "stylegan2": StyleGAN2Config(size=16, latent=6, channel_base=96, channel_max=10, mapping_layers=2),
    "r3gan": R3GANConfig(size=16, latent=6, channel_base=128, channel_max=12, group_channels=4, blocks=1),
}


def pair(name: str, impl: str = "fused", **changes: Any) -> tuple[nn.Module, nn.Module]:
    """Generator and discriminator of a tiny size, float64, nothing in them zero."""
    config = replace(TINY[name], **changes)
    torch.manual_seed(0)
    networks = FAMILIES[name].build(config, impl).double(), FAMILIES[name].critic(config, impl).double()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in [p for network in networks for p in network.parameters()]:
            p.add_(0.1 * torch.randn_like(p))
    return networks


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(name: str, batch: int = 4) -> tuple[Any, ...]:
    z = drawn(batch, 6)
    return (z, torch.arange(batch) + 7, 1) if name == "stylegan2" else (z,)


# ---- sizes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channel_base", "parameters", "gflop"),
    # Parameters: the tables that NVIDIA's training prints. Floating point operations an image, filters included: counted by hand.
    [(16384, (24_767_458, 24_001_089), (30.1, 31.3)), (32768, (30_034_338, 28_864_129), (90.7, None))],
)
def test_stylegan2_has_the_published_size(channel_base: int, parameters: tuple[int, int], gflop: tuple[float, float | None]) -> None:
    config = StyleGAN2Config(size=256, channel_base=channel_base)
    with FakeTensorMode():
        networks = stylegan2.Generator(config), stylegan2.Discriminator(config)
        assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == parameters
        for network, x, expected in zip(networks, (torch.randn(1, 512), torch.randn(1, 3, 256, 256)), gflop, strict=True):
            with FlopCounterMode(display=False) as counter:
                network(x)
            if expected is not None:
                assert counter.get_total_flops() / 1e9 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("size", [8, 32, 64, 1024])
def test_stylegan2_makes_every_size(size: int) -> None:
    config = StyleGAN2Config(size=size, channel_base=4 * size, channel_max=8, latent=4, mapping_layers=1)
    assert config.styles == 2 * int(math.log2(size)) - 2
    with FakeTensorMode():
        x = stylegan2.Generator(config)(torch.randn(2, 4), torch.arange(2))
        assert x.shape == (2, 3, size, size) and stylegan2.Discriminator(config)(x).shape == (2,)


# ---- values ---------------------------------------------------------------------------------------------------------------------


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def smoothed(x: Tensor, before: int, after: int, gain: float = 1.0, taps: tuple[int, ...] = (1, 3, 3, 1)) -> Tensor:
    line = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    kernel = gain * torch.outer(line, line).expand(x.shape[1], 1, len(taps), len(taps))
    return F.conv2d(F.pad(x, (before, after, before, after)), kernel, groups=x.shape[1])


def spread_out(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    wide[:, :, ::2, ::2] = x
    return wide


def linear(layer: Any, x: Tensor, lr: float = 1.0) -> Tensor:
    return x @ layer.weight.T * (lr / math.sqrt(x.shape[1])) + lr * layer.bias


def modulated(layer: ModulatedConv2d, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
    """A sample after the other, by weights of its own (Karras et al. 2020, equations 1 to 3)."""
    out = []
    for i in range(len(x)):
        kernel = layer.weight * linear(layer.affine, w)[i, None, :, None, None]
        if noise is None:
            y = F.conv2d(x[i : i + 1], kernel / math.sqrt(x.shape[1])) + layer.bias[:, None, None]
            out.append(y)
            continue
        kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        y = smoothed(spread_out(x[i : i + 1]), 3, 2, 4) if layer.up == 2 else F.pad(x[i : i + 1], (1, 1, 1, 1))
        y = F.conv2d(y, kernel) + layer.noise_strength * noise[i]
        out.append(lrelu(y + layer.bias[:, None, None]))
    return torch.cat(out)


def literal_generator(g: stylegan2.Generator, z: Tensor, seeds: Tensor, draw: int) -> Tensor:
    config = g.config
    both = []
    for latents in (z, rng.normal(seeds, z.shape, stream=3, draw=draw + 4).double()):
        w = latents / (latents.square().mean(1, keepdim=True) + 1e-8).sqrt()
        for layer in g.mapping.layers:
            w = lrelu(linear(layer, w, 0.01))
        both.append(w)
    u = rng.uniform(seeds, (len(z), 2), stream=3, draw=draw + 8).tolist()
    styles = torch.stack([both[0]] * config.styles, 1)
    for i, (mixes, where) in enumerate(u):
        if mixes < config.mixing:
            styles[i, 1 + int(where * (config.styles - 1)) :] = both[1][i]
    x, image, number = g.synthesis.constant.expand(len(z), -1, -1, -1), None, 0
    for side, to_image in zip((4, 8, 16), g.synthesis.to_images, strict=True):
        for _ in range(1 if side == 4 else 2):
            noise = rng.normal(seeds, (len(z), 1, side, side), stream=3, draw=draw + 12 + 4 * number).double()
            x = modulated(g.synthesis.convolutions[number], x, styles[:, number], noise)
            number += 1
        picture = modulated(to_image, x, styles[:, number], None)
        image = picture if image is None else smoothed(spread_out(image), 2, 1, 4) + picture
    assert image is not None
    return image


def equalized(layer: EqualizedConv2d, x: Tensor) -> Tensor:
    kernel = layer.weight / math.sqrt(layer.weight[0].numel())
    y = F.conv2d(x, kernel, stride=layer.down if kernel.shape[-1] > 1 else 1)
    return y if layer.bias is None else lrelu(y + layer.bias[:, None, None])


def literal_discriminator(d: stylegan2.Discriminator, x: Tensor) -> Tensor:
    x = equalized(d.from_image, x)
    for block in d.blocks:
        skip = equalized(block.skip, smoothed(x, 1, 1)[:, :, ::2, ::2])
        y = equalized(block.conv1, smoothed(equalized(block.conv0, F.pad(x, (1, 1, 1, 1))), 2, 2))
        x = (y + skip) / math.sqrt(2)
    groups = [range(i, len(x), len(x) // 4) for i in range(len(x) // 4)]
    spread = torch.zeros(len(x), 1, 4, 4, dtype=torch.float64)
    for group in groups:
        rows = list(group)
        spread[rows] = (x[rows].var(0, correction=0) + 1e-8).sqrt().mean()
    x = equalized(d.last, F.pad(torch.cat([x, spread], 1), (1, 1, 1, 1)))
    return linear(d.logit, lrelu(linear(d.hidden, x.flatten(1))))[:, 0]


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_stylegan2_equals_the_network_written_out(impl: str) -> None:
    g, d = pair("stylegan2", impl, mixing=0.6)
    z, seeds = drawn(8, 6), torch.arange(8) + 3
    x = g(z, seeds, 2)
    torch.testing.assert_close(x, literal_generator(g, z, seeds, 2), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(d(x), literal_discriminator(d, x), rtol=1e-9, atol=1e-9)


def residual(blocks: Any, x: Tensor) -> Tensor:
    def leaky(y: Tensor, bias: Tensor) -> Tensor:
        y = y + bias[:, None, None]
        return torch.where(y > 0, y, 0.2 * y)

    for block in blocks:
        y = leaky(F.conv2d(x, block.weight1), block.bias1)
        groups = zip(y.split(4, 1), block.weight2.split(4), strict=True)
        y = leaky(torch.cat([F.conv2d(part, kernel, padding=1) for part, kernel in groups], 1), block.bias2)
        x = x + F.conv2d(y, block.weight3)
    return x


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_r3gan_equals_the_network_written_out(impl: str) -> None:
    g, d = pair("r3gan", impl, blocks=2)
    z = drawn(3, 6)
    x = residual(g.sides[0], torch.einsum("cyx,cl,bl->bcyx", g.basis, g.latent, z))
    for resample, *blocks in g.sides[1:]:
        x = x if resample.weight is None else F.conv2d(x, resample.weight)
        x = residual(blocks, smoothed(spread_out(x), 2, 0, 4, (1, 2, 1)))
    x = F.conv2d(x, g.weight)
    torch.testing.assert_close(g(z), x, rtol=1e-9, atol=1e-9)
    y = F.conv2d(x, d.weight)
    for *blocks, resample in d.sides[:-1]:
        y = smoothed(residual(blocks, y), 1, 0, 1, (1, 2, 1))[:, :, ::2, ::2]
        y = y if resample.weight is None else F.conv2d(y, resample.weight)
    y = torch.einsum("bcyx,cyx,c->b", residual(d.sides[-1], y), d.basis[:, 0], d.logit[0])
    torch.testing.assert_close(d(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TINY)
def test_fused_equals_reference_with_its_gradients(name: str) -> None:
    results = []
    for impl in ("fused", "reference"):
        g, d = pair(name, impl)
        parameters = [*g.parameters(), *d.parameters()]
        x = g(*arguments(name))
        logits = d(x)
        (r1,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        results.append([x, logits, *torch.autograd.grad(logits.sum() + r1.square().sum(), parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())


@pytest.mark.parametrize("name", ["stylegan2", "r3gan"])
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    g, d = pair(name, **({"stddev_group": 1} if name == "stylegan2" else {}))
    z, *more = arguments(name, 5)
    x = g(z, *more)
    alone = [g(z[i : i + 1], *((more[0][i : i + 1], more[1]) if more else ())) for i in range(5)]
    torch.testing.assert_close(x, torch.cat(alone), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(d(x), torch.cat([d(one) for one in alone]), rtol=1e-11, atol=1e-11)


def test_draws_truncation_and_average() -> None:
    g, _ = pair("stylegan2")
    z, seeds, _ = arguments("stylegan2")
    assert not torch.equal(g(z, seeds, 0), g(z, seeds, 1)) and torch.equal(g(z), g(z))
    mapping = g.mapping
    w = mapping(z)
    assert torch.equal(w, w[:, :1].expand_as(w))
    mapping.average.zero_()
    mapping(z)
    torch.testing.assert_close(mapping.average, 0.005 * w[:, 0].mean(0), rtol=1e-12, atol=1e-12)
    mapping.eval()
    torch.testing.assert_close(mapping(z, truncation=0.25), torch.lerp(mapping.average, w, 0.25), rtol=1e-12, atol=1e-12)


def test_an_r3gan_block_starts_as_the_identity() -> None:
    """And its gradients in the last weights do not vanish, so it does not stay there."""
    torch.manual_seed(0)
    x, block = torch.randn(2, 32, 8, 8), r3gan.ResidualBlock(32)
    assert torch.equal(block(x), x)
    assert torch.autograd.grad(block(x).square().sum(), block.weight3)[0].abs().min() > 0
    assert (block.weight2.shape, block.groups) == ((64, 16, 3, 3), 4)
    config = R3GANConfig(size=32, channel_base=1024, blocks=4)
    assert config.residual_gain == pytest.approx(16**-0.25)
    weight = r3gan.Generator(config).sides[0][0].weight1
    assert weight.std().item() == pytest.approx(0.5 * math.sqrt(2 / 1.04) / math.sqrt(256), rel=0.05)


# ---- precision ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "body"), [("dcgan", "bfloat16"), ("r3gan", "bfloat16"), ("stylegan2", "bfloat16"), ("stylegan2", "float16")]
)
def test_a_narrow_body_rounds_as_the_reference_does(name: str, body: str) -> None:
    """Both against float64: the fused networks err no more than twice as much, in every image and logit."""
    z, *more = arguments(name)
    exact, results = pair(name)[0](z, *more), {}
    for impl in ("fused", "reference"):
        g, d = (network.float() for network in pair(name, impl, body=body))
        x = g(z.float(), *more)
        assert (
            x.dtype == torch.float32 and d(x).dtype == torch.float32 and not torch.equal(x, pair(name, impl)[0].float()(z.float(), *more))
        )
        results[impl] = (x.double() - exact).abs().max().item()
    scale = exact.abs().max().item()
    assert results["fused"] <= 2 * results["reference"] + 4 * torch.finfo(getattr(torch, body)).eps * scale
    assert results["reference"] < 0.1 * scale


def test_only_the_largest_sides_are_narrow() -> None:
    config = replace(TINY["stylegan2"], size=32, channel_base=192, body="bfloat16", body_sides=2)
    g, d = stylegan2.Generator(config), stylegan2.Discriminator(config)
    seen: dict[int, set[torch.dtype]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.setdefault(output.shape[-1] * (getattr(module, "down", 1)), set()).add(output.dtype)

    for module in [*g.modules(), *d.modules()]:
        if isinstance(module, EqualizedConv2d | ModulatedConv2d):
            module.register_forward_hook(note)
    d(g(torch.randn(4, 6)))
    narrow, wide = {torch.bfloat16}, {torch.float32}
    assert seen == {4: wide, 8: wide, 16: narrow, 32: narrow}
    assert all(p.dtype == torch.float32 for p in [*g.parameters(), *d.parameters()])


# ---- files and refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_file_brings_the_generator_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator = FAMILIES[name].build(TINY[name])
    models.save(generator, tmp_path / "g.safetensors", data="none")
    again, about = models.load(tmp_path / "g.safetensors", impl="reference")
    assert about == {"data": "none"} and again.config == TINY[name] and type(again) is type(generator) and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), generator.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (StyleGAN2Config, {"size": 48}, "size: got 48, supported: a power of 2 from 8 to 1024"),
        (StyleGAN2Config, {"size": 2048}, "size: got 2048"),
        (StyleGAN2Config, {"body": "int8"}, "body: got 'int8', supported: 'float32', 'bfloat16', 'float16'"),
        (StyleGAN2Config, {"channel_base": 128}, "channel_base: got 128, supported: size, 256, or more"),
        (StyleGAN2Config, {"mixing": 1.5}, "mixing: got 1.5, supported: a number from 0 to 1"),
        (StyleGAN2Config, {"mapping_layers": 0}, "mapping_layers: got 0"),
        (R3GANConfig, {"group_channels": 7}, "group_channels: got 7, supported: a divisor of 768"),
        (R3GANConfig, {"blocks": 0}, "blocks: got 0"),
        (DCGANConfig, {"body": "int8"}, "body: got 'int8', supported: 'float32', 'bfloat16', 'float16'"),
    ],
)
def test_bad_configurations_are_sentences(config: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize("name", TINY)
def test_bad_inputs_are_sentences(name: str) -> None:
    g, d = pair(name)
    with pytest.raises(ValueError, match=r"z: got shape \(2, 3\), supported: \(B, 6\)"):
        g(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 16, 16\), supported: \(B, 3, 16, 16\)"):
        d(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="impl: got 'quick', supported: 'fused', 'reference'"):
        FAMILIES[name].build(TINY[name], "quick")
