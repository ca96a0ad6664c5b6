"""Normalised queries and keys, rotary embedding, attention: the specification of `genfast.ops.qknorm_rope` (docs/attention.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import attention


def qknorm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str | None = "rms",
    eps: float = 1e-6,
    across_heads: bool = False,
    interleaved: bool = True,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalises each head of ``q`` and ``k`` (Dehghani et al. 2023; Zhang and Sennrich 2019), then rotates pairs of its elements
    by the angles of its token (Su et al. 2021).

    ``q`` (B, H, N, D), ``k`` (B, Hk, M, D). ``norm``: "rms", "layer" or None; over D, or with ``across_heads`` over all heads of a token
    together. Weights and biases (D,) or (heads, D). ``cos`` and ``sin`` (N, R / 2) or (B, N, R / 2), for N = M: the first R elements of a
    head turn, in pairs (2i, 2i + 1) where ``interleaved``, else (i, i + R / 2). 16-bit inputs are computed in float32 and rounded once.

    Returns both, shaped as they came.
    """
    results = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = (1, 3) if across_heads else (3,)
        if norm == "layer":
            y = y - y.mean(dims, keepdim=True)
        if norm is not None:
            y = y * (y.square().mean(dims, keepdim=True) + eps).rsqrt()
        if weight is not None:
            y = y * weight.to(y.dtype).unsqueeze(-2)
        if bias is not None:
            y = y + bias.to(y.dtype).unsqueeze(-2)
        if cos is not None and sin is not None:
            y = turned(y, cos.to(y.dtype), sin.to(y.dtype), interleaved)
        results.append(y.to(x.dtype))
    return results[0], results[1]


def turned(y: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)  # the same for all heads
    rotary = 2 * cos.shape[-1]
    turning, rest = y[..., :rotary], y[..., rotary:]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    pairs = (a * cos - b * sin, a * sin + b * cos)
    return torch.cat([torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1), rest], -1)


def qknorm_rope_attention(
    qkv: Tensor | Sequence[Tensor],
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    norm: str | None = "rms",
    eps: float = 1e-6,
    across_heads: bool = False,
    interleaved: bool = True,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`attention` of q and k as `qknorm_rope` makes them, and v.

    ``qkv``: one tensor (B, N, 3, H, D); or (B, N, (heads + 2 kv_heads) D), the heads of q, then of k, then of v, with ``heads`` and, where
    they differ, ``kv_heads``; or the three, (B, H, N, D) and twice (B, Hk, M, D). Returns (B, H, N, D).
    """
    q, k, v = split_heads(qkv, heads, kv_heads)
    q, k = qknorm_rope(
        *(q, k, q_weight, k_weight, cos, sin),
        norm=norm,
        eps=eps,
        across_heads=across_heads,
        interleaved=interleaved,
        q_bias=q_bias,
        k_bias=k_bias,
    )
    o = attention(q, k, v, bias, mask, causal, scale)
    assert isinstance(o, Tensor)
    return o


def split_heads(qkv: Tensor | Sequence[Tensor], heads: int | None, kv_heads: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k and v of `qknorm_rope_attention` as views (B, H, N, D)."""
    if not isinstance(qkv, Tensor):
        q, k, v = qkv
        return q, k, v
    if qkv.ndim == 5:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v
    assert heads is not None
    kv_heads = heads if kv_heads is None else kv_heads
    all_heads = qkv.unflatten(2, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = all_heads.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def rope_table(
    positions: Tensor, dims: int | Sequence[int], theta: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embedding over one or more axes (Su et al. 2021, section 3.2.2), for `qknorm_rope`.

    ``positions`` (..., N) for one axis or (..., N, axes), of any dtype; ``dims``: how many elements of a head each axis turns, even; they
    add up to R. Axis by axis, pair i of ``dim`` turns by position * theta^(-2i / dim). Angles are computed in float64. Returns two
    tensors (..., N, R / 2) in ``dtype``. Raises ValueError for odd ``dims`` or another number of axes.
    """
    every = [dims] if isinstance(dims, int) else list(dims)
    if not every or any(d < 0 or d % 2 for d in every):
        raise ValueError(f"dims: got {dims}, supported: even numbers")
    if isinstance(dims, int):
        positions = positions.unsqueeze(-1)
    if positions.ndim < 2 or positions.shape[-1] != len(every):
        raise ValueError(f"positions: got shape {tuple(positions.shape)}, supported: (..., N, {len(every)}), one for each of dims {dims}")
    angles = []
    for axis, d in enumerate(every):
        frequency = theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device=positions.device) / d)
        angles.append(positions[..., axis, None].double() * frequency)
    angle = torch.cat(angles, -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
