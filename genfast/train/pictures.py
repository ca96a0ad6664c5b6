"""From trained weights to pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from genfast import schedules
from genfast.checks import Rule, above, check, choice, each, optional, whole
from genfast.models.unet import UNet, load
from genfast.schedules import NoiseSchedule

if TYPE_CHECKING:
    from PIL import Image

    from genfast.samplers import Denoiser, Sampler

Prediction = Literal["epsilon", "v", "x0", "flow"]
# What the words saved with the weights may be, where they are there.
WORDS = {
    "prediction": choice("epsilon", "v", "x0", "flow"),
    "noise_steps": optional(whole(1)),
    "shift": optional(above(0)),
    "size": each(whole(1), 2),
    "classes": Rule("names", lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)),
}
SHIPPED = Path(__file__).resolve().parent.parent / "weights" / "fashion.safetensors"  # docs/training.md says how it was made


def load_denoiser(path: str | Path = SHIPPED, device: str | torch.device = "cpu") -> tuple[Denoiser, dict[str, Any]]:
    """What `train_diffusion` saved, ready for a `Sampler`, and the words saved with it ("classes", "size", ...)."""
    net, about = load(path)
    process = {
        "cosine": lambda: schedules.cosine(about["noise_steps"]),
        "linear": lambda: schedules.linear(about["noise_steps"]),
        "scaled_linear": lambda: schedules.scaled_linear(about["noise_steps"]),
        "flow": lambda: schedules.flow(about["shift"]),
    }
    if about.get("noise") not in process:
        raise ValueError(f"path: got {path} with the noise process {about.get('noise')!r}, supported: {', '.join(map(repr, process))}")
    if lacking := {"prediction", "noise_steps", "shift"} - about.keys():
        raise ValueError(f"path: got {path}, which does not say its {', '.join(sorted(lacking))}, supported: what train_diffusion saved")
    try:
        check(WORDS, about)
    except ValueError as error:
        raise ValueError(f"path: got {path}, whose description is wrong ({error})") from None
    return denoiser_of(net.to(device), process[about["noise"]](), about["prediction"]), about


def denoiser_of(net: UNet, noise: NoiseSchedule, prediction: Prediction) -> Denoiser:
    """The denoiser of a network trained by `train_diffusion`, which feeds it indices or flow times."""
    from genfast.samplers import Denoiser

    return Denoiser(net, prediction, noise=noise, time="flow" if noise.kind == "flow" else "index")


def draw(
    denoiser: Denoiser, sampler: Sampler, labels: Sequence[int], seeds: Sequence[int], size: Sequence[int], batch: int = 256
) -> Tensor:
    """Samples of every label with every seed: (len(labels) * len(seeds), C, H, W), the seeds of the first label first.

    ``size`` is (H, W), ``batch`` how many are drawn at once. For an unconditional network ``labels`` only counts rows, each with
    seeds of its own. Raises ValueError for a label that the network does not have, and if there is nothing to draw.
    """
    net: Any = denoiser.net
    classes = net.config.num_classes
    check(
        {"labels": each(whole(0, classes - 1) if classes else whole(0)), "seeds": each(whole(0))}, {"labels": [*labels], "seeds": [*seeds]}
    )
    y = torch.tensor([*labels]).repeat_interleave(len(seeds)).to(next(net.parameters()).device)
    own = [*seeds] * len(labels) if classes else [seed + row * len(seeds) for row in range(len(labels)) for seed in seeds]
    parts = []
    for start in range(0, len(own), batch):
        part, some = y[start : start + batch], own[start : start + batch]
        conditions: dict[str, Any] = {"cond": {"y": part}, "uncond": {"y": torch.full_like(part, net.null_label)}} if classes else {}
        parts.append(sampler(denoiser, (len(some), net.config.image_channels, *size), seeds=some, **conditions))
    return torch.cat(parts)


def sample_grid(net: UNet, noise: NoiseSchedule, prediction: Prediction, size: Sequence[int], columns: int = 8) -> Image.Image:
    """Samples with the seeds 0 to columns - 1, a row a class, drawn with DPM-Solver++(2M) in 20 steps at guidance 2.5."""
    from genfast.samplers import Sampler

    classes = net.config.num_classes
    sampler = Sampler("dpmpp_2m", steps=20, guidance_scale=2.5 if classes else 1.0, progress=False)
    return grid(draw(denoiser_of(net, noise, prediction), sampler, range(max(1, classes)), range(columns), size), columns)


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    """The content of a file of this format."""
    content = io.BytesIO()
    picture.save(content, format=kind)
    return content.getvalue()


def grid(x: Tensor, columns: int, names: Sequence[str] = (), zoom: int = 2, gap: int = 2) -> Image.Image:
    """``x`` (B, 1 or 3, H, W) with values in [-1, 1] as a picture, ``columns`` images a row; ``names`` label the rows in a left margin."""
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
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        pen.text((4, gap + row * (height + gap) + height // 2), name, fill=0 if channels == 1 else (0, 0, 0), anchor="lm")
    return picture
