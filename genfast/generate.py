"""From a file or a run to samples, whatever the family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from genfast.checks import shown
from genfast.device import usable
from genfast.request import Request, SamplingOptions, every

if TYPE_CHECKING:
    from torch import Tensor

    from genfast.models.family import Model

# Heavy imports (torch) happen inside the functions, so that the command line's help does not pay for them.

MOST_SAMPLES = 10_000  # of one command
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
    """All samples of `batches` as one tensor (N, C, H, W); in a process group each rank draws its share and gets all of them."""
    import torch

    from genfast import ranks

    labels = None if request.labels is None else ranks.share(request.labels)
    mine = replace(request, seeds=ranks.share(request.seeds), labels=labels)
    return ranks.gather(torch.cat([*batches(model, mine)]), request.seeds)


def overview(classes: int, columns: int = 8) -> Request:
    """What a grid of a model with so many classes shows: each of them with the seeds 0 to columns - 1, or without classes the square."""
    return every(range(classes), range(columns)) if classes else Request(range(columns**2))


def to_files(path: str | Path, out: Path, seeds: str, labels: str | None, device: str | None, options: SamplingOptions) -> None:
    """Draw every label with every seed from the model at ``path``, write them to ``out`` (`genfast.media.write`) and print its name.

    ``seeds`` is such as "0-7" or "3,5,8-9", ``labels`` names or numbers of classes, separated by commas, None for all. Nothing is written
    if anything is wrong with them: ValueError.
    """
    from genfast import __version__, media, ranks

    media.format_of(out)
    model = open_model(path, ranks.join(usable(device)), options.impl)
    if labels is not None and not model.classes:
        raise ValueError(f"--labels: got {labels!r}, supported: none, because this model has no classes")
    chosen = [*range(len(model.classes))] if labels is None else [_label(word, model.classes) for word in labels.split(",")]
    numbers = seed_numbers(seeds, MOST_SAMPLES // max(1, len(chosen)))
    request = every(chosen, numbers, options) if chosen else Request(numbers, None, options)
    rows = [model.classes[label] for label in chosen]
    names = [f"{row.replace(' ', '-').lower()}-{seed:06d}" for row in rows for seed in numbers] or [f"{seed:06d}" for seed in numbers]
    provenance = {"genfast": __version__, "weights": str(model.path), "seeds": seeds, "labels": rows, **vars(options)}
    columns = len(numbers) if rows else min(8, len(numbers))
    x = generate(model, request)
    if ranks.rank() == 0:
        media.write(out, x, columns, rows, names, provenance)
        print(out)
    ranks.leave()


def _label(word: str, classes: Sequence[str]) -> int:
    names = [name.lower() for name in classes]
    if word.strip().lower() in names:
        return names.index(word.strip().lower())
    if word.strip().isdecimal() and int(word) < len(classes):
        return int(word)
    raise ValueError(f"--labels: got {word!r}, supported: {', '.join(f'{i} ({name})' for i, name in enumerate(classes))}")


def seed_numbers(text: str, most: int) -> list[int]:
    """ "0-7" or "3,5,8-9" as a list of at most ``most`` numbers."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(last) >= int(first))) or int(last or first) >= 2**63:
            raise ValueError(f"--seeds: got {text!r}, supported: numbers below 2^63 and ranges such as 0-7 or 3,5,8-9")
        ranges.append(range(int(first), int(last if dash else first) + 1))
    if (count := sum(numbers.stop - numbers.start for numbers in ranges)) > most:
        raise ValueError(f"--seeds: got {count} of them, supported: at most {most} with so many labels")
    return [number for numbers in ranges for number in numbers]
