"""Fused diffusers schedulers beyond the defaults: however diffusers' pipelines and users call one, it gives the stock result."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from fused_runs import CLASSES, NOISY, PATHWISE, SHAPE, Outputs, difference, gen, make, net, run, start
from torch import Tensor

import genfast.compat.diffusers as fused
from genfast import reference
from genfast.compat.diffusers import rows
from genfast.compat.diffusers.state import content
from genfast.reference.noise import normal
from genfast.samplers import BrownianPath

pytestmark = pytest.mark.filterwarnings("ignore")


def from_the_middle(s: Any) -> Outputs:
    s.set_timesteps(8)
    if hasattr(s, "set_begin_index"):
        s.set_begin_index(4)
    return run(s, start(s), s.timesteps[4:], gen())


def from_the_middle_unannounced(s: Any) -> Outputs:
    s.set_timesteps(8)
    return run(s, start(s), s.timesteps[4:], gen())


def one_trajectory_after_another(s: Any) -> Outputs:
    s.set_timesteps(5)
    out = run(s, start(s), s.timesteps[:3], gen())
    s.set_timesteps(5)
    out += run(s, start(s, (1, 3, 5, 4)), s.timesteps, gen())
    s.set_timesteps(7)
    return out + run(s, start(s, dtype=torch.float64), s.timesteps, gen())


def copied_on_the_way(s: Any) -> Outputs:
    s.set_timesteps(6)
    out = run(s, start(s), s.timesteps[:3], gen())
    if type(s).__name__ in PATHWISE:
        return out  # torchsde's tree cannot be copied
    other, x = copy.deepcopy(s), out[-1][0]
    return out + run(s, x, s.timesteps[3:], gen(2)) + run(other, x, other.timesteps[3:], gen(3))


def two_states_in_turn(s: Any) -> Outputs:
    """As the panorama pipeline: one object, several trajectories, its attributes exchanged between steps."""
    s.set_timesteps(5)
    if type(s).__name__ in PATHWISE | {"IPNDMScheduler"}:
        return []  # torchsde's tree cannot be copied; stock appends to a list that copies of its attributes share
    states, xs, out = [copy.deepcopy(s.__dict__) for _ in range(2)], [start(s, seed=k) for k in range(2)], []
    for t in s.timesteps:
        for j in range(2):
            s.__dict__.update(states[j])
            out += run(s, xs[j], [t], gen(j))
            xs[j], states[j] = out[-1][0], copy.deepcopy(s.__dict__)
    return out


def in_inference_mode_and_out(s: Any) -> Outputs:
    s.set_timesteps(6)
    with torch.inference_mode():
        out = run(s, start(s), s.timesteps[:3], gen())
    return out + run(s, out[-1][0].clone(), s.timesteps[3:], gen())


def under_autocast(s: Any) -> Outputs:
    s.set_timesteps(4)
    with torch.autocast("cpu", torch.bfloat16):
        return run(s, start(s), s.timesteps, gen())


def of_other_strides(s: Any) -> Outputs:
    s.set_timesteps(4)
    out = run(s, start(s, (2, 4, 4, 3)).permute(0, 3, 1, 2), s.timesteps, gen())
    s.set_timesteps(4)
    return out + run(s, start(s, (2, 3, 4, 8))[..., ::2], s.timesteps, gen())


def of_any_rank(s: Any) -> Outputs:
    out = []
    for shape in [(7,), (3, 7), (2, 3, 7), (1, 2, 3, 4, 4), (0, 3, 4, 4)]:
        s.set_timesteps(4)
        out += run(s, start(s, shape), s.timesteps, gen())
    return out


def of_two_dtypes(s: Any) -> Outputs:
    out = []
    for dtype, model_dtype in [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float64, torch.float64)]:
        s.set_timesteps(4)
        out += run(s, start(s, dtype=dtype), s.timesteps, gen(), model_dtype=model_dtype)
    return out


def of_given_sigmas_or_timesteps(s: Any) -> Outputs:
    out, names = [], inspect.signature(s.set_timesteps).parameters
    if "sigmas" in names:
        flow = "Flow" in type(s).__name__
        levels = [0.9, 0.7, 0.5, 0.2, 0.1] if flow else [9.0, 4.0, 2.0, 1.0, 0.2] + [0.0] * ("Euler" not in type(s).__name__)
        s.set_timesteps(sigmas=levels)
        out += run(s, start(s), s.timesteps, gen())
    if "timesteps" in names and "Flow" not in type(s).__name__:
        s.set_timesteps(timesteps=[900, 700, 510, 200, 90])
        out += run(s, start(s), s.timesteps, gen())
    return out


def out_of_order(s: Any) -> Outputs:
    if not getattr(s, "stateless", "_step_index" not in s.__dict__ and "ets" not in s.__dict__):
        return []
    s.set_timesteps(8)
    return [run(s, start(s), [s.timesteps[k]], gen(k))[0] for k in (3, 1, 1, 5, 0)]


def with_timesteps_that_are_not_next(s: Any) -> Outputs:
    if type(s).__name__ not in ("LCMScheduler", "TCDScheduler"):
        return []
    s.set_timesteps(5)
    return run(s, start(s), s.timesteps[[0, 2, 1, 3]], gen())


def twice_at_one_index(s: Any) -> Outputs:
    """As the cosmos pipelines: a step, ``_step_index -= 1``, the step again."""
    if type(s).__name__ not in ("EulerDiscreteScheduler", "EDMEulerScheduler", "EulerAncestralDiscreteScheduler"):
        return []
    s.set_timesteps(5)
    x, out = start(s), []
    for t in s.timesteps:
        run(s, x, [t], gen())
        s._step_index -= 1
        out += run(s, x, [t], gen())
        x = out[-1][0]
    return out


def with_noise_of_the_global_generator(s: Any) -> Outputs:
    torch.manual_seed(11)
    s.set_timesteps(4)
    return [*run(s, start(s), s.timesteps), (torch.randn(3),)]


def with_a_generator_for_every_sample(s: Any) -> Outputs:
    s.set_timesteps(4)
    return run(s, start(s), s.timesteps, [gen(1), gen(2)])


def with_numbers_for_timesteps(s: Any) -> Outputs:
    s.set_timesteps(4)
    kind = float if s.timesteps.dtype.is_floating_point else int
    return run(s, start(s), [kind(t) for t in s.timesteps], gen())


def with_other_sigmas_on_the_way(s: Any) -> Outputs:
    s.set_timesteps(5)
    out = run(s, start(s), s.timesteps[:2], gen())
    if isinstance(s.__dict__.get("sigmas"), Tensor):
        s.sigmas = s.sigmas * 0.9
    return out + run(s, out[-1][0], s.timesteps[2:], gen())


def with_another_config_on_the_way(s: Any) -> Outputs:
    s.set_timesteps(5)
    out = run(s, start(s), s.timesteps[:2], gen())
    if "clip_sample" in s.config:
        s.register_to_config(clip_sample=not s.config.clip_sample)
    return out + run(s, out[-1][0], s.timesteps[2:], gen())


def in_one_step(s: Any) -> Outputs:
    s.set_timesteps(1)
    return run(s, start(s), s.timesteps, gen())


def in_two_steps(s: Any) -> Outputs:
    s.set_timesteps(2)
    return run(s, start(s), s.timesteps, gen())


def in_many_steps(s: Any) -> Outputs:
    """A trace that grew with what a class keeps, not with the steps, would not end."""
    s.set_timesteps(200 if type(s).__name__ == "IPNDMScheduler" else 40)
    return run(s, start(s), s.timesteps[:3], gen())


SCENARIOS = [
    from_the_middle, from_the_middle_unannounced, one_trajectory_after_another, copied_on_the_way, two_states_in_turn,
    in_inference_mode_and_out, under_autocast, of_other_strides, of_any_rank, of_two_dtypes, of_given_sigmas_or_timesteps, out_of_order,
    with_timesteps_that_are_not_next, twice_at_one_index, with_noise_of_the_global_generator, with_a_generator_for_every_sample,
    with_numbers_for_timesteps, with_other_sigmas_on_the_way, with_another_config_on_the_way, in_one_step, in_two_steps, in_many_steps,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda f: f.__name__)
def test_equals_stock(scenario: Callable[[Any], Outputs]) -> None:
    different: dict[str, Any] = {}
    compared = 0
    for name in CLASSES:
        outcomes: list[Any] = []
        for module in (diffusers, fused):
            torch.manual_seed(5)
            try:
                outcomes.append(scenario(make(module, name)))
            except Exception as error:
                outcomes.append(type(error))
        expected, found = outcomes
        if isinstance(expected, type) or isinstance(found, type):
            if expected is not found:
                different[name] = outcomes
        elif (worst := difference(expected, found)) > 4e-5:
            different[name] = worst
        else:
            compared += len(found)
    assert not different
    assert compared


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_no_farther_from_float64_than_stock(name: str, dtype: torch.dtype) -> None:
    """One step at a time, from the same inputs: the rounding of a whole trajectory is chaotic."""
    steps = []
    for module, kind in ((fused, dtype), (diffusers, dtype), (diffusers, torch.float64)):
        s = make(module, name)
        s.set_timesteps(5)
        x, g = start(s, dtype=dtype).to(kind), gen()
        out = (start(s, seed=1) / float(getattr(s, "init_noise_sigma", 1.0))).to(dtype).to(kind)
        t = s.timesteps[0]
        if hasattr(s, "scale_model_input"):
            s.scale_model_input(x, t)
        steps.append(s.step(out, t, x, **({"generator": g} if "generator" in inspect.signature(s.step).parameters else {})).prev_sample)
    ours, theirs, exact = steps
    if name in NOISY | PATHWISE:
        exact = theirs.double()  # the noise is drawn in the working dtype
    scale = exact.abs().max()
    assert ours.dtype == theirs.dtype
    assert float((ours.double() - exact).abs().max()) <= float((theirs.double() - exact).abs().max()) + 2 * torch.finfo(dtype).eps * scale


def test_changing_eta() -> None:
    outputs = []
    for module in (fused, diffusers):
        s = make(module, "DDIMScheduler")
        s.set_timesteps(5)
        x = start(s)
        for k, (t, eta) in enumerate(zip(s.timesteps, (0.0, 1.0, 0.3, 0.3, 0.0), strict=True)):
            x = s.step(net(x, t), t, x, eta=eta, generator=gen(k)).prev_sample
        outputs.append([(x,)])
    assert difference(*outputs) < 2e-5


def test_two_threads() -> None:
    """A trace answers requests for noise in its own thread alone."""
    names = [name for name in CLASSES if name not in PATHWISE]

    def work(into: dict[str, Outputs], order: list[str]) -> None:
        for name in order:
            s = make(fused, name)
            s.set_timesteps(6)
            into[name] = run(s, start(s), s.timesteps, gen())
            assert s.fallback is None

    results: list[dict[str, Outputs]] = [{}, {}, {}]
    work(results[0], names)
    rows.clear()
    threads = [threading.Thread(target=work, args=(r, order)) for r, order in zip(results[1:], (names, names[::-1]), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        assert difference(results[0][name], results[1][name]) == 0 == difference(results[0][name], results[2][name])


# Noise that belongs to the sample


def seeded(name: str, seeds: Any, x: Tensor, steps: int = 5) -> Outputs:
    s = make(fused, name)
    s.set_timesteps(steps)
    return run(s, x, s.timesteps, seeds=seeds)


@pytest.mark.parametrize("name", sorted((NOISY | PATHWISE) & set(CLASSES)))
def test_a_sample_of_a_batch_is_the_sample_alone(name: str) -> None:
    seeds, x = [3, 2**63 - 1, 0], start(make(fused, name), (3, 2, 5))
    whole = seeded(name, seeds, x)
    for i, seed in enumerate(seeds):
        alone = seeded(name, torch.tensor([seed]), x[i : i + 1])
        assert all(torch.equal(u[i : i + 1], v) for p, q in zip(whole, alone, strict=True) for u, v in zip(p, q, strict=True))
    other = seeded(name, [4, 5, 6], x)
    assert not torch.equal(other[-1][0], whole[-1][0])


def test_the_noise_of_seeds_is_that_of_the_sampler() -> None:
    """Euler ancestral written out in float64: draw k + 1 in step k, and the latent is draw 0."""
    seeds = torch.tensor([7, 8])
    s = make(fused, "EulerAncestralDiscreteScheduler")
    s.set_timesteps(5)
    latent = normal(seeds, SHAPE) * float(s.init_noise_sigma)
    found = run(s, latent, s.timesteps, seeds=seeds)
    x, sigmas = latent.double(), s.sigmas.double().tolist()
    for k, t in enumerate(s.timesteps):
        sigma, to = sigmas[k], sigmas[k + 1]
        epsilon = net((x / math.sqrt(sigma**2 + 1)).float(), t).double()
        up = math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2)
        down = math.sqrt(to**2 - up**2)
        x = x + epsilon * (down - sigma) + up * reference.normal(seeds, SHAPE, draw=k + 1).double()
        assert float((found[k][0].double() - x).abs().max()) < 2e-5 * max(1, float(x.abs().max()))


@pytest.mark.parametrize("name", sorted(PATHWISE))
def test_seeds_of_a_path_scheduler_are_a_brownian_path(name: str) -> None:
    """The stock class with the documented increments in the place of torchsde's."""
    seeds, x = torch.tensor([7, 8]), start(make(fused, name))
    path = BrownianPath(seeds, SHAPE, impl="reference")
    s = make(diffusers, name)
    s.set_timesteps(5)
    s.noise_sampler = lambda a, b: path(float(a), float(b)) / abs(float(a) - float(b)) ** 0.5
    assert difference(run(s, x, s.timesteps), seeded(name, seeds, x)) < 2e-5


