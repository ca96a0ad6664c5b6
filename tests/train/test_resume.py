from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_run
import torch

from genfast import models


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was not stopped."""
    out = tmp_path_factory.mktemp("straight")
    tiny_run.run(out)
    return out


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path, straight: Path) -> None:
    killed = tmp_path / "killed"
    tiny_run.kill_at_random(tiny_run.__file__, killed)
    tiny_run.run(killed)
    tiny_run.assert_same_bits(straight, killed)
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
    tiny_run.assert_same_bits(straight, tmp_path / "stopped")
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
