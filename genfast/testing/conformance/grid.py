"""Grids of configurations: axes of choices, and few cases in which every choice, or every pair of choices, occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

Outcome = TypeVar("Outcome")
_TRIES = 8


@dataclass(frozen=True)
class Choice:
    """One value of an axis: its name, and what it says to the constructor, to set_timesteps, to step and to the run."""

    label: str
    init: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    step: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)


Axes = Mapping[str, Sequence[Choice]]


@dataclass(frozen=True)
class Case:
    """One choice of every axis."""

    choices: Mapping[str, Choice]

    def __str__(self) -> str:
        return " ".join(f"{axis}={choice.label}" for axis, choice in self.choices.items())

    def merged(self, phase: str) -> dict[str, Any]:
        return {key: value for choice in self.choices.values() for key, value in getattr(choice, phase).items()}


def cover(axes: Axes, strength: int, accepts: Callable[[Case], tuple[bool, Outcome]]) -> Iterator[tuple[Case, bool, Outcome]]:
    """Cases in which every combination of ``strength`` choices of different axes occurs, in one that ``accepts`` takes if there is any.

    Yields the case, whether it was accepted, and what else ``accepts`` returned. Combinations that no case tried was accepted with come
    in one that was not. The same every time.
    """
    rng = random.Random(0)
    missing = {
        combination: None  # an ordered set
        for names in itertools.combinations(axes, min(strength, len(axes)))
        for combination in itertools.product(*[[(name, k) for k in range(len(axes[name]))] for name in names])
    }
    known: dict[tuple[int, ...], tuple[bool, Outcome]] = {}
    while missing:
        wanted = dict(next(iter(missing)))
        candidates = []
        for _ in range(_TRIES):
            picked = {name: wanted.get(name, rng.randrange(len(choices))) for name, choices in axes.items()}
            gained = sum(all(picked[name] == k for name, k in combination) for combination in missing)
            candidates.append((gained, picked))
        # The plainest choices, those in front, are accepted most often: try them last, where nothing else was.
        candidates.sort(key=lambda candidate: -candidate[0])
        candidates.append((1, {name: wanted.get(name, 0) for name in axes}))
        for number, (_, picked) in enumerate(candidates):
            key = tuple(picked.values())
            case = Case({name: axes[name][k] for name, k in picked.items()})
            if key not in known:
                known[key] = accepts(case)
            accepted, outcome = known[key]
            if accepted or number == len(candidates) - 1:
                done = [c for c in missing if all(picked[name] == k for name, k in c)] if accepted else [next(iter(missing))]
                for combination in done:
                    del missing[combination]
                yield case, accepted, outcome
                break
