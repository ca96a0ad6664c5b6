"""Samples from networks that were trained to denoise, whatever they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genfast import schedules
from genfast.checks import Rule, above, check, choice, each, optional, whole
from genfast.models.family import Model
from genfast.samplers import Denoiser, Sampler

if TYPE_CHECKING:
    from genfast.request import Request

# What the words saved with the weights may be, where they are there.
WORDS = {
    "prediction": choice("epsilon", "v", "x0", "flow"),
    "noise_steps": optional(whole(1)),
    "shift": optional(above(0)),
    "size": each(whole(1), 2),
    "classes": Rule("names", lambda value: isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)),
}


def denoiser_of(model: Model) -> Denoiser:
    """A trained model, ready for a `Sampler`. Raises ValueError unless its words are such as `train_diffusion` saves."""
    about, got = model.about, f"path: got {model.path}"
    process = {
        "cosine": lambda: schedules.cosine(about["noise_steps"]),
        "linear": lambda: schedules.linear(about["noise_steps"]),
        "scaled_linear": lambda: schedules.scaled_linear(about["noise_steps"]),
        "flow": lambda: schedules.flow(about["shift"]),
    }
    if about.get("noise") not in process:
        raise ValueError(f"{got} with the noise process {about.get('noise')!r}, supported: {', '.join(map(repr, process))}")
    if lacking := {"prediction", "noise_steps", "shift", "size"} - about.keys():
        raise ValueError(f"{got}, which does not say its {', '.join(sorted(lacking))}, supported: what train_diffusion saved")
    try:
        check(WORDS, about)
    except ValueError as error:
        raise ValueError(f"{got}, whose description is wrong ({error})") from None
    noise = process[about["noise"]]()
    return Denoiser(model.net, about["prediction"], noise=noise, time="flow" if noise.kind == "flow" else "index")


def draw(denoiser: Denoiser, shape: Sequence[int], request: Request, null_label: int | None) -> Tensor:
    """Samples (N, \\*shape); ``null_label`` is what the network takes for "no label", None if it takes no labels."""
    options = request.options
    conditions: dict[str, Any] = {}
    if null_label is not None:
        labels = torch.tensor(request.labels, device=denoiser.device)
        conditions = {"cond": labels, "uncond": torch.full_like(labels, null_label)}
    sampler = Sampler(
        options.solver,
        steps=options.steps,
        sigmas=options.sigmas,
        guidance_scale=options.guidance_scale if conditions else 1.0,
        progress=False,
        impl=options.impl,
    )
    samples: Tensor = sampler(denoiser, (len(request.seeds), *shape), seeds=request.seeds, **conditions)
    return samples


def from_noise(model: Model, request: Request) -> Tensor:
    """`Family.generate` of a network with ``config.image_channels`` and ``config.num_classes``, trained by `train_diffusion`."""
    denoiser, config = denoiser_of(model), model.net.config
    return draw(denoiser, (config.image_channels, *model.about["size"]), request, config.num_classes or None)
