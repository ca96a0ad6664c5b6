"""Training loops, one flat function a family."""

from genfast.train.adversarial import AdversarialStep, Objective
from genfast.train.diffusion import DiffusionTraining, train_diffusion
from genfast.train.gan import GANTraining, train_gan
from genfast.train.run import Run
from genfast.train.vae import VAETraining, train_vae
from genfast.train.vaegan import VAEGANTraining, train_vaegan

__all__ = [
    "AdversarialStep",
    "DiffusionTraining",
    "GANTraining",
    "Objective",
    "Run",
    "VAEGANTraining",
    "VAETraining",
    "train_diffusion",
    "train_gan",
    "train_vae",
    "train_vaegan",
]
