"""Every operator's specification."""

from genfast.testing.spec import OpSpec

from .attention import ATTENTION
from .noise import NORMAL, UNIFORM
from .solver_step import SOLVER_STEP, SOLVER_STEP_

SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (NORMAL, UNIFORM, SOLVER_STEP_, SOLVER_STEP, ATTENTION)}
