"""Named, tested settings: a family and its configuration, a trainer and its options, and data. ``genfast train NAME`` runs one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genfast.checks import check, nearest, whole

if TYPE_CHECKING:
    from torch import nn

    from genfast.data import Samples

# Heavy imports (torch) happen inside the functions, so that a list of the recipes does not pay for them.


@dataclass(frozen=True)
class Recipe:
    """Settings that were seen to work, as data."""

    summary: str
    family: str  # a name in genfast.models.FAMILIES
    trainer: str  # a name in `TRAINERS`
    data: str  # what `genfast.data.open_samples` takes
    model: Mapping[str, Any] = field(default_factory=dict)  # fields of the family's configuration
    training: Mapping[str, Any] = field(default_factory=dict)  # fields of the trainer's options; those of "objective" as a dictionary
    seen: str = ""  # what it was seen to reach, and in which time


_LAZY = {"r1": 1.0, "path_length": 2.0, "path_shrink": 2, "d_every": 16, "g_every": 4}  # Karras et al. 2020
_BOTH = {"loss": "relativistic", "r1": 1.0, "r2": 1.0}  # Huang et al. 2024

RECIPES = {
    "fashion-unet": Recipe(
        "class-conditional U-Net, v-prediction, on Fashion-MNIST: what ships with genfast",
        "unet",
        "diffusion",
        "fashion",
        seen="validation loss 0.1316 in 25 minutes on one thread, with --autocast bfloat16 (docs/training.md)",
    ),
    "fashion-dcgan": Recipe(
        "DCGAN on Fashion-MNIST, the logistic loss without penalties",
        "dcgan",
        "gan",
        "fashion",
        {"channels": 32},
        {"steps": 2500, "lr": 5e-4},
        "ragged but recognisable clothes in 4 minutes on one thread (docs/gan-training.md)",
    ),
    "fashion-stylegan2": Recipe(
        "StyleGAN2 on Fashion-MNIST at 32x32 in bfloat16, lazy R1 and path lengths",
        "stylegan2",
        "gan",
        "fashion",
        {"size": 32, "image_channels": 1, "channel_base": 1024, "body": "bfloat16"},
        {"lr": 2e-3, "betas": (0.0, 0.99), "objective": _LAZY},
    ),
    "fashion-ae": Recipe(
        "convolutional autoencoder on Fashion-MNIST; samples from a Gaussian fitted to its latents",
        "autoencoder",
        "vae",
        "fashion",
        {"variational": False},
    ),
    "fashion-vae": Recipe("convolutional variational autoencoder on Fashion-MNIST", "autoencoder", "vae", "fashion"),
    "fashion-dense-vae": Recipe(
        "fully connected variational autoencoder on Fashion-MNIST", "autoencoder", "vae", "fashion", {"layers": "dense"}
    ),
    "fashion-beta-vae": Recipe(
        "beta-VAE on Fashion-MNIST: a few latent dimensions, each of which means something",
        "autoencoder",
        "vae",
        "fashion",
        {"latent": 10},
        {"beta": 4.0, "beta_warmup": 500},
    ),
    "fashion-vaegan": Recipe(
        "VAE-GAN on Fashion-MNIST: an autoencoder that is judged by a discriminator's features instead of by pixels",
        "vaegan",
        "vaegan",
        "fashion",
    ),
    "fashion-mlp-gan": Recipe(
        "the first GAN: fully connected layers on Fashion-MNIST, the logistic loss",
        "mlp_gan",
        "gan",
        "fashion",
        training={"steps": 12000},
    ),
    "fashion-progan": Recipe(
        "progressive GAN on Fashion-MNIST, from 4x4 to 32x32, the Wasserstein loss with a gradient penalty",
        "progan",
        "gan",
        "fashion",
        {"size": 32, "image_channels": 1, "channel_base": 1024, "channel_max": 64},
        {"steps": 6000, "lr": 1e-3, "betas": (0.0, 0.99), "objective": {"loss": "wgan", "gradient_penalty": 10.0}},
    ),
    "fashion-r3gan": Recipe(
        "R3GAN on Fashion-MNIST at 32x32, the relativistic loss with R1 and R2",
        "r3gan",
        "gan",
        "fashion",
        {"size": 32, "image_channels": 1, "channel_base": 1024},
        {"lr": 2e-4, "betas": (0.0, 0.99), "objective": _BOTH},
    ),
}


@dataclass(frozen=True)
class Setting:
    """What a run is made of besides the model, the trainer's options and its bookkeeping."""

    data: str  # name of a data set, or a folder or zip file of pictures
    validation: int = 1000  # samples held out for the validation loss; 0: none (diffusion)
    device: str | None = None  # where to run; None: cuda if torch sees one, else cpu
    dry_run: bool = False  # print what would run, with its parameters, memory, batch and time a step, and end


