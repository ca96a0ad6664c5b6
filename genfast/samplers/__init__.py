"""Samplers: a solver is data, a denoiser says what the network returns, and one kernel executes the rows."""

from .adaptive import AdaptiveSampler
from .brownian import BrownianPath
from .denoiser import Condition, Denoiser
from .plan import Plan, Program, Row, assemble
from .sample import Sampler
from .solvers import SOLVERS, Solver, make_plan

__all__ = [
    "SOLVERS",
    "AdaptiveSampler",
    "BrownianPath",
    "Condition",
    "Denoiser",
    "Plan",
    "Program",
    "Row",
    "Sampler",
    "Solver",
    "assemble",
    "make_plan",
]
