"""k-diffusion's samplers against float64 loops of the published algorithms, and their contract: random numbers, callbacks, arguments."""

from __future__ import annotations

import inspect
import sys
import types
from itertools import pairwise
from math import exp, inf, log, sqrt

import pytest
import torch
from torch.autograd import forward_ad

from genfast.compat import k_diffusion as K

NAMES = ["euler", "heun", "dpm_2", "lms", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"]
NAMES += ["dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"]
CHURN = ["euler", "heun", "dpm_2"]
ANCESTRAL = ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"]
SDE = ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]
CHURNING = {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.01}


def sigmas_of(n=8, dtype=torch.float32, end_at_zero=True):
    sigmas = K.get_sigmas_karras(n, 0.03, 14.6).to(dtype)
    return sigmas if end_at_zero else sigmas[:-1]


def model(x, sigma, gain=1.0):
    """A smooth denoiser that depends on x and sigma, elementwise."""
    s = sigma.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(gain * x / (1 + s * s).sqrt() + 0.3 * torch.cos(x))


def start(shape=(2, 3, 8, 8), dtype=torch.float32, scale=14.6):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * scale).to(dtype)


# The published algorithms. D(x, sigma) denoises, N(sigma, sigma_next) draws, on_step(i, x, sigma, sigma_hat, d) is the callback.


def ancestral(s, t, eta):
    up = min(t, eta * sqrt(t * t * (s * s - t * t) / (s * s)))
    return sqrt(t * t - up * up), up


def karras(kind):
    """Karras et al. 2022, algorithm 2; its correction replaced by the midpoint's for DPM-Solver-2."""

    def loop(D, x, sig, N, on_step, s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0):
        for i, (s, t) in enumerate(pairwise(sig)):
            gamma = min(s_churn / (len(sig) - 1), sqrt(2) - 1) if s_tmin <= s <= s_tmax else 0.0
            noise, hat = N(s, t), s * (1 + gamma)
            if gamma:
                x = x + sqrt(hat * hat - s * s) * s_noise * noise
            d = D(x, hat)
            slope = (x - d) / hat  # before the callback, which may write into x and d
            on_step(i, x, s, hat, d)
            if kind == "heun" and t > 0:
                there = x + (t - hat) * slope
                slope = (slope + (there - D(there, t)) / t) / 2
            if kind == "dpm_2" and t > 0:
                mid = exp((log(hat) + log(t)) / 2)
                there = x + (mid - hat) * slope
                slope = (there - D(there, mid)) / mid
            x = x + (t - hat) * slope
        return x

    return loop


def euler_ancestral(D, x, sig, N, on_step, eta=1.0, s_noise=1.0):
    for i, (s, t) in enumerate(pairwise(sig)):
        d = D(x, s)
        on_step(i, x, s, s, d)
        down, up = ancestral(s, t, eta)
        x = x + (down - s) * (x - d) / s
        if t > 0:
            x = x + N(s, t) * s_noise * up
    return x


def dpm_2_ancestral(D, x, sig, N, on_step, eta=1.0, s_noise=1.0):
    for i, (s, t) in enumerate(pairwise(sig)):
        d = D(x, s)
        on_step(i, x, s, s, d)
        down, up = ancestral(s, t, eta)
        slope = (x - d) / s
        if down == 0:
            x = x - s * slope
        else:
            mid = exp((log(s) + log(down)) / 2)
            there = x + (mid - s) * slope
            x = x + (down - s) * (there - D(there, mid)) / mid + N(s, t) * s_noise * up
    return x


def dpmpp_2s_ancestral(D, x, sig, N, on_step, eta=1.0, s_noise=1.0):
    for i, (s, t) in enumerate(pairwise(sig)):
        d = D(x, s)
        on_step(i, x, s, s, d)
        down, up = ancestral(s, t, eta)
        if down > 0:
            h = log(s) - log(down)
            there = exp(-h / 2) * x + (1 - exp(-h / 2)) * d
            x = exp(-h) * x + (1 - exp(-h)) * D(there, s * exp(-h / 2))
        else:
            x = d
        if t > 0:
            x = x + N(s, t) * s_noise * up
    return x


