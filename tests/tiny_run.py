"""A run small enough to be killed and continued many times: ``python tiny_run.py OUT``."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from genfast.data import ArraySamples
from genfast.models import UNet, UNetConfig
from genfast.train import DiffusionTraining, Run, train_diffusion

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


def samples(count: int = 50) -> ArraySamples:
    return ArraySamples(*pictures(count))


def pick(values: dict[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """What belongs to the fields of each of these dataclasses, and last the rest."""
    parts = [{name: values[name] for name in values if name in {field.name for field in fields(kind)}} for kind in kinds]
    return [*parts, {name: value for name, value in values.items() if not any(name in part for part in parts)}]


def run(out: Path, **changes: Any) -> tuple[UNet, dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = UNet(CONFIG)
    values: dict[str, Any] = {"steps": STEPS, "batch": 8, "checkpoint_every": 4, "log_every": 5, "validate_every": 20}
    steps = changes.get("steps", STEPS)
    values |= {"validation": samples(12), "warmup": min(5, steps) if isinstance(steps, int) else 5, "progress": False, **changes}
    options, bookkeeping, objects = pick(values, DiffusionTraining, Run)
    return net, train_diffusion(net, samples(), DiffusionTraining(**options), Run(out, **bookkeeping), **objects)


def assert_same_bits(straight: Path, other: Path) -> None:
    """The same tensors in what two runs saved."""
    for name in ("checkpoint.safetensors", "ema.safetensors"):
        a, b = load_file(straight / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], name


def kill_at_random(script: str, out: Path) -> None:
    """Start ``python script out`` four times and SIGKILL it each time once it has logged more than before."""
    log = out / "log.jsonl"

    def rows() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    kills = 0
    for _ in range(4):
        before = rows()
        process = subprocess.Popen([sys.executable, script, str(out)], stderr=subprocess.PIPE)
        while process.poll() is None and rows() <= before:  # it has come further than the one before it
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        kills += process.returncode != 0
    assert kills >= 1


if __name__ == "__main__":
    run(Path(sys.argv[1]))
