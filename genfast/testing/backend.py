"""Running the wrappers on other kernels: the CUDA kernels under the emulator, say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from genfast.ops import _backend


@contextmanager
def operators_from(namespace: str) -> Iterator[None]:
    """Within it, `genfast.ops` runs the kernels registered in ``torch.ops.<namespace>``, for example "genfast_emulator"."""
    before = _backend.namespace
    _backend.namespace = getattr(torch.ops, namespace)
    try:
        yield
    finally:
        _backend.namespace = before