def dpmpp_sde(D, x, sig, N, on_step, eta=1.0, s_noise=1.0, r=0.5):
    for i, (s, t) in enumerate(pairwise(sig)):
        d = D(x, s)
        on_step(i, x, s, s, d)
        if t == 0:
            x = d
            continue
        mid = exp(log(s) + r * (log(t) - log(s)))
        down, up = ancestral(s, mid, eta)
        d2 = D(down / s * x + (1 - down / s) * d + N(s, mid) * s_noise * up, mid)
        down, up = ancestral(s, t, eta)
        mixed = (1 - 1 / (2 * r)) * d + 1 / (2 * r) * d2
        x = down / s * x + (1 - down / s) * mixed + N(s, t) * s_noise * up
    return x


def lms(D, x, sig, N, on_step, order=4):
    from scipy.integrate import quad

    slopes = []
    for i, s in enumerate(sig[:-1]):
        d = D(x, s)
        slopes = [(x - d) / s, *slopes][:order]  # before the callback, as above
        on_step(i, x, s, s, d)
        nodes = [sig[i - k] for k in range(len(slopes))]
        for j, slope in enumerate(slopes):

            def basis(tau, j=j, nodes=nodes):
                product = 1.0
                for k, node in enumerate(nodes):
                    product *= (tau - node) / (nodes[j] - node) if k != j else 1.0
                return product

            x = x + quad(basis, s, sig[i + 1], epsabs=0, epsrel=1e-13)[0] * slope
    return x


def multistep(kind):
    """DPM-Solver++ multistep: 2M (Lu et al. 2022b, algorithm 2), its SDE (equation 19), and k-diffusion's 3M SDE."""

    def loop(D, x, sig, N, on_step, eta=1.0, s_noise=1.0, solver_type="midpoint"):
        eta = 0.0 if kind == "2m" else eta
        past, steps = [], []
        for i, (s, t) in enumerate(pairwise(sig)):
            d = D(x, s)
            on_step(i, x, s, s, d)
            if t == 0:
                return d
            h = log(s / t)
            H = h * (1 + eta)
            gain = 1 - exp(-H)
            phi2 = 1 - gain / H
            x = t / s * exp(-eta * h) * x + gain * d
            if kind == "3m_sde" and len(past) > 1:
                r0, r1 = steps[0] / h, steps[1] / h
                a, b = (d - past[0]) / r0, (past[0] - past[1]) / r1
                x = x + phi2 * (a + (a - b) * r0 / (r0 + r1)) - (phi2 / H - 0.5) * (a - b) / (r0 + r1)
            elif past:
                slope = 0.5 * gain if kind != "3m_sde" and solver_type == "midpoint" else phi2
                x = x + slope * (d - past[0]) * h / steps[0]
            if eta:
                x = x + N(s, t) * t * sqrt(1 - exp(-2 * eta * h)) * s_noise
            past, steps = [d, *past], [h, *steps]
        return x

    return loop


ORACLE = {name: karras(name) for name in CHURN} | {
    "euler_ancestral": euler_ancestral,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_sde": dpmpp_sde,
    "lms": lms,
    "dpmpp_2m": multistep("2m"),
    "dpmpp_2m_sde": multistep("2m_sde"),
    "dpmpp_3m_sde": multistep("3m_sde"),
}


