"""k-diffusion's DPM-Solver-fast, adaptive and log_likelihood against float64 loops of the published algorithms and known answers."""

from __future__ import annotations

import inspect
import sys
from math import atan, exp, expm1, log, pi, sqrt

import pytest
import torch

from genfast.compat import k_diffusion as K

LOW, HIGH = 0.03, 14.6


def model(x, sigma, gain=1.0):
    """A smooth denoiser that depends on x and sigma, elementwise."""
    s = sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(gain * x / (1 + s * s).sqrt() + 0.3 * torch.cos(x))


def start(shape=(2, 3, 8, 8), dtype=torch.float32, scale=HIGH):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * scale).to(dtype)


def difference(a, b):
    return (a.double() - b.double()).abs().max().item()


# Lu et al. 2022a, algorithms 1, 2 and 5, in time t = -log(sigma). The times are float32, as upstream's; all else is float64.


def order_1(eps, x, t, to, first):
    return x - exp(-to) * expm1(to - t) * first


def order_2(eps, x, t, to, first, r1=1 / 2):
    h = to - t
    second = eps(x - exp(-(t + r1 * h)) * expm1(r1 * h) * first, t + r1 * h)
    return x - exp(-to) * expm1(h) * first - exp(-to) / (2 * r1) * expm1(h) * (second - first)


