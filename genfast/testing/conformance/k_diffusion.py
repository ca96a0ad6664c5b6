"""Samplers of k-diffusion against their drop-ins."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .grid import Axes, Case, Choice, cover
from .judge import Outcome, judge
from .report import Result

_HIGH, _LOW = 14.6, 0.03


def _step(name: str, *values: Any) -> list[Choice]:
    return [Choice(str(value), step={name: value}) for value in values]


def _run(name: str, *values: Any) -> list[Choice]:
    return [Choice(str(value).removeprefix("torch."), run={name: value}) for value in values]


_RUN: Axes = {
    "dtype": _run("dtype", torch.float32, torch.float64, torch.float16),
    "steps": _run("steps", 8, 1, 3, 15),
    "shape": _run("shape", (2, 3, 8, 8), (4, 5), (7,), (2, 3, 2, 4, 4)),
    "callback": _run("callback", True, False),
}
_END: Axes = {"end": _run("end", "zero", "sigma"), "spacing": _run("spacing", "karras", "exponential", "vp")}
_CHURN: Axes = {"churn": [Choice("none"), Choice("churn", step={"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01})]}
_NOISE: Axes = {"eta": _step("eta", 1.0, 0.0, 0.5), "s_noise": _step("s_noise", 1.0, 1.1)}
_PID = {"rtol": 0.01, "atol": 0.001, "pcoeff": 0.2, "icoeff": 0.4, "dcoeff": 0.1, "h_init": 0.1}

AXES: dict[str, Axes] = {
    "sample_euler": {**_END, **_CHURN},
    "sample_heun": {**_END, **_CHURN},
    "sample_dpm_2": {**_END, **_CHURN},
    "sample_euler_ancestral": {**_END, **_NOISE},
    "sample_dpm_2_ancestral": {**_END, **_NOISE},
    "sample_dpmpp_2s_ancestral": {**_END, **_NOISE},
    "sample_dpmpp_sde": {**_END, **_NOISE, "r": _step("r", 1 / 2, 0.3)},
    "sample_dpmpp_2m_sde": {**_END, **_NOISE, "solver": _step("solver_type", "midpoint", "heun", "other")},
    "sample_dpmpp_3m_sde": {**_END, **_NOISE},
    "sample_dpmpp_2m": _END,
    "sample_lms": {**_END, "order": _step("order", 4, 3, 2, 1)},
    "sample_dpm_fast": {**_NOISE, "ends": _run("ends", (_LOW, _HIGH), (0.5, 2.0), (0.0, _HIGH))},
    "sample_dpm_adaptive": {
        "dtype": _run("dtype", torch.float32, torch.float64),  # in float16 its steps follow from the rounding
        **_NOISE,
        "ends": _run("ends", (_LOW, _HIGH), (0.5, 2.0), (0.0, _HIGH)),
        "order": _step("order", 3, 2, 1),
        "control": [Choice("default"), Choice("pid", step=_PID)],
    },
}
_WITHOUT_SAMPLER = (*[name for name, axes in AXES.items() if "churn" in axes], "sample_lms", "sample_dpmpp_2m")


def samplers() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Every sampler that `genfast.compat.k_diffusion` exports, by name: upstream's and the drop-in."""
    try:
        from k_diffusion import sampling
    except ImportError as error:
        raise ImportError(f"conformance: k-diffusion cannot be imported ({error}), supported: pip install k-diffusion") from None
    from genfast.compat import k_diffusion as compat

    names = [name for name in compat.__all__ if name.startswith("sample_") and hasattr(sampling, name)]
    return {name: (getattr(sampling, name), getattr(compat, name)) for name in names}


