"""Training of diffusion and flow models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from genfast import schedules
from genfast.checks import above, above_or_infinite, at_least, check, choice, decay, each, flag, optional, plain, share, shown, whole
from genfast.data.arrays import check_images, check_labels, label_tensor, picture_tensor
from genfast.files import write_atomically
from genfast.models.unet import UNet, save
from genfast.schedules import NoiseSchedule
from genfast.train import ema as averages
from genfast.train.checkpoint import check_fits
from genfast.train.lock import hold
from genfast.train.pictures import Prediction, encoded, sample_grid
from genfast.train.run import (
    LABELS,
    MOST,
    MOST_SEED,
    NOISE,
    TIMES,
    VALIDATION,
    DataOrder,
    Images,
    append,
    check_words,
    described,
    digest,
    epoch_order,
    load_checkpoint,
    plot_log,
    read_log,
    sample_seeds,
    save_checkpoint,
    write_start,
)

Labels = NDArray[np.integer[Any]]

# What each argument of `train_diffusion` may be, besides the objects it is given.
RANGES = {
    "steps": whole(1, MOST),
    "batch": whole(1, MOST),
    "seed": whole(0, MOST_SEED),
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
    "log_every": whole(1, MOST),
    "validate_every": whole(1, MOST),
    "checkpoint_every": whole(1, MOST),
    "sample_every": whole(0, MOST),
    "impl": choice("fused", "reference"),
    "progress": flag(),
}
# What training says of the weights that it saves.
SAVED_WORDS = ("prediction", "noise", "noise_steps", "shift", "size")


# fmt: off
def train_diffusion(
    net: UNet,                                        # called as net(x, t, y); trained in place, on the device it is on
    images: Images,                                   # (N, H, W) or (N, C, H, W) uint8
    labels: Labels | None = None,                     # (N,) integers, each in [0, net.config.num_classes)
    *,
    out: str | Path,                                  # directory of everything written; an interrupted run there is continued
    steps: int,                                       # optimizer steps
    batch: int = 64,                                  # images a step
    seed: int = 0,                                    # of the run: data order, times, noise and label dropout follow from it
    prediction: Prediction = "v",                     # what the network returns; "flow" needs noise=flow()
    noise: NoiseSchedule | None = None,               # the process; None: schedules.cosine(1000), or schedules.flow() for "flow"
    min_snr: float | None = None,                     # gamma of min-SNR weighting (Hang et al. 2023 use 5); None: plain mean squared error
    label_dropout: float = 0.1,                       # share of labels replaced by "no label", for guidance (Ho and Salimans 2022)
    lr: float = 1e-3,                                 # peak learning rate of AdamW
    lr_schedule: Literal["cosine", "constant"] = "cosine",  # after the warm-up: half a cosine down to 0, or flat
    warmup: int = 200,                                # steps of linear warm-up
    betas: tuple[float, float] = (0.9, 0.99),         # of AdamW
    weight_decay: float = 0.0,                        # of AdamW
    clip_grad: float = 1.0,                           # largest norm of the gradient
    ema: float = 0.05,                                # relative width of the power-function average of the weights (Karras et al. 2024)
    autocast: Literal["bfloat16"] | None = None,      # dtype of the network's matrix products; weights and state stay float32
    validation: tuple[Images, Labels | None] | None = None,  # held-out images and labels
    log_every: int = 50,                              # steps between rows of log.jsonl
    validate_every: int = 500,                        # steps between validation losses, of the averaged weights
    checkpoint_every: int = 500,                      # steps between checkpoints
    sample_every: int = 0,                            # steps between sample grids, of the averaged weights; 0: none
    impl: Literal["fused", "reference"] = "fused",    # of the noise; the bits are the same
    about: Mapping[str, Any] | None = None,           # further JSON-able words to save with the weights (class names, ...)
    progress: bool = True,                            # a progress bar on stderr
) -> dict[str, Any]:
    # fmt: on
    """Train ``net`` to predict from noisy images; ends with the averaged weights in ``net`` and returns the last row of the log.

    The process is x_t = alpha(t) x_0 + sigma(t) n with x_0 = images / 127.5 - 1. The loss is the mean squared error of the prediction:
    "epsilon" n (Ho et al. 2020), "v" alpha n - sigma x_0 (Salimans and Ho 2022), "x0" x_0, "flow" n - x_0 (Liu et al. 2023).

    ``out`` receives config.json, log.jsonl, loss.png (given validation images, where matplotlib is installed), checkpoint.safetensors
    and the one before it, samples-STEP.png, and at the end ema.safetensors, the averaged weights that `genfast.models.load` reads. A
    run that was killed at any moment continues from its last checkpoint when called again with the same arguments, and ends with the
    same bits as one that was not killed, on the same device with the same number of threads. A run that is finished returns at once.

    Every random number is a function of the seed and of the global number of the sample (docs/noise.md), so no generator is saved.

    Raises ValueError for bad arguments or if ``out`` holds a run with another configuration, and FloatingPointError if the loss
    or a gradient is not finite.
    """
    check(RANGES, locals())
    steps, batch, seed, warmup, lr, betas, ema, clip_grad = plain((steps, batch, seed, warmup, lr, betas, ema, clip_grad))
    noise = noise or (schedules.flow() if prediction == "flow" else schedules.cosine(1000))
    _check(net, images, labels, validation, noise, prediction)
    check({"steps * batch": whole(1, VALIDATION), "warmup": whole(0, steps)}, {"steps * batch": steps * batch, "warmup": warmup})
    check_words(about, SAVED_WORDS)
    device = next(net.parameters()).device
    # What decides the bits of the weights; how often something is written does not.
    config = described({
        "network": asdict(net.config), "data": digest(images, labels), "steps": steps, "batch": batch, "seed": seed,
        "prediction": prediction, "noise": [noise.name, noise.shift, digest(noise.alphas_cumprod)], "min_snr": min_snr,
        "label_dropout": label_dropout, "lr": lr, "lr_schedule": lr_schedule, "warmup": warmup, "betas": betas,
        "weight_decay": weight_decay, "clip_grad": clip_grad, "ema": ema, "autocast": autocast, "device": device.type,
    })  # fmt: skip

    net.train()
    parameters = dict(net.named_parameters())
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(float(betas[0]), float(betas[1])), weight_decay=float(weight_decay))
    rng = import_module("genfast.reference.noise" if impl == "reference" else "genfast.ops.noise")
    x_all = images[:, None] if images.ndim == 3 else images
    order, gamma = DataOrder(rng, seed, len(images)), averages.power_gamma(ema)

    with hold(out) as out:
        done = 0
        found = load_checkpoint(out, config)
        if found is not None:
            tensors, done = found
            _restore(tensors, parameters, average, optimizer)
        rows = read_log(out / "log.jsonl", done)
        write_start(out, config, rows)

        started, started_at = time.perf_counter(), done
        losses: list[float] = []
        bar = tqdm(range(done, steps), initial=done, total=steps, unit="step", disable=not progress, mininterval=1.0, dynamic_ncols=True)
        for step in bar:
            # The batch: global sample numbers, and everything random about them.
            numbers = np.arange(step * batch, (step + 1) * batch)
            chosen, seeds = order(numbers), sample_seeds(seed, numbers)
            x0 = picture_tensor(x_all[chosen], device)
            y = None
            if labels is not None:
                dropped = rng.uniform(seeds, (batch, 1), stream=LABELS)[:, 0] < label_dropout
                y = label_tensor(labels[chosen]).masked_fill(dropped, net.null_label).to(device)
            t = noise.training_time(rng.uniform(seeds, (batch, 1), stream=TIMES)[:, 0].double().numpy())
            n = rng.normal(seeds, tuple(x0.shape), stream=NOISE, device=device)

            # One step of AdamW.
            for group in optimizer.param_groups:
                group["lr"] = lr * _lr_factor(step, steps, warmup, lr_schedule)
            optimizer.zero_grad()
            loss = diffusion_loss(net, x0, t, n, y, noise=noise, prediction=prediction, min_snr=min_snr, autocast=autocast).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip_grad)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]) or not math.isfinite(norm.item()):
                raise FloatingPointError(
                    f"step {step}: the loss is {losses[-1]} and the norm of the gradient {norm.item()}, both must be finite; "
                    f"{out} keeps the last good state; try a smaller lr (now {lr}) or autocast=None in another directory"
                )
            optimizer.step()
            averages.update(average.values(), parameters.values(), step + 1, gamma)

            # What is written.
            done = step + 1
            last = done == steps
            if done % log_every == 0 or last:
                mean, rate = sum(losses) / len(losses), (done - started_at) * batch / (time.perf_counter() - started)
                row = {"step": done, "loss": mean, "grad_norm": norm.item(), "lr": optimizer.param_groups[0]["lr"]}
                append(out / "log.jsonl", rows, row | {"images_per_second": round(rate, 1)})
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                losses.clear()
            if validation is not None and (done % validate_every == 0 or last):
                with _weights(net, average):
                    value = validation_loss(net, *validation, rng=rng, seed=seed, noise=noise, prediction=prediction)
                append(out / "log.jsonl", rows, {"step": done, "validation_loss": value})
                plot_log(rows, out / "loss.png", {"loss": "-", "validation_loss": "o-"}, "mean squared error", "log")
            if sample_every and (done % sample_every == 0 or last):
                with _weights(net, average):
                    write_atomically(out / f"samples-{done:06d}.png", encoded(sample_grid(net, noise, prediction, images.shape[-2:])))
            if done % checkpoint_every == 0 or last:
                save_checkpoint(out, done, config, _tensors(parameters, average, optimizer))

        words = {"prediction": prediction, "noise": noise.name, "noise_steps": noise.steps, "shift": noise.shift, "size": images.shape[-2:]}
        save(net, out / "ema.safetensors", average, **words, **(about or {}))
        net.load_state_dict(average)
        return rows[-1] if rows else {}


def diffusion_loss(
    net: Callable[..., Tensor],
    x0: Tensor,
    t: NDArray[np.float64],
    n: Tensor,
    y: Tensor | None,
    *,
    noise: NoiseSchedule,
    prediction: Prediction,
    min_snr: float | None = None,
    autocast: str | None = None,
) -> Tensor:
    """The loss of each sample, (B,) float32, for clean samples ``x0`` (B, C, H, W) at times ``t`` (B,) with noise ``n`` like x0.

    Mean squared error of the prediction. With ``min_snr`` = gamma it is weighted such that the squared error of x_0 has the weight
    min(SNR, gamma), SNR = (alpha / sigma)^2 (Hang et al. 2023, section 3.4): an error e of the prediction is an error of x_0 of size
    e * sigma / alpha (epsilon), e * sigma (v, flow) or e (x0).
    """
    alpha, sigma = noise.alpha_sigma(t)
    a, s = (torch.from_numpy(c).to(x0)[:, None, None, None] for c in (alpha, sigma))
    target = {"epsilon": lambda: n, "v": lambda: a * n - s * x0, "x0": lambda: x0, "flow": lambda: n - x0}[prediction]()
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=autocast == "bfloat16"):
        output = net(a * x0 + s * n, torch.from_numpy(t).to(x0), y)
    error = (output.float() - target).square().flatten(1).mean(1)
    if min_snr is None:
        return error
    in_x0 = {"epsilon": (sigma / alpha) ** 2, "v": sigma**2, "x0": np.ones_like(sigma), "flow": sigma**2}[prediction]
    with np.errstate(divide="ignore"):
        weight = np.minimum((alpha / sigma) ** 2, min_snr) * in_x0
    return error * torch.from_numpy(weight).to(error)


@torch.no_grad()
def validation_loss(
    net: UNet,
    images: Images,
    labels: Labels | None,
    *,
    rng: Any,
    seed: int,
    noise: NoiseSchedule,
    prediction: Prediction,
    batch: int = 250,
) -> float:
    """Mean squared error of the prediction on held-out images, in float32, with the same noise and evenly spaced times at every call."""
    device = next(net.parameters()).device
    x_all = images[:, None] if images.ndim == 3 else images
    # A fixed permutation of evenly spaced times: neighbours in the data may be alike.
    times = noise.training_time((epoch_order(rng, seed, 0, len(images)) + 0.5) / len(images))
    total = 0.0
    for start in range(0, len(images), batch):
        part = slice(start, min(start + batch, len(images)))
        seeds = torch.arange(part.start, part.stop) + seed * 2**40 + VALIDATION
        x0 = picture_tensor(x_all[part], device)
        n = rng.normal(seeds, tuple(x0.shape), stream=NOISE, device=device)
        y = None if labels is None else label_tensor(labels[part]).to(device)
        total += diffusion_loss(net, x0, times[part], n, y, noise=noise, prediction=prediction).double().sum().item()
    return total / len(images)


def _check(net: Any, images: Any, labels: Any, validation: Any, noise: Any, prediction: str) -> None:
    """Raises ValueError unless the objects that training is given fit each other."""
    if not isinstance(net, UNet):
        raise ValueError(f"net: got a {type(net).__name__}, supported: a genfast.models.UNet")
    if not isinstance(noise, NoiseSchedule):
        raise ValueError(f"noise: got {shown(noise)}, supported: a process of genfast.schedules")
    if validation is not None and not (isinstance(validation, tuple | list) and len(validation) == 2):
        raise ValueError(f"validation: got a {type(validation).__name__}, supported: None, or a pair of images and labels (or None)")
    for name, x, y in (("images", images, labels), ("validation", *(validation or (images, labels)))):
        check_images(name, x)
        channels, multiple = net.config.image_channels, 2 ** (len(net.config.channels) - 1)
        if (1 if x.ndim == 3 else x.shape[1]) != channels or x.shape[-2] % multiple or x.shape[-1] % multiple:
            raise ValueError(f"{name}: got shape {x.shape}, supported by this network: {channels} channels, sides divisible by {multiple}")
        check_labels(name, y, len(x), net.config.num_classes)
    if noise.kind == "ve" or (noise.kind == "flow") != (prediction == "flow"):
        raise ValueError(
            f"noise: got {noise.name!r} with prediction={prediction!r}, supported: flow() with 'flow', a vp process with the others"
        )


def _lr_factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@contextmanager
def _weights(net: UNet, weights: dict[str, Tensor]) -> Iterator[None]:
    """Other weights in the network, and eval mode, for a while."""
    own = {name: parameter.data for name, parameter in net.named_parameters()}
    try:
        for name, parameter in net.named_parameters():
            parameter.data = weights[name]
        net.eval()
        yield
    finally:
        for name, parameter in net.named_parameters():
            parameter.data = own[name]
        net.train()


def _tensors(parameters: dict[str, torch.nn.Parameter], average: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model/{name}": p for name, p in parameters.items()} | {f"ema/{name}": a for name, a in average.items()}
    for name, p in parameters.items():
        tensors |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[p].items()}
    return tensors


def _restore(
    tensors: dict[str, Tensor], parameters: dict[str, torch.nn.Parameter], average: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, p in parameters.items():
        shapes |= {f"model/{name}": p.shape, f"ema/{name}": p.shape}
        if p.requires_grad:  # AdamW keeps nothing of the others
            shapes |= {f"optimizer/step/{name}": (), f"optimizer/exp_avg/{name}": p.shape, f"optimizer/exp_avg_sq/{name}": p.shape}
    check_fits(tensors, shapes)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"model/{name}"])
            average[name].copy_(tensors[f"ema/{name}"])
            if p.requires_grad:
                step, first, second = (tensors[f"optimizer/{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq"))
                optimizer.state[p] = {"step": step, "exp_avg": first.to(p), "exp_avg_sq": second.to(p)}
