from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gan
import tiny_run
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from genfast import models
from genfast.models import DCGANConfig, Discriminator, Generator
from genfast.reference import noise as rng
from genfast.train import AdversarialStep, Objective


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was not stopped."""
    out = tmp_path_factory.mktemp("straight")
    tiny_gan.run(out)
    return out


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, straight: Path) -> None:
    tiny_run.kill_at_random(tiny_gan.__file__, tmp_path / "killed")
    tiny_gan.run(tmp_path / "killed")
    tiny_run.assert_same_bits(straight, tmp_path / "killed")


@pytest.mark.parametrize("stop", [0, 4, 14, 47, 118])
def test_stopped_in_any_phase_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Path, stop: int
) -> None:
    calls, real = 0, AdversarialStep.run

    def failing(self: AdversarialStep, phases: tuple[str, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls > stop:
            raise KeyboardInterrupt
        real(self, phases)

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialStep, "run", failing)
        with pytest.raises(KeyboardInterrupt):
            tiny_gan.run(tmp_path)
    assert not (tmp_path / "ema.safetensors").exists()
    generator, _ = tiny_gan.run(tmp_path)
    tiny_run.assert_same_bits(straight, tmp_path)
    averaged, _ = models.load(straight / "ema.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(averaged.state_dict().values(), generator.state_dict().values(), strict=True))


STYLED: dict[str, Any] = {
    "config": tiny_gan.STYLE,
    "objective": Objective(r1=0.1, path_length=2.0, path_shrink=2, d_every=4, g_every=2),
    "steps": 12,
    "critic_steps": 1,
    "lr": (2e-3, 3e-3),
    "betas": (0.0, 0.99),
}


def test_stylegan2_in_bfloat16_continues_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn noise, mixed styles, lazy phases, two learning rates."""
    tiny_gan.run(tmp_path / "straight", **STYLED)
    calls, real = 0, AdversarialStep.run

    def failing(self: AdversarialStep, phases: tuple[str, ...]) -> None:
        nonlocal calls
        calls += 1
        if calls > 18:
            raise KeyboardInterrupt
        real(self, phases)

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialStep, "run", failing)
        with pytest.raises(KeyboardInterrupt):
            tiny_gan.run(tmp_path / "stopped", **STYLED)
    generator, _ = tiny_gan.run(tmp_path / "stopped", **STYLED)
    tiny_run.assert_same_bits(tmp_path / "straight", tmp_path / "stopped")
    averaged, _ = models.load(tmp_path / "straight" / "ema.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(averaged.state_dict().values(), generator.state_dict().values(), strict=True))


def test_a_run_is_what_its_directory_says(tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(5, 41, 5)]
    assert all({"d_loss", "g_loss", "d_real", "d_fake", "r1", "r2", "gradient_penalty", "path_length"} < row.keys() for row in rows)
    assert {"config.json", "log.jsonl", "loss.png", "checkpoint.safetensors", "checkpoint.safetensors.previous", "ema.safetensors"} == {
        path.name for path in straight.iterdir()
    }
    before = load_file(straight / "checkpoint.safetensors")
    assert before["step/adam/generator/layers.1.conv.weight/step"] == 40 + 20
    assert before["step/adam/discriminator/layers.0.conv.weight/step"] == 80 + 27
    with monkeypatch.context() as patch:
        patch.setattr(AdversarialStep, "run", None)
        assert tiny_gan.run(straight)[1] == rows[-1]  # a finished run returns at once
    with pytest.raises(ValueError, match=r"lr: got 0.1, but the run in"):
        tiny_gan.run(straight, lr=0.1)


def test_every_draw_belongs_to_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    real = AdversarialStep.load

    def spy(self: AdversarialStep, **inputs: Tensor) -> None:
        for name, value in inputs.items():
            seen.setdefault(name, []).extend(value.clone())
        real(self, **inputs)

    monkeypatch.setattr(AdversarialStep, "load", spy)
    tiny_gan.run(tmp_path, steps=4, seed=3)
    assert {name: len(values) for name, values in seen.items()} == {
        "real": 64, "z_d": 64, "mix": 64, "z_g": 32, "z_path": 16, "noise_path": 16
    }  # fmt: skip
    seed = torch.tensor([3 * 2**40 + 37])
    assert torch.equal(seen["z_d"][37], rng.normal(seed, (1, 4), stream=3)[0])
    assert seen["mix"][37] == rng.uniform(seed, (1, 1), stream=1)
    later = torch.tensor([3 * 2**40 + 40 + 5])  # sample 5 of the generator's third step has the number of the discriminator's sixth update
    assert torch.equal(seen["z_g"][2 * 8 + 5], rng.normal(later, (1, 4), stream=3, draw=1)[0])
    assert torch.equal(seen["z_path"][8 + 5], rng.normal(later, (1, 4), stream=3, draw=2)[0])
    assert torch.equal(seen["noise_path"][8 + 5], rng.normal(later, (1, 1, 8, 8), stream=2)[0])
    images, _ = tiny_run.pictures()
    where = [int(np.argmin([np.abs(x[0].numpy() - (image / 127.5 - 1)).max() for image in images])) for x in seen["real"]]
    assert sorted(where[:50]) == [*range(50)] and where[:50] != [*range(50)] and where[50:] != where[:14]

    seen.clear()  # a generator with draws of its own gets the seeds; half of them serve the path length
    tiny_gan.run(tmp_path / "styled", **{**STYLED, "steps": 2}, seed=3)
    seeds = torch.stack(seen["seeds"])
    assert torch.equal(seeds, 3 * 2**40 + torch.arange(16)) and len(seen["z_path"]) == len(seen["noise_path"]) == 4
    assert torch.equal(seen["z_path"][3], rng.normal(seeds[3:4], (1, 4), stream=3, draw=2)[0])


@pytest.mark.parametrize(
    ("config", "changes", "pictures"),
    [
        (tiny_gan.CONFIG, {"objective": Objective(r1=0.01), "lr": 5e-3, "steps": 150}, (100, 150)),
        (tiny_gan.STYLE, {**STYLED, "lr": (1e-2, 1e-2), "steps": 60}, (60,)),
    ],
    ids=["dcgan", "stylegan2-bfloat16"],
)
def test_training_moves_the_generator_towards_the_data(
    tmp_path: Path, config: Any, changes: dict[str, Any], pictures: tuple[int, ...]
) -> None:
    """Bars: the mean picture of 64 samples comes nearer to that of the data."""
    images, _ = tiny_run.pictures()
    mean, z = torch.from_numpy(images.mean(0) / 127.5 - 1), rng.normal(torch.arange(64), (64, 4))
    torch.manual_seed(0)

    def distance(generator: nn.Module) -> float:
        with torch.no_grad():
            return (generator.eval()(z).mean((0, 1)) - mean).square().mean().item()

    family = models.FAMILIES["stylegan2" if config is tiny_gan.STYLE else "dcgan"]
    before = distance(family.build(config))
    generator, _ = tiny_gan.run(tmp_path, **{**changes, "config": config, "critic_steps": 1, "ema": 0.2, "sample_every": 100})
    after = distance(generator)
    assert after < 0.2 * before
    assert {path.name for path in tmp_path.glob("*.png")} == {"loss.png", *(f"samples-{step:06d}.png" for step in pictures)}


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"step 4: .* is not finite; .* keeps the last good state"):
        tiny_gan.run(tmp_path, lr=1e30, log_every=5, checkpoint_every=5)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps: got 0, supported: an integer from 1"),
        ({"critic_steps": 0}, r"critic_steps: got 0"),
        ({"seed": -1}, r"seed: got -1"),
        ({"ema": 0.9}, r"ema: got 0.9"),
        ({"capture": True}, r"capture: got True on 'cpu'"),
    ],
)
def test_bad_arguments_are_sentences_and_nothing_is_written(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_gan.run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "cosine"}, "loss: got 'cosine', supported: 'logistic', 'hinge', 'wgan', 'lsgan', 'relativistic'"),
        ({"r1": -1.0}, "r1: got -1.0, supported: a finite number of at least 0"),
        ({"d_every": 0}, "d_every: got 0, supported: an integer of at least 1"),
        ({"path_decay": 0.0}, "path_decay: got 0.0"),
    ],
)
def test_bad_objectives_are_sentences(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [8, 24, 28, 32, 40, 64])
def test_dcgan_has_the_shapes_it_promises(size: int, tmp_path: Path) -> None:
    config = DCGANConfig(size=size, image_channels=3, latent=5, channels=2)
    generator, discriminator = Generator(config), Discriminator(config)
    x = generator(torch.randn(3, 5))
    assert x.shape == (3, 3, size, size) and x.abs().max() <= 1 and discriminator(x).shape == (3,)
    models.save(generator, tmp_path / "g.safetensors", data="none")
    again, about = models.load(tmp_path / "g.safetensors")
    assert about == {"data": "none"} and again.config == config
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), generator.state_dict().values(), strict=True))


def test_dcgan_refuses_what_it_cannot_make(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size: got 36, supported: 4, 5, 6 or 7 times a power of 2"):
        DCGANConfig(size=36)
    with pytest.raises(ValueError, match=r"z: got shape \(2, 3\), supported: \(B, 4\)"):
        Generator(tiny_gan.CONFIG)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 8, 7\), supported: \(B, 1, 8, 8\)"):
        Discriminator(tiny_gan.CONFIG)(torch.zeros(2, 1, 8, 7))
