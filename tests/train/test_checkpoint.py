from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genfast import files
from genfast.files import write_atomically
from genfast.train.checkpoint import read_checkpoint, write_checkpoint


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).t(), "b": torch.tensor(5.0), "c": torch.tensor([float("nan"), -0.0])}
    write_checkpoint(tmp_path / "c", tensors, {"step": 3, "config": {"lr": 0.1}})
    found, state = read_checkpoint(tmp_path / "c") or ({}, {})
    assert state == {"step": 3, "config": {"lr": 0.1}}
    for name, tensor in tensors.items():
        assert torch.equal(found[name].contiguous().view(torch.int32), tensor.contiguous().view(torch.int32))
    assert read_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("call", range(12))
def test_a_kill_around_any_system_call_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Stop before the call-th of open, write, fsync and rename of a write, whichever it is."""
    path = tmp_path / "c"
    write_checkpoint(path, {"x": torch.tensor([1.0])}, {"step": 1})
    write_checkpoint(path, {"x": torch.tensor([2.0])}, {"step": 2})
    remaining = call

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def replacement(*args: object, **kwargs: object) -> object:
            nonlocal remaining
            if remaining == 0:
                raise Killed
            remaining -= 1
            return function(*args, **kwargs)

        return replacement

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "open", "close"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(files, "open", dying(open), raising=False)
        try:
            write_checkpoint(path, {"x": torch.tensor([3.0])}, {"step": 3})
        except Killed:
            pass
        else:
            assert call >= 7  # all calls of one write were survived
    found, state = read_checkpoint(path) or ({}, {})
    assert state["step"] in (2, 3) and found["x"].item() == state["step"]
    write_checkpoint(path, {"x": torch.tensor([4.0])}, {"step": 4})  # what was left behind is not in the way
    assert (read_checkpoint(path) or ({}, {}))[1] == {"step": 4}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_not_seen_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def dies(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, call, dies)
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_unreadable_files(tmp_path: Path) -> None:
    path = tmp_path / "c"
    for step in (1, 2):
        write_checkpoint(path, {"x": torch.zeros(100)}, {"step": step})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.warns(UserWarning, match="trying the one before it"):
        assert (read_checkpoint(path) or ({}, {}))[1] == {"step": 1}
    (tmp_path / "c.previous").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="delete it to start again"):
        read_checkpoint(path)
