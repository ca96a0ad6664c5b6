"""Sets an environment up: torch, what genfast needs, the kernels compiled. Prints a line a stage; says in one sentence what is missing.

    python tools/setup.py VENV [--dev]      --dev: also what the tests and the checks need

An environment that already has torch keeps it. Nothing is done that was done before: sources and options are compared with the last time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"  # where the environment has none
SPACE = 3 << 30  # bytes that an environment with a CPU build of torch and the build folder take
OPTIONS = ("GENFAST_CUDA", "GENFAST_CUDA_ARCHS", "CXX")
NATIVE = ("pyproject.toml", "CMakeLists.txt", "tools/build_backend.py", "tools/setup.py", "csrc")  # what the compiled half depends on
LOG = ROOT / "build" / "setup.log"

# What a failed command says, and what the user is told instead.
FAULTS = [
    (r"No space left on device|Errno 28", "the disk is full; an environment and the build take about 3 GB"),
    (
        r"NewConnectionError|Name or service not known|Temporary failure in name|Network is unreachable|ProxyError",
        "pip could not reach its package index; check the network, or name an index that can be reached (pip config)",
    ),
    (
        r"No matching distribution|Could not find a version|conflicting dependencies",
        "pip did not get a package that genfast needs; check the network and which index pip uses (pip config list)",
    ),
    (r"^.*(?:genfast|GENFAST_\w+): (?!CPU kernels|error).*$", None),  # genfast's own sentence, from CMake or the build backend
    (r"^.*\berror: (?!subprocess-exited|metadata-generation).*$", None),  # a compiler's or pip's first error
    (r"^ERROR: .*$", None),
]


def fail(sentence: str) -> None:
    sys.exit(f"genfast: {sentence}")


def main() -> None:
    venv, dev = Path(sys.argv[1]), "--dev" in sys.argv
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python reads this file too
        fail(f"Python {sys.version_info[0]}.{sys.version_info[1]} found, supported: 3.11 or newer (make PYTHON=python3.12 ...)")
    stamp = venv / ".genfast-setup.json"
    wanted = {"options": {name: os.environ.get(name, "") for name in OPTIONS}, "dev": dev}
    done = json.loads(stamp.read_text()) if stamp.exists() else {}
    sources = [path for name in NATIVE for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    compiled = done.get("options") == wanted["options"] and stamp.stat().st_mtime >= max(path.stat().st_mtime for path in sources)
    installed = done and done["dev"] >= dev
    if compiled and installed:
        return

    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("")
    python = venv / "bin" / "python"
    if not python.exists():
        run("", [sys.executable, ROOT / "tools/build_backend.py", "toolchain"])  # before anything is downloaded
        free = shutil.disk_usage(venv.absolute().parent).free
        if free < SPACE:
            fail(f"{free >> 20} MB are free beside {venv}, and an environment and the build take about {SPACE >> 20} MB")
        run(f"making {venv} with Python {sys.version_info[0]}.{sys.version_info[1]}", [sys.executable, "-m", "venv", venv])
    if not installed:
        install(python, dev)
    if not compiled:
        compile_kernels(venv)
    stamp.write_text(json.dumps({**wanted, "dev": dev or done.get("dev", False)}))
    run("", [python, "-m", "genfast.info", "--brief"], show=True)


def install(python: Path, dev: bool) -> None:
    """torch, the run-time dependencies and the build tools; with `dev` also what the tests need. torch is held at what there is."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    query = "import importlib.metadata as m; print(m.version('torch'))"
    found = subprocess.run([python, "-c", query], capture_output=True, text=True, check=False).stdout.strip()
    torch = f"torch=={found}" if found else TORCH
    needed = [name for name in project["project"]["dependencies"] if not name.startswith("torch")] + groups["build"]
    constraint = python.parent.parent / ".genfast-constraint"
    constraint.write_text(torch + "\n")
    run(f"installing {'what genfast needs beside ' if found else ''}{torch}", [*pip, "-c", constraint, torch, *needed])
    if dev:
        run("installing what the tests need", [*pip, "-c", constraint, *groups["dev"]])


def compile_kernels(venv: Path) -> None:
    """The editable build. The environment's build tools come first on PATH."""
    binaries = (venv / "bin").absolute()
    run("", [binaries / "python", ROOT / "tools/build_backend.py", "toolchain"])
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "CMAKE_GENERATOR": "Ninja"}
    pip = [binaries / "python", "-m", "pip", "--disable-pip-version-check", "install", "--verbose", "--no-build-isolation", "--no-deps"]
    run("building genfast", [*pip, "--editable", ROOT], environment=environment, follow=follow_ninja)


def follow_ninja(line: str, started: float) -> None:
    """Show ninja's counter: in place on a terminal, else a line now and then."""
    note = re.search(r"-- (genfast: .*)", line)
    if note:
        print(note.group(1), flush=True)
    count = re.search(r"\[(\d+)/(\d+)\] ", line)
    if not count:
        return
    now, total = int(count.group(1)), int(count.group(2))
    if now == 1:
        print(f"compiling {total} files", flush=True)
    left = (time.monotonic() - started) / now * (total - now)
    text = f"  {now} of {total}" + (f", about {left:.0f} s left" if now * 5 >= total and now < total else "")
    if sys.stdout.isatty():
        print(f"\r{text:40}", end="\n" if now == total else "", flush=True)
    elif now % max(total // 4, 1) == 0:
        print(text, flush=True)


def run(stage: str, command: list, show: bool = False, environment=None, follow=None) -> None:
    """Run a command under a line that says what it does. Its output goes to the log; of a failure one sentence is shown."""
    if stage:
        print(stage, flush=True)
    started, output = time.monotonic(), []
    with LOG.open("a") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n")
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
            errors="replace",
        )
        for line in process.stdout:
            log.write(line)
            output.append(line)
            if follow:
                follow(line, started)
            if show:
                print(line, end="", flush=True)
    if process.wait():
        text = "".join(output)
        for pattern, sentence in FAULTS:
            found = re.search(pattern, text, re.MULTILINE)
            if found:
                told = sentence or found.group(0).strip()
                break
        else:
            told = f"{stage or 'a check'} failed: {text.strip().splitlines()[-1] if text.strip() else process.returncode}"
        sys.exit(f"genfast: {told.removeprefix('genfast: ')}\n(the whole output: {LOG.relative_to(ROOT)})")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("genfast: the setup was interrupted; the same command goes on with it")
