"""A drop-in for `torch.nn.functional.scaled_dot_product_attention`: call it, or put it in place with `patched`. docs/attention.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast import ops
from genfast.ops.attention import route

_torch_attention = F.scaled_dot_product_attention


def _ours(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool, gqa: bool) -> bool:
    """Whether genfast computes this call: a kernel of its own runs, and torch would accept it with the same meaning."""
    given = [t for t in (query, key, value, attn_mask) if t is not None]
    if dropout_p or torch.compiler.is_compiling() or any(type(t) not in (Tensor, torch.nn.Parameter) for t in given):
        return False
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        return False
    heads, kv_heads = query.shape[1], key.shape[1]
    if (heads != kv_heads and not gqa) or kv_heads == 0 or heads % kv_heads:
        return False
    if any(t.dtype != query.dtype or t.device != query.device for t in (key, value)):
        return False
    if attn_mask is not None:
        scores = (*query.shape[:3], key.shape[2])
        broadcasts = attn_mask.ndim <= 4 and all(a in (1, b) for a, b in zip(attn_mask.shape[::-1], scores[::-1], strict=False))
        if is_causal or not broadcasts or attn_mask.dtype not in (torch.bool, query.dtype) or attn_mask.device != query.device:
            return False
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.get_autocast_dtype(device):
        return False
    if device != "cpu" and torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return False  # the backward pass has a kernel on the CPU alone
    return route(query, key, attn_mask is not None or is_causal).kernel == "genfast"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function, computed by `genfast.ops.attention` where a genfast kernel runs and by torch itself everywhere else.

    (B, H, N, D), (B, H / g, M, D), (B, H / g, M, D) -> (B, H, N, D). torch's meaning is kept: ``is_causal`` aligns at the top left, so
    query i sees keys 0 ... i. torch computes: dropout, head dimensions or batches that differ, ranks other than 4, mixed dtypes, compiled
    code, what autocast would cast, gradients on CUDA, and whatever `genfast.ops.explain_attention` says has no kernel. One thing differs:
    a query that sees no key gives zeros, where some of torch's kernels give NaN.
    """
    if not _ours(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa):
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias, mask = (None, attn_mask) if attn_mask is not None and attn_mask.dtype == torch.bool else (attn_mask, None)
    n, m = query.shape[2], key.shape[2]
    if is_causal and n != m:
        mask, is_causal = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(), False
    o = ops.attention(query, key, value, bias, mask, is_causal, scale)
    assert isinstance(o, Tensor)
    return o


@contextmanager
def patched() -> Iterator[None]:
    """Within it `torch.nn.functional.scaled_dot_product_attention` is this module's; names imported from there before keep the old one."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
