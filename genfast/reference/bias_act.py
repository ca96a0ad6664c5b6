"""Bias, activation, gain and clamp in pure PyTorch, with the derivatives in closed form (docs/gan-ops.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    function: Callable[[Tensor, float], Tensor]
    alpha: float  # the default of the parameter, which only lrelu has
    gain: float  # the default: keeps the variance of a normal input about where it was (Karras et al. 2020)


_SQRT2 = 2**0.5
# In the order of csrc/core/activation.h.
ACTIVATIONS = {
    "linear": Activation(lambda x, _: x, 0.0, 1.0),
    "relu": Activation(lambda x, _: F.relu(x), 0.0, _SQRT2),
    "lrelu": Activation(F.leaky_relu, 0.2, _SQRT2),
    "tanh": Activation(lambda x, _: torch.tanh(x), 0.0, 1.0),
    "sigmoid": Activation(lambda x, _: torch.sigmoid(x), 0.0, 1.0),
    "elu": Activation(lambda x, _: F.elu(x), 0.0, 1.0),
    "selu": Activation(lambda x, _: F.selu(x), 0.0, 1.0),
    "softplus": Activation(lambda x, _: F.softplus(x), 0.0, 1.0),
    "swish": Activation(lambda x, _: torch.sigmoid(x) * x, 0.0, _SQRT2),
}
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717


def _with_bias(x: Tensor, b: Tensor | None, dim: int) -> Tensor:
    return x if b is None else x + b.reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """``clamp(gain * act(x + b), -clamp, clamp)`` (Karras et al. 2020, StyleGAN2; the order of Karras et al. 2021, StyleGAN3).

    ``x`` of any shape; ``b`` (x.shape[dim],) in x's dtype, or None; ``act`` one of `ACTIVATIONS`; ``alpha`` the slope of lrelu (0.2);
    ``gain`` defaults to sqrt(2) for relu, lrelu and swish, else 1; ``clamp`` None for none. Returns x's shape and dtype. A NaN stays a NaN.
    """
    known = ACTIVATIONS[act]
    y = known.function(_with_bias(x, b, dim), known.alpha if alpha is None else alpha) * (known.gain if gain is None else gain)
    return y if clamp is None else y.clamp(-clamp, clamp)


def _sigmoid_derivative(u: Tensor, order: int) -> Tensor:
    s = torch.sigmoid(u)
    d = s * (1 - s)
    derivatives: tuple[Tensor, ...] = (s, d, d * (1 - 2 * s), d * (1 - 6 * d))
    return derivatives[order]


def activation_derivative(u: Tensor, act: str, alpha: float, order: int) -> Tensor:
    """The derivative of order 1 to 3 of ``act`` at ``u``, itself differentiable by autograd. At the kinks torch's own choice."""
    if act == "linear" or act == "relu" or act == "lrelu":
        below = {"linear": 1.0, "relu": 0.0, "lrelu": alpha}[act]
        return torch.where(u > 0, torch.ones_like(u), torch.full_like(u, below)) if order == 1 else torch.zeros_like(u)
    if act == "tanh":
        t = torch.tanh(u)
        d = 1 - t * t
        return (d, -2 * t * d, (6 * t * t - 2) * d)[order - 1]
    if act == "sigmoid":
        return _sigmoid_derivative(u, order)
    if act == "elu" or act == "selu":
        scale, bent = (1.0, 1.0) if act == "elu" else (_SELU_SCALE, _SELU_SCALE * _SELU_ALPHA)
        return torch.where(u > 0, torch.full_like(u, scale if order == 1 else 0.0), bent * torch.exp(u.clamp(max=0)))
    if act == "softplus":  # torch's is the identity above 20
        return torch.where(u > 20, torch.full_like(u, float(order == 1)), _sigmoid_derivative(u, order - 1))
    return u * _sigmoid_derivative(u, order) + order * _sigmoid_derivative(u, order - 1)  # swish


def bias_act_derivative(
    factor: Tensor | None, x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None, order: int
) -> Tensor:
    """``factor`` (None: 1) times the derivative of the given order, 0 to 3, of `bias_act` at ``x``, elementwise.

    Past the clamp it is zero, at the clamp the activation's own, as in torch. A zero lets nothing pass, infinities and NaNs neither.
    """
    if order == 0:
        slope = bias_act(x, b, dim, act, alpha, gain, clamp)
    else:
        u = _with_bias(x, b, dim)
        slope = gain * activation_derivative(u, act, alpha, order)
        if clamp is not None:
            value = (ACTIVATIONS[act].function(u, alpha) * gain).abs()
            slope = torch.where(value <= clamp, slope, torch.zeros_like(slope))
    return slope if factor is None else torch.where(slope == 0, torch.zeros_like(slope), factor * slope)
