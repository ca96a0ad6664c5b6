"""The solvers: pure functions from a grid to rows. docs/solvers.md derives them and says how to add one.

A solver reads a `Grid` (float64) and yields one `Row` per evaluation of the network. Notation, here and in the comments: the state
is x = alpha x_0 + sigma n, "d" the denoised prediction, r = sigma / alpha the noise level, lambda = -log r; a prime marks the
next point of the grid. Formulas are written so that alpha = 0 (zero terminal SNR, flows at t = 1) is never divided by
unless the method itself is undefined there; `assemble` reports those.
"""

from __future__ import annotations

import inspect
from typing import Any

from genfast.schedules import Grid, unknown_name

from .adams import deis, dpm_solver, gradient_estimation, ipndm, lms, pndm
from .exponential import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, er_sde, res_multistep, sa_solver, unipc
from .first_order import consistency, ddim, ddim_inverse, ddpm, euler, euler_ancestral, euler_ancestral_rf, flow_euler, lcm, tcd
from .guided import (
    dpmpp_2m_cfg_pp,
    dpmpp_2s_ancestral_cfg_pp,
    euler_ancestral_cfg_pp,
    euler_cfg_pp,
    gradient_estimation_cfg_pp,
    res_multistep_cfg_pp,
)
from .plan import Plan, assemble
from .rows import Rows, Solver
from .singlestep import (
    dpm2,
    dpm2_ancestral,
    dpm2_ancestral_rf,
    dpmpp_2s_ancestral,
    dpmpp_2s_ancestral_rf,
    dpmpp_sde,
    dpmpp_singlestep,
    flow_heun,
    flow_midpoint,
    heun,
    heunpp2,
    restart,
    seeds_2,
    seeds_3,
)

__all__ = ["SOLVERS", "Rows", "Solver", "find_solver", "make_plan"]

SOLVERS: dict[str, Solver] = {
    f.__name__: f
    for f in (
        ddim,
        ddim_inverse,
        ddpm,
        euler,
        euler_ancestral,
        consistency,
        lcm,
        tcd,
        heun,
        heunpp2,
        restart,
        dpm2,
        dpm2_ancestral,
        dpmpp_2s_ancestral,
        dpmpp_sde,
        dpmpp_singlestep,
        seeds_2,
        seeds_3,
        lms,
        deis,
        dpm_solver,
        pndm,
        ipndm,
        gradient_estimation,
        dpmpp_2m,
        dpmpp_2m_sde,
        dpmpp_3m_sde,
        res_multistep,
        er_sde,
        sa_solver,
        unipc,
        flow_euler,
        flow_heun,
        flow_midpoint,
        euler_ancestral_rf,
        dpm2_ancestral_rf,
        dpmpp_2s_ancestral_rf,
        euler_cfg_pp,
        euler_ancestral_cfg_pp,
        dpmpp_2m_cfg_pp,
        dpmpp_2s_ancestral_cfg_pp,
        res_multistep_cfg_pp,
        gradient_estimation_cfg_pp,
    )
}


def make_plan(solver: str | Solver, grid: Grid, **options: Any) -> Plan:
    """The plan of a solver, by name or as a function ``(grid, **options) -> iterator of Row``, on a grid.

    Raises ValueError for unknown solvers and options, with the nearest names, and for rows that cannot be executed.
    """
    function = find_solver(solver, options)
    if not isinstance(grid, Grid):
        raise TypeError(f"grid: got a {type(grid).__name__}, supported: a Grid, for example genfast.schedules.grid(den.noise, 20)")
    name = solver if isinstance(solver, str) else getattr(solver, "__name__", "custom")
    return assemble(name, grid.noise, function(grid, **options))


def find_solver(solver: str | Solver, options: dict[str, Any]) -> Solver:
    """The solver's function, once its name and the names of its options are known to be right."""
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise unknown_name("solver", solver, SOLVERS)
        solver = SOLVERS[solver]
    parameters = inspect.signature(solver).parameters.values()
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in names and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            if not names:
                raise ValueError(f"options: got {option!r}, supported: none for this solver")
            raise unknown_name("options", option, names)
    return solver
