"""Training of diffusion and flow models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from genfast import ranks, schedules
from genfast.checks import above, above_or_infinite, at_least, check, choice, decay, each, optional, settle, share, shown, whole
from genfast.data.samples import Samples
from genfast.generate import overview
from genfast.media import encoded, grid
from genfast.models.denoising import draw
from genfast.models.files import save
from genfast.samplers import Denoiser
from genfast.schedules import NoiseSchedule
from genfast.streams import LABELS, NOISE, RUN, TIMES, VALIDATION
from genfast.train import average as averages
from genfast.train.directory import Row, check_words, digest
from genfast.train.networks import Call, Called, check_module, description, gradients_and_buffers, probe
from genfast.train.objectives import Prediction, diffusion_loss, network_input
from genfast.train.rates import learning_rate
from genfast.train.run import MOST, Run, check_length

PROCESSES = ("cosine", "linear", "scaled_linear", "flow")
if TYPE_CHECKING:
    Process = Literal["cosine", "linear", "scaled_linear", "flow"] | NoiseSchedule
else:  # what the command line offers
    Process = Literal["cosine", "linear", "scaled_linear", "flow"]

# What each field of `DiffusionTraining` may be; the process is checked as an object.
RANGES = {
    "steps": whole(1, MOST),
    "batch": whole(1, MOST),
    "prediction": choice("epsilon", "v", "x0", "flow"),
    "min_snr": optional(above(0)),
    "label_dropout": share(),
    "lr": above(0),
    "lr_schedule": choice("cosine", "constant"),
    "warmup": whole(0, MOST),
    "betas": each(decay(), 2),
    "weight_decay": at_least(0),
    "clip_grad": above_or_infinite(0),
    "ema": averages.WIDTH,
    "autocast": optional(choice("bfloat16")),
}
# What training says of the weights that it saves.
SAVED_WORDS = ("prediction", "noise", "noise_steps", "shift", "size")


@dataclass(frozen=True)
class DiffusionTraining:
    """Everything that decides the bits of a trained network, besides the network itself, the data and the run's seed."""

    steps: int = 3000  # optimizer steps
    batch: int = 64  # images a step
    prediction: Prediction = "v"  # what the network returns; "flow" needs the noise process "flow"
    noise: Process | None = None  # the process, by its name in genfast.schedules; None: "flow" for that prediction, else "cosine"
    min_snr: float | None = None  # gamma of min-SNR weighting (Hang et al. 2023 use 5); None: plain mean squared error
    label_dropout: float = 0.1  # share of labels replaced by "no label", for guidance (Ho and Salimans 2022)
    lr: float = 1e-3  # peak learning rate of AdamW
    lr_schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up: half a cosine down to 0, or flat
    warmup: int = 200  # steps of linear warm-up
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    weight_decay: float = 0.0  # of AdamW
    clip_grad: float = 1.0  # largest norm of the gradient
    ema: float = 0.05  # relative width of the power-function average of the weights (Karras et al. 2024)
    autocast: Literal["bfloat16"] | None = None  # dtype of the network's matrix products; weights and state stay float32

    def __post_init__(self) -> None:
        settle(self, RANGES)
        check({"warmup": whole(0, self.steps)}, {"warmup": self.warmup})
        if not isinstance(self.noise, NoiseSchedule) and self.noise not in (None, *PROCESSES):
            supported = f"{', '.join(map(repr, PROCESSES))}, or a process of genfast.schedules"
            raise ValueError(f"noise: got {shown(self.noise)}, supported: {supported}")
        noise = self.process
        if noise.kind == "ve" or (noise.kind == "flow") != (self.prediction == "flow"):
            raise ValueError(
                f"noise: got {noise.name!r} with prediction={self.prediction!r}, supported: flow() with 'flow', "
                "a vp process with the others"
            )
        check_length(self.steps * self.batch, "steps * batch")

    @property
    def process(self) -> NoiseSchedule:
        """The noise process itself."""
        if isinstance(self.noise, NoiseSchedule):
            return self.noise
        make: Any = getattr(schedules, self.noise or ("flow" if self.prediction == "flow" else "cosine"))
        process: NoiseSchedule = make()
        return process


