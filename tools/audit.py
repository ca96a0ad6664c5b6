"""Gate: the kernel libraries use torch through its stable ABI only, from torch 2.10 on, and keep their symbols to themselves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import genfast._C

ROOT = Path(__file__).resolve().parent.parent
EXPORTED = {"genfast_cpu_isa"}  # called by genfast.info through ctypes


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(kind, demangled name) of every defined symbol."""
    lines = subprocess.run(["nm", "-C", "--defined-only", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [(kind, name) for _, kind, name in (line.split(maxsplit=2) for line in lines.splitlines() if len(line.split(maxsplit=2)) == 3)]


def main() -> int:
    # What this environment runs, and what `make cuda` built.
    libraries = [
        *sorted(Path(genfast._C.__file__).parent.glob("libgenfast_*.so")),
        *sorted((ROOT / "build" / "cuda").glob("libgenfast_*.so")),
    ]
    failures = [] if libraries else ["no library was built"]
    for library in libraries:
        audit = Path(sys.executable).parent / "torch-abi-audit"
        report = subprocess.run([str(audit), str(library), "--check", "torch"], capture_output=True, text=True, check=False)
        print((report.stdout + report.stderr).strip())
        if report.returncode:
            failures.append(f"{library.name} is not torch-stable")
        names = {name for _, name in symbols(library, "-D") if not name.startswith(("std::", "typeinfo", "vtable", "_"))}
        if names - EXPORTED:
            failures.append(f"{library.name} exports {sorted(names - EXPORTED)[:5]}")
    # The linker may take a weak symbol of an AVX-512 unit for the whole library, where a machine without AVX-512 would run it.
    objects = [path for path in (ROOT / "build").rglob("*.o") if re.search("genfast_cpu_A", str(path))]
    for path in objects:
        weak = [name for kind, name in symbols(path) if kind in "WVu" and not name.startswith("DW.ref.")]  # which are pointers, not code
        if weak:
            failures.append(f"{path.name} has weak symbols: {weak[:3]}")
    print(f"audit: {len(libraries)} libraries, {len(objects)} AVX units:", "; ".join(failures) or "ok")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
