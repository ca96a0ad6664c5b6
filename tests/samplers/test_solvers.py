"""Solvers against what is known exactly: order of convergence, variance, literal loops."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import gaussian
import literal
import literal_cfg_pp
import literal_flow
import numpy as np
import pytest
from gaussian import MEAN, PROCESSES, execute, through_ratios

from genfast import schedules
from genfast.samplers import SOLVERS, Row, make_plan
from genfast.schedules import Point

DETERMINISTIC = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("flow_euler", {}, 1),
    ("heun", {}, 2),
    ("flow_heun", {}, 2),
    *[("lms", {"order": k}, k) for k in (1, 2, 3, 4)],
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"variant": "heun"}, 2),
    ("dpmpp_2m", {"order": 1}, 1),
    ("dpmpp_2m", {"order": 3}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0, "exact": True}, 3),
    *[("unipc", {"order": k, "variant": v, "corrector": False, "lower_order_final": False}, k) for k in (1, 2, 3) for v in ("bh1", "bh2")],
    *[("unipc", {"order": k, "variant": v, "lower_order_final": False}, k + 1) for k in (1, 2, 3) for v in ("bh1", "bh2")],
    ("tcd", {"eta": 0.0}, 1),
    ("dpm2", {}, 2),
    ("dpm2_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_singlestep", {"order": 1}, 1),
    *[("dpmpp_singlestep", {"order": k, "variant": v, "lower_order_final": False}, k) for k in (2, 3) for v in ("midpoint", "heun")],
    ("heunpp2", {}, 1),
    ("restart", {"intervals": ()}, 2),
    ("seeds_2", {"eta": 0.0}, 2),
    ("seeds_3", {"eta": 0.0}, 3),
    *[("deis", {"order": k, "lower_order_final": False}, k) for k in (1, 2, 3)],
    ("dpm_solver", {"order": 1}, 1),
    ("dpm_solver", {}, 2),
    ("dpm_solver", {"variant": "heun"}, 2),
    ("dpm_solver", {"order": 3, "exact": True}, 3),
    ("ipndm", {"order": 1}, 1),
    *[("ipndm", {"order": k}, 2) for k in (2, 3, 4)],
    ("pndm", {}, 2),
    ("pndm", {"prk": True}, 2),
    ("gradient_estimation", {}, 1),
    ("res_multistep", {}, 2),
    *[("sa_solver", {"predictor_order": k, "corrector_order": 0, "tau": 0.0}, k) for k in (1, 2, 3)],
    *[("sa_solver", {"predictor_order": k, "corrector_order": k, "tau": 0.0}, k + 1) for k in (1, 2, 3)],
    ("sa_solver", {"corrector_order": 0, "tau": 0.0, "exact": False}, 2),
    ("euler_ancestral_rf", {"eta": 0.0}, 1),
    *[(name, {"eta": 0.0}, 2) for name in ("dpm2_ancestral_rf", "dpmpp_2s_ancestral_rf", "dpmpp_2s_ancestral_cfg_pp")],
    *[(name, {}, 1) for name in ("euler_cfg_pp", "gradient_estimation_cfg_pp")],
    *[(name, {}, 2) for name in ("dpmpp_2m_cfg_pp", "res_multistep_cfg_pp")],
]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(("solver", "options", "order"), DETERMINISTIC, ids=str)
def test_order_of_convergence(solver: str, options: dict, order: int, kind: str) -> None:
    """Halving the steps divides the error by 2^order. The grid starts with tiny steps: a multistep method's first ones are of low order."""
    errors = []
    for n in (81, 162):
        log_snr = -np.log(12.0) + (np.log(12.0) - np.log(0.05)) * np.linspace(0, 1, n + 1) ** 2
        grid = through_ratios(PROCESSES[kind], np.exp(-log_snr))
        x = np.array([-1.3, 0.2, 2.1]) * grid.sigma[0]
        got = execute(make_plan(solver, grid, **options), gaussian.denoise, x)
        errors.append(np.abs(got - gaussian.exact(x, grid.point(0), grid.point(n))).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25), errors
    assert errors[1] < 0.05


