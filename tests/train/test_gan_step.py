"""The adversarial step against closed forms and a loop written out, and as what a CUDA graph would replay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from genfast.models.dcgan import DCGANConfig
from genfast.models.families import FAMILIES
from genfast.models.r3gan import R3GANConfig
from genfast.models.stylegan2 import StyleGAN2Config
from genfast.train.adversarial import AdversarialStep, Objective
from genfast.train.objectives import LOSSES, between, gradient_penalty, path_lengths

BATCH, LATENT, SHAPE = 4, 3, (4, 1, 2, 2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- losses and penalties -------------------------------------------------------------------------------------------------------

FORMULAS = {
    "logistic": (lambda r, f: -math.log(sigmoid(r)) - math.log(1 - sigmoid(f)), lambda r, f: -math.log(sigmoid(f))),
    "hinge": (lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda r, f: -f),
    "wgan": (lambda r, f: f - r, lambda r, f: -f),
    "lsgan": (lambda r, f: 0.5 * (r - 1) ** 2 + 0.5 * f**2, lambda r, f: 0.5 * (f - 1) ** 2),
    "relativistic": (lambda r, f: -math.log(sigmoid(r - f)), lambda r, f: -math.log(sigmoid(f - r))),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("which", [0, 1], ids=["discriminator", "generator"])
def test_losses_are_their_formulas(name: str, which: int) -> None:
    real, fake = 3 * random(50, seed=1), 3 * random(50, seed=2)
    expected = [FORMULAS[name][which](r, f) for r, f in zip(real.tolist(), fake.tolist(), strict=True)]
    torch.testing.assert_close(LOSSES[name][which](real, fake), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_relativistic_losses_are_each_others_mirror() -> None:
    real, fake = random(20, seed=1), random(20, seed=2)
    d, g = LOSSES["relativistic"]
    assert torch.equal(d(real, fake), g(fake, real)) and torch.equal(
        d(real + 4, fake + 4).round(decimals=9), d(real, fake).round(decimals=9)
    )


@pytest.mark.parametrize("center", [0.0, 1.0, 0.3])
def test_penalties_have_their_closed_forms(center: float) -> None:
    """D(x) = w.x has the gradient w; D(x) = x.A x / 2 + b.x has A x + b, and the penalty's own gradient in b is known too."""
    x, w, a = random(BATCH, 1, 2, 2).requires_grad_(), random(4, seed=1), random(4, 4, seed=2)
    a, b = a + a.T, random(4, seed=3).requires_grad_()
    flat = x.flatten(1)
    linear = gradient_penalty(flat @ w, x, center)
    torch.testing.assert_close(linear, ((w.norm() - center) ** 2).expand(BATCH), rtol=1e-12, atol=1e-12)

    penalty = gradient_penalty((flat @ a * flat).sum(1) / 2 + flat @ b, x, center)
    g = (flat @ a + b).detach()
    torch.testing.assert_close(penalty, (g.norm(dim=1) - center) ** 2, rtol=1e-12, atol=1e-12)
    (got,) = torch.autograd.grad(penalty.sum(), b)
    torch.testing.assert_close(got, (2 * (1 - center / g.norm(dim=1, keepdim=True)) * g).sum(0), rtol=1e-12, atol=1e-12)


