"""A directory belongs to one run at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gan
import tiny_run

from genfast.train.lock import LOCK, hold

HOLDER = "import sys, time; from genfast.train.lock import hold\nwith hold(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def other(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds the directory "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("train", [tiny_run.run, tiny_gan.run])
def test_a_second_process_is_refused_and_writes_nothing(tmp_path: Path, other: subprocess.Popen[str], train: object) -> None:
    with pytest.raises(ValueError, match=rf"out: .*run is in use by process {other.pid} on \S+, supported: a directory that no other"):
        train(tmp_path / "run", steps=1)  # type: ignore[operator]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_another_name_of_the_directory_is_refused_too(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    for name in (tmp_path / "link", str(tmp_path / "run") + "/.", os.path.relpath(tmp_path / "run")):
        with pytest.raises(ValueError, match="in use"), hold(name):
            pass


def test_a_killed_process_holds_nothing(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "run" / LOCK).exists()
    with hold(tmp_path / "run") as directory:
        assert str(os.getpid()) in (directory / LOCK).read_text()
    assert list((tmp_path / "run").iterdir()) == []


def test_one_process_cannot_take_it_twice_and_an_error_gives_it_back(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), hold(tmp_path / "a"):
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"), hold(tmp_path / "a"):
            pass
        with hold(tmp_path / "b"):  # another directory is free
            pass
        raise RuntimeError
    with hold(tmp_path / "a"):
        pass


def test_whoever_waits_for_a_removed_file_takes_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner removes the file between another's open and its lock: what that one then locks is no longer in the directory."""
    import fcntl

    real, path = fcntl.flock, tmp_path / LOCK
    removals = [True]

    def late(descriptor: int, operation: int) -> None:
        if removals:
            removals.pop()
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with hold(tmp_path), pytest.raises(ValueError, match="in use"), hold(tmp_path):
        pass


@pytest.mark.parametrize("out", ["", 3, None])
def test_no_path_is_a_sentence(out: object) -> None:
    with pytest.raises(ValueError, match=r"out: got .*, supported: the path of a directory"), hold(out):  # type: ignore[arg-type]
        pass


def test_a_file_in_its_place_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="which is a file or lies below one"), hold(out):
            pass
    with pytest.raises(OSError, match="/proc/genfast"), hold("/proc/genfast"):  # where nobody can write
        pass
    assert (tmp_path / "file").read_text() == "precious"