def documented_orders() -> list[tuple[str, dict, int]]:
    """Every entry of the table of orders in docs/solvers.md: `name(option=value)`, with what "with option=value:" before it adds."""
    text = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text()
    found = []
    for order, cells in re.findall(r"^\| ([1-4]) \| (`.*) \|$", text, re.MULTILINE):
        for part in re.sub(r" \([^)`]*\)", "", cells).split(";"):  # without remarks
            more = eval(f"dict({(re.match(r' with (.*?):', part) or [None, ''])[1]})")
            for name, options in re.findall(r"`(\w+)(\(.*?\)(?=`))?`", part):
                found.append((name, more | eval(f"dict{options or '()'}"), int(order)))
    return [entry for entry in found if entry[0] != "flow_midpoint"]  # on other data: below


def test_the_table_of_orders_was_read() -> None:
    names = [(name, order) for name, _, order in documented_orders()]
    assert len(names) > 55 and ("unipc", 4) in names and ("deis", 2) in names and ("ipndm", 1) in names


@pytest.mark.parametrize(("solver", "options", "order"), documented_orders(), ids=str)
def test_documented_orders(solver: str, options: dict, order: int) -> None:
    """Solvers that lower the order of their last steps show their order only where those steps are tiny: on finer grids."""
    signature = inspect.signature(SOLVERS[solver]).parameters
    lowered = options.get("lower_order_final", "lower_order_final" in signature and signature["lower_order_final"].default)
    errors = []
    for n in (1200, 2400) if lowered else (81, 162):
        log_snr = -np.log(12.0) + (np.log(12.0) - np.log(0.05)) * np.linspace(0, 1, n + 1) ** 2
        grid = through_ratios(PROCESSES["ve"], np.exp(-log_snr))
        x = np.array([-1.3, 0.2, 2.1]) * grid.sigma[0]
        errors.append(
            np.abs(execute(make_plan(solver, grid, **options), gaussian.denoise, x) - gaussian.exact(x, grid.point(0), grid.point(n)))
        )
    assert np.log2(errors[0].max() / errors[1].max()) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("solver", "order"), [("flow_midpoint", 2), ("flow_heun", 2), ("flow_euler", 1)])