def order_3(eps, x, t, to, first, r1=1 / 3, r2=2 / 3):
    h = to - t
    s1, s2 = t + r1 * h, t + r2 * h
    d1 = eps(x - exp(-s1) * expm1(r1 * h) * first, s1) - first
    u2 = x - exp(-s2) * expm1(r2 * h) * first - exp(-s2) * r2 / r1 * (expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = eps(u2, s2) - first
    return x - exp(-to) * expm1(h) * first - exp(-to) / r2 * (expm1(h) / h - 1) * d2


def ancestral(t, to, end, eta):
    s, s_to = exp(-t), exp(-to)
    up = min(s_to, eta * sqrt(s_to**2 * (s**2 - s_to**2) / s**2))
    down = sqrt(s_to**2 - up**2)
    t_down = min(end, -log(down)) if down > 0 else end
    return (t_down, sqrt(max(s_to**2 - exp(-2 * t_down), 0))) if eta else (to, 0.0)


def float32(x):
    return float(torch.tensor(x, dtype=torch.float32))


def time_of(sigma):
    return float(-torch.tensor(sigma).log())


def fast(eps, x, low, high, n, noise, on_step, eta=0.0, s_noise=1.0):
    steps = n // 3 + 1
    orders = [order_3] * (steps - 2) + [order_2, order_1] if n % 3 == 0 else [order_3] * (steps - 1) + [(order_1, order_2)[n % 3 - 1]]
    times = torch.linspace(time_of(high), time_of(low), steps + 1).tolist()
    for i, order in enumerate(orders):
        t, to = times[i], times[i + 1]
        down, up = ancestral(t, to, times[-1], eta)
        first = eps(x, t)
        on_step(i, x, t, x - exp(-t) * first)
        x = order(eps, x, t, down, first) + up * s_noise * noise()
    return x


def adaptive(eps, x, low, high, noise, on_step, order=3, rtol=0.05, atol=0.0078, pid=(0.0, 1.0, 0.0), eta=0.0, s_noise=1.0):
    """DPM-Solver-12 or 23, the two orders sharing evaluations; the step from a PID controller limited by an arc tangent."""
    t, end, h, before = time_of(high), time_of(low), 0.05, x
    power = 1.5 if eta else order
    past = None  # inverse errors of the last two accepted steps
    counts = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    while t < float32(end - 1e-5):
        to = min(end, float32(t + h))
        down, up = ancestral(t, to, end, eta)
        known = {}

        def once(u, s, known=known):
            if s not in known:
                known[s] = eps(u, s)
            return known[s]

        first = once(x, t)
        denoised = x - exp(-t) * first
        if order == 2:
            worse, better = order_1(once, x, t, down, first), order_2(once, x, t, down, first)
        else:
            worse, better = order_2(once, x, t, down, first, 1 / 3), order_3(once, x, t, down, first)
        allowed = torch.maximum(torch.maximum(worse.abs(), before.abs()) * rtol, torch.tensor(atol, dtype=torch.float64))
        error = ((worse - better) / allowed).square().mean().sqrt().item()
        inverse = 1 / (error + 1e-8)
        past = past or [inverse, inverse]
        p, i, d = pid
        wish = inverse ** ((p + i + d) / power) * past[0] ** (-(p + 2 * d) / power) * past[1] ** (d / power)
        factor = 1 + atan(wish - 1)
        if factor >= 0.81:
            past = [inverse, past[0]]
            before, x, t = worse, better + up * s_noise * noise(), to
            counts["n_accept"] += 1
        else:
            counts["n_reject"] += 1
        h *= factor
        counts["steps"] += 1
        counts["nfe"] += order
        on_step(counts["steps"] - 1, x, t, denoised)
    return x, counts


def both(name, x, *count, edit=None, **options):
    """The sampler's result and the float64 loop's, with what each of them called; ``edit(x, denoised)`` is what the callback writes."""
    mine, others = x if edit is None else x.clone(), x.double() if edit is None else x.to(torch.float64, copy=True)
    torch.manual_seed(11)
    ours, theirs, fed, evaluated, asked = [], [], [], [], []

    def called(y, sigma, **extra):
        fed.append(sigma)
        return model(y, sigma, **extra)

    def drawn(s, t):
        asked.append((float(s), float(t)))
        return torch.randn_like(x)

    def told(step):
        ours.append(step)
        if edit is not None:
            edit(step["x"], step["denoised"])

    sampler = getattr(K, f"sample_dpm_{name}")
    got = sampler(called, mine, LOW, HIGH, *count, {"gain": 0.9}, told, True, noise_sampler=drawn, **options)
    state = torch.get_rng_state()
    torch.manual_seed(11)

    def eps(u, t):
        evaluated.append(exp(-t))
        return (u - model(u, torch.full((len(u),), exp(-t), dtype=torch.float64), gain=0.9)) / exp(-t)

    def noise():
        return torch.randn_like(x).double()

    options.pop("return_info", None)
    pid = {"pid": tuple(options.pop(key) for key in ("pcoeff", "icoeff", "dcoeff"))} if "pcoeff" in options else {}
    loop = {"fast": fast, "adaptive": adaptive}[name]

    def on_step(i, x, t, denoised):
        theirs.append((i, x, t, denoised))
        if edit is not None:
            edit(x, denoised)

    want = loop(eps, others, LOW, HIGH, *count, noise, on_step, **options, **pid)
    assert torch.equal(state, torch.get_rng_state())
    assert all(s.shape == x.shape[:1] and s.dtype == x.dtype for s in fed)
    # The adaptive step follows the error, and so the rounding of the state.
    close = torch.finfo(x.dtype).eps * (1e4 if name == "adaptive" else 8) if x.dtype != torch.float64 else 3e-6
    torch.testing.assert_close(torch.stack(fed)[:, 0].double(), torch.tensor(evaluated, dtype=torch.float64), rtol=close, atol=0)
    return got, want, ours, theirs, asked


@pytest.mark.parametrize("options", [{}, {"eta": 1.0, "s_noise": 1.1}, {"eta": 0.5}])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 9, 10])
def test_fast_equals_the_published_loop(n, options):
    # One step over the whole range multiplies float32's rounding by that of a step from sigma 14.6: n = 1 to 3 are wider there.
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5 if n > 3 else 1e-4)):
        x = start(dtype=dtype)
        before = x.clone()
        got, want, ours, theirs, asked = both("fast", x, n, **options)
        assert got.dtype == dtype and torch.equal(x, before)
        assert want.abs().max() > 0.1 and difference(got, want) <= bound
        assert len(ours) == len(theirs) == len(asked) == n // 3 + 1
        for step, (i, at, t, denoised) in zip(ours, theirs, strict=True):
            assert set(step) == {"x", "i", "t", "t_up", "denoised", "sigma", "sigma_hat"} and step["i"] == i
            assert float(step["t"]) == float(step["t_up"]) == t
            assert float(step["sigma"]) == float(step["sigma_hat"]) == pytest.approx(exp(-t), rel=1e-6)
            assert difference(step["x"], at) <= bound * HIGH and difference(step["denoised"], denoised) <= bound * 10
        assert [s for s, _ in asked] == [float(step["sigma"]) for step in ours]
        assert asked[-1][1] == pytest.approx(LOW, rel=1e-6)


