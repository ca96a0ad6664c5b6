"""Gate: every .cu compiles for the development architectures without register spills or a stack frame in any kernel, and without a
warning: ptxas warns when it has to serialise wgmma. Units named *_hopper* are for 90a alone; their machine code holds wgmma, no access to
local memory, and the softmax where products run beside it.
Kernels with specified bits hold no fused multiply-add and move 16 bytes at a time.

``--all`` compiles for the whole release list. Without nvcc there is nothing to check, and the script says so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVELOPMENT = ["80", "90a"]
RELEASE = ["75", "80", "86", "89", "90a", "100", "120"]
SPECIFIED = ["noise", "solver_step"]
# The flags of CMakeLists.txt that decide the code: keep the two in step.
FLAGS = ["-O3", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xcompiler=-fPIC,-ffp-contract=off"]


def compile_one(source: Path, arch: str) -> tuple[bool, str]:
    launcher = ["ccache"] if shutil.which("ccache") else []
    with tempfile.NamedTemporaryFile(suffix=".o") as output:
        kind = "-cubin" if "_hopper" in source.name else "-c"
        command = [*launcher, "nvcc", *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", kind, str(source), "-o", output.name]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        idle = check_overlap(output.name) if kind == "-cubin" and not run.returncode else []
    log = run.stdout + run.stderr
    if run.returncode:
        return False, log
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [line.strip() for line in log.splitlines() if re.search(r"[1-9]\d* bytes (stack frame|spill)", line)]
    warnings = [line.strip() for line in log.splitlines() if "warning" in line.lower()]
    summary = f"{len(registers)} kernels, at most {max(registers, default=0)} registers"
    found = (("SPILLS", spills), ("WARNINGS", warnings), ("MACHINE CODE", idle))
    faults = [f"{name}: " + "; ".join(lines) for name, lines in found if lines]
    return not faults and bool(registers), "; ".join([summary, *faults])


def check_overlap(cubin: str) -> list[str]:
    """Faults in the machine code of warp-specialised kernels.

    In their loop two groups of wgmma are under way; exponentials belong between the wait for the first (one group may still run: 0x1)
    and the wait that follows. ptxas is free to move that second wait in front of them.
    """
    disassembler = Path(sys.executable).parent.parent.glob("lib/python3*/site-packages/nvidia/cu*/bin/nvdisasm")
    tool = shutil.which("nvdisasm") or next((str(path) for path in disassembler), None)
    if tool is None:
        return ["nvdisasm was not found, so no machine code was read"]
    text = subprocess.run([tool, cubin], capture_output=True, text=True, check=True).stdout
    faults = []
    for name, code in re.findall(r"^\.text\.(\S+):$(.*?)(?=^\.text\.|\Z)", text, re.MULTILINE | re.DOTALL):
        beside = re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1(.*?)WARPGROUP\.DEPBAR", code, re.DOTALL)
        exponentials = beside.group(1).count("MUFU.EX2") if beside else 0
        if "HGMMA" not in code or re.search(r"\b(LDL|STL)\b", code) or exponentials < 32:
            faults.append(f"{name}: {code.count('HGMMA')} HGMMA, {exponentials} exponentials beside products")
    return faults or ([] if ".text." in text else ["no kernel was found"])


def check_bits(source: Path) -> tuple[bool, str]:
    """What the PTX of a kernel with specified bits says. ptxas expands divisions and square roots into exact sequences of its own."""
    command = ["nvcc", *(flag for flag in FLAGS if "ptxas" not in flag), "-arch=compute_80", "-ptx", str(source), "-o", "-"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    fused = len(re.findall(r"\bfma\.", run.stdout))
    wide = len(re.findall(r"\bst\.global\.v4", run.stdout))
    return run.returncode == 0 and not fused and wide > 0, f"{fused} fused multiply-adds, {wide} 16-byte stores" + run.stderr


def main() -> int:
    if not shutil.which("nvcc"):
        print("cuda: nvcc was not found, so no kernel was compiled")
        return 0
    failed = False
    for op in SPECIFIED:
        source = ROOT / f"csrc/ops/{op}/{op}.cu"
        ok, summary = check_bits(source)
        print(f"{source.relative_to(ROOT)} PTX: {summary if ok else 'FAILED: ' + summary}")
        failed |= not ok
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        archs = RELEASE if "--all" in sys.argv else DEVELOPMENT
        for arch in ["90a"] if "_hopper" in source.name else archs:
            ok, summary = compile_one(source, arch)
            print(f"{source.relative_to(ROOT)} sm_{arch}: {summary if ok else 'FAILED: ' + summary}")
            failed |= not ok
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