def test_order_on_flows_of_two_points(solver: str, order: int) -> None:
    """Data at -1 and 1, against scipy: Gaussian data is too kind to the midpoint method, whose error there falls by 8."""
    integrate = importlib.import_module("scipy.integrate")

    def data(x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(x * (1 - t) / t**2)

    x = np.array([-1.3, 0.2, 2.1])
    expected = integrate.solve_ivp(lambda t, x: (x - data(x, t)) / t, (0.97, 0.2), x, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    errors = []
    for n in (80, 160):
        plan = make_plan(solver, schedules.grid(schedules.flow(), sigmas=np.linspace(0.97, 0.2, n + 1)))
        errors.append(np.abs(execute(plan, lambda x, p: data(x, p.time), x) - expected).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2) and errors[1] < 0.02


STOCHASTIC = [
    ("ddim", {"eta": 0.4}),
    ("ddim", {"eta": 1.0}),
    ("ddpm", {}),
    ("euler_ancestral", {}),
    ("euler_ancestral", {"eta": 0.7}),
    ("consistency", {}),
    ("euler", {"s_churn": 3.0}),
    ("heun", {"s_churn": 100.0, "s_tmin": 0.3, "s_tmax": 5.0}),
    ("dpmpp_2m_sde", {}),
    ("dpmpp_2m_sde", {"eta": 0.5, "variant": "heun"}),
    ("dpmpp_3m_sde", {}),
    ("dpmpp_3m_sde", {"eta": 0.3}),
    ("lcm", {}),
    ("tcd", {}),
    ("tcd", {"eta": 0.8}),
    ("dpm2", {"s_churn": 3.0}),
    ("heunpp2", {"s_churn": 3.0}),
    ("dpm2_ancestral", {}),
    ("dpm2_ancestral", {"eta": 0.6}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"eta": 0.5}),
    ("restart", {"intervals": ((0.5, 3.0, 4, 2), (1.0, 4.0, 3, 2))}),
    ("seeds_2", {}),
    ("seeds_2", {"eta": 0.4}),
    ("seeds_3", {}),
    ("seeds_3", {"eta": 0.4}),
    ("res_multistep", {"eta": 1.0}),
    ("er_sde", {}),
    ("er_sde", {"order": 1}),
    ("er_sde", {"order": 2}),
    ("sa_solver", {}),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 1, "tau": 0.5}),
    ("sa_solver", {"predictor_order": 1, "corrector_order": 3, "tau": 0.7}),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 0}),
    *[(f"{name}_{form}", {}) for name in ("euler_ancestral", "dpmpp_2s_ancestral") for form in ("rf", "cfg_pp")],
    *[(f"{name}_rf", {"eta": 0.6}) for name in ("euler_ancestral", "dpm2_ancestral", "dpmpp_2s_ancestral")],
    ("dpm2_ancestral_rf", {}),
    ("res_multistep_cfg_pp", {"eta": 1.0}),
]
LEVELS = np.array([9.0, 6.2, 4.1, 2.4, 1.3, 0.9, 0.31, 0.08])


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize(("solver", "options"), STOCHASTIC, ids=str)
def test_noise_keeps_the_marginal_of_a_point(solver: str, options: dict, kind: str) -> None:
    """Data that is one point: d is that point, and x must stay exactly N(alpha x_0, sigma^2) however coarse the grid."""
    grid = through_ratios(PROCESSES[kind], LEVELS)
    plan = make_plan(solver, grid, **options)
    # x as coefficients of (1, initial noise, draw 1, draw 2, ...): the solver is linear in them.
    basis = np.eye(2 + len(plan.rows) + 1)
    first = plan.rows[0].point
    x = first.alpha * MEAN * basis[0] + first.sigma * basis[1]
    x = execute(plan, lambda x, p: MEAN * basis[0], x, {k: basis[1 + k] for k in range(1, len(plan.rows) + 1)})
    assert sum(row.draw > 0 for row in plan.rows) > 3
    assert x[0] == pytest.approx(grid.alpha[-1] * MEAN, rel=1e-12)
    assert np.linalg.norm(x[1:]) == pytest.approx(grid.sigma[-1], rel=1e-12)


@pytest.mark.parametrize(
    ("solver", "options"),
    [s for s in STOCHASTIC if "s_churn" not in s[1] and s[0] not in ("consistency", "lcm", "tcd", "restart")],
    ids=str,
)
def test_variance_converges_to_the_data(solver: str, options: dict) -> None:
    """Gaussian data: the variance at sigma 0 tends to the data's, at first order or better."""
    errors = []
    for n in (100, 200):
        grid = through_ratios(PROCESSES["ve"], np.append(np.geomspace(200.0, 0.002, n), 0.0))
        plan = make_plan(solver, grid, **options)
        basis = np.eye(1 + len(plan.rows) + 1)
        noise = {k: basis[k] for k in range(1, len(plan.rows) + 1)}
        x = execute(plan, lambda x, p: gaussian.denoise(x, p, mean=0.0), plan.scale * basis[0], noise)
        errors.append(abs(np.linalg.norm(x) / gaussian.STD - 1))
    assert errors[0] < 0.12 and errors[1] < 0.6 * errors[0], errors


