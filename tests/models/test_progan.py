"""Progressive growing: the networks written out at every stage, the moments between two sides, and a run that is stopped anywhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_gan
import tiny_run
import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import models
from genfast.models import progan
from genfast.models.progan import ProGANConfig
from genfast.train import Objective, Run

CONFIG = ProGANConfig(size=16, image_channels=2, latent=5, channel_base=64, channel_max=6)
# Stage: (number of the largest side in use, its share of the picture).
STAGES = {0.0: (0, 1.0), 0.5: (1, 0.5), 0.9: (1, 0.9), 1.0: (1, 1.0), 1.25: (2, 0.25), 2.0: (2, 1.0)}
SMALL = ProGANConfig(size=8, image_channels=1, latent=4, channel_base=32, channel_max=4)


def networks(impl: str = "fused") -> tuple[Any, Any]:
    torch.manual_seed(0)
    pair = progan.Generator(CONFIG, impl).double(), progan.Discriminator(CONFIG, impl).double()
    with torch.no_grad():
        for parameter in [p for network in pair for p in network.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pair


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def convolved(layer: Any, x: Tensor, act: bool = True) -> Tensor:
    weight = layer.weight / math.sqrt(layer.weight[0].numel())
    y = F.conv2d(x, weight, layer.bias, padding=weight.shape[-1] // 2)
    return F.leaky_relu(y, 0.2) * math.sqrt(2) if act else y


def linear(layer: Any, x: Tensor, act: bool) -> Tensor:
    y = x @ layer.weight.T / math.sqrt(x.shape[1]) + layer.bias
    return F.leaky_relu(y, 0.2) * math.sqrt(2) if act else y


def enlarged(x: Tensor, times: int = 2) -> Tensor:
    return x.repeat_interleave(times, 2).repeat_interleave(times, 3)


def reduced(x: Tensor, times: int = 2) -> Tensor:
    return x.unflatten(3, (-1, times)).mean(4).unflatten(2, (-1, times)).mean(3)


def literal_generator(g: Any, z: Tensor, level: int, share: float) -> Tensor:
    x = normed(linear(g.first, normed(z), True).reshape(len(z), -1, 4, 4))
    x = normed(convolved(g.blocks[0][0], x))
    image = convolved(g.to_images[0], x, False)
    for number in range(1, level + 1):
        before, x = image, enlarged(x)
        x = normed(convolved(g.blocks[number][2], normed(convolved(g.blocks[number][0], x))))
        image = convolved(g.to_images[number], x, False)
        if number == level:
            image = share * image + (1 - share) * enlarged(before)
    return enlarged(image, 16 // image.shape[-1])


def literal_discriminator(d: Any, x: Tensor, level: int, share: float) -> Tensor:
    image = reduced(x, 16 // 4 // 2**level)
    y = convolved(d.from_images[level], image)
    for number in range(level, 0, -1):
        y = reduced(convolved(d.blocks[number - 1][1], convolved(d.blocks[number - 1][0], y)))
        if number == level:
            y = share * y + (1 - share) * convolved(d.from_images[number - 1], reduced(image))
    groups = y.reshape(4, -1, *y.shape[1:])  # groups of four samples
    spread = (groups.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3)).repeat(4).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    y = convolved(d.last, torch.cat([y, spread], 1))
    return linear(d.logit, linear(d.hidden, y.flatten(1), True), False)[:, 0]


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_the_network_written_out(impl: str, stage: float) -> None:
    g, d = networks(impl)
    level, share = STAGES[stage]
    g.stage = d.stage = stage
    z, x = drawn(8, 5), drawn(8, 2, 16, 16)
    torch.testing.assert_close(g(z), literal_generator(g, z, level, share))
    torch.testing.assert_close(d(x), literal_discriminator(d, x, level, share))


def test_growth_over_a_run() -> None:
    """Three sides in four equal parts of the first 60%: 4 alone, 8 fading in, 8 with 4, 16 fading in, and then all of it."""
    config = ProGANConfig(size=16)
    at = [config.stage(progress) for progress in (0, 0.14, 0.15, 0.225, 0.3, 0.44, 0.45, 0.525, 0.6, 0.8, 1.0)]
    assert at == pytest.approx([0, 0, 0, 0.5, 1, 1, 1, 1.5, 2, 2, 2])
    assert progan.Generator(config).stage == 2  # a network that nobody grows, such as one from a file


def test_a_side_comes_in_without_a_jump() -> None:
    g, d = networks()
    z, x = drawn(8, 5), drawn(8, 2, 16, 16)
    found = []
    for stage in (1.0, 1.0 + 1e-9):
        g.stage = d.stage = stage
        found.append((g(z), d(x), d.softened(x)))
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-6)


def test_real_images_show_what_the_generator_can_show() -> None:
    _, d = networks()
    x = drawn(4, 2, 16, 16)
    for stage, expected in {2.0: x, 1.0: enlarged(reduced(x)), 1.25: 0.25 * x + 0.75 * enlarged(reduced(x))}.items():
        d.stage = stage
        torch.testing.assert_close(d.softened(x), expected)


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_growth_survives_a_stop_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    changes: dict[str, Any] = {
        "config": SMALL, "steps": 10, "objective": Objective("wgan", gradient_penalty=10.0), "critic_steps": 1, "checkpoint_every": 1
    }  # fmt: skip
    net, _ = tiny_gan.run(tmp_path / "straight", **changes)
    stages: list[float] = []
    real, grow = Run.due, progan.Generator.grow

    def noting(self: progan.Generator, progress: float) -> None:
        grow(self, progress)
        stages.append(self.stage)

    def stopping(self: Run, every: int) -> bool:
        if self.step == stop:
            raise KeyboardInterrupt
        return real(self, every)

    monkeypatch.setattr(progan.Generator, "grow", noting)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "due", stopping)
        with pytest.raises(KeyboardInterrupt):
            tiny_gan.run(tmp_path / "stopped", **changes)
    tiny_gan.run(tmp_path / "stopped", **changes)
    tiny_run.assert_same_bits(tmp_path / "straight", tmp_path / "stopped")
    assert len({*stages}) > 2 and stages[-1] == 1
    loaded, _ = models.load(tmp_path / "straight" / "ema.safetensors")
    assert loaded.stage == 1.0 and torch.equal(loaded(torch.ones(1, 4)), net.eval()(torch.ones(1, 4)))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="growth: got 0, supported: a share above 0 and up to 1"):
        ProGANConfig(growth=0)
    tiny_gan.run(tmp_path, config=SMALL, steps=2, objective=Objective())
    with pytest.raises(ValueError, match=r"steps: got 3, but the run in .* has 2, and its steps depend on that number"):
        tiny_gan.run(tmp_path, config=SMALL, steps=3, objective=Objective())
