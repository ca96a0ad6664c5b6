"""A VAE-GAN's run small enough to be killed and continued many times: ``python tiny_vaegan.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny_run
import torch

from genfast.models.autoencoder import Autoencoder
from genfast.models.vaegan import Discriminator, VAEGANConfig
from genfast.train import Run, VAEGANTraining, train_vaegan

CONFIG = VAEGANConfig(size=8, latent=3, channels=4, critic_channels=4)
STEPS = 40


def run(out: Path, config: VAEGANConfig = CONFIG, **changes: Any) -> tuple[Autoencoder, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, discriminator = Autoencoder(config), Discriminator(config)
    values: dict[str, Any] = {"steps": STEPS, "batch": 8, "checkpoint_every": 4, "log_every": 5, "validate_every": 20}
    values |= {"validation": tiny_run.samples(12), "progress": False}
    options, bookkeeping, objects = tiny_run.pick(values | changes, VAEGANTraining, Run)
    return net, train_vaegan(net, discriminator, tiny_run.samples(), VAEGANTraining(**options), Run(out, **bookkeeping), **objects)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
