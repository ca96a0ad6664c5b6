"""The attention modules of a diffusers model on `genfast.ops.attention`, whatever their architecture.

A module keeps its processor, and the processor its code; what changes is who computes torch's scaled_dot_product_attention while that
module runs, in this thread alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from genfast.compat.sdpa import scaled_dot_product_attention

_stock = torch._C._nn.scaled_dot_product_attention
_CALLED = {"scaled_dot_product_attention", "dispatch_attention_fn"}  # what a processor calls if it leaves attention to torch


class _Ours(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (scaled_dot_product_attention if function is _stock else function)(*args, **(kwargs or {}))


_ours = _Ours()
# Elements of the input times the tokens attended to. Below it a call of the module takes less than some 0.2 ms on a CPU core, and looking
# at every torch function that it calls would cost more than genfast's attention saves.
SMALL = 1 << 23


def _is_small(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an attention module is below `SMALL`. What does not look like such a call is not small."""
    x = args[0] if args else kwargs.get("hidden_states")
    context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
    if not isinstance(x, torch.Tensor) or x.ndim < 3:
        return False
    keys = context.shape[1] if isinstance(context, torch.Tensor) and context.ndim == 3 else 0
    tokens = x.shape[1] if x.ndim == 3 else x.shape[2:].numel()
    return x.numel() * max(keys, tokens) < SMALL  # joint attention sees both; of the two alone the larger one is meant


class FusedAttention:
    """What `fused` adds to a class of attention modules."""

    stock: type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        backend = getattr(self.processor, "_attention_backend", None)  # type: ignore[attr-defined]
        # Compiled code is torch's; a chosen backend stays.
        if torch.compiler.is_compiling() or backend not in (None, "native") or _is_small(args, kwargs):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with _ours:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class bears the stock class's name, so it cannot be found by name.
        return _rebuild, (self.stock,), self.__getstate__()  # type: ignore[attr-defined]


_classes: dict[type, type] = {}


def fused(stock: type) -> type:
    """The subclass of an attention module's class that computes attention by genfast; it bears the stock class's name."""
    if stock not in _classes:
        names = {"stock": stock, "__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
        _classes[stock] = type(stock.__name__, (FusedAttention, stock), names)
    return _classes[stock]


def _rebuild(stock: type) -> Any:
    cls: Any = fused(stock)
    return cls.__new__(cls)


def _leaves_attention_to_torch(processor: Any) -> bool:
    functions = (f for cls in type(processor).__mro__ for f in vars(cls).values())
    return any(_CALLED & set(f.__code__.co_names) for f in functions if hasattr(f, "__code__"))


def _count(modules: int) -> str:
    return f"{modules} attention module{'s' if modules > 1 else ''}"


def accelerate_attention(model: nn.Module) -> tuple[str, str]:
    """Give every attention module of ``model`` its fused class, in place: what was swapped, and what was left and why; or ""."""
    swapped, left = Counter[str](), Counter[str]()
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if not callable(processor):
            continue
        if isinstance(module, FusedAttention):
            swapped["fused already"] += 1
        elif not _leaves_attention_to_torch(processor):
            left[f"{type(processor).__name__} does not call torch's attention"] += 1
        elif (backend := getattr(processor, "_attention_backend", None)) not in (None, "native"):
            left[f"set to the backend {getattr(backend, 'value', backend)}"] += 1
        else:
            module.__class__ = fused(type(module))  # type: ignore[assignment]
            swapped["fused"] += 1
    return tuple("; ".join(f"{_count(n)}, {what}" for what, n in found.items()) for found in (swapped, left))  # type: ignore[return-value]


def restore_attention(model: nn.Module) -> None:
    """Undo `accelerate_attention`."""
    for module in model.modules():
        if isinstance(module, FusedAttention):
            module.__class__ = module.stock
