"""Gate: every .cu compiles without register spills or a stack frame in any kernel, and without a warning: ptxas warns when it has to
serialise wgmma. Units named *_hopper* are for 90a alone; their machine code holds wgmma, no access to local memory, and the softmax
where products run beside it. Kernels with specified bits hold no fused multiply-add and move 16 bytes at a time.

    python tools/check_cuda.py

Builds the CUDA library into build/cuda, for GENFAST_CUDA_ARCHS or the portable list, and reads what ptxas says on the way. A GPU is not
needed. Without nvcc there is nothing to check, and the script says so.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
SPECIFIED = ["noise", "solver_step"]
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")


def tool(name: str) -> str:
    """A program of the build: of this environment, of a package in it, or on PATH."""
    here = Path(sys.executable).parent
    packaged = sorted(here.parent.glob(f"lib/python3*/site-packages/nvidia/cu*/bin/{name}"))
    return shutil.which(name, path=f"{here}:{os.environ['PATH']}") or (str(packaged[0]) if packaged else name)


def build() -> tuple[bool, dict[Path, str]]:
    """Compile and link the CUDA library from scratch. Returns whether it linked, and what compiling each .cu printed."""
    define = {"CMAKE_BUILD_TYPE": "Release", "GENFAST_CUDA": "ON", "SKBUILD_PROJECT_VERSION": "0", "Python_EXECUTABLE": sys.executable}
    configure = [tool("cmake"), "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    subprocess.run([*configure, *(f"-D{name}={value}" for name, value in define.items())], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([tool("ninja"), "-C", BUILD, "-t", "clean"], check=True, stdout=subprocess.DEVNULL)
    said: dict[Path, str] = {}
    ninja = subprocess.Popen([tool("ninja"), "-C", BUILD, "-k", "0", "genfast_cuda"], stdout=subprocess.PIPE, text=True)
    assert ninja.stdout is not None
    unit = None
    for line in ninja.stdout:  # ninja prints a unit's line when it is done, and what it said after that
        if re.match(r"\[\d+/\d+\] ", line):
            found = re.search(r"\.dir/(csrc/\S+\.cu)\.o", line)
            unit = ROOT / found.group(1) if found else None
            print(line.split()[0], unit.name if unit else line.split()[-1], flush=True)
            if unit:
                said[unit] = ""
        elif unit:
            said[unit] += line
    return ninja.wait() == 0, said


def command_of(source: Path) -> list[str]:
    """The command that compiles a .cu of the build."""
    listing = subprocess.run([tool("ninja"), "-C", str(BUILD), "-t", "commands"], capture_output=True, text=True, check=True).stdout
    return next(shlex.split(line) for line in listing.splitlines() if f" -x cu -c {source} " in line)


def check_ptxas(log: str) -> tuple[bool, str]:
    """What ptxas said of one unit."""
    architectures = sorted({arch for _, arch in _ENTRY.findall(log)})
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [line.strip() for line in log.splitlines() if re.search(r"[1-9]\d* bytes (stack frame|spill)", line)]
    warnings = [line.strip() for line in log.splitlines() if re.search(r"warning|error|FAILED", line)]
    summary = f"{' '.join(architectures)}: {len(registers)} kernels, at most {max(registers, default=0)} registers"
    faults = [f"{name}: " + "; ".join(lines) for name, lines in (("SPILLS", spills), ("WARNINGS", warnings)) if lines]
    return not faults and bool(registers), "; ".join([summary, *faults])


def check_machine_code(source: Path) -> tuple[bool, str]:
    """`check_overlap` of what was built from one unit."""
    objects = list(BUILD.rglob(f"{source.name}.o"))
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([tool("cuobjdump"), "-xelf", "all", objects[0].absolute()], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        faults = [fault for cubin in sorted(Path(scratch).glob("*.cubin")) for fault in check_overlap(str(cubin))]
        none = not list(Path(scratch).glob("*.cubin"))
    return not faults and not none, "no machine code was found" if none else "; ".join(faults) or "machine code as it should be"


def check_overlap(cubin: str) -> list[str]:
    """Faults in the machine code of warp-specialised kernels.

    In their loop two groups of wgmma are under way; exponentials belong between the wait for the first (one group may still run: 0x1)
    and the wait that follows. ptxas is free to move that second wait in front of them.
    """
    text = subprocess.run([tool("nvdisasm"), cubin], capture_output=True, text=True, check=True).stdout
    faults = []
    for name, code in re.findall(r"^\.text\.(\S+):$(.*?)(?=^\.text\.|\Z)", text, re.MULTILINE | re.DOTALL):
        beside = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1(.*?)WARPGROUP\.DEPBAR", code, re.DOTALL)
        exponentials = beside.group(1).count("MUFU.EX2") if beside else 0
        if "HGMMA" not in code or re.search(r"\b(LDL|STL)\b", code) or exponentials < 32:
            faults.append(f"{name}: {code.count('HGMMA')} HGMMA, {exponentials} exponentials beside products")
    return faults or ([] if ".text." in text else ["no kernel was found"])


def check_bits(source: Path) -> tuple[bool, str]:
    """What the PTX of a kernel with specified bits says. ptxas expands divisions and square roots into exact sequences of its own."""
    command = command_of(source)
    flags = [word for word in command[: command.index("-MD")] if not word.startswith(("-Xptxas", "--generate-code"))]
    run = subprocess.run(
        [*flags, "-arch=compute_80", "-ptx", str(source), "-o", "-"], cwd=BUILD, capture_output=True, text=True, check=False
    )
    fused = len(re.findall(r"\bfma\.", run.stdout))
    wide = len(re.findall(r"\bst\.global\.v4", run.stdout))
    return run.returncode == 0 and not fused and wide > 0, f"{fused} fused multiply-adds, {wide} 16-byte stores" + run.stderr


def main() -> int:
    if not shutil.which("nvcc"):
        print("cuda: nvcc was not found, so no CUDA kernel was checked")
        return 0
    linked, units = build()
    failed = False

    def report(what: str, result: tuple[bool, str]) -> None:
        nonlocal failed
        ok, summary = result
        print(f"{what}: {summary if ok else 'FAILED: ' + summary}", flush=True)
        failed |= not ok

    for source, log in sorted(units.items()):
        name = str(source.relative_to(ROOT))
        report(name, check_ptxas(log))
        if source.stem in SPECIFIED:
            report(f"{name} PTX", check_bits(source))
        if "_hopper" in source.stem:
            report(f"{name} sm_90a", check_machine_code(source))
    report("library", (linked, "linked" if linked else "it was not linked"))
    missing = sorted(source.name for source in set((ROOT / "csrc").rglob("*.cu")) - set(units))
    report("units left out", (not missing, ", ".join(missing) or "none"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
