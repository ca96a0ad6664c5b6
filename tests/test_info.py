"""What the wheel says of itself, and the noise on the host."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from genfast import _C, _library, info, reference


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("start", [0, 1, 7, 64])
def test_host_noise_is_the_operators(kind: str, start: int) -> None:
    seed, draw, stream, count = 2**62 + 5, 3, 2, 53
    expected = getattr(reference, kind)(torch.tensor([seed]), (1, start + count), draw=draw, stream=stream)[0, start:]
    got = getattr(_C, kind)(seed, count, draw=draw, stream=stream, start=start)
    assert got.dtype == np.float32 and got.tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed: got -1, supported: 0 to"),
        ({"draw": 2**32}, "draw: got 4294967296, supported: 0 to"),
        ({"stream": -2}, "stream: got -2, supported: 0 to"),
        ({"start": -3}, "start: got -3, supported: 0 or more"),
        ({"count": -4}, "count: got -4, supported: 0 or more"),
    ],
)
def test_host_noise_refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.normal(**{"seed": 1, "count": 2, **arguments})


def test_the_catalogue_names_operators_that_exist() -> None:
    kernels = _C.kernels()
    assert {(k["op"], k["backend"]) for k in kernels} >= {("noise", "cpu"), ("solver_step", "cpu")}
    assert {k["op"] + "_" for k in kernels} <= set(_library.loaded.schemas)
    assert ("cuda" in {k["backend"] for k in kernels}) == bool(_C.cuda_archs) == (_library.loaded.directory / "libgenfast_cuda.so").exists()


def test_the_instruction_set_can_be_chosen_and_is_reported() -> None:
    before = info.cpu_isa()
    try:
        assert info.cpu_isa("baseline") == "baseline" == info.facts()["CPU ISA"].split()[0]
    finally:
        assert info.cpu_isa(before) == before
    with pytest.raises(ValueError, match="level: got 'mmx', supported: baseline, avx2, avx512"):
        info.cpu_isa("mmx")


def test_brief_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--brief"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert info.main([]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "CUDA archs", "CPU ISA", "solver_step"):
        assert word in out


def test_rooms_are_there_after_the_import_and_not_before_they_are_named() -> None:
    code = """
import sys, genfast
assert not [name for name in ("genfast.compat", "genfast.train", "genfast.models", "diffusers") if name in sys.modules]
print(genfast.compat.stylegan.install.__name__, genfast.nn.ConvBlock.__name__, "train" in dir(genfast), "sdpa" in dir(genfast.compat))
try:
    genfast.samplerz
except AttributeError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["install ConvBlock True True", "module 'genfast' has no attribute 'samplerz'"]


def test_a_process_of_its_own_sees_the_kernels() -> None:
    """Nothing else has imported the operators there."""
    command = [sys.executable, "-m", "genfast.info", "--brief"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"CPU kernels {_library.loaded.cpu} ({info.cpu_isa()})" in said
