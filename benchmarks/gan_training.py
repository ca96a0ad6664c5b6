"""Suite "gan_training": StyleGAN2's networks, a block of R3GAN with its penalty, and whole training steps.

"grouped" is StyleGAN2 on torch's own operators (benchmarks/gan_composites.py) and "compiled" that under torch.compile, since the reference
loops over samples; for R3GAN and DCGAN "compiled" is the reference. On CUDA every variant is a CUDA graph but "eager", which is genfast
without one, and the references of whole steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import gan_composites, timing
from benchmarks.timing import Options, Row
from genfast.impl import NAMESPACES
from genfast.models.dcgan import DCGANConfig
from genfast.models.families import FAMILIES
from genfast.models.r3gan import ResidualBlock
from genfast.models.stylegan2 import StyleGAN2Config
from genfast.train.adversarial import AVERAGE, DISCRIMINATOR, GENERATOR, PATH, PENALTY, AdversarialStep, Objective
from genfast.train.objectives import gradient_penalty

NAMESPACES["grouped"] = gan_composites
Call = Callable[[], Any]
LAZY = Objective("logistic", r1=1.0, path_length=2.0, path_shrink=2, d_every=16, g_every=4)  # StyleGAN2's own


@dataclass(frozen=True)
class Machine:
    """What the cases are made to: sizes, and the ceiling they are held against."""

    options: Options
    threads: int
    style: StyleGAN2Config
    batch: int
    step_style: StyleGAN2Config  # of the whole training step
    step_batch: int
    dcgan: DCGANConfig
    dcgan_batch: int
    block: tuple[int, int, int, int]

    @property
    def device(self) -> str:
        return self.options.device


def machine(options: Options, threads: int) -> Machine:
    full = StyleGAN2Config(size=256, channel_base=16384, body="bfloat16")
    dcgan = DCGANConfig(size=64, image_channels=3, channels=64)
    if options.quick:
        tiny = StyleGAN2Config(size=16, channel_base=128, channel_max=16, latent=16, mapping_layers=2)
        tiny = replace(tiny, body=full.body) if options.device == "cuda" else tiny
        return Machine(options, threads, tiny, 2, tiny, 4, replace(dcgan, size=16, channels=8), 4, (2, 32, 8, 8))
    if options.device == "cuda":
        return Machine(options, threads, full, 32, full, 32, replace(dcgan, body="bfloat16"), 128, (64, 256, 32, 32))
    small = StyleGAN2Config(size=256, channel_base=4096, channel_max=256)
    return Machine(options, threads, small, 2, replace(small, size=64, channel_base=2048), 4, dcgan, 16, (8, 128, 32, 32))


# ---- timing -----------------------------------------------------------------------------------------------------------------------


def captured(call: Call) -> Call:
    """``call`` as a CUDA graph, recorded after two runs on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class _Counter(TorchDispatchMode):
    """Sums torch's own formulas; torch's counter besides watches modules, which gradients in the input of one do not get past."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:  # torch's formula counts groups for the weight's part as if they were dense
            g, x, w, transposed, mask = args[0], args[1], args[2], args[7], args[10]
            self.total += 2 * (x if transposed else g).numel() * w[0].numel() * (mask[0] + mask[1])
            return out
        formula = flop_registry.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def flop(call: Call) -> float:
    """Floating point operations of convolutions and matrix products in a call; elementwise work and genfast's filters are not counted."""
    with _Counter() as counter:
        call()
    return float(counter.total)


