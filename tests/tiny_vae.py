"""An autoencoder's run small enough to be killed and continued many times: ``python tiny_vae.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import tiny_run
import torch

from genfast.models.autoencoder import Autoencoder, AutoencoderConfig
from genfast.train import Run, VAETraining, train_vae

CONFIG = AutoencoderConfig(size=8, latent=3, channels=4)
STEPS = 60


def run(out: Path, config: AutoencoderConfig = CONFIG, **changes: Any) -> tuple[Autoencoder, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Autoencoder(config)
    values: dict[str, Any] = {"steps": STEPS, "batch": 8, "checkpoint_every": 4, "log_every": 5, "validate_every": 20}
    steps = changes.get("steps", STEPS)
    values |= {"validation": tiny_run.samples(12), "warmup": min(5, steps), "beta_warmup": 7, "free_nats": 0.01, "progress": False}
    options, bookkeeping, objects = tiny_run.pick(values | changes, VAETraining, Run)
    return net, train_vae(net, tiny_run.samples(), VAETraining(**options), Run(out, **bookkeeping), **objects)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
