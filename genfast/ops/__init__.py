"""The operators: checks, kernels, derivatives. Same names and signatures as `genfast.reference`, which specifies them."""

from .attention import attention, attention_jvp, explain_attention
from .attention_decode import attention_decode
from .bias_act import bias_act
from .bn_act import bn_act
from .conv2d_resample import conv2d_resample
from .conv_block import conv_block
from .filtered_lrelu import filtered_lrelu
from .group_norm_silu import group_norm_silu
from .minibatch_stddev import minibatch_stddev
from .modulate_bias_act import modulate_bias_act
from .modulated_conv2d import modulated_conv2d
from .noise import normal, uniform
from .pixel_norm import pixel_norm
from .qknorm_rope import qknorm_rope, qknorm_rope_attention, rope_table
from .solver_step import pack_row, solver_step, solver_step_
from .upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "attention",
    "attention_decode",
    "attention_jvp",
    "bias_act",
    "bn_act",
    "conv2d_resample",
    "conv_block",
    "downsample2d",
    "explain_attention",
    "filter2d",
    "filtered_lrelu",
    "group_norm_silu",
    "minibatch_stddev",
    "modulate_bias_act",
    "modulated_conv2d",
    "normal",
    "pack_row",
    "pixel_norm",
    "qknorm_rope",
    "qknorm_rope_attention",
    "rope_table",
    "setup_filter",
    "solver_step",
    "solver_step_",
    "uniform",
    "upfirdn2d",
    "upsample2d",
]
