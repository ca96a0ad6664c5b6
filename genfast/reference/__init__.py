"""The operators in pure PyTorch: the specification that the kernels are tested against, and the fallback without them."""

from .attention import attention
from .bias_act import bias_act
from .bn_act import bn_act
from .conv2d_resample import conv2d_resample
from .filtered_lrelu import filtered_lrelu
from .group_norm_silu import group_norm_silu
from .noise import normal, uniform
from .solver_step import solver_step, solver_step_
from .upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "attention",
    "bias_act",
    "bn_act",
    "conv2d_resample",
    "downsample2d",
    "filter2d",
    "filtered_lrelu",
    "group_norm_silu",
    "normal",
    "setup_filter",
    "solver_step",
    "solver_step_",
    "uniform",
    "upfirdn2d",
    "upsample2d",
]