def both(name, x, sigmas, wide=torch.float64, edit=None, **options):
    """The sampler's result and the loop's in ``wide``, with everything each of them was told or told others.

    ``edit(x, denoised)`` is what the callback writes into them.
    """
    mine, others = x if edit is None else x.clone(), x.to(wide) if edit is None else x.to(wide, copy=True)
    torch.manual_seed(11)
    ours = {"steps": [], "noise": [], "calls": []}

    def called(y, sigma, **extra):
        ours["calls"].append((y.dtype, sigma))
        return model(y, sigma, **extra)

    def drawn(s, t):
        ours["noise"].append((s, t))
        return torch.randn_like(x)

    sampler = {"noise_sampler": drawn} if name in ANCESTRAL + SDE else {}

    def told(step):
        ours["steps"].append(step)
        if edit is not None:
            edit(step["x"], step["denoised"])

    got = getattr(K, f"sample_{name}")(called, mine, sigmas, {"gain": 0.9}, told, True, **sampler, **options)
    ours["rng"] = torch.get_rng_state()

    torch.manual_seed(11)
    theirs = {"steps": [], "noise": [], "calls": []}

    def denoise(y, s):
        theirs["calls"].append(s)
        return model(y, torch.full((len(y),), s, dtype=wide), gain=0.9)

    def draw(s, t):
        theirs["noise"].append((s, t))
        return torch.randn_like(x).to(wide)

    def on_step(i, x, s, hat, d):
        theirs["steps"].append((i, x, s, hat, d))
        if edit is not None:
            edit(x, d)

    want = ORACLE[name](denoise, others, sigmas.double().tolist(), draw, on_step, **options)
    theirs["rng"] = torch.get_rng_state()
    return got, want, ours, theirs


def difference(a, b):
    return (a.double() - b.double()).abs().max().item()


def cases():
    """Every sampler, and the options that take other branches."""
    for name in NAMES:
        yield name, {}
    for name in CHURN:
        yield name, CHURNING
        yield name, {"s_churn": inf, "s_noise": 1.05}
    for name in ANCESTRAL + SDE:
        for options in ({"eta": 0.5, "s_noise": 1.1}, {"eta": 0.0}):
            yield name, options
    yield "dpm_2_ancestral", {"eta": 50.0}
    yield "dpmpp_2s_ancestral", {"eta": 50.0}
    yield "dpmpp_sde", {"r": 0.3}
    yield "dpmpp_2m_sde", {"solver_type": "heun"}
    yield "lms", {"order": 1}
    yield "lms", {"order": 3}


@pytest.mark.parametrize("end_at_zero", [True, False])
@pytest.mark.parametrize(("name", "options"), list(cases()))
def test_equals_the_published_loop(name, options, end_at_zero):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        x, sigmas = start(dtype=dtype), sigmas_of(dtype=dtype, end_at_zero=end_at_zero)
        before = x.clone()
        got, want, ours, theirs = both(name, x, sigmas, **options)
        assert got.dtype == dtype and got.shape == x.shape and not got.requires_grad
        assert difference(got, want) <= bound
        assert want.abs().max() > 0.1
        assert torch.equal(x, before)
        assert torch.equal(ours["rng"], theirs["rng"])

        # the network's sigmas, (B,) in x's dtype
        assert len(ours["calls"]) == len(theirs["calls"])
        for (given, sigma), s in zip(ours["calls"], theirs["calls"], strict=True):
            assert given == sigma.dtype == dtype and sigma.shape == (2,)
            torch.testing.assert_close(sigma.double(), torch.full((2,), s, dtype=torch.float64), rtol=4 * torch.finfo(dtype).eps, atol=0)

        # callbacks: x as it is evaluated, not as it is later
        assert [step["i"] for step in ours["steps"]] == [step[0] for step in theirs["steps"]]
        for step, (_, at, s, hat, d) in zip(ours["steps"], theirs["steps"], strict=True):
            assert set(step) == {"x", "i", "sigma", "sigma_hat", "denoised"}
            assert step["sigma"].shape == step["sigma_hat"].shape == () and step["sigma"].dtype == step["sigma_hat"].dtype == dtype
            assert float(step["sigma"]) == s and float(step["sigma_hat"]) == pytest.approx(hat, rel=4 * torch.finfo(dtype).eps)
            assert difference(step["x"], at) <= bound * 14.6 and difference(step["denoised"], d) <= bound

        if name in ANCESTRAL + SDE:
            assert len(ours["noise"]) == len(theirs["noise"])
            for got_pair, want_pair in zip(ours["noise"], theirs["noise"], strict=True):
                for g, w in zip(got_pair, want_pair, strict=True):
                    assert g.shape == () and float(g) == pytest.approx(w, rel=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_as_close_as_the_loop_in_that_dtype(name, dtype):
    sigmas = sigmas_of()
    x = start(dtype=dtype, shape=(4, 3, 16, 16))
    got, want, ours, _ = both(name, x, sigmas)
    _, narrow, _, _ = both(name, x, sigmas, wide=dtype)
    assert got.dtype == dtype and all(step["x"].dtype == dtype for step in ours["steps"])
    rms = [(y.double() - want).pow(2).mean().sqrt().item() for y in (got, narrow)]
    assert rms[0] <= 1.1 * rms[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5), (0, 3, 4)])
