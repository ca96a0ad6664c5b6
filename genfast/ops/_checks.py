"""Checks of arguments that the operators share. Every refusal is one sentence: the argument, what came, what is supported."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST_INTEGER = 2**31 - 1  # of a scaling, a padding or a number of groups, so that sizes made of them fit into 64 bits
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refusal(name: str, got: object, supported: str) -> ValueError:
    return ValueError(f"{name}: got {got}, supported: {supported}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise refusal(name, dtype, ", ".join(str(d) for d in DTYPES))


def check_is_tensor(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise refusal(name, repr(t) if t is None or isinstance(t, (bool, int, float, str)) else f"a {type(t).__name__}", "a tensor")


def check_floating(name: str, t: Tensor) -> None:
    """A tensor of one of `DTYPES`."""
    check_is_tensor(name, t)
    check_dtype(name, t.dtype)


def check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise refusal(name, repr(value), "an integer of at least 1")
    if value > LARGEST_INTEGER:
        raise refusal(name, value, f"integers from 1 to {LARGEST_INTEGER}")


def check_padding(given: object, padding: Sequence[int]) -> None:
    if max(padding) > LARGEST_INTEGER or min(padding) < -LARGEST_INTEGER:
        raise refusal("padding", given, f"integers from -{LARGEST_INTEGER} to {LARGEST_INTEGER}")


def check_bytes(name: str, shape: Sequence[int], like: Tensor) -> None:
    """A result of this shape would fit into the addresses of a process."""
    size = like.element_size()
    for n in shape:
        size = size * n
    if size >= 2**47:
        raise refusal(name, f"a picture of shape {tuple(shape)} to make", "pictures of less than 2**47 bytes")


def number(name: str, value: float) -> float:
    try:
        return float(value + 0)  # float() alone would take a string
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise refusal(name, value if isinstance(value, (str, list, tuple)) else f"a {type(value).__name__}", "a number") from None


def check_tensor(name: str, t: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    check_is_tensor(name, t)
    if t.shape != shape:
        raise refusal(name, f"shape {tuple(t.shape)}", f"{tuple(shape)}")
    if t.dtype != dtype:
        raise refusal(name, t.dtype, str(dtype))
    if t.device != device:
        raise refusal(name, f"a tensor on {t.device}", f"{device}")


def check_mutable(name: str, t: Tensor) -> None:
    if t.requires_grad:
        raise refusal(name, "requires_grad=True", "a tensor without gradient, because it is overwritten")


def readable(t: Tensor) -> bool:
    """Whether the values can be looked at: in host memory (a device would have to be waited for), and not while something traces."""
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    return t.is_cpu and not tracing


def check_seeds(seeds: Tensor, batch: int, device: torch.device) -> None:
    if seeds.shape != (batch,) or seeds.dtype != torch.int64 or seeds.device != device:
        raise refusal(
            "seeds", f"{seeds.dtype} {tuple(seeds.shape)} on {seeds.device}", f"torch.int64 ({batch},) on {device}, one per sample"
        )
    if readable(seeds) and batch and (lowest := min(seeds.tolist())) < 0:  # a reduction by torch costs more than a batch of seeds
        raise refusal("seeds", lowest, "integers in [0, 2^63)")


def versions(*tensors: Tensor) -> list[int]:
    """How often each tensor has been written in place; an inference tensor keeps no such count."""
    return [0 if t.is_inference() else t._version for t in tensors]


def bump_version(t: Tensor) -> None:
    """Tell autograd that a kernel wrote ``t`` (an inference tensor keeps no such count)."""
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)
