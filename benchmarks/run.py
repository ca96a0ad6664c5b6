"""``python -m benchmarks.run``: genfast, its reference, torch.compile and each peer that is installed, side by side in one process.

Rows go to benchmarks/results/<suite>-<device>.jsonl (or --out DIR) as they come; ``python -m benchmarks.report`` makes tables of them.
A suite is a module with ``run(options)``, which yields a label and the rows of one case after the other. A case that fails is told at the
end, and the others go on. On a GPU every suite has a process of its own, which a kernel that hangs or destroys the context costs one case;
--minutes bounds the whole run; and every row carries its share of the ceilings, measured first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import attention, ceilings, gan, gan_training, qknorm, sampling, schedulers, steps, timing
from benchmarks.timing import Options, Row

ROOT = Path(__file__).resolve().parent.parent
Suite = Callable[[Options], Iterator[tuple[str, list[Row]]]]
SUITES: dict[str, Suite] = {
    "steps": steps.run,
    "sampling": sampling.run,
    "schedulers": schedulers.run,
    "gan": gan.run,
    "gan_training": gan_training.run,
    "attention": attention.run,
    "qknorm": qknorm.run,
}
# How a bounded run divides its time; what a suite leaves goes to those after it.
WEIGHTS = {"steps": 3, "sampling": 1, "schedulers": 2, "gan": 3, "gan_training": 4, "attention": 5, "qknorm": 2}
CASE_SECONDS = 120.0  # a case that takes longer hangs
GRACE_SECONDS = 15.0  # what a case under way may take beyond its suite's time


def _in_process(suite: Suite, options: Options, to: Connection) -> None:
    """A suite in a process of its own; what it yields and tells goes through ``to``."""
    options = replace(options, tell=lambda *message: to.send(message))
    try:
        for label, rows in suite(options):
            to.send(("rows", label, rows))
    except Exception as error:
        to.send(("failed", -1, f"{type(error).__name__}: {error}"))
        raise
    to.send(("end", 0, ""))


def supervised(name: str, suite: Suite, options: Options) -> Iterator[tuple[str, list[Row]]]:
    """The suite in another process; after a crash or a hang once more from the next case on."""
    spawn = multiprocessing.get_context("spawn")
    start = 0
    while True:
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_in_process, args=(suite, replace(options, start=start, tell=timing.Options.tell), theirs))
        process.start()
        theirs.close()
        under_way, failed = None, False  # the case that began, and whether it has been told
        try:
            while True:
                left = options.deadline + GRACE_SECONDS - time.monotonic()
                if not ours.poll(max(0.0, min(left, 3600.0 if under_way is None else CASE_SECONDS))):
                    kind = "late" if left < CASE_SECONDS else "failed"
                    options.tell(kind, -1, f"{name}: {under_way or 'a case'} was ended: it took too long")
                    failed = True
                    break
                kind, *message = ours.recv()
                if kind == "end":
                    return
                if kind == "rows":
                    yield message[0], message[1]
                    continue
                if kind == "begin":
                    start, under_way, failed = message[0] + 1, message[1], False
                else:
                    failed = failed or kind == "failed"
                    options.tell(kind, message[0], f"{name}: {message[1]}")
        except EOFError:
            if not failed:
                options.tell("failed", -1, f"{name}: the process ended" + (f" in {under_way}" if under_way else ""))
        finally:
            process.kill()
            process.join(10)
        if under_way is None or time.monotonic() > options.deadline:
            return


def show(rows: list[Row], label: str) -> None:
    ours = next((row for row in rows if row["variant"] == "genfast"), None)
    if ours is None:
        print(f"{label}: {rows[0].get('growth_kib')} KiB")
        return
    share = f", {ours['share_of_copy']:.0%} of copy bandwidth" if "share_of_copy" in ours else ""
    share = f", {ours['share_of_ceiling']:.0%} of {ours['ceiling']}" if "share_of_ceiling" in ours else share
    print(f"{label}: {ours['median_us']:.1f} us{share}", flush=True)
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
    parser.add_argument("--minutes", type=float, help="when to end, whatever is left; on a GPU 8, else no bound")
    parser.add_argument("--supervise", action="store_true", help="the suites in processes of their own on a CPU too")
    given = parser.parse_args(arguments)
    command = "python -m benchmarks.run " + " ".join(sys.argv[1:] if arguments is None else arguments)
    command = re.sub(r" --out \S+", "", command).strip()  # where the rows went is not how they were made
    told: dict[str, list[str]] = {"begin": [], "failed": [], "late": []}
    minutes = given.minutes or (8.0 if given.device == "cuda" else float("inf"))
    end = time.monotonic() + 60 * minutes
    options = Options(
        given.device, given.threads if given.device == "cpu" else [0], given.filter, given.quick, command, deadline=end,
        tell=lambda kind, number, text: told[kind].append(text),
    )  # fmt: skip
    apart = given.supervise or given.device == "cuda"
    measured: list[Row] = []
    for _, measured in supervised("ceilings", ceilings.run, options) if apart else []:
        timing.append(given.out / f"ceilings-{given.device}.jsonl", measured)
        print("; ".join(f"{row['variant']}: {value} {unit}" for row in measured for unit, value in list(row.items())[2:3]), flush=True)
    suites = [name for name in SUITES if given.suite in (name, "all") and (measured or not apart)]  # none where the device does not answer
    for k, name in enumerate(suites):
        now = time.monotonic()
        share = WEIGHTS[name] / sum(WEIGHTS[left] for left in suites[k:])
        own = replace(options, tried=[], deadline=now + max(0.0, end - now) * share)
        for label, rows in supervised(name, SUITES[name], own) if apart else SUITES[name](own):
            rows = [ceilings.share(row, measured) for row in rows] if measured else rows
            timing.append(given.out / f"{name}-{given.device}.jsonl", rows)
            show(rows, label)
    for kind, title in (("failed", "failed"), ("late", "left out for lack of time")):
        print("".join(f"{title}: {text}\n" for text in told[kind]), end="")
    return int(bool(told["failed"]))


if __name__ == "__main__":
    sys.exit(main())
