"""``python -m genfast.testing.conformance``: print one line for every class and function; exit status 1 if any of them differs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from .report import Result, tell, write


def _diffusers(pattern: str, quick: bool) -> Iterator[tuple[str, Iterator[Result]]]:
    from . import diffusers

    for name, (stock, ours) in diffusers.classes().items():
        if pattern in name:
            yield name, diffusers.check_class(stock, ours, quick)


def _k_diffusion(pattern: str, quick: bool) -> Iterator[tuple[str, Iterator[Result]]]:
    from . import k_diffusion

    for name, (stock, ours) in k_diffusion.samplers().items():
        if pattern in name:
            yield name, k_diffusion.check_sampler(stock, ours, quick)


LIBRARIES = {"diffusers": _diffusers, "k-diffusion": _k_diffusion}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m genfast.testing.conformance", description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, help="compare with this one alone; it must be installed")
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="classes and functions whose name contains this")
    parser.add_argument("--quick", action="store_true", help="every choice of every axis once, not every pair of choices")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every case's verdict here, one JSON object a line")
    options = parser.parse_args(arguments)
    results: list[Result] = []
    well, missing = True, False
    for name in [options.library] if options.library else LIBRARIES:
        try:
            for family, found in LIBRARIES[name](options.filter, options.quick):
                cases = list(found)
                well &= tell(family, cases)
                results += cases
        except ImportError as error:
            print(error, file=sys.stderr)
            missing = True
    if options.json is not None:
        write(options.json, results)
    if not results and not (missing and options.library):
        print(
            f"conformance: got no case for filter {options.filter!r}, supported: a part of a name of an installed library", file=sys.stderr
        )
    return 0 if well and results and not (missing and options.library) else 1


if __name__ == "__main__":
    sys.exit(main())
