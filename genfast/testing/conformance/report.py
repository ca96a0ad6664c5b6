"""What a comparison found, and how it is told."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .judge import Verdict

_SHOWN = 5


@dataclass(frozen=True)
class Result:
    """The verdict on one case. ``fused``: the drop-in's own steps ran. ``accepted``: stock took it; else the same error is asked for."""

    family: str
    case: str
    verdict: Verdict
    fused: bool
    accepted: bool


def tell(family: str, results: Iterable[Result]) -> bool:
    """Print a family's line, and its first failures; whether it has none."""
    results = list(results)
    accepted = [r for r in results if r.accepted]
    failures = [r for r in results if r.verdict.problem]
    worst = max((r.verdict.worst for r in accepted), default=0.0)
    fused = sum(r.fused for r in accepted)
    refused = len(results) - len(accepted)
    verdict = f"{len(failures)} FAILED" if failures else "ok"
    print(
        f"{family:36s} {len(accepted):5d} cases, {fused:5d} fused, {refused:4d} refused alike, worst {worst:8.3g} of the bound: {verdict}"
    )
    for failure in failures[:_SHOWN]:
        print(f"    {failure.verdict.problem}\n        {failure.case}")
    return not failures


def write(path: Path, results: Iterable[Result]) -> None:
    """One JSON object a line for every case."""
    with path.open("w") as file:
        for r in results:
            worst = r.verdict.worst if math.isfinite(r.verdict.worst) else None
            row = {
                "family": r.family,
                "case": r.case,
                "worst": worst,
                "problem": r.verdict.problem,
                "fused": r.fused,
                "accepted": r.accepted,
            }
            file.write(json.dumps(row) + "\n")
