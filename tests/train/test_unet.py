from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from genfast import models
from genfast.models import UNet, UNetConfig
from genfast.nn import AttentionBlock, TimeEmbedding

SMALL = UNetConfig(channels=(8, 16, 24), blocks=(1, 1, 1), attention=(False, False, True), head_dim=8, num_classes=3)


def awake(net: UNet) -> UNet:
    """Give the weights that start at zero a value, so that every path matters."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize("size", [(28, 28), (8, 12), (4, 4)])
def test_shapes(size: tuple[int, int]) -> None:
    x = torch.randn(3, 1, *size)
    assert awake(UNet(SMALL))(x, torch.tensor([0.0, 10.5, 999.0]), torch.tensor([0, 2, 3])).shape == x.shape


def test_every_parameter_has_a_gradient() -> None:
    net = awake(UNet(SMALL))
    net(torch.randn(3, 1, 28, 28), torch.tensor([0.0, 10.5, 999.0]), torch.tensor([0, 2, 3])).square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()] == []


def test_samples_do_not_see_each_other() -> None:
    net = awake(UNet(SMALL)).double()
    x, t, y = torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.rand(4, dtype=torch.float64) * 999, torch.tensor([0, 1, 2, 3])
    together = net(x, t, y)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)


def test_every_input_matters_and_no_label_is_the_null_label() -> None:
    net = awake(UNet(SMALL))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0])
    base = net(x, t, torch.tensor([0, 1]))
    assert (base - net(x, t + 50, torch.tensor([0, 1]))).abs().max() > 1e-3
    assert (base - net(x, t, torch.tensor([2, 2]))).abs().max() > 1e-3
    torch.testing.assert_close(net(x, t), net(x, t, torch.full((2,), net.null_label)), rtol=0, atol=0)


def test_attention_is_softmax_attention() -> None:
    torch.manual_seed(0)
    layer = AttentionBlock(16, head_dim=8).double()
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    normed = layer.norm(x).flatten(2)  # (B, C, N)
    q, k, v = torch.einsum("oc,bcn->bon", layer.qkv.weight[:, :, 0, 0], normed).add(layer.qkv.bias[None, :, None]).chunk(3, dim=1)
    parts = []
    for head in range(2):
        qh, kh, vh = (z[:, 8 * head : 8 * head + 8] for z in (q, k, v))
        scores = torch.einsum("bdi,bdj->bij", qh, kh) / math.sqrt(8)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append(torch.einsum("bij,bdj->bdi", weights, vh))
    mixed = torch.einsum("oc,bcn->bon", layer.out.weight[:, :, 0, 0], torch.cat(parts, 1)) + layer.out.bias[None, :, None]
    torch.testing.assert_close(layer(x), x + mixed.reshape(x.shape), rtol=1e-12, atol=1e-12)


def test_time_embedding_frequencies() -> None:
    layer = TimeEmbedding(4, width=8, scale=1000.0)
    layer.project = torch.nn.Identity()  # type: ignore[assignment]
    t = 0.25
    angles = [1000 * t * 10000 ** (-i / 4) for i in range(4)]
    expected = torch.tensor([[math.cos(a) for a in angles] + [math.sin(a) for a in angles]])
    torch.testing.assert_close(layer(torch.tensor([t])), expected, rtol=0, atol=1e-4)


def test_save_and_load(tmp_path: Path) -> None:
    net = awake(UNet(SMALL))
    models.save(net, tmp_path / "net.safetensors", prediction="v", classes=["a", "b", "c"])
    again, about = models.load(tmp_path / "net.safetensors")
    assert about == {"prediction": "v", "classes": ["a", "b", "c"]}
    assert again.config == net.config and not again.training
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5.0])
    assert torch.equal(net.eval()(x, t), again(x, t))
    models.save(again, tmp_path / "again.safetensors", **about)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"net.safetensors", "again.safetensors"}
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="which holds no weights saved by genfast"):
        models.load(tmp_path / "other.safetensors")


def test_bad_input_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x: got shape \(1, 1, 6, 8\), supported: \(B, 1, H, W\) with H and W divisible by 4"):
        UNet(SMALL)(torch.zeros(1, 1, 6, 8), torch.zeros(1))
    with pytest.raises(ValueError, match=r"channels, blocks, attention: got 3, 2 and 3 levels"):
        UNetConfig(blocks=(1, 1))
    with pytest.raises(ValueError, match="num_classes=0"):
        UNet(UNetConfig(num_classes=0))(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        models.load(tmp_path / "broken.safetensors")
