"""Whole networks, one family a file."""

from genfast.models.unet import UNet, UNetConfig, load, save

__all__ = ["UNet", "UNetConfig", "load", "save"]
