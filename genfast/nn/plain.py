"""Whether a layer may compute with the weights of its submodules without calling them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_METHODS = frozenset({"__call__", "_call_impl", "_wrapped_call_impl", "forward", "_conv_forward", "_output_padding", "_check_input_dim"})


def plain(module: object, *classes: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly one of torch's ``classes`` and nobody can tell a call of it from what its class computes.

    It is not where something hangs on the call: hooks, its own or global; parametrisations, pruning, spectral or weight norm; a wrapper
    or an adapter in its place; a method that was replaced on the module or on its class; a compiled call; or parameters that are more
    than tensors (sharded, quantised, not made yet).
    """
    if type(module) not in classes or not isinstance(module, nn.Module):
        return False
    state = module.__dict__
    if any(state[hooks] for hooks in _HOOKS) or _has_any_global_hook():
        return False
    if not _METHODS.isdisjoint(state) or state.get("_compiled_call_impl") is not None:
        return False
    own = (*module._parameters.values(), *module._buffers.values())
    if "weight" not in module._parameters or any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in own):
        return False
    return torch.compiler.is_compiling() or all(_is_torchs(getattr(type(module), name, None)) for name in _METHODS)


def _is_torchs(method: Any) -> bool:
    """Whether a method of one of torch's classes, if it has it, is still the one that torch defines."""
    return method is None or str(getattr(method, "__globals__", {}).get("__name__")).startswith("torch.nn.modules.")


def call(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``; where ``x`` is 16 bits wide and the parameters are wider, in x's dtype, as by torch.autocast."""
    wider = any(t.dtype in (torch.float32, torch.float64) for t in module.parameters())
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if not (narrow and wider) or torch.is_autocast_enabled(x.device.type):
        y: Tensor = module(x)
        return y
    with torch.autocast(x.device.type, x.dtype):
        y = module(x)
    return y.to(x.dtype)