PID = {"pcoeff": 0.2, "icoeff": 0.4, "dcoeff": 0.1, "rtol": 0.01, "atol": 0.001}


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3,)])
@pytest.mark.parametrize("options", [{}, {"order": 2}, {"eta": 1.0, "s_noise": 1.1}, {"order": 2, "eta": 0.5}, PID])
def test_adaptive_equals_the_published_loop(options, shape):
    for dtype, bound in ((torch.float64, 1e-6), (torch.float32, 2e-5)):
        x = start(shape, dtype)
        (got, info), (want, counts), ours, theirs, asked = both("adaptive", x, return_info=True, **options)
        assert got.dtype == dtype and info == counts and info["n_accept"] > 1
        assert want.abs().max() > 0.1 and difference(got, want) <= bound
        keys = {"x", "i", "t", "t_up", "denoised", "error", "h", "sigma", "sigma_hat", *counts}
        assert len(ours) == len(theirs) == counts["steps"] and all(set(step) == keys for step in ours)
        assert {key: ours[-1][key] for key in counts} == counts
        for step, (i, at, t, denoised) in zip(ours, theirs, strict=True):
            assert step["i"] == i
            if dtype == torch.float64:  # the steps follow the error, and so float32's rounding: there the end is compared alone
                assert float(step["t"]) == pytest.approx(t, abs=1e-5)
                assert difference(step["x"], at) <= 1e-4 and difference(step["denoised"], denoised) <= 1e-4
        assert len(asked) == counts["n_accept"]
    if shape == (3,) and options == {"order": 2}:
        assert counts["n_reject"] > 0


@pytest.mark.parametrize("name", ["fast", "adaptive"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(name, dtype):
    """The state is rounded once an evaluation: to a few times eps of the data's scale of the float64 loop's."""
    got, want, *_ = both(name, start(dtype=dtype), *((12,) if name == "fast" else ()))
    assert got.dtype == dtype
    want = want if name == "fast" else want[0]
    assert difference(got, want) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["fast", "adaptive"])
def test_layouts_and_ranks(name):
    count = (8,) if name == "fast" else ()
    for x in (start((2, 5)), start((1, 2, 3, 4, 5)), start().to(memory_format=torch.channels_last), start()[:, :, ::2, 1:]):
        got, want, *_ = both(name, x, *count)
        assert got.shape == x.shape and difference(got, want if name == "fast" else want[0]) <= 5e-5


def test_upwards():
    """From sigma_min up to sigma_max and down again leads back."""
    x = start((2, 4), torch.float64, 1.0)
    up = K.sample_dpm_fast(model, x, 1.0, 0.5, 62, disable=True)
    torch.testing.assert_close(K.sample_dpm_fast(model, up, 0.5, 1.0, 62, disable=True), x, rtol=0, atol=1e-6)
    up = K.sample_dpm_adaptive(model, x, 1.0, 0.5, rtol=1e-4, atol=1e-6, disable=True)
    torch.testing.assert_close(K.sample_dpm_adaptive(model, up, 0.5, 1.0, rtol=1e-4, atol=1e-6, disable=True), x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_single_steps_and_their_cache(order):
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma[0]))
        return model(x, sigma)

    t, to = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(-0.3, dtype=torch.float64)
    x = start((2, 4), torch.float64, 2.0).requires_grad_()
    solver = K.DPMSolver(counted)
    got, cache = getattr(solver, f"dpm_solver_{order}_step")(x, t, to)
    assert len(calls) == order and set(cache) == {"eps", "eps_r1", "eps_r2"} - {f"eps_r{k}" for k in range(order, 3)}

    def eps(u, s):
        return (u - model(u, torch.full((2,), exp(-s), dtype=torch.float64))) / exp(-s)

    want = (order_1, order_2, order_3)[order - 1](eps, x, -1.0, -0.3, eps(x, -1.0))
    assert difference(got, want) <= 1e-12
    (gradient,), (expected,) = (torch.autograd.grad(y.sum(), x) for y in (got, want))
    assert difference(gradient, expected) <= 1e-12
    again, _ = getattr(solver, f"dpm_solver_{order}_step")(x, t, to, eps_cache=cache)
    assert torch.equal(got, again) and len(calls) == order


