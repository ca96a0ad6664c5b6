"""`torch_utils.training_stats`: means and deviations of named numbers, in one process."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from .dnnlib import EasyDict

_moments: dict[str, Tensor] = {}  # name -> float64 (3,): count, sum, sum of squares


def init_multiprocessing(rank: int, sync_device: torch.device | None) -> None:
    """Refuses any but one process."""
    if rank != 0 or sync_device is not None:
        raise NotImplementedError(f"init_multiprocessing: got rank {rank}, sync_device {sync_device}, supported: one process (0, None)")


def report(name: str, value: Any) -> Any:
    """Counts the elements of ``value`` under ``name``; returns ``value``."""
    elements = torch.as_tensor(value).detach().double().flatten()
    if elements.numel():
        moments = torch.stack([torch.ones_like(elements).sum(), elements.sum(), elements.square().sum()])
        _moments[name] = _moments[name].to(moments.device) + moments if name in _moments else moments
    return value


report0 = report  # that of rank 0, the only one


class Collector:
    """What was reported between the last two calls of `update`, under names that match ``regex``."""

    def __init__(self, regex: str = ".*", keep_previous: bool = True) -> None:
        self._regex, self._keep_previous = re.compile(regex), keep_previous
        self._seen: dict[str, Tensor] = {}
        self._between: dict[str, Tensor] = {}
        self.update()
        self._between.clear()

    def names(self) -> list[str]:
        """Every name reported so far that matches."""
        return [name for name in _moments if self._regex.fullmatch(name)]

    def update(self) -> None:
        """Takes what was reported since the last call. A name without news keeps its old numbers where ``keep_previous``, else has none."""
        if not self._keep_previous:
            self._between.clear()
        for name in self.names():
            total = _moments[name].cpu()
            news = total - self._seen.get(name, torch.zeros_like(total))
            self._seen[name] = total
            if float(news[0]):
                self._between[name] = news

    def num(self, name: str) -> int:
        """How many elements."""
        return int(self._between[name][0]) if name in self._between else 0

    def mean(self, name: str) -> float:
        """Their mean; NaN of none."""
        return float(self._between[name][1] / self._between[name][0]) if name in self._between else float("nan")

    def std(self, name: str) -> float:
        """Their standard deviation, by the count; NaN of none."""
        if name not in self._between:
            return float("nan")
        count, total, squares = self._between[name].tolist()
        return float(max(squares / count - (total / count) ** 2, 0.0) ** 0.5)

    def as_dict(self) -> EasyDict:
        """num, mean and std of every name."""
        return EasyDict({name: EasyDict(num=self.num(name), mean=self.mean(name), std=self.std(name)) for name in self.names()})

    def __getitem__(self, name: str) -> float:
        return self.mean(name)
