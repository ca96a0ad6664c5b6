"""A drop-in for `torch.nn.functional.scaled_dot_product_attention`: call it, or put it in place with `patched`. docs/attention.md."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import _builtins
from torch.nn.attention import current_flash_attention_impl
from torch.overrides import _get_current_function_mode_stack, has_torch_function
from torch.utils._device import DeviceContext

from genfast import ops
from genfast.ops.attention import route

_torch_attention = F.scaled_dot_product_attention
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = ("flash", "mem_efficient", "math", "cudnn", "overrideable")  # of torch.nn.attention.sdpa_kernel
_DEFAULT_PRIORITY = torch._C._get_sdp_priority_order()


def _ours(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, gqa: Any) -> bool:
    """Whether genfast computes this call: a kernel of its own runs, torch would accept the call with the same meaning, and nothing that
    stands between a caller and torch's function (a subclass, a mode, a tracer, a chosen backend) would miss it."""
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or _watched():
        return False
    if len(given) < 3 or not all(map(_plain, given)) or any(t.device != query.device for t in given):
        return False
    if type(dropout_p) not in (int, float) or dropout_p != 0 or type(is_causal) is not bool or type(gqa) is not bool:
        return False
    if scale is not None and (type(scale) not in (int, float) or not math.isfinite(scale)):
        return False
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        return False
    heads, kv_heads = query.shape[1], key.shape[1]
    if (heads != kv_heads and not gqa) or kv_heads == 0 or heads % kv_heads:
        return False
    if query.dtype not in _DTYPES or any(t.dtype != query.dtype for t in (key, value)):
        return False
    if attn_mask is not None:
        scores = (*query.shape[:3], key.shape[2])
        broadcasts = 2 <= attn_mask.ndim <= 4 and all(a in (1, b) for a, b in zip(attn_mask.shape[::-1], scores[::-1], strict=False))
        if is_causal or not broadcasts or attn_mask.dtype not in (torch.bool, query.dtype):
            return False
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.get_autocast_dtype(device):
        return False
    if device != "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False  # the backward pass has a kernel on the CPU alone
    return route(query, key, attn_mask is not None or is_causal).kernel == "genfast"


def _plain(t: Any) -> bool:
    """Whether ``t`` is a tensor with numbers in memory where its strides say: no subclass, not nested, sparse or a functional wrapper."""
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.device.type in ("cpu", "cuda")
        and t.layout is torch.strided
        and not t.is_nested
        and not torch._is_functional_tensor(t)
        and not t._is_zerotensor()
    )


def _watched() -> bool:
    """Whether a mode sees the calls of torch's functions, or somebody has chosen among torch's backends."""
    if torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._is_torch_function_mode_enabled() and any(type(m) is not DeviceContext for m in _get_current_function_mode_stack()):
        return True  # torch.set_default_device and `with torch.device` are modes too, which attention does not concern
    every = all(getattr(torch._C, f"_get_{name}_sdp_enabled")() for name in _BACKENDS)
    return not every or torch._C._get_sdp_priority_order() != _DEFAULT_PRIORITY or current_flash_attention_impl() is not None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function, computed by `genfast.ops.attention` where a genfast kernel runs and by torch itself everywhere else.

    (B, H, N, D), (B, H / g, M, D), (B, H / g, M, D) -> (B, H, N, D). torch's meaning is kept: ``is_causal`` aligns at the top left, so
    query i sees keys 0 ... i. torch computes: dropout, head dimensions or batches that differ, ranks other than 4, masks of fewer than 2
    dimensions, other or mixed dtypes, a scale that is not finite, subclasses of tensors (`torch.nn.attention.bias` among them), nested
    and meta tensors, compiled, scripted and traced code, calls under a mode of torch's dispatch or inside `sdpa_kernel` or where a backend
    is switched off, what autocast would cast, gradients on CUDA, and whatever `genfast.ops.explain_attention` says has no kernel; what
    torch refuses is refused by torch. One thing differs: a query that sees no key gives zeros, where some of torch's kernels give NaN.
    And derivatives are those of `genfast.ops.attention` (docs/derivatives.md): of more orders than torch's, but one gradient at a time.
    """
    if not _ours(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa):
        found_by_identity = not torch.compiler.is_compiling() and has_torch_function((query, key, value, attn_mask))
        with _place.torchs() if found_by_identity else nullcontext():
            return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias, mask = (None, attn_mask) if attn_mask is not None and attn_mask.dtype == torch.bool else (attn_mask, None)
    n, m = query.shape[2], key.shape[2]
    if is_causal and n != m:
        mask, is_causal = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(), False
    o = ops.attention(query, key, value, bias, mask, is_causal, scale)
    assert isinstance(o, Tensor)
    return o


# TorchScript compiles a call of this function as torch's operator.
_builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")


class _Place:
    """What stands at `torch.nn.functional.scaled_dot_product_attention`: this module's function while there is a `patched` context, but
    torch's own during a call that is handed to a subclass or a mode, which recognise the call by the function that they find there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.patches = self.handed = 0
        self.before: Any = None

    def _change(self, patches: int, handed: int) -> None:
        with self.lock:
            if self.patches == 0 and patches:
                self.before = F.scaled_dot_product_attention
            last = self.patches + patches == 0 and patches
            self.patches, self.handed = self.patches + patches, self.handed + handed
            if self.patches or last:
                chosen: Any = self.before if self.handed or last else scaled_dot_product_attention
                F.scaled_dot_product_attention = chosen

    @contextmanager
    def ours(self) -> Iterator[None]:
        self._change(1, 0)
        try:
            yield
        finally:
            self._change(-1, 0)

    @contextmanager
    def torchs(self) -> Iterator[None]:
        self._change(0, 1)
        try:
            yield
        finally:
            self._change(0, -1)


_place = _Place()


@contextmanager
def patched() -> Iterator[None]:
    """Within it `torch.nn.functional.scaled_dot_product_attention` is this module's; names imported from there before keep the old one."""
    with _place.ours():
        yield
