"""What every training run does besides its arithmetic: its directory, log, checkpoints, pictures, and how it stops and continues."""

from __future__ import annotations

import json
import math
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from genfast import ranks
from genfast.checks import above_or_infinite, check, choice, flag, settle, tuple_of, whole
from genfast.files import write_atomically
from genfast.impl import NAMESPACES
from genfast.streams import MOST_SEED, RUN, VALIDATION
from genfast.train.checkpoint import Stateful, flatten, keep_copies, read_checkpoint, restore, write_checkpoint
from genfast.train.directory import Row, accept, check_foreign, described, plot_log, read_log
from genfast.train.lock import hold
from genfast.train.signals import Stopped, caught_signals
from genfast.train.track import check_trackers, open_trackers

MOST = 2**30  # steps, images a step, steps between what is written

RANGES = {
    "seed": whole(0, MOST_SEED),
    "log_every": whole(1, MOST),
    "validate_every": whole(1, MOST),
    "sample_every": whole(0, MOST),
    "checkpoint_every": whole(1, MOST),
    "keep_last": whole(0, MOST),
    "keep_best": flag(),
    "patience": whole(0, MOST),
    "max_minutes": above_or_infinite(0),
    "capture": flag(),
    "track": tuple_of("tensorboard", "wandb"),
    "impl": choice("fused", "reference"),
    "progress": flag(),
}


