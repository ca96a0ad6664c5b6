"""The emulator itself: right kernels give right numbers under every schedule, and each planted bug is caught."""

from __future__ import annotations

import os
import subprocess

import pytest
from emulator import emulator_build

WRONG_NUMBERS, REFUSED = 1, 2


def run(kernel: str, bug: str = "none", *, seed: int = 0, sanitize: bool = False) -> subprocess.CompletedProcess[str]:
    program = emulator_build.self_test(sanitize=sanitize)
    environment = {**os.environ, "GENFAST_EMULATOR_SEED": str(seed)}
    return subprocess.run([program, kernel, bug], env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kernel", ["tiled_gemm", "rms_norm", "mma_gemm", "histogram", "through_shared"])
def test_right_kernels(kernel: str, seed: int) -> None:
    done = run(kernel, seed=seed)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kernel", "bug"),
    [
        ("tiled_gemm", "no_first_barrier"),
        ("tiled_gemm", "no_second_barrier"),
        ("rms_norm", "unwritten_shared"),
        ("mma_gemm", "no_warp_barrier"),
    ],
)
def test_missing_synchronisation_gives_wrong_numbers(kernel: str, bug: str, seed: int) -> None:
    done = run(kernel, bug, seed=seed)
    assert done.returncode == WRONG_NUMBERS, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kernel", "bug", "sentence"),
    [
        ("tiled_gemm", "divergent_barrier", "divergent barrier: thread"),
        ("rms_norm", "different_barriers", "divergent barrier: thread"),
        ("rms_norm", "shuffle_mask", "is not in the mask it passes to a warp operation"),
        ("rms_norm", "shuffle_missing_lane", "not every lane of its mask 0xffffffff arrived with that mask"),
        ("rms_norm", "shuffle_source", "outside its mask"),
    ],
)
def test_refused(kernel: str, bug: str, sentence: str, seed: int) -> None:
    done = run(kernel, bug, seed=seed)
    assert done.returncode == REFUSED, done.stdout + done.stderr
    assert sentence in done.stderr
    assert "self_test.cu" in done.stderr or "line" in done.stderr


@pytest.mark.parametrize(
    ("bug", "sentence"),
    [
        ("shared_not_allowed", "65536 bytes of shared memory, the kernel is allowed 49152"),
        ("shared_beyond_device", "102400 bytes of shared memory, the device gives a block 101376"),
    ],
)
def test_a_launch_that_a_device_refuses(bug: str, sentence: str) -> None:
    done = run("through_shared", bug)
    assert done.returncode == REFUSED and sentence in done.stderr, done.stdout + done.stderr


@pytest.mark.slow
def test_a_misaligned_access_is_caught() -> None:
    done = run("through_shared", "misaligned", sanitize=True)
    assert done.returncode != 0 and "misaligned address" in done.stderr and "self_test.cu:" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["tiled_gemm", "rms_norm", "mma_gemm", "histogram", "through_shared"])
def test_right_kernels_under_address_sanitizer(kernel: str) -> None:
    done = run(kernel, seed=1, sanitize=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["out_of_bounds", "shared_overrun"])
def test_out_of_bounds_is_caught(bug: str) -> None:
    done = run("tiled_gemm", bug, sanitize=True)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "tiled_gemm" in done.stderr
