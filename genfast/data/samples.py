"""What a trainer reads: samples by their global numbers, the same on any rank, for any batch size and after any restart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genfast import ops
from genfast.checks import Rule, check, whole
from genfast.data.arrays import check_images
from genfast.streams import ORDER, RUN


class Batch(NamedTuple):
    """Some samples of a run."""

    x: Tensor  # (B, C, H, W) uint8 on the CPU, or float32 for latents
    labels: Tensor | None  # (B,) int64, each in [0, number of classes)
    numbers: Tensor  # (B,) int64, the samples' global numbers


@runtime_checkable
class Samples(Protocol):
    """A data set as a trainer sees it. It holds no state: sample number n of a run with a seed always has the same bits."""

    digest: str  # of the content and of every option that decides bits
    shape: tuple[int, ...]  # of one sample, (C, H, W)
    classes: tuple[str, ...]  # names of the labels; empty: unlabelled

    def __len__(self) -> int: ...

    def batch(self, numbers: NDArray[np.int64], seed: int) -> Batch: ...

    def hold_out(self, count: int) -> tuple[Samples, Samples]: ...


def epoch_order(rng: Any, seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the data in an epoch: samples sorted by a uniform number of their own, drawn with draw = epoch."""
    keys = rng.uniform(torch.arange(count) + seed * RUN, (count, 1), draw=epoch, stream=ORDER)[:, 0].numpy()
    order: NDArray[np.int64] = np.argsort(keys, kind="stable")
    return order


class ArraySamples:
    """Samples from numpy arrays: ``images`` (N, H, W) or (N, C, H, W) uint8, ``labels`` (N,) integers or None, ``classes`` their names.

    Without names the classes are called "0", "1", ... up to the largest label. Raises ValueError for anything else.
    """

    def __init__(self, images: Any, labels: Any = None, classes: Sequence[str] = ()) -> None:
        check_images("images", images)
        if labels is not None:
            if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu":
                got = f"{labels.dtype}" if isinstance(labels, np.ndarray) else f"a {type(labels).__name__}"
                raise ValueError(f"labels: got {got}, supported: a numpy array of integers")
            count = len(classes) or int(labels.max(initial=0)) + 1
            if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= count:
                extent = f", from {labels.min()} to {labels.max()}" if labels.size else ""
                supported = f"one an image ({len(images)}), each from 0 to {count - 1}"
                raise ValueError(f"labels: got shape {labels.shape}{extent}, supported: {supported}")
            classes = tuple(classes) or tuple(map(str, range(count)))
        self.images, self.labels = images if images.ndim == 4 else images[:, None], labels
        self.shape: tuple[int, ...] = self.images.shape[1:]
        self.classes = tuple(classes) if labels is not None else ()
        self.digest = _digest(images, labels)
        self._order: tuple[tuple[int, int], NDArray[np.int64]] | None = None  # of the latest epoch

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, numbers: NDArray[np.int64], seed: int) -> Batch:
        """The samples with these global numbers of a run with this seed: every epoch is a new order of all of them."""
        chosen = np.empty(len(numbers), np.int64)
        epochs = numbers // len(self)
        for epoch in np.unique(epochs).tolist():
            if self._order is None or self._order[0] != (seed, epoch):
                self._order = (seed, epoch), epoch_order(ops, seed, epoch, len(self))
            mine = epochs == epoch
            chosen[mine] = self._order[1][numbers[mine] % len(self)]
        x = torch.from_numpy(np.array(self.images[chosen], order="C"))
        labels = None if self.labels is None else torch.from_numpy(np.array(self.labels[chosen], np.int64, order="C"))
        return Batch(x, labels, torch.from_numpy(np.array(numbers, np.int64)))

    def hold_out(self, count: int) -> tuple[ArraySamples, ArraySamples]:
        """Split off the last ``count`` samples: (those to train on, those held out)."""
        check({"count": Rule(f"from 1 to {len(self) - 1}", whole(1, len(self) - 1).accepts)}, {"count": count})
        parts = (slice(None, -count), slice(-count, None))
        first, second = (
            ArraySamples(self.images[part], None if self.labels is None else self.labels[part], self.classes) for part in parts
        )
        return first, second


def _digest(*arrays: NDArray[Any] | None) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(b"none" if array is None else f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class PaddedSamples:
    """Other samples in the middle of zeros, (C, H, W) -> (C, size, size). Raises ValueError unless the border is as wide on each side."""

    def __init__(self, samples: Samples, size: int) -> None:
        channels, height, width = samples.shape
        if any(size < side or (size - side) % 2 for side in (height, width)):
            raise ValueError(f"size: got {size}, supported: {max(height, width)}, the side of the samples, or more by an even number")
        self.samples, self.classes = samples, samples.classes
        self.shape: tuple[int, ...] = (channels, size, size)
        self.border = ((size - width) // 2,) * 2 + ((size - height) // 2,) * 2
        self.digest = f"{samples.digest} padded to {size}"

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, numbers: NDArray[np.int64], seed: int) -> Batch:
        found = self.samples.batch(numbers, seed)
        return found._replace(x=torch.nn.functional.pad(found.x, self.border))

    def hold_out(self, count: int) -> tuple[PaddedSamples, PaddedSamples]:
        first, second = self.samples.hold_out(count)
        return PaddedSamples(first, self.shape[-1]), PaddedSamples(second, self.shape[-1])


def open_samples(name: str, split: str = "train") -> Samples:
    """The samples of a named data set, which is fetched where it is not there yet. Raises ValueError for an unknown name or split."""
    from genfast.data import sets

    sets.fetch(name)
    images, labels = sets.load(name, split)
    return ArraySamples(images, labels, sets.dataset(name).classes)
