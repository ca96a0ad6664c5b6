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


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    tiny_run.run(tmp_path / "straight")
    killed = tmp_path / "killed"
    moments = random.Random(tmp_path.name)
    kills = 0
    while kills < 4:
        process = subprocess.Popen([sys.executable, tiny_run.__file__, str(killed)], stderr=subprocess.PIPE)
        log, rows = killed / "log.jsonl", moments.randrange(1, 4)
        before = log.read_text().count("\n") if log.exists() else 0
        # Wait until training has logged a few rows, then a random part of the time between two more, and kill.
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < before // 2 + rows):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
        kills += 1
        if process.returncode == 0:
            break
    tiny_run.run(killed)
    assert kills >= 1
    for name in ("checkpoint.safetensors", "ema.safetensors"):
        straight, resumed = load_file(tmp_path / "straight" / name), load_file(killed / name)
        assert straight.keys() == resumed.keys()
        different = [key for key in straight if not torch.equal(straight[key], resumed[key])]
        assert not different, f"{name} after {kills} kills: {different}"
    steps = [json.loads(line)["step"] for line in (killed / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == tiny_run.STEPS


@pytest.mark.parametrize("stop", [3, 4, 17, 59])
def test_stopped_after_any_step_it_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    tiny_run.run(tmp_path / "straight")
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
    for name in ("checkpoint.safetensors", "ema.safetensors"):
        straight, resumed = load_file(tmp_path / "straight" / name), load_file(tmp_path / "stopped" / name)
        assert [key for key in straight if not torch.equal(straight[key], resumed[key])] == []
    averaged, _ = models.load(tmp_path / "straight" / "ema.safetensors")
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
