from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from genfast import info

# In about one process in ten, the first torch.exp that several threads share is wrong by 1.5e-4 (torch 2.13 by itself). A first one by a
# single thread prevents it.
torch.zeros(64).exp()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    # A GPU test cannot run without a GPU; everything else always runs.
    no_gpu = pytest.mark.skip(reason="torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(no_gpu)


@pytest.fixture(params=info.ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this machine has."""
    before = info.cpu_isa()
    if info.cpu_isa(request.param) != request.param:
        info.cpu_isa(before)
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    info.cpu_isa(before)