CHURN = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 7.0, "s_noise": 1.01}
LITERAL = [
    *STOCHASTIC[:6],
    ("lms", {}),
    ("lms", {"order": 2}),
    ("ddpm", {"variance": "large"}),
    ("euler_ancestral", {"eta": 0.7, "s_noise": 1.1}),
    ("ddim", {}),
    ("euler", {}),
    ("heun", {}),
    ("euler", CHURN),
    ("heun", CHURN),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"variant": "heun"}),
    *[s for s in STOCHASTIC[8:] if s[0] not in ("lcm", "tcd", "dpm2", "heunpp2") and not s[0].endswith(("_rf", "_cfg_pp"))],
    ("consistency", {"epsilon": 0.2}),
    ("dpmpp_2m_sde", {"s_noise": 1.1}),
    ("dpmpp_3m_sde", {"s_noise": 1.1, "eta": 0.0}),
    *[("unipc", {"order": k, "variant": v}) for k in (1, 2, 3) for v in ("bh1", "bh2")],
    ("unipc", {"order": 3, "corrector": False}),
    ("dpm2", CHURN),
    *[(name, {"s_noise": 1.1, "eta": 0.7}) for name in ("dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2", "seeds_3")],
    *[(name, {"eta": 0.0}) for name in ("dpm2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2", "seeds_3", "res_multistep")],
    *[("dpmpp_singlestep", {"order": k, "variant": v}) for k in (1, 2, 3) for v in ("midpoint", "heun")],
    ("heunpp2", {}),
    ("heunpp2", CHURN),
    ("restart", {}),
    ("restart", {"intervals": ((0.2, 3.0, 4, 2),), "s_noise": 1.1}),
    *[("deis", {"order": k}) for k in (1, 2, 3)],
    *[("dpm_solver", {"order": k, "variant": v}) for k in (1, 2, 3) for v in ("midpoint", "heun")],
    *[("ipndm", {"order": k}) for k in (1, 2, 3, 4)],
    ("pndm", {}),
    ("gradient_estimation", {}),
    ("gradient_estimation", {"gamma": 1.3}),
    ("res_multistep", {"eta": 0.8, "s_noise": 1.1}),
    ("er_sde", {"s_noise": 1.1}),
    ("sa_solver", {"tau": 0.0}),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 3, "tau": 0.4, "s_noise": 1.1}),
]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("end", [(), (0.0,)], ids=["to sigma 0.08", "to sigma 0"])
@pytest.mark.parametrize(("solver", "options"), LITERAL, ids=str)
def test_equals_the_literal_loop(solver: str, options: dict, end: tuple[float, ...], kind: str) -> None:
    if kind != "vp" and solver == "ddpm" and options.get("variance") == "large":
        kind = "vp"  # beta is a notion of the variance preserving process
    levels = np.append(LEVELS, end)
    noise = PROCESSES[kind]
    plan = make_plan(solver, through_ratios(noise, levels), **options)
    rng = np.random.default_rng(0)
    draws = {row.draw: rng.standard_normal(3) for row in plan.rows if row.draw}
    y = rng.standard_normal(3) * levels[0]

    def model(y: np.ndarray, level: float) -> np.ndarray:
        return np.tanh(y / (1 + level)) + 0.3 * np.cos(3 * level)

    got = execute(plan, lambda x, p: model(x / p.alpha, p.sigma / p.alpha), y * plan.rows[0].point.alpha, draws)
    alpha_end = noise.at_ratio(levels[-1])[0]
    expected = getattr(literal, solver)(model, y, levels, list(draws.values()), **options)
    np.testing.assert_allclose(got / alpha_end, expected, rtol=2e-12, atol=2e-12)


@pytest.mark.parametrize("solver", ["flow_euler", "flow_heun", "flow_midpoint"])
def test_flow_equals_the_literal_loop_from_pure_noise(solver: str) -> None:
    times = np.array([1.0, 0.93, 0.8, 0.5, 0.44, 0.1, 0.0])
    plan = make_plan(solver, schedules.grid(schedules.flow(), sigmas=times))
    x = np.random.default_rng(0).standard_normal(3)
    got = execute(plan, lambda x, p: x - p.time * np.sin(2 * x + p.time), x)
    np.testing.assert_allclose(got, getattr(literal_flow, solver)(lambda x, t: np.sin(2 * x + t), x, times), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("end", [0.06, 0.0])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        *[(f"{name}_ancestral_rf", o) for name in ("euler", "dpm2", "dpmpp_2s") for o in ({}, {"eta": 0.7, "s_noise": 1.1}, {"eta": 0.0})],
    ],
    ids=str,
)
def test_rectified_flow_forms_equal_the_literal_loops(solver: str, options: dict, end: float) -> None:
    times = np.array([0.97, 0.93, 0.8, 0.5, 0.44, 0.1, end])
    plan = make_plan(solver, schedules.grid(schedules.flow(), sigmas=times), **options)
    rng = np.random.default_rng(0)
    x, draws = rng.standard_normal(3), {row.draw: rng.standard_normal(3) for row in plan.rows if row.draw}

    def model(x: np.ndarray, t: float) -> np.ndarray:
        return np.tanh(x / (1 + t)) + 0.3 * np.cos(3 * t)

    got = execute(plan, lambda x, p: model(x, p.sigma), x, draws)
    expected = getattr(literal_flow, solver)(model, x, times, list(draws.values()), **options)
    np.testing.assert_allclose(got, expected, rtol=2e-12, atol=2e-12)


