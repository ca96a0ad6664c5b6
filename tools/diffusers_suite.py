"""diffusers' own scheduler tests, first with the stock classes, then with genfast's in their place before anything is collected.

    python tools/diffusers_suite.py PATH_TO_DIFFUSERS_CHECKOUT [pytest arguments]

Tests from the checkout, classes from the installed diffusers. Exits 1 if a test that passes with the stock classes does not pass with the
fused ones. As a pytest plugin, this file is what swaps the classes and writes the outcomes down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_OUTCOMES = "GENFAST_SUITE_OUTCOMES"  # the file that a run writes its outcomes to
_FUSED = "GENFAST_SUITE_FUSED"  # "1": with the fused classes

_outcomes: dict[str, str] = {}


def pytest_configure() -> None:
    import diffusers
    import diffusers.schedulers

    if os.environ[_FUSED] == "1":
        from genfast.compat.diffusers import CLASSES, FusedScheduler

        FusedScheduler.trace_from = 0  # the tests' tensors are small, and would be left to the stock step at first
        for name, fused in CLASSES.items():
            setattr(diffusers, name, fused)
            setattr(diffusers.schedulers, name, fused)


def pytest_runtest_logreport(report: Any) -> None:
    # A test passes where its call does; an outcome other than that of any phase is kept.
    if report.outcome != "passed" or (report.when == "call" and report.nodeid not in _outcomes):
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ[_OUTCOMES]).write_text(json.dumps(_outcomes))


def _run(checkout: Path, arguments: list[str], fused: bool) -> tuple[dict[str, str], str]:
    """The outcome of every test, by its node id, and what pytest printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            _OUTCOMES: str(file),
            _FUSED: str(int(fused)),
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
        }
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            Path(__file__).stem,
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "--disable-warnings",
            "-rN",
            *arguments,
        ]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if not file.exists():
            sys.exit(f"pytest did not finish:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(file.read_text()), done.stdout


def _counts(outcomes: dict[str, str]) -> str:
    values = list(outcomes.values())
    return ", ".join(f"{values.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))


def main() -> int:
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "tests" / "schedulers").is_dir():
        sys.exit(__doc__)
    checkout, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:] or ["tests/schedulers"]
    stock, _ = _run(checkout, arguments, fused=False)
    print("stock: ", _counts(stock), flush=True)
    fused, printed = _run(checkout, arguments, fused=True)
    print("fused: ", _counts(fused))
    worse = [test for test, outcome in stock.items() if outcome == "passed" and fused.get(test) != "passed"]
    if worse:
        print(printed[-8000:])
    for test in worse:
        print("regression:", test, fused.get(test, "not collected"))
    return 1 if worse or not stock else 0


if __name__ == "__main__":
    sys.exit(main())