COMMON = {"extra_args": None, "callback": None, "disable": None}
NOISE = {"eta": 0.0, "s_noise": 1.0, "noise_sampler": None}
STEPS = {"order": 3, "rtol": 0.05, "atol": 0.0078, "h_init": 0.05, "pcoeff": 0.0, "icoeff": 1.0, "dcoeff": 0.0, "accept_safety": 0.81}
EMPTY = inspect.Parameter.empty
CALL = dict.fromkeys(("model", "x", "sigma_min", "sigma_max"), EMPTY)
STEP = {"self": EMPTY, "x": EMPTY, "t": EMPTY, "t_next": EMPTY}
ENDS = {"self": EMPTY, "x": EMPTY, "t_start": EMPTY, "t_end": EMPTY}
SIGNATURES = [
    (K.sample_dpm_fast, dict.fromkeys(("model", "x", "sigma_min", "sigma_max", "n"), EMPTY) | COMMON | NOISE),
    (
        K.sample_dpm_adaptive,
        CALL | COMMON | STEPS | NOISE | {"return_info": False},
    ),
    (K.log_likelihood, CALL | {"extra_args": None, "atol": 1e-4, "rtol": 1e-4}),
    (K.DPMSolver.__init__, {"self": EMPTY, "model": EMPTY, "extra_args": None, "eps_callback": None, "info_callback": None}),
    (K.DPMSolver.dpm_solver_1_step, STEP | {"eps_cache": None}),
    (K.DPMSolver.dpm_solver_2_step, STEP | {"r1": 1 / 2, "eps_cache": None}),
    (K.DPMSolver.dpm_solver_3_step, STEP | {"r1": 1 / 3, "r2": 2 / 3, "eps_cache": None}),
    (K.DPMSolver.dpm_solver_fast, ENDS | {"nfe": EMPTY} | NOISE),
    (K.DPMSolver.dpm_solver_adaptive, ENDS | STEPS | NOISE),
    (
        K.PIDStepSizeController.__init__,
        dict.fromkeys(("self", "h", "pcoeff", "icoeff", "dcoeff"), EMPTY) | {"order": 1, "accept_safety": 0.81, "eps": 1e-8},
    ),
]


@pytest.mark.parametrize(("function", "want"), SIGNATURES)
def test_signatures(function, want):
    assert [(p.name, p.default) for p in inspect.signature(function).parameters.values()] == list(want.items())


def test_refusals():
    x = start()
    for sampler, count in ((K.sample_dpm_fast, (5,)), (K.sample_dpm_adaptive, ())):
        with pytest.raises(ValueError, match=r"sigma_min and sigma_max: got 0.0 and 14.6, supported: numbers above 0"):
            sampler(model, x, 0.0, HIGH, *count)
        with pytest.raises(ValueError, match=r"eta: got 1.0, supported: 0 where sigma rises"):
            sampler(model, x, HIGH, LOW, *count, eta=1.0, disable=True)
        with pytest.raises(ValueError, match=r"x: got torch.int64"):
            sampler(model, x.long(), LOW, HIGH, *count, disable=True)
    with pytest.raises(ValueError, match=r"order: got 1, supported: 2, 3"):
        K.sample_dpm_adaptive(model, x, LOW, HIGH, order=1, disable=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_likelihood_of_normal_data(dtype):
    """Data N(0, 0.5^2): its denoiser is linear, so that Hutchinson's estimate is exact and p(x) at sigma_min is known."""
    scale, low, high = 0.5, 0.05, 80.0

    def denoise(x, sigma, gain):
        return x * (scale**2 / (scale**2 + sigma.view(-1, 1, 1) ** 2)) * gain

    x = start((4, 3, 5), dtype, 0.6)
    torch.manual_seed(2)
    got, info = K.log_likelihood(denoise, x, low, high, {"gain": 1.0}, atol=1e-6, rtol=1e-6)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    torch.randint_like(x, 2)
    assert torch.equal(state, torch.get_rng_state())
    variance = scale**2 + low**2
    want = -0.5 * (x.double().square() / variance + log(2 * pi * variance)).flatten(1).sum(1)
    assert got.shape == (4,) and got.dtype == dtype and info["fevals"] > 20 and not got.requires_grad
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-3)
    assert (want - want.flip(0)).abs().min() > 0.1


def test_log_likelihood_needs_torchdiffeq(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"log_likelihood: torchdiffeq is not installed, supported: pip install torchdiffeq"):
        K.log_likelihood(model, start(), LOW, HIGH)
