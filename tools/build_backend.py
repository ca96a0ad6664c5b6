"""genfast's build backend: scikit-build-core's, behind checks that say in one sentence what is missing before anything is downloaded.

pip calls the hooks at the end of this file. CMake and tools/setup.py run it as a script:

    python tools/build_backend.py toolchain      is there a C++ compiler, are there Python's headers?
    python tools/build_backend.py torch          the folder of the torch to build against
    python tools/build_backend.py archs NVCC     the GPU architectures to build for on this machine, in CMake's form; empty without a GPU
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

OLDEST_TORCH = (2, 10)
OLDEST_GCC = 11
OLDEST_GPU = 75
PACKAGES = "(Debian and Ubuntu: apt install {}; Fedora: dnf install {})"


def check_toolchain() -> None:
    """End with one sentence unless there are a C++ compiler and Python's headers, and nvcc where GENFAST_CUDA=ON asks for it."""
    if not sys.platform.startswith("linux"):
        sys.exit(f"genfast: got the platform {sys.platform}, supported: Linux")
    compiler = next((found for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and (found := shutil.which(name))), None)
    if compiler is None:
        sys.exit(f"genfast: no C++ compiler was found; install g++ {OLDEST_GCC} or newer {PACKAGES.format('g++', 'gcc-c++')}")
    macros = subprocess.run([compiler, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False).stdout
    gcc = None if "__clang__" in macros else re.search(r"#define __GNUC__ (\d+)", macros)
    if gcc and int(gcc.group(1)) < OLDEST_GCC:
        sys.exit(f"genfast: {compiler} is g++ {gcc.group(1)}, supported: {OLDEST_GCC} or newer (CXX=... chooses another)")
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        packages = PACKAGES.format("python3-dev", "python3-devel")
        sys.exit(f"genfast: the headers of Python {version} (Python.h) are not in {include}; install them {packages}")
    cuda = os.environ.get("GENFAST_CUDA") or "AUTO"
    if cuda not in ("ON", "OFF", "AUTO"):
        sys.exit(f"genfast: GENFAST_CUDA: got {cuda}, supported: ON, OFF or AUTO")
    if cuda == "ON" and not shutil.which(os.environ.get("CUDACXX") or "nvcc"):
        sys.exit("genfast: GENFAST_CUDA=ON: no nvcc was found; install the CUDA toolkit or put its nvcc on PATH")


def torch_folder() -> Path:
    """The torch of this environment. pip hides it from an isolated build, so the environment's own folders are looked at too."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec and spec.origin else []
    sites = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:  # a virtual environment does not look into the user's packages
        sites.append(site.getusersitepackages())
    folders += [Path(folder, "torch") for folder in sites]
    environment = os.environ.get("VIRTUAL_ENV")  # what uv builds for
    if environment:
        folders += sorted(Path(environment).glob("lib/python3*/site-packages/torch"))
    for folder in folders:
        if (folder / "version.py").exists():
            version = re.search(r"__version__ = ['\"]([^'\"]+)", (folder / "version.py").read_text())
            got = version.group(1) if version else "of an unknown version"
            if tuple(map(int, re.findall(r"\d+", got)[:2])) < OLDEST_TORCH:
                supported = "supported: 2.10 or newer; pip install --upgrade torch"
                sys.exit(f"genfast: torch {got} is installed in {folder.parent}, {supported}")
            return folder
    return sys.exit(
        f"genfast: its kernels are compiled against an installed torch (2.10 or newer), and there is none in {sys.prefix}; "
        "pip install torch first, the build for your GPU or the CPU one, then install genfast again"
    )


def gpus() -> list[int]:
    """Compute capabilities (90 for 9.0) of the GPUs that the driver shows; [] without a driver. torch is not imported for it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = set()
    for device in range(count.value):
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.add(10 * major.value + minor.value)
    return sorted(found)


def architectures(capabilities: Iterable[int], known: Sequence[int]) -> str:
    """CMake's list for these GPUs: machine code where the compiler knows the GPU, else the newest PTX that it can make."""
    archs = []
    for capability in capabilities:
        older = [arch for arch in known if OLDEST_GPU <= arch <= capability]
        if capability in known and older:
            archs.append(f"{capability}a-real" if capability == 90 else f"{capability}-real")  # 90a: Hopper's own instructions
        elif older:
            archs.append(f"{max(older)}-virtual")
    return ";".join(archs)


def _main(words: list[str]) -> None:
    if words[0] == "toolchain":
        check_toolchain()
    elif words[0] == "torch":
        print(torch_folder())
    elif words[0] == "archs" and (torch_folder() / "lib" / "libtorch_cuda.so").exists():  # a CPU build of torch sees no GPU
        listing = subprocess.run([words[1], "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
        print(architectures(gpus(), [int(arch) for arch in re.findall(r"compute_(\d+)", listing)]))


if __name__ == "__main__":
    _main(sys.argv[1:])
else:
    try:
        from scikit_build_core import build as _build
        from scikit_build_core.build import *  # noqa: F403  the hooks of PEP 517 and PEP 660
    except ImportError:
        sys.exit(
            "genfast: a build without isolation uses the environment's own build tools; "
            "pip install 'scikit-build-core>=0.11' 'pybind11>=2.12' cmake ninja, then install genfast again"
        )

    def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
        check_toolchain()
        torch_folder()
        return _build.get_requires_for_build_wheel(config_settings)  # type: ignore[arg-type]

    def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
        check_toolchain()
        torch_folder()
        return _build.get_requires_for_build_editable(config_settings)  # type: ignore[arg-type]
