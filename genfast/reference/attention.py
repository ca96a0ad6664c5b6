"""Scaled dot-product attention (Vaswani et al. 2017, equation 1), the specification of `genfast.ops.attention`."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v over the keys that a query sees.

    ``q`` (B, H, N, D); ``k`` and ``v`` (B, H / g, M, D): query head h reads head h // g. ``bias`` and the bool ``mask`` (True: the query
    sees the key) broadcast to (B, H, N, M). ``causal``: query i sees keys 0 ... i + M - N, so the last query sees all. ``scale``:
    1 / sqrt(D) where None. A query that sees no key gives zeros and the log-sum-exp -inf.

    Returns the output (B, H, N, D), and with ``return_lse`` also log sum exp of the scores (B, H, N), in float32 for 16-bit inputs,
    which are computed in float32 and rounded once.
    """
    (_, heads, n, d), m = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (t.to(wide).repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    scores = (d**-0.5 if scale is None else scale) * q.to(wide) @ keys.mT
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if causal:
        scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n), -torch.inf)
    shift = scores.detach().logsumexp(-1, keepdim=True)
    shift = shift.masked_fill(shift == -torch.inf, 0)
    weights = (scores - shift).exp()
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    o = (weights @ values / total).to(q.dtype)
    if not return_lse:
        return o
    return o, (total.log() + shift).masked_fill(nothing, -torch.inf).squeeze(-1)