def test_any_rank(name, shape):
    x = start(shape, torch.float64)
    got, want, _, _ = both(name, x, sigmas_of(5, torch.float64))
    assert got.shape == shape
    assert not x.numel() or difference(got, want) <= 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_and_strided(name):
    sigmas = sigmas_of(5, torch.float64)
    plain = start(dtype=torch.float64)
    for x in (plain.to(memory_format=torch.channels_last), plain[:, :, ::2, 1:]):
        got, want, _, _ = both(name, x, sigmas)
        assert difference(got, want) <= 1e-12
        if x.is_contiguous(memory_format=torch.channels_last):
            assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in SDE])
def test_default_noise_is_torchs_global_generator(name):
    x, sigmas = start(), sigmas_of(5)
    torch.manual_seed(3)
    got = getattr(K, f"sample_{name}")(model, x, sigmas, disable=True)
    options = {"noise_sampler": lambda *_: torch.randn_like(x)} if name in ANCESTRAL else {}
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(got, getattr(K, f"sample_{name}")(model, x, sigmas, disable=True, **options))
    assert torch.equal(state, torch.get_rng_state())
    drawn = torch.Generator().manual_seed(3)
    for _ in range(5 if name in CHURN else 4 if name in ANCESTRAL else 0):
        torch.randn(x.shape, generator=drawn)
    assert torch.equal(state, drawn.get_state())


