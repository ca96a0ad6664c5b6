"""What the originals' ``impl=`` chooses."""

from __future__ import annotations

from types import ModuleType

from genfast import ops, reference


def operators(impl: str) -> ModuleType:
    """`genfast.ops` for "cuda", on any device; `genfast.reference` for "ref"."""
    if impl not in ("cuda", "ref"):
        raise ValueError(f"impl: got {impl!r}, supported: 'cuda' (genfast's kernels, on any device), 'ref' (plain PyTorch)")
    return ops if impl == "cuda" else reference
