"""Double backward and torch.compile: exact by the traced route, refused otherwise, never wrong without a word."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_gan_step import BATCH, BETAS, LATENT, LR, SHAPE, draws, filled, random, take, tiny_discriminator, tiny_generator, tiny_pair
from torch import Tensor, nn

from genfast import ops
from genfast.train.adversarial import AdversarialStep, Objective


@torch.library.custom_op("gan_test::leak", mutates_args=())
def leak(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


@torch.library.custom_op("gan_test::leak_backward", mutates_args=())
def leak_backward(d: Tensor, y: Tensor) -> Tensor:
    return torch.where(y > 0, d, 0.2 * d)


leak.register_fake(torch.empty_like)
leak_backward.register_fake(lambda d, y: torch.empty_like(d))


class NaiveBackward(torch.autograd.Function):
    @staticmethod
    def forward(d: Tensor, y: Tensor) -> Tensor:
        return leak_backward(d, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dd: Tensor) -> tuple[Tensor, None]:
        return NaiveBackward.apply(dd, ctx.saved_tensors[0]), None


class Naive(torch.autograd.Function):
    """Leaky ReLU by custom operators, as one would first write it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return leak(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:
        return NaiveBackward.apply(d, ctx.saved_tensors[0])


class Blend(nn.Module):
    """0.5 x + 0.1 cos x: by the solver step's kernel, which stands for any operator of ours inside a discriminator, or by torch."""

    def __init__(self, ours: bool) -> None:
        super().__init__()
        coef, index = ops.pack_row(convert=(0.0, 1.0), outputs={0: {"x": 0.5, "d": 0.1}})
        self.ours, self.coef, self.index = ours, torch.tensor(coef, dtype=torch.float64), torch.tensor(index)

    def forward(self, x: Tensor) -> Tensor:
        return ops.solver_step([x], x.cos(), self.coef, self.index)[0] if self.ours else 0.5 * x + 0.1 * x.cos()


def with_blend(ours: bool) -> nn.Module:
    flat, first, act, last = tiny_discriminator()
    return nn.Sequential(flat, first, act, Blend(ours), last).double()


def trained(objective: Objective, ours: bool, through: Callable[[Any], Any] = lambda run: run, compile: bool = False) -> list[Tensor]:
    """Both networks' weights after two steps with a kernel of ours in the discriminator, ``through`` wrapped around each run."""
    torch._dynamo.reset()
    step = AdversarialStep(tiny_generator(), with_blend(ours), SHAPE, LATENT, objective, lr=LR, betas=BETAS, compile=compile)
    run = through(step.run)
    for k in range(2):
        step.load(**draws(objective, k))
        run(objective.discriminator_phases(k))
        run(objective.generator_phases(k))
    return [p.detach() for p in [*step.generator.parameters(), *step.discriminator.parameters()]]


PENALISED = Objective("logistic", r1=0.7, gradient_penalty=1.0)


@pytest.mark.parametrize("how", ["eager", "make_fx", "torch.compile with graph breaks"])
def test_our_operators_inside_a_discriminator_are_exact(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    expected = trained(PENALISED, ours=False)
    got = trained(PENALISED, ours=True, through=torch.compile if "breaks" in how else lambda run: run, compile=how == "make_fx")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ours", [False, True])
def test_a_whole_phase_under_torch_compile_is_refused(ours: bool) -> None:
    with pytest.raises(Exception, match=r"torch.compile: got a phase of AdversarialStep, supported: AdversarialStep"):
        trained(PENALISED, ours, through=partial(torch.compile, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("networks", ["mapped", "stylegan2"])
def test_a_compiled_discriminator_refuses_its_penalty(networks: str) -> None:
    """AOT autograd has no second derivative, and says so, around our operators too."""
    torch._dynamo.reset()
    generator, discriminator = tiny_pair(networks)
    shape = SHAPE if networks == "mapped" else (BATCH, 1, 8, 8)
    step = AdversarialStep(generator, torch.compile(discriminator, backend="aot_eager"), shape, LATENT, PENALISED)
    step.load(**filled(step, 0))
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|requires create_graph=False"):
        step.run(PENALISED.discriminator_phases(0))


def penalty_gradient(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """R1's gradient in the weights of a small discriminator."""
    v, x = random(4, seed=1), random(6, 4, seed=2)

    def logits(w: Tensor, x: Tensor) -> Tensor:
        return (act(act(x @ w) @ w) @ v).sum()

    return torch.func.grad(lambda w: torch.func.grad(lambda x: logits(w, x))(x).square().sum())


def test_what_a_naive_operator_loses_ours_refuses() -> None:
    """A custom operator in an autograd.Function: exact in eager mode, wrong without a word as one graph. Ours stop there."""
    torch._dynamo.reset()
    w = random(4, 4)
    whole = partial(torch.compile, backend="aot_eager", fullgraph=True)
    exact = penalty_gradient(partial(nn.functional.leaky_relu, negative_slope=0.2))(w)
    torch.testing.assert_close(penalty_gradient(Naive.apply)(w), exact)
    assert (whole(penalty_gradient(Naive.apply))(w) - exact).abs().max() > 1e-3 * exact.abs().max()
    blend = Blend(ours=True)
    torch.testing.assert_close(penalty_gradient(blend)(w), penalty_gradient(Blend(ours=False))(w))
    with pytest.raises(Exception, match=r"supported: none|torch.compiler.disable"):
        whole(penalty_gradient(blend))(w)


@pytest.mark.parametrize(
    ("networks", "buffer"), [("dcgan", "running_mean"), pytest.param("stylegan2", "mapping.average", marks=pytest.mark.slow)]
)
def test_compiled_phases_equal_eager_ones(networks: str, buffer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole networks, double backward and draws included. Tracing executes a phase once more than it is run: no buffer may show it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    objective, states = Objective(r1=0.5, path_length=1.0, path_shrink=2), []
    for compile in (False, True):
        torch._dynamo.reset()
        pair = (network.double() for network in tiny_pair(networks))
        step = AdversarialStep(*pair, (BATCH, 1, 8, 8), LATENT, objective, lr=LR, betas=BETAS, compile=compile)
        for k in range(3):
            take(step, k, 1 / (1 + k), filled(step, k))
        states.append(step.state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    assert any(buffer in name for name in states[0])