CFG_PP = [
    ("euler_cfg_pp", {}),
    ("dpmpp_2m_cfg_pp", {}),
    ("gradient_estimation_cfg_pp", {"gamma": 1.7}),
    *[
        (name, o)
        for name in ("euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp")
        for o in ({}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0})
    ],
    *[("res_multistep_cfg_pp", o) for o in ({}, {"eta": 0.6, "s_noise": 1.1})],
]


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("end", [(), (0.0,)], ids=["to sigma 0.08", "to sigma 0"])
@pytest.mark.parametrize(("solver", "options"), CFG_PP, ids=str)
def test_cfg_pp_equals_the_literal_loop(solver: str, options: dict, end: tuple[float, ...], kind: str) -> None:
    levels, noise = np.append(LEVELS, end), PROCESSES[kind]
    plan = make_plan(solver, through_ratios(noise, levels), **options)
    rng = np.random.default_rng(0)
    draws, y = {row.draw: rng.standard_normal(3) for row in plan.rows if row.draw}, rng.standard_normal(3) * levels[0]

    def unconditional(y: np.ndarray, level: float) -> np.ndarray:
        return np.tanh(y / (1 + level)) + 0.3 * np.cos(3 * level)

    def guided(y: np.ndarray, level: float) -> np.ndarray:
        return unconditional(y, level) + 0.4 * np.sin(y + level)

    got = execute(
        plan,
        lambda x, p: guided(x / p.alpha, p.sigma / p.alpha),
        y * plan.rows[0].point.alpha,
        draws,
        lambda x, p: unconditional(x / p.alpha, p.sigma / p.alpha),
    )
    expected = getattr(literal_cfg_pp, solver)(guided, unconditional, y, levels, list(draws.values()), **options)
    np.testing.assert_allclose(got / noise.at_ratio(levels[-1])[0], expected, rtol=2e-12, atol=2e-12)


WIDEST = [
    ("unipc", {"order": 3, "variant": "bh1"}),
    ("pndm", {"prk": True}),
    ("dpm_solver", {"order": 3}),
    ("dpmpp_singlestep", {"order": 3, "variant": "heun"}),
    ("sa_solver", {"predictor_order": 3, "corrector_order": 3, "tau": 0.5}),
]


@pytest.mark.parametrize(
    ("solver", "options"),
    [*((name, {}) for name in sorted(set(SOLVERS) - {"heun", "restart", "ddim_inverse"})), *WIDEST],
    ids=str,
)
def test_zero_terminal_snr(solver: str, options: dict) -> None:
    """From alpha = 0 all but Heun's method and its restarts take a finite first step; with exact d for point data they end at the point."""
    grid = schedules.grid(schedules.zero_terminal_snr(schedules.scaled_linear()), 8)
    assert grid.alpha[0] == 0
    plan = make_plan(solver, grid, **options)
    assert execute(plan, lambda x, p: MEAN + 0 * x, np.ones(1), dict.fromkeys(range(1, 20), np.ones(1)))[0] == pytest.approx(
        MEAN, abs=1e-12
    )


@pytest.mark.parametrize("solver", ["heun", "restart"])
def test_heun_refuses_zero_terminal_snr(solver: str) -> None:
    with pytest.raises(ValueError, match=rf"solver: got '{solver}'.*supported: a grid that starts at alpha > 0"):
        make_plan(solver, schedules.grid(schedules.flow(), 4))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(("solver", "options"), [*((name, {}) for name in sorted(SOLVERS)), *WIDEST], ids=str)
