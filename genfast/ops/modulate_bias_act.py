"""What stands around a modulated convolution in one pass: scale, noise, bias, activation, gain, clamp, scale (docs/gan-ops.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from genfast.reference.bias_act import ACTIVATIONS, bias_act_derivative
from genfast.reference.solver_step import layout_of

from . import _backend
from ._activations import CODES, curve_of
from ._autograd import gradient_rule, refuse_lost_derivatives, wanted
from ._checks import check_floating, refusal
from .bias_act import bias_act

_CURVE = "int act, float alpha, float gain, float? clamp"
_TENSORS = "Tensor? b, Tensor? scale, Tensor? noise, Tensor? post_scale"
SCHEMAS = {
    "modulate_bias_act_": "(Tensor(a!) out, Tensor(b!)? sums, Tensor(c!)? grad_noise, Tensor x, Tensor? dy, Tensor? scale, "
    f"Tensor? noise, Tensor? b, Tensor? post_scale, {_CURVE}) -> ()",
    "modulate_bias_act": f"(Tensor x, {_TENSORS}, {_CURVE}) -> Tensor",
    "modulate_bias_act_backward": f"(Tensor dy, Tensor x, {_TENSORS}, {_CURVE}, bool with_noise) -> (Tensor, Tensor, Tensor)",
}


class _Curve(NamedTuple):
    act: str
    alpha: float
    gain: float
    clamp: float | None


def modulate_bias_act(
    x: Tensor,
    b: Tensor | None = None,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    post_scale: Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """``post_scale * bias_act(scale * x + noise, b)`` in one pass, backward in one (Karras et al. 2020, section 2.2).

    ``x`` (B, C, H, W), float32, float64, bfloat16 or float16; the other tensors in any of those: ``scale`` (B, C), a layer's
    demodulation, or the styles before a convolution; ``noise`` (B, 1, H, W), or (1, 1, H, W) for all samples; ``b`` (C,); ``post_scale``
    (B, C), the next layer's styles; each None for none. ``act``, ``alpha``, ``gain`` and ``clamp`` as `bias_act`. Returns x's shape, dtype
    and memory format. Computed in float32 (float64 for float64) and rounded once. Differentiable to every order in all tensors:
    docs/derivatives.md. Raises ValueError for anything else.
    """
    check_floating("x", x)
    if x.ndim != 4:
        raise refusal("x", f"{x.ndim} dimensions", "4: (B, C, H, W)")
    batch, channels, height, width = x.shape
    shapes: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "b": (b, [(channels,)]),
        "scale": (scale, [(batch, channels)]),
        "noise": (noise, [(batch, 1, height, width), (1, 1, height, width)]),
        "post_scale": (post_scale, [(batch, channels)]),
    }
    for name, (t, supported) in shapes.items():
        if t is not None:
            check_floating(name, t)
            if t.shape not in supported or t.device != x.device:
                raise refusal(name, f"shape {tuple(t.shape)} on {t.device}", f"{' or '.join(map(str, supported))} on {x.device}")
    curve = _Curve(*curve_of(act, alpha, gain, clamp))
    if scale is None and noise is None and post_scale is None:
        return bias_act(x, None if b is None else b.to(x.dtype), 1, *curve)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    tensors = [None if t is None else t.to(wide) for t in (b, scale, noise, post_scale)]
    if not wanted((x, *tensors)):
        return _kernel(x, tensors, curve)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _composed(x, tensors, curve)
    result: Tensor = _differentiable(x, tensors, curve)
    return result


_Tensors = list[Tensor | None]  # b, scale, noise, post_scale, in the type of the arithmetic


def _options(curve: _Curve) -> tuple[int, float, float, float | None]:
    return CODES[curve.act], curve.alpha, curve.gain, curve.clamp


def _kernel(x: Tensor, tensors: _Tensors, curve: _Curve) -> Tensor:
    result: Tensor = torch.ops.genfast.modulate_bias_act(x, *tensors, *_options(curve))
    return result


def _composed(x: Tensor, tensors: _Tensors, curve: _Curve) -> Tensor:
    """The same of torch's operators and `bias_act`, which have derivatives of every order and kind."""
    b, scale, noise, post_scale = (None if t is None else t.to(x.dtype) for t in tensors)
    y = x if scale is None else x * scale[:, :, None, None]
    y = bias_act(y if noise is None else y + noise, b, 1, *curve)
    return y if post_scale is None else y * post_scale[:, :, None, None]


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(x: Tensor, tensors: _Tensors, curve: _Curve) -> Tensor:
    result: Tensor = _Modulate.apply(x, *tensors, curve)  # type: ignore[no-untyped-call]
    return result


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        *tensors, curve = arguments
        ctx.curve = curve
        ctx.save_for_backward(x, *tensors)
        return _kernel(x, tensors, curve)

    @gradient_rule
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:5]
        return (*_Gradient.apply(dy, ctx.curve, needed, *ctx.saved_tensors), None)  # type: ignore[no-untyped-call]