def test_seeds_are_checked_and_never_ignored() -> None:
    s = make(fused, "EulerAncestralDiscreteScheduler")
    s.set_timesteps(5)
    x, t = start(s), s.timesteps[0]
    for seeds, message in (([1], r"seeds: got torch.int64 \(1,\)"), ([1, -2], "seeds: got -2")):
        with pytest.raises(ValueError, match=message):
            s.step(x, t, x, seeds=seeds)
    with pytest.raises(ValueError, match="seeds: got some for a timestep that is not one number"):
        s.step(x, t[None], x, seeds=[1, 2])
    given = make(fused, "DDIMScheduler")
    given.set_timesteps(5)
    given.seeds = [1, 2]
    noise, t = start(given, seed=4), given.timesteps[1]
    expected = make(diffusers, "DDIMScheduler")
    expected.set_timesteps(5)
    pair = [c.step(x, t, x, eta=1.0, variance_noise=noise).prev_sample for c in (expected, given)]
    assert float((pair[0] - pair[1]).abs().max()) < 2e-5  # noise that is given is the noise


# Wrong use


def _noise_of_another_shape(s: Any, x: Tensor, t: Tensor) -> Any:
    return s.step(x, t, x, variance_noise=x[:, :2], **({"eta": 1.0} if "eta" in inspect.signature(s.step).parameters else {}))