def overview(above: str = "") -> str:
    """The names of the recipes with a line each."""
    return above + "\n".join(f"{name:20}{recipe.summary}" for name, recipe in RECIPES.items())


def find(name: str) -> Recipe:
    """The recipe of this name. Raises ValueError that names the nearest one."""
    if name not in RECIPES:
        raise ValueError(f"recipe: got {name!r}, supported: {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    return RECIPES[name]


def experiment(name: str) -> type[Any]:
    """A dataclass with the fields ``setting``, ``model``, ``training`` and ``run``, whose defaults are those of a recipe."""
    from genfast import train
    from genfast.models import FAMILIES

    recipe = find(name)
    options = dict(recipe.training)
    if "objective" in options:
        options["objective"] = train.Objective(**options["objective"])
    training = getattr(train, TRAINERS[recipe.trainer].options)(**options)
    parts: dict[str, Any] = {"setting": Setting(recipe.data), "model": FAMILIES[recipe.family].config(**recipe.model), "training": training}
    parts["run"] = train.Run(Path("runs") / name)
    made = [(key, type(part), field(default_factory=partial(lambda part: part, part))) for key, part in parts.items()]
    return make_dataclass("Experiment", made)


def run(name: str, given: Any) -> None:
    """Train what ``given``, an instance of `experiment`, says, and print the last row of the log."""
    import torch

    from genfast import ranks
    from genfast.data import open_samples
    from genfast.device import usable
    from genfast.models import FAMILIES

    recipe, device = find(name), ranks.join(usable(given.setting.device))
    family, train = FAMILIES[recipe.family], TRAINERS[recipe.trainer].start
    samples = open_samples(given.setting.data)
    model = fitted(given.model, given.training, samples, recipe.model)

    def start(training: Any, bookkeeping: Any) -> tuple[dict[str, Any], list[nn.Module]]:
        torch.manual_seed(bookkeeping.seed)  # of the initial weights; the training draws are counter-based
        networks = [network.to(device) for network in family.networks(model, bookkeeping.impl)]
        return train(networks, samples, training, bookkeeping, given.setting), networks

    said = rehearse(given, model, samples, device, start) if given.setting.dry_run else start(given.training, given.run)[0]
    if ranks.rank() == 0:
        print(json.dumps(said, default=str, indent=1 if given.setting.dry_run else None))
    ranks.leave()


def _train_diffusion(networks: list[Any], samples: Any, training: Any, run: Any, setting: Setting) -> dict[str, Any]:
    from genfast.train import train_diffusion

    kept, held_out = _parts(samples, setting)
    about = {"data": setting.data, "classes": list(samples.classes)}
    return train_diffusion(networks[0], kept, training, run, validation=held_out, about=about)


def _train_vae(networks: list[Any], samples: Any, training: Any, run: Any, setting: Setting) -> dict[str, Any]:
    from genfast.train import train_vae

    kept, held_out = _parts(samples, setting)
    return train_vae(networks[0], kept, training, run, validation=held_out, about={"data": setting.data})


def _train_vaegan(networks: list[Any], samples: Any, training: Any, run: Any, setting: Setting) -> dict[str, Any]:
    from genfast.train import train_vaegan

    kept, held_out = _parts(samples, setting)
    return train_vaegan(networks[0], networks[1], kept, training, run, validation=held_out, about={"data": setting.data})


def _train_gan(networks: list[Any], samples: Any, training: Any, run: Any, setting: Setting) -> dict[str, Any]:
    from genfast.data import PaddedSamples
    from genfast.train import train_gan

    generator, discriminator = networks
    size = generator.config.size
    samples = samples if size == samples.shape[-1] else PaddedSamples(samples, size)
    return train_gan(generator, discriminator, samples, training, run, about={"data": setting.data})


def _parts(samples: Any, setting: Setting) -> tuple[Any, Any]:
    """Samples to train on, and those held out or None."""
    check({"validation": whole(0, len(samples) - 1)}, {"validation": setting.validation})
    return samples.hold_out(setting.validation) if setting.validation else (samples, None)


class Trainer(NamedTuple):
    """How a recipe's trainer is called."""

    options: str  # name of its dataclass in genfast.train
    start: Callable[..., dict[str, Any]]  # (networks, samples, options, run, setting) -> the last row of the log


TRAINERS = {
    "diffusion": Trainer("DiffusionTraining", _train_diffusion),
    "gan": Trainer("GANTraining", _train_gan),
    "vae": Trainer("VAETraining", _train_vae),
    "vaegan": Trainer("VAEGANTraining", _train_vaegan),
}


def fitted(config: Any, training: Any, samples: Samples, fixed: Mapping[str, Any]) -> Any:
    """A model's configuration with what the data and the trainer's options decide. Raises ValueError where it says something else.

    The data decide ``image_channels`` and ``num_classes``, a flow process the ``time_scale``, and a penalty of each sample's gradient
    leaves no batch norm in a discriminator.
    """
    names = {found.name: found.default for found in fields(config)}
    decided: dict[str, Any] = {"image_channels": samples.shape[0], "num_classes": len(samples.classes)}
    if getattr(getattr(training, "process", None), "kind", "") == "flow":
        decided["time_scale"] = 1000.0
    if getattr(getattr(training, "objective", None), "penalises", False):
        decided["discriminator_norm"] = False
    decided = {name: value for name, value in decided.items() if name in names}
    for name, value in decided.items():
        if (got := getattr(config, name)) not in (value, names[name], fixed.get(name)):
            raise ValueError(f"{name}: got {got}, supported with this data and these options: {value}")
    return replace(config, **decided)


def rehearse(given: Any, model: Any, samples: Samples, device: str, start: Callable[..., Any]) -> dict[str, Any]:
    """What a run would be: its resolved options, and parameters, memory and time a step measured on a few steps in a folder that goes."""
    import resource

    import torch

    steps = 5  # the first ones warm everything up
    lazy = {"warmup": min(steps, given.training.warmup)} if hasattr(given.training, "warmup") else {}
    with tempfile.TemporaryDirectory() as folder:
        run = replace(given.run, out=folder, progress=False, sample_every=0, validate_every=100, track=())
        _, networks = start(replace(given.training, steps=steps, **lazy), run)
    seconds = [after - before for before, after in pairwise(run.begun)]
    weights = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = {key: vars(part) for key, part in (("setting", given.setting), ("model", model), ("training", given.training))}
    bookkeeping = {found.name: getattr(given.run, found.name) for found in fields(given.run)}
    return {
        **options,
        "run": bookkeeping,
        "device": device,
        "samples": f"{len(samples)} of shape {tuple(samples.shape)}, {len(samples.classes)} classes",
        "parameters": [sum(p.numel() for p in network.parameters()) for network in networks],
        "memory": f"{5 * weights / 2**20:.0f} MiB for weights, gradients, Adam and average; {peak / 2**20:.0f} MiB at most in these steps",
        "global batch": given.training.batch,
        "seconds a step": round(sum(seconds) / len(seconds), 4),
    }


def evaluate(directory: Path) -> dict[str, Any]:
    """The figures of a trained model, by `genfast.metrics`. Raises ValueError where this version has none."""
    from importlib import import_module
    from importlib.util import find_spec

    if find_spec("genfast.metrics") is None:
        raise ValueError("eval: got a genfast without genfast.metrics, supported: a version that has it")
    figures: dict[str, Any] = import_module("genfast.metrics").evaluate_run(directory)
    return figures
