"""The adversarial step: what is minimised, and the phases of one step on fixed buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from genfast import ranks
from genfast.checks import Rule, at_least, check, choice, decay, each, either, flag, instance, plain, settle, share, shown, whole
from genfast.train.checkpoint import check_fits
from genfast.train.objectives import LOSSES, PAIRED, between, gradient_penalty, path_lengths

DISCRIMINATOR, PENALTY, GENERATOR, PATH, AVERAGE = "discriminator", "penalty", "generator", "path_length", "average"
# Number of the draw, in the discriminator's phase, the generator's and for the path length, of whatever one seed is drawn from.
D_DRAW, G_DRAW, PATH_DRAW = 0, 1, 2
_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what Adam keeps of a parameter

OBJECTIVE_RANGES = {
    "loss": choice(*LOSSES),
    "r1": at_least(0),
    "r2": at_least(0),
    "gradient_penalty": at_least(0),
    "center": at_least(0),
    "path_length": at_least(0),
    "path_decay": Rule("a number above 0 and at most 1", lambda value: share().accepts(value) and value > 0),
    "path_shrink": whole(1),
    "d_every": whole(1),
    "g_every": whole(1),
}


@dataclass(frozen=True)
class Objective:
    """What the two networks minimise.

    ``r1``, ``r2``: gamma of gamma / 2 E |grad_x D(x)|^2 over real and over fake samples (Mescheder et al. 2018, equation 9).
    ``gradient_penalty``: lambda of lambda E (|grad_x D(x)| - center)^2 at points between real and fake samples: ``center`` 1 is
    WGAN-GP (Gulrajani et al. 2017, equation 3), 0 the zero-centred form (Thanh-Tung et al. 2019).
    ``path_length``: weight of E (|J_w^T y| - a)^2 (Karras et al. 2020, equation 4), a the running mean of the lengths, folded
    in by ``path_decay``. w is what the generator's ``mapping`` returns where it has one, else the latents. It is taken over
    1 / ``path_shrink`` of the batch (StyleGAN2's own training: 2).
    ``d_every``, ``g_every``: how many steps apart the penalties and the path length are taken. Above 1 they are phases of their own,
    weighted by the interval, and Adam's constants are raised to c = k / (k + 1) (Karras et al. 2020, appendix B).
    """

    loss: Literal["logistic", "hinge", "wgan", "lsgan", "relativistic"] = "logistic"  # of the logits (docs/gan-training.md)
    r1: float = 0.0  # gamma of R1, the penalty at real samples; 0: none
    r2: float = 0.0  # gamma of R2, the penalty at generated samples; 0: none
    gradient_penalty: float = 0.0  # lambda of the penalty between the two (10 is usual with "wgan"); 0: none
    center: float = 1.0  # norm that the gradient between the two is pulled to, 1 or 0
    path_length: float = 0.0  # weight of the path lengths (2 is usual); 0: none
    path_decay: float = 0.01  # share of the newest mean length in the running mean
    path_shrink: int = 1  # path lengths of one in so many samples of a step (2 is usual)
    d_every: int = 1  # steps between the discriminator's penalties (16 is usual)
    g_every: int = 1  # steps between path lengths (4 is usual)

    def __post_init__(self) -> None:
        settle(self, OBJECTIVE_RANGES)

    @property
    def penalises(self) -> bool:
        """Whether the discriminator's gradient is penalised."""
        return max(self.r1, self.r2, self.gradient_penalty) > 0

    def discriminator_phases(self, count: int) -> tuple[str, ...]:
        """The phases of the discriminator's update number ``count`` (0 is the first)."""
        lazy = self.penalises and self.d_every > 1 and count % self.d_every == 0
        return (DISCRIMINATOR, PENALTY) if lazy else (DISCRIMINATOR,)

    def generator_phases(self, count: int) -> tuple[str, ...]:
        """The phases of the generator's update number ``count`` (0 is the first), the average of its weights last."""
        lazy = self.path_length > 0 and self.g_every > 1 and count % self.g_every == 0
        return (GENERATOR, PATH, AVERAGE) if lazy else (GENERATOR, AVERAGE)


STEP_RANGES = {
    "shape": each(whole(1)),
    "latent": whole(1),
    "objective": instance(Objective),
    "lr": either(at_least(0), each(at_least(0), 2)),
    "betas": each(decay(), 2),
    "eps": at_least(0),
    "capture": flag(),
    "compile": flag(),
}


class AdversarialStep:
    """The phases of adversarial training, each on fixed buffers, so that on CUDA each can be one captured graph.

    ``generator`` maps latents (B, ``latent``) to samples; ``discriminator`` maps samples to logits (B,) or (B, 1). Both are on one device
    and are trained in place. ``shape``: (B, C, H, W) of the real samples. A generator with the attribute ``seeded``, and its ``mapping``
    and ``synthesis``, are called with (latents, seeds (B,) int64, draw): what it leaves to chance it draws from them, with draw 0 in the
    discriminator's phase, 1 in the generator's, 2 for the path length.
    ``lr``, ``betas``, ``eps``: Adam's, the same for both networks; ``lr`` may be a pair (generator, discriminator).
    ``capture``: record each phase in a CUDA graph and replay it: its first run is eager, on a side stream, and the second records.
    Networks must be capturable. ``compile``: trace each phase's gradients, the double backward with them, by make_fx, and compile
    the trace by torch.compile; shapes and control flow are those of the trace. Any other torch.compile around `run` leaves it eager, and
    refuses with ``fullgraph=True``.

    ``inputs`` names the buffers a phase reads: "real", "z_d" and "z_g" (latents of the discriminator's and the generator's phase),
    and where needed "seeds" (B,), "mix" (B,) in [0, 1), "z_path" and "noise_path" (like real) of B / path_shrink samples. `load` fills
    them. ``lr`` (by network), ``weights`` (by penalty) and ``ema_weight`` (share of the new weights in the average) are 0-dimensional
    tensors that may be filled between phases; ``lr`` is after the factor ``correction`` of a lazy schedule. ``average`` holds the averages
    of the generator's parameters and buffers, by name. In a process group (`genfast.ranks`) the batch is each rank's share, and before
    each step of Adam gradients and running statistics are averaged over the ranks. What the phases report is summed on the device until
    `take_means`; no phase waits for the device.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        shape: Sequence[int],
        latent: int,
        objective: Objective = Objective(),
        *,
        lr: float | tuple[float, float] = 2e-4,
        betas: tuple[float, float] = (0.0, 0.99),
        eps: float = 1e-8,
        capture: bool = False,
        compile: bool = False,
    ) -> None:
        check(STEP_RANGES, locals())
        shape, latent, lr, betas = plain((shape, latent, lr, betas))
        like, other = _parameter("generator", generator), _parameter("discriminator", discriminator)
        if like.device != other.device:
            raise ValueError(f"discriminator: got one on {other.device}, supported: {like.device}, where the generator is")
        if capture and like.device.type != "cuda":
            raise ValueError(f"capture: got True on {like.device.type!r}, supported: CUDA devices, because it records a CUDA graph")
        self.generator, self.discriminator, self.objective = generator, discriminator, objective
        self.capture = capture

        def buffer(*size: int) -> Tensor:
            return torch.zeros(size, dtype=like.dtype, device=like.device)

        batch = shape[0]
        self.inputs = {"real": buffer(*shape), "z_d": buffer(batch, latent), "z_g": buffer(batch, latent)}
        if getattr(generator, "seeded", False):
            self.inputs["seeds"] = torch.zeros(batch, dtype=torch.int64, device=like.device)
        if objective.gradient_penalty:
            self.inputs["mix"] = buffer(batch)
        if objective.path_length:
            if batch % objective.path_shrink:
                raise ValueError(f"path_shrink: got {objective.path_shrink}, supported: a divisor of the batch {batch}")
            paths = batch // objective.path_shrink
            self.inputs |= {"z_path": buffer(paths, latent), "noise_path": buffer(paths, *shape[1:])}
        penalties = ("r1", "r2", "gradient_penalty", "path_length")
        self.weights = {name: buffer().fill_(getattr(objective, name)) for name in penalties if getattr(objective, name)}
        self.path_mean, self.ema_weight = buffer(), buffer().fill_(1)
        reported = ["d_loss", "d_real", "d_fake", *self.weights, "g_loss"]
        self.sums = {name: buffer(2) for name in reported}

        # A network with a lazy phase steps k + 1 times in k steps; these constants give k steps' decay and length (Karras et al. 2020).
        k = {
            GENERATOR: objective.g_every if objective.path_length else 1,
            DISCRIMINATOR: objective.d_every if objective.penalises else 1,
        }
        pair = lr if isinstance(lr, tuple) else (lr, lr)
        self.networks = {GENERATOR: generator, DISCRIMINATOR: discriminator}
        self.correction = {name: every / (every + 1) if every > 1 else 1.0 for name, every in k.items()}
        self.lr = {name: buffer().float().fill_(rate * self.correction[name]) for name, rate in zip(k, pair, strict=True)}
        self.optimizers = {
            name: torch.optim.Adam(
                network.parameters(),
                lr=self.lr[name],  # a tensor, and the fused kernel reads it and the step on the device: a recording bakes neither
                betas=(betas[0] ** self.correction[name], betas[1] ** self.correction[name]),
                eps=eps,
                fused=True,
                capturable=True,
            )
            for name, network in self.networks.items()
        }
        self.average = {name: t.detach().clone() for name, t in generator.state_dict().items()}
        self._phases: dict[str, Callable[[], None]] = {
            DISCRIMINATOR: self._phase(DISCRIMINATOR, self._discriminator_loss, compile),
            PENALTY: self._phase(DISCRIMINATOR, self._lazy_penalty, compile),
            GENERATOR: self._phase(GENERATOR, self._generator_loss, compile),
            PATH: self._phase(GENERATOR, self._lazy_path_length, compile),
            AVERAGE: self._fold_average,
        }
        self._warm: set[str] = set()
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}

    def load(self, **inputs: Tensor) -> None:
        """Copy into ``inputs``. Raises ValueError for an unknown name, another shape, or fractions where integers are wanted."""
        for name, value in inputs.items():
            if name not in self.inputs:
                raise ValueError(f"inputs: got {name!r}, supported: {', '.join(map(repr, self.inputs))}")
            if value.shape != self.inputs[name].shape:
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, supported: {tuple(self.inputs[name].shape)}")
            if value.is_floating_point() != self.inputs[name].is_floating_point():
                raise ValueError(f"{name}: got {value.dtype}, supported: {self.inputs[name].dtype}")
        for name, value in inputs.items():
            self.inputs[name].copy_(value)

    @torch.compiler.disable(reason="torch.compile: got a phase of AdversarialStep, supported: AdversarialStep(compile=True)")  # type: ignore[untyped-decorator]
    def run(self, phases: Iterable[str]) -> None:
        """Run phases, by name, in order: those of `Objective.discriminator_phases` or `Objective.generator_phases`.

        Raises ValueError for an unknown phase, or one of a term that the objective does not have.
        """
        phases = (phases,) if isinstance(phases, str) else tuple(phases)
        lacking = {*(() if self.objective.penalises else (PENALTY,)), *(() if self.objective.path_length else (PATH,))}
        for name in phases:
            if name not in self._phases or name in lacking:
                known = ", ".join(repr(phase) for phase in self._phases if phase not in lacking)
                raise ValueError(f"phases: got {shown(name)}, supported by this objective: {known}")
        for name in phases:
            if self.capture:
                self._captured(name)
            else:
                self._phases[name]()

    def take_means(self) -> dict[str, float]:
        """The means of what the phases reported since the last call (waits for the device)."""
        means = {}
        for name, sums in self.sums.items():
            total, count = sums.tolist()
            if count:
                means[name] = total / count
            sums.zero_()
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """Everything training continues from, by name: networks, averages, Adam's moments and steps, the mean path length."""
        tensors = {f"{name}/{key}": t for name, network in self.networks.items() for key, t in network.state_dict().items()}
        tensors |= {f"average/{name}": t for name, t in self.average.items()} | {"path_mean": self.path_mean}
        for name, optimizer in self.optimizers.items():
            for key, parameter in self.networks[name].named_parameters():
                tensors |= {f"adam/{name}/{key}/{word}": value for word, value in optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state_dict` gave, in place. Raises ValueError, and changes nothing, unless it is of such networks."""
        mine = self.state_dict()
        check_fits(tensors, {name: t.shape for name, t in mine.items() if not name.startswith("adam/")} | self._saved_by_adam(tensors))
        for name, optimizer in self.optimizers.items():
            for key, parameter in self.networks[name].named_parameters():
                prefix = f"adam/{name}/{key}/"
                saved = {word: tensors[prefix + word] for word in _ADAM if prefix + word in tensors}
                optimizer.state[parameter] = {
                    word: torch.empty_like(t if word == "step" else parameter, device=parameter.device).copy_(t)
                    for word, t in saved.items()
                }
        for name, tensor in mine.items():
            if not name.startswith("adam/"):
                tensor.copy_(tensors[name])
        self._warm.clear()  # what was recorded writes into Adam's old state
        self._graphs.clear()

    def _saved_by_adam(self, tensors: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
        """The shapes of what Adam saved of each parameter: a step and two moments, or nothing before the first step."""
        shapes: dict[str, Sequence[int]] = {}
        for name, network in self.networks.items():
            for key, parameter in network.named_parameters():
                if any(f"adam/{name}/{key}/{word}" in tensors for word in _ADAM):
                    shapes |= {f"adam/{name}/{key}/{word}": () if word == "step" else parameter.shape for word in _ADAM}
        return shapes

    # ---- phases ----------------------------------------------------------------------------------------------------------------

    def _phase(self, network: str, loss: Callable[[], tuple[Tensor, dict[str, Tensor]]], compile: bool) -> Callable[[], None]:
        """Gradients of a loss, one step of Adam, and the sums of what the loss reports. Gradients do not outlive the phase."""
        parameters, optimizer = list(self.networks[network].parameters()), self.optimizers[network]

        def gradients() -> tuple[list[Tensor], dict[str, Tensor]]:
            total, report = loss()
            grads = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
            return list(grads), {name: value.detach() for name, value in report.items()}

        def averaged() -> list[Tensor]:
            buffers = [t for t in (*self.generator.buffers(), *self.discriminator.buffers()) if t.is_floating_point()]
            return [parameter.grad for parameter in parameters if parameter.grad is not None] + buffers

        evaluate = _compiled(gradients, [*self.generator.buffers(), *self.discriminator.buffers()]) if compile else gradients

        def phase() -> None:
            grads, report = evaluate()
            for parameter, grad in zip(parameters, grads, strict=True):
                # Adam's kernel walks through memory, and a convolution may leave its weight's gradient in another order.
                parameter.grad = grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)
            ranks.average_(averaged())
            optimizer.step()
            optimizer.zero_grad()
            if "path_mean" in report:
                self.path_mean.copy_(report.pop("path_mean"))
            for name, value in report.items():
                self.sums[name].add_(torch.stack([value, torch.ones_like(value)]))

        return phase

    def _discriminator_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            fake = self._generate("z_d", D_DRAW)
        both = self.objective.penalises and self.objective.d_every == 1  # the logits serve the loss and the penalties
        real = self.inputs["real"].detach().requires_grad_(both and self.objective.r1 > 0)
        fake = fake.requires_grad_(both and self.objective.r2 > 0)
        d_real, d_fake = self._logits(real), self._logits(fake)
        loss = LOSSES[self.objective.loss][0](d_real, d_fake).mean()
        report = {"d_loss": loss, "d_real": d_real.mean(), "d_fake": d_fake.mean()}
        if both:
            penalty, more = self._penalties(real, fake, d_real, d_fake)
            loss, report = loss + penalty, report | more
        return loss, report

    def _lazy_penalty(self) -> tuple[Tensor, dict[str, Tensor]]:
        fake = real = self.inputs["real"].detach().requires_grad_()
        if self.objective.r2 or self.objective.gradient_penalty:
            with torch.no_grad():
                fake = self._generate("z_d", D_DRAW)
            fake = fake.requires_grad_()
        d_real = self._logits(real) if self.objective.r1 else None
        d_fake = self._logits(fake) if self.objective.r2 else None
        penalty, report = self._penalties(real, fake, d_real, d_fake)
        return penalty * self.objective.d_every, report

    def _penalties(self, real: Tensor, fake: Tensor, d_real: Tensor | None, d_fake: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the penalties, and each before its weight. ``real`` and ``fake`` require a gradient where they are needed."""
        report: dict[str, Tensor] = {}
        if self.objective.r1 and d_real is not None:
            report["r1"] = gradient_penalty(d_real, real).mean() / 2
        if self.objective.r2 and d_fake is not None:
            report["r2"] = gradient_penalty(d_fake, fake).mean() / 2
        if self.objective.gradient_penalty:
            x = between(real.detach(), fake.detach(), self.inputs["mix"]).requires_grad_()
            report["gradient_penalty"] = gradient_penalty(self._logits(x), x, self.objective.center).mean()
        return torch.stack([self.weights[name] * value for name, value in report.items()]).sum(), report

    def _generator_loss(self) -> tuple[Tensor, dict[str, Tensor]]:
        d_fake = self._logits(self._generate("z_g", G_DRAW))
        d_real = d_fake
        if self.objective.loss in PAIRED:
            with torch.no_grad():
                d_real = self._logits(self.inputs["real"])
        loss = LOSSES[self.objective.loss][1](d_real, d_fake).mean()
        report = {"g_loss": loss}
        if self.objective.path_length and self.objective.g_every == 1:
            penalty, more = self._path_length()
            loss, report = loss + penalty, report | more
        return loss, report

    def _lazy_path_length(self) -> tuple[Tensor, dict[str, Tensor]]:
        penalty, report = self._path_length()
        return penalty * self.objective.g_every, report

    def _path_length(self) -> tuple[Tensor, dict[str, Tensor]]:
        mapping, synthesis = (getattr(self.generator, name, None) for name in ("mapping", "synthesis"))
        z = self.inputs["z_path"]
        seeds = self._seeds(len(z), PATH_DRAW)
        w = z.detach().requires_grad_() if mapping is None else mapping(z, *seeds)
        images = self.generator(w, *seeds) if synthesis is None else synthesis(w, *seeds)
        lengths = path_lengths(images, w, self.inputs["noise_path"])
        mean = torch.lerp(self.path_mean, ranks.mean(lengths.mean()), self.objective.path_decay)
        penalty = (lengths - mean).square().mean()
        return self.weights["path_length"] * penalty, {"path_length": penalty, "path_mean": mean}

    def _seeds(self, count: int, draw: int) -> tuple[Tensor, int] | tuple[()]:
        """What a seeded generator, its mapping or its synthesis is called with besides its input."""
        return (self.inputs["seeds"][:count], draw) if "seeds" in self.inputs else ()

    def _generate(self, latents: str, draw: int) -> Tensor:
        z = self.inputs[latents]
        images: Tensor = self.generator(z, *self._seeds(len(z), draw))
        return images

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.discriminator(x)
        return logits.view(len(x))

    @torch.no_grad()
    def _fold_average(self) -> None:
        for name, t in self.generator.state_dict().items():
            if t.is_floating_point():
                self.average[name].lerp_(t, self.ema_weight)
            else:
                self.average[name].copy_(t)

    def _captured(self, name: str) -> None:
        """A phase's first run is as it is and warms everything up, the second is recorded, and all from it on are replayed."""
        if name not in self._warm:
            self._warm.add(name)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._phases[name]()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if name not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self._graphs.values())).pool() if self._graphs else None  # nothing but the fixed buffers outlives a phase
            with torch.cuda.graph(graph, pool=pool):
                self._phases[name]()
            self._graphs[name] = graph
        self._graphs[name].replay()


def _parameter(name: str, network: nn.Module) -> Tensor:
    """The first parameter of a network, which stands for all of them."""
    if not isinstance(network, nn.Module) or (parameter := next(network.parameters(), None)) is None:
        raise ValueError(f"{name}: got {shown(type(network).__name__)}, supported: a torch module with parameters")
    return parameter


def _compiled(
    gradients: Callable[[], tuple[list[Tensor], dict[str, Tensor]]], written: Sequence[Tensor]
) -> Callable[[], tuple[list[Tensor], dict[str, Tensor]]]:
    """``gradients``, traced through stock autograd by make_fx at its first call and compiled; ``written`` is what it writes to."""
    compiled: list[Callable[[], tuple[list[Tensor], dict[str, Tensor]]]] = []

    def evaluate() -> tuple[list[Tensor], dict[str, Tensor]]:
        if not compiled:
            before = [t.clone() for t in written]  # the trace executes
            compiled.append(torch.compile(make_fx(gradients)(), fullgraph=True))
            with torch.no_grad():
                for t, value in zip(written, before, strict=True):
                    t.copy_(value)
        with torch.no_grad():
            return compiled[0]()

    return evaluate
