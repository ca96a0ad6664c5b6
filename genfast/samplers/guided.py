"""CFG++ solvers: the ODE follows the unconditional prediction u, and guidance moves where it leads (Chung et al. 2024).

A step is the base solver's with u for d, and alpha' (d - u) added to its end; d is the guided prediction, whose scale lies in [0, 1]
here. The forms are ComfyUI's. Without an unconditional half u is d, and each is its base solver.
"""

from __future__ import annotations

from collections.abc import Iterable

from genfast.schedules import Grid

from .adams import gradient_estimation
from .exponential import dpmpp_2m, res_multistep
from .first_order import ddim
from .plan import Row, Term
from .rows import Rows, combine
from .singlestep import dpmpp_2s_ancestral

Outputs = dict[int, dict[Term, float]]


def _along_u(row: Row) -> Outputs:
    """The row's outputs with u for d."""
    return {slot: {"u" if key == "d" else key: c for key, c in terms.items()} for slot, terms in row.outputs.items()}


def _guide(outputs: Outputs, slot: int, weight: float) -> Outputs:
    """The same with ``weight`` (d - u) added to what is written to ``slot``."""
    return outputs | {slot: combine((1.0, outputs[slot]), (weight, {"d": 1.0, "u": -1.0}))}


def _every_step(g: Grid, rows: Iterable[Row]) -> Rows:
    """CFG++ of a solver that evaluates once a step."""
    for i, row in enumerate(rows):
        yield Row(row.point, _guide(_along_u(row), 0, g.point(i + 1).alpha))


def euler_cfg_pp(g: Grid) -> Rows:
    """CFG++ of `euler`, its algorithm 1: alpha' d, and sigma' times the noise that u predicts."""
    yield from _every_step(g, ddim(g))


def euler_ancestral_cfg_pp(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """CFG++ of `euler_ancestral`."""
    yield from _every_step(g, ddim(g, eta=eta, s_noise=s_noise))


def gradient_estimation_cfg_pp(g: Grid, *, gamma: float = 2.0) -> Rows:
    """CFG++ of `gradient_estimation`."""
    yield from _every_step(g, gradient_estimation(g, gamma=gamma))


def dpmpp_2m_cfg_pp(g: Grid) -> Rows:
    """CFG++ of `dpmpp_2m`, whose second term takes the guided prediction, too: d - u_before."""
    for row in _every_step(g, dpmpp_2m(g)):
        second = -row.outputs[0].get(1, 0.0)
        yield Row(row.point, _guide({slot: dict(terms) for slot, terms in row.outputs.items()}, 0, second))


def res_multistep_cfg_pp(g: Grid, *, eta: float = 0.0, s_noise: float = 1.0) -> Rows:
    """CFG++ of `res_multistep`, also ancestral: a step of second order adds d - u to the state that it starts from."""
    for i, row in enumerate(res_multistep(g, eta=eta, s_noise=s_noise)):
        first_order = 1 not in row.outputs[0]
        weight = g.point(i + 1).alpha if first_order else row.outputs[0]["x"] * row.point.alpha
        yield Row(row.point, _guide(_along_u(row), 0, weight))


def dpmpp_2s_ancestral_cfg_pp(g: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Rows:
    """CFG++ of `dpmpp_2s_ancestral`: both evaluations follow u, d - u of the first is added in the end, by way of slot 1."""
    rows = iter(dpmpp_2s_ancestral(g, eta=eta, s_noise=s_noise))
    for i, row in enumerate(rows):
        gain = g.point(i + 1).alpha
        if len(row.outputs) == 1:
            yield Row(row.point, _guide(_along_u(row), 0, gain))
            continue
        last = next(rows)
        yield Row(row.point, _guide(_along_u(row), 1, gain / last.outputs[0][1]))
        yield Row(last.point, _along_u(last))
