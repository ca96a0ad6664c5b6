"""What every training run does: the order of its data, its log, and the comparison of its configuration with what it continues."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genfast.checks import plain, shown
from genfast.files import write_atomically
from genfast.train.checkpoint import read_checkpoint, write_checkpoint

# Streams of docs/noise.md. Every random number of a run is a function of (run seed, global sample number).
TIMES, NOISE, MODEL_NOISE, LABELS, ORDER = 1, 2, 3, 4, 5
VALIDATION = 2**39  # the first sample number of the validation draws, out of reach of training
MOST = 2**30  # steps, images a step, steps between what is written
MOST_SEED = 2**23 - 1  # seeds of samples are seed * 2**40 + number, below 2**63

Images = NDArray[np.uint8]


class DataOrder:
    """Which image each sample of a run is: every epoch a new order of all of them."""

    def __init__(self, rng: Any, seed: int, count: int) -> None:
        self.rng, self.seed, self.count = rng, seed, count
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices of the images of the samples with these global numbers."""
        chosen = np.empty(len(numbers), np.int64)
        epochs = numbers // self.count
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch, self._order = int(epoch), epoch_order(self.rng, self.seed, int(epoch), self.count)
            mine = epochs == epoch
            chosen[mine] = self._order[numbers[mine] % self.count]
        return chosen


def sample_seeds(seed: int, numbers: NDArray[np.int64]) -> Tensor:
    """The seeds of the samples with these global numbers, in a run with this seed."""
    return torch.from_numpy(numbers + seed * 2**40)


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as it comes back from JSON, where tuples are lists."""
    described: dict[str, Any] = json.loads(json.dumps({name: plain(value) for name, value in config.items()}))
    return described


def check_words(words: Mapping[str, Any] | None, taken: Collection[str] = ()) -> None:
    """Raises ValueError unless the words to save with the weights are JSON-able and none of their names is ``taken``."""
    if words is None:
        return
    if not isinstance(words, Mapping) or not all(isinstance(name, str) for name in words):
        raise ValueError(f"about: got {shown(words)}, supported: a dictionary by strings")
    if both := sorted({*words} & {*taken}):
        raise ValueError(f"about: got {both[0]!r}, which training writes itself, supported: other names")
    try:
        json.dumps(dict(words))
    except (TypeError, ValueError) as error:
        raise ValueError(f"about: got a value that JSON cannot hold ({error}), supported: strings, numbers, lists, dictionaries") from None


def digest(*arrays: NDArray[Any] | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def save_checkpoint(out: Path, step: int, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write what the run in ``out`` continues from after ``step`` steps."""
    state = {"step": step, "config": config, "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_checkpoint(out / "checkpoint.safetensors", tensors, state)


def load_checkpoint(out: Path, config: dict[str, Any]) -> tuple[dict[str, Tensor], int] | None:
    """(tensors on the CPU, steps done) of the run in ``out``, or None. Raises ValueError if it has another configuration."""
    path = out / "checkpoint.safetensors"
    found = read_checkpoint(path)
    if found is None:
        _check_foreign(out, config)
        return None
    tensors, state = found
    if not ({"step", "config", "threads"} <= state.keys() and isinstance(state["step"], int) and isinstance(state["config"], dict)):
        raise ValueError(f"checkpoint: got {path}, which was not written by a training run; choose another directory")
    if state["config"].keys() != config.keys():
        raise ValueError(f"out: got {out}, which holds a run of another trainer or version, supported: a directory of its own")
    if (difference := _difference(config, state["config"])) is not None:
        key, mine, other = difference
        raise ValueError(
            f"{key}: got {shown(mine)}, but the run in {out} has {shown(other)}; continue it with the same arguments, "
            "or choose another directory"
        )
    if state["threads"] != torch.get_num_threads():
        warnings.warn(
            f"threads: the run in {out} had {state['threads']}, this process has {torch.get_num_threads()}; "
            "it continues, but its bits may differ from those of an uninterrupted run",
            stacklevel=3,
        )
    return tensors, state["step"]


def _difference(mine: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry in which two configurations differ, down to the entries of entries: (name, mine, the other's)."""
    for key in [*mine, *other]:
        a, b = mine.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            if (inner := _difference(a, b)) is not None:
                return f"{key}.{inner[0]}", *inner[1:]
        elif a != b:
            return key, a, b
    return None


def read_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of the log up to ``step``; what a killed run logged after its last checkpoint will be written again.

    The last line may be incomplete, because a run can be killed while writing it. Raises ValueError for any other line that is no row.
    """
    rows = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int):
                raise TypeError
        except (ValueError, KeyError, TypeError):  # a line that is not UTF-8 is a ValueError too
            if number == len(lines):  # nothing follows its last line break in a whole log
                break
            raise ValueError(f"log: line {number} of {path} is damaged or not of a training run; move the file away to continue") from None
        rows.append(row)
    return [row for row in rows if row["step"] <= step]


def _check_foreign(out: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if ``out`` holds a config.json that no run of this kind has written, which the run would replace."""
    path = out / "config.json"
    try:
        found = json.loads(path.read_bytes()) if path.exists() else config
    except ValueError:
        found = None
    if not isinstance(found, Mapping) or found.keys() != config.keys():
        raise ValueError(f"out: got {out}, whose config.json belongs to something else, supported: a directory of its own for each run")


def write_start(out: Path, config: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """The first files of a run that starts or continues."""
    write_atomically(out / "config.json", json.dumps(config, indent=1).encode())
    write_atomically(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def append(path: Path, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Add a row to the log. Raises OSError that names the file."""
    rows.append(row)
    try:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:  # a write does not know its file
        raise OSError(error.errno, error.strerror, str(path)) from error


def epoch_order(rng: Any, seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the data in an epoch: images sorted by a uniform number of their own, drawn with draw = epoch."""
    keys = rng.uniform(torch.arange(count) + seed * 2**40, (count, 1), draw=epoch, stream=ORDER)[:, 0].numpy()
    order: NDArray[np.int64] = np.argsort(keys, kind="stable")
    return order


def plot_log(rows: list[dict[str, Any]], path: Path, keys: Mapping[str, str], label: str, scale: str = "linear") -> None:
    """Plot ``keys`` (name: line style) of log.jsonl over the steps as PNG; without matplotlib nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=label, yscale=scale)
    for key, style in keys.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=3, linewidth=1, label=key.replace("_", " "))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_atomically(path, content.getvalue())
