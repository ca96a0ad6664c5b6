"""What every operator promises (`SPECS`), how close is close enough (`oracle`), and running on other kernels."""

from .backend import operators_from
from .spec import BadInput, Case, OpSpec
from .specs import SPECS

__all__ = ["SPECS", "BadInput", "Case", "OpSpec", "operators_from"]
