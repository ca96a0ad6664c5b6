"""What is installed, what was built, what loaded and what did not: ``genfast info``."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Sequence

import torch

import genfast.ops  # noqa: F401  its import loads the kernels
from genfast import _C, __version__, _library
from genfast.failure import Parser

ISA_NAMES = ("baseline", "avx2", "avx512")


def cpu_isa(level: str | None = None) -> str:
    """The instruction set the CPU kernels use: "baseline", "avx2" or "avx512". With ``level``, switch to it where the machine has it.

    The results do not depend on it, bit for bit; the speed does. The environment variable GENFAST_CPU_ISA sets it at load.
    """
    if level is not None and level not in ISA_NAMES:
        raise ValueError(f"level: got {level!r}, supported: {', '.join(ISA_NAMES)}")
    if not _library.has_kernels("cpu"):
        return "none"
    library = ctypes.CDLL(str(_library.loaded.directory / "libgenfast_cpu.so"))
    return ISA_NAMES[library.genfast_cpu_isa(-1 if level is None else ISA_NAMES.index(level))]


def facts() -> dict[str, str]:
    """The lines of ``genfast info``, as a dictionary."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cuda_sizes = list(_library.loaded.directory.glob("libgenfast_*.so"))
    return {
        "genfast": __version__,
        "python": f"{platform.python_version()} ({sys.platform})",
        "torch": f"{torch.__version__} (built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'})",
        "threads": str(torch.get_num_threads()),
        "built with": f"g++ {_C.compiler}" + (f", nvcc {_C.nvcc_version}" if _C.nvcc_version else "; CPU kernels only"),
        "runs on": f"torch {_C.torch_target} and newer (stable ABI)",
        "CUDA archs": ", ".join(f"sm_{a}" for a in _C.cuda_archs.split(",") if a) or "none built",
        "CUDA devices": ", ".join(devices) or "none seen by torch",
        "CPU kernels": _library.loaded.cpu,
        "CPU ISA": cpu_isa() + (" (GENFAST_CPU_ISA)" if os.environ.get("GENFAST_CPU_ISA") else ""),
        "CUDA kernels": _library.loaded.cuda,
        "libraries": ", ".join(f"{p.name} {p.stat().st_size / 2**20:.1f} MiB" for p in sorted(cuda_sizes)) or "none",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print versions, what was built, what loaded and why not; ``--brief`` prints one line."""
    parser = Parser(prog="genfast info", description="What is installed, what was built, what loaded and why not.")
    parser.add_argument("--brief", action="store_true", help="one line")
    brief = parser.parse_args(arguments).brief
    lines = facts()
    if brief:
        print(
            f"genfast {lines['genfast']}: torch {torch.__version__}, CPU kernels {lines['CPU kernels']} ({lines['CPU ISA']}), "
            f"CUDA kernels {lines['CUDA kernels']}"
        )
        return 0
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    print("\nkernels")
    for k in _C.kernels():
        print(f"  {k['op']:<12} {k['backend']:<5} {', '.join(k['dtypes'])}; from {k['minimum']}; {k['notes']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
