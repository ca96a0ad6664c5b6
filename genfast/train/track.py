"""Where the rows of a log go besides log.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker whose package is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"track: got {name!r}, whose package is not installed, supported: what is; pip install {name}")


def open_trackers(names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> list[Callable[[dict[str, Any]], None]]:
    """A function for each tracker that takes a row of the log. A run that continues goes on in the same curves."""
    return [{"tensorboard": _tensorboard, "wandb": _wandb}[name](directory, config) for name in names]


def _tensorboard(directory: Path, config: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(directory / "tensorboard"))

    def write(row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    return write


def _wandb(directory: Path, config: Mapping[str, Any]) -> Callable[[dict[str, Any]], None]:
    wandb: Any = import_module("wandb")
    name = directory.resolve().name
    run = wandb.init(dir=str(directory), name=name, id=name, resume="allow", config=dict(config))
    return lambda row: run.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
