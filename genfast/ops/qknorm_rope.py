"""Norm and rotary embedding of queries and keys in one pass, and attention of them: `genfast.reference.qknorm_rope` (docs/attention.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast import reference
from genfast.reference import rope_table
from genfast.reference.qknorm_rope import split_heads, turned

from . import _backend
from ._attention_blocks import unit
from ._autograd import gradient_rule, refuse_lost_derivatives, wanted
from ._checks import check_floating, refusal
from .attention import _heads_last, _straight, _untracked, attention

__all__ = ["qknorm_rope", "qknorm_rope_attention", "rope_table"]

NORMS = (None, "rms", "layer")  # csrc/ops/qknorm_rope/params.h
MAX_HEAD_DIM = 1024

_GIVEN = (
    "Tensor q, Tensor{k} k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? cos, Tensor? sin, "
    "int norm, float eps, bool across_heads, bool interleaved"
)
SCHEMAS = {
    "qknorm_rope_": "(Tensor(a!) q_out, Tensor(b!)? k_out, Tensor(c!)? q_sums, Tensor(d!)? k_sums, Tensor? q_grad, Tensor? k_grad, "
    + _GIVEN.format(k="?")
    + ") -> ()",
    "qknorm_rope": f"({_GIVEN.format(k='')}) -> (Tensor, Tensor)",
    "qknorm_rope_backward": f"(Tensor q_grad, Tensor k_grad, {_GIVEN.format(k='')}) -> (Tensor, Tensor, Tensor, Tensor)",
}


class _Options(NamedTuple):
    norm: str | None
    eps: float
    across_heads: bool
    interleaved: bool

    @property
    def codes(self) -> tuple[int, float, bool, bool]:
        return NORMS.index(self.norm), self.eps, self.across_heads, self.interleaved


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
    by the angles of its token (Su et al. 2021). Reads both once and writes both once.

    ``q`` (B, H, N, D), ``k`` (B, Hk, M, D), D up to 1024, in float32, float64, bfloat16 or float16, any strides. ``norm``: "rms", "layer"
    or None; over D, or with ``across_heads`` over all heads of a token together. Weights and biases (D,) or (heads, D), in any of those
    dtypes. ``cos`` and ``sin`` (N, R / 2) or (B, N, R / 2) as from `rope_table`, for N = M: the first R elements of a head turn, in
    pairs (2i, 2i + 1) where ``interleaved``, else (i, i + R / 2). Computed in float32 (float64 for float64), rounded once.

    Returns both, shaped as they came, lying in memory as (B, N, H, D). Differentiable in all tensors: docs/derivatives.md. Raises
    ValueError for anything else.
    """
    options = _Options(norm, float(eps), bool(across_heads), bool(interleaved))
    _check(q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, options)
    tensors = (q, k, q_weight, k_weight, q_bias, k_bias)
    if not wanted((*tensors, cos, sin)):
        return _call_forward(*tensors, cos, sin, options)
    if wanted((cos, sin)) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _plain(options, *tensors, cos, sin)
    q_out, k_out = _differentiable(*tensors, cos, sin, options)
    return q_out, k_out


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
    """`attention` of q and k as `qknorm_rope` makes them, and v, which is read where it lies.

    ``qkv``: one tensor (B, N, 3, H, D); or (B, N, (heads + 2 kv_heads) D), the heads of q, then of k, then of v, with ``heads`` and, where
    they differ, ``kv_heads``; or the three, (B, H, N, D) and twice (B, Hk, M, D). The next nine arguments are those of `qknorm_rope`,
    the last four those of `attention`. Returns (B, H, N, D), lying as (B, N, H, D). Derivatives: docs/derivatives.md. Raises ValueError
    for anything else.
    """
    _check_packed(qkv, heads, kv_heads)
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


def _check_packed(qkv: Tensor | Sequence[Tensor], heads: int | None, kv_heads: int | None) -> None:
    if not isinstance(qkv, Tensor):
        if len(qkv) != 3:
            raise refusal("qkv", f"{len(qkv)} tensors", "three, or one that holds them")
    elif qkv.ndim == 5:
        if qkv.shape[2] != 3:
            raise refusal("qkv", f"shape {tuple(qkv.shape)}", "(B, N, 3, H, D)")
    elif qkv.ndim == 3:
        if heads is None or heads < 1:
            raise refusal("heads", heads, "the number of q's heads, where qkv has three dimensions")
        if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
            raise refusal("kv_heads", kv_heads, f"a divisor of the {heads} heads")
        every = heads + 2 * (kv_heads or heads)
        if qkv.shape[2] % every:
            raise refusal("qkv", f"shape {tuple(qkv.shape)}", f"(B, N, {every} D)")
    else:
        raise refusal("qkv", f"shape {tuple(qkv.shape)}", "(B, N, 3, H, D) or (B, N, (heads + 2 kv_heads) D)")
    if (heads is not None or kv_heads is not None) and (not isinstance(qkv, Tensor) or qkv.ndim != 3):
        raise refusal("heads, kv_heads", f"{heads} and {kv_heads}", "None, where the shapes say it")


