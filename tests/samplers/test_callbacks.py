"""What a callback writes into the state is where the run goes on, whatever buffer the network reads."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from recorder import install
from torch import Tensor

from genfast import schedules
from genfast.samplers import SOLVERS, AdaptiveSampler, Denoiser, Sampler

VP, VE = schedules.scaled_linear(), schedules.edm()
SHAPE = (2, 3, 4, 4)
SIGMAS = [9.0, 4.0, 1.5, 0.4, 0.0]
LABELS = {"cond": torch.tensor([0.1, 0.2]), "uncond": torch.tensor([-0.1, 0.0])}


def net(x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    t = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    shift = shift.view(t.shape).to(x.dtype) if isinstance(shift, Tensor) else shift
    return torch.tanh(x) * 0.5 + t * 0.001 + shift


def by_in_place(x: Tensor) -> None:
    x.mul_(0.5).add_(0.25)


def by_data(x: Tensor) -> None:  # changes no version counter
    x.data.mul_(0.5).add_(0.25)


def by_numpy(x: Tensor) -> None:
    x.numpy()[...] = x.numpy() * 0.5 + 0.25


def by_slice(x: Tensor) -> None:
    for sample in x:
        sample.copy_(sample * 0.5 + 0.25)


SETTINGS = {
    "plain": (Denoiser(net, "v", noise=VP), {}, {}),
    "guided": (Denoiser(net, "v", noise=VP), {"guidance_scale": 3.0}, LABELS),
    "guidance interval": (Denoiser(net, "v", noise=VP), {"guidance_scale": lambda s: 3.0 if 1 < s < 5 else 1.0}, LABELS),
    "a scale for each": (Denoiser(net, "v", noise=VP), {"guidance_scale": [3.0, 1.0]}, LABELS),
    "16 bit input": (Denoiser(net, "v", noise=VP, dtype=torch.bfloat16), {}, {}),
    "16 bit state": (Denoiser(net, "v", noise=VP), {"dtype": torch.float16}, {}),
    "edm": (Denoiser(net, "edm", noise=VE), {}, {}),
    "edm, guided, 16 bit": (Denoiser(net, "edm", noise=VE, dtype=torch.float16), {"guidance_scale": 2.0}, LABELS),
    "channels last": (Denoiser(net, "v", noise=VP), {"memory_format": torch.channels_last, "guidance_scale": 3.0}, LABELS),
    "reference": (Denoiser(net, "edm", noise=VE), {"impl": "reference"}, {}),
}


@pytest.mark.parametrize("edit", [by_in_place, by_data, by_numpy, by_slice], ids=lambda f: f.__name__)
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_edited_state_is_where_the_run_goes_on(setting: str, edit: Callable[[Tensor], None]) -> None:
    """One step at a time through ``latent``, edited between, is the run whose callback edits: Euler's steps keep nothing else."""
    den, options, call = SETTINGS[setting]
    options = {"progress": False, **options}
    got = Sampler("euler", sigmas=SIGMAS, callback=lambda k, s, x, d: edit(x), **options)(den, SHAPE, seeds=[1, 2], **call)
    x = None
    for k in range(len(SIGMAS) - 1):
        x = Sampler("euler", sigmas=SIGMAS[k : k + 2], **options)(den, SHAPE, seeds=[1, 2], latent=x, **call)
        edit(x)
    assert torch.equal(got, x)
    assert not torch.equal(got, Sampler("euler", sigmas=SIGMAS, **options)(den, SHAPE, seeds=[1, 2], **call))


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"ddim_inverse"}))
def test_the_networks_input_is_the_edited_state_with_every_solver(solver: str) -> None:
    """The state as the callback leaves it, scaled by c_in, is what the network is asked next, in both halves."""
    inputs, left = [], []
    den = Denoiser(lambda x, t, y: inputs.append(x.clone()) or net(x, t, y), "edm", noise=VE)

    def edit(step: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        x.mul_(0.5).add_(1.0)
        left.append(x.clone())

    draw = Sampler(solver, sigmas=SIGMAS, guidance_scale=3.0, callback=edit, progress=False)
    draw(den, SHAPE, seeds=[1, 2], **LABELS)
    for row, x, state in zip(draw.plan(den).rows[1:], inputs[1:], left, strict=False):
        expected = state / math.sqrt(row.point.sigma**2 + 0.25)
        torch.testing.assert_close(x[-2:], expected)
        assert len(x) == 2 or torch.equal(x[:2], x[2:])


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"ddim_inverse"}))
def test_an_edited_prediction_reaches_nothing(solver: str) -> None:
    """Whether a solver keeps the denoised prediction as its history is its own affair."""
    den = Denoiser(net, "v", noise=VP)
    plain = Sampler(solver, sigmas=SIGMAS, progress=False)(den, SHAPE, seeds=[1, 2])

    def overwrite(step: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        denoised.fill_(7.0)

    edited = Sampler(solver, sigmas=SIGMAS, progress=False, callback=overwrite)(den, SHAPE, seeds=[1, 2])
    assert torch.equal(plain, edited)


@pytest.mark.parametrize("g", [1.0, 3.0])
def test_an_edited_state_of_the_adaptive_sampler(g: float) -> None:
    """An edit that moves every state to the same place makes the rest of the run forget where it began."""
    den = Denoiser(net, "edm", noise=VE)
    call = {"cond": torch.zeros(2), "uncond": torch.zeros(2)}

    def reset(step: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        if step == 0:
            x.fill_(0.3)

    draw = AdaptiveSampler(sigmas=[5.0, 0.1, 0.0], guidance_scale=g, callback=reset, progress=False)
    one, two = (draw(den, SHAPE, latent=torch.full(SHAPE, 4.0 + k / 1e5), seeds=[1, 2], **call) for k in (0, 1))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert one.std() < 1e-6


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun"])
def test_a_recorded_step_serves_edits_scales_and_nested_conditions(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is replayed reads the edited state, the call's own scales and the leaves of its condition; a grid's own c_in, too."""

    def nested(x: Tensor, t: Tensor, added: dict, parts: tuple) -> Tensor:
        return net(x, t, added["shift"]) + parts[0].view(-1, 1, 1, 1) * parts[1]

    def edit(step: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        x.mul_(0.5).add_(sigma)

    def call(draw: Sampler, number: int) -> Tensor:
        draw.guidance_scale, draw.sigmas = [3.0 * number, 1.0], [7.0 + number, 4.0 + number, 3.0, 2.0, 1.0, 0.4, 0.0]
        halves = {
            name: {"added": {"shift": shift * number}, "parts": (shift + number, 0.5)}
            for name, shift in (("cond", LABELS["cond"]), ("uncond", LABELS["uncond"]))
        }
        return draw(den, SHAPE, seeds=[number, 2], **halves)

    den = Denoiser(nested, "edm", noise=VE)
    plain, draw = (Sampler(solver, callback=edit, guidance_rescale=0.5, capture=c, progress=False) for c in (False, True))
    expected = [call(plain, number) for number in (1, 2)]
    graphs = install(monkeypatch, lambda: draw._recorded)
    assert all(torch.equal(call(draw, number), expected[number - 1]) for number in (1, 2, 1))
    assert len(graphs) == 1 and not torch.equal(*expected)
