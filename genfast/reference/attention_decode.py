"""Attention of a few new queries to a cache of keys and values, the specification of `genfast.ops.attention_decode`."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of ``q`` (B, H, n, D) to the first ``lengths[b]`` rows of ``k_cache`` and ``v_cache`` (B, H / g, capacity, D).

    ``causal``: the n queries are the last of the ``lengths[b]`` tokens, so query i sees keys 0 ... i + lengths[b] - n. What lies
    beyond a length is never used and may be NaN. ``bias`` broadcasts to (B, H, n, capacity). ``splits`` changes how a kernel orders its
    sums, and nothing here. Returns the output (B, H, n, D), and with ``return_lse`` the log-sum-exp (B, H, n).
    """
    k, v, mask = visible_cache(q, k_cache, v_cache, lengths, causal)
    return attention(q, k, v, bias, mask, False, scale, return_lse)


def visible_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with zeros beyond the lengths, and the mask (B, 1, n or 1, capacity) of what each query sees."""
    n, keys = q.shape[2], torch.arange(k_cache.shape[2], device=q.device)
    ends = lengths.view(-1, 1, 1, 1)
    beyond = (keys >= ends).mT
    last = ends - torch.arange(n - 1, -1, -1, device=q.device)[:, None] if causal else ends
    return k_cache.masked_fill(beyond, 0), v_cache.masked_fill(beyond, 0), keys < last
