"""genfast: the fast path for generative models in PyTorch."""

from importlib.metadata import version

__version__ = version("genfast")

from genfast import ops, reference, schedules
from genfast.samplers import Denoiser, Plan, Sampler

__all__ = ["Denoiser", "Plan", "Sampler", "__version__", "ops", "reference", "schedules"]