def _past_the_end(s: Any, x: Tensor, t: Tensor) -> Any:
    if "Heun" in type(s).__name__:
        raise IndexError  # stock goes on from the last index but one
    run(s, x, s.timesteps, gen())
    return s.step(x, t, x)


def _other_shape_on_the_way(s: Any, x: Tensor, t: Tensor) -> Any:
    run(s, x, s.timesteps[:3], gen())
    return s.step(x[..., :3], s.timesteps[3], x[..., :3]).prev_sample.shape


def _unknown_prediction(s: Any, x: Tensor, t: Tensor) -> Any:
    if "prediction_type" in s.config:
        s.register_to_config(prediction_type="nonsense")
    return s.step(x, t, x)


WRONG: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "int timestep": lambda s, x, t: s.step(x, int(t), x),
    "timestep not there": lambda s, x, t: s.step(x, torch.tensor(3.3), x),
    "no timestep": lambda s, x, t: s.step(x, None, x),
    "before set_timesteps": lambda s, x, t: type(s)(num_train_timesteps=20).step(x, torch.tensor(19.0), x),
    "past the end": _past_the_end,
    "prediction type": _unknown_prediction,
    "generator and noise": lambda s, x, t: s.step(x, t, x, eta=1.0, generator=gen(), variance_noise=x),
    "noise shape": _noise_of_another_shape,
    "generators": lambda s, x, t: s.step(x, t, x, generator=[gen(), gen(), gen()]),
    "model shape": lambda s, x, t: s.step(x[:, :2], t, x),
    "shape on the way": _other_shape_on_the_way,
    "unknown option": lambda s, x, t: s.step(x, t, x, nonsense=1),
    "too many arguments": lambda s, x, t: s.step(x, t, x, *range(12)),
    "no arguments": lambda s, x, t: s.step(),
    "no sample": lambda s, x, t: s.step(x, t),
    "None for the model output": lambda s, x, t: s.step(None, t, x),
    "None for the sample": lambda s, x, t: s.step(x, t, None),
    "numpy sample": lambda s, x, t: s.step(x, t, x.numpy()),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_fails_as_stock_does(wrong: str) -> None:
    different, raised = {}, 0
    for name in CLASSES:
        outcomes = []
        for module in (diffusers, fused):
            s = make(module, name)
            s.set_timesteps(6)
            try:
                WRONG[wrong](s, start(s), s.timesteps[0])
                outcomes.append(None)
            except Exception as error:
                outcomes.append(type(error))
        if outcomes[0] is not outcomes[1]:
            different[name] = outcomes
        raised += outcomes[0] is not None
    assert not different
    assert raised


