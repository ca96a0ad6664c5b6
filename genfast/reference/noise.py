"""Noise that belongs to the sample: the executable form of docs/noise.md, bit for bit, in plain torch operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_KEPT = {torch.bfloat16: ~0xFFFF, torch.float16: ~0x1FFF}  # which bits of a uniform these hold: rounded to nearest it could become 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011). Every word is an int64 tensor holding 32 unsigned bits; shapes broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64; the mask drops what the arithmetic shift drags in
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def _words(seeds: Tensor, per_sample: int, draw: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    i = torch.arange((per_sample + 3) // 4, device=seeds.device).expand(len(seeds), -1)
    key = seeds[:, None] & _MASK, seeds[:, None] >> 32
    return philox((i & _MASK, i >> 32, torch.full_like(i, draw), torch.full_like(i, stream)), key)


def _horner(x: Tensor, *coefficients: str) -> Tensor:
    p = torch.full_like(x, float.fromhex(coefficients[0]))
    for c in coefficients[1:]:
        p = p * x + float.fromhex(c)
    return p


def _flip_sign(x: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip != 0, -x, x)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two words, docs/noise.md steps 6 to 12. Each torch call rounds once."""
    u = a.float() * 2.0**-32 + 2.0**-33
    bits = u.view(torch.int32)
    e = bits - 0x3F3504F3 >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1
    f2 = f * f
    f4 = f2 * f2
    pa = _horner(f, "0x1.38cf2p-3", "-0x1.05602ep-2")
    pb = _horner(f, "0x1.0d81f2p-2", "-0x1.22d8f8p-2")
    pc = _horner(f, "0x1.54728cp-2", "-0x1.99a01ep-2")
    pd = _horner(f, "0x1.000226p-1", "-0x1.555554p-1")
    p = ((pa * f2 + pb) * f4 + (pc * f2 + pd)) * f + 1
    t = e.float() * float.fromhex("-0x1.62e43p+0") + (f2 * p + f * -2)
    r = t.double().sqrt().float()  # torch's float32 sqrt on the CPU can be one ulp off; this is the nearest
    q = b >> 30
    angle = (b << 2 | 2) & _MASK
    y = (angle - (angle >> 31 << 32)).float() * 2.0**-32
    y2 = y * y
    s = _horner(y2, "-0x1.32f65cp-8", "0x1.467fdcp-4", "-0x1.4abc22p-1", "0x1.921fb6p+0") * y
    c = _horner(y2, "0x1.d4f7eap-11", "-0x1.55b2b6p-6", "0x1.03c1bp-2", "-0x1.3bd3ccp+0", "1")
    odd = q & 1 != 0
    c, s = torch.where(odd, s, c), torch.where(odd, c, s)
    return r * _flip_sign(c, q + 1 & 2), r * _flip_sign(s, q & 2)


def _fill(
    seeds: Tensor,
    shape: Sequence[int],
    draw: int,
    stream: int,
    dtype: torch.dtype,
    device: torch.device | str | None,
    memory_format: torch.memory_format,
    uniform: bool,
) -> Tensor:
    seeds = seeds.to(device) if device is not None else seeds
    per_sample = math.prod(shape[1:])
    w = _words(seeds, per_sample, draw, stream)
    values = [(word >> 8).float() * 2.0**-24 for word in w] if uniform else [*_box_muller(w[0], w[1]), *_box_muller(w[2], w[3])]
    out = torch.stack(values, dim=-1).flatten(1)[:, :per_sample].reshape(tuple(shape))
    if uniform and dtype in _KEPT:
        out = (out.contiguous().view(torch.int32) & _KEPT[dtype]).view(torch.float32)
    return out.to(dtype).contiguous(memory_format=memory_format)


def normal(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    draw: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normal noise of docs/noise.md.

    ``seeds`` (B,) int64, each in [0, 2^63); ``shape`` (B, \\*sample); ``draw`` in [0, 2^32); ``stream`` as docs/noise.md lists.
    Returns ``shape`` in ``dtype`` on ``device`` (default: the seeds'), the float32 values rounded to nearest even.
    """
    return _fill(seeds, shape, draw, stream, dtype, device, memory_format, uniform=False)


def uniform(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    draw: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Uniform noise of docs/noise.md: multiples of 2^-24 in [0, 1); arguments as `normal`.

    A type narrower than float32 holds the value rounded toward zero, so that it stays below 1.
    """
    return _fill(seeds, shape, draw, stream, dtype, device, memory_format, uniform=True)