def _check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    o: _Options,
) -> None:
    if q.ndim != 4:
        raise refusal("q", f"shape {tuple(q.shape)}", "(B, H, N, D)")
    check_floating("q", q)
    batch, _, n, d = q.shape
    if not 1 <= d <= MAX_HEAD_DIM:
        raise refusal("q", f"a head dimension of {d}", f"1 to {MAX_HEAD_DIM}")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != d:
        raise refusal("k", f"shape {tuple(k.shape)}", f"({batch}, heads, M, {d})")
    if k.dtype != q.dtype or k.device != q.device:
        raise refusal("k", f"{k.dtype} on {k.device}", f"{q.dtype} on {q.device}, as q")
    if o.norm not in NORMS:
        raise refusal("norm", repr(o.norm), "'rms', 'layer' or None")
    for name, t, heads in (("q_weight", q_weight, q), ("k_weight", k_weight, k), ("q_bias", q_bias, q), ("k_bias", k_bias, k)):
        if t is None:
            continue
        if o.norm is None:
            raise refusal(name, "a tensor", "None, where norm is None")
        check_floating(name, t)
        if t.shape not in ((d,), (heads.shape[1], d)) or t.device != q.device:
            raise refusal(name, f"shape {tuple(t.shape)} on {t.device}", f"({d},) or ({heads.shape[1]}, {d}) on {q.device}")
    if (cos is None) != (sin is None):
        raise refusal("cos and sin", "one of them", "both or none")
    for name, t in (("cos", cos), ("sin", sin)):
        if t is None:
            continue
        check_floating(name, t)
        if k.shape[2] != n:
            raise refusal(name, f"a table for {n} queries and {k.shape[2]} keys", "None, or as many keys as queries")
        if t.shape[:-1] not in ((n,), (batch, n)) or 2 * t.shape[-1] > d or t.device != q.device:
            pairs = f"{n}, at most {d // 2}"
            raise refusal(name, f"shape {tuple(t.shape)} on {t.device}", f"({pairs}) or ({batch}, {pairs}) on {q.device}")
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise refusal("sin", f"shape {tuple(sin.shape)}", f"{tuple(cos.shape)}, as cos")