def test_a_gradient_of_zero_has_a_finite_penalty() -> None:
    for center in (0.0, 1.0):
        x, w = random(3, 4).requires_grad_(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
        penalty = gradient_penalty(x @ w, x, center)
        assert torch.equal(penalty, torch.full((3,), center**2, dtype=torch.float64))
        assert torch.autograd.grad(penalty.sum(), w)[0].isfinite().all()


def test_points_between_real_and_fake() -> None:
    real, fake, mix = random(*SHAPE), random(*SHAPE, seed=1), torch.tensor([0.0, 1.0, 0.25, 0.5], dtype=torch.float64)
    expected = torch.stack([m * r + (1 - m) * f for m, r, f in zip(mix.tolist(), real, fake, strict=True)])
    torch.testing.assert_close(between(real, fake, mix), expected, rtol=1e-14, atol=1e-14)


def test_path_lengths_equal_the_jacobian() -> None:
    generator, w, noise = tiny_generator(), random(BATCH, LATENT), random(*SHAPE, seed=5)
    w.requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda one: generator(one[None])[0].flatten(), w[0].detach())
    got = path_lengths(generator(w), w, noise)
    torch.testing.assert_close(got[0], (jacobian.T @ noise[0].flatten() / 2).norm(), rtol=1e-12, atol=1e-12)
    # By layer: the mean over layers of the squared lengths.
    layers = random(BATCH, 2, LATENT).requires_grad_()
    got = path_lengths(generator(layers[:, 0]) + 3 * generator(layers[:, 1]), layers, noise)
    a, b = (path_lengths(generator(x), x, noise) for x in (t.detach().requires_grad_() for t in layers.unbind(1)))
    torch.testing.assert_close(got, ((a**2 + 9 * b**2) / 2).sqrt(), rtol=1e-12, atol=1e-12)


# ---- the step -------------------------------------------------------------------------------------------------------------------


