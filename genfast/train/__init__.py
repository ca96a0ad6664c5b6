"""Training loops, one flat function a family."""

from genfast.train.diffusion import train_diffusion

__all__ = ["train_diffusion"]
