from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from genfast import models, schedules
from genfast.data import ArraySamples
from genfast.reference import noise as rng
from genfast.train import diffusion
from genfast.train.diffusion import diffusion_loss

PROCESSES = {"epsilon": schedules.cosine(1000), "v": schedules.linear(1000), "x0": schedules.cosine(1000), "flow": schedules.flow()}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double(), torch.randn(3, 1, 4, 4).double()


@pytest.mark.parametrize("prediction", PROCESSES)
def test_a_perfect_network_has_no_loss_and_sees_the_right_input(prediction: str) -> None:
    x0, n, _ = batch()
    noise = PROCESSES[prediction]
    t = noise.training_time(np.array([0.1, 0.5, 0.9]))
    alpha, sigma = (torch.from_numpy(c)[:, None, None, None] for c in noise.alpha_sigma(t))

    def net(x: torch.Tensor, time: torch.Tensor, y: None) -> torch.Tensor:
        torch.testing.assert_close(x, alpha * x0 + sigma * n, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(time, torch.from_numpy(t))
        # The exact answer from what the network sees and the clean sample, by solving x = alpha x0 + sigma n.
        found = (x - alpha * x0) / sigma
        return {"epsilon": found, "v": (alpha * x - x0) / sigma, "x0": x0, "flow": (x - x0) / sigma}[prediction]

    loss = diffusion_loss(net, x0, t, n, None, noise=noise, prediction=prediction)  # type: ignore[arg-type]
    assert loss.shape == (3,) and loss.max() < 1e-10


@pytest.mark.parametrize("prediction", PROCESSES)
def test_min_snr_weights_the_error_of_x0(prediction: str) -> None:
    """Whatever is predicted, the same estimate of x_0 costs min(SNR, gamma) times its squared error."""
    x0, n, estimate = batch()
    noise = PROCESSES[prediction]
    t = noise.training_time(np.array([0.05, 0.5, 0.8]))
    alpha, sigma = (torch.from_numpy(c)[:, None, None, None] for c in noise.alpha_sigma(t))

    def net(x: torch.Tensor, time: torch.Tensor, y: None) -> torch.Tensor:
        implied = (x - alpha * estimate) / sigma
        return {"epsilon": implied, "v": alpha * implied - sigma * estimate, "x0": estimate, "flow": implied - estimate}[prediction]

    loss = diffusion_loss(net, x0, t, n, None, noise=noise, prediction=prediction, min_snr=5.0)  # type: ignore[arg-type]
    snr = ((alpha / sigma) ** 2).flatten()
    assert (snr > 5).any() and (snr < 5).any()
    torch.testing.assert_close(loss.double(), snr.clamp(max=5.0) * (estimate - x0).square().mean((1, 2, 3)), rtol=1e-5, atol=0)


def test_training_learns_and_writes(tmp_path: Path) -> None:
    net, last = tiny_run.run(tmp_path, steps=150, lr=3e-3, about={"classes": ["a", "b", "c"]})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    values = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert len(losses) == 30 and len(values) == 8 and rows[-1] == last
    assert np.mean(losses[-5:]) < 0.5 * losses[0] and values[-1] < 0.7 * values[0]
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "log.jsonl", "loss.png", "checkpoint.safetensors", "checkpoint.safetensors.previous", "ema.safetensors"
    }  # fmt: skip
    saved, about = models.load(tmp_path / "ema.safetensors")
    assert about == {"prediction": "v", "noise": "cosine", "noise_steps": 1000, "shift": 1.0, "size": [8, 8], "classes": ["a", "b", "c"]}
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 800.0]), torch.tensor([0, 3])
    assert torch.equal(saved(x, t, y), net.eval()(x, t, y))


