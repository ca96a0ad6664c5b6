"""From a file or a run to samples, whatever the family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from genfast.checks import shown
from genfast.device import usable
from genfast.request import Request, every

if TYPE_CHECKING:
    from torch import Tensor

    from genfast.models.family import Model

# Heavy imports (torch) happen inside the functions, so that the command line's help does not pay for them.

SHIPPED = Path(__file__).resolve().parent / "weights" / "fashion.safetensors"  # docs/training.md says how it was made


def open_model(path: str | Path = SHIPPED, device: str | None = None, impl: str = "fused") -> Model:
    """The model in a file that training saved, or in the directory of a run: its ema.safetensors, else its best.safetensors.

    ``device``: None for cuda where torch sees one, else cpu. ``impl``: of the network's operators, where its family has both. Raises
    FileNotFoundError if there is no such file, and ValueError if it is none of ours, damaged, or the run has not saved weights yet.
    """
    from genfast.models.files import load_model

    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("ema.safetensors", "best.safetensors") if (path / name).exists()]
        if not found:
            raise ValueError(f"path: got {path}, a directory without ema.safetensors, which a run writes at its end")
        path = found[0]
    model = load_model(path, impl)
    model.net.to(usable(device, "device"))
    return model


def batches(model: Model, request: Request) -> Iterator[Tensor]:
    """Samples (b, C, H, W) float32 with values about in [-1, 1], ``request.options.batch`` at once, in the order of the request.

    Sample i depends on its seed and its label alone. Raises ValueError for a label that the model does not have, and for labels where
    it has none, or none where it has some.
    """
    import torch

    classes = len(model.classes)
    if classes and request.labels is None:
        raise ValueError(f"labels: got None, supported: one for each seed, from 0 to {classes - 1}")
    if request.labels is not None and not classes:
        raise ValueError(f"labels: got {shown(request.labels)}, supported: None, because this model has no classes")
    if request.labels is not None and max(request.labels) >= classes:
        raise ValueError(f"labels: got {max(request.labels)}, supported: from 0 to {classes - 1}")
    size = request.options.batch
    with torch.no_grad():
        for start in range(0, len(request.seeds), size):
            part = slice(start, start + size)
            some = replace(request, seeds=request.seeds[part], labels=None if request.labels is None else request.labels[part])
            yield model.family.generate(model, some)


def generate(model: Model, request: Request) -> Tensor:
    """All samples of `batches` as one tensor (N, C, H, W)."""
    import torch

    return torch.cat([*batches(model, request)])


def overview(classes: int, columns: int = 8) -> Request:
    """What a grid of a model with so many classes shows: each of them with the seeds 0 to columns - 1, or without classes the square."""
    return every(range(classes), range(columns)) if classes else Request(range(columns**2))