def train_diffusion(
    net: nn.Module,
    samples: Samples,
    options: DiffusionTraining,
    run: Run,
    *,
    validation: Samples | None = None,
    call: Call | None = None,
    about: Mapping[str, Any] | None = None,
) -> Row:
    """Train ``net`` to predict from noisy samples; ends with the averaged weights in ``net`` and returns the last row of the log.

    ``net`` is any torch module, trained in place, on the device it is on. It is called as net(x, t, y) with x (B, C, H, W), t (B,) and
    y (B,) int64, or net(x, t) where the samples have no labels, and returns a tensor like x or, as diffusers' networks do, something
    with the field ``sample``; ``call`` adapts other networks: call=lambda net, x, t, y: net(x). "No label" is ``net.null_label`` where it
    has one, else the number of classes. ``validation`` are held-out samples. ``about`` are further JSON-able words to save with the
    weights.

    The process is x_t = alpha(t) x_0 + sigma(t) n with x_0 = images / 127.5 - 1. The loss is the mean squared error of the prediction:
    "epsilon" n (Ho et al. 2020), "v" alpha n - sigma x_0 (Salimans and Ho 2022), "x0" x_0, "flow" n - x_0 (Liu et al. 2023).

    The run's directory receives what docs/training.md lists, at the end the averaged weights as ema.safetensors, which
    `genfast.models.load` reads. A run that was killed at any moment continues from its last checkpoint when called again with the same
    arguments, and ends with the same bits as one that was not killed, on the same device with the same number of threads. A run that is
    finished returns at once. Every random number is a function of the run's seed and of the global number of the sample (docs/noise.md),
    so no generator is saved.

    Raises ValueError for bad arguments or if the directory holds a run with another configuration, and FloatingPointError if the loss
    or a gradient is not finite.
    """
    device, rng, noise = check_module("net", net), run.rng, options.process
    predict, null = Called(net, call), getattr(net, "null_label", len(getattr(samples, "classes", ())))
    _check(predict, samples, validation, about, run, device, null)
    average = averages.Average(net, options.ema)
    averaged = Called(average.net, call)
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay)
    decided: Row = {"network": description(net), "data": samples.digest, "device": device.type}
    decided["noise"] = [noise.name, noise.shift, digest(noise.alphas_cumprod)]
    words: Row = {"prediction": options.prediction, "noise": noise.name, "noise_steps": noise.steps, "shift": noise.shift}
    words |= {"size": samples.shape[-2:], **(about or {})}
    loss_options: dict[str, Any] = {"noise": noise, "prediction": options.prediction}
    net.train()

    with run.begin(
        options,
        decided,
        {"model": net, "optimizer": optimizer, "average": average},
        lambda path: save(average.net, path, **words),
        extend=options.lr_schedule == "constant",
    ):
        for step in run.steps(options.steps):
            # The batch: global sample numbers, and everything random about them.
            numbers = run.numbers(step, options.batch)
            seeds, data = run.seeds(numbers), samples.batch(numbers, run.seed)
            x0 = network_input(data.x, device)
            y = None
            if data.labels is not None:
                dropped = rng.uniform(seeds, (len(seeds), 1), stream=LABELS)[:, 0] < options.label_dropout
                y = data.labels.masked_fill(dropped, null).to(device)
            t = noise.training_time(rng.uniform(seeds, (len(seeds), 1), stream=TIMES)[:, 0].double().numpy())
            n = rng.normal(seeds, tuple(x0.shape), stream=NOISE, device=device)

            # One step of AdamW.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            optimizer.zero_grad()
            loss = diffusion_loss(predict, x0, t, n, y, min_snr=options.min_snr, autocast=options.autocast, **loss_options).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            ranks.average_(gradients_and_buffers(net))
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), options.clip_grad)
            run.log(loss=loss, grad_norm=norm, lr=learning_rate(options, step))
            optimizer.step()
            average.update(net, step + 1)

            # What is written.
            if validation is not None and run.due(run.validate_every):
                run.validated(validation_loss(averaged, validation, run, **loss_options))
            if run.due(run.sample_every):
                run.picture(_preview(averaged, options, samples, null))
        net.load_state_dict(average.state_dict())
        return run.finish()


@torch.no_grad()
def validation_loss(
    net: Callable[..., Tensor], samples: Samples, run: Run, *, noise: NoiseSchedule, prediction: Prediction, batch: int = 250
) -> float:
    """Mean squared error of the prediction on every held-out sample, in float32, with the same noise and evenly spaced times at every call.

    The first epoch of the samples is every one of them once, in an order that has nothing to do with what they show, so that the time may
    simply grow with the place in it.
    """
    device = next(net.parameters()).device if isinstance(net, nn.Module) else torch.device("cpu")
    times, total = noise.training_time((np.arange(len(samples)) + 0.5) / len(samples)), 0.0
    for start in ranks.share(range(0, len(samples), batch)):
        numbers = np.arange(start, min(start + batch, len(samples)))
        data, seeds = samples.batch(numbers, run.seed), torch.from_numpy(numbers + run.seed * RUN + VALIDATION)
        x0 = network_input(data.x, device)
        n = run.rng.normal(seeds, tuple(x0.shape), stream=NOISE, device=device)
        y = None if data.labels is None else data.labels.to(device)
        total += diffusion_loss(net, x0, times[numbers], n, y, noise=noise, prediction=prediction).double().sum().item()
    return ranks.means([total])[0] * ranks.count() / len(samples)


def _preview(net: nn.Module, options: DiffusionTraining, samples: Samples, null_label: int) -> bytes:
    """A PNG of what `genfast sample` draws from the same weights: a row a class, a column a seed."""
    denoiser = Denoiser(net, options.prediction, noise=options.process, time="flow" if options.process.kind == "flow" else "index")
    x = draw(denoiser, samples.shape, overview(len(samples.classes)), null_label if samples.classes else None)
    return encoded(grid(x, 8))


def _check(predict: nn.Module, samples: Any, validation: Any, about: Any, run: Run, device: torch.device, null_label: int) -> None:
    """Raises ValueError unless the objects that training is given fit each other."""
    check_words(about, SAVED_WORDS)
    for name, data in (("samples", samples), ("validation", samples if validation is None else validation)):
        if not isinstance(data, Samples):
            raise ValueError(f"{name}: got a {type(data).__name__}, supported: samples of genfast.data, such as ArraySamples(images)")
        if len(data.classes) > null_label:
            raise ValueError(f"{name}: got {len(data.classes)} classes, supported by this network: {null_label}")
        x, t = torch.zeros(1, *data.shape, device=device), torch.zeros(1, device=device)
        y = torch.full((1,), null_label, device=device) if data.classes else None
        supported = f"one that maps {name} of shape {tuple(data.shape)}, times and labels to that shape (call= adapts others)"
        probe("net", predict, partial(predict, x, t, y), tuple(x.shape), supported)
    run.check_pictures(samples.shape)
    if run.capture:
        raise ValueError("capture: got True, supported: False, because only adversarial training has phases to capture")
