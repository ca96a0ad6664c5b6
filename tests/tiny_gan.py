"""An adversarial run small enough to be killed and continued many times: ``python tiny_gan.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny_run
import torch
from torch import nn

from genfast.models import DCGANConfig
from genfast.models.families import FAMILIES
from genfast.models.stylegan2 import StyleGAN2Config
from genfast.train import GANTraining, Objective, Run, train_gan

CONFIG = DCGANConfig(size=8, latent=4, channels=6, discriminator_norm=False)
# Everything there is: a lazy penalty of each kind, lazy path lengths.
OBJECTIVE = Objective("relativistic", r1=0.1, r2=0.1, gradient_penalty=0.1, path_length=0.5, d_every=3, g_every=2)
STYLE = StyleGAN2Config(size=8, image_channels=1, latent=4, channel_base=64, channel_max=8, mapping_layers=2, body="bfloat16")
STEPS = 40


def run(out: Path, config: DCGANConfig | StyleGAN2Config = CONFIG, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = next(family for family in FAMILIES.values() if isinstance(config, family.config))
    generator, discriminator = family.build(config), family.critic(config)
    values: dict[str, Any] = {
        "steps": STEPS, "batch": 8, "checkpoint_every": 4, "log_every": 5, "critic_steps": 2, "objective": OBJECTIVE, "progress": False
    }  # fmt: skip
    options, bookkeeping, objects = tiny_run.pick({**values, **changes}, GANTraining, Run)
    samples = tiny_run.samples()
    return generator, train_gan(generator, discriminator, samples, GANTraining(**options), Run(out, **bookkeeping), **objects)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
