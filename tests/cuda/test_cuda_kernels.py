"""On a GPU: the CUDA kernels give the CPU kernels' bits, and one captured launch replays every row of a table."""

from __future__ import annotations

import pytest
import torch
from emulator.step_cases import Case, cases, differing, run_operator, same_bits, tensors_of

from genfast import ops

pytestmark = pytest.mark.cuda
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("uniform", [False, True], ids=["normal", "uniform"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3, 5, 7), (2, 4, 64, 64), (2, 3, 333, 335), (3000, 8)], ids=str)
def test_noise(shape: tuple[int, ...], uniform: bool, dtype: torch.dtype) -> None:
    seeds = torch.arange(shape[0]) * (2**62 // shape[0]) + 11
    fill = ops.uniform if uniform else ops.normal
    for layout in [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]:
        options = {"draw": 2**32 - 1, "stream": 3, "dtype": dtype, "memory_format": layout}
        assert same_bits(fill(seeds.cuda(), shape, **options).cpu(), fill(seeds, shape, **options))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_solver_step(case: Case) -> None:
    given = tensors_of(case)
    host, device = given.clone(), given.clone("cuda")
    run_operator(torch.ops.genfast.solver_step_, case, host)
    run_operator(torch.ops.genfast.solver_step_, case, device)
    assert differing(device.clone("cpu"), host) == []


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_a_captured_step_replays_every_row(rescale: float) -> None:
    """Counter, coefficients and slots are read on the device: the graph holds none of them."""
    case = Case(shape=(4, 3, 32, 32), slots=4, guidance=3.0, rescale=rescale, terms=(((0, 0.9), (1, 0.2), (9, 0.1)),), watch=True)
    given = tensors_of(case)
    rows = 6
    given.coef = given.coef[1].repeat(rows, 1) * torch.linspace(0.5, 1.0, rows)[:, None]
    given.index = given.index[1].repeat(rows, 1)
    given.index[:, 0] = torch.arange(rows)  # another draw
    given.index[:, 9] = torch.tensor([0, 1, 0, 2, 3, 0])  # another slot
    host, device = given.clone(), given.clone("cuda")

    stream = torch.cuda.Stream()
    warm = given.clone("cuda")
    with torch.cuda.stream(stream):
        run_operator(torch.ops.genfast.solver_step_, case, warm)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_operator(torch.ops.genfast.solver_step_, case, device)
        device.counter.add_(1)

    device.counter.zero_()
    for row in range(rows):
        host.counter.fill_(row)
        run_operator(torch.ops.genfast.solver_step_, case, host)
        graph.replay()
    torch.cuda.synchronize()
    assert differing(device.clone("cpu"), host) == []
    assert device.counter.item() == rows


def test_a_launch_goes_to_the_current_stream() -> None:
    case = Case(shape=(8, 3, 256, 256))
    given = tensors_of(case)
    host, device = given.clone(), given.clone("cuda")
    run_operator(torch.ops.genfast.solver_step_, case, host)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        device.cond.mul_(2)
        run_operator(torch.ops.genfast.solver_step_, case, device)
    stream.synchronize()
    doubled = given.clone()
    doubled.cond.mul_(2)
    run_operator(torch.ops.genfast.solver_step_, case, doubled)
    assert differing(device.clone("cpu"), doubled) == []
    assert differing(device.clone("cpu"), host) != []
