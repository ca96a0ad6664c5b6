from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch
from safetensors.torch import load_file

from genfast import models


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was not stopped."""
    out = tmp_path_factory.mktemp("straight")
    tiny_run.run(out)
    return out


def assert_same_bits(straight: Path, other: Path) -> None:
    for name in ("checkpoint.safetensors", "ema.safetensors"):
        a, b = load_file(straight / name), load_file(other / name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == [], name


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, straight: Path) -> None:
    killed = tmp_path / "killed"
    log = killed / "log.jsonl"

    def rows() -> int:
        return log.read_text().count("\n") if log.exists() else 0

    kills = 0
    for _ in range(4):
        before = rows()
        process = subprocess.Popen([sys.executable, tiny_run.__file__, str(killed)], stderr=subprocess.PIPE)
        while process.poll() is None and rows() <= before:  # it has come further than the one before it
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        kills += process.returncode != 0
    assert kills >= 1
    tiny_run.run(killed)
    assert_same_bits(straight, killed)
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == tiny_run.STEPS


@pytest.mark.parametrize("stop", [3, 4, 17, 59])
def test_stopped_after_any_step_it_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: Path, stop: int
) -> None:
    calls = 0
    with monkeypatch.context() as patch:
        from genfast.train import diffusion

        real = diffusion.diffusion_loss

        def failing(*args: object, **kwargs: object) -> torch.Tensor:
            nonlocal calls
            calls += torch.is_grad_enabled()
            if calls > stop:
                raise KeyboardInterrupt
            return real(*args, **kwargs)  # type: ignore[arg-type]

        patch.setattr(diffusion, "diffusion_loss", failing)
        with pytest.raises(KeyboardInterrupt):
            tiny_run.run(tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "ema.safetensors").exists()
    net, _ = tiny_run.run(tmp_path / "stopped")
    assert_same_bits(straight, tmp_path / "stopped")
    averaged, _ = models.load(straight / "ema.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(averaged.parameters(), net.parameters(), strict=True))


def test_a_finished_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, row = tiny_run.run(tmp_path, steps=6)
    monkeypatch.setattr("genfast.train.diffusion.diffusion_loss", None)
    again, same_row = tiny_run.run(tmp_path, steps=6)
    assert row == same_row and row["step"] == 6
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    tiny_run.run(tmp_path, steps=4)
    with pytest.raises(ValueError, match=r"lr: got 0.002, but the run in .* has 0.001; continue it with the same arguments"):
        tiny_run.run(tmp_path, steps=4, lr=0.002)
    tiny_run.run(tmp_path, steps=4, log_every=1)  # what does not decide the bits may change


def test_another_number_of_threads_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run.run(tmp_path, steps=4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.warns(UserWarning, match="had 1, this process has 3"):
        tiny_run.run(tmp_path, steps=4)
