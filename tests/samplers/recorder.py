"""A stand-in for CUDA graphs, so that what capture relies on is shown without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.samplers import Sampler


class Recorder(TorchDispatchMode):
    """Replays the recorded operators on the same memory, with every Python value baked in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            if isinstance(out, Tensor) and new.data_ptr() != out.data_ptr():
                out.copy_(new)


def install(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[Recorder]:
    """Let samplers "capture" on the CPU; ``run()`` is the run that records. Returns the list that the recordings are put in."""
    graphs: list[Recorder] = []

    @contextmanager
    def record(graph: Recorder) -> Iterator[None]:
        """Recording a CUDA graph executes nothing: put back what the recorded step wrote."""
        buffers = [run().ring, run().counter, run().watch, run().model_input]
        before = [buffer.clone() for buffer in buffers]
        with graph:
            yield
        graphs.append(graph)
        for buffer, values in zip(buffers, before, strict=True):
            buffer.copy_(values)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(Sampler, "_check_call", lambda *_: None)
    return graphs
