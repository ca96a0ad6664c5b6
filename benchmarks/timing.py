"""Side-by-side timing: every variant in one process, interleaved, median and interquartile range, noisy windows discarded."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

import genfast
from genfast.info import cpu_isa

# A parallel region that does next to nothing takes some 10 us on a quiet machine. Above this, a core was taken
# away (the runtime then waits a scheduler tick), and the round says nothing about the code.
NOISY_US = 100.0
SLOW_SECONDS = 10.0  # a variant that takes longer in all gets fewer rounds, at least three
CUDA_ROUND_SECONDS, CUDA_SLOW_SECONDS = 0.01, 1.5  # a GPU's clock is quiet, and its minutes are few


Row = dict[str, Any]
Call = Callable[[], object]


def _silent(kind: str, number: int, text: str) -> None:
    pass


@dataclass(frozen=True)
class Options:
    """What a suite is asked for.

    ``threads``: the numbers of CPU threads to time with, [0] on a GPU. ``start``: cases before this one were tried elsewhere. ``deadline``,
    of time.monotonic(): no case begins after it. ``tell(kind, number, text)`` hears of a case that begins ("begin"), fails ("failed") or
    comes too late ("late").
    """

    device: str
    threads: list[int]
    filter: str
    quick: bool
    command: str
    start: int = 0
    deadline: float = float("inf")
    tell: Callable[[str, int, str], None] = _silent
    tried: list[str] = field(default_factory=list)

    def attempt(self, name: str, case: Callable[[], list[Row]]) -> list[Row]:
        """The rows of one case; none where it was tried elsewhere, comes too late or fails: the next one goes on."""
        number = len(self.tried)
        self.tried.append(name)
        if number < self.start:
            return []
        if time.monotonic() > self.deadline:
            self.tell("late", number, name)
            return []
        self.tell("begin", number, name)
        try:
            return case()
        except Exception as error:
            traceback.print_exc()
            self.tell("failed", number, f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if self.device == "cuda":
            torch.cuda.synchronize()  # an error here is the end of this process: its device is lost
            torch.cuda.empty_cache()
        return []


@dataclass
class Timing:
    """Microseconds per call."""

    median: float
    iqr: float
    rounds: int
    discarded: int


class _Clock:
    """Seconds that ``call`` takes, on the host clock, or by events on a CUDA device."""

    def __init__(self, device: str, counts_itself: bool) -> None:
        self.device, self.counts_itself = device, counts_itself
        self.probe = torch.zeros(1 << 16)

    def noisy(self) -> bool:
        if self.device == "cuda":
            return False
        # Compiled code brings a thread pool of its own, and idle threads of one pool spin for a while on the cores of the other.
        time.sleep(0.005)
        self.probe.add_(1.0)  # wakes torch's threads
        start = time.perf_counter()
        self.probe.add_(1.0)
        return (time.perf_counter() - start) * 1e6 > NOISY_US

    def measure(self, call: Callable[[], object], repeats: int) -> float:
        if self.counts_itself:
            return sum(cast(float, call()) for _ in range(repeats)) / repeats
        if self.device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3 / repeats
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


def interleave(
    variants: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    rounds: int = 21,
    round_seconds: float = 0.02,
    slow_seconds: float = SLOW_SECONDS,
    calls_per_run: int = 1,
    quiet: bool = True,
    counts_itself: bool = False,
) -> dict[str, Timing]:
    """Time every variant in turn, ``rounds`` times. ``calls_per_run``: how many units (say solver steps) one call holds.

    ``quiet``: discard and repeat the rounds during which a core was taken away (CPU only). ``counts_itself``: a call returns the seconds
    that count, where not all of it does.
    """
    if device == "cuda":
        round_seconds, slow_seconds = min(round_seconds, CUDA_ROUND_SECONDS), min(slow_seconds, CUDA_SLOW_SECONDS)
    clock = _Clock(device, counts_itself)
    repeats, rounds_of = {}, {}
    for name, call in variants.items():
        call()  # warm up: compilation, allocation, page faults
        seconds = max(clock.measure(call, 1), 1e-7)
        if seconds < 1:
            call()
        repeats[name] = max(1, int(round_seconds / seconds))
        rounds_of[name] = max(min(3, rounds), min(rounds, int(slow_seconds / seconds)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    discarded = dict.fromkeys(variants, 0)
    for turn in range(rounds):
        for name, call in [(name, call) for name, call in variants.items() if turn < rounds_of[name]]:
            for _ in range(50):
                before = clock.noisy()
                if repeats[name] > 1:
                    call()  # wakes the variant's own threads
                seconds = clock.measure(call, repeats[name])
                if not quiet or not (before or clock.noisy()):
                    times[name].append(seconds * 1e6 / calls_per_run)
                    break
                discarded[name] += 1
            else:
                raise RuntimeError(f"{name}: 50 rounds in a row were disturbed by other work; benchmark on a quiet machine")
    result = {}
    for name, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75])
        result[name] = Timing(float(middle), float(high - low), len(values), discarded[name])
    return result


@functools.cache
def _said(*command: str) -> str:
    """What a command says, or nothing where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def environment(device: str) -> dict[str, Any]:
    """What every row carries: commit (GENFAST_COMMIT where this is no repository), versions, device. CPU and GPU rows are never mixed."""
    root = Path(__file__).resolve().parent.parent
    facts: dict[str, Any] = {
        "commit": _said("git", "-C", str(root), "describe", "--always", "--dirty") or os.environ.get("GENFAST_COMMIT", "unknown"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "genfast": genfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }
    if device == "cuda":
        driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts |= {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}
    else:
        model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
        facts |= {"cpu": model or platform.processor(), "isa": cpu_isa(), "threads": torch.get_num_threads()}
    return facts


def append(path: Path, rows: list[Row]) -> None:
    """Append rows to a JSONL file in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
