"""`torch_utils.misc`: what networks, augmentation and training loops need of it to run."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

nan_to_num = torch.nan_to_num
symbolic_assert = torch._assert


@functools.cache
def _constant(values: bytes, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.as_tensor(np.frombuffer(values, dtype=kind).reshape(shape).copy(), dtype=dtype, device=device)


def constant(
    value: Any,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """A tensor of ``value``, expanded to ``shape``; the same values are copied to a device once. Not to be written to."""
    values = np.asarray(value)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    result = _constant(values.tobytes(), values.dtype.str, values.shape, dtype, torch.device("cpu" if device is None else device))
    result = result if shape is None else result.expand(tuple(shape))
    return result if memory_format is None else result.contiguous(memory_format=memory_format)


def const_like(
    ref: Tensor,
    value: Any,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    """`constant` with the dtype and device of ``ref`` for those not given."""
    return constant(value, shape, ref.dtype if dtype is None else dtype, ref.device if device is None else device, memory_format)


@contextmanager
def suppress_tracer_warnings() -> Iterator[None]:
    """Without torch.jit's warnings about values that a trace makes constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def assert_shape(tensor: Tensor, ref_shape: Sequence[int | None]) -> None:
    """AssertionError unless ``tensor`` has the shape ``ref_shape``, where None is any size."""
    if tensor.ndim != len(ref_shape) or any(
        want is not None and int(got) != want for got, want in zip(tensor.shape, ref_shape, strict=True)
    ):
        raise AssertionError(f"tensor: got shape {tuple(tensor.shape)}, supported: {tuple(ref_shape)}")


def profiled_function(fn: _Function) -> _Function:
    """``fn``, named in torch's profiles."""

    @functools.wraps(fn)
    def profiled(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.profiler.record_function(fn.__name__):
            return fn(*args, **kwargs)

    return profiled  # type: ignore[return-value]


def named_params_and_buffers(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter, then every buffer, by name."""
    return [*module.named_parameters(), *module.named_buffers()]


def params_and_buffers(module: torch.nn.Module) -> list[Tensor]:
    """Every parameter, then every buffer."""
    return [t for _, t in named_params_and_buffers(module)]


def copy_params_and_buffers(src_module: torch.nn.Module, dst_module: torch.nn.Module, require_all: bool = False) -> None:
    """The values of ``src_module`` into the tensors of the same name of ``dst_module``; with ``require_all`` KeyError for a missing one."""
    source = dict(named_params_and_buffers(src_module))
    for name, t in named_params_and_buffers(dst_module):
        if name not in source and require_all:
            raise KeyError(name)
        if name in source:
            with torch.no_grad():
                t.copy_(source[name])


def ddp_sync(module: torch.nn.Module, sync: bool) -> AbstractContextManager[Any]:
    """Without ``sync`` a DistributedDataParallel gathers no gradients inside."""
    if sync or not isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return nullcontext()
    context: AbstractContextManager[Any] = module.no_sync()
    return context


class InfiniteSampler(torch.utils.data.Sampler[int]):
    """Indices of ``dataset`` without end: rank r takes each num_replicas-th; shuffled by swaps within a window of a share of its length."""

    def __init__(
        self, dataset: Any, rank: int = 0, num_replicas: int = 1, shuffle: bool = True, seed: int = 0, window_size: float = 0.5
    ) -> None:
        self.dataset, self.rank, self.num_replicas = dataset, rank, num_replicas
        self.shuffle, self.seed, self.window_size = shuffle, seed, window_size

    def __iter__(self) -> Iterator[int]:
        order = np.arange(len(self.dataset))
        random = np.random.RandomState(self.seed)
        window = 0
        if self.shuffle:
            random.shuffle(order)
            window = int(np.rint(order.size * self.window_size))
        index = 0
        while True:
            i = index % order.size
            if index % self.num_replicas == self.rank:
                yield int(order[i])
            if window >= 2:
                j = (i - random.randint(window)) % order.size
                order[i], order[j] = order[j], order[i]
            index += 1


def print_module_summary(module: torch.nn.Module, inputs: Sequence[Any]) -> Any:
    """Prints parameters, buffers and result of each submodule for ``inputs``; returns what ``module(*inputs)`` does."""
    rows: list[tuple[str, int, int, str]] = []

    def note(name: str, each: torch.nn.Module, result: Any) -> None:
        own = sum(p.numel() for p in each.parameters(recurse=False)), sum(b.numel() for b in each.buffers(recurse=False))
        tensors = [t for t in (result if isinstance(result, list | tuple) else [result]) if isinstance(t, Tensor)]
        rows.append((name or "<top-level>", *own, ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)))

    hooks = [m.register_forward_hook(lambda m, _, result, name=name: note(name, m, result)) for name, m in module.named_modules()]
    try:
        outputs = module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for row in [("module", "parameters", "buffers", "result"), *rows]:
        print(f"{row[0]:40} {row[1]:>12} {row[2]:>12}  {row[3]}")
    return outputs
