"""What is not supported is refused in one sentence that names the argument: "name: got ..., supported: ..."."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import ops

X, B, STYLES, WEIGHT = torch.randn(2, 8, 6, 6), torch.randn(8), torch.randn(2, 8), torch.randn(8, 8, 3, 3)
FILTER = ops.setup_filter([1, 3, 3, 1])
Q = torch.randn(2, 2, 8, 16)

CALLS: dict[Callable[..., Tensor], dict[str, Any]] = {
    ops.bias_act: {"x": X, "b": B},
    ops.modulate_bias_act: {"x": X, "b": B, "scale": STYLES, "noise": X[:, :1], "post_scale": STYLES},
    ops.upfirdn2d: {"x": X, "f": FILTER},
    ops.filter2d: {"x": X, "f": FILTER},
    ops.upsample2d: {"x": X, "f": FILTER},
    ops.downsample2d: {"x": X, "f": FILTER},
    ops.filtered_lrelu: {"x": X, "fu": FILTER, "fd": FILTER, "b": B, "padding": 3},
    ops.conv2d_resample: {"x": X, "w": WEIGHT, "f": FILTER},
    ops.modulated_conv2d: {"x": X, "weight": WEIGHT, "styles": STYLES, "noise": X[:1, :1], "padding": 1, "input_gain": B, "bias": B},
    ops.bn_act: {"x": X, "weight": B, "bias": B, "residual": X},
    ops.group_norm_silu: {"x": X, "groups": 4, "weight": B, "bias": B},
    ops.conv_block: {"x": X, "weight": WEIGHT, "residual": X, "norm": None, "padding": 1},
    ops.pixel_norm: {"x": X},
    ops.minibatch_stddev: {"x": X},
    ops.attention: {"q": Q, "k": Q, "v": Q},
}
NUMBERS = {"alpha": "0.2", "gain": [1.0], "clamp": -1.0, "slope": "0.2"}
COUNTS: dict[str, Any] = {
    "up": 0,
    "down": (2, 2, 2),
    "padding": (1, 2, 3),
    "dim": 4,
    "act": "rleu",
    "groups": 3,
    "group_size": 0,
    "num_channels": 3,
}


def _cases() -> list[Any]:
    cases = []
    for op, arguments in CALLS.items():
        names = op.__code__.co_varnames[: op.__code__.co_argcount]
        wrong = {name: "not a tensor" for name, value in arguments.items() if isinstance(value, Tensor)}
        shapes = {
            name: torch.randn(7)
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value is not FILTER and op not in (ops.bias_act, ops.pixel_norm)
        }
        for bad in (wrong, shapes, {name: value for name, value in {**NUMBERS, **COUNTS}.items() if name in names}):
            cases += [
                pytest.param(op, {**arguments, name: value}, name, id=f"{op.__name__}-{name}-{type(value).__name__}")
                for name, value in bad.items()
            ]
    return cases


@pytest.mark.parametrize(("op", "arguments", "name"), _cases())
def test_bad_arguments_are_named(op: Callable[..., Tensor], arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=r"^\w+: got .*, supported: ") as caught:
        op(**arguments)
    assert "\n" not in str(caught.value)
    # Shapes and numbers that disagree may be reported of either side.
    assert str(caught.value).startswith(f"{name}: got ") or (not isinstance(arguments[name], str) and name in str(caught.value))


@pytest.mark.parametrize("op", CALLS, ids=lambda op: op.__name__)
def test_the_same_calls_without_a_mistake_pass(op: Callable[..., Tensor]) -> None:
    assert torch.isfinite(op(**CALLS[op])).all()
