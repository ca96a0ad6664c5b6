"""What is asked of a model: which samples, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from genfast.checks import Rule, check, choice, each, finite, optional, settle, whole

_NAME = Rule("a name", lambda value: isinstance(value, str) and bool(value))
RANGES = {
    "solver": _NAME,
    "steps": whole(1, 10_000),
    "sigmas": optional(_NAME),
    "guidance_scale": finite(),
    "truncation": finite(),
    "batch": whole(1, 2**20),
    "impl": choice("fused", "reference"),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How samples are drawn. A family reads what concerns it; a generator in one pass has no solver, for example."""

    solver: str = "dpmpp_2m"  # a name in genfast.samplers.SOLVERS (diffusion)
    steps: int = 20  # steps of the solver (diffusion)
    sigmas: str | None = None  # grid of the solver, such as karras; None: its own (diffusion)
    guidance_scale: float = 2.5  # of classifier-free guidance, 1: off (diffusion with classes)
    truncation: float = 1.0  # how far a latent may be from the average one, 1: as far as it is (StyleGAN2)
    batch: int = 256  # samples drawn at once
    impl: Literal["fused", "reference"] = "fused"  # of the noise and the solver step; the bits are the same

    def __post_init__(self) -> None:
        settle(self, RANGES)


@dataclass(frozen=True)
class Request:
    """The samples with these seeds, and with these labels where a model has classes: sample i has seeds[i] and labels[i]."""

    seeds: Sequence[int]  # (N,), each in [0, 2^63)
    labels: Sequence[int] | None = None  # (N,), each the number of a class; None for a model without classes
    options: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self) -> None:
        for name in ("seeds", "labels"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(map(int, getattr(self, name))))
        check({"seeds": each(whole(0, 2**63 - 1)), "labels": optional(each(whole(0)))}, {"seeds": self.seeds, "labels": self.labels})
        if self.labels is not None and len(self.labels) != len(self.seeds):
            raise ValueError(f"labels: got {len(self.labels)} of them, supported: {len(self.seeds)}, one for each seed")


def every(labels: Sequence[int], seeds: Sequence[int], options: SamplingOptions | None = None) -> Request:
    """Every label with every seed, the seeds of the first label first."""
    pairs = [(label, seed) for label in labels for seed in seeds]
    return Request([seed for _, seed in pairs], [label for label, _ in pairs], options or SamplingOptions())
