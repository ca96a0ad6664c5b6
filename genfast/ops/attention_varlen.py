"""Attention within packed sequences of different lengths: `genfast.reference.attention_varlen` by kernel (docs/attention.md)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from genfast import _library

from . import _backend
from ._attention_blocks import unit
from ._autograd import refuse_lost_derivatives, wanted
from ._backend import implementations
from ._checks import check_floating, readable, refusal
from .attention import attention

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, bool causal, float scale"
_library.define("attention_varlen_", f"(Tensor(a!) o, Tensor(b!) lse, {_INPUTS}) -> ()")
_library.define("attention_varlen", f"({_INPUTS}) -> (Tensor, Tensor)")


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
    """`attention` of each of B packed sequences to itself, with the arguments of flash-attention's ``flash_attn_varlen_func``.

    ``q`` (total_q, H, D), ``k`` and ``v`` (total_k, H / g, D): sequence after sequence, query head h reads head h // g. float32, float64,
    bfloat16 or float16, any strides. ``cu_seqlens_q`` and ``cu_seqlens_k`` (B + 1,) int32 or int64 on q's device: where each sequence
    begins, from 0 to the total. ``max_seqlen_q`` and ``max_seqlen_k``: the lengths of the longest, or more. What a device holds of the
    offsets is not checked, for nothing waits for it: queries beyond max_seqlen_q would keep what was in memory. ``causal``: in a sequence
    of n queries and m keys query i sees keys 0 ... i + m - n. ``scale``: 1 / sqrt(D) where None.

    Returns the output (total_q, H, D), and with ``return_lse`` the log-sum-exp of the scores (H, total_q), float32 for 16-bit inputs. A
    query that sees no key gives zeros and -inf. Differentiable to any order in q, k and v; then the sequences run one by one through
    `attention`, as they always do on the CPU, and their lengths are read once: docs/derivatives.md. A wrong argument is a ValueError that
    names it.
    """
    scale = _check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
    if wanted((q, k, v, cu_seqlens_q, cu_seqlens_k)):
        o, lse = _differentiable(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale)
    else:
        run = _forward if readable(q) else torch.ops.genfast.attention_varlen
        o, lse = run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, scale)
    return (o, lse) if return_lse else o


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float | None) -> float:
    """The scale."""
    if q.ndim != 3:
        raise refusal("q", f"shape {tuple(q.shape)}", "(total_q, H, D)")
    check_floating("q", q)
    _, heads, d = q.shape
    if d == 0:
        raise refusal("q", "a head dimension of 0", "1 and more")
    if k.ndim != 3 or k.shape[2] != d or k.shape[1] == 0 or heads % k.shape[1]:
        raise refusal("k", f"shape {tuple(k.shape)}", f"(total_k, heads, {d}) where heads divides q's {heads}")
    if v.shape != k.shape:
        raise refusal("v", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, as k")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype or t.device != q.device:
            raise refusal(name, f"{t.dtype} on {t.device}", f"{q.dtype} on {q.device}, as q")
    for name, cu, longest, total in (("q", cu_q, max_q, q.shape[0]), ("k", cu_k, max_k, k.shape[0])):
        if cu.ndim != 1 or len(cu) == 0 or cu.shape != cu_q.shape or cu.dtype not in (torch.int32, torch.int64) or cu.device != q.device:
            got, batch = f"{cu.dtype} {tuple(cu.shape)} on {cu.device}", "B + 1" if name == "q" else len(cu_q)
            raise refusal(f"cu_seqlens_{name}", got, f"torch.int32 or torch.int64 ({batch},) on {q.device}")
        if longest < 0:
            raise refusal(f"max_seqlen_{name}", longest, "0 and more")
        if readable(cu):
            _check_starts(name, cu.tolist(), longest, total)
    if scale is None:
        scale = d**-0.5
    if not math.isfinite(scale):
        raise refusal("scale", scale, "a finite number")
    return float(scale)


def _check_starts(name: str, starts: list[int], longest: int, total: int) -> None:
    lengths = [b - a for a, b in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != total or min(lengths, default=0) < 0:
        raise refusal(f"cu_seqlens_{name}", starts, f"numbers that rise from 0 to {total}, the rows of {name}")
    if max(lengths, default=0) > longest:
        raise refusal(f"max_seqlen_{name}", longest, f"{max(lengths)} and more, the longest sequence of cu_seqlens_{name}")


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    if any(torch._C._functorch.is_functorch_wrapped_tensor(cu) for cu in (cu_q, cu_k)):
        raise refusal("cu_seqlens_q and cu_seqlens_k", "a tensor inside a torch.func transform", "one set of lengths for all")
    q_lengths, k_lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    outputs, sums = [q[:0]], [q.new_zeros((q.shape[1], 0), dtype=torch.promote_types(q.dtype, torch.float32))]
    # split, whose gradient is one concatenation; slices would each have one as long as the whole
    for one in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
        q_b, k_b, v_b = (t.transpose(0, 1)[None] for t in one)
        o, lse = attention(q_b, k_b, v_b, causal=causal, scale=scale, return_lse=True)
        outputs.append(o[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outputs), torch.cat(sums, 1)


_differentiable = torch.compiler.disable(_by_sequence)


# ---- the operators ---------------------------------------------------------------------------------------------------------------


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    packed = q.device.type == "cuda" and _library.has_kernels("cuda") and q.dtype != torch.float64 and q.shape[2] <= 256
    if not packed:
        return _by_sequence(q, k, v, cu_q, cu_k, causal, scale)
    o, lse = _fake(q)
    if q.numel() and max_q:
        cu_q, cu_k = cu_q.contiguous(), cu_k.to(cu_q.dtype).contiguous()
        _backend.namespace.attention_varlen_(o, lse, unit(q), unit(k), unit(v), cu_q, cu_k, max_q, causal, scale)
    return o, lse


implementations.impl("attention_varlen", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("genfast::attention_varlen", _fake, lib=implementations)
torch.library.register_fake("genfast::attention_varlen_", lambda *_: None, lib=implementations)
refuse_lost_derivatives("attention_varlen", "genfast.ops.attention_varlen")
