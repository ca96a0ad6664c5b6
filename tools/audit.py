"""Gate: the kernel libraries use torch through its stable ABI only, from torch 2.10 on, and hide their own symbols."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import genfast._C

MINIMUM = "2.10"


def main() -> int:
    directory = Path(genfast._C.__file__).parent
    libraries = sorted(directory.glob("libgenfast_*.so"))
    failed = not libraries
    for library in libraries:
        report = subprocess.run(
            [sys.executable, "-m", "torch_abi_audit", str(library), "--check", "torch"], capture_output=True, text=True, check=False
        )
        print(report.stdout.strip() or report.stderr.strip())
        failed |= report.returncode != 0
        symbols = subprocess.run(["nm", "-DC", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
        # A weak symbol of an AVX-512 unit could be picked for a machine without AVX-512, in any library of the process.
        weak = [line for line in symbols.splitlines() if " W " in line or " V " in line]
        if weak:
            print(f"{library.name}: weak symbols are exported: {weak[:5]}")
            failed = True
    print("audit:", "FAILED" if failed else f"ok, {len(libraries)} libraries, torch {MINIMUM} or newer")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
