"""genfast: the fast path for generative models in PyTorch."""

from importlib.metadata import version

__version__ = version("genfast")

from genfast import ops, reference, schedules
from genfast.ops import explain_attention
from genfast.samplers import Denoiser, Plan, Sampler

__all__ = ["Denoiser", "Plan", "Sampler", "__version__", "explain_attention", "ops", "reference", "schedules"]
