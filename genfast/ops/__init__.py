"""The operators: checks, kernels, derivatives. Same names and signatures as `genfast.reference`, which specifies them."""

from .bias_act import bias_act
from .noise import normal, uniform
from .solver_step import pack_row, solver_step, solver_step_

__all__ = ["bias_act", "normal", "pack_row", "solver_step", "solver_step_", "uniform"]
