"""Compiles the CUDA sources as C++ under the block emulator (docs/emulator.md).

Results are cached in build/emulator under a hash of everything that goes in.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "emulator"
OPS = (ROOT / "CMakeLists.txt").read_text().split("set(OPS ")[1].split(")")[0].split()
# -ffp-contract=off: the bits are specified. -fno-strict-aliasing: kernels read arrays through vector types, as CUDA lets them.
FLAGS = [
    *("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-ffile-prefix-map={ROOT}/="),
    *("-DGF_EMULATE", f"-I{ROOT / 'tests/emulator'}", f"-I{ROOT / 'csrc'}"),
]
SANITIZE = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer"]


def compiler() -> list[str]:
    return [os.environ.get("CXX", "c++")]


def _sources_hash(*more: str) -> str:
    digest = hashlib.sha256("\0".join(more).encode())
    for folder in (ROOT / "csrc", ROOT / "tests/emulator"):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _object(source: Path, flags: list[str]) -> str:
    """``source`` compiled, or what an equal text was compiled to: a planted bug costs the units that include it."""
    command = [*compiler(), *flags, "-x", "c++", str(source)]
    text = _run([*command, "-E", "-P"])
    target = CACHE / "objects" / f"{hashlib.sha256(chr(0).join([*flags, text]).encode()).hexdigest()[:24]}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.o")
        _run([*command, "-c", "-o", str(fresh)])
        os.replace(fresh, target)
    return str(target)


def _build(name: str, units: list[tuple[Path, list[str]]], link: list[str], flags: list[str]) -> Path:
    """Compile ``units`` (source, its own flags) and link them with ``link``; returns the cached result."""
    key = _sources_hash(name, *(str(part) for unit in units for part in unit), *link, *flags)
    target = CACHE / f"{key}-{name}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        for stale in CACHE.glob(f"*-{name}"):
            stale.unlink()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda unit: _object(unit[0], [*flags, *unit[1]]), units))
        _run([*compiler(), *flags, *objects, *link, "-o", f"{target}.new"])
        os.replace(f"{target}.new", target)
    return target


def library(*, sanitize: bool = False, mutation: tuple[str, str, str] | None = None, only: str = "") -> Path:
    """The operators as a torch library, in namespace genfast_emulator.

    ``mutation`` (file under csrc, text, replacement) plants a bug in the kernels, for the tests of the tests; where the file belongs to
    one operator, the library holds that one alone. ``only`` names one operator to build where the file belongs to all.
    """
    spec = importlib.util.find_spec("torch")
    assert spec and spec.submodule_search_locations
    torch = Path(spec.submodule_search_locations[0])
    cmake = (ROOT / "CMakeLists.txt").read_text()
    target = cmake.split('set(GENFAST_TORCH_TARGET "')[1].split('"')[0]
    registration = ["-DGENFAST_BACKEND_EMULATOR", f"-DTORCH_TARGET_VERSION={target}", "-isystem", str(torch / "include")]
    units: list[tuple[Path, list[str]]] = []
    kernels = _mutated(*mutation) if mutation else ROOT / "csrc"
    mutated = [only] if only else [op for op in OPS if mutation and mutation[0].startswith(f"ops/{op}/")]
    for op in mutated or OPS:
        units.append((ROOT / f"csrc/ops/{op}/{op}.cpp", registration))
        units += [(source, []) for source in sorted((kernels / f"ops/{op}").glob("*.cu"))]
    flags = [*FLAGS, *(SANITIZE if sanitize else [])]
    name = "-".join(filter(None, ["libgenfast_emulator", "asan" * sanitize, kernels.name.removeprefix("csrc")])) + ".so"
    return _build(name, units, ["-shared", str(torch / "lib/libtorch_cpu.so")], flags)


def _mutated(file: str, text: str, replacement: str) -> Path:
    source = (ROOT / "csrc" / file).read_text()
    assert text in source, f"{file} no longer contains {text!r}"
    folder = CACHE / f"mutant{hashlib.sha256(repr((file, text, replacement)).encode()).hexdigest()[:8]}"
    shutil.copytree(ROOT / "csrc", folder, dirs_exist_ok=True)
    (folder / file).write_text(source.replace(text, replacement))
    return folder


def self_test(*, sanitize: bool = False, program: str = "self_test") -> Path:
    """The program of self_test.cu or hopper_self_test.cu."""
    flags = [*FLAGS, *(SANITIZE if sanitize else [])]
    name = "-".join(filter(None, [program, "asan" * sanitize]))
    return _build(name, [(ROOT / f"tests/emulator/{program}.cu", [])], [], flags)


def asan_runtime() -> Path:
    """What LD_PRELOAD needs before Python loads a sanitized library."""
    found = subprocess.run([*compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return Path(found)