class Mapped(nn.Module):
    """A generator with StyleGAN's two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.synthesis = nn.Sequential(nn.Linear(LATENT, LATENT), nn.Softplus()), tiny_generator()

    def forward(self, z: Tensor) -> Tensor:
        return self.synthesis(self.mapping(z))  # type: ignore[no-any-return]


def tiny_generator() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(LATENT, 4), nn.Tanh(), nn.Linear(4, 4), nn.Unflatten(1, SHAPE[1:])).double()


def tiny_discriminator() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 1)).double()


OBJECTIVES = {
    "logistic, lazy r1, lazy path length": Objective("logistic", r1=0.7, path_length=2.0, d_every=3, g_every=2),
    "relativistic, r1, r2": Objective("relativistic", r1=0.5, r2=0.3),
    "wgan, gradient penalty": Objective("wgan", gradient_penalty=10.0),
    "hinge, lazy zero-centred": Objective("hinge", gradient_penalty=2.0, center=0.0, d_every=2, r2=0.1),
    "lsgan, path length": Objective("lsgan", path_length=1.0),
}
BETAS, LR = (0.5, 0.9), (0.01, 0.02)


def draws(objective: Objective, step: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    seed = 100 * step
    given = {"real": random(*SHAPE, seed=seed), "z_d": random(BATCH, LATENT, seed=seed + 1), "z_g": random(BATCH, LATENT, seed=seed + 2)}
    if objective.gradient_penalty:
        given["mix"] = torch.rand(BATCH, generator=torch.Generator().manual_seed(seed + 3), dtype=torch.float64)
    if objective.path_length:
        given |= {"z_path": random(BATCH, LATENT, seed=seed + 4), "noise_path": random(*SHAPE, seed=seed + 5)}
    return {name: t.to(dtype) for name, t in given.items()}


def filled(step: AdversarialStep, k: int) -> dict[str, Tensor]:
    """Something for every input of step k, whatever the networks are."""
    generator = torch.Generator().manual_seed(k)
    given = {name: torch.rand(t.shape, generator=generator, dtype=torch.float64) for name, t in step.inputs.items()}
    return {name: (t * 2**40).long() if name == "seeds" else t if name == "mix" else 2 * t - 1 for name, t in given.items()}


def take(step: AdversarialStep, k: int, rate: float = 1.0, given: dict[str, Tensor] | None = None) -> None:
    """Step k with everything that may change between steps changed."""
    step.load(**(given or draws(step.objective, k, step.path_mean.dtype)))
    for name, base in zip(("generator", "discriminator"), LR, strict=True):
        step.lr[name].fill_(base * rate * step.correction[name])
    for name, weight in step.weights.items():
        weight.fill_(getattr(step.objective, name) * rate)
    step.ema_weight.fill_(0.5 if k else 1.0)
    step.run(step.objective.discriminator_phases(k))
    step.run(step.objective.generator_phases(k))


def literal(objective: Objective, generator: nn.Module, discriminator: nn.Module, steps: int, rates: list[float]) -> dict[str, Tensor]:
    """Plain training: one loss, one gradient, one Adam after Kingma and Ba's algorithm 1, in the order of the papers."""
    moments: dict[str, list[Any]] = {
        name: [0, [torch.zeros_like(p) for p in net.parameters()], [torch.zeros_like(p) for p in net.parameters()]]
        for name, net in (("g", generator), ("d", discriminator))
    }
    o, a = objective, torch.zeros((), dtype=torch.float64)

    def descend(name: str, loss: Tensor, rate: float, every: int) -> None:
        net, c = (generator, LR[0]) if name == "g" else (discriminator, LR[1]), every / (every + 1) if every > 1 else 1
        parameters = list(net[0].parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        moments[name][0] += 1
        t, (b1, b2) = moments[name][0], (BETAS[0] ** c, BETAS[1] ** c)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, grads, *moments[name][1:], strict=True):
                g = torch.zeros_like(p) if g is None else g
                m.copy_(b1 * m + (1 - b1) * g)
                v.copy_(b2 * v + (1 - b2) * g * g)
                p -= net[1] * rate * c * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + 1e-8)

    def d(x: Tensor) -> Tensor:
        return discriminator(x)[:, 0]  # type: ignore[no-any-return]

    def squared_norm(x: Tensor) -> Tensor:
        return sum(g.square().sum() for i in range(BATCH) for g in torch.autograd.grad(d(x)[i], x, create_graph=True)) / BATCH

    def penalties(fake: Tensor, given: dict[str, Tensor]) -> Tensor:
        real, fake = given["real"].clone().requires_grad_(), fake.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        total = total + (o.r1 / 2 * squared_norm(real) if o.r1 else 0) + (o.r2 / 2 * squared_norm(fake) if o.r2 else 0)
        if o.gradient_penalty:
            mix = given["mix"].view(-1, 1, 1, 1)
            x = (mix * real + (1 - mix) * fake).detach().requires_grad_()
            norms = [torch.autograd.grad(d(x)[i], x, create_graph=True)[0][i].square().sum().sqrt() for i in range(BATCH)]
            total = total + o.gradient_penalty * sum((n - o.center) ** 2 for n in norms) / BATCH
        return total

    def paths(given: dict[str, Tensor]) -> Tensor:
        nonlocal a
        w = generator.mapping(given["z_path"]) if isinstance(generator, Mapped) else given["z_path"].clone().requires_grad_()
        images = generator.synthesis(w) if isinstance(generator, Mapped) else generator(w)
        lengths = []
        for i in range(BATCH):
            (g,) = torch.autograd.grad((images[i] * given["noise_path"][i]).sum() / 2, w, create_graph=True)
            lengths.append(g[i].square().sum().sqrt())
        mean = a + o.path_decay * (sum(lengths) / BATCH - a)
        a = mean.detach()
        return o.path_length * sum((n - mean) ** 2 for n in lengths) / BATCH

    average: dict[str, Tensor] = {}
    d_every, g_every = o.d_every if o.penalises else 1, o.g_every if o.path_length else 1
    for k, rate in zip(range(steps), rates, strict=True):
        given, (d_loss, g_loss) = draws(o, k), LOSSES[o.loss]
        fake = generator(given["z_d"]).detach()
        loss = d_loss(d(given["real"]), d(fake)).mean()
        descend("d", loss + (rate * penalties(fake, given) if d_every == 1 else 0), rate, d_every)
        if d_every > 1 and k % d_every == 0:
            descend("d", d_every * rate * penalties(fake, given), rate, d_every)
        loss = g_loss(d(given["real"]), d(generator(given["z_g"]))).mean()
        descend("g", loss + (rate * paths(given) if o.path_length and g_every == 1 else 0), rate, g_every)
        if o.path_length and g_every > 1 and k % g_every == 0:
            descend("g", g_every * rate * paths(given), rate, g_every)
        for name, p in generator.named_parameters():
            average[name] = p.detach().clone() if k == 0 else 0.5 * average[name] + 0.5 * p.detach()
    return average


