"""What the build asks of a machine before it starts: tools/build_backend.py as CMake and tools/setup.py run it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "build_backend.py"


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("capabilities", "archs"),
    [
        ([], ""),
        ([75], "75-real"),
        ([90], "90a-real"),
        ([80, 90], "80-real;90a-real"),
        ([121], "120-virtual"),  # newer than the compiler: the newest PTX
        ([87], "86-virtual"),
        ([70], ""),  # older than what the kernels ask for
        ([61, 89], "89-real"),
    ],
)
def test_architectures_fit_the_gpus(backend: ModuleType, capabilities: list[int], archs: str) -> None:
    assert backend.architectures(capabilities, [75, 80, 86, 89, 90, 100, 120]) == archs


def test_the_torch_of_this_environment_is_found() -> None:
    assert run("torch").stdout.strip() == str(Path(torch.__file__).parent)


@pytest.mark.parametrize(("version", "sentence"), [("2.9.1", "genfast: torch 2.9.1 is installed in "), (None, "there is none in ")])
def test_a_torch_that_does_not_do_is_told(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, sentence: str
) -> None:
    if version:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    with pytest.raises(SystemExit, match=sentence):
        backend.torch_folder()


def test_the_torch_of_the_environment_that_uv_builds_for_is_found(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text("__version__ = '2.10.0+cpu'\n")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: "/nowhere")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert backend.torch_folder() == folder


def test_a_missing_compiler_and_wrong_words_are_told(tmp_path: Path) -> None:
    assert run("toolchain").returncode == 0
    assert (
        "no C++ compiler was found; install g++ 11 or newer (Debian and Ubuntu: apt install g++"
        in run("toolchain", PATH=str(tmp_path)).stderr
    )
    assert run("toolchain", GENFAST_CUDA="maybe").stderr == "genfast: GENFAST_CUDA: got maybe, supported: ON, OFF or AUTO\n"
    assert "no nvcc was found; install the CUDA toolkit" in run("toolchain", GENFAST_CUDA="ON", CUDACXX=str(tmp_path / "nvcc")).stderr


def test_missing_headers_are_told(backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"the headers of Python 3\.\d+ \(Python.h\) are not in .*apt install python3-dev"):
        backend.check_toolchain()


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("genfast_setup", ROOT / "tools" / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOG", tmp_path / "setup.log")
    return module


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("cc1plus: error: writing: No space left on device", "genfast: the disk is full"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError(...)'", "genfast: pip could not reach its package index"),
        ("ERROR: No matching distribution found for numpy", "genfast: pip did not get a package that genfast needs"),
        ("[1/9] Building\na.cpp:3:1: error: expected ';'\nmore", "genfast: a.cpp:3:1: error: expected ';'\n"),
        ("genfast: torch 2.5.1 is installed in /x, supported: 2.10 or newer", "genfast: torch 2.5.1 is installed in /x, supported"),
        ("something else", "genfast: compiling failed: something else"),
    ],
)
def test_a_failed_stage_is_one_sentence(setup: ModuleType, output: str, sentence: str) -> None:
    with pytest.raises(SystemExit) as failed:
        setup.run("compiling", [sys.executable, "-c", f"print({output!r}); raise SystemExit(3)"])
    assert str(failed.value).startswith(sentence) and str(failed.value).endswith("(the whole output: setup.log)")
    assert output in setup.LOG.read_text()


def test_the_counter_of_a_build_is_shown(setup: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["-- genfast: CPU kernels only", *(f"  [{i}/8] Building CXX object {i}.o" for i in range(1, 9))]
    setup.run("building", [sys.executable, "-c", f"print({chr(10).join(lines)!r})"], follow=setup.follow_ninja)
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["building", "genfast: CPU kernels only", "compiling 8 files"]
    assert [line.split(",")[0].strip() for line in shown[3:]] == ["2 of 8", "4 of 8", "6 of 8", "8 of 8"]
