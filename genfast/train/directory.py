"""A run's directory: its configuration, whether it may continue there, and from which rows of the log."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from genfast.checks import plain, shown
from genfast.files import write_atomically

Row = dict[str, Any]


def accept(out: Path, state: Mapping[str, Any], config: Mapping[str, Any], extend: bool) -> int:
    """The steps that the checkpoint in ``out`` with this ``state`` has done.

    Raises ValueError unless ``config`` is its configuration. Where ``extend``, the number of steps may differ, down to those done.
    """
    fields = {"step", "config", "threads", "objects"}
    if not (fields <= state.keys() and isinstance(state["step"], int) and isinstance(state["config"], dict)):
        raise ValueError(f"checkpoint: got one in {out}, which was not written by a training run of this version; choose another directory")
    other, done = state["config"], state["step"]
    if other.keys() != config.keys():
        raise ValueError(f"out: got {out}, which holds a run of another trainer or version, supported: a directory of its own")
    if extend and config["steps"] < done:
        raise ValueError(f"steps: got {config['steps']}, but the run in {out} has done {done}, supported: as many or more")
    if (difference := _difference(config, other | {"steps": config["steps"]} if extend else other)) is not None:
        key, mine, theirs = difference
        if key == "steps":
            raise ValueError(
                f"steps: got {mine}, but the run in {out} has {theirs}, and its steps depend on that number (a learning rate that falls "
                "along a cosine, or networks that grow), so that another number is another run from the first step on; choose another "
                "directory, or train with a constant learning rate"
            )
        raise ValueError(
            f"{key}: got {shown(mine)}, but the run in {out} has {shown(theirs)}; continue it with the same arguments, "
            "or choose another directory"
        )
    if state["threads"] != torch.get_num_threads():
        warnings.warn(
            f"threads: the run in {out} had {state['threads']}, this process has {torch.get_num_threads()}; "
            "it continues, but its bits may differ from those of an uninterrupted run",
            stacklevel=3,
        )
    return int(done)


def check_foreign(out: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if ``out`` holds a config.json that no run of this kind has written, which the run would replace."""
    path = out / "config.json"
    try:
        found = json.loads(path.read_bytes()) if path.exists() else config
    except ValueError:
        found = None
    if not isinstance(found, Mapping) or found.keys() != config.keys():
        raise ValueError(f"out: got {out}, whose config.json belongs to something else, supported: a directory of its own for each run")


def read_log(path: Path, step: int) -> list[Row]:
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


def plot_log(rows: list[Row], path: Path) -> None:
    """Plot every loss and penalty of log.jsonl over the steps as PNG; without matplotlib nothing is drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    names = {name for row in rows for name in row if name.endswith(("loss", "length", "penalty")) or name in ("r1", "r2")}
    points = {name: [(row["step"], row[name]) for row in rows if name in row] for name in sorted(names)}
    positive = all(value > 0 for pairs in points.values() for _, value in pairs)
    axes = figure.add_subplot(xlabel="step", ylabel="mean since the row before", yscale="log" if positive else "linear")
    for name, pairs in points.items():
        style = "o-" if len(pairs) < 50 else "-"
        axes.plot(*zip(*pairs, strict=True), style, markersize=3, linewidth=1, label=name.replace("_", " "))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_atomically(path, content.getvalue())


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


def described(config: Mapping[str, Any]) -> Row:
    """A configuration as it comes back from JSON, where tuples are lists."""
    described: Row = json.loads(json.dumps({name: plain(value) for name, value in config.items()}))
    return described


def check_words(words: Mapping[str, Any] | None, taken: Sequence[str] = ()) -> None:
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
    """The SHA-256 of arrays, their dtypes and shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