def _plain(
    o: _Options,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return reference.qknorm_rope(q, k, q_weight, k_weight, cos, sin, **o._asdict(), q_bias=q_bias, k_bias=k_bias)


# ---- the operators -----------------------------------------------------------------------------------------------------------


def _call_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *tensors, options = rest
    run = _untracked(_forward) if _straight(q, *(t for t in tensors if t is not None)) else torch.ops.genfast.qknorm_rope
    q_out, k_out = run(q, *tensors, *options.codes)
    return q_out, k_out


def _run(
    outs: Sequence[Tensor],
    sums: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    x: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    *codes: Any,
) -> None:
    """One launch for q and k together where they are equally long, else one for each."""
    wide = torch.promote_types(x[0].dtype, torch.float32)
    weights, biases = ([None if t is None else t.detach().to(wide).contiguous() for t in ts] for ts in (weights, biases))
    for side in (0, 1):  # one shape for both
        w, b = weights[side], biases[side]
        if w is not None and b is not None and w.ndim != b.ndim:
            whole = (x[side].shape[1], x[side].shape[3])
            weights[side], biases[side] = w.expand(whole).contiguous(), b.expand(whole).contiguous()
    x, grads = [unit(t) for t in x], [None if t is None else unit(t) for t in grads]
    cos, sin = (None if t is None else (t if t.ndim == 3 else t[None]).to(wide).contiguous() for t in (cos, sin))
    if cos is not None and cos.shape[-1] == 0:
        cos = sin = None
    if x[0].shape[2] == x[1].shape[2] and x[0].numel() and x[1].numel():
        _backend.namespace.qknorm_rope_(*outs, *sums, *grads, *x, *weights, *biases, cos, sin, *codes)
        return
    for side in (0, 1):
        if x[side].numel():
            given = [part for pair in (outs, sums, grads, x, weights, biases) for part in (pair[side], None)]
            _backend.namespace.qknorm_rope_(*given, cos, sin, *codes)


def _forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _heads_last(q), _heads_last(k)
    _run((q_out, k_out), (None, None), (None, None), (q, k), (q_weight, k_weight), (q_bias, k_bias), *rest)
    return q_out, k_out


def _sums(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Of the weight and the bias, (2, D) or (2, heads, D) float64."""
    whole = any(t is not None and t.ndim == 2 for t in (weight, bias))
    return x.new_empty(2, *(x.shape[1::2] if whole else x.shape[3:]), dtype=torch.float64)


def _backward(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, *sums = _fake_backward(q_grad, k_grad, q, k, q_weight, k_weight, q_bias, k_bias)
    for t, x in zip(sums, (q, k), strict=True):
        if not x.numel():
            t.zero_()
    asked = [t if t.numel() else None for t in sums]
    _run((dq, dk), asked, (q_grad, k_grad), (q, k), (q_weight, k_weight), (q_bias, k_bias), *rest)
    return dq, dk, sums[0], sums[1]


def _fake_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = ((q, q_weight, q_bias), (k, k_weight, k_bias))
    sums = [q.new_empty(0, dtype=torch.float64) if w is None and b is None else _sums(x, w, b) for x, w, b in sides]
    return _heads_last(q), _heads_last(k), sums[0], sums[1]


def _qknorm_rope_(
    q_out: Tensor,
    k_out: Tensor | None,
    q_sums: Tensor | None,
    k_sums: Tensor | None,
    q_grad: Tensor | None,
    k_grad: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: int,
    eps: float,
    across_heads: bool,
    interleaved: bool,
) -> None:
    _backend.reference_runs(q.device)
    for out, sums, grad, x, weight, bias in (
        (q_out, q_sums, q_grad, q, q_weight, q_bias),
        (k_out, k_sums, k_grad, k, k_weight, k_bias),
    ):
        if x is None or out is None:
            continue
        if grad is None:
            options = _Options(NORMS[norm], eps, across_heads, interleaved)
            out.copy_(_plain(options, x, x, weight, None, bias, None, cos, sin)[0])
            continue
        # As in csrc/ops/qknorm_rope/qknorm_rope_cpu_impl.h: below autograd the reference cannot be differentiated.
        dy, u = grad.to(dtype=torch.promote_types(x.dtype, torch.float32)), x.to(torch.promote_types(x.dtype, torch.float32))
        if cos is not None and sin is not None:
            dy = turned(dy, cos, -sin, interleaved)
        g = dy if weight is None else dy * weight.unsqueeze(-2)
        if norm:
            dims = (1, 3) if across_heads else (3,)
            u = u - u.mean(dims, keepdim=True) if NORMS[norm] == "layer" else u
            inverse = (u.square().mean(dims, keepdim=True) + eps).rsqrt()
            u = u * inverse
            g = (g - (g.mean(dims, keepdim=True) if NORMS[norm] == "layer" else 0) - u * (g * u).mean(dims, keepdim=True)) * inverse
        out.copy_(g)
        if sums is not None:
            sums.copy_(torch.stack([t.double().sum((0, 2)).sum_to_size(sums.shape[1:]) for t in (dy * u, dy)]))


_backend.define(
    SCHEMAS,
    {"qknorm_rope_": _qknorm_rope_, "qknorm_rope": _untracked(_forward), "qknorm_rope_backward": _untracked(_backward)},
    {"qknorm_rope": lambda q, k, *_: (_heads_last(q), _heads_last(k)), "qknorm_rope_backward": _fake_backward},
)
for _name in SCHEMAS:
    refuse_lost_derivatives(_name, "genfast.ops.qknorm_rope")


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k = _QkNormRope.apply(*arguments)  # type: ignore[no-untyped-call]
    return q, k


class _QkNormRope(torch.autograd.Function):
    """Reverse mode by kernel; where the gradient is to be differentiated again, it is the reference's own."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _call_forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors)

    @gradient_rule
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Tensor | None, ...]:
        given, needs = ctx.saved_tensors, ctx.needs_input_grad[:6]
        if torch.is_grad_enabled():
            # Views: where one of them is computed from another, each still has a gradient of its own.
            given = [None if t is None else t.view_as(t) for t in given]
            asked = [t for t, needed in zip(given, needs, strict=False) if needed]
            results = _plain(ctx.options, *given)
            found = iter(torch.autograd.grad(results, asked, (q_grad, k_grad), create_graph=True, materialize_grads=True))
            return (*(next(found) if needed else None for needed in needs), None, None, None)
        dq, dk, *sums = torch.ops.genfast.qknorm_rope_backward(q_grad, k_grad, *given, *ctx.options.codes)
        grads: list[Tensor | None] = [dq if needs[0] else None, dk if needs[1] else None]
        for place, (t, needed) in enumerate(zip(given[2:6], needs[2:], strict=True)):  # q_weight, k_weight, q_bias, k_bias
            grads.append(sums[place % 2][place // 2].sum_to_size(t.shape).to(t.dtype) if needed else None)
        return (*grads, None, None, None)