def check_sampler(stock: Callable[..., Any], ours: Callable[..., Any], quick: bool) -> Iterator[Result]:
    name = stock.__name__

    def accepts(case: Case) -> tuple[bool, tuple[Outcome, Outcome]]:
        outcome, exact = run(stock, name, case), run(stock, name, case, wide=True)
        # Where stock's rounding of a sigma to 0 takes another branch, there is nothing to compare with.
        return outcome.usable and outcome.facts[-1:] == exact.facts[-1:], (outcome, exact)

    for case, accepted, (expected, exact) in cover({**_RUN, **AXES.get(name, {})}, 1 if quick else 2, accepts):
        if accepted or expected.raised not in (None, "UnboundLocalError"):  # the last is a mistake of upstream's, with one step
            verdict = judge(case.merged("run")["dtype"], run(ours, name, case), expected, exact)
            yield Result(name, str(case), verdict, True, accepted)


def run(sampler: Callable[..., Any], name: str, case: Case, wide: bool = False) -> Outcome:
    """One call of ``case``. ``wide``: in float64, with the noise of the case's own dtype."""
    outcome = Outcome()
    before = torch.get_default_dtype()
    dtype = torch.float64 if wide else case.merged("run")["dtype"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The DPM-Solvers' times have it.
        torch.set_default_dtype(torch.float64 if dtype == torch.float64 else torch.float32)
        try:
            _call(sampler, name, case, dtype, outcome)
        except Exception as error:
            outcome.raised = type(error).__name__
        finally:
            torch.set_default_dtype(before)
    return outcome


def _call(sampler: Callable[..., Any], name: str, case: Case, dtype: torch.dtype, outcome: Outcome) -> None:
    from genfast.compat import k_diffusion as compat

    how, options = case.merged("run"), case.merged("step")
    # In x's dtype: where they are wider, upstream's x becomes as wide, and the drop-in's does not.
    sigmas = _sigmas(compat, how).to(how["dtype"]).to(dtype) if "end" in how else None
    x = torch.randn(how["shape"], generator=torch.Generator().manual_seed(1), dtype=torch.float64) * _HIGH
    x = x.to(how["dtype"]).to(dtype)
    noise = torch.Generator().manual_seed(2)

    def drawn(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.randn(how["shape"], generator=noise, dtype=how["dtype"]).to(dtype)

    def model(x: Tensor, sigma: Tensor, gain: float) -> Tensor:
        wide_x, s = (t if dtype == torch.float64 else t.float() for t in (x, sigma.view(-1, *[1] * (x.ndim - 1))))
        return torch.tanh(gain * wide_x / (1 + s * s).sqrt() + 0.3 * torch.cos(wide_x)).to(x.dtype)

    seen: list[dict[str, Any]] = []
    if name not in _WITHOUT_SAMPLER:
        options["noise_sampler"] = drawn
    if how["callback"]:
        options["callback"] = seen.append
    if name == "sample_dpm_adaptive":
        options["return_info"] = True
    torch.manual_seed(17)
    grid = [sigmas] if sigmas is not None else [*how["ends"]] + ([how["steps"]] if name == "sample_dpm_fast" else [])
    result = sampler(model, x, *grid, extra_args={"gain": 0.9}, disable=True, **options)
    for k, step in enumerate(seen):
        outcome.facts.append((f"callback {k}", sorted(step)))
        if name != "sample_dpm_adaptive":  # its steps follow from the rounding of the state
            outcome.tensors += [(f"step {k}, {key}", step[key]) for key in ("x", "denoised")]
    if isinstance(result, tuple):
        result, info = result
        if dtype == torch.float64:
            outcome.facts.append(("info", sorted(info.items())))
    state = [bytes(t.numpy()) for t in (torch.get_rng_state(), noise.get_state())]
    outcome.facts.append(("random state", state))
    outcome.tensors.append(("result", result))


def _sigmas(compat: Any, how: dict[str, Any]) -> Tensor:
    n = how["steps"] + (how["end"] == "sigma")
    ends = () if how["spacing"] == "vp" else (_LOW, _HIGH)
    sigmas: Tensor = getattr(compat, f"get_sigmas_{how['spacing']}")(n, *ends)
    return sigmas if how["end"] == "zero" else sigmas[:-1]
