"""A run small enough to be killed and continued many times: ``python tiny_run.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genfast.models import UNet, UNetConfig
from genfast.train import train_diffusion

CONFIG = UNetConfig(channels=(8, 16), blocks=(1, 1), attention=(False, True), head_dim=8, num_classes=3)
STEPS = 60


def pictures(count: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Bars at a place that depends on the label, with noise: (count, 8, 8) uint8, (count,)."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = rng.integers(0, 40, (count, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 2] += 200
    return images.astype(np.uint8), labels


def run(out: Path, **changes: Any) -> tuple[UNet, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = UNet(CONFIG)
    images, labels = pictures()
    options: dict[str, Any] = {"steps": STEPS, "batch": 8, "warmup": 5, "checkpoint_every": 4, "log_every": 5, "validate_every": 20}
    return net, train_diffusion(net, images, labels, out=out, progress=False, **{**options, "validation": pictures(12), **changes})


if __name__ == "__main__":
    run(Path(sys.argv[1]))
