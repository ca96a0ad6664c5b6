"""A drop-in for k-diffusion: its `sampling` and `external` modules on genfast's kernel. docs/k-diffusion.md."""

from . import external, sampling
from .external import *  # noqa: F403
from .sampling import *  # noqa: F403

__all__ = [*external.__all__, *sampling.__all__, "external", "sampling"]
