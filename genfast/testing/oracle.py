"""How far a kernel may be from the truth: as far as plain PyTorch in the same precision, twice over, and a rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import OpSpec


def error(got: Tensor, exact: Tensor) -> float:
    """The largest absolute error; where ``exact`` is not finite, ``got`` must be the same (else infinity)."""
    got, exact = got.double(), exact.double()
    same = (got == exact) | (got.isnan() & exact.isnan())
    difference = torch.where(same, 0, (got - exact).abs())
    return float(torch.where(difference.isnan(), torch.inf, difference).max()) if difference.numel() else 0.0


def tolerance(working: Tensor, exact: Tensor, eps: float | None = None) -> float:
    """2 err(reference in the working precision) + 4 eps max|exact|, ``exact`` being the reference in float64."""
    finite = exact[exact.isfinite()].double().abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return 2 * error(working, exact) + 4 * (torch.finfo(working.dtype).eps if eps is None else eps) * scale


def precision(spec: OpSpec, dtype: torch.dtype) -> float:
    """The eps of ``spec``'s tolerance for arguments of ``dtype``.

    Without the reference's bits sums run in another order, which float32 shows; float64 even more so, because its truth is rounded
    alike; and in 16 bits the last rounding outweighs all sums.
    """
    return torch.finfo(dtype).eps * (1 if spec.bits else {2: 1, 4: 4, 8: 16}[dtype.itemsize])


def assert_accurate(name: str, got: Tensor, working: Tensor, exact: Tensor, eps: float | None = None) -> None:
    """``got`` (fused) against ``working`` (reference, same dtype) and ``exact`` (reference, float64)."""
    assert got.shape == exact.shape and got.dtype == working.dtype, (
        f"{name}: {got.dtype} {tuple(got.shape)}, not {working.dtype} {tuple(exact.shape)}"
    )
    err, bound = error(got, exact), tolerance(working, exact, eps)
    assert err <= bound, f"{name}: error {err:.3g} exceeds {bound:.3g}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, wherever they lie in memory; any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    return bool((equal | (a.isnan() & b.isnan())).all())
