"""The twins of Hopper's instructions: layouts against the PTX ISA's text, a right kernel right, and each planted bug caught."""

from __future__ import annotations

import os
import subprocess

import pytest
from emulator import emulator_build

RIGHT, WRONG_NUMBERS, REFUSED = 0, 1, 2


def run(*arguments: object, seed: int = 0) -> subprocess.CompletedProcess[str]:
    command = [str(emulator_build.self_test(program="hopper_self_test")), *map(str, arguments)]
    environment = {**os.environ, "GENFAST_EMULATOR_SEED": str(seed)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_layouts_are_those_of_the_isa() -> None:
    """Swizzling modes: in an atom of 8 rows of 128 bytes unit u of row r lies at u ^ r; 64-byte rows turn by pairs, 32-byte rows by fours.

    Descriptor: bits 0-13 address / 16, 16-29 and 32-45 the offsets / 16, 62-63 the mode (1: 128 bytes, 2: 64, 3: 32).
    """
    lines = [line.split() for line in run("layout").stdout.splitlines()]
    modes = {128: 1, 64: 2, 32: 3}
    units = [tuple(map(int, line)) for line in lines if line[0] != "descriptor"]
    assert len(units) == 16 * (2 + 4 + 8)
    for size, row, unit, byte in units:
        rows_per_turn = 128 // size
        assert byte == row * size + 16 * (unit ^ (row // rows_per_turn) % (size // 16))
    for _, size, word in (line for line in lines if line[0] == "descriptor"):
        bits = int(word, 16)
        fields = [bits & 0x3FFF, bits >> 16 & 0x3FFF, bits >> 32 & 0x3FFF, bits >> 46 & 0xFFFF, bits >> 62]
        assert fields == [0x2C400 >> 4, 0x5800 >> 4, 8 * int(size) >> 4, 0, modes[int(size)]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("panel", [16, 32, 64])
def test_right_kernel(panel: int, seed: int) -> None:
    done = run(panel, seed=seed)
    assert done.returncode == RIGHT, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("bug", "verdict", "sentence"),
    [
        ("sums_not_waited", WRONG_NUMBERS, ""),
        ("released_early", WRONG_NUMBERS, ""),
        ("slot_not_waited", WRONG_NUMBERS, ""),
        ("ring_not_waited", REFUSED, "more threads arrive at a barrier than it counts"),
        ("store_not_waited", REFUSED, "a copy of its shared memory is still under way"),
        ("store_before_barrier", WRONG_NUMBERS, ""),
        ("not_swizzled", WRONG_NUMBERS, ""),
        ("not_initialised", REFUSED, "before it is initialised"),
        ("no_turn", REFUSED, "waits for ever at"),
    ],
)
def test_planted_bugs_are_caught(bug: str, verdict: int, sentence: str) -> None:
    """Under one of a few orders at least: some are races."""
    runs = [run(64, bug, seed=seed) for seed in range(6)]
    assert any(done.returncode == verdict and sentence in done.stderr for done in runs), [done.returncode for done in runs]
