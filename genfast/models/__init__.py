"""Whole networks, one family a file."""

from genfast.models.dcgan import DCGANConfig, Discriminator, Generator
from genfast.models.families import FAMILIES, Family, Model
from genfast.models.files import load, load_model, save
from genfast.models.unet import UNet, UNetConfig

__all__ = [
    "FAMILIES", "DCGANConfig", "Discriminator", "Family", "Generator", "Model", "UNet", "UNetConfig", "load", "load_model", "save",
]  # fmt: skip
