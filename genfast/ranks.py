"""Several processes that work as one, by torch.distributed: ``torchrun --nproc-per-node N -m genfast train ...``.

A batch is split by the samples' global numbers: rank r of R takes every R-th one, beginning with the r-th. Then the first half of each
rank's share is its share of the first half of the batch, and the groups of a minibatch's standard deviation are those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Sliceable = TypeVar("Sliceable", bound=Any)


def count() -> int:
    """How many processes there are; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which one this is; the first is 0, and writes the files."""
    return dist.get_rank() if count() > 1 else 0


def join(device: str) -> str:
    """Join the other processes that torchrun started, if it did. Returns this process's device: of several GPUs its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device


def leave() -> None:
    """End what `join` began."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def share(numbers: Sliceable) -> Sliceable:
    """This rank's part of a batch's numbers, seeds or samples."""
    part: Sliceable = numbers[rank() :: count()]
    return part


def average_(tensors: Iterable[Tensor]) -> None:
    """Replace each of some tensors by its mean over the ranks, in one all-reduce for each dtype."""
    if count() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for several in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in several])
        dist.all_reduce(flat)
        for tensor, mean in zip(several, (flat / count()).split([tensor.numel() for tensor in several]), strict=True):
            tensor.copy_(mean.view(tensor.shape))


def means(values: Iterable[float]) -> list[float]:
    """The mean of each number over the ranks."""
    if count() == 1:
        return [*values]
    flat = torch.tensor([*values], dtype=torch.float64, device=_device())
    dist.all_reduce(flat)
    found: list[float] = (flat / count()).tolist()
    return found


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        average_([value])
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # every rank's loss depends on this rank's value
        grad = grads[0].clone()
        average_([grad])
        return grad


def mean(value: Tensor) -> Tensor:
    """The mean of a value over the ranks, once differentiable: the gradient is that of the mean of the ranks' losses, times their number,
    which averaging the gradients divides by.
    """
    averaged: Tensor = value if count() == 1 else _Mean.apply(value)  # type: ignore[no-untyped-call]
    return averaged


def anyone(flag: bool) -> bool:
    """Whether it is so on any rank."""
    if count() == 1:
        return flag
    votes = torch.tensor(int(flag), device=_device())
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def gather(part: Tensor, total: Sequence[Any]) -> Tensor:
    """What each rank made of its `share` of ``total``, in the order of ``total``, on every rank."""
    if count() == 1:
        return part
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, part.cpu())
    like = next(tensor for tensor in parts if len(tensor))
    whole: Tensor = like.new_empty(len(total), *like.shape[1:])
    for number, tensor in enumerate(parts):
        whole[number :: count()] = tensor
    return whole.to(part.device)
