"""What a run does besides its arithmetic: how it ends, continues, is extended, and what it keeps."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gan
import tiny_run
import tiny_vae
import tiny_vaegan
import torch

from genfast import models
from genfast.train import Run, diffusion
from genfast.train.checkpoint import flatten, read_checkpoint, restore, write_checkpoint
from genfast.train.signals import Stopped

TRAINERS: dict[str, Callable[..., Any]] = {"diffusion": tiny_run.run, "gan": tiny_gan.run, "vae": tiny_vae.run, "vaegan": tiny_vaegan.run}
# Options with which no step depends on the number of steps.
FLAT = {"lr_schedule": "constant", "warmup": 2}
CONSTANT: dict[str, dict[str, Any]] = {"diffusion": FLAT, "gan": {}, "vae": FLAT, "vaegan": {}}


def rows(out: Path, name: str = "step") -> list[Any]:
    return [row[name] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if name in row]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_finished_run_can_be_extended_where_no_step_depends_on_their_number(tmp_path: Path, trainer: str) -> None:
    train, options = TRAINERS[trainer], CONSTANT[trainer]
    train(tmp_path / "once", steps=12, **options)
    train(tmp_path / "twice", steps=7, **options)
    train(tmp_path / "twice", steps=12, **options)
    tiny_run.assert_same_bits(tmp_path / "once", tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "config.json").read_text())["steps"] == 12
    with pytest.raises(ValueError, match=r"steps: got 6, but the run in .*twice has done 12, supported: as many or more"):
        train(tmp_path / "twice", steps=6, **options)


def test_a_cosine_cannot_be_extended_and_says_why(tmp_path: Path) -> None:
    tiny_run.run(tmp_path, steps=6)
    with pytest.raises(ValueError, match=r"steps: got 8, but the run in .* has 6, and its steps depend on that number"):
        tiny_run.run(tmp_path, steps=8, warmup=5)


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, number: signal.Signals, status: int
) -> None:
    train = TRAINERS[trainer]
    train(tmp_path / "straight", steps=9)
    method = "due" if trainer == "gan" else "log"  # which every step calls
    real, calls = getattr(Run, method), 0

    def interrupting(self: Run, *args: Any, **values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            os.kill(os.getpid(), number)
        return real(self, *args, **values)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Run, method, interrupting)
        with pytest.raises(Stopped, match=re.escape(f"interrupted; the same command continues the run in {tmp_path / 'run'}")) as caught:
            train(tmp_path / "run", steps=9, checkpoint_every=100)
    assert caught.value.status == status and signal.getsignal(number) == before
    _, state = read_checkpoint(tmp_path / "run" / "checkpoint.safetensors") or ({}, {})
    assert 0 < state["step"] < 9 and not (tmp_path / "run" / "ema.safetensors").exists()
    train(tmp_path / "run", steps=9)
    tiny_run.assert_same_bits(tmp_path / "straight", tmp_path / "run")


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupting(self: Run, **_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Run, "log", interrupting)
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny_run.run(tmp_path)
    assert not isinstance(caught.value, Stopped) and not (tmp_path / "checkpoint.safetensors").exists()


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    thread = threading.Thread(target=tiny_run.run, args=(tmp_path,), kwargs={"steps": 2})
    thread.start()
    thread.join()
    assert (tmp_path / "ema.safetensors").exists()


@pytest.mark.filterwarnings("ignore:stopped after")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_max_minutes_ends_in_good_order(tmp_path: Path, trainer: str) -> None:
    train = TRAINERS[trainer]
    train(tmp_path / "straight", steps=5)
    for done in range(1, 5):  # a step each time
        train(tmp_path / "run", steps=5, max_minutes=1e-9)
        assert (read_checkpoint(tmp_path / "run" / "checkpoint.safetensors") or ({}, {}))[1]["step"] == done
        assert not (tmp_path / "run" / "ema.safetensors").exists()
    train(tmp_path / "run", steps=5, max_minutes=1e-9)
    tiny_run.assert_same_bits(tmp_path / "straight", tmp_path / "run")


def test_it_says_that_it_stopped(tmp_path: Path) -> None:
    net, run = models.UNet(tiny_run.CONFIG), Run(tmp_path, max_minutes=1e-9, progress=False)
    with pytest.warns(UserWarning, match="stopped after 1e-09 minutes at step 1 of 3"):
        diffusion.train_diffusion(net, tiny_run.samples(), diffusion.DiffusionTraining(steps=3, batch=4, warmup=1), run)
    assert run.stopped == f"stopped after 1e-09 minutes at step 1 of 3; the same command continues the run in {tmp_path}"


def test_the_last_checkpoints_stay_and_each_continues_to_the_same_bits(tmp_path: Path) -> None:
    tiny_run.run(tmp_path / "run", steps=20, keep_last=3)
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == [f"checkpoint-{step:06d}.safetensors" for step in (12, 16, 20)]
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "checkpoint.safetensors").write_bytes((tmp_path / "run" / kept[0]).read_bytes())
    tiny_run.run(tmp_path / "again", steps=20)
    tiny_run.assert_same_bits(tmp_path / "run", tmp_path / "again")


LOSSES = [3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 4.0, 0.5]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every validation has the loss of `LOSSES` that belongs to its step."""
    monkeypatch.setattr(diffusion, "validation_loss", lambda net, samples, run, **_: LOSSES[run.step // 2])


def test_the_best_weights_stay(tmp_path: Path, losses: None) -> None:
    tiny_run.run(tmp_path / "run", steps=14, validate_every=2, keep_best=True, lr_schedule="constant")
    tiny_run.run(tmp_path / "short", steps=8, validate_every=2, lr_schedule="constant")
    best, _ = models.load(tmp_path / "run" / "best.safetensors")
    then, _ = models.load(tmp_path / "short" / "ema.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(best.state_dict().values(), then.state_dict().values(), strict=True))


def test_patience_ends_a_run_early_and_it_stays_ended(tmp_path: Path, losses: None) -> None:
    _, row = tiny_run.run(tmp_path, steps=16, validate_every=2, patience=2)
    assert row == {"step": 12, "validation_loss": 1.0} and (tmp_path / "ema.safetensors").exists()
    assert tiny_run.run(tmp_path, steps=16, validate_every=2, patience=2)[1] == row
    tiny_run.run(tmp_path, steps=16, validate_every=2, patience=0)
    assert rows(tmp_path, "validation_loss") == LOSSES


class Pair(torch.nn.Module):
    """Two layers that share their weight, and a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.b(self.a(x)))
        return y


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam])
def test_named_state_comes_back(tmp_path: Path, kind: Any) -> None:
    """Networks with shared weights, any optimizer, parameter groups: two steps from a file are two steps."""
    nets = [Pair() for _ in range(2)]
    optimizers = [kind([{"params": net.a.parameters()}, {"params": net.norm.parameters(), "lr": 0.5}], lr=0.1) for net in nets]

    def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))).sin().square().sum().backward()
        optimizer.step()

    step(nets[0], optimizers[0])
    tensors, structure = flatten({"net": nets[0], "optimizer": optimizers[0]})
    write_checkpoint(tmp_path / "c", tensors, {"objects": structure})
    found, state = read_checkpoint(tmp_path / "c") or ({}, {})
    restore({"net": nets[1], "optimizer": optimizers[1]}, found, state["objects"])
    for net, optimizer in zip(nets, optimizers, strict=True):
        step(net, optimizer)
    assert nets[1].a.weight is nets[1].b.weight
    assert all(torch.equal(a, b) for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"checkpoint: got one of other objects, supported by this run: net, other"):
        restore({"net": nets[1], "other": optimizers[1]}, found, state["objects"])


def test_values_on_a_gpu_wait_for_the_row_and_the_step_is_named(tmp_path: Path) -> None:
    """A tensor that says it is on a GPU is read when a row is due, and not before."""

    class Far(torch.Tensor):
        reads = 0

        @property
        def is_cuda(self) -> bool:  # type: ignore[override]
            return True

        def detach(self) -> Far:  # type: ignore[override]
            return self

        def __float__(self) -> float:
            Far.reads += 1
            return float(self.as_subclass(torch.Tensor))

    run = Run(tmp_path, log_every=4, progress=False)
    run.directory = tmp_path
    with pytest.raises(FloatingPointError, match=r"step 5: loss .*is not finite"):
        run._signals, seen = [], []  # type: ignore[attr-defined]
        for step in run.steps(12):
            run.log(loss=torch.tensor(float("inf") if step == 5 else step).as_subclass(Far), lr=step)
            seen.append(Far.reads)
    assert seen == [0, 0, 0, 4, 4, 4, 4] and rows(tmp_path, "loss") == [1.5] and rows(tmp_path, "lr") == [3]


def test_trackers_get_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages, which need not be installed."""
    import sys
    from types import ModuleType

    seen: dict[str, list[Any]] = {"tensorboard": [], "wandb": []}

    class Writer:
        def __init__(self, directory: str) -> None:
            assert directory == str(tmp_path / "tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen["tensorboard"].append((step, name, value))

        def flush(self) -> None:
            pass

    class Wandb(ModuleType):
        def init(self, **options: Any) -> Any:
            assert options["resume"] == "allow" and options["config"]["steps"] == 10
            return self

        def log(self, row: dict[str, Any], step: int) -> None:
            seen["wandb"] += [(step, name, value) for name, value in row.items()]

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", Wandb("wandb"))
    with pytest.raises(ValueError, match="track: got 'wandb', whose package is not installed"):
        monkeypatch.setattr("genfast.train.track.find_spec", lambda name: None if name == "wandb" else name)
        Run(tmp_path, track=("tensorboard", "wandb"))
    monkeypatch.setattr("genfast.train.track.find_spec", lambda name: name)
    tiny_run.run(tmp_path, steps=10, track=("tensorboard", "wandb"))
    written = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    expected = [(row["step"], name, value) for row in written for name, value in row.items() if name != "step"]
    assert seen["tensorboard"] == seen["wandb"] == expected and len(expected) == 9
