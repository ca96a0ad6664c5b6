"""Attention within packed sequences of different lengths, the specification of `genfast.ops.attention_varlen`."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each sequence to itself: ``q`` (total_q, H, D), ``k`` and ``v`` (total_k, H / g, D), sequence after sequence.

    Sequence b has the queries cu_seqlens_q[b] ... cu_seqlens_q[b + 1] - 1 and the keys likewise; the largest lengths are not needed here.
    Returns the output (total_q, H, D), and with ``return_lse`` the log-sum-exp (H, total_q).
    """
    q_lengths, k_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    outputs, sums = [q[:0]], [q.new_zeros((q.shape[1], 0), dtype=torch.promote_types(q.dtype, torch.float32))]
    for one in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
        q_b, k_b, v_b = (t.transpose(0, 1)[None] for t in one)
        o, lse = attention(q_b, k_b, v_b, causal=causal, scale=scale, return_lse=True)
        outputs.append(o[0].transpose(0, 1))
        sums.append(lse[0])
    o, lse = torch.cat(outputs), torch.cat(sums, 1)
    return (o, lse) if return_lse else o
