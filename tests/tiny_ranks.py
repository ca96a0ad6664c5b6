"""Short runs of both trainers for one process or several, ``torchrun --nproc-per-node N tiny_ranks.py OUT``: each notes what it saw."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_gan
import tiny_run
import torch

from genfast import ranks
from genfast.generate import generate, open_model
from genfast.models.r3gan import R3GANConfig
from genfast.request import SamplingOptions, every
from genfast.train import AdversarialStep, Objective, diffusion

R3GAN = R3GANConfig(size=8, image_channels=1, latent=4, channel_base=64, channel_max=8, group_channels=4, blocks=1)
STYLE = replace(tiny_gan.STYLE, body="float32")
RUNS: dict[str, dict[str, Any]] = {
    "stylegan2": {"config": STYLE, "objective": Objective(r1=0.1, path_length=2.0, path_shrink=2, d_every=2, g_every=2)},
    "r3gan": {"config": R3GAN, "objective": Objective("relativistic", r1=0.1, r2=0.1, gradient_penalty=0.1, path_length=0.5)},
}


def run(out: Path) -> None:
    ranks.join("cpu")
    seen: list[dict[str, torch.Tensor]] = []
    loss, load = diffusion.diffusion_loss, AdversarialStep.load

    def spy_loss(net: Any, x0: torch.Tensor, t: Any, n: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append({"x0": x0, "t": torch.from_numpy(t), "n": n, "y": y})
        return loss(net, x0, t, n, y, **options)

    def spy_load(self: AdversarialStep, **inputs: torch.Tensor) -> None:
        seen.append({name: value.clone() for name, value in inputs.items()})
        load(self, **inputs)

    diffusion.diffusion_loss, AdversarialStep.load = spy_loss, spy_load  # type: ignore[assignment, method-assign]
    tiny_run.run(out / "diffusion", steps=6, keep_best=True, validate_every=3, log_every=3)
    for name, options in RUNS.items():
        tiny_gan.run(out / name, steps=4, critic_steps=1, batch=16, log_every=2, **options)
    torch.save(seen, out / f"seen-{ranks.count()}-{ranks.rank()}")
    model = open_model(out / "diffusion")
    x = generate(model, every([0, 2], [5, 9, 11], SamplingOptions("euler_ancestral", 3, batch=2)))
    torch.save(x, out / f"samples-{ranks.count()}-{ranks.rank()}")
    ranks.leave()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
