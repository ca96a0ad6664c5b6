"""bn_act over two processes equals one process with the whole batch: values, running statistics, derivatives to the third order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from genfast import ops, reference
from genfast.nn import ConvBlock

SIZES = (3, 1)  # samples of each rank
SHAPE = (5, 4, 3)
Ranks = tuple[list[list[list[Tensor]]], list[Tensor], list[str]]  # chains, a block's results, refusals


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch() -> Tensor:
    return draw(sum(SIZES), *SHAPE, seed=0) * 3 + torch.arange(sum(SIZES))[:, None, None, None]  # ranks with means far apart


def chain(x: Tensor, residual: Tensor, function: Callable[..., Tensor]) -> list[list[Tensor]]:
    """[what belongs to samples], [running statistics], [what is summed over ranks]. Every loss is the sum of the ranks' losses."""
    weight, bias = (1 + draw(5, seed=1)).requires_grad_(), draw(5, seed=2).requires_grad_()
    x, residual = x.clone().requires_grad_(), residual.clone().requires_grad_()
    running = [torch.zeros(5).double(), torch.ones(5).double()]
    y = function(x, weight, bias, *running, True, 0.3, act="tanh", residual=residual)
    of_samples, summed, loss = [y], [], (y**3).sum()
    for _ in range(3):
        first = torch.autograd.grad(loss, (x, residual, weight, bias), retain_graph=True)
        gx, gr, gw, gb = torch.autograd.grad(loss, (x, residual, weight, bias), create_graph=True)
        of_samples += [gx, gr, *first[:2]]
        summed += [gw, gb, *first[2:]]
        loss = (gx**2).sum() + (gr**2).sum()
    return [[t.detach() for t in group] for group in (of_samples, running, summed)]


def block(x: Tensor, convert: bool) -> list[Tensor]:
    torch.manual_seed(3)
    module: nn.Module = ConvBlock(5, 4, act="lrelu").double()
    if convert:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return [module(x).detach(), *(t.detach() for t in module.buffers()), module.eval()(x).detach()]


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SIZES))
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    x, residual = batch()[mine], draw(sum(SIZES), *SHAPE, seed=4)[mine]
    results = [chain(x, residual, lambda *a, f=f, **k: f(*a, **k, process_group=dist.group.WORLD)) for f in (ops.bn_act, reference.bn_act)]

    def over_ranks(t: Tensor) -> Tensor:
        return ops.bn_act(t, process_group=dist.group.WORLD)

    refusals = []
    for refused in (lambda: torch.func.jvp(over_ranks, (x,), (x,)), lambda: torch.compile(over_ranks, backend="eager", fullgraph=True)(x)):
        try:
            refusals.append(f"not refused: {refused()}")
        except Exception as error:
            refusals.append(str(error))
    torch.save((results, block(x, True), refusals), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Ranks]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    torch.multiprocessing.spawn(rank_main, (folder,), nprocs=len(SIZES))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(len(SIZES))]


@pytest.mark.parametrize("which", [0, 1], ids=["ops", "reference"])
def test_two_ranks_equal_one_process(ranks: list[Ranks], which: int) -> None:
    of_samples, running, summed = chain(batch(), draw(sum(SIZES), *SHAPE, seed=4), reference.bn_act)
    parts = [results[which] for results, _, _ in ranks]
    for k, want in enumerate(of_samples):
        torch.testing.assert_close(torch.cat([part[0][k] for part in parts]), want, rtol=1e-10, atol=1e-10)
    for part in parts:
        for got, want in zip(part[1], running, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
        assert all(torch.equal(a, b) for a, b in zip(part[1], parts[0][1], strict=True))  # the same bits on every rank
    for k, want in enumerate(summed):
        torch.testing.assert_close(sum(part[2][k] for part in parts), want, rtol=1e-10, atol=1e-9)


def test_a_converted_block(ranks: list[Ranks]) -> None:
    y, *buffers, evaluated = block(batch(), False)
    got = [block for _, block, _ in ranks]
    torch.testing.assert_close(torch.cat([g[0] for g in got]), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([g[-1] for g in got]), evaluated, rtol=1e-12, atol=1e-12)
    for g in got:
        torch.testing.assert_close(g[1:-1], buffers, rtol=1e-12, atol=1e-12)


def test_tangents_and_graphs_are_refused(ranks: list[Ranks]) -> None:
    for _, _, (tangent, graph) in ranks:
        assert tangent.startswith("process_group: got a tangent or a torch.func transform, supported: reverse mode")
        assert "torch.compiler.disable" in graph
