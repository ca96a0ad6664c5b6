"""The operators: checks, kernels, derivatives. Same names and signatures as `genfast.reference`, which specifies them."""

from .bias_act import bias_act
from .noise import normal, uniform
from .solver_step import pack_row, solver_step, solver_step_
from .upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "bias_act",
    "downsample2d",
    "filter2d",
    "normal",
    "pack_row",
    "setup_filter",
    "solver_step",
    "solver_step_",
    "uniform",
    "upfirdn2d",
    "upsample2d",
]
