"""The operators in pure PyTorch: the specification that the kernels are tested against, and the fallback without them."""

from .bias_act import bias_act
from .noise import normal, uniform
from .solver_step import solver_step, solver_step_

__all__ = ["bias_act", "normal", "solver_step", "solver_step_", "uniform"]
