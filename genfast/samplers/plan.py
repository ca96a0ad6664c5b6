"""A solver is data: a plan is a list of small coefficient rows, one per evaluation of the network, that one kernel executes.

docs/solver-step.md says what the kernel does with a row, docs/solvers.md how the solvers write theirs. Everything here is float64
on the host, so that a plan can be printed, plotted and tested without a network or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfast.ops.solver_step import pack_row
from genfast.schedules import NoiseSchedule, Point

from .arguments import check_denoiser
from .denoiser import Denoiser

# What an output is a combination of: "x" the state, "d" the denoised prediction, "u" that of the unconditional half alone,
# "m" the network's output, "noise" standard normal, "learned" noise of the network's own standard deviation, a slot's number.
Term = str | int
Terms = Mapping[Term, float]

_REGULAR = "a grid that starts at alpha > 0 and evaluates at sigma > 0"
MAX_SLOTS, MAX_HISTORY, MAX_OUTPUTS = 16, 6, 3  # csrc/ops/solver_step/params.h


@dataclass(frozen=True)
class Row:
    """One evaluation of the network and what is written after it.

    The network is evaluated on slot 0, which lies at ``point``. ``outputs`` maps a slot to the linear combination written to it.
    ``draw`` numbers the row's noise (docs/noise.md), from 1; draw 0 is the initial latent. ``denoised`` is the slot that holds
    the row's denoised prediction afterwards, where one was asked for.
    """

    point: Point
    outputs: Mapping[int, Terms]
    draw: int = 0
    denoised: int | None = None

    @property
    def noisy(self) -> bool:
        return any("noise" in terms or "learned" in terms for terms in self.outputs.values())

    @property
    def learned(self) -> bool:
        return any("learned" in terms for terms in self.outputs.values())

    @property
    def unconditional(self) -> bool:
        return any("u" in terms for terms in self.outputs.values())

    @property
    def reads(self) -> list[int]:
        """The slots read besides the state, in order of first use."""
        return list(dict.fromkeys(key for terms in self.outputs.values() for key in terms if isinstance(key, int)))


@dataclass(frozen=True)
class Plan:
    """The rows of one solver on one grid. The initial state is ``scale`` times standard normal noise, at the first row's point.

    ``noise_slot`` is the slot that the caller fills with noise before a row that reads it; None: the kernel makes the noise.
    """

    name: str
    noise: NoiseSchedule
    rows: Sequence[Row]
    slots: int
    scale: float
    noise_slot: int | None = None
    uncond_slot: int | None = None  # holds the denoised prediction of the unconditional half, for rows that read it

    def with_denoised(self) -> Plan:
        """The same plan, every row of which leaves its denoised prediction in a slot (`Row.denoised`)."""
        rows, extra = [], 0
        for row in self.rows:
            slot = next((slot for slot, terms in row.outputs.items() if dict(terms) == {"d": 1.0}), None)
            if slot is None:
                slot, extra = self.slots, 1
                row = replace(row, outputs={**row.outputs, slot: {"d": 1.0}})
            rows.append(replace(row, denoised=slot))
        return replace(self, rows=rows, slots=self.slots + extra)

    def with_noise_slot(self) -> Plan:
        """The same plan, reading its noise from one more slot instead of making it: for noise that comes from elsewhere."""
        if not any(row.noisy for row in self.rows):
            return self
        slot = self.slots
        return replace(self._renamed("noise", slot)._renamed("learned", slot), slots=slot + 1, noise_slot=slot)

    def with_uncond_slot(self) -> Plan:
        """The same plan, reading "u" from one more slot: for runs that evaluate both halves."""
        if not any(row.unconditional for row in self.rows):
            return self
        return replace(self._renamed("u", self.slots), slots=self.slots + 1, uncond_slot=self.slots)

    def without_uncond(self) -> Plan:
        """The same plan for a run without an unconditional half, where "u" is "d"."""
        return self._renamed("u", "d")

    def _renamed(self, old: Term, new: Term) -> Plan:
        rows = []
        for row in self.rows:
            outputs: dict[int, dict[Term, float]] = {}
            for slot, terms in row.outputs.items():
                out = outputs[slot] = {key: c for key, c in terms.items() if key != old}
                if old in terms:
                    out[new] = out.get(new, 0.0) + terms[old]
            rows.append(replace(row, outputs=outputs))
        return replace(self, rows=rows)

    def table(self) -> str:
        """The plan as text: one line per row with its time, alpha, sigma and outputs."""
        lines = [f"{self.name}: {len(self.rows)} evaluations, {self.slots} slots, initial scale {self.scale:g}"]
        lines.append(f"{'row':>4} {'time':>10} {'alpha':>9} {'sigma':>9}  outputs")
        for k, row in enumerate(self.rows):
            outputs = []
            for slot, terms in row.outputs.items():
                parts = [f"{c:+.6g} {_label(key)}" for key, c in terms.items()]
                outputs.append(f"s{slot} = {' '.join(parts) or '0'}")
            point = row.point
            lines.append(f"{k:>4} {point.time:>10.5g} {point.alpha:>9.6f} {point.sigma:>9.5g}  {'; '.join(outputs)}")
        return "\n".join(lines)

    def plot(self, target: str | PathLike[str] | Any) -> Any:
        """Draw the plan's sigmas and the coefficients of its next state; ``target`` is a file to write or a matplotlib Axes.

        Returns the Axes. Needs matplotlib.
        """
        ax: Any = target
        if isinstance(target, str | PathLike):
            from matplotlib.figure import Figure

            ax = Figure(figsize=(8, 4.5), layout="constrained").add_subplot()
        k = np.arange(len(self.rows))
        ax.semilogy(k, [self.noise.sigma_of(row.point) for row in self.rows], "k.-", label="sigma")
        ax.set(title=self.name, xlabel="row", ylabel="sigma")
        right = ax.twinx()
        for key in dict.fromkeys(key for row in self.rows for key in row.outputs[0]):
            right.plot(k, [row.outputs[0].get(key, math.nan) for row in self.rows], ".-", alpha=0.6, label=_label(key))
        right.set_ylabel("coefficients of the next state")
        ax.figure.legend(loc="outside right upper")
        if isinstance(target, str | PathLike):
            ax.figure.savefig(target)
        return ax

    def compile(
        self,
        den: Denoiser,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        guidance: Sequence[float] | float = 1.0,
        guidance_rescale: float = 0.0,
        clip: float | None = None,
        threshold: float | None = None,
        max_threshold: float = math.inf,
        model_input: bool = True,
        denoised_slot: int | None = None,
    ) -> Program:
        """Pack the rows for the kernel, for one denoiser.

        ``dtype`` is the state's; ``guidance`` one scale or one per row; ``model_input`` whether the kernel writes the next input of
        the network; ``denoised_slot`` where the denoised prediction goes first, for the rows to read in place of the network's output. The
        other arguments are those of `Sampler`. Raises ValueError where the denoiser cannot convert a row's point.
        """
        check_denoiser(den)
        scales = [float(guidance)] * len(self.rows) if isinstance(guidance, int | float) else [float(g) for g in guidance]
        c_in = [den.c_in(row.point) for row in self.rows]
        converts = [den.convert(row.point) for row in self.rows]
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def table(packed: list[tuple[list[float], list[int]]]) -> Table:
            coef = torch.tensor([floats for floats, _ in packed], dtype=wide, device=device)
            return coef, torch.tensor([ints for _, ints in packed], dtype=torch.int64, device=device)

        shaping: dict[str, Any] = {"clip": clip or 0.0, "rescale": guidance_rescale}
        shaping |= {"quantile": threshold or 0.0, "max_threshold": max_threshold}
        denoised = uncond = None
        if self.uncond_slot is not None:
            uncond = table([pack_row(convert=convert, outputs={self.uncond_slot: {"d": 1.0}}) for convert in converts])
        if denoised_slot is not None:
            write: dict[int, Terms] = {denoised_slot: {"d": 1.0}}
            denoised = table([pack_row(convert=c, outputs=write, guidance=g, **shaping) for c, g in zip(converts, scales, strict=True)])
            converts, shaping = [(0.0, 1.0)] * len(self.rows), {}
        main = [
            pack_row(
                convert=convert,
                outputs=row.outputs,
                guidance=g,
                next_c_in=next_c_in if model_input else 0.0,
                draw=row.draw,
                **shaping,
            )
            for row, convert, g, next_c_in in zip(self.rows, converts, scales, [*c_in[1:], 0.0], strict=True)
        ]
        coef, index = table(main)
        times = torch.tensor([den.time_value(row.point) for row in self.rows], dtype=torch.float32, device=device)
        return Program(coef, index, times, c_in, denoised, uncond)


Table = tuple[Tensor, Tensor]  # coefficients (rows, 40) float32, float64 for a float64 state; integers (rows, 12) int64


@dataclass(frozen=True)
class Program:
    """A plan packed for the kernel."""

    coef: Tensor  # the rows: a `Table`
    index: Tensor
    times: Tensor  # (rows,) float32, what the network is fed
    c_in: list[float]  # of every row's point
    denoised: Table | None = None  # executed before them on both halves: writes the denoised prediction to its slot
    uncond: Table | None = None  # executed before them on the unconditional half: writes its denoised prediction to `Plan.uncond_slot`


def _label(term: Term) -> str:
    return term if isinstance(term, str) else f"s{term}"


def assemble(name: str, noise: NoiseSchedule, rows: Iterable[Row]) -> Plan:
    """Number the noise, drop the terms that are exactly zero, and check what a solver yielded.

    Raises ValueError for a coefficient that is not finite, a slot read before it is written, or a row the kernel cannot hold.
    """
    try:
        with np.errstate(all="ignore"):  # what is not finite is found below, with the row it is in
            rows = list(rows)
    except ZeroDivisionError:
        raise ValueError(f"solver: got {name!r} on a grid that it divides by zero on, supported: {_REGULAR}") from None
    done: list[Row] = []
    written = {0}
    for k, row in enumerate(rows):
        outputs = {slot: {key: float(c) for key, c in terms.items() if c != 0} for slot, terms in sorted(row.outputs.items())}
        row = Row(row.point, outputs)
        row = replace(row, draw=k + 1 if row.noisy else 0)
        if not all(math.isfinite(c) for terms in outputs.values() for c in terms.values()):
            raise ValueError(f"solver: got {name!r} with a coefficient that is not finite in row {k}, supported: {_REGULAR}")
        unwritten = [slot for slot in row.reads if slot not in written]
        if 0 not in outputs or unwritten:
            what = f"reads slots {unwritten} before they are written" if unwritten else "does not write the state, slot 0"
            raise ValueError(f"solver: got {name!r}, whose row {k} {what}")
        if len(outputs) > MAX_OUTPUTS or len(row.reads) > MAX_HISTORY or max(outputs) >= MAX_SLOTS:
            raise ValueError(
                f"solver: got {name!r} with {len(outputs)} outputs, {len(row.reads)} slots read and slot {max(outputs)} in row {k}, "
                f"supported: {MAX_OUTPUTS} outputs, {MAX_HISTORY} slots read and slots below {MAX_SLOTS}"
            )
        written |= set(outputs)
        done.append(row)
    first = done[0].point
    # A variance preserving state has variance 1 at every time, as its networks were trained; elsewhere the data's share is negligible.
    return Plan(name, noise, done, max(written) + 1, 1.0 if noise.kind == "vp" else first.sigma)
