"""Which operators a layer, a sampler or a trainer calls: `genfast.ops`, or `genfast.reference`, which specifies them."""

from __future__ import annotations

from typing import Any

from genfast import ops, reference

NAMESPACES: dict[str, Any] = {"fused": ops, "reference": reference}


def check_impl(impl: str) -> str:
    """``impl`` again. Raises ValueError unless it is one of `NAMESPACES`."""
    if impl not in NAMESPACES:
        raise ValueError(f"impl: got {impl!r}, supported: {', '.join(map(repr, NAMESPACES))}")
    return impl
