"""The families of generators and discriminators, and their files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from genfast.models import dcgan, r3gan, store, stylegan2
from genfast.nn.impl import check_impl


class Family(NamedTuple):
    """``generator(config, impl)`` maps latents (B, config.latent) to images (B, image_channels, size, size),
    ``discriminator(config, impl)`` those to logits (B,). The other fields of ``config`` are the family's own.
    """

    config: type[Any]
    generator: type[nn.Module]
    discriminator: type[nn.Module]


FAMILIES = {
    "dcgan": Family(dcgan.DCGANConfig, dcgan.Generator, dcgan.Discriminator),
    "stylegan2": Family(stylegan2.StyleGAN2Config, stylegan2.Generator, stylegan2.Discriminator),
    "r3gan": Family(r3gan.R3GANConfig, r3gan.Generator, r3gan.Discriminator),
}


def save(generator: nn.Module, path: str | Path, state: dict[str, Tensor] | None = None, **about: Any) -> None:
    """Write a generator's weights and configuration as `genfast.models.save` does a U-Net's."""
    family = next((name for name, family in FAMILIES.items() if isinstance(generator, family.generator)), None)
    if family is None:
        raise ValueError(f"generator: got a {type(generator).__name__}, supported: the generators of {', '.join(FAMILIES)}")
    config: Any = generator.config
    store.write(path, state or generator.state_dict(), family, asdict(config), about)


def load(path: str | Path, impl: str = "fused") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a generator that `save` wrote, on the CPU in eval mode: (generator, about). Raises as `genfast.models.load` does."""
    name, tensors, config, about = store.read(path, FAMILIES, "a generator")
    family = FAMILIES[name]
    check_impl(impl)
    return store.rebuild(path, lambda: family.generator(family.config(**config), impl), tensors), about
