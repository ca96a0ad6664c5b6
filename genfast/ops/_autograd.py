"""Derivatives of the operators, exact or refused (docs/derivatives.md).

Without clip, rescale and threshold a solver step is affine: out = A (x, cond, uncond, history) + noise. Its tangent is the same row
without the noise, and its gradient the transposed row, which is again a row for the same kernel. The two are each other's
derivatives, so they close under backward, forward and vmap to any order. The other steps differentiate through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from genfast import reference

from ._backend import implementations
from ._checks import refusal

_CLIP, _COEF, _TERMS, _OUTPUTS, _NOISE = 3, 8, 10, 3, 9
_INPUT_TERMS = (0, 3, 4)  # where a row holds its first three inputs: x, h0, h1

_DERIVATIVE = "an input with a gradient, a tangent or inside a torch.func transform"


def _carried(values: Iterable[Any]) -> bool:
    """Whether a gradient or a tangent flows through one of the tensors among ``values`` and the lists in them."""
    gradient, transform, tangent = torch.is_grad_enabled(), torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0
    if not (gradient or transform or tangent):
        return False
    for t in values:  # a plain loop: every call of an operator comes through here
        if isinstance(t, list):
            if _carried(t):
                return True
            continue
        if not isinstance(t, Tensor):
            continue
        if gradient and t.requires_grad:
            return True
        if transform and torch._C._functorch.is_functorch_wrapped_tensor(t):
            return True
        if tangent and forward_ad.unpack_dual(t).tangent is not None:
            return True
    return False


def wanted(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a gradient, a tangent or a torch.func transform is about. While compiling, `refuse_lost_derivatives` sees to the rest."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _carried(tensors)


def batched(gradient: Tensor | None) -> bool:
    """Whether ``gradient`` is a batch of them, by ``is_grads_batched`` or ``vectorize=True``."""
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def gradient_rule(rule: Callable[..., Any]) -> Any:
    """``rule(ctx, *gradients)`` as the ``backward`` of an autograd.Function.

    torch hands a batch of gradients through custom derivatives as if it were one, and drops the graph of what they return (seen on 2.13):
    derivatives of it would be wrong without a word.
    """

    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        for gradient in gradients:
            if batched(gradient):
                got = "a batch of them, by is_grads_batched or vectorize=True"
                raise refusal("gradients of genfast's operators", got, "one at a time, or torch.vmap over torch.func.vjp")
        return rule(ctx, *gradients)

    return staticmethod(backward)


def tangent_rule(rule: Callable[..., Any]) -> Any:
    """``rule(ctx, saved, *tangents)`` as the ``jvp`` of an autograd.Function; ``saved``: its saved tensors.

    torch (seen on 2.13) switches forward mode off for every level while a rule runs, so that a tangent of a tangent would silently be zero.
    Within torch.func it is therefore on again here, and the primals come without the tangent that this level has given them.
    """

    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return rule(ctx, ctx.saved_tensors, *tangents)
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [None if t is None else forward_ad.unpack_dual(t, level=0).primal for t in ctx.saved_tensors]
            return rule(ctx, saved, *tangents)

    return staticmethod(jvp)


def refuse_derivatives(op: str, tensors: Iterable[Tensor | None], instead: str) -> None:
    """An operator that writes into its arguments has no derivative: losing one silently would be wrong."""
    if wanted(tensors):
        raise refusal(op, _DERIVATIVE, f"none of these; call {instead}")


def _clips(coef: Tensor) -> bool:
    """Whether the row clips. Under a tracer (make_fx) only a constant may answer: the graph would be wrong for other rows."""
    tracer = get_proxy_mode()
    if tracer is not None and has_proxy_slot(coef, tracer.tracer):
        raise refusal("coef", "a table that is an input of the traced function", "a constant, where derivatives are traced")
    with _disable_current_modes():
        return float(coef.flatten()[_CLIP]) != 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def solver_step(
    inputs: Sequence[Tensor],
    cond: Tensor,
    uncond: Tensor | None,
    coef: Tensor,
    index: Tensor,
    seeds: Tensor | None,
    outputs: int,
    rescale: bool,
    threshold: bool,
) -> list[Tensor]:
    """The functional step with derivatives in ``inputs``, ``cond`` and ``uncond``. Reads one coefficient from the device.

    ``coef`` (40,) or (1, 40), ``index`` (12,) or (1, 12); the rest is checked.
    """
    if coef.requires_grad:
        raise refusal("coef", "requires_grad=True", "coefficients without gradient")
    if rescale or threshold or _clips(coef):
        return reference.solver_step(
            inputs, cond, coef, index, uncond=uncond, seeds=seeds, outputs=outputs, rescale=rescale, threshold=threshold
        )
    x, *history = inputs
    coef, index = coef.view(1, -1), index.view(1, -1)
    return list(_apply(_Step, coef, index, seeds, outputs, x, cond, uncond, *history))


def refuse_lost_derivatives(name: str, instead: str) -> None:
    """Where the operator ``name``, called straight or found by a tracer, would lose a derivative without a word, it refuses."""

    operator = getattr(torch.ops.genfast, name).default

    def kernel(*arguments: Any) -> Any:
        if _carried(arguments):
            raise refusal(f"torch.ops.genfast.{name}", _DERIVATIVE, f"none of these; call {instead} outside torch.compile")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    implementations.impl(name, kernel, "Autograd")


for _name in ("solver_step", "solver_step_", "solver_step_slots_"):
    refuse_lost_derivatives(_name, "genfast.ops.solver_step")


def _kernel(
    coef: Tensor,
    index: Tensor,
    seeds: Tensor | None,
    outputs: int,
    x: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    history: Sequence[Tensor],
    row: int = 0,
) -> list[Tensor]:
    counter = torch.full((1,), row, dtype=torch.int64, device=coef.device)
    step = torch.ops.genfast.solver_step
    result: list[Tensor] = step([x, *history], cond, uncond, coef, index, counter, seeds, outputs, False, False)
    return result


def _apply(function: Any, *arguments: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = function.apply(*arguments)
    return results


def _without_noise(coef: Tensor) -> Tensor:
    coef = coef.clone()
    coef[:, _COEF + _NOISE : _COEF + _OUTPUTS * _TERMS : _TERMS] = 0
    return coef


def _transposed(coef: Tensor, outputs: int, guided: bool, history: int, wanted: Sequence[bool]) -> Tensor:
    """The gradient's rows, (ceil(wanted / 3), 40): output j of them is the gradient of the j-th wanted input."""
    c = coef.flatten().double()
    ax, am, g = c[:3]
    C = c[_COEF : _COEF + _OUTPUTS * _TERMS].view(_OUTPUTS, _TERMS)[:outputs].T
    through_model = C[1] * am + C[2]
    columns = [C[0] + C[1] * ax, through_model * g if guided else through_model]
    columns += [through_model * (1 - g)] if guided else []
    columns += C[3 : 3 + history]
    matrix = torch.stack([column for column, w in zip(columns, wanted, strict=True) if w])
    launches = -(-len(matrix) // _OUTPUTS)
    blocks = coef.new_zeros(launches * _OUTPUTS, _TERMS)
    for k, term in enumerate(_INPUT_TERMS[:outputs]):
        blocks[: len(matrix), term] = matrix[:, k].to(coef.dtype)
    return F.pad(blocks.view(launches, -1), (_COEF, coef.shape[1] - _COEF - _OUTPUTS * _TERMS))


class _Fold:
    """Folds a vmapped dimension into the batch: a step treats samples alone, so the result is the same."""

    def __init__(self, info: Any, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> None:
        self.size = info.batch_size
        self.tensors = [None if t is None else self._front(t, d).flatten(0, 1) for t, d in zip(tensors, dims, strict=True)]

    def _front(self, t: Tensor, dim: int | None) -> Tensor:
        return t.expand(self.size, *t.shape) if dim is None else t.movedim(dim, 0)

    def out(self, results: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return tuple(t.unflatten(0, (self.size, len(t) // max(self.size, 1))) for t in results), (0,) * len(results)


def _refuse_batched_table(*dims: int | None) -> None:
    if any(d is not None for d in dims):
        raise refusal("coef", "a table batched by torch.vmap", "one table for all")


class _Step(torch.autograd.Function):
    """out = A (x, cond, uncond, history) + noise."""

    @staticmethod
    def forward(
        coef: Tensor, index: Tensor, seeds: Tensor | None, outputs: int, x: Tensor, cond: Tensor, uncond: Tensor | None, *history: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_kernel(coef, index, seeds, outputs, x, cond, uncond, history))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        coef, index, _, ctx.outputs, *tensors = inputs
        ctx.save_for_backward(coef)
        ctx.save_for_forward(coef, index, *tensors)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]

    @gradient_rule
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (coef,) = ctx.saved_tensors
        present = [dtype for dtype in ctx.dtypes if dtype is not None]
        wanted = [w for w, dtype in zip(ctx.needs_input_grad[4:], ctx.dtypes, strict=True) if dtype is not None]
        results = iter(_apply(_TransposedStep, coef, present, wanted, ctx.dtypes[2] is not None, *grads))
        return (None, None, None, None, *(next(results) if w else None for w in ctx.needs_input_grad[4:]))

    @tangent_rule
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> tuple[Tensor, ...]:
        coef, index, *primals = saved
        parts = [torch.zeros_like(p) if t is None and p is not None else t for t, p in zip(tangents[4:], primals, strict=True)]
        return _apply(_Step, _without_noise(coef), index, None, ctx.outputs, *parts)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], coef: Tensor, index: Tensor, seeds: Tensor | None, outputs: int, *tensors: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        _refuse_batched_table(*dims[:2])
        fold = _Fold(info, (seeds, *tensors), (dims[2], *dims[4:]))
        return fold.out(_apply(_Step, coef, index, fold.tensors[0], outputs, *fold.tensors[1:]))


class _TransposedStep(torch.autograd.Function):
    """The wanted inputs' gradients, in the inputs' dtypes, from those of the outputs: A transposed."""

    @staticmethod
    def forward(coef: Tensor, dtypes: Sequence[torch.dtype], wanted: Sequence[bool], guided: bool, *grads: Tensor) -> tuple[Tensor, ...]:
        rows = _transposed(coef, len(grads), guided, len(dtypes) - 2 - guided, wanted)
        index = torch.zeros(len(rows), 12, dtype=torch.int64, device=coef.device)
        if len(set(dtypes)) > 1:  # otherwise a gradient would be rounded to the state's dtype on its way to a wider one
            grads = tuple(g.to(coef.dtype) for g in grads)
        results: list[Tensor] = []
        for row in range(len(rows)):
            outputs = min(_OUTPUTS, sum(wanted) - len(results))
            results += _kernel(rows, index, None, outputs, grads[0], grads[0], None, grads[1:], row)
        kept = [dtype for dtype, w in zip(dtypes, wanted, strict=True) if w]
        return tuple(result.to(dtype) for result, dtype in zip(results, kept, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        coef, ctx.dtypes, ctx.wanted, ctx.guided, *grads = inputs
        ctx.save_for_backward(coef)
        ctx.save_for_forward(coef, *grads)
        ctx.outputs = len(grads)

    @gradient_rule
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (coef,) = ctx.saved_tensors
        given = iter(grads)
        zeros = [None if w else torch.zeros_like(grads[0], dtype=dtype) for dtype, w in zip(ctx.dtypes, ctx.wanted, strict=True)]
        x, cond, *rest = (next(given) if zero is None else zero for zero in zeros)
        uncond, history = (rest[0], rest[1:]) if ctx.guided else (None, rest)
        index = torch.zeros(1, 12, dtype=torch.int64, device=coef.device)
        return (None, None, None, None, *_apply(_Step, _without_noise(coef), index, None, ctx.outputs, x, cond, uncond, *history))

    @tangent_rule
    def jvp(ctx: Any, saved: Sequence[Any], *tangents: Tensor | None) -> tuple[Tensor, ...]:
        coef, *primals = saved
        parts = [torch.zeros_like(p) if t is None else t for t, p in zip(tangents[4:], primals, strict=True)]
        return _apply(_TransposedStep, coef, ctx.dtypes, ctx.wanted, ctx.guided, *parts)

    @staticmethod
    def vmap(
        info: Any,
        dims: tuple[int | None, ...],
        coef: Tensor,
        dtypes: Sequence[torch.dtype],
        wanted: Sequence[bool],
        guided: bool,
        *grads: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        _refuse_batched_table(dims[0])
        fold = _Fold(info, grads, dims[4:])
        return fold.out(_apply(_TransposedStep, coef, dtypes, wanted, guided, *fold.tensors))
