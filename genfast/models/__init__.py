"""Whole networks, one family a file."""

from genfast.models.dcgan import DCGANConfig, Discriminator, Generator
from genfast.models.unet import UNet, UNetConfig, load, save

__all__ = ["DCGANConfig", "Discriminator", "Generator", "UNet", "UNetConfig", "load", "save"]