def test_few_steps(solver: str, options: dict, steps: int) -> None:
    """The shortest plans work; one step from noise returns the denoised prediction."""
    plan = make_plan(solver, schedules.grid(schedules.edm(), steps), **options)
    rng = np.random.default_rng(0)
    out = execute(plan, gaussian.denoise, np.array([40.0]), {row.draw: rng.standard_normal(1) for row in plan.rows})
    assert np.isfinite(out).all()
    if steps == 1 and solver not in ("ddim_inverse", "flow_midpoint"):
        assert out == pytest.approx(gaussian.denoise(40.0, plan.rows[0].point))


def test_unknown_names_offer_the_nearest() -> None:
    grid = schedules.grid(schedules.edm(), 4)
    with pytest.raises(ValueError, match=r"solver: got 'dpmp_2m' \(did you mean dpmpp_2m"):
        make_plan("dpmp_2m", grid)
    with pytest.raises(ValueError, match=r"options: got 'churn' \(did you mean s_churn"):
        make_plan("euler", grid, churn=1.0)
    with pytest.raises(ValueError, match=r"options: got 'eta', supported: none"):
        make_plan("flow_euler", grid, eta=1.0)
    with pytest.raises(ValueError, match=r"variant: got 'bh3', supported: 'bh1', 'bh2'"):
        make_plan("unipc", grid, variant="bh3")
    with pytest.raises(ValueError, match=r"eta: got 1.5, supported: a number in \[0, 1\]"):
        make_plan("tcd", grid, eta=1.5)
    with pytest.raises(
        ValueError, match=r"intervals: got \(0.1, 0.001, 9, 1\) at the grid's sigma 0.002, supported: t_max above that sigma"
    ):
        make_plan("restart", grid, intervals=[(0.1, 0.001, 9, 1)])


def test_registry_is_whole() -> None:
    """Every solver has a docstring and keyword-only options with defaults, so that a name alone is enough."""
    for name, function in SOLVERS.items():
        _, *options = inspect.signature(function).parameters.values()
        assert function.__doc__ and function.__name__ == name
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options)


def _row(outputs: dict) -> Row:
    return Row(Point(1.0, 1.0, 1.0), outputs)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([_row({0: {"x": 1.0, 2: 1.0}})], r"row 0 reads slots \[2\] before they are written"),
        ([_row({1: {"x": 1.0}})], "row 0 does not write the state"),
        ([_row({0: {"x": float("inf")}})], "not finite in row 0"),
        ([_row({k: {"x": 1.0} for k in range(4)})], "with 4 outputs"),
    ],
)
def test_assemble_checks_rows(rows: list[Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(lambda g: iter(rows), schedules.grid(schedules.edm(), 4))


def test_the_documented_example_of_a_new_solver() -> None:
    """docs/solvers.md's Adams-Bashforth is second order, used as a plain function."""
    text = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text()
    source = next(block for block in text.split("```python\n") if block.startswith("def adams_bashforth_2")).split("```")[0]
    scope = {"Grid": schedules.Grid, "Row": Row, "Iterator": Iterator}
    exec(source, scope)
    errors = []
    for n in (100, 200):
        grid = through_ratios(PROCESSES["vp"], np.geomspace(12, 0.05, n + 1))
        x = np.array([-1.3, 0.2, 2.1])
        got = execute(make_plan(scope["adams_bashforth_2"], grid), gaussian.denoise, x)
        errors.append(np.abs(got - gaussian.exact(x, grid.point(0), grid.point(n))).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("unipc", {"order": 3}),
        ("unipc", {"variant": "bh1"}),
        ("dpmpp_2m", {"order": 3}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_3m_sde", {}),
        ("heun", {}),
    ],
    ids=str,
)
def test_a_step_to_sigma_zero_returns_the_denoised_prediction(solver: str, options: dict) -> None:
    if solver != "heun":
        options = options | {"lower_order_final": False}
    plan = make_plan(solver, schedules.grid(schedules.edm(), 6), **options)
    assert plan.rows[-1].outputs[0] == {"d": pytest.approx(1.0, abs=1e-12)}
