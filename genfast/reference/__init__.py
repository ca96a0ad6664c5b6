"""The operators in pure PyTorch: the specification that the kernels are tested against, and the fallback without them."""

from .noise import normal, uniform
from .solver_step import solver_step, solver_step_

__all__ = ["normal", "solver_step", "solver_step_", "uniform"]
