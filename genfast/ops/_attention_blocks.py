"""Attention, its gradient and the tangents of both in plain torch, a block of query rows at a time.

What runs where no kernel does, and what differentiates a second time. Memory: one block of scores, so linear in the sequence length.
Each row of scores belongs to one query, so blocks are independent but for the sums over queries that keys and values receive.
With P = exp(S - lse), o = P v and the cotangents do, dlse (Dao et al. 2022, appendix B.2, lse's added here):

    D = sum(do o) - dlse     dS = P (do v^T - D)     dq = scale dS k     dk = scale dS^T q     dv = P^T do     dbias = dS
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SCORES = 2**22  # of one block, over all heads and the batch; never fewer than 16 rows


@dataclass(frozen=True)
class Inputs:
    """What `genfast::attention` is given; tangents come in the same form. ``bias`` and ``mask`` have four dimensions."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 1.0

    def widened(self) -> Inputs:
        wide = torch.promote_types(self.q.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return Inputs(self.q.to(wide), self.k.to(wide), self.v.to(wide), bias, self.mask, self.causal, self.scale)

    def blocks(self) -> Iterator[slice]:
        batch, heads, n, _ = self.q.shape
        rows = max(16, BLOCK_SCORES // max(1, batch * heads * self.k.shape[2]))
        return (slice(start, min(n, start + rows)) for start in range(0, n, rows))

    def scores(self, at: slice) -> Tensor:
        """(B, H, rows, M)"""
        s = self.scale * _each(self.q[:, :, at], self.k.mT)
        if self.bias is not None:
            s = s + _rows(self.bias, at)
        if self.mask is not None:
            s = s.masked_fill(~_rows(self.mask, at), -torch.inf)
        if self.causal:
            (n, m), device = (self.q.shape[2], self.k.shape[2]), self.q.device
            last = torch.arange(at.start, at.stop, device=device) + (m - n)
            s = s.masked_fill(torch.arange(m, device=device) > last[:, None], -torch.inf)
        return s


def unit(t: Tensor) -> Tensor:
    """The kernels read rows with unit stride."""
    return t if t.stride(-1) == 1 else t.contiguous()


def whole(t: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A bias or mask of full shape, broadcast by strides of 0."""
    return None if t is None else unit(t.expand(*t.shape[:3], k.shape[2])).expand(*q.shape[:3], k.shape[2])


def _rows(t: Tensor, at: slice) -> Tensor:
    return t if t.shape[2] == 1 else t[:, :, at]


def _each(x: Tensor, y: Tensor) -> Tensor:
    """(B, H, rows, E) times (B, H / g, E, F), each head with its own: (B, H, rows, F)."""
    batch, heads, rows, e = x.shape
    product = x.reshape(batch, y.shape[1], heads // y.shape[1] * rows, e) @ y
    return product.reshape(batch, heads, rows, y.shape[3])


def _sum(x: Tensor, y: Tensor, heads: int) -> Tensor:
    """x^T y summed over the queries and over the heads that share one: (B, H, rows, E), (B, H, rows, F) -> (B, ``heads``, E, F)."""
    batch, shared = x.shape[0], x.shape[1] // heads * x.shape[2]
    return x.reshape(batch, heads, shared, x.shape[3]).mT @ y.reshape(batch, heads, shared, y.shape[3])


def _normalise(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights, the log-sum-exp and row_stats, (row_max, row_sum), of rows of scores; a row of -inf has weights 0."""
    row_max = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    row_max = row_max.masked_fill(row_max == -torch.inf, 0)
    p = (s - row_max).exp()
    row_sum = p.sum(-1, keepdim=True)
    nothing = row_sum == 0
    row_sum = row_sum.masked_fill(nothing, 1)
    lse = (row_sum.log() + row_max).masked_fill(nothing, -torch.inf).squeeze(-1)
    return p / row_sum, lse, torch.cat((row_max, row_sum), -1)


def _weights(s: Tensor, row_stats: Tensor) -> Tensor:
    row_max, row_sum = row_stats[..., :1], row_stats[..., 1:]
    return (s - row_max).exp() / row_sum


class _Sums:
    """Blocks of rows joined, or added up where one row of a bias served them all."""

    def __init__(self, *whole: Tensor | None) -> None:
        self.whole = whole
        self.parts: list[list[Tensor]] = [[] for _ in whole]

    def add(self, *parts: Tensor | None) -> None:
        for kept, whole, part in zip(self.parts, self.whole, parts, strict=True):
            if whole is not None and part is not None:
                kept.append(part.sum_to_size((*whole.shape[:2], part.shape[2] if whole.shape[2] != 1 else 1, *whole.shape[3:])))

    def joined(self, dtypes: tuple[torch.dtype, ...]) -> list[Tensor]:
        results = []
        for whole, parts, dtype in zip(self.whole, self.parts, dtypes, strict=True):
            if whole is None:
                continue
            if not parts:
                results.append(torch.zeros_like(whole, dtype=dtype))
            else:
                results.append((torch.cat(parts, 2) if whole.shape[2] != 1 else torch.stack(parts).sum(0)).to(dtype))
        return results


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """The output (B, H, N, D) in q's dtype, and at least float32 the log-sum-exp (B, H, N) and what gives the weights again, row_stats
    (B, H, N, 2): row_max and row_sum, of a query that sees nothing 0 and 1."""
    w = x.widened()
    empty = (*w.q.shape[:2], 0)
    results: list[list[Tensor]] = [[w.q.new_zeros(shape)] for shape in ((*empty, w.q.shape[3]), empty, (*empty, 2))]
    for at in x.blocks():
        p, lse, row_stats = _normalise(w.scores(at))
        for kept, part in zip(results, (_each(p, w.v), lse, row_stats), strict=True):
            kept.append(part)
    o, lse, row_stats = (torch.cat(parts, 2) for parts in results)
    return o.to(x.q.dtype), lse, row_stats


def backward(x: Inputs, o: Tensor, row_stats: Tensor, do: Tensor, dlse: Tensor | None, bias_grad: bool) -> tuple[Tensor, ...]:
    """dq, dk, dv and, with ``bias_grad``, dbias."""
    w, heads = x.widened(), x.k.shape[1]
    do = do.to(w.q.dtype)
    delta = (do * o).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dk, dv = torch.zeros_like(w.k), torch.zeros_like(w.v)
    rows = _Sums(w.q, w.bias if bias_grad else None)
    for at in x.blocks():
        p, do_at = _weights(w.scores(at), row_stats[:, :, at]), do[:, :, at]
        ds = p * (_each(do_at, w.v.mT) - delta[:, :, at, None])
        rows.add(x.scale * _each(ds, w.k), ds if bias_grad else None)
        dk = dk + x.scale * _sum(ds, w.q[:, :, at], heads)
        dv = dv + _sum(p, do_at, heads)
    bias_dtype = x.q.dtype if x.bias is None else x.bias.dtype
    joined = rows.joined((x.q.dtype, bias_dtype))
    return joined[0], dk.to(x.k.dtype), dv.to(x.v.dtype), *joined[1:]


def tangent(x: Inputs, t: Inputs) -> tuple[Tensor, Tensor]:
    """The tangents of o and lse along ``t`` (its q, k, v, bias). Differentiable."""
    w, t = x.widened(), t.widened()
    sees_less = x.bias is not None or x.mask is not None or x.causal  # else no query sees nothing, and one operator does it
    results: list[list[Tensor]] = [[w.q.new_zeros(w.q[:, :, :0].shape)], [w.q.new_zeros((*w.q.shape[:2], 0))]]
    for at in x.blocks():
        s = w.scores(at)
        p = _normalise(s)[0] if sees_less else torch.softmax(s, -1)
        ts = _score_tangent(w, t, at)
        tlse = (p * ts).sum(-1)
        results[0].append(_each(p * (ts - tlse[..., None]), w.v) + _each(p, t.v))
        results[1].append(tlse)
    to, tlse = (torch.cat(blocks, 2) for blocks in results)
    return to.to(x.q.dtype), tlse


def _score_tangent(w: Inputs, t: Inputs, at: slice) -> Tensor:
    ts = w.scale * (_each(t.q[:, :, at], w.k.mT) + _each(w.q[:, :, at], t.k.mT))
    return ts if t.bias is None else ts + _rows(t.bias, at)


def backward_tangent(
    x: Inputs, do: Tensor, dlse: Tensor | None, t: Inputs, tdo: Tensor | None, tdlse: Tensor | None, bias_grad: bool
) -> tuple[Tensor, ...]:
    """The tangents of dq, dk, dv and (``bias_grad``) dbias along ``t``, ``tdo``, ``tdlse``; then of o and lse along ``t``. Differentiable.

    It recomputes lse and o, so that its own derivative sees that they depend on q, k, v and bias.
    """
    w, t, heads = x.widened(), t.widened(), x.k.shape[1]
    do = do.to(w.q.dtype)
    tdk, tdv = torch.zeros_like(w.k), torch.zeros_like(w.v)
    rows = _Sums(w.q, w.q, w.q[..., 0], w.bias if bias_grad else None)
    for at in x.blocks():
        q, do_at = w.q[:, :, at], do[:, :, at]
        p = _normalise(w.scores(at))[0]
        o = _each(p, w.v)
        dp = _each(do_at, w.v.mT)
        delta = (do_at * o).sum(-1) if dlse is None else (do_at * o).sum(-1) - dlse[:, :, at]
        ds = p * (dp - delta[..., None])

        ts = _score_tangent(w, t, at)
        tlse = (p * ts).sum(-1)
        tp = p * (ts - tlse[..., None])
        to = _each(tp, w.v) + _each(p, t.v)
        tdp, tdelta = _each(do_at, t.v.mT), (do_at * to).sum(-1)
        tdv_at = _sum(tp, do_at, heads)
        if tdo is not None:
            tdo_at = tdo[:, :, at].to(do.dtype)
            tdp, tdelta = tdp + _each(tdo_at, w.v.mT), tdelta + (tdo_at * o).sum(-1)
            tdv_at = tdv_at + _sum(p, tdo_at, heads)
        if tdlse is not None:
            tdelta = tdelta - tdlse[:, :, at]
        tds = tp * (dp - delta[..., None]) + p * (tdp - tdelta[..., None])
        rows.add(x.scale * (_each(tds, w.k) + _each(ds, t.k)), to, tlse, tds if bias_grad else None)
        tdk = tdk + x.scale * (_sum(tds, q, heads) + _sum(ds, t.q[:, :, at], heads))
        tdv = tdv + tdv_at
    bias_dtype = x.q.dtype if x.bias is None else x.bias.dtype
    tdq, to, tlse, *tdbias = rows.joined((x.q.dtype, x.q.dtype, w.q.dtype, bias_dtype))
    return tdq, tdk.to(x.k.dtype), tdv.to(x.v.dtype), *tdbias, to, tlse