RATES = [1.0, 0.5, 0.8, 0.3, 0.6]


CASES = [(name, mapped, None) for name in OBJECTIVES for mapped in (False, True)]
CASES += [(name, True, "aot_eager") for name in OBJECTIVES]
CASES += [pytest.param("wgan, gradient penalty", False, "inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "mapped", "backend"), CASES)
def test_five_steps_equal_a_loop_written_out(name: str, mapped: bool, backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, and with every phase traced by make_fx and compiled."""
    objective, compiled = OBJECTIVES[name], backend is not None
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    generator, expected = (Mapped().double() if mapped else tiny_generator() for _ in range(2))
    expected.load_state_dict(generator.state_dict())
    discriminator, expected_discriminator = tiny_discriminator(), tiny_discriminator()
    step = AdversarialStep(generator, discriminator, SHAPE, LATENT, objective, lr=LR, betas=BETAS, compile=compiled)
    for k, rate in enumerate(RATES):
        take(step, k, rate)
    average = literal(objective, expected, expected_discriminator, len(RATES), RATES)
    got = {**dict(generator.named_parameters()), **{f"d.{name}": p for name, p in discriminator.named_parameters()}}
    want = {**dict(expected.named_parameters()), **{f"d.{name}": p for name, p in expected_discriminator.named_parameters()}}
    for name, p in want.items():
        # Not bit for bit: the lr and the moments' corrections are rounded to float32 by the fused Adam.
        torch.testing.assert_close(got[name], p, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    for name, p in average.items():
        torch.testing.assert_close(step.average[name], p, rtol=1e-6, atol=1e-7)
    assert all(p.grad is None for p in [*generator.parameters(), *discriminator.parameters()])
    assert {"d_loss", "d_real", "d_fake", "g_loss", *step.weights} == step.take_means().keys() and step.take_means() == {}


def test_a_seeded_generator_is_told_which_use_it_is() -> None:
    used: list[tuple[str, int, int]] = []

    class Half(nn.Module):
        def __init__(self, name: str, inner: nn.Module) -> None:
            super().__init__()
            self.name, self.inner = name, inner

        def forward(self, x: Tensor, seeds: Tensor, draw: int) -> Tensor:
            used.append((self.name, len(seeds), draw))
            return self.inner(x)  # type: ignore[no-any-return]

    class Seeded(Mapped):
        seeded = True

        def __init__(self) -> None:
            super().__init__()
            self.mapping, self.synthesis = Half("mapping", self.mapping), Half("synthesis", self.synthesis)  # type: ignore[assignment]

        def forward(self, z: Tensor, *seeds: Any) -> Tensor:
            return self.synthesis(self.mapping(z, *seeds), *seeds)  # type: ignore[no-any-return]

    objective = Objective(r2=0.5, d_every=2, path_length=1.0, path_shrink=2, g_every=2)
    step = AdversarialStep(Seeded().double(), tiny_discriminator(), SHAPE, LATENT, objective)
    step.load(**filled(step, 0))
    step.run([*objective.discriminator_phases(0), *objective.generator_phases(0)])
    # The penalty sees the fakes of its own discriminator's phase; the path length takes half of the batch.
    assert used == [(half, count, draw) for count, draw in ((4, 0), (4, 0), (4, 1), (2, 2)) for half in ("mapping", "synthesis")]
    with pytest.raises(ValueError, match="path_shrink: got 3, supported: a divisor of the batch 4"):
        AdversarialStep(tiny_generator(), tiny_discriminator(), SHAPE, LATENT, Objective(path_length=1.0, path_shrink=3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adam_reads_a_gradient_where_its_parameter_lies(layout: torch.memory_format) -> None:
    """Its kernel walks through memory: weights in one format, pictures in another and moments from a file must not be mixed up."""
    weights = []
    for own in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(LATENT, 48), nn.Unflatten(1, (3, 4, 4))).double()
        first = nn.Conv2d(3, 4, 3).double().to(memory_format=own)
        step = AdversarialStep(generator, nn.Sequential(InFormat(layout), first, nn.Flatten(), nn.Linear(16, 1).double()), (BATCH, 3, 4, 4),
                               LATENT, lr=0.1)  # fmt: skip
        for k in range(2):
            step.load(**filled(step, k))
            step.run(["discriminator", "generator"])
            step.load_state_dict({name: t.clone(memory_format=torch.contiguous_format) for name, t in step.state_dict().items()})
        weights.append(first.weight)
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


class InFormat(nn.Module):
    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=self.layout)


# ---- as a CUDA graph ------------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """A stand-in for a CUDA graph: replays the recorded operators on the same memory, with every Python value baked in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default), f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]))
        return out

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # recording a CUDA graph executes nothing; here it did
            return
        views = torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))
        with torch._C._AutoDispatchBelowAutograd(), views:  # where they were recorded
            for func, args, kwargs, outs in self.calls:
                new = [t for t in tree_flatten(func(*args, **kwargs))[0] if isinstance(t, Tensor)]
                for a, b in zip(outs, new, strict=True):
                    if a.data_ptr() != b.data_ptr():
                        a.copy_(b)

    def pool(self) -> None:
        return None