@pytest.mark.parametrize("name", CLASSES)
def test_an_index_that_what_was_kept_does_not_belong_to(name: str) -> None:
    """Stock goes on from there, with what it kept."""
    outputs = []
    for module in (diffusers, fused):
        s = make(module, name)
        s.set_timesteps(6)
        out = run(s, start(s), s.timesteps[:3], gen())
        if "_step_index" not in s.__dict__:
            return
        s._step_index -= 1
        outputs.append(out + run(s, out[-1][0], s.timesteps[2:4], gen()))
    assert difference(*outputs) < 4e-5


def test_without_torchsde() -> None:
    """diffusers then has placeholders for two classes; the others are there, and these two say what is missing."""
    code = (
        "import sys; sys.modules['torchsde'] = None\n"
        "import diffusers.utils.import_utils as u; u._torchsde_available = False\n"
        "import genfast.compat.diffusers as fused\n"
        "assert 'DDIMScheduler' in fused.CLASSES and 'DPMSolverSDEScheduler' not in fused.CLASSES\n"
        "try: from genfast.compat.diffusers import DPMSolverSDEScheduler\n"
        "except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "genfast.compat.diffusers.DPMSolverSDEScheduler: torchsde is not installed, supported: pip install torchsde"
    )


def test_a_table_is_told_from_another_by_all_of_its_numbers() -> None:
    """numpy's repr leaves out the middle of a long array."""
    a, b = np.zeros(5000), np.zeros(5000)
    b[2500] = 1
    assert content(a) != content(b)
