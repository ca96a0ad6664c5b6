"""docs/noise.md in numpy, written from the page alone: what anyone can reproduce the bits with.

python tests/ops/numpy_noise.py SEED DRAW COUNT      prints COUNT normals of stream 0
"""

import sys

import numpy as np

f32, u32, u64 = np.float32, np.uint32, np.uint64


def philox(counter, key):
    """Philox4x32-10: four words of counter (arrays or numbers), two of key."""
    c, k = [np.asarray(w, u64) for w in counter], list(key)
    for _ in range(10):
        a, b = c[0] * u64(0xD2511F53), c[2] * u64(0xCD9E8D57)
        low = u64(0xFFFFFFFF)
        c = [b >> u64(32) ^ c[1] ^ u64(k[0]), b & low, a >> u64(32) ^ c[3] ^ u64(k[1]), a & low]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return [w.astype(u32) for w in c]


def words(seed, draw, stream, count):
    i = np.arange((count + 3) // 4, dtype=u64)
    return philox((i & u64(0xFFFFFFFF), i >> u64(32), np.full_like(i, draw), np.full_like(i, stream)), (seed & 0xFFFFFFFF, seed >> 32))


def horner(y, *coefficients):
    p = np.full_like(y, f32(float.fromhex(coefficients[0])))
    for c in coefficients[1:]:
        p = p * y + f32(float.fromhex(c))
    return p


def pair(a, b):
    u = a.astype(f32) * f32(2.0**-32) + f32(2.0**-33)
    e = (u.view(u32) - u32(0x3F3504F3)).view(np.int32) >> 23
    f = (u.view(u32) - (e.view(u32) << u32(23))).view(f32) - f32(1)
    f2 = f * f
    f4 = f2 * f2
    pa, pb = horner(f, "0x1.38cf2p-3", "-0x1.05602ep-2"), horner(f, "0x1.0d81f2p-2", "-0x1.22d8f8p-2")
    pc, pd = horner(f, "0x1.54728cp-2", "-0x1.99a01ep-2"), horner(f, "0x1.000226p-1", "-0x1.555554p-1")
    p = ((pa * f2 + pb) * f4 + (pc * f2 + pd)) * f + f32(1)
    r = np.sqrt(e.astype(f32) * f32(float.fromhex("-0x1.62e43p+0")) + (f2 * p + f * f32(-2)))
    q = b >> u32(30)
    y = (b << u32(2) | u32(2)).view(np.int32).astype(f32) * f32(2.0**-32)
    y2 = y * y
    s = horner(y2, "-0x1.32f65cp-8", "0x1.467fdcp-4", "-0x1.4abc22p-1", "0x1.921fb6p+0") * y
    c = horner(y2, "0x1.d4f7eap-11", "-0x1.55b2b6p-6", "0x1.03c1bp-2", "-0x1.3bd3ccp+0", "1")
    c, s = np.where(q & u32(1), s, c), np.where(q & u32(1), c, s)
    return r * np.where(q + u32(1) & u32(2), -c, c), r * np.where(q & u32(2), -s, s)


def normals(seed, draw, stream, count):
    w = words(seed, draw, stream, count)
    with np.errstate(over="ignore"):  # unsigned subtraction wraps, as it should
        return np.stack([*pair(w[0], w[1]), *pair(w[2], w[3])], 1).reshape(-1)[:count]


def uniforms(seed, draw, stream, count):
    return np.stack([(w >> u32(8)).astype(f32) * f32(2.0**-24) for w in words(seed, draw, stream, count)], 1).reshape(-1)[:count]


def toward_zero(u, digits):
    """The first ``digits`` significant bits of every number: a uniform in bfloat16 (8) or float16 (11)."""
    m, e = np.frexp(u)
    return np.ldexp(np.floor(np.ldexp(m, digits)), e - digits)


if __name__ == "__main__":
    for z in normals(int(sys.argv[1]), int(sys.argv[2]), 0, int(sys.argv[3])):
        print(repr(float(z)))
