"""The operators in pure PyTorch: the specification that the kernels are tested against, and the fallback without them."""

from .attention import attention
from .noise import normal, uniform
from .solver_step import solver_step, solver_step_

__all__ = ["attention", "normal", "solver_step", "solver_step_", "uniform"]