def test_every_draw_belongs_to_its_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four steps of 4 and two steps of 8 see the same samples, times, noise and labels, and each comes from its own seed."""
    seen: list[list[tuple[torch.Tensor, ...]]] = []
    real = diffusion.diffusion_loss

    def spy(net: object, x0: torch.Tensor, t: np.ndarray, n: torch.Tensor, y: torch.Tensor, **options: object) -> torch.Tensor:
        seen[-1] += zip(x0, torch.from_numpy(t), n, y, strict=True)
        return real(net, x0, t, n, y, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(diffusion, "diffusion_loss", spy)
    for size in (4, 8):
        seen.append([])
        tiny_run.run(tmp_path / str(size), steps=64 // size, batch=size, seed=3, validation=None, label_dropout=0.3, validate_every=1)
    four, eight = seen
    assert len(four) == len(eight) == 64
    assert all(torch.equal(a, b) for left, right in zip(four, eight, strict=True) for a, b in zip(left, right, strict=True))
    _, t, n, _ = four[37]
    seed = torch.tensor([3 * 2**40 + 37])
    assert torch.equal(n, rng.normal(seed, (1, 1, 8, 8), stream=2)[0])
    assert t == torch.floor(rng.uniform(seed, (1, 1), stream=1).double() * 1000)[0, 0]
    # The first 50 samples are an epoch: every image once, in another order than the next 14.
    images, labels = tiny_run.pictures()
    where = [int(np.argmin([np.abs(x[0][0].numpy() - (image / 127.5 - 1)).max() for image in images])) for x in four]
    assert sorted(where[:50]) == [*range(50)] and where[:50] != [*range(50)] and where[50:] != where[:14]
    dropped = [int(sample[3]) == 3 for sample in four]
    assert 8 <= sum(dropped) <= 32  # 0.3 of 64 is 19
    assert all(drop or int(sample[3]) == labels[i] for sample, i, drop in zip(four, where, dropped, strict=True))
    assert dropped[37] == bool(rng.uniform(seed, (1, 1), stream=4) < torch.tensor(0.3))


def test_an_infinite_loss_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = diffusion.diffusion_loss
    monkeypatch.setattr(diffusion, "diffusion_loss", lambda *args, **options: real(*args, **options) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0: loss \(nan\) is not finite; .* keeps the last good state"):
        tiny_run.run(tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_flow_and_bfloat16_train(tmp_path: Path) -> None:
    for name, options in {
        "flow": {"prediction": "flow"},
        "bf16": {"autocast": "bfloat16", "min_snr": 5.0, "lr_schedule": "constant"},
    }.items():
        _, last = tiny_run.run(tmp_path / name, steps=80, **options)
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        assert last["validation_loss"] < 0.8 * next(row["validation_loss"] for row in rows if "validation_loss" in row)
    assert models.load(tmp_path / "flow" / "ema.safetensors")[1]["noise"] == "flow"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps: got 0, supported: an integer from 1"),
        ({"seed": 2**23}, r"seed: got 8388608, supported: an integer from 0 to 8388607"),
        ({"batch": 2**20, "steps": 2**20}, r"steps \* batch: got"),
        ({"label_dropout": 1.5}, r"label_dropout: got 1.5, supported: a share from 0 to 1"),
        ({"prediction": "score"}, r"prediction: got 'score', supported: 'epsilon', 'v', 'x0', 'flow'"),
        ({"prediction": "flow", "noise": schedules.cosine(10)}, r"noise: got 'cosine' with prediction='flow'"),
        ({"noise": schedules.edm()}, r"noise: got 'edm'"),
        ({"ema": 0.9}, r"ema: got 0.9"),
        (
            {"validation": ArraySamples(np.zeros((2, 3, 8, 8), np.uint8))},
            r"net: .*x: got shape \(1, 3, 8, 8\), .*supported: one that maps validation of shape \(3, 8, 8\)",
        ),
        ({"validation": ArraySamples(np.zeros((2, 8, 9), np.uint8))}, r"H and W divisible by 2"),
    ],
)
def test_bad_arguments_are_sentences_and_nothing_is_written(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_run.run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
