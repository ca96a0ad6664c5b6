"""Every operator's specification."""

from genfast.testing.spec import OpSpec

from .attention import ATTENTION
from .attention_decode import ATTENTION_DECODE
from .attention_varlen import ATTENTION_VARLEN
from .bias_act import BIAS_ACT
from .bn_act import BN_ACT
from .group_norm_silu import GROUP_NORM_SILU
from .noise import NORMAL, UNIFORM
from .solver_step import SOLVER_STEP, SOLVER_STEP_
from .upfirdn2d import UPFIRDN2D

SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        *(NORMAL, UNIFORM, SOLVER_STEP_, SOLVER_STEP, BIAS_ACT, BN_ACT, GROUP_NORM_SILU, UPFIRDN2D, ATTENTION),
        *(ATTENTION_DECODE, ATTENTION_VARLEN),
    )
}
