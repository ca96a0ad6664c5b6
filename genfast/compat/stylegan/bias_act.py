"""`torch_utils.ops.bias_act`."""

from __future__ import annotations

from torch import Tensor

from genfast.reference.bias_act import ACTIVATIONS

from ._implementation import operators
from .dnnlib import EasyDict

# What networks read: the function of (x, alpha=...), the default slope and gain.
activation_funcs = {
    name: EasyDict(func=lambda x, alpha=a.alpha, function=a.function, **_: function(x, alpha), def_alpha=a.alpha, def_gain=a.gain)
    for name, a in ACTIVATIONS.items()
}


def bias_act(
    x: Tensor,
    b: Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "cuda",
) -> Tensor:
    """`genfast.ops.bias_act`; ``impl`` "ref" is `genfast.reference`."""
    result: Tensor = operators(impl).bias_act(x, b, dim, act, alpha, gain, clamp)
    return result
