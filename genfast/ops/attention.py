"""Fused attention: `genfast.reference.attention` with exact derivatives of any order (docs/attention.md)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genfast import _library

from . import _attention_blocks as blocks
from . import _backend
from ._attention_blocks import Inputs, unit, whole
from ._attention_tangent import tangent
from ._autograd import gradient_rule, refuse_lost_derivatives, tangent_rule, wanted
from ._backend import implementations
from ._checks import check_floating, check_is_tensor, check_tensor, readable, refusal

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, bool causal, float scale"
_library.define("attention_", f"(Tensor(a!) o, Tensor(b!) lse, Tensor(c!)? row_stats, {_INPUTS}) -> ()")
_library.define(
    "attention_backward_",
    "(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? dbias, Tensor(e!) delta, "
    f"Tensor grad_o, Tensor? grad_lse, {_INPUTS}, Tensor o, Tensor row_stats) -> ()",
)
_library.define("attention", f"({_INPUTS}, bool derivatives) -> (Tensor, Tensor, Tensor)")
_library.define(
    "attention_backward",
    f"(Tensor grad_o, Tensor? grad_lse, {_INPUTS}, Tensor o, Tensor row_stats, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)


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
    """softmax(scale q k^T + bias) v over the keys that a query sees (Vaswani et al. 2017, equation 1).

    ``q`` (B, H, N, D); ``k`` and ``v`` (B, H / g, M, D): query head h reads head h // g. float32, float64, bfloat16 or float16, any
    strides. ``bias`` (q's dtype or float32, differentiable) and the bool ``mask`` (True: the query sees the key) broadcast to
    (B, H, N, M). ``causal``: query i sees keys 0 ... i + M - N, so the last query sees all. ``scale``: 1 / sqrt(D) where None.
    A query that sees no key gives zeros and the log-sum-exp -inf; one whose bias is -1e9 or lower for all keys still sees them.

    Returns the output (B, H, N, D), which lies in memory as (B, N, H, D), and with ``return_lse`` also log sum exp of the scores
    (B, H, N), float32 for 16-bit inputs. Derivatives of any order, forward mode and torch.func: docs/derivatives.md; memory is linear
    in the sequence, but for the graph of a second derivative. A wrong argument is a ValueError that names it.
    """
    bias, mask, scale = _check(q, k, v, bias, mask, scale)
    if wanted((q, k, v, bias)):
        o, lse, _ = _differentiable(q, k, v, bias, mask, causal, scale)
    else:
        o, lse, _ = _call_forward(q, k, v, bias, mask, causal, scale, False)
    return (o, lse) if return_lse else o


def _check(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float | None
) -> tuple[Tensor | None, Tensor | None, float]:
    """``bias`` and ``mask`` in four dimensions, and the scale."""
    check_floating("q", q)
    check_is_tensor("k", k)
    check_is_tensor("v", v)
    if q.ndim != 4:
        raise refusal("q", f"shape {tuple(q.shape)}", "(B, H, N, D)")
    batch, heads, n, d = q.shape
    if d == 0:
        raise refusal("q", "a head dimension of 0", "1 and more")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != d or k.shape[1] == 0 or heads % k.shape[1]:
        raise refusal("k", f"shape {tuple(k.shape)}", f"({batch}, heads, M, {d}) where heads divides q's {heads}")
    if v.shape != k.shape:
        raise refusal("v", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, as k")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype or t.device != q.device:
            raise refusal(name, f"{t.dtype} on {t.device}", f"{q.dtype} on {q.device}, as q")
    scores = (batch, heads, n, k.shape[2])
    if bias is not None:
        if bias.dtype not in (q.dtype, torch.float32) or (q.dtype == torch.float64) != (bias.dtype == torch.float64):
            supported = q.dtype if q.dtype in (torch.float64, torch.float32) else f"{q.dtype} or torch.float32"
            raise refusal("bias", bias.dtype, f"{supported}; a bool tensor is a mask")
        bias = _check_broadcast("bias", bias, scores, q)
    if mask is not None:
        if mask.dtype != torch.bool:
            raise refusal("mask", mask.dtype, "torch.bool, True where a query sees a key; numbers to add are a bias")
        mask = _check_broadcast("mask", mask, scores, q)
    if scale is None:
        scale = d**-0.5
    if not math.isfinite(scale):
        raise refusal("scale", scale, "a finite number")
    return bias, mask, float(scale)


def _check_broadcast(name: str, t: Tensor, scores: tuple[int, ...], q: Tensor) -> Tensor:
    if t.device != q.device:
        raise refusal(name, f"a tensor on {t.device}", f"{q.device}, as q")
    fits = t.ndim <= 4 and all(a in (1, b) for a, b in zip(t.shape[::-1], scores[::-1], strict=False))
    if not fits:
        raise refusal(name, f"shape {tuple(t.shape)}", f"a shape that broadcasts to {scores}")
    return t[(None,) * (4 - t.ndim)]


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` and its derivative along (``tq``, ``tk``, ``tv``), shaped as q, k and v: what sCM (Lu and Song 2024) and MeanFlow need.

    The other arguments are those of `attention`. Returns the output and its tangent, both (B, H, N, D) in q's dtype: two products of the
    size of q k^T and five more, memory linear in the sequence. Both are differentiable, and a graph of either keeps only the inputs and
    the output; the gradient of the tangent recomputes the scores. A wrong argument is a ValueError that names it.
    """
    bias, mask, scale = _check(q, k, v, bias, mask, scale)
    for name, t, primal in (("tq", tq, q), ("tk", tk, k), ("tv", tv, v)):
        check_tensor(name, t, primal.shape, primal.dtype, primal.device)
    if wanted((q, k, v, bias)):
        o, _, row_stats = _differentiable(q, k, v, bias, mask, causal, scale)
    else:
        o, _, row_stats = _call_forward(q, k, v, bias, mask, causal, scale, True)
    return o, tangent(Inputs(q, k, v, bias, mask, causal, scale), Inputs(tq, tk, tv, None), o, row_stats)[0]


def explain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> str:
    """Which forward pass and which backward pass `attention` runs for these arguments, and why: two sentences."""
    _check(q, k, v, bias, mask, scale)
    chosen = route(q, k, bias is not None or mask is not None or causal, wanted((q, k, v, bias)))
    backward = route_backward(q, k, bias is not None)
    return f"Forward: {chosen.kernel} ({chosen.why}). Backward: {backward.kernel} ({backward.why})."


# ---- which kernel runs -----------------------------------------------------------------------------------------------------------


_NOTHING = "there is nothing to compute"


@dataclass(frozen=True)
class Route:
    """What runs, and why."""

    kernel: str  # "genfast", "torch_cpu_flash" or "blocks"
    why: str


def route(q: Tensor, k: Tensor, terms: bool, derivatives: bool = False) -> Route:
    """Which forward pass runs; ``terms``: there is a bias, a mask or causality; ``derivatives``: a derivative will be asked for.

    Then torch's kernels are left out but for float64 with nothing to add: they give the log-sum-exp alone, beside a large bias not enough.
    """
    device, n, d = q.device.type, q.shape[2], q.shape[3]
    if q.numel() == 0 or k.numel() == 0:
        return Route("blocks", _NOTHING)
    if not _library.has_kernels(device):
        return Route("blocks", f"no kernels for {device} are loaded: plain torch over blocks of query rows")
    if device == "cpu" and q.dtype == torch.float64:
        if terms and derivatives:
            return Route("blocks", "float64 with terms to add and derivatives: plain torch over blocks of query rows")
        return Route("torch_cpu_flash", "float64: torch's tiled CPU kernel")
    equal = device == "cpu" and q.shape[1] == k.shape[1] and not derivatives
    if equal and n < 16:
        return Route("torch_cpu_flash", f"{n} queries do not fill a tile: torch's CPU kernel, measured faster below 16")
    if equal and q.dtype == torch.bfloat16 and d > 96 and not terms:
        return Route("torch_cpu_flash", f"bfloat16 of head dimension {d} with nothing to add: torch's CPU kernel, measured faster above 96")
    if device == "cpu":
        return Route("genfast", "tiles of queries and keys, online softmax")
    return _cuda_route(q, 256)


def _cuda_route(q: Tensor, hopper: int) -> Route:
    """What runs on CUDA; ``hopper``: the widest head for which that direction has a kernel for sm_90a."""
    device, d = q.device.type, q.shape[3]
    capability = torch.cuda.get_device_capability(q.device) if device == "cuda" else None
    if q.dtype == torch.float64 or d > 256:
        return Route(
            "blocks", f"the {device} kernels take 16- and 32-bit dtypes and head dimensions up to 256, not {q.dtype} of {d}: plain torch"
        )
    if q.dtype == torch.float32 or (capability is not None and capability < (8, 0)):
        return Route("genfast", "fused multiply-adds in float32, tiles of queries and keys")
    if capability == (9, 0) and d <= hopper and os.environ.get("GENFAST_ATTENTION_HOPPER") in ("1", "all"):
        where = "as GENFAST_ATTENTION_HOPPER asks, wgmma tiles fed by TMA where docs/attention-hopper.md allows, else mma.sync"
        return Route("genfast", where)
    return Route("genfast", "mma.sync tiles of queries and keys fed by cp.async")


def route_backward(q: Tensor, k: Tensor, sums: bool) -> Route:
    """Which backward pass runs; ``sums``: there is a bias or a gradient of the log-sum-exp."""
    device = q.device.type
    if q.numel() == 0 or k.numel() == 0:
        return Route("blocks", _NOTHING)
    if not _library.has_kernels(device):
        return Route("blocks", f"no kernels for {device} are loaded: plain torch over blocks of query rows")
    if device != "cpu":
        return _cuda_route(q, 128)
    if q.dtype != torch.float64:
        return Route("genfast", "tiles of queries and keys")
    if sums:
        return Route("blocks", "float64 with a bias or a gradient of the log-sum-exp: plain torch over blocks of query rows")
    return Route("torch_cpu_flash", "float64: torch's tiled CPU kernel")


def _heads_last(like: Tensor) -> Tensor:
    """(B, H, N, D) that lies as (B, N, H, D), which is what the next layer reads."""
    b, h, n, d = like.shape
    return like.new_empty(b, n, h, d).transpose(1, 2)


def _laid_out(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool, scale: float, derivatives: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, the log-sum-exp and, with ``derivatives``, row_stats (B, H, N, 2), from which the weights are made again: of the kernels
    what csrc/core/row_stats.h says, of plain torch row_max and row_sum."""
    kernel = route(q, k, bias is not None or mask is not None or causal, derivatives).kernel
    row_stats: Tensor | None
    if kernel == "genfast":
        o, lse = _heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        row_stats = q.new_empty((*q.shape[:3], 2), dtype=torch.float32) if derivatives else None
        bias, mask = (whole(t, q, k) for t in (bias, mask))
        _backend.namespace.attention_(o, lse, row_stats, unit(q), unit(k), unit(v), bias, mask, causal, scale)
        return o, lse, row_stats
    if kernel == "torch_cpu_flash":
        o, lse = _torch_cpu_flash(q, k, v, bias, mask, causal, scale)
        row_stats = torch.stack((lse.masked_fill(lse == -torch.inf, 0), torch.ones_like(lse)), -1) if derivatives else None
    else:
        o, lse, row_stats = blocks.forward(Inputs(q, k, v, bias, mask, causal, scale))
    return _laid_out(o), lse.contiguous(), row_stats


def _backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    o: Tensor,
    row_stats: Tensor,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = Inputs(q, k, v, bias, mask, causal, scale)
    kernel = route_backward(q, k, bias is not None or grad_lse is not None).kernel
    if kernel == "genfast":
        dq, dk, dv = (_heads_last(t) for t in (q, k, v))
        dbias = torch.empty(bias.shape, dtype=torch.float32, device=q.device) if bias_grad and bias is not None else None
        rows, mask = (whole(t, q, k) for t in (bias, mask))
        delta, dlse = q.new_empty(q.shape[:3], dtype=torch.float32), None if grad_lse is None else grad_lse.contiguous()
        read = (unit(grad_o), dlse, unit(q), unit(k), unit(v), rows, mask, causal, scale, unit(o), row_stats.contiguous())
        _backend.namespace.attention_backward_(dq, dk, dv, dbias, delta, *read)
        return dq, dk, dv, q.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)
    if kernel == "torch_cpu_flash":
        grads = _torch_cpu_flash_backward(x, o, row_stats, grad_o)
    else:
        grads = blocks.backward(x, o, row_stats, grad_o, grad_lse, bias_grad)
    dq, dk, dv = (_laid_out(g) for g in grads[:3])
    return dq, dk, dv, grads[3].contiguous() if bias_grad else q.new_empty(0)


# ---- torch's CPU kernel ----------------------------------------------------------------------------------------------------------


def _additive(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool) -> tuple[Tensor | None, bool]:
    """Bias, mask and what of causality torch's kernel lacks (its mask begins at the top left) as one tensor; whether it stays causal."""
    n, m = q.shape[2], k.shape[2]
    if causal and (n != m or bias is not None or mask is not None):
        sees = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)[None, None]
        mask, causal = sees if mask is None else mask & sees, False
    if mask is not None:
        zero = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        bias = torch.where(mask, zero, -torch.inf)
    return None if bias is None else unit(bias.expand(*bias.shape[:3], m)), causal


def _torch_cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    additive, causal = _additive(q, k, bias, mask, causal)
    q, k, v = unit(q), _shared(k, q), _shared(v, q)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=additive, scale=scale)
    if additive is not None:  # torch says 0 of a row that sees nothing
        lse = lse.masked_fill((additive == -torch.inf).all(-1), -torch.inf)
    return o, lse


