from __future__ import annotations

import gzip
import hashlib
import os
import re
import stat
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from genfast import data
from genfast.data import sets


def idx(array: np.ndarray) -> bytes:
    """The IDX format: 0, 0, type 8 (uint8), number of dimensions, big-endian sizes, values."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray, np.ndarray]:
    """A folder that holds a data set of the real one's shape, registered under its name; an empty cache."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), rng.integers(0, 10, 5).astype(np.uint8)
    folder = tmp_path / "source" / "deep"
    folder.mkdir(parents=True)
    digests = {}
    for prefix in ("train", "t10k"):
        for name, array in ((f"{prefix}-images-idx3-ubyte.gz", images), (f"{prefix}-labels-idx1-ubyte.gz", labels)):
            (folder / name).write_bytes(gzip.compress(idx(array)))
            digests[name] = hashlib.sha256(idx(array)).hexdigest()
    monkeypatch.setitem(sets.DATASETS, "fashion", replace(sets.DATASETS["fashion"], files=digests))
    monkeypatch.setenv("GENFAST_DATA", str(tmp_path / "cache"))
    return tmp_path / "source", images, labels


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_fetch_from_folder_and_load(tiny: tuple[Path, np.ndarray, np.ndarray]) -> None:
    source, images, labels = tiny
    target = data.fetch("fashion", source)
    for split in ("train", "test"):
        x, y = data.load("fashion", split)
        np.testing.assert_array_equal(x, images)
        np.testing.assert_array_equal(y, labels)
    assert x.dtype == y.dtype == np.uint8
    for file in source.rglob("*.gz"):
        file.unlink()
    assert data.fetch("fashion", source) == target  # it is there: the source is not touched


def test_fetch_runs_apt_with_the_pinned_version(
    tiny: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, images, _ = tiny
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools, "apt-get", f'test "$1 $2" = "download dataset-fashion-mnist={sets.DATASETS["fashion"].version}" && : > package.deb')
    program(tools, "dpkg-deb", f'test -f "$2" && mkdir "$3" && cp -r "{source}" "$3"')
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    data.fetch("fashion")
    np.testing.assert_array_equal(data.load("fashion")[0], images)


def test_without_apt_it_says_what_to_do(tiny: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"apt-get is not on this machine; get the package from https://.* --from"):
        data.fetch("fashion")


def test_a_failed_download_gives_apts_reason(tiny: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "apt-get", "echo 'E: no such version' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=r"failed \(E: no such version\)"):
        data.fetch("fashion")


@pytest.mark.parametrize("damage", ["altered", "cut", "missing"])
def test_damaged_files_are_refused_and_leave_nothing(tiny: tuple[Path, np.ndarray, np.ndarray], damage: str) -> None:
    source, images, _ = tiny
    victim = next(source.rglob("train-images*"))
    if damage == "altered":
        victim.write_bytes(gzip.compress(idx(images ^ 1)))
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-20])
    else:
        victim.unlink()
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz"):
        data.fetch("fashion", source)
    assert list(data.directory().iterdir()) == []
    with pytest.raises(FileNotFoundError, match="genfast data fetch fashion"):
        data.load("fashion")


def test_bad_names_are_sentences(tiny: object) -> None:
    with pytest.raises(ValueError, match=r"name: got 'cifar', supported: 'fashion'"):
        data.fetch("cifar")
    with pytest.raises(ValueError, match=r"split: got 'dev', supported: 'train', 'test'"):
        data.load("fashion", "dev")
    with pytest.raises(ValueError, match=r"--from: got .*nowhere, which does not exist"):
        data.fetch("fashion", "nowhere")


def test_hold_out() -> None:
    x, y = np.arange(10, dtype=np.uint8), np.arange(10, 20, dtype=np.uint8)
    (x1, y1), (x2, y2) = data.hold_out(x, y, 3)
    assert x1.tolist() == [*range(7)] and y2.tolist() == [17, 18, 19] and len(y1) == 7 and len(x2) == 3
    with pytest.raises(ValueError, match="count: got 10, supported: from 1 to 9"):
        data.hold_out(x, y, 10)


@pytest.mark.parametrize("damage", ["cut", "empty", "altered", "no gzip", "other shape", "fewer labels", "missing"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_cache_that_was_damaged_since_names_the_file(tiny: tuple[Path, np.ndarray, np.ndarray], damage: str, split: str) -> None:
    source, images, labels = tiny
    target = data.fetch("fashion", source)
    prefix = {"train": "train", "test": "t10k"}[split]
    victim = target / f"{prefix}-{'labels-idx1' if damage == 'fewer labels' else 'images-idx3'}-ubyte.gz"
    content = victim.read_bytes()
    altered = bytearray(content)
    altered[len(content) // 2] ^= 4
    new = {
        "cut": content[:-30], "empty": b"", "altered": bytes(altered), "no gzip": b"<html>", "other shape": gzip.compress(idx(images[0])),
        "fewer labels": gzip.compress(idx(labels[:-1])),
    }  # fmt: skip
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(new[damage])
    named = re.escape(str(target if damage == "fewer labels" else victim))
    with pytest.raises(ValueError, match=rf"fashion: {named} is (damaged|missing).*; delete .* genfast data fetch fashion$"):
        data.load("fashion", split)
    data.load("fashion", {"train": "test", "test": "train"}[split])  # the other split is whole


def test_a_source_for_what_is_there_is_not_ignored_in_silence(tiny: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    source, _, _ = tiny
    target = data.fetch("fashion", source)
    with pytest.raises(ValueError, match=r"--from: got .*WRONG, which does not exist"):
        data.fetch("fashion", tmp_path / "WRONG")
    (tmp_path / "other.deb").write_text("no package")
    for there in (tmp_path / "other.deb", tmp_path / "source"):
        with pytest.warns(UserWarning, match=rf"--from: {re.escape(str(there))} was not read, because fashion is in"):
            assert data.fetch("fashion", there) == target


def test_hold_out_checks_what_it_is_given() -> None:
    x = np.zeros((10, 2, 2), np.uint8)
    for count in (0, -3, 1.5, True, None, "3"):
        with pytest.raises(ValueError, match=r"count: got .*, supported: from 1 to 9"):
            data.hold_out(x, np.zeros(10, np.uint8), count)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels: got 9 of them, supported: 10, one for each image"):
        data.hold_out(x, np.zeros(9, np.uint8), 3)
    for name in (None, 3, ["fashion"]):
        with pytest.raises(ValueError, match=r"name: got .*, supported: 'fashion'"):
            data.load(name)  # type: ignore[arg-type]
