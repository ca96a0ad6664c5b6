"""The tangent of `genfast::attention` from its output and row_stats: the operator, its kernel on CUDA, and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from genfast import _library

from . import _attention_blocks as blocks
from . import _backend
from ._attention_blocks import Inputs, unit, whole
from ._autograd import gradient_rule, refuse_lost_derivatives
from ._backend import implementations

_PRIMALS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, bool causal, float scale"
_library.define(
    "attention_tangent_",
    f"(Tensor(a!) to, Tensor(b!) tlse, {_PRIMALS}, Tensor tq, Tensor tk, Tensor tv, Tensor o, Tensor row_stats) -> ()",
)
_library.define(
    "attention_tangent",
    f"({_PRIMALS}, Tensor tq, Tensor tk, Tensor tv, Tensor? tbias, Tensor o, Tensor row_stats) -> (Tensor, Tensor)",
)


def has_kernel(q: Tensor, k: Tensor, tbias: Tensor | None) -> bool:
    """bfloat16 and float16 of heads up to 256 on sm_80 and newer; a bias may be there, but its tangent not."""
    if q.device.type != "cuda" or not _library.has_kernels("cuda") or tbias is not None or q.numel() == 0 or k.numel() == 0:
        return False
    return q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def tangent(x: Inputs, t: Inputs, o: Tensor, row_stats: Tensor) -> tuple[Tensor, Tensor]:
    """The tangents of ``o`` and the log-sum-exp along ``t`` (its q, k, v, bias), differentiable. Their graph keeps the inputs alone.

    Where a transform, a tracer or a second tangent is about, by torch's operators, which have every rule.
    """
    tensors = (x.q, x.k, x.v, x.bias, t.q, t.k, t.v, t.bias)
    transforms = torch._C._functorch.get_interpreter_stack() or []
    traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    # Inside a jvp rule forward mode is off, and its primals, which are still dual, are meant without their tangents.
    dual = torch._C._is_fwd_grad_enabled() and any(u is not None and forward_ad.unpack_dual(u).tangent is not None for u in tensors)
    nested = len(transforms) > 1 or any(each.key() != TransformType.Jvp for each in transforms)
    if traced or dual or nested:
        return blocks.tangent(x, t)
    arguments = (x.q, x.k, x.v, x.bias, x.mask, x.causal, x.scale, t.q, t.k, t.v, t.bias, o, row_stats)
    if transforms or (torch.is_grad_enabled() and any(u is not None and u.requires_grad for u in tensors)):
        to, tlse = _Tangent.apply(*arguments)  # type: ignore[no-untyped-call]
        return to, tlse
    return _call(*arguments)


def _call(*arguments: Any) -> tuple[Tensor, Tensor]:
    to, tlse = torch.ops.genfast.attention_tangent(*(a.detach() if isinstance(a, Tensor) else a for a in arguments))
    return to, tlse


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    tbias: Tensor | None,
    o: Tensor,
    row_stats: Tensor,
) -> tuple[Tensor, Tensor]:
    if has_kernel(q, k, tbias):
        to, tlse = torch.empty_like(o), row_stats.new_empty(row_stats.shape[:3])
        rows = [unit(t) for t in (q, k, v, tq, tk, tv)]
        terms = (whole(bias, q, k), whole(mask, q, k), causal, scale)
        _backend.namespace.attention_tangent_(to, tlse, *rows[:3], *terms, *rows[3:], o, row_stats)
        return to, tlse
    to, tlse = blocks.tangent(Inputs(q, k, v, bias, mask, causal, scale), Inputs(tq, tk, tv, tbias))
    return torch.empty_like(o).copy_(to), tlse


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    o, row_stats = arguments[11:]
    return torch.empty_like(o), row_stats.new_empty(row_stats.shape[:3])


implementations.impl("attention_tangent", _run, "CompositeExplicitAutograd")
torch.library.register_fake("genfast::attention_tangent", _fake, lib=implementations)
refuse_lost_derivatives("attention_tangent", "genfast.ops.attention_jvp")


class _Tangent(torch.autograd.Function):
    """Its gradient is torch's of the blocks, recomputed, so of any order."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return _call(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, bias, mask, ctx.causal, ctx.scale, *tangents, _, _ = inputs
        ctx.save_for_backward(q, k, v, bias, mask, *tangents)
        ctx.set_materialize_grads(False)

    @gradient_rule
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiated = torch.is_grad_enabled()
        *saved, mask, tq, tk, tv, tbias = ctx.saved_tensors
        with torch.enable_grad():
            # Views, so that each argument has a gradient of its own where one tensor is several of them.
            views: list[Any] = [None if t is None else t.view_as(t) for t in (*saved, tq, tk, tv, tbias)]
            q, k, v, bias, tq, tk, tv, tbias = views
            results = blocks.tangent(Inputs(q, k, v, bias, mask, ctx.causal, ctx.scale), Inputs(tq, tk, tv, tbias))
        given = [(r, c) for r, c in zip(results, cotangents, strict=True) if c is not None]
        tensors = (q, k, v, bias, None, None, None, tq, tk, tv, tbias)
        wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad[:11], strict=True) if needed]
        grads = torch.autograd.grad(
            [r for r, _ in given], wanted, [c.to(r.dtype) for r, c in given], create_graph=differentiated, allow_unused=True
        )
        found = iter(grads)
        return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:11]), None, None)
