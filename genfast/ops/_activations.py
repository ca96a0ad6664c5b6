"""The activations that the kernels know by number, and the numbers that go with them."""

from __future__ import annotations

from genfast.reference.bias_act import ACTIVATIONS

from ._checks import number, refusal

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def curve_of(act: str, alpha: float | None, gain: float | None, clamp: float | None) -> tuple[str, float, float, float | None]:
    """The same with the activation's own ``alpha`` and ``gain`` for None."""
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise refusal("act", repr(act), ", ".join(ACTIVATIONS))
    known = ACTIVATIONS[act]
    slope = known.alpha if alpha is None else number("alpha", alpha)
    factor = known.gain if gain is None else number("gain", gain)
    if clamp is None:
        return act, float(slope), float(factor), None
    bound = number("clamp", clamp)
    if not bound >= 0:
        raise refusal("clamp", clamp, "a number of at least 0, or None")
    return act, float(slope), float(factor), bound