@dataclass
class Run:
    """Where a run lives and how often it writes. It decides no bit of the weights except by ``seed``."""

    out: str | Path  # directory of everything written; an interrupted run there is continued
    seed: int = 0  # of the run: initial weights, data order and every draw follow from it
    log_every: int = 50  # steps between rows of log.jsonl
    validate_every: int = 500  # steps between validation losses, of the averaged weights
    sample_every: int = 0  # steps between pictures of the averaged weights; 0: none
    checkpoint_every: int = 500  # steps between checkpoints
    keep_last: int = 0  # checkpoints that stay as checkpoint-STEP.safetensors, the newest so many
    keep_best: bool = False  # keep the averaged weights of the lowest validation loss as best.safetensors
    patience: int = 0  # validation losses in a row above the lowest one before the run ends early; 0: it never does
    max_minutes: float = math.inf  # minutes, after which the run saves and ends, to be continued by the same command
    capture: bool = False  # replay each phase of adversarial training as one CUDA graph; CUDA only
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # where rows of the log go besides: packages that are installed
    impl: Literal["fused", "reference"] = "fused"  # of the noise; the bits are the same
    progress: bool = True  # a progress bar on stderr

    def __post_init__(self) -> None:
        settle(self, RANGES)
        check_trackers(self.track)
        self.rng: Any = NAMESPACES[self.impl]
        self.directory, self.config, self.objects, self.rows = Path(), Row(), dict[str, Stateful](), list[Row]()
        self.step = self.done = self.total = 0  # the step in hand, steps done, steps wanted
        self.begun: deque[float] = deque(maxlen=4)  # when the latest steps began, in seconds of time.perf_counter
        self._trackers: list[Callable[[Row], None]] = []
        self.stopped = ""  # why the run ended before its last step, as a sentence
        self.save_weights: Callable[[Path], None] = lambda path: None

    @contextmanager
    def begin(
        self,
        options: Any,  # the trainer's dataclass; its ``steps`` may differ from those of the run that is continued where ``extend`` says so
        more: Mapping[str, Any],  # whatever else decides the bits, as JSON: configurations of networks, digest of the data, device
        objects: Mapping[str, Stateful],  # what the run continues from; restored in place
        save_weights: Callable[[Path], None],  # writes the averaged weights for sampling
        extend: bool,  # no step of the run depends on how many there will be
    ) -> Iterator[None]:
        """Own the directory for the length of the with block; an interrupted run there is restored.

        Raises ValueError if another process owns it, or it holds a run with another configuration or something else.
        """
        self.config = described({**vars(options), **more, "seed": self.seed})
        self.objects, self.save_weights, self.stopped = {**objects}, save_weights, ""
        if options.batch % ranks.count():
            raise ValueError(f"batch: got {options.batch}, supported: a multiple of {ranks.count()}, the number of processes that share it")
        with hold(self.out, ranks.rank() == 0) as self.directory, caught_signals() as self._signals:
            found = read_checkpoint(self.directory / "checkpoint.safetensors")
            self.done = 0 if found is None else accept(self.directory, found[1], self.config, extend)
            if found is None:
                check_foreign(self.directory, self.config)
            rows = read_log(self.directory / "log.jsonl", self.done)
            if found is not None:
                restore(objects, found[0], found[1]["objects"])
            self.rows = rows
            ranks.anyone(False)  # all of them have read before the first one writes
            if ranks.rank() == 0:
                self._trackers = open_trackers(self.track, self.directory, self.config)
                write_atomically(self.directory / "config.json", json.dumps(self.config, indent=1).encode())
                write_atomically(self.directory / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
            yield

    def steps(self, total: int) -> Iterator[int]:
        """The steps that are left of ``total``; between two of them the run saves, where that is due, and stops, where it has to."""
        self.total, self._started, self._samples = total, time.perf_counter(), 0
        self._pending: dict[str, list[tuple[int, Any]]] = {}
        bar = tqdm(
            total=total, initial=self.done, unit="step", disable=not self.progress or ranks.rank() > 0, mininterval=1.0, dynamic_ncols=True
        )
        with bar:
            self._bar = bar
            while self.done < total and not self._out_of_patience():
                self.step = self.done
                self.begun.append(time.perf_counter())
                yield self.step
                self.done += 1
                bar.update()
                late = ranks.anyone(time.perf_counter() - self._started > 60 * self.max_minutes)
                interrupted = ranks.anyone(bool(self._signals))
                if self.due(self.checkpoint_every) or interrupted or late or self._out_of_patience():
                    self._save()
                if self.done == total or self._out_of_patience():
                    return
                if interrupted:
                    text = f"interrupted; the same command continues the run in {self.out}"
                    raise Stopped(text, 128 + (self._signals or [signal.SIGTERM])[0])
                if late:
                    self.stopped = f"stopped after {self.max_minutes:g} minutes at step {self.done} of {total}; "
                    self.stopped += f"the same command continues the run in {self.out}"
                    warnings.warn(self.stopped, stacklevel=2)
                    return

    def due(self, every: int) -> bool:
        """Whether the step in hand ends with what comes every ``every`` steps (0: never), and after the last one."""
        return every > 0 and ((self.step + 1) % every == 0 or self.step + 1 == self.total)

    def numbers(self, step: int, batch: int) -> NDArray[np.int64]:
        """This rank's share of the global numbers of the samples of a step, which are ``batch`` over all ranks."""
        self._samples += batch
        return ranks.share(np.arange(step * batch, (step + 1) * batch))

    def seeds(self, numbers: NDArray[np.int64]) -> Tensor:
        """The seeds of the samples with these global numbers, from which everything random about them follows."""
        return torch.from_numpy(numbers + self.seed * RUN)

    def log(self, **values: Tensor | float) -> None:
        """Note what the step in hand reports. A row has the mean of each tensor since the row before, and the last of each number.

        Tensors on a GPU stay there until a row is due. Raises FloatingPointError for the first value that is not finite.
        """
        for name, value in values.items():
            value = value.detach() if isinstance(value, Tensor) else value
            if isinstance(value, Tensor) and not value.is_cuda:
                value = value.double()
                self._check_finite(name, value, self.step)
            self._pending.setdefault(name, []).append((self.step, value))
        if not self.due(self.log_every):
            return
        row: Row = {}
        for name, pairs in self._pending.items():
            for step, value in pairs:
                self._check_finite(name, value, step)
            numbers = [float(value) for _, value in pairs]
            row[name] = sum(numbers) / len(numbers) if isinstance(pairs[-1][1], Tensor) else numbers[-1]
        self._pending.clear()
        row = {"step": self.step + 1, **dict(zip(row, ranks.means(row.values()), strict=True))}
        self._bar.set_postfix({name: f"{value:.4f}" for name, value in row.items() if name.endswith("loss")}, refresh=False)
        self._append(row | {"images_per_second": round(self._samples / (time.perf_counter() - self._started), 1)})

    def validated(self, loss: float, **figures: float) -> None:
        """Take in a validation loss of the averaged weights, and other figures of the same samples."""
        best = min((row["validation_loss"] for row in self.rows if "validation_loss" in row), default=math.inf)
        self._append({"step": self.step + 1, "validation_loss": loss, **figures})
        if ranks.rank() == 0:
            if self.keep_best and loss < best:
                self.save_weights(self.directory / "best.safetensors")
            plot_log(self.rows, self.directory / "loss.png")

    def check_pictures(self, shape: Sequence[int]) -> None:
        """Raises ValueError if pictures are wanted of samples that are none."""
        if self.sample_every and (len(shape) != 3 or shape[0] not in (1, 3)):
            got = f"{self.sample_every} with samples of shape {tuple(shape)}"
            raise ValueError(f"sample_every: got {got}, supported: 0, because pictures have 1 or 3 channels")

    def picture(self, content: bytes) -> None:
        """Write a PNG of samples drawn after the step in hand, and plot the log beside it."""
        write_atomically(self.directory / f"samples-{self.step + 1:06d}.png", content)
        plot_log(self.rows, self.directory / "loss.png")

    def finish(self) -> Row:
        """End the run: the averaged weights as ema.safetensors, unless it was stopped. Returns the last row of the log."""
        if ranks.rank() == 0:
            if not self.stopped:
                self.save_weights(self.directory / "ema.safetensors")
            plot_log(self.rows, self.directory / "loss.png")
        ranks.anyone(False)  # the files are there for all of them
        return self.rows[-1] if self.rows else {}

    def _save(self) -> None:
        """Write what the run continues from. Raises FloatingPointError, and leaves the last checkpoint, if any of it is not finite."""
        tensors, structure = flatten(self.objects)
        for name, tensor in tensors.items():
            self._check_finite(name, tensor, self.step)
        if ranks.rank():
            return
        words = {"step": self.done, "config": self.config, "threads": torch.get_num_threads(), "torch": torch.__version__}
        path = self.directory / "checkpoint.safetensors"
        write_checkpoint(path, tensors, words | {"objects": structure})
        if self.keep_last:
            keep_copies(path, self.done, self.keep_last)

    def _check_finite(self, name: str, value: Tensor | float, step: int) -> None:
        if not torch.as_tensor(value).isfinite().all():
            got = f" ({float(value)})" if torch.as_tensor(value).ndim == 0 else ""
            raise FloatingPointError(
                f"step {step}: {name}{got} is not finite; {self.directory} keeps the last good state; "
                "try a smaller lr or float32 in another directory"
            )

    def _out_of_patience(self) -> bool:
        if not self.patience:
            return False
        losses = [row["validation_loss"] for row in self.rows if "validation_loss" in row]
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def _append(self, row: Row) -> None:
        """Add a row to the log. Raises OSError that names the file."""
        self.rows.append(row)
        if ranks.rank():
            return
        for track in self._trackers:
            track(row)
        path = self.directory / "log.jsonl"
        try:
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # a write does not know its file
            raise OSError(error.errno, error.strerror, str(path)) from error


def check_length(samples: int, name: str) -> None:
    """Raises ValueError unless so many training samples have numbers of their own, apart from those of validation."""
    check({name: whole(1, VALIDATION)}, {name: samples})
