"""The arrows between the rooms of the house point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "genfast"

# What each room may import from genfast, besides itself. "" is the package's own modules without a folder.
ALLOWED = {
    "reference": set(),
    "schedules": set(),
    "_library": set(),
    "checks": set(),
    "device": set(),
    "failure": {"__version__", "checks"},
    "files": set(),
    "impl": {"ops", "reference"},
    "streams": set(),
    "ranks": set(),
    "request": {"checks"},
    "ops": {"_library", "reference"},
    "nn": {"impl", "ops", "ranks", "reference", "streams"},
    "models": {"checks", "files", "impl", "nn", "ops", "request", "samplers", "schedules", "streams"},
    "samplers": {"impl", "ops", "reference", "schedules", "streams"},
    "compat": {"ops", "reference", "samplers", "schedules"},
    "data": {"checks", "ops", "streams"},
    "explore": {"data", "files", "generate", "media", "models", "ops", "request", "streams"},
    "generate": {"__version__", "checks", "device", "media", "models", "ranks", "request"},
    "media": {"files"},
    "train": {"checks", "data", "files", "generate", "impl", "media", "models", "ranks", "samplers", "schedules", "streams"},
    "recipes": {"checks", "data", "device", "models", "ranks", "train"},
    "testing": {"compat", "ops", "reference", "_library"},
    "info": {"ops", "_library", "_C", "__version__", "failure"},
}


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_rooms(path: Path) -> set[str]:
    """The first name below genfast of every import in ``path``, absolute or relative."""
    package = ["genfast", *path.relative_to(ROOT).parts[:-1]]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names] if stem == "genfast" else [stem]
        rooms |= {name.split(".")[1] for name in names if name.startswith("genfast.")}
    return rooms


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_one_way(room: str) -> None:
    files = [p for p in sorted(ROOT.rglob("*.py")) if room_of(p) == room]
    assert files, f"genfast/{room} has no Python file: remove it from ALLOWED"
    for path in files:
        extra = imported_rooms(path) - ALLOWED[room] - {room}
        assert not extra, f"{path.relative_to(ROOT.parent)} imports genfast.{', genfast.'.join(sorted(extra))}"


def test_every_room_has_a_rule() -> None:
    free = {"__init__", "__main__", "cli", "demo"}  # these assemble the rest
    assert {room_of(p) for p in ROOT.rglob("*.py")} - free == set(ALLOWED)


def test_kernels_do_not_include_each_other() -> None:
    csrc = ROOT.parent / "csrc"
    for path in [*csrc.rglob("*.h"), *csrc.rglob("*.cpp"), *csrc.rglob("*.cu"), *csrc.rglob("*.cuh")]:
        includes = [line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('#include "')]
        for include in includes:
            if (path.name, include) == ("launch.h", "emulator.h"):
                continue  # the one door to tests/emulator, behind GF_EMULATE
            target = (path.parent / include).resolve()
            assert target.exists(), f"{path.relative_to(csrc)} includes {include}, which is not there"
            parts = target.relative_to(csrc).parts
            if path.is_relative_to(csrc / "core"):
                assert parts[0] == "core", f"{path.relative_to(csrc)} includes {include}: core includes no op"
            elif path.is_relative_to(csrc / "ops"):
                own = path.relative_to(csrc / "ops").parts[0]
                assert parts[0] == "core" or parts[1] == own, f"{path.relative_to(csrc)} includes {include}: an op includes no other op"
        if path.suffix == ".cu":
            assert "torch/" not in path.read_text(), f"{path.relative_to(csrc)} includes torch"
