"""What diffusers' schedulers can be asked for, as axes of choices."""

from __future__ import annotations

from typing import Any

import torch

from .grid import Axes, Choice


def _init(name: str, *values: Any) -> list[Choice]:
    return [Choice(str(value), init={name: value}) for value in values]


def _step(name: str, *values: Any) -> list[Choice]:
    return [Choice(str(value), step={name: value}) for value in values]


def _run(name: str, *values: Any) -> list[Choice]:
    return [Choice(str(value), run={name: value}) for value in values]


def _flags(*names: str) -> list[Choice]:
    """None of some exclusive switches, or one of them."""
    return [Choice("none"), *(Choice(name.removeprefix("use_"), init={name: True}) for name in names)]


_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# Of every class: how it is run. ``start`` is the share of the steps that image to image leaves out.
_RUN: Axes = {
    "dtype": [Choice(str(dtype).removeprefix("torch."), run={"dtype": dtype}) for dtype in _DTYPES],
    "steps": _run("steps", 9, 4, 1, 16),
    "start": _run("start", 0.0, 0.4),
    "generator": _run("generator", "one", "list", "global"),
    "return_dict": _run("return_dict", False, True),
    "layout": _run("layout", torch.contiguous_format, torch.channels_last),
}
_BETAS = [
    Choice("default"),
    Choice("scaled_linear", init={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    Choice("squaredcos", init={"beta_schedule": "squaredcos_cap_v2"}),
]
_ZERO_SNR = Choice("zero_snr", init={"rescale_betas_zero_snr": True})
_PREDICTION = _init("prediction_type", "epsilon", "v_prediction", "sample")
_SPACING = _init("timestep_spacing", "leading", "trailing", "linspace")
_OFFSET = _init("steps_offset", 0, 1)
_SIGMAS = _flags("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_FLOW = Choice("flow", init={"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0})
_THRESHOLD = [
    Choice("none"),
    Choice("threshold", init={"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}),
]
_CLIP = [
    Choice("none", init={"clip_sample": False}),
    Choice("clip", init={"clip_sample": True, "clip_sample_range": 0.7}),
    Choice("threshold", init={"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}),
]
_CHURN = [Choice("none"), Choice("churn", step={"s_churn": 2.0, "s_tmin": 0.01, "s_tmax": 50.0, "s_noise": 1.01})]
_TIMES = [Choice("default"), Choice("timesteps", grid={"timesteps": [980, 801, 640, 433, 250, 120, 31]})]
_NOISE = [Choice("drawn"), Choice("given", run={"variance_noise": True})]
_KARRAS_STEPS: Axes = {"betas": _BETAS, "prediction": _PREDICTION, "spacing": _SPACING, "offset": _OFFSET, "sigmas": _SIGMAS}
_MULTISTEP: Axes = {
    "betas": [*_BETAS, _ZERO_SNR],
    "prediction": _PREDICTION,
    "spacing": _SPACING,
    "sigmas": [*_SIGMAS, _FLOW],
    "threshold": _THRESHOLD,
    "lower": _init("lower_order_final", True, False),
}
_EDM: Axes = {
    "prediction": _init("prediction_type", "epsilon", "v_prediction"),
    "schedule": _init("sigma_schedule", "karras", "exponential"),
}
_FINAL = _init("final_sigmas_type", "zero", "sigma_min")
_FLOW_SHIFT = [
    Choice("1"),
    Choice("3", init={"shift": 3.0}),
    Choice("dynamic", init={"use_dynamic_shifting": True}, grid={"mu": 0.8}),
    Choice("terminal", init={"shift_terminal": 0.1}),
    Choice("linear", init={"use_dynamic_shifting": True, "time_shift_type": "linear"}, grid={"mu": 1.6}),
]
_FLOW_GRID = [Choice("default"), Choice("sigmas", grid={"sigmas": [1.0, 0.9, 0.75, 0.5, 0.3, 0.1]})]


def _solvers(*pairs: tuple[str, str]) -> list[Choice]:
    return [Choice(f"{a}/{b}", init={"algorithm_type": a, "solver_type": b}) for a, b in pairs]


_DPM = [(a, b) for a in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver") for b in ("midpoint", "heun")]

AXES: dict[str, Axes] = {
    "DDIMScheduler": {
        "betas": [*_BETAS, _ZERO_SNR],
        "prediction": _PREDICTION,
        "spacing": _SPACING,
        "offset": _OFFSET,
        "clip": _CLIP,
        "to_one": _init("set_alpha_to_one", True, False),
        "eta": _step("eta", 0.0, 1.0, 0.4),
        "clipped": _step("use_clipped_model_output", False, True),
        "noise": _NOISE,
    },
    "DDIMInverseScheduler": {
        "betas": [*_BETAS, _ZERO_SNR],
        "prediction": _PREDICTION,
        "spacing": _SPACING,
        "clip": _CLIP[:2],
        "to_one": _init("set_alpha_to_one", True, False),
    },
    "DDPMScheduler": {
        "betas": [*_BETAS, _ZERO_SNR, Choice("sigmoid", init={"beta_schedule": "sigmoid"})],
        "prediction": _PREDICTION,
        "spacing": _SPACING,
        "clip": _CLIP,
        "variance": [
            *_init("variance_type", "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
            Choice("learned", init={"variance_type": "learned"}, run={"learned": True}),
            Choice("learned_range", init={"variance_type": "learned_range"}, run={"learned": True}),
            Choice("dropped", init={"variance_type": "fixed_small"}, run={"learned": True}),
        ],
        "times": _TIMES,
    },
    "EulerDiscreteScheduler": {
        **_KARRAS_STEPS,
        "betas": [*_BETAS, _ZERO_SNR],
        "interpolation": _init("interpolation_type", "linear", "log_linear"),
        "final": _FINAL,
        "churn": _CHURN,
        "times": [*_TIMES, Choice("sigmas", grid={"sigmas": [12.0, 6.0, 3.0, 1.5, 0.7, 0.2, 0.0]})],
        "continuous": [Choice("discrete"), Choice("continuous", init={"timestep_type": "continuous", "prediction_type": "v_prediction"})],
    },
    "EulerAncestralDiscreteScheduler": {"betas": [*_BETAS, _ZERO_SNR], "prediction": _PREDICTION, "spacing": _SPACING, "offset": _OFFSET},
    "HeunDiscreteScheduler": {**_KARRAS_STEPS, "clip": _CLIP[:2], "times": _TIMES},
    "KDPM2DiscreteScheduler": {**_KARRAS_STEPS, "trained": _init("num_train_timesteps", 200)},  # which its constructor's time follows
    "KDPM2AncestralDiscreteScheduler": {**_KARRAS_STEPS, "trained": _init("num_train_timesteps", 200)},
    "LMSDiscreteScheduler": {**_KARRAS_STEPS, "order": _step("order", 4, 3, 2, 1)},
    "PNDMScheduler": {
        "betas": _BETAS,
        "prediction": _PREDICTION[:2],
        "spacing": _SPACING,
        "offset": _OFFSET,
        "prk": _init("skip_prk_steps", True, False),
        "to_one": _init("set_alpha_to_one", True, False),
    },
    "IPNDMScheduler": {},
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        "order": _init("solver_order", 2, 1, 3),
        "algorithm": _solvers(*_DPM),
        "sigmas": [*_SIGMAS, Choice("lu", init={"use_lu_lambdas": True}), _FLOW],
        "euler": _init("euler_at_final", False, True),
        "final": _FINAL,
        "clipped": _init("lambda_min_clipped", -float("inf"), -5.1),
        "times": _TIMES,
        "noise": _NOISE,
    },
    "DPMSolverSinglestepScheduler": {
        **{name: axis for name, axis in _MULTISTEP.items() if name != "spacing"},
        "betas": _BETAS,
        "order": _init("solver_order", 2, 1, 3),
        "algorithm": _solvers(*_DPM[:6]),
        "final": _FINAL,
        "times": _TIMES,
    },
    "DPMSolverSDEScheduler": {**_KARRAS_STEPS, "noise": _step("s_noise", 1.0, 1.1), "seed": _init("noise_sampler_seed", 5, None)},
    "DEISMultistepScheduler": {**_MULTISTEP, "betas": _BETAS, "order": _init("solver_order", 2, 1, 3)},
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        "order": _init("solver_order", 2, 1, 3),
        "solver": _init("solver_type", "bh2", "bh1"),
        "x0": _init("predict_x0", True, False),
        "corrector": _init("disable_corrector", [], [0, 1]),
        "final": _FINAL,
    },
    "SASolverScheduler": {
        **_MULTISTEP,
        "betas": _BETAS,
        "predictor": _init("predictor_order", 2, 1, 3),
        "corrector": _init("corrector_order", 2, 1, 0, 3),
        "algorithm": _init("algorithm_type", "data_prediction", "noise_prediction"),
    },
    "EDMEulerScheduler": {
        **_EDM,
        "final": _FINAL,
        "churn": _CHURN,
        "times": [Choice("default"), Choice("sigmas", grid={"sigmas": [60.0, 20.0, 5.0, 1.0, 0.1]})],
    },
    "EDMDPMSolverMultistepScheduler": {
        **_EDM,
        "final": _FINAL,
        "order": _init("solver_order", 2, 1, 3),
        "algorithm": _solvers(*(pair for pair in _DPM if "++" in pair[0])),
        "threshold": _THRESHOLD,
        "lower": _init("lower_order_final", True, False),
        "euler": _init("euler_at_final", False, True),
    },
    "CosineDPMSolverMultistepScheduler": {
        **_EDM,
        "final": _FINAL,
        "order": _init("solver_order", 2, 1),
        "solver": _init("solver_type", "midpoint", "heun"),
        "lower": _init("lower_order_final", True, False),
        "euler": _init("euler_at_final", False, True),
    },
    "LCMScheduler": {
        "betas": [*_BETAS, _ZERO_SNR],
        "prediction": _PREDICTION,
        "clip": _CLIP,
        "scaling": _init("timestep_scaling", 10.0, 3.0),
        "times": [Choice("default"), Choice("timesteps", grid={"timesteps": [999, 759, 499, 259]})],
    },
    "TCDScheduler": {
        "betas": [*_BETAS, _ZERO_SNR],
        "prediction": _PREDICTION,
        "clip": _CLIP,
        "eta": _step("eta", 0.3, 0.0, 1.0),
        "times": [Choice("default"), Choice("timesteps", grid={"timesteps": [999, 759, 499, 259]})],
    },
    "CMStochasticIterativeScheduler": {
        "clip": _init("clip_denoised", True, False),
        "noise": _init("s_noise", 1.0, 1.1),
        "times": [Choice("default"), Choice("timesteps", grid={"timesteps": [39, 22, 10, 0]})],
    },
    "FlowMatchEulerDiscreteScheduler": {
        "shift": _FLOW_SHIFT,
        "sigmas": _SIGMAS,
        "invert": _init("invert_sigmas", False, True),
        "stochastic": _init("stochastic_sampling", False, True),
        "times": _FLOW_GRID,
    },
    "FlowMatchHeunDiscreteScheduler": {"shift": _FLOW_SHIFT[:2], "churn": _CHURN},
    "FlowMatchLCMScheduler": {"shift": _FLOW_SHIFT, "sigmas": _SIGMAS, "times": _FLOW_GRID},
}


def axes_of(name: str) -> Axes:
    """The axes of a class; one without an entry here is run with its defaults."""
    return {**_RUN, **AXES.get(name, {})}