@pytest.mark.parametrize("name", ANCESTRAL + SDE)
def test_noise_of_another_dtype_or_for_all_samples_at_once(name):
    x, sigmas, sampler = start(), sigmas_of(5), getattr(K, f"sample_{name}")
    noise = start((3, 8, 8), torch.float64, 1.0)
    got = sampler(model, x, sigmas, disable=True, noise_sampler=lambda s, t: noise)
    assert torch.equal(got, sampler(model, x, sigmas, disable=True, noise_sampler=lambda s, t: noise.float().repeat(2, 1, 1, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_stop_as_upstream(name):
    x, weight = start((2, 4), torch.float64).requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)

    def guided(y, sigma):  # a network that looks at gradients of its own
        with torch.enable_grad():
            return model(y, sigma) * weight

    options = {"noise_sampler": K.default_noise_sampler(x)} if name in SDE else {}
    torch.manual_seed(1)
    got = getattr(K, f"sample_{name}")(guided, x, sigmas_of(4, torch.float64), disable=True, **options)
    torch.manual_seed(1)
    assert not got.requires_grad
    assert torch.equal(got, getattr(K, f"sample_{name}")(model, x.detach(), sigmas_of(4, torch.float64), disable=True, **options))


@pytest.mark.parametrize("name", NAMES)
def test_tangents_pass_through(name):
    """Forward-mode derivatives are not stopped by no_grad: against a central difference."""
    x, direction = start((2, 4), torch.float64), start((2, 4), torch.float64, 1.0).flip(1)
    noise = start((2, 4), torch.float64, 1.0).flip(0)
    options = {"noise_sampler": lambda s, t: noise} if name in ANCESTRAL + SDE else {}

    def sample(y):
        return getattr(K, f"sample_{name}")(model, y, sigmas_of(4, torch.float64), disable=True, **options)

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(sample(forward_ad.make_dual(x, direction))).tangent
    assert difference(tangent, (sample(x + 1e-5 * direction) - sample(x - 1e-5 * direction)) / 2e-5) <= 1e-8
    assert tangent.abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_one_sigma_is_no_step(name):
    x = start()
    state = torch.get_rng_state()
    assert getattr(K, f"sample_{name}")(model, x, torch.tensor([14.6]), disable=True) is x
    assert torch.equal(state, torch.get_rng_state())


SIGNATURE = {
    "euler": {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": inf, "s_noise": 1.0},
    "lms": {"order": 4},
    "dpmpp_2m": {},
    "euler_ancestral": {"eta": 1.0, "s_noise": 1.0, "noise_sampler": None},
}
SIGNATURE |= {"heun": SIGNATURE["euler"], "dpm_2": SIGNATURE["euler"]}
SIGNATURE |= dict.fromkeys((*ANCESTRAL, "dpmpp_3m_sde"), SIGNATURE["euler_ancestral"])
SIGNATURE |= {
    "dpmpp_sde": SIGNATURE["euler_ancestral"] | {"r": 0.5},
    "dpmpp_2m_sde": SIGNATURE["euler_ancestral"] | {"solver_type": "midpoint"},
}


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    parameters = inspect.signature(getattr(K, f"sample_{name}")).parameters
    empty = inspect.Parameter.empty
    want = {"model": empty, "x": empty, "sigmas": empty, "extra_args": None, "callback": None, "disable": None} | SIGNATURE[name]
    assert [(p.name, p.default) for p in parameters.values()] == list(want.items())
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("name", SDE)
def test_brownian_noise_needs_torchsde(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(ImportError, match=r"noise_sampler: got None and torchsde is not installed, supported: pip install torchsde"):
        getattr(K, f"sample_{name}")(model, start(), sigmas_of(), disable=True)


def fake_torchsde(monkeypatch):
    """A tree whose W(t) is t times a number of its seed; it notes how it was made."""
    made = []

    class BrownianTree:
        def __init__(self, t0, w0, t1, entropy):
            made.append((float(t0), float(t1), tuple(w0.shape), entropy))
            self.slope = torch.full_like(w0, entropy % 7 + 1)

        def __call__(self, t0, t1):
            return (t1 - t0) * self.slope

    monkeypatch.setitem(sys.modules, "torchsde", types.SimpleNamespace(BrownianTree=BrownianTree))
    return made


@pytest.mark.parametrize("name", SDE)
def test_brownian_noise(name, monkeypatch):
    made = fake_torchsde(monkeypatch)
    x, sigmas = start(), sigmas_of()
    torch.manual_seed(4)
    got = getattr(K, f"sample_{name}")(model, x, sigmas, disable=True)
    state = torch.get_rng_state()
    torch.manual_seed(4)
    seed = int(torch.randint(0, 2**63 - 1, []))
    assert torch.equal(state, torch.get_rng_state())  # one seed is all that is drawn
    assert made == [(float(sigmas[-2]), float(sigmas[0]), tuple(x.shape), seed)]
    noise_sampler = K.BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed)
    assert torch.equal(got, getattr(K, f"sample_{name}")(model, x, sigmas, disable=True, noise_sampler=noise_sampler))


def test_brownian_tree_of_every_sample(monkeypatch):
    made = fake_torchsde(monkeypatch)
    x = start()
    sampler = K.BrownianTreeNoiseSampler(x, 0.25, 4.0, [1, 2], transform=torch.log2)
    assert made == [(-2.0, 2.0, (3, 8, 8), 1), (-2.0, 2.0, (3, 8, 8), 2)]
    down = sampler(4.0, 1.0)  # two units of log2: W over sqrt(2)
    torch.testing.assert_close(down, torch.tensor([2.0, 3.0]).view(2, 1, 1, 1).expand_as(x) * 2 / 2**0.5 * down.sign())
    assert torch.equal(sampler(1.0, 4.0), -down)
    with pytest.raises(ValueError, match="seed: got 3 seeds, supported: one, or one per sample, 2"):
        K.BatchedBrownianTree(x, torch.tensor(0.0), torch.tensor(1.0), [1, 2, 3])


def test_refusals():
    x, sigmas = start(), sigmas_of()

    def refused(message, model=model, x=x, sigmas=sigmas):
        with pytest.raises(ValueError, match=message):
            K.sample_dpmpp_2m(model, x, sigmas, disable=True)

    refused("x: got torch.int64, supported: torch.float32", x=x.long())
    refused("sigmas: got sigma / alpha .* supported: at least two, strictly decreasing", sigmas=sigmas.flip(0))
    refused(r"model: got an output of shape \(4, 3, 8, 8\), supported: \(2, 3, 8, 8\), that of x", model=lambda x, s: torch.cat([x, x]))
    refused("model: got an output in torch.float64 for x in torch.float32", model=lambda x, s: x.double())
    with pytest.raises(ValueError, match="solver_type: got 'euler', supported: 'heun', 'midpoint'"):
        K.sample_dpmpp_2m_sde(model, x, sigmas, disable=True, solver_type="euler")
    with pytest.raises(ValueError, match="order: got 5, supported: 1, 2, 3, 4"):
        K.sample_lms(model, x, sigmas, disable=True, order=5)


def test_sigma_functions():
    """Closed forms at n = 5, in float64."""
    i = torch.arange(5, dtype=torch.float64)
    low, high = torch.tensor(0.1, dtype=torch.float64), torch.tensor(10.0, dtype=torch.float64)
    want = {
        K.get_sigmas_karras(5, 0.1, 10.0, rho=5.0): (high**0.2 + i / 4 * (low**0.2 - high**0.2)) ** 5,
        K.get_sigmas_exponential(5, 0.1, 10.0): high * (low / high) ** (i / 4),
        K.get_sigmas_polyexponential(5, 0.1, 10.0, rho=2.0): low * (high / low) ** ((1 - i / 4) ** 2),
    }
    for got, expected in want.items():
        assert got.shape == (6,) and got[-1] == 0 and got.dtype == torch.float32
        torch.testing.assert_close(got[:-1].double(), expected, rtol=2e-5, atol=0)
    t = 1 + i / 4 * (1e-3 - 1)
    vp = K.get_sigmas_vp(5)
    assert vp.shape == (6,) and vp[-1] == 0
    torch.testing.assert_close(vp[:-1].double() ** 2 + 1, torch.exp(19.9 * t**2 / 2 + 0.1 * t), rtol=2e-5, atol=0)
    assert K.append_zero(torch.tensor([2.0, 1.0])).tolist() == [2.0, 1.0, 0.0]


def test_small_functions():
    x, d = start((2, 3)), start((2, 3)) * 0.5
    assert torch.equal(K.to_d(x, torch.tensor([2.0, 4.0]), d), (x - d) / torch.tensor([[2.0], [4.0]]))
    with pytest.raises(ValueError, match="sigma: got 3 dimensions, supported: at most those of x, 2"):
        K.to_d(x, torch.ones(2, 1, 1), d)
    assert K.get_ancestral_step(3.0, 2.0, eta=0.0) == (2.0, 0.0)
    down, up = K.get_ancestral_step(3.0, 2.0)
    assert up == pytest.approx(2 * sqrt(5) / 3) and down == pytest.approx(4 / 3)
    assert K.get_ancestral_step(3.0, 2.0, eta=9.0) == (0.0, 2.0)


# Wrappers: for data that is one point x_0 the exact network is known, and the wrapper must return x_0.

ALPHAS_CUMPROD = torch.linspace(0.9999, 0.005, 100, dtype=torch.float64)
SIGMAS = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()
X0 = torch.tensor([[0.5, -2.0, 1.0]], dtype=torch.float64)


def exact_network(kind, sigma_of_t):
    """What a perfect network sees: x / sqrt(1 + sigma^2) and t. It returns the noise, or alpha n - sigma_t x_0."""

    def net(x, t, extra=None):
        s = sigma_of_t(t)[:, None]
        a = 1 / (1 + s * s).sqrt()
        n = (x / a - X0) / s
        return n if kind == "eps" else a * (n - s * X0)

    return net


def wrappers():
    def table(t):
        return torch.exp(torch.lerp(SIGMAS.log()[t.floor().long()], SIGMAS.log()[t.ceil().long()], t.double().frac()))

    class CompVis(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.alphas_cumprod, self.apply_model = ALPHAS_CUMPROD, exact_network(kind, table)

    def learned(x, t, extra=None):
        return torch.cat([exact_network("eps", table)(x, t), x], dim=1)

    openai = K.OpenAIDenoiser(learned, types.SimpleNamespace(alphas_cumprod=ALPHAS_CUMPROD.tolist()))
    return {
        "eps": K.DiscreteEpsDDPMDenoiser(exact_network("eps", table), ALPHAS_CUMPROD, quantize=False),
        "v": K.DiscreteVDDPMDenoiser(exact_network("v", table), ALPHAS_CUMPROD, quantize=False),
        "compvis": K.CompVisDenoiser(CompVis("eps")),
        "compvis_v": K.CompVisVDenoiser(CompVis("v")),
        "openai": openai,
        "cosine_v": K.VDenoiser(exact_network("v", lambda t: (t * torch.pi / 2).tan())),
    }


@pytest.mark.parametrize("name", wrappers())
def test_wrappers_of_an_exact_network_return_the_data(name):
    wrapper = wrappers()[name]
    sigma = torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64)
    noise = start((3, 3), torch.float64, 1.0)
    noised = X0 + sigma[:, None] * noise
    bound = 1e-5 if name == "openai" else 1e-10  # its table is float32
    extra = {"cond": None} if name == "compvis_v" else {"extra": None}
    assert difference(wrapper(noised, sigma, **extra), X0.expand(3, 3)) <= 7 * bound
    torch.testing.assert_close(wrapper.t_to_sigma(wrapper.sigma_to_t(sigma)).double(), sigma, rtol=1e-5, atol=0)
    assert wrapper.loss(X0.expand(3, 3), noise, sigma, **extra).shape == (3,)
    assert wrapper.loss(X0.expand(3, 3), noise, sigma, **extra).max() <= 1e-8
    assert wrapper.loss(X0.expand(3, 3) + 1, noise, sigma, **extra).min() > 1e-3


def test_discrete_schedule():
    schedule = K.DiscreteSchedule(SIGMAS, quantize=False)
    assert schedule.sigma_min == SIGMAS[0] and schedule.sigma_max == SIGMAS[-1] and set(schedule.state_dict()) == {"sigmas", "log_sigmas"}
    torch.testing.assert_close(schedule.get_sigmas(), K.append_zero(SIGMAS.flip(0)))
    five = schedule.get_sigmas(5)
    assert five.shape == (6,) and five[-1] == 0
    logs = SIGMAS.log()
    times = torch.tensor([99, 74.25, 49.5, 24.75, 0], dtype=torch.float64)
    between = torch.lerp(logs[times.floor().long()], logs[times.ceil().long()], times.frac())
    torch.testing.assert_close(five[:-1].double(), between.exp(), rtol=1e-5, atol=0)
    whole = torch.arange(100.0, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma_to_t(SIGMAS), whole, rtol=0, atol=1e-9)
    assert torch.equal(schedule.sigma_to_t(SIGMAS.view(10, 10) * 1.0001, quantize=True), torch.arange(100).view(10, 10))
    outside = torch.stack([SIGMAS[0] / 2, SIGMAS[-1] * 2])
    assert schedule.sigma_to_t(outside).tolist() == [0.0, 99.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_network_is_sampled(name):
    """Data that is one point: every solver that ends at sigma 0 returns it."""
    wrapper = wrappers()["v"]
    sigmas = wrapper.get_sigmas(6).double()
    options = {"noise_sampler": lambda s, t: torch.randn(4, 3, dtype=torch.float64)} if name in SDE else {}
    x = torch.randn(4, 3, dtype=torch.float64) * sigmas[0]
    got = getattr(K, f"sample_{name}")(wrapper, x, sigmas, disable=True, **options)
    assert difference(got, X0.expand(4, 3)) <= 1e-4