@contextmanager
def record(graph: Recorder, pool: object = None) -> Iterator[None]:
    with graph:
        yield


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


TINY: dict[str, Any] = {
    "dcgan": DCGANConfig(size=8, latent=LATENT, channels=4),
    "stylegan2": StyleGAN2Config(size=8, image_channels=1, latent=LATENT, channel_base=64, channel_max=8, mapping_layers=2, mixing=0.5),
    "r3gan": R3GANConfig(size=8, image_channels=1, latent=LATENT, channel_base=64, channel_max=8, group_channels=4, blocks=1),
}


def tiny_pair(networks: str, **changes: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if networks == "mapped":
        return Mapped().double(), tiny_discriminator()
    family, config = FAMILIES[networks], replace(TINY[networks], **changes)
    return family.build(config), family.critic(config)


@pytest.mark.parametrize(
    ("networks", "body"), [("dcgan", "float32"), ("dcgan", "bfloat16"), ("stylegan2", "float32"), ("stylegan2", "bfloat16"),
                           ("r3gan", "bfloat16"), ("mapped", "")]
)  # fmt: skip
def test_one_recording_of_a_phase_serves_every_step(networks: str, body: str, recorded: None) -> None:
    """What capture relies on, shown without a GPU: nothing that changes between steps is baked in, and nothing waits for the device."""
    results = []
    shape = SHAPE if networks == "mapped" else (BATCH, 1, 8, 8)
    for capture in (False, True):
        objective = Objective("logistic", r1=0.7, r2=0.2, gradient_penalty=1.0, path_length=2.0, path_shrink=2, d_every=2, g_every=3)
        pair = tiny_pair(networks, **({"body": body} if body else {}))
        step = AdversarialStep(*pair, shape, LATENT, objective, lr=LR, betas=BETAS)
        step.capture = capture
        states = []
        for k in range(9):
            take(step, k, 1 / (1 + k), filled(step, k))
            states.append({name: t.clone() for name, t in {**step.state_dict(), **step.sums}.items()})
        results.append((states, step.take_means(), step))
    (plain, means, _), (captured, captured_means, step) = results
    assert means == captured_means and len(plain[0]) > 20
    for k, (a, b) in enumerate(zip(plain, captured, strict=True)):
        assert [name for name in a if not torch.equal(a[name], b[name])] == [], k
    replays = {name: graph.replays for name, graph in step._graphs.items()}  # type: ignore[attr-defined]
    assert replays == {"discriminator": 8, "penalty": 4, "generator": 8, "path_length": 2, "average": 8}
    step.load_state_dict({name: t.clone() for name, t in step.state_dict().items()})
    assert not step._graphs


def test_capture_needs_cuda() -> None:
    with pytest.raises(ValueError, match="capture: got True on 'cpu', supported: CUDA devices, because it records a CUDA graph"):
        AdversarialStep(tiny_generator(), tiny_discriminator(), SHAPE, LATENT, capture=True)