def matrix_peak(m: Machine, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product, measured in this run."""
    n = 8192 if m.device == "cuda" else 256 if m.options.quick else 2048
    a, b = (torch.randn(n, n, device=m.device).to(dtype) for _ in range(2))
    t = timing.interleave({"mm": lambda: a @ b}, device=m.device, rounds=5, quiet=not m.options.quick)["mm"]
    return 2e6 * n**3 / t.median


def measured(m: Machine, variants: dict[str, Call]) -> dict[str, timing.Timing]:
    if m.device == "cpu":
        torch.set_num_threads(m.threads)
    rounds, quick = (3 if m.options.quick else 7), m.options.quick
    return timing.interleave(variants, device=m.device, rounds=rounds, round_seconds=0.005 if quick else 0.05, quiet=not quick)


def rows_of(
    m: Machine, case: str, shape: list[int], dtype: str, times: dict[str, tuple[float, float]], operations: float, peak: float
) -> list[Row]:
    """A row a variant from its median and interquartile range in microseconds. ``operations``: of one call."""
    facts = timing.environment(m.device) | {"command": m.options.command}
    rows = []
    for name, (median, iqr) in times.items():
        row: Row = {"case": case, "variant": name, "shape": shape, "dtype": dtype, "median_us": round(median, 3), "iqr_us": round(iqr, 3)}
        row |= {"gflop": round(operations / 1e9, 3), "share_of_matrix_peak": round(operations / median / peak * 1e6, 4)}
        rows.append(row | facts)
    return rows


def agree(case: str, results: dict[str, list[Tensor]], tolerance: float) -> None:
    """Every variant's results are the reference's, element by element, to ``tolerance`` of the largest.

    A network's gradients go in as one tensor: where rounding puts one of a million activations on the other side of the kink of a leaky
    ReLU they jump, and a scalar's gradient, a sum of as many terms that nearly cancel, has no digits to spare for that.
    """
    for name, tensors in results.items():
        for a, b in zip(tensors, results["reference"], strict=True):
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-6)
            if not error < tolerance:
                raise RuntimeError(f"{case}: {name} differs from the reference by {float(error):.1e} on the timed inputs")


# ---- StyleGAN2's networks -----------------------------------------------------------------------------------------------------------


def time_network(which: str, backward: bool, m: Machine, peak: float) -> list[Row]:
    """Forward, or forward and the gradients of all parameters, of the generator or the discriminator."""
    config, device = m.style, m.device
    size = config.size
    shape = [m.batch, 3, size, size]
    what = "forward and backward" if backward else "forward"
    label = f"StyleGAN2-{size} {which}, {what}, channels {config.channel_base}, batch {m.batch}"
    x = torch.randn(m.batch, config.latent, device=device) if which == "generator" else torch.randn(shape, device=device)
    made: dict[str, nn.Module] = {}
    for impl in ("fused", "reference", "grouped"):
        torch.manual_seed(0)
        family = FAMILIES["stylegan2"]
        make: Any = family.build if which == "generator" else family.critic
        network = make(config, impl)
        made[impl] = network.to(device).eval()  # eval: the average of w stands still
    target = torch.randn_like(made["fused"](x))

    def call(network: Callable[[Tensor], Tensor], parameters: list[nn.Parameter]) -> Callable[[], list[Tensor]]:
        def forward_only() -> list[Tensor]:
            with torch.no_grad():
                return [network(x)]

        def both() -> list[Tensor]:
            y = network(x)
            return [y.detach(), *torch.autograd.grad(y, parameters, target)]

        return both if backward else forward_only

    variants = {"genfast": "fused", "reference": "reference", "grouped": "grouped"}
    calls = {name: call(made[impl], list(made[impl].parameters())) for name, impl in variants.items()}
    if backward and not m.options.quick:  # a minute to compile, more for forward alone
        torch.compiler.reset()
        mode = "reduce-overhead" if device == "cuda" else None
        calls["compiled"] = call(torch.compile(made["grouped"], dynamic=False, mode=mode), list(made["grouped"].parameters()))
    narrow = config.body != "float32"

    def results(run: Callable[[], list[Tensor]]) -> list[Tensor]:
        y, *gradients = run()
        return [y.clone()] if narrow or not backward else [y.clone(), torch.cat([g.flatten() for g in gradients])]

    agree(label, {name: results(run) for name, run in calls.items()}, 0.1 if narrow else 1e-2)
    operations = flop(calls["genfast"])
    if device == "cuda":
        graphs = {name: run if name == "compiled" else captured(run) for name, run in calls.items()}
        calls = {**graphs, "eager": calls["genfast"]}
    times = {name: (t.median, t.iqr) for name, t in measured(m, dict(calls)).items()}
    return rows_of(m, label, shape, config.body, times, operations, peak)


# ---- a block of R3GAN ---------------------------------------------------------------------------------------------------------------


def time_block(m: Machine, peak: float) -> list[Row]:
    """A residual block under a linear logit: forward, R1, and the gradients of both in all parameters."""
    device = m.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    label = f"R3GAN block, forward, R1 and backward, {'x'.join(map(str, m.block))}"
    torch.manual_seed(0)
    x = torch.randn(m.block, device=device).to(dtype, memory_format=torch.channels_last).requires_grad_()
    head = torch.randn(m.block[1:], device=device).to(dtype)
    blocks: dict[str, ResidualBlock] = {}
    for impl in ("fused", "reference"):
        torch.manual_seed(1)
        blocks[impl] = ResidualBlock(m.block[1], impl=impl).to(device)
        nn.init.normal_(blocks[impl].weight3, std=0.05)  # at zero, as it starts, most of the work would be on zeros

    def call(block: ResidualBlock) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            logits = (block(x) * head).float().sum((1, 2, 3))
            loss = logits.mean() + gradient_penalty(logits, x).mean() / 2
            return list(torch.autograd.grad(loss, list(block.parameters())))

        return run

    calls: dict[str, Call] = {"genfast": call(blocks["fused"]), "reference": call(blocks["reference"])}
    if not m.options.quick:
        torch.compiler.reset()
        mode = "reduce-overhead" if device == "cuda" else None
        traced = torch.compile(make_fx(calls["reference"])(), dynamic=False, mode=mode)

        def compiled() -> list[Tensor]:
            with torch.no_grad():
                gradients: list[Tensor] = traced()
                return gradients

        calls["compiled"] = compiled
    agree(label, {name: [t.clone() for t in run()] for name, run in calls.items()}, 0.1 if device == "cuda" else 1e-3)
    operations = flop(calls["genfast"])
    if device == "cuda":
        calls = {**{name: run if name == "compiled" else captured(run) for name, run in calls.items()}, "eager": calls["genfast"]}
    times = {name: (t.median, t.iqr) for name, t in measured(m, calls).items()}
    return rows_of(m, label, list(m.block), str(dtype).removeprefix("torch."), times, operations, peak)


# ---- whole steps ----------------------------------------------------------------------------------------------------------------------


def time_step(family: str, variants: dict[str, dict[str, Any]], m: Machine, peak: float) -> list[Row]:
    """A training step as it comes on average: the lazy phases count for the share of the steps that take them.

    ``variants``: networks' impl and options of `AdversarialStep`, by name; "genfast" and "reference" among them.
    """
    config: Any = m.step_style if family == "stylegan2" else m.dcgan
    batch, objective = (m.step_batch, LAZY) if family == "stylegan2" else (m.dcgan_batch, Objective())
    shape = (batch, config.image_channels, config.size, config.size)
    phases = {DISCRIMINATOR: 1.0, GENERATOR: 1.0, AVERAGE: 1.0}
    phases |= {PENALTY: 1 / objective.d_every} if objective.penalises else {}
    phases |= {PATH: 1 / objective.g_every} if objective.path_length else {}
    name_of = {"stylegan2": "StyleGAN2", "dcgan": "DCGAN"}[family]
    label = f"{name_of}-{config.size} training step, batch {batch}"

    def step(impl: str, **options: Any) -> AdversarialStep:
        torch.manual_seed(0)
        networks = FAMILIES[family].networks(config, impl)
        g, d = (network.to(m.device).train() for network in networks)
        made = AdversarialStep(g, d, shape, config.latent, objective, lr=0.0, **options)  # lr 0: the timed step does not drift
        draw = torch.Generator().manual_seed(1)
        for buffer in made.inputs.values():
            if buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=draw))
            else:
                buffer.copy_(torch.arange(len(buffer)))
        return made

    steps, reports = {name: step(**options) for name, options in variants.items()}, {}
    for name, one in steps.items():
        for _ in range(3):  # warm, recorded, replayed
            one.run(phases)
        one.take_means()
        one.run(phases)
        means = one.take_means()
        reports[name] = [torch.tensor([means[key] for key in ("d_loss", "g_loss")])]
    agree(label, reports, 0.05 if config.body != "float32" else 1e-2)
    eager = step("fused")
    operations = sum(share * flop(partial(eager.run, [phase])) for phase, share in phases.items())
    times = dict.fromkeys(steps, (0.0, 0.0))
    for phase, share in phases.items():
        for name, t in measured(m, {name: partial(one.run, [phase]) for name, one in steps.items()}).items():
            times[name] = (times[name][0] + share * t.median, times[name][1] + share * t.iqr)
    rows = rows_of(m, label, list(shape), config.body, times, operations, peak)
    return [row | {"s_per_kimg": round(row["median_us"] * 1e-3 / batch, 4), "objective": asdict(objective)} for row in rows]


def cases_of(m: Machine) -> dict[str, Callable[[Machine, float], list[Row]]]:
    """Every case, by the name that ``--filter`` looks at."""
    cuda = m.device == "cuda"
    both: dict[str, dict[str, Any]] = {"genfast": {"impl": "fused", "capture": cuda}, "reference": {"impl": "reference"}}
    eager: dict[str, dict[str, Any]] = {"eager": {"impl": "fused"}} if cuda else {}
    style = {**both, "grouped": {"impl": "grouped", "capture": cuda}, **eager}
    traced = {"capture": cuda, "compile": True}
    dcgan = {**both, **eager} if m.options.quick else {**both, **eager, "compiled": {"impl": "reference", **traced}}
    cases: dict[str, Callable[[Machine, float], list[Row]]] = {
        "StyleGAN2 step": partial(time_step, "stylegan2", style),
        "DCGAN step": partial(time_step, "dcgan", dcgan),
        "R3GAN block": time_block,
    }
    for which in ("generator", "discriminator"):
        for backward, what in ((False, "forward"), (True, "forward and backward")):
            cases[f"StyleGAN2 {which}, {what}"] = partial(time_network, which, backward)
    if cuda and not m.options.quick:  # a whole network's second derivative compiles for minutes
        cases["StyleGAN2 step, compiled"] = partial(time_step, "stylegan2", {**both, "compiled": {"impl": "grouped", **traced}})
    return cases


def run(options: Options) -> Iterator[tuple[str, list[Row]]]:
    for threads in options.threads:
        m = machine(options, threads)
        if options.device == "cuda":
            torch.backends.cudnn.benchmark = True
        else:
            torch.set_num_threads(threads)
        peak = matrix_peak(m, torch.bfloat16 if options.device == "cuda" else torch.float32)
        for name, case in cases_of(m).items():
            rows = options.attempt(name, partial(case, m, peak)) if options.filter in name else []
            if rows:
                yield rows[0]["case"] + (f", {threads} threads" if threads else ""), rows
