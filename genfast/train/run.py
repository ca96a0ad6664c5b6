"""What every training run does: the order of its data, its log, and the comparison of its configuration with what it continues."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genfast.train.checkpoint import read_checkpoint, write_atomically, write_checkpoint

# Streams of docs/noise.md. Every random number of a run is a function of (run seed, global sample number).
TIMES, NOISE, MODEL_NOISE, LABELS, ORDER = 1, 2, 3, 4, 5
VALIDATION = 2**39  # the first sample number of the validation draws, out of reach of training
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


def check_number(name: str, value: int, least: int, most: int = 2**30) -> None:
    """Raises ValueError unless ``value`` is in [least, most]."""
    if not least <= value <= most:
        raise ValueError(f"{name}: got {value}, supported: an integer from {least} to {most}")


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
    found = read_checkpoint(out / "checkpoint.safetensors")
    if found is None:
        return None
    tensors, state = found
    for key in config:
        if state["config"].get(key) != config[key]:
            raise ValueError(
                f"{key}: got {config[key]}, but the run in {out} has {state['config'].get(key)}; continue it with the same arguments, "
                "or choose another directory"
            )
    if state["threads"] != torch.get_num_threads():
        warnings.warn(
            f"threads: the run in {out} had {state['threads']}, this process has {torch.get_num_threads()}; "
            "it continues, but its bits may differ from those of an uninterrupted run",
            stacklevel=3,
        )
    return tensors, state["step"]


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Rows of the log up to ``step``; what a killed run logged after its last checkpoint is cut off and will be written again."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a run killed while writing it
            break
    rows = [row for row in rows if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def append(path: Path, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def epoch_order(rng: Any, seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the data in an epoch: images sorted by a uniform number of their own, drawn with draw = epoch."""
    keys = rng.uniform(torch.arange(count) + seed * 2**40, (count, 1), draw=epoch, stream=ORDER)[:, 0].numpy()
    order: NDArray[np.int64] = np.argsort(keys, kind="stable")
    return order


def to_model(images: Images, device: torch.device) -> Tensor:
    return torch.from_numpy(images).to(device).float() / 127.5 - 1


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
    figure.savefig(path, dpi=120)
