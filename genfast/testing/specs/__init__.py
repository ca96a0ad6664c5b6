"""Every operator's specification."""

from genfast.testing.spec import OpSpec

from .attention import ATTENTION
from .attention_decode import ATTENTION_DECODE
from .bias_act import BIAS_ACT
from .bn_act import BN_ACT
from .conv2d_resample import CONV2D_RESAMPLE
from .conv_block import CONV_BLOCK
from .filtered_lrelu import FILTERED_LRELU
from .group_norm_silu import GROUP_NORM_SILU
from .minibatch_stddev import MINIBATCH_STDDEV
from .modulate_bias_act import MODULATE_BIAS_ACT
from .modulated_conv2d import MODULATED_CONV2D
from .noise import NORMAL, UNIFORM
from .pixel_norm import PIXEL_NORM
from .qknorm_rope import QKNORM_ROPE, QKNORM_ROPE_ATTENTION
from .solver_step import SOLVER_STEP, SOLVER_STEP_
from .upfirdn2d import UPFIRDN2D

_STEPS = (NORMAL, UNIFORM, SOLVER_STEP_, SOLVER_STEP)
_CONVOLUTIONS = (CONV_BLOCK, CONV2D_RESAMPLE, MODULATED_CONV2D, FILTERED_LRELU)
_PASSES = (BIAS_ACT, BN_ACT, GROUP_NORM_SILU, MODULATE_BIAS_ACT, UPFIRDN2D, PIXEL_NORM, MINIBATCH_STDDEV)
_ATTENTION = (ATTENTION, ATTENTION_DECODE, QKNORM_ROPE, QKNORM_ROPE_ATTENTION)
SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (*_STEPS, *_PASSES, *_CONVOLUTIONS, *_ATTENTION)}