def _torch_cpu_flash_backward(x: Inputs, o: Tensor, row_stats: Tensor, grad_o: Tensor) -> tuple[Tensor, ...]:
    shift, total = row_stats.unbind(-1)
    lse = shift + total.log()
    additive, causal = _additive(x.q, x.k, x.bias, x.mask, x.causal)
    q, k, v = unit(x.q), _shared(x.k, x.q), _shared(x.v, x.q)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        unit(grad_o), q, k, v, o, lse, 0.0, causal, attn_mask=additive, scale=x.scale
    )
    return dq, *(g.unflatten(1, (x.k.shape[1], -1)).sum(2) if k.shape != x.k.shape else g for g in (dk, dv))


def _shared(t: Tensor, q: Tensor) -> Tensor:
    """A key or value head for each query head: torch's kernel knows no groups."""
    return unit(t) if t.shape[1] == q.shape[1] else t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _straight(*tensors: Tensor) -> bool:
    """Whether nobody watches the operators: then the dispatcher, which costs as much as a small call, is left out."""
    return readable(tensors[0]) and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


def _call_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Any]:
    if _straight(q, k, v):
        return _untracked(_forward)(q, k, v, *rest)  # type: ignore[return-value]
    o, lse, row_stats = torch.ops.genfast.attention(q, k, v, *rest)
    return o, lse, row_stats


