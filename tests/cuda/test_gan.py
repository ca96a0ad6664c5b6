"""On a GPU: a captured adversarial step equals the eager one, phase by phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from genfast.models.dcgan import DCGANConfig
from genfast.models.families import FAMILIES
from genfast.models.r3gan import R3GANConfig
from genfast.models.stylegan2 import StyleGAN2Config
from genfast.train.adversarial import AdversarialStep, Objective

pytestmark = pytest.mark.cuda
LATENT = 16
CASES = [
    ("dcgan", DCGANConfig(latent=LATENT, channels=8, discriminator_norm=False), Objective("relativistic", r1=0.1, r2=0.1)),
    ("dcgan", DCGANConfig(latent=LATENT, channels=8, discriminator_norm=False), Objective("wgan", gradient_penalty=10.0)),
    (
        "stylegan2",
        StyleGAN2Config(size=32, image_channels=1, latent=LATENT, channel_base=512, channel_max=32, mapping_layers=2),
        Objective("logistic", r1=0.5, path_length=2.0, path_shrink=2, d_every=2, g_every=3),
    ),
    (
        "r3gan",
        R3GANConfig(size=32, image_channels=1, latent=LATENT, channel_base=512, channel_max=32),
        Objective("relativistic", r1=0.1, r2=0.1),
    ),
]


@pytest.mark.parametrize(("family", "config", "objective"), CASES, ids=lambda value: getattr(value, "loss", None))
def test_a_captured_step_equals_the_eager_one(family: str, config: Any, objective: Objective) -> None:
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    shape, states = (8, 1, config.size, config.size), []
    try:
        for capture in (False, True):
            torch.manual_seed(0)
            g, d = (network.cuda().double() for network in FAMILIES[family].networks(config))
            step = AdversarialStep(g, d, shape, LATENT, objective, capture=capture)
            draw = torch.Generator().manual_seed(1)
            for k in range(9):
                given = {name: torch.rand(t.shape, generator=draw) for name, t in step.inputs.items()}
                step.load(**{name: (2**40 * t).long() if name == "seeds" else t for name, t in given.items()})
                for lr in step.lr.values():
                    lr.fill_(1e-3 / (1 + k))
                step.ema_weight.fill_(1 / (1 + k))
                step.run(objective.discriminator_phases(k))
                step.run(objective.generator_phases(k))
            states.append(({**step.state_dict()}, step.take_means()))
    finally:
        torch.backends.cudnn.deterministic = before
    (eager, means), (captured, captured_means) = states
    assert eager.keys() == captured.keys()
    for name, tensor in eager.items():
        torch.testing.assert_close(captured[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert captured_means == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize(("family", "config", "objective"), CASES[2:], ids=lambda value: getattr(value, "loss", None))
def test_a_captured_step_in_bfloat16_learns(family: str, config: Any, objective: Objective) -> None:
    """Grey pictures: the discriminator tells them from a fresh generator's, and nothing overflows."""
    torch.manual_seed(0)
    g, d = (network.cuda() for network in FAMILIES[family].networks(replace(config, body="bfloat16")))
    step = AdversarialStep(g, d, (8, 1, config.size, config.size), LATENT, objective, lr=1e-3, capture=True)
    for k in range(40):  # the real pictures stay zero
        step.load(**{name: torch.randn(t.shape) for name, t in step.inputs.items() if name.startswith("z")})
        step.run(objective.discriminator_phases(k))
        if k == 19:
            step.take_means()
    means = step.take_means()
    assert means["d_real"] > means["d_fake"] + 0.5
    assert all(t.isfinite().all() for t in step.state_dict().values())
