"""Every argument of training has its range, and is checked before anything is written."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gan
import tiny_run
import torch

from genfast import models, schedules
from genfast.checks import Rule, check, shown
from genfast.data import ArraySamples
from genfast.models import DCGANConfig, UNetConfig, dcgan, pyramid, r3gan, stylegan2, unet
from genfast.models.r3gan import R3GANConfig
from genfast.models.stylegan2 import StyleGAN2Config
from genfast.train import (
    AdversarialStep,
    DiffusionTraining,
    GANTraining,
    Objective,
    Run,
    adversarial,
    diffusion,
    gan,
    train_diffusion,
    train_gan,
)
from genfast.train import run as bookkeeping

NAN, INF = math.nan, math.inf
COUNTS = [0, -1, 1.0, 1.5, NAN, "1", None, True, [1], np.float64(2)]  # of what is wanted at least once
RATES = [0, -1e-3, NAN, INF, -INF, "1e-3", None, True, [1e-3], 1j]
NAMES = ["x", "", None, 0, True, ["v"]]
FLAGS = [0, 1, None, "yes", 1.0]
PAIRS = [0.9, (0.9,), (0.9, 0.9, 0.9), (0.9, 1), (-0.1, 0.9), (NAN, 0.9), ("0", "0"), None, (True, 0.5)]
SHARES = [-0.1, 1.1, NAN, INF, "0.1", None, True]

DIFFUSION: dict[str, list[Any]] = {
    "steps": COUNTS, "batch": COUNTS, "prediction": NAMES, "min_snr": [*RATES[:6], True], "noise": [*NAMES[:2], 0, True, "edm", "cosines"],
    "label_dropout": SHARES, "lr": RATES, "lr_schedule": [*NAMES, "linear", "Cosine"], "warmup": [-1, 61, 1.5, NAN, None, True],
    "betas": PAIRS, "weight_decay": [-1, NAN, INF, "0", None, True], "clip_grad": [0, -1, NAN, -INF, "1", None, True],
    "ema": [0, -0.1, 0.28, 1, NAN, INF, "0.1", None, True], "autocast": ["float16", "bf16", torch.bfloat16, "", True, 0],
}  # fmt: skip
GAN: dict[str, list[Any]] = {
    "steps": COUNTS, "batch": COUNTS, "objective": ["wgan", None, Objective], "critic_steps": COUNTS,
    "lr": [*RATES, (1e-3,), (1e-3, 0), (NAN, 1e-3), (1e-3, 1e-3, 1e-3)], "betas": PAIRS, "ema": DIFFUSION["ema"],
    "latent_size": [0, -1, 1.5, "4", True],
}  # fmt: skip
RUN: dict[str, list[Any]] = {
    "seed": [-1, 2**23, 1.0, NAN, "0", None, True], "log_every": COUNTS, "validate_every": COUNTS, "checkpoint_every": COUNTS,
    "sample_every": [-1, 1.5, NAN, "1", None, True], "keep_last": [-1, 1.5, None, True], "keep_best": FLAGS, "patience": [-1, 0.5, None],
    "max_minutes": [0, -1, NAN, "1", None, True],
    "capture": FLAGS, "track": ["wandb", ("mlflow",), None, (1,)], "impl": [*NAMES, "cuda"], "progress": FLAGS,
}  # fmt: skip


def pairs(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={shown(value)}") for name, values in table.items() for value in values]


def test_every_argument_of_the_adversarial_step_has_a_rule() -> None:
    parameters = inspect.signature(AdversarialStep.__init__).parameters
    assert adversarial.STEP_RANGES.keys() == parameters.keys() - {"self", "generator", "discriminator"}
    for name in adversarial.STEP_RANGES:  # which its default follows
        if parameters[name].default is not inspect.Parameter.empty:
            check(adversarial.STEP_RANGES, {name: parameters[name].default})


@pytest.mark.parametrize(
    ("kind", "rules", "table", "objects"),
    [
        (DiffusionTraining, diffusion.RANGES, DIFFUSION, {"noise"}),
        (GANTraining, gan.RANGES, GAN, set()),
        (Run, bookkeeping.RANGES, RUN, {"out"}),
    ],
)
def test_every_option_of_a_trainer_has_a_rule_a_comment_and_a_bad_value(
    kind: Any, rules: dict[str, Rule], table: dict[str, list[Any]], objects: set[str]
) -> None:
    names = {field.name for field in fields(kind)}
    assert rules.keys() == names - objects and table.keys() == names - {"out"}
    for line in inspect.getsource(kind).splitlines():
        if (name := line.strip().partition(":")[0]) in names and line.startswith("    " + name):
            assert "  # " in line, line


@pytest.mark.parametrize(
    ("config", "rules"),
    [
        (UNetConfig, unet.CONFIG_RANGES),
        (DCGANConfig, dcgan.RANGES),
        (pyramid.Pyramid, pyramid.RANGES),
        (StyleGAN2Config, stylegan2.RANGES),
        (R3GANConfig, r3gan.RANGES),
        (Objective, adversarial.OBJECTIVE_RANGES),
    ],
)
def test_every_field_of_a_configuration_has_a_rule(config: Any, rules: dict[str, Rule]) -> None:
    assert rules.keys() == {field.name for field in fields(config)}


@pytest.mark.parametrize(("name", "value"), pairs(DIFFUSION | RUN))
def test_diffusion_refuses(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*, supported: "):
        tiny_run.run(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), pairs(GAN | RUN))
def test_gan_refuses(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: got .*, supported: "):
        tiny_gan.run(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (UNetConfig, {"channels": (0, 0, 0)}),
        (UNetConfig, {"channels": (32.0, 64, 96)}),
        (UNetConfig, {"channels": (3, 64, 96)}),
        (UNetConfig, {"channels": 32}),
        (UNetConfig, {"blocks": (1, -1, 1)}),
        (UNetConfig, {"attention": (0, 0, 1)}),
        (UNetConfig, {"head_dim": 0}),
        (UNetConfig, {"head_dim": 19}),
        (UNetConfig, {"num_classes": -1}),
        (UNetConfig, {"num_classes": 10.0}),
        (UNetConfig, {"image_channels": 0}),
        (UNetConfig, {"time_scale": NAN}),
        (UNetConfig, {"time_scale": -1.0}),
        (DCGANConfig, {"channels": 0}),
        (DCGANConfig, {"latent": -100}),
        (DCGANConfig, {"size": 28.0}),
        (DCGANConfig, {"size": 4096}),
        (DCGANConfig, {"discriminator_norm": "no"}),
        (StyleGAN2Config, {"body_sides": 0}),  # a slice of the last 0 is all
        (StyleGAN2Config, {"body_sides": -1}),
        (StyleGAN2Config, {"channel_base": 32768.0}),
        (StyleGAN2Config, {"mixing": NAN}),
        (StyleGAN2Config, {"stddev_group": 2.5}),
        (R3GANConfig, {"expansion": 1.5}),
        (Objective, {"center": NAN}),
        (Objective, {"path_decay": 1.5}),
        (Objective, {"d_every": 2.5}),
        (Objective, {"r1": "1"}),
        (Objective, {"loss": None}),
    ],
)
def test_configurations_refuse(config: Any, changes: dict[str, Any]) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=rf"{name}: got .*, supported: "):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (0, 1, 8, 8)}, "shape: got"),
        ({"latent": 1.5}, "latent: got 1.5"),
        ({"objective": "wgan"}, "objective: got 'wgan', supported: an Objective of genfast"),
        ({"lr": (1e-3, -1e-3)}, "lr: got"),
        ({"eps": -1e-8}, "eps: got"),
        ({"betas": (0.5, 1.0)}, "betas: got"),
        ({"capture": 1}, "capture: got 1"),
        ({"compile": "yes"}, "compile: got 'yes'"),
        ({"generator": torch.nn.Flatten()}, "generator: got 'Flatten', supported: a torch module with parameters"),
    ],
)
def test_the_adversarial_step_refuses(changes: dict[str, Any], message: str) -> None:
    arguments = {"generator": torch.nn.Linear(2, 2), "discriminator": torch.nn.Linear(2, 1), "shape": (4, 2), "latent": 2}
    AdversarialStep(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        AdversarialStep(**{**arguments, **changes})


def test_the_adversarial_step_refuses_foreign_phases_inputs_and_states() -> None:
    generator, discriminator = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    step = AdversarialStep(generator, discriminator, (4, 2), 2)
    for phases, name in ((["step"], "step"), (["path_length"], "path_length"), ("penalty", "penalty"), ([3], "3")):
        with pytest.raises(
            ValueError, match=f"phases: got '?{name}'?, supported by this objective: 'discriminator', 'generator', 'average'"
        ):
            step.run(phases)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"z_d: got torch.int64, supported: torch.float32"):
        step.load(z_d=torch.zeros(4, 2, dtype=torch.int64))
    step.run(["discriminator", "generator"])
    state = {name: t.clone() for name, t in step.state_dict().items()}
    for damage in ("generator/weight", "average/bias", "adam/discriminator/weight/exp_avg"):
        for wrong in ({k: t for k, t in state.items() if k != damage}, state | {damage: torch.zeros(7)}):
            with pytest.raises(ValueError, match=f"checkpoint: got .* for {damage}, supported by this run: shape"):
                step.load_state_dict({name: t + 1 if t.is_floating_point() else t for name, t in wrong.items()})
            assert all(torch.equal(t, state[name]) for name, t in step.state_dict().items())
    step.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"about": {"prediction": "v"}}, r"about: got 'prediction', which training writes itself"),
        ({"about": {"net": torch.zeros(2)}}, r"about: got a value that JSON cannot hold"),
        ({"about": {1: "a"}}, r"about: got .*, supported: a dictionary by strings"),
        ({"noise": "cosines"}, r"noise: got 'cosines', supported: 'cosine', .* or a process of genfast.schedules"),
        ({"noise": schedules.cosine}, r"noise: got <function"),
        ({"validation": np.zeros((2, 8, 8), np.uint8)}, r"validation: got a ndarray, supported: samples of genfast.data"),
        ({"validation": (np.zeros((2, 8, 8), np.uint8), None)}, r"validation: got a tuple, supported: samples of genfast.data"),
        ({"validation": ArraySamples(np.zeros((2, 8, 8), np.uint8), np.array([0, 3]))}, r"validation: got 4 classes, supported .*: 3"),
        ({"steps": 2**20, "batch": 2**20}, r"steps \* batch: got 1099511627776"),
        ({"out": ""}, r"out: got '', supported: the path of a directory"),
    ],
)
def test_diffusion_refuses_objects(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run.run(changes.pop("out", tmp_path / "out"), **changes)
    assert not (tmp_path / "out").exists()


def test_networks_of_another_kind_are_refused(tmp_path: Path) -> None:
    samples, run = tiny_run.samples(), Run(tmp_path / "out")
    for net, message in (
        (torch.nn.Flatten(), "got a Flatten, supported: a torch module with parameters"),
        (torch.nn.Conv2d(1, 1, 3), "it does not take what it is given .*, supported: one that maps samples of shape .*call= adapts others"),
        (models.UNet(replace(tiny_run.CONFIG, image_channels=3)), r"x: got shape \(1, 1, 8, 8\)"),
    ):
        with pytest.raises(ValueError, match=f"net: .*{message}"):
            train_diffusion(net, samples, DiffusionTraining(), run)
    with pytest.raises(ValueError, match=r"net: it returns shape \(1, 1, 6, 6\), supported: one that maps"):
        train_diffusion(torch.nn.Conv2d(1, 1, 3), samples, DiffusionTraining(), run, call=lambda net, x, t, y: net(x))
    free = models.UNet(UNetConfig(channels=(8,), blocks=(1,), attention=(False,), num_classes=0))
    with pytest.raises(ValueError, match=r"samples: got 3 classes, supported by this network: 0"):
        train_diffusion(free, samples, DiffusionTraining(), run)
    generator, discriminator = models.Generator(tiny_gan.CONFIG), models.Discriminator(tiny_gan.CONFIG)
    for a, b, message in (
        (generator, generator, r"discriminator: it does not take what it is given \(.*z: got shape"),
        (torch.nn.Linear(4, 4), discriminator, "latent_size: got None, supported: the length of the generator's latents"),
        (torch.nn.Identity(), discriminator, "generator: got a Identity, supported: a torch module with parameters"),
        (models.Generator(replace(tiny_gan.CONFIG, size=16)), discriminator, r"generator: it returns shape \(1, 1, 16, 16\), supported: a"),
    ):
        with pytest.raises(ValueError, match=message):
            train_gan(a, b, samples, GANTraining(), run)
    style = [getattr(stylegan2, name)(tiny_gan.STYLE) for name in ("Generator", "Discriminator")]
    with pytest.raises(ValueError, match=r"batch: got 6, supported by this discriminator: 1 to 4, or a multiple of 4"):
        train_gan(*style, samples, GANTraining(batch=6), run)
    for images in (tiny_run.pictures()[0], None):
        with pytest.raises(ValueError, match=r"samples: got a \w+, supported: samples of genfast.data"):
            train_gan(generator, discriminator, images, GANTraining(), run)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 8, 8, dtype=torch.uint8), None, r"images: got a Tensor, supported: a numpy array, uint8"),
        (np.zeros((2, 8, 0), np.uint8), None, r"images: got uint8 of shape \(2, 8, 0\)"),
        (np.zeros((2, 8, 8), np.float32), None, r"images: got float32"),
        (np.zeros((2, 8, 8), np.uint8), np.array([0.0, 1.5]), r"labels: got float64"),
        (np.zeros((2, 8, 8), np.uint8), np.array([True, False]), r"labels: got bool"),
        (np.zeros((2, 8, 8), np.uint8), [0, 1], r"labels: got a list"),
        (np.zeros((2, 8, 8), np.uint8), np.array([0]), r"labels: got shape \(1,\)"),
        (np.zeros((2, 8, 8), np.uint8), np.array([0, -1]), r"labels: got shape \(2,\), from -1 to 0"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArraySamples(images, labels)


def test_numbers_of_numpy_and_lists_are_as_good(tmp_path: Path) -> None:
    """The same bits, and the same run: either continues the other."""
    plain: dict[str, Any] = {
        "steps": 4,
        "batch": 60,
        "lr": float(np.float32(0.3)),
        "betas": (0.5, 0.75),
        "clip_grad": INF,
        "warmup": 4,
        "log_every": 2,
    }
    others: dict[str, Any] = {
        "steps": np.int8(4), "batch": np.int8(60), "lr": np.float32(0.3), "betas": [0.5, np.float32(0.75)], "clip_grad": np.inf,
        "warmup": np.uint8(4), "log_every": np.int32(2),
    }  # fmt: skip
    tiny_run.run(tmp_path / "a", **plain)
    tiny_run.run(tmp_path / "b", **others)
    tiny_run.assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()
    tiny_run.run(tmp_path / "a", **others)
    json.loads((tmp_path / "b" / "log.jsonl").read_text().splitlines()[0])


def turned(array: np.ndarray) -> dict[str, np.ndarray]:
    """The same values in other arrangements of memory."""
    locked = array.copy()
    locked.flags.writeable = False
    apart = np.zeros((2 * len(array), *array.shape[1:]), array.dtype)
    apart[::2] = array
    return {
        "flipped": np.flip(array).copy()[tuple([slice(None, None, -1)] * array.ndim)],
        "read-only": locked,
        "column-major": np.asfortranarray(array),
        "every second": apart[::2],
        "of a file": np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    }


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
@pytest.mark.parametrize("kind", ["flipped", "read-only", "column-major", "every second", "of a file"])
def test_arrays_train_alike_however_they_lie_in_memory(tmp_path: Path, kind: str) -> None:
    images, labels = tiny_run.pictures()
    dtypes = {"flipped": ">i4", "read-only": "u8", "column-major": "i1"}  # labels of any integers, too
    held = labels.astype(dtypes.get(kind, "i8"))
    torch.set_num_threads(1)
    for out, x, y, v in (("a", images, labels, images[:12]), ("b", turned(images)[kind], turned(labels)[kind], turned(images[:12])[kind])):
        torch.manual_seed(0)
        net = models.UNet(tiny_run.CONFIG)
        given = labels[:12] if out == "a" else held[:12]
        options, validation = DiffusionTraining(steps=5, batch=8, warmup=2), ArraySamples(v, given)
        run = Run(tmp_path / out, validate_every=2, progress=False)
        train_diffusion(net, ArraySamples(x, y), options, run, validation=validation)
        generator, discriminator = models.Generator(tiny_gan.CONFIG), models.Discriminator(tiny_gan.CONFIG)
        train_gan(generator, discriminator, ArraySamples(x), GANTraining(3, 8), Run(tmp_path / f"gan-{out}", progress=False))
    tiny_run.assert_same_bits(tmp_path / "a", tmp_path / "b")
    tiny_run.assert_same_bits(tmp_path / "gan-a", tmp_path / "gan-b")
    rows = [[json.loads(line).get("validation_loss") for line in (tmp_path / o / "log.jsonl").read_text().splitlines()] for o in "ab"]
    assert rows[0] == rows[1] and len([row for row in rows[0] if row is not None]) == 3
