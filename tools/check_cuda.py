"""Gate: every .cu of a build compiles without register spills or a stack frame in any kernel, and without a warning: ptxas warns when it
has to serialise wgmma. Units named *_hopper* are for 90a alone; their machine code holds wgmma, no access to local memory, and the softmax
where products run beside it. Kernels with specified bits hold no fused multiply-add and move 16 bytes at a time.

    python tools/check_cuda.py [BUILD]     BUILD: the folder of a Ninja build, the newest in build/ by default

The build's own commands run once more, which takes no time where ccache still has what they gave. A build without CUDA has nothing to
check, and the script says so.
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
SPECIFIED = ["noise", "solver_step"]
_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")


def commands(build: Path) -> dict[Path, list[str]]:
    """The command that compiles each .cu of a build."""
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "ninja"
    listing = subprocess.run([ninja, "-C", str(build), "-t", "commands"], capture_output=True, text=True, check=True).stdout
    found = [shlex.split(line) for line in listing.splitlines() if " -x cu -c " in line]
    return {Path(command[command.index("-c") + 1]): command for command in found}


def compile_again(build: Path, command: list[str]) -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as scratch:
        command = list(command)
        for option, name in (("-o", "unit.o"), ("-MF", "unit.d")):
            command[command.index(option) + 1] = f"{scratch}/{name}"
        run = subprocess.run(command, cwd=build, capture_output=True, text=True, check=False)
    log = run.stdout + run.stderr
    if run.returncode:
        return False, log
    architectures = sorted({arch for _, arch in _ENTRY.findall(log)})
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spills = [line.strip() for line in log.splitlines() if re.search(r"[1-9]\d* bytes (stack frame|spill)", line)]
    warnings = [line.strip() for line in log.splitlines() if "warning" in line.lower()]
    summary = f"{' '.join(architectures)}: {len(registers)} kernels, at most {max(registers, default=0)} registers"
    faults = [f"{name}: " + "; ".join(lines) for name, lines in (("SPILLS", spills), ("WARNINGS", warnings)) if lines]
    return not faults and bool(registers), "; ".join([summary, *faults])


def check_machine_code(build: Path, command: list[str]) -> tuple[bool, str]:
    """`check_overlap` of a unit that is compiled to a cubin, by otherwise the same command."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as output:
        plain = [word for word in command if word not in ("-MD", "-Xptxas=-v")]
        for option in ("-MT", "-MF"):
            del plain[plain.index(option) : plain.index(option) + 2]
        plain[plain.index("-o") + 1], plain[plain.index("-c")] = output.name, "-cubin"
        subprocess.run(plain, cwd=build, check=True)
        faults = check_overlap(output.name)
    return not faults, "; ".join(faults) or "machine code as it should be"


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


def check_bits(build: Path, command: list[str]) -> tuple[bool, str]:
    """What the PTX of a kernel with specified bits says. ptxas expands divisions and square roots into exact sequences of its own."""
    flags = [word for word in command[: command.index("-MD")] if not word.startswith(("-Xptxas", "--generate-code"))]
    source = command[command.index("-c") + 1]
    run = subprocess.run([*flags, "-arch=compute_80", "-ptx", source, "-o", "-"], cwd=build, capture_output=True, text=True, check=False)
    fused = len(re.findall(r"\bfma\.", run.stdout))
    wide = len(re.findall(r"\bst\.global\.v4", run.stdout))
    return run.returncode == 0 and not fused and wide > 0, f"{fused} fused multiply-adds, {wide} 16-byte stores" + run.stderr


def main() -> int:
    ninja = sorted(ROOT.glob("build/*/build.ninja"), key=lambda path: path.stat().st_mtime)
    build = Path(sys.argv[1]) if len(sys.argv) > 1 else ninja[-1].parent
    units = commands(build)
    if not units:
        print(f"cuda: {build.name} holds no CUDA kernels (without nvcc they are left out), so none was checked")
        return 0
    failed = False

    def report(what: str, result: tuple[bool, str]) -> None:
        nonlocal failed
        ok, summary = result
        print(f"{what}: {summary if ok else 'FAILED: ' + summary}", flush=True)
        failed |= not ok

    for source, command in sorted(units.items()):
        name = str(source.relative_to(ROOT))
        report(name, compile_again(build, command))
        if source.stem in SPECIFIED:
            report(f"{name} PTX", check_bits(build, command))
        if "_hopper" in source.stem:
            report(f"{name} sm_90a", check_machine_code(build, command))
    missing = sorted(source.name for source in set((ROOT / "csrc").rglob("*.cu")) - set(units))
    report("units left out", (not missing, ", ".join(missing) or "none"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
