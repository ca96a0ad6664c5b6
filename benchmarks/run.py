"""``python -m benchmarks.run``: genfast, its reference, torch.compile and each peer that is installed, side by side in one process.

Rows go to benchmarks/results/<suite>-<device>.jsonl (or --out DIR); ``python -m benchmarks.report`` makes the tables from them.
A suite is a module with ``run(options)``, which yields a label and the rows of one case after the other.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import torch

from benchmarks import attention, gan, gan_training, qknorm, sampling, schedulers, steps, timing
from benchmarks.timing import Options, Row

ROOT = Path(__file__).resolve().parent.parent
SUITES = {
    "steps": steps.run,
    "sampling": sampling.run,
    "schedulers": schedulers.run,
    "gan": gan.run,
    "gan_training": gan_training.run,
    "attention": attention.run,
    "qknorm": qknorm.run,
}


def show(rows: list[Row], label: str) -> None:
    ours = next((row for row in rows if row["variant"] == "genfast"), None)
    if ours is None:
        print(f"{label}: {rows[0].get('growth_kib')} KiB")
        return
    share = f", {ours['share_of_copy']:.0%} of copy bandwidth" if "share_of_copy" in ours else ""
    print(f"{label}: {ours['median_us']:.1f} us{share}")
    for row in rows:
        if row is not ours:
            print(f"    {row['variant']:<16} {row['median_us']:>10.1f} us  {row['median_us'] / ours['median_us']:>6.2f}x")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="all", choices=[*SUITES, "all"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[torch.get_num_threads()], help="CPU only: time with each number of threads"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the rows")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, small shapes, no peers: shows that it runs, times nothing worth keeping"
    )
    given = parser.parse_args(arguments)
    command = "python -m benchmarks.run " + " ".join(sys.argv[1:] if arguments is None else arguments)
    command = re.sub(r" --out \S+", "", command).strip()  # where the rows went is not how they were made
    options = Options(given.device, given.threads if given.device == "cpu" else [0], given.filter, given.quick, command)
    for name, run in SUITES.items():
        for label, rows in run(options) if given.suite in (name, "all") else []:
            timing.append(given.out / f"{name}-{given.device}.jsonl", rows)
            show(rows, label)
    return 0


if __name__ == "__main__":
    sys.exit(main())