def _call_backward(do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if _straight(do, q, k, v):
        return _untracked(_backward)(do, dlse, q, k, v, *rest)
    grads: tuple[Tensor, ...] = torch.ops.genfast.attention_backward(do, dlse, q, k, v, *rest)
    return grads


# ---- the operators ---------------------------------------------------------------------------------------------------------------


def _fake_forward(q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _heads_last(q), q.new_empty(q.shape[:3], dtype=wide), q.new_empty((*q.shape[:3], 2) if rest[-1] else 0, dtype=wide)


def _fake_backward(
    grad_o: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: object
) -> tuple[Tensor, ...]:
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if rest[-1] and bias is not None else q.new_empty(0)
    return (*(_heads_last(t) for t in (q, k, v)), dbias)


def _operator(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """An operator returns tensors: without derivatives an empty one for row_stats."""
    o, lse, row_stats = _forward(*arguments)
    return o, lse, row_stats if arguments[-1] and row_stats is not None else lse.new_empty(0)


def _untracked(run: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The results lie transposed; marked as views they would make a tangent of another layout an error."""

    def kernel(*arguments: Any) -> tuple[Any, ...]:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)):
            return run(*arguments)

    return kernel


for _name, _run, _fake in (("attention", _operator, _fake_forward), ("attention_backward", _backward, _fake_backward)):
    implementations.impl(_name, _untracked(_run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"genfast::{_name}", _fake, lib=implementations)
    refuse_lost_derivatives(_name, "genfast.ops.attention")


# ---- derivatives -----------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    o, lse, row_stats = _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    return o, lse, row_stats


def _fold(t: Tensor | None, dim: int | None, size: int, batch: int, expand: bool) -> Tensor | None:
    """Puts a dimension of torch.vmap into the batch, of which ``t`` may hold one for all. ``expand``: even where it has no such one."""
    if t is None or (dim is None and not expand and t.shape[0] == 1 != batch):
        return t
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.expand(size, batch, *t.shape[2:]).flatten(0, 1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _call_forward(q, k, v, bias, mask, causal, scale, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.causal, ctx.scale = inputs
        o, _, row_stats = output
        ctx.mark_non_differentiable(row_stats)
        ctx.save_for_backward(*tensors, o, row_stats)
        ctx.save_for_forward(*tensors, o, row_stats)
        ctx.set_materialize_grads(False)

    @gradient_rule
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask, o, row_stats = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(o)
        bias_grad = bias is not None and ctx.needs_input_grad[3]
        differentiated = wanted((do, dlse, q, k, v, bias))
        run = _AttentionBackward.apply if differentiated else _AttentionBackward.forward
        grads: tuple[Tensor, ...] = run(do, dlse, q, k, v, bias, mask, ctx.causal, ctx.scale, o.detach(), row_stats, bias_grad)
        return (*grads[:3], grads[3] if bias_grad else None, None, None, None)

    @tangent_rule
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> tuple[Tensor, Tensor, None]:
        q, k, v, bias, mask, o, row_stats = saved
        to, tlse = tangent(Inputs(q, k, v, bias, mask, ctx.causal, ctx.scale), _direction((q, k, v, bias), tangents), o, row_stats)
        return to, tlse, None

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[int | None, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batch = q.shape[0] if dims[0] is None else q.movedim(dims[0], 0).shape[1]
        q, k, v = (_fold(t, d, info.batch_size, batch, True) for t, d in zip((q, k, v), dims[:3], strict=True))  # type: ignore[assignment]
        bias, mask = (_fold(t, d, info.batch_size, batch, False) for t, d in zip((bias, mask), dims[3:5], strict=True))
        results = _Attention.apply(q, k, v, bias, mask, causal, scale)  # type: ignore[no-untyped-call]
        return tuple(t.unflatten(0, (info.batch_size, batch)) for t in results), (0, 0, 0)


class _AttentionBackward(torch.autograd.Function):
    """The gradient is the derivative of (do, o) + (dlse, lse), so the gradient of its product with a direction is the tangent of it along
    that direction: the second derivative is symmetric. o and row_stats are values it may use; their dependence is accounted for."""

    @staticmethod
    def forward(
        do: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        o: Tensor,
        row_stats: Tensor,
        bias_grad: bool,
    ) -> tuple[Tensor, ...]:
        grads = _call_backward(do, dlse, q, k, v, bias, mask, causal, scale, o, row_stats, bias_grad)
        return tuple(grads) if bias_grad else tuple(grads[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.causal, ctx.scale, _, _, ctx.bias_grad = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _tangent(
        ctx: Any, saved: Sequence[Any], direction: Sequence[Tensor | None], tdo: Tensor | None, tdlse: Tensor | None, bias_grad: bool
    ) -> Any:
        do, dlse, q, k, v, bias, mask = saved
        x = Inputs(q, k, v, bias, mask, ctx.causal, ctx.scale)
        return blocks.backward_tangent(x, do, dlse, _direction((q, k, v, bias), direction), tdo, tdlse, bias_grad)

    @gradient_rule
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        bias_wanted = ctx.needs_input_grad[5]
        direction = (*cotangents, None) if len(cotangents) == 3 else cotangents
        dq, dk, dv, *dbias, to, tlse = _AttentionBackward._tangent(ctx, ctx.saved_tensors, direction, None, None, bias_wanted)
        gradients = (to, tlse if ctx.needs_input_grad[1] else None, dq, dk, dv, dbias[0] if dbias else None)
        return (*gradients, *(None,) * 6)

    @tangent_rule
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> tuple[Tensor, ...]:
        tdo, tdlse, *direction = tangents[:6]
        results: tuple[Tensor, ...] = _AttentionBackward._tangent(ctx, saved, direction, tdo, tdlse, ctx.bias_grad)
        return results[:-2]

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        do, dlse, q, k, v, bias, mask, causal, scale, o, row_stats, bias_grad = arguments
        batch = q.shape[0] if dims[2] is None else q.movedim(dims[2], 0).shape[1]
        rows = None if bias is None else (bias if dims[5] is None else bias.movedim(dims[5], 0)[0]).shape[0]

        def fold(t: Tensor | None, dim: int | None, expand: bool = True) -> Tensor | None:
            return _fold(t, dim, info.batch_size, batch, expand)

        do, dlse, q, k, v, bias = (fold(t, d) for t, d in zip((do, dlse, q, k, v, bias), dims[:6], strict=True))
        mask, o, row_stats = fold(mask, dims[6], False), fold(o, dims[9]), fold(row_stats, dims[10])
        results = _AttentionBackward.apply(do, dlse, q, k, v, bias, mask, causal, scale, o, row_stats, bias_grad)  # type: ignore[no-untyped-call]
        grads = [t.unflatten(0, (info.batch_size, batch)) for t in results]
        if bias_grad and rows != batch:
            grads[3] = grads[3].sum(1, keepdim=True)
        return tuple(grads), (0,) * len(grads)


def _direction(primals: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> Inputs:
    """The tangents of q, k, v and bias as `Inputs`, zeros where there is none."""
    q, k, v = (torch.zeros_like(p) if t is None and p is not None else t for p, t in zip(primals[:3], tangents[:3], strict=True))
    assert q is not None and k is not None and v is not None
    return Inputs(q, k, v, tangents[3] if primals[3] is not None else None)
