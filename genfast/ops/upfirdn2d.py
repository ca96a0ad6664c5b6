"""Resampling by an FIR filter in one pass (docs/gan-ops.md). Linear, and its own transpose with up and down exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfast import reference
from genfast.reference.solver_step import layout_of
from genfast.reference.upfirdn2d import Pair, filter_size, padding_of, pair, same_padding, setup_filter

from . import _backend
from ._autograd import gradient_rule, refuse_lost_derivatives, tangent_rule, wanted
from ._checks import LARGEST_INTEGER, check_bytes, check_floating, check_padding, number, refusal

__all__ = ["downsample2d", "filter2d", "setup_filter", "upfirdn2d", "upsample2d"]

_MARGIN = 1024  # elements beside the picture up to which the kernels compute a place as any other

SCHEMAS = {
    "upfirdn2d_": "(Tensor(a!) out, Tensor x, Tensor fx, Tensor? fy, int[] up, int[] down, int[] pad) -> ()",
    "upfirdn2d": "(Tensor x, Tensor f, int[] up, int[] down, int[] padding, bool flip_filter, float gain) -> Tensor",
}


class _Resampling(NamedTuple):
    up: tuple[int, int]
    down: tuple[int, int]
    padding: tuple[int, int, int, int]
    flip_filter: bool
    gain: float

    def size(self, size: Sequence[int], f: Tensor) -> tuple[int, int]:
        """(W', H') of an input (W, H)."""
        left, right, top, bottom = self.padding
        around, taps = (left + right, top + bottom), filter_size(f)
        w, h = ((size[i] * self.up[i] + around[i] - taps[i] + self.down[i]) // self.down[i] for i in (0, 1))
        return w, h

    def transposed(self, size: Sequence[int], f: Tensor) -> _Resampling:
        """The transpose of this resampling of an input (W, H): from gradients of the output to those of the input."""
        padding: list[int] = []  # not bounded as that of a caller is, but by sizes of tensors that there are
        for i, (taps, out) in enumerate(zip(filter_size(f), self.size(size, f), strict=True)):
            before = self.padding[2 * i]
            padding += [taps - before - 1, size[i] * self.up[i] - out * self.down[i] + before - self.up[i] + 1]
        return _Resampling(self.down, self.up, padding_of(padding), not self.flip_filter, self.gain)


def check_filter(name: str, f: Tensor | None, x: Tensor) -> None:
    """``x`` is a tensor, and ``f`` a constant filter for it, or None."""
    check_floating("x", x)
    if f is None:
        return
    check_floating(name, f)
    if wanted((f,)):
        raise refusal(name, "a filter with a gradient, a tangent or inside a torch.func transform", "a constant filter")
    if f.ndim not in (1, 2) or f.numel() == 0:
        raise refusal(name, f"shape {tuple(f.shape)}", "(fh, fw), or (taps,) for a separable filter, not empty")
    if f.device != x.device:
        raise refusal(name, f"a tensor on {f.device}", f"{x.device}")


def upfirdn2d(
    x: Tensor, f: Tensor | None, up: Pair = 1, down: Pair = 1, padding: Pair = 0, flip_filter: bool = False, gain: float = 1
) -> Tensor:
    """Zero-insertion upsampling, padding, FIR filter, downsampling in one pass (Karras et al. 2020, appendix; 2021, section 3).

    ``x`` (B, C, H, W), float32, float64, bfloat16 or float16; ``f`` from `setup_filter`: (fh, fw), separable (taps,), in any of those
    dtypes, or None for the identity; ``up`` and ``down`` one number or (x, y), at least 1; ``padding`` of the upsampled picture, one
    number, (x, y) or (left, right, top, bottom), negative to crop; ``flip_filter`` True correlates, False convolves; ``gain``
    multiplies the result. Returns (B, C, H', W') in x's dtype and memory format, W' = (W * up + left + right - fw + down) // down.
    Computed in float32 (float64 for float64) and rounded once. Differentiable to every order in ``x``, not in ``f``:
    docs/derivatives.md. Raises ValueError for anything else.
    """
    check_filter("f", f, x)
    if x.ndim != 4:
        raise refusal("x", f"{x.ndim} dimensions", "4: (B, C, H, W)")
    f = torch.ones(1, 1, device=x.device) if f is None else f
    resampling = _Resampling(pair("up", up), pair("down", down), padding_of(padding), bool(flip_filter), number("gain", gain))
    for name, scaling in (("up", resampling.up), ("down", resampling.down)):
        if min(scaling) < 1:
            raise refusal(name, scaling, "integers of at least 1")
        if max(scaling) > LARGEST_INTEGER:
            raise refusal(name, scaling, f"integers from 1 to {LARGEST_INTEGER}")
    check_padding(padding, resampling.padding)
    if min(resampling.size((x.shape[3], x.shape[2]), f)) < 1:
        raise refusal("padding", padding, f"enough for one place of the filter {filter_size(f)} in the picture")
    check_bytes("up and padding", (*x.shape[:2], *resampling.size((x.shape[3], x.shape[2]), f)[::-1]), x)
    if wanted((x,)):
        result: Tensor = _differentiable(x, f, resampling)
        return result
    return _kernel(x, f, resampling)


def filter2d(x: Tensor, f: Tensor | None, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> Tensor:
    """`upfirdn2d` that keeps the size; ``padding`` is added to that."""
    check_filter("f", f, x)
    return upfirdn2d(x, f, padding=same_padding(f, padding, (1, 1), (1, 1), "filter"), flip_filter=flip_filter, gain=gain)


def upsample2d(x: Tensor, f: Tensor | None, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> Tensor:
    """`upfirdn2d` that multiplies the size by ``up`` and keeps the magnitude of the signal; ``padding`` is added to that."""
    check_filter("f", f, x)
    up_x, up_y = pair("up", up)
    around = same_padding(f, padding, (up_x, up_y), (1, 1), "up")
    return upfirdn2d(x, f, up=(up_x, up_y), padding=around, flip_filter=flip_filter, gain=gain * up_x * up_y)


def downsample2d(x: Tensor, f: Tensor | None, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> Tensor:
    """`upfirdn2d` that divides the size by ``down``; ``padding`` is added to that."""
    check_filter("f", f, x)
    down_x, down_y = pair("down", down)
    around = same_padding(f, padding, (1, 1), (down_x, down_y), "down")
    return upfirdn2d(x, f, down=(down_x, down_y), padding=around, flip_filter=flip_filter, gain=gain)


def _kernel(x: Tensor, f: Tensor, r: _Resampling) -> Tensor:
    result: Tensor = torch.ops.genfast.upfirdn2d(x, f, r.up, r.down, r.padding, r.flip_filter, r.gain)
    return result


# ---- derivatives -------------------------------------------------------------------------------------------------------------


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _differentiable(x: Tensor, f: Tensor, r: _Resampling) -> Tensor:
    result: Tensor = _Upfirdn2d.apply(x, f, r)  # type: ignore[no-untyped-call]
    return result


class _Upfirdn2d(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, f: Tensor, r: _Resampling) -> Tensor:
        return _kernel(x, f, r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Resampling], output: Tensor) -> None:
        x, f, ctx.resampling = inputs
        ctx.size = (x.shape[3], x.shape[2])
        ctx.save_for_backward(f)
        ctx.save_for_forward(f)

    @gradient_rule
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (f,) = ctx.saved_tensors
        return _differentiable(grad, f, ctx.resampling.transposed(ctx.size, f)), None, None

    @tangent_rule
    def jvp(ctx: Any, saved: Sequence[Any], tangent: Tensor, *_: None) -> Tensor:
        (f,) = saved
        result: Tensor = _differentiable(tangent, f, ctx.resampling)
        return result

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, f: Tensor, r: _Resampling) -> tuple[Tensor, int]:
        if dims[1] is not None:
            raise refusal("f", "a filter batched by torch.vmap", "one filter for all")
        assert dims[0] is not None
        folded = x.movedim(dims[0], 0)
        result: Tensor = _differentiable(folded.flatten(0, 1), f, r)
        return result.unflatten(0, folded.shape[:2]), 0


# ---- the operators -----------------------------------------------------------------------------------------------------------


def _empty(x: Tensor, f: Tensor, r: _Resampling) -> Tensor:
    width, height = r.size((x.shape[3], x.shape[2]), f)
    return torch.empty((*x.shape[:2], height, width), dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def _resampling(up: Sequence[int], down: Sequence[int], padding: Sequence[int], flip_filter: bool = False, gain: float = 1) -> _Resampling:
    return _Resampling(pair("up", up), pair("down", down), padding_of(padding), flip_filter, gain)


def _upfirdn2d(x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], flip_filter: bool, gain: float) -> Tensor:
    r = _resampling(up, down, padding, flip_filter, gain)
    out = _empty(x, f, r)
    f = f.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    f = (f if flip_filter else f.flip(list(range(f.ndim)))).contiguous()
    scaled = f if gain == 1 else f * gain
    fx, fy = (f, scaled) if f.ndim == 1 else (scaled, None)
    x = x.contiguous(memory_format=layout_of(x))
    if x.numel() == 0:
        return out.zero_()
    met = [_met(r, axis, x.shape[3 - axis], out.shape[3 - axis], filter_size(f)[axis]) for axis in (0, 1)]
    part, pad = out, [r.padding[0], r.padding[2]]
    beyond = [max(first, out.shape[3 - axis] - last) * down[axis] for axis, (first, last) in enumerate(met)]
    if any(elements > _MARGIN * scaling for elements, scaling in zip(beyond, up, strict=True)):
        # Far from the picture all is zero, and the kernels would lay out every one of these places.
        if any(first >= last for first, last in met):
            return out.zero_()
        (left, right), (top, bottom) = met
        part = torch.empty((*x.shape[:2], bottom - top, right - left), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
        pad = [pad[0] - left * down[0], pad[1] - top * down[1]]
    # Where there is one element, or one place, along an axis, no distance to the next one counts.
    up = [1 if x.shape[3 - axis] == 1 else n for axis, n in enumerate(up)]
    down = [1 if part.shape[3 - axis] == 1 else n for axis, n in enumerate(down)]
    _backend.namespace.upfirdn2d_(part, x, fx, fy, up, down, pad)
    if part is not out:
        out.zero_()[:, :, top:bottom, left:right] = part
    return out


def _met(r: _Resampling, axis: int, size: int, out: int, taps: int) -> tuple[int, int]:
    """The first place along an axis (0 for x) where the filter meets the picture, and the one after the last."""
    up, down, before = r.up[axis], r.down[axis], r.padding[2 * axis]
    return max(0, -((taps - 1 - before) // down)), min(out, ((size - 1) * up + before) // down + 1)


def _upfirdn2d_(out: Tensor, x: Tensor, fx: Tensor, fy: Tensor | None, up: list[int], down: list[int], pad: list[int]) -> None:
    _backend.reference_runs(x.device)
    f = fx if fy is None else torch.outer(fy, fx)
    taps = filter_size(f)
    padding: list[int] = []
    for i in (0, 1):  # what is needed after the last element for exactly this many outputs
        padding += [pad[i], (out.shape[3 - i] - 1) * down[i] + taps[i] - x.shape[3 - i] * up[i] - pad[i]]
    out.copy_(reference.upfirdn2d(x, f, up, down, padding, flip_filter=True))


def _fake(x: Tensor, f: Tensor, up: list[int], down: list[int], padding: list[int], *_: object) -> Tensor:
    return _empty(x, f, _resampling(up, down, padding))


_backend.define(SCHEMAS, {"upfirdn2d_": _upfirdn2d_, "upfirdn2d": _upfirdn2d}, {"upfirdn2d": _fake})
for _name in SCHEMAS:
    refuse_lost_derivatives(_name, "genfast.ops.upfirdn2d")
