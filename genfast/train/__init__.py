"""Training loops, one flat function a family."""

from genfast.train.adversarial import AdversarialStep, Objective
from genfast.train.diffusion import train_diffusion
from genfast.train.gan import train_gan

__all__ = ["AdversarialStep", "Objective", "train_diffusion", "train_gan"]
