"""`torch_utils.ops.grid_sample_gradfix`: bilinear sampling whose gradient in the picture can be differentiated again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast.ops._autograd import gradient_rule

enabled = False  # set by the user: without it torch's own, which has first derivatives only


def grid_sample(input: Tensor, grid: Tensor) -> Tensor:
    """``input`` (B, C, H, W) at ``grid`` (B, H', W', 2), bilinear, zeros outside, corners not aligned. Returns (B, C, H', W').

    With ``enabled`` differentiable to every order in ``input``, once in ``grid``; what mixes both is refused.
    """
    if enabled:
        result: Tensor = _Sample.apply(input, grid)  # type: ignore[no-untyped-call]
        return result
    return F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _Sample(torch.autograd.Function):
    """(input, grid) -> samples, linear in the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(input, grid)
        return F.grid_sample(input, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @gradient_rule
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        results: tuple[Tensor | None, Tensor | None]
        results = _Splat.apply(grad, *ctx.saved_tensors, *ctx.needs_input_grad)  # type: ignore[no-untyped-call]
        return results


class _Splat(torch.autograd.Function):
    """(gradient of the samples, input, grid) -> gradients of input and grid. The first is `_Sample`'s transpose, linear in the gradient."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, input: Tensor, grid: Tensor, for_input: bool, for_grid: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grid)
        ctx.set_materialize_grads(False)
        results = torch.ops.aten.grid_sampler_2d_backward(grad, input, grid, 0, 0, False, [for_input, for_grid])
        return results[0] if for_input else None, results[1] if for_grid else None

    @gradient_rule
    def backward(ctx: Any, grad_splat: Tensor | None, grad_grid: Tensor | None) -> tuple[Tensor | None, ...]:
        (grid,) = ctx.saved_tensors
        if grad_grid is not None or ctx.needs_input_grad[2]:
            raise NotImplementedError("grid_sample: got a second derivative in grid, supported: derivatives of every order in input only")
        if grad_splat is None or not ctx.needs_input_grad[0]:
            return (None,) * 5
        samples: Tensor = _Sample.apply(grad_splat, grid)  # type: ignore[no-untyped-call]
        return samples, None, None, None, None