class _Gradient(torch.autograd.Function):
    """The gradients in x, b, scale, noise and post_scale as far as they are needed. Its own derivative is that of the composition."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, curve: _Curve, needed: tuple[bool, ...], x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
        ctx.curve, ctx.needed = curve, needed
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dy, x, *tensors)
        b, scale, noise, post_scale = tensors
        dx, sums, grad_noise = torch.ops.genfast.modulate_bias_act_backward(dy, x, *tensors, *_options(curve), needed[3])
        results = [dx] + [None] * 4
        for i, t in ((1, b), (2, scale), (4, post_scale)):
            if needed[i] and t is not None:
                results[i] = (sums[0].sum(0) if i == 1 else sums[i // 2]).to(t.dtype)
        if noise is not None and needed[3]:
            results[3] = grad_noise.sum(0, keepdim=True) if len(noise) < len(x) else grad_noise
        return tuple(r if n else None for r, n in zip(results, needed, strict=True))

    @gradient_rule
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        further, needs = torch.is_grad_enabled(), (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        # Views, so that a tensor computed from another one, say scale from x, does not lead there a second time.
        given: list[Any] = [
            None if t is None else t.view_as(t) if further and t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors
        ]
        dy, x, *tensors = given
        with torch.enable_grad():
            y = _composed(x, tensors, ctx.curve)
            first = torch.autograd.grad(y, [t for t, n in zip((x, *tensors), ctx.needed, strict=True) if n], dy, create_graph=True)
            cotangents = [g for g, n in zip(grads, ctx.needed, strict=True) if n]
            pairs = [(f, g) for f, g in zip(first, cotangents, strict=True) if g is not None and f.requires_grad]
            asked = [t for t, n in zip(given, needs, strict=True) if n]
            found = torch.autograd.grad([f for f, _ in pairs], asked, [g for _, g in pairs], create_graph=further, allow_unused=True)
        results = iter(found)
        grad_dy, *rest = (next(results) if n else None for n in needs)
        return grad_dy, None, None, *rest


# ---- the operators -----------------------------------------------------------------------------------------------------------


def _launch(dy: Tensor | None, x: Tensor, tensors: _Tensors, options: tuple[Any, ...], with_noise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result or dx, and for a gradient the sums (3, B, C) float64 and the noise's gradient (B, 1, H, W)."""
    layout = layout_of(x)
    x = x.contiguous(memory_format=layout)
    dy = None if dy is None else dy.contiguous(memory_format=layout)
    out = torch.empty_like(x, memory_format=layout)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.zeros(0 if dy is None else 3, *x.shape[:2], dtype=torch.float64, device=x.device)
    grad_noise = torch.zeros(x.shape[0] if with_noise else 0, 1, *x.shape[2:], dtype=wide, device=x.device)
    if x.numel():
        b, scale, noise, post_scale = (None if t is None else t.contiguous() for t in tensors)
        given = (None if dy is None else sums, grad_noise if with_noise else None, x, dy)
        _backend.namespace.modulate_bias_act_(out, *given, scale, noise, b, post_scale, *options)
    return out, sums, grad_noise


def _modulate_bias_act_(
    out: Tensor,
    sums: Tensor | None,
    grad_noise: Tensor | None,
    x: Tensor,
    dy: Tensor | None,
    scale: Tensor | None,
    noise: Tensor | None,
    b: Tensor | None,
    post_scale: Tensor | None,
    act: int,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> None:
    _backend.reference_runs(x.device)
    factor, post = (1.0 if t is None else t[:, :, None, None] for t in (scale, post_scale))
    u = x * factor + (0.0 if noise is None else noise) + (0.0 if b is None else b[:, None, None])
    curve = (1, list(ACTIVATIONS)[act], alpha, gain, clamp)
    value = bias_act_derivative(None, u, None, *curve, 0)
    if dy is None:
        out.copy_(value * post)
        return
    g = bias_act_derivative(dy * post, u, None, *curve, 1)
    out.copy_(g * factor)
    if sums is not None:
        sums.copy_(torch.stack([t.sum((2, 3), dtype=torch.float64) for t in (g, g * x, dy * value)]))
    if grad_noise is not None:
        grad_noise.copy_(g.sum(1, keepdim=True))


def _fake_backward(dy: Tensor, x: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    noise = x.new_empty(x.shape[0] if options[-1] else 0, 1, *x.shape[2:], dtype=wide)
    return torch.empty_like(x, memory_format=layout_of(x)), x.new_empty(3, *x.shape[:2], dtype=torch.float64), noise


_backend.define(
    SCHEMAS,
    {
        "modulate_bias_act_": _modulate_bias_act_,
        "modulate_bias_act": lambda x, *rest: _launch(None, x, list(rest[:4]), rest[4:], False)[0],
        "modulate_bias_act_backward": lambda dy, x, *rest: _launch(dy, x, list(rest[:4]), rest[4:-1], rest[-1]),
    },
    {
        "modulate_bias_act": lambda x, *_: torch.empty_like(x, memory_format=layout_of(x)),
        "modulate_bias_act_backward": _fake_backward,
    },
)
for _name in SCHEMAS:
    refuse_lost_derivatives(_name, "genfast.ops.modulate_bias_act")
