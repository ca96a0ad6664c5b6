"""The operators: checks, kernels, derivatives. Same names and signatures as `genfast.reference`, which specifies them."""

from .attention import attention, attention_jvp, explain_attention
from .noise import normal, uniform
from .solver_step import pack_row, solver_step, solver_step_

__all__ = ["attention", "attention_jvp", "explain_attention", "normal", "pack_row", "solver_step", "solver_step_", "uniform"]
