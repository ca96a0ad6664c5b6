"""Trainers take any torch module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from torch import Tensor, nn

from genfast import models
from genfast.data import ArraySamples
from genfast.models.families import FAMILIES
from genfast.models.files import read
from genfast.train import DiffusionTraining, GANTraining, Run, train_diffusion, train_gan

pytestmark = pytest.mark.filterwarnings("ignore:stopped after")
OPTIONS = DiffusionTraining(steps=6, batch=4, warmup=2)


def run(out: Path, **options: Any) -> Run:
    return Run(out, checkpoint_every=2, validate_every=3, progress=False, **options)


def test_a_convolution_trains_behind_a_call_and_continues_to_the_same_bits(tmp_path: Path) -> None:
    def train(out: Path, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Conv2d(1, 1, 3, padding=1)
        samples = ArraySamples(tiny_run.pictures()[0])
        train_diffusion(net, samples, OPTIONS, run(out, **options), validation=samples, call=lambda net, x, t, y: net(x))
        return net

    before = nn.Conv2d(1, 1, 3, padding=1)
    straight = train(tmp_path / "straight", sample_every=6)
    for _ in range(6):
        stopped = train(tmp_path / "stopped", max_minutes=1e-9)
    tiny_run.assert_same_bits(tmp_path / "straight", tmp_path / "stopped")
    assert torch.equal(straight.weight, stopped.weight) and not torch.equal(straight.weight, before.weight)
    tensors, words = read(tmp_path / "straight" / "ema.safetensors")
    assert torch.equal(tensors["weight"], straight.weight) and words["family"] is None and words["about"]["prediction"] == "v"
    with pytest.raises(ValueError, match=rf"which holds a network of your own, supported: networks of {', '.join(FAMILIES)}"):
        models.load(tmp_path / "straight" / "ema.safetensors")
    assert (tmp_path / "straight" / "samples-000006.png").exists()


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_diffusers_networks_train_as_they_are(tmp_path: Path, kind: str) -> None:
    import diffusers

    torch.manual_seed(0)
    if kind == "unet":
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
        net = diffusers.UNet2DModel(8, 1, 1, norm_num_groups=4, layers_per_block=1, num_class_embeds=4, **blocks)
    else:
        shape = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "norm_num_groups": 4}
        net = diffusers.DiTTransformer2DModel(in_channels=1, sample_size=8, num_embeds_ada_norm=1000, **shape)
        samples = ArraySamples(tiny_run.pictures()[0], np.zeros(50, np.int64), [str(i) for i in range(1000)])
    samples = tiny_run.samples() if kind == "unet" else samples
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
    row = train_diffusion(net, samples, OPTIONS, run(tmp_path), validation=samples)
    assert row["validation_loss"] > 0 and all(y.dtype == torch.int64 for y in seen)
    with pytest.raises(ValueError, match=r"network\.\w+: got"):  # another configuration is another run
        train_diffusion(nn.Sequential(net), samples, OPTIONS, run(tmp_path), call=lambda net, x, t, y: net[0](x, t, y).sample)


def test_batch_norms_and_frozen_parameters_are_averaged_and_restored(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
            self.layers[0].requires_grad_(False)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            y: Tensor = self.layers(x) * (1 + t[:, None, None, None] / 1000)
            return y

    def train(out: Path, **options: Any) -> Own:
        torch.manual_seed(0)
        net = Own()
        train_diffusion(net, ArraySamples(tiny_run.pictures()[0]), OPTIONS, run(out, **options))
        return net

    straight = train(tmp_path / "a")
    for _ in range(6):
        stopped = train(tmp_path / "b", max_minutes=1e-9)
    tiny_run.assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), stopped.state_dict().values(), strict=True))
    assert straight.layers[1].num_batches_tracked == 6 and straight.layers[1].running_mean.any()


def test_adversaries_of_your_own(tmp_path: Path) -> None:
    def train(out: Path, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))
        discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        samples = ArraySamples(tiny_run.pictures()[0])
        train_gan(generator, discriminator, samples, GANTraining(steps=5, batch=4, latent_size=3), run(out, **options))
        return generator

    train(tmp_path / "a", sample_every=5)
    for _ in range(5):
        train(tmp_path / "b", max_minutes=1e-9)
    tiny_run.assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "samples-000005.png").exists()
