"""From trained weights to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from genfast import schedules
from genfast.models.unet import UNet, load
from genfast.schedules import NoiseSchedule

Prediction = Literal["epsilon", "v", "x0", "flow"]
SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "fashion.safetensors"


def load_for_sampling(path: str | Path = SHIPPED, device: str = "cpu") -> tuple[UNet, Any, dict[str, Any]]:
    """A network that `train_diffusion` saved, ready for a `genfast.Sampler`: (network, denoiser, words saved with it)."""
    from genfast.samplers import Denoiser

    net, about = load(path)
    process = {
        "cosine": lambda: schedules.cosine(about["noise_steps"]),
        "linear": lambda: schedules.linear(about["noise_steps"]),
        "scaled_linear": lambda: schedules.scaled_linear(about["noise_steps"]),
        "flow": lambda: schedules.flow(about["shift"]),
    }
    if about.get("noise") not in process:
        raise ValueError(f"path: got {path} with the noise process {about.get('noise')!r}, supported: {', '.join(map(repr, process))}")
    noise = process[about["noise"]]()
    return net, Denoiser(net.to(device), prediction=about["prediction"], noise=noise, time=time_name(noise)), about


def time_name(noise: NoiseSchedule) -> Literal["index", "flow"]:
    """What a network trained on ``noise`` is fed as its time, in `genfast.Denoiser`'s words."""
    return "flow" if noise.kind == "flow" else "index"


def sample_grid(net: UNet, noise: NoiseSchedule, prediction: Prediction, size: Sequence[int], *, seed: int = 0, columns: int = 8) -> Any:
    """A Pillow image of samples of ``size`` (H, W), a row a class, drawn with DPM-Solver++(2M), 20 steps and guidance 2.5."""
    from genfast.samplers import Denoiser, Sampler

    classes = net.config.num_classes
    y = torch.arange(max(1, classes), device=next(net.parameters()).device).repeat_interleave(columns)
    cond, uncond = ({"y": y}, {"y": torch.full_like(y, net.null_label)}) if classes else ({}, None)
    denoiser = Denoiser(net, prediction=prediction, noise=noise, time=time_name(noise))
    sampler = Sampler("dpmpp_2m", steps=20, guidance_scale=2.5 if classes else 1.0, progress=False)
    shape = (len(y), net.config.image_channels, *size)
    return grid(sampler(denoiser, shape=shape, seeds=range(seed * 2**40, seed * 2**40 + len(y)), cond=cond, uncond=uncond), columns)


def grid(x: Tensor, columns: int, names: Sequence[str] = (), zoom: int = 2, gap: int = 2) -> Any:
    """A Pillow image of ``x`` (B, 1 or 3, H, W) with values in [-1, 1], ``columns`` a row; ``names`` label the rows in a left margin."""
    from PIL import Image, ImageDraw

    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    count, height, width, channels = pixels.shape
    margin = 80 if names else gap
    rows = -(-count // columns)
    sheet = np.full((gap + rows * (height + gap), margin + columns * (width + gap), channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = gap + i // columns * (height + gap), margin + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    picture = Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        draw.text((4, gap + row * (height + gap) + height // 2), name, fill=0 if channels == 1 else (0, 0, 0), anchor="lm")
    return picture
