"""What a callback of k-diffusion's samplers does to what it is given: as upstream, against the float64 loops of the other two files."""

from __future__ import annotations

from math import sqrt

import pytest
import test_k_diffusion_dpm as dpm
import torch
from test_k_diffusion import ANCESTRAL, CHURN, NAMES, SDE, both, cases, difference, model, sigmas_of, start

from genfast.compat import k_diffusion as K

EDITS = {
    "x": lambda x, d: x.mul_(0.7).add_(0.1),
    "x, unseen by autograd": lambda x, d: x.data.mul_(0.7).add_(0.1),
    "denoised": lambda x, d: d.mul_(0.7).add_(0.1),
    "both": lambda x, d: (x.mul_(0.7), d.clamp_(-0.5, 0.5)),
}


@pytest.mark.parametrize("end_at_zero", [True, False])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_what_a_callback_writes_counts_as_upstream(name, options, edit, end_at_zero):
    """Samplers that take the slope before the callback go on along it from the edited x; the others see x and denoised as they are now."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 4e-5)):
        x, sigmas = start(dtype=dtype), sigmas_of(dtype=dtype, end_at_zero=end_at_zero)
        got, want, *_ = both(name, x, sigmas, edit=EDITS[edit], **options)
        assert difference(got, want) <= bound
        if edit == "both":
            assert difference(want, both(name, x, sigmas, **options)[1]) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_what_a_callback_does_to_its_dictionary_reaches_nothing(name):
    def replace(step):
        step["x"] = step["denoised"] = torch.zeros(())
        step["sigma"] = step["i"] = None
        del step["sigma_hat"]

    noise = {"noise_sampler": lambda s, t: torch.ones(2, 3, 8, 8)} if name in ANCESTRAL + SDE else {}
    sampler = getattr(K, f"sample_{name}")
    torch.manual_seed(0)
    plain = sampler(model, start(), sigmas_of(5), disable=True, **noise)
    torch.manual_seed(0)
    assert torch.equal(plain, sampler(model, start(), sigmas_of(5), None, replace, True, **noise))


@pytest.mark.parametrize("name", NAMES)
def test_the_first_callback_gets_the_callers_x_as_upstream(name):
    noise = {"noise_sampler": lambda s, t: torch.ones(2, 3, 8, 8)} if name in ANCESTRAL + SDE else {}
    x, seen = start(), []
    getattr(K, f"sample_{name}")(model, x, sigmas_of(5), None, lambda step: seen.append(step["x"]), True, **noise)
    assert seen[0].data_ptr() == x.data_ptr() and seen[1].data_ptr() != x.data_ptr()


@pytest.mark.parametrize("entry", ["sigma", "sigma_hat", "the caller's"])
@pytest.mark.parametrize("name", NAMES)
def test_sigmas_are_not_the_callbacks_to_write(name, entry):
    """They went to the host at the start: refused, where upstream would go on with others."""
    sigmas = sigmas_of(5)
    noise = {"noise_sampler": lambda s, t: torch.ones(2, 3, 8, 8)} if name in ANCESTRAL + SDE else {}
    with pytest.raises(ValueError, match="callback: got one that writes into sigmas, supported: one that writes into x and denoised"):
        getattr(K, f"sample_{name}")(model, start(), sigmas, None, lambda step: step.get(entry, sigmas).mul_(0.9), True, **noise)
    with torch.inference_mode():  # whose tensors count no versions
        getattr(K, f"sample_{name}")(model, start(), sigmas_of(5), None, lambda step: step["x"].mul_(0.9), True, **noise)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("options", [{}, {"eta": 1.0, "s_noise": 1.1}])
def test_what_a_callback_writes_counts_in_dpm_solver(options, edit):
    """Into x it counts, with the slope of before; the denoised of the callback is a tensor of its own."""
    for n in (2, 9, 10):
        got, want, *_ = dpm.both("fast", start(dtype=torch.float64), n, edit=EDITS[edit], **options)
        assert difference(got, want) <= 1e-12
    got, (want, _), *_ = dpm.both("adaptive", start(dtype=torch.float64), edit=EDITS[edit], **options)
    assert difference(got, want) <= 1e-6


def test_the_denoised_of_a_callback_is_that_of_its_step():
    """Also where a network returns the same memory again and again, as a captured one does."""
    memory, seen = torch.empty(2, 3, 8, 8), []

    def reusing(x, sigma):
        return memory.copy_(dpm.model(x, sigma))

    for fresh in (True, False):
        K.sample_dpm_adaptive(
            dpm.model if fresh else reusing, start(), dpm.LOW, dpm.HIGH, None, lambda step: seen.append(step["denoised"]), True
        )
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_times_are_not_the_callbacks_to_write():
    with pytest.raises(ValueError, match="callback: got one that writes into t, supported: one that writes into x"):
        K.sample_dpm_fast(dpm.model, start(), dpm.LOW, dpm.HIGH, 9, None, lambda step: step["t"].add_(0.1), True)


@pytest.mark.parametrize("name", CHURN)
def test_churn_limits_count_in_the_dtype_of_sigmas(name):
    """float32's 0.1 is above 0.1, and still within s_tmax = 0.1, as torch compares them."""
    steps = []
    getattr(K, f"sample_{name}")(model, start(), torch.tensor([2.0, 0.1, 0.0]), None, steps.append, True, 1.0, s_tmax=0.1)
    assert [float(step["sigma_hat"] / step["sigma"]) for step in steps] == pytest.approx([1.0, sqrt(2)])
