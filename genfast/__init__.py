"""genfast: the fast path for generative models in PyTorch."""

from importlib.metadata import version

__version__ = version("genfast")

from genfast import schedules

__all__ = ["__version__", "schedules"]
