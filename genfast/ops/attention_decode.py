"""Attention of a few new queries to a cache of keys and values: `genfast.reference.attention_decode` by kernel (docs/attention.md)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genfast import _library
from genfast.reference.attention_decode import visible_cache

from . import _backend
from ._attention_blocks import unit, whole
from ._autograd import refuse_lost_derivatives, wanted
from ._backend import implementations
from ._checks import check_floating, readable, refusal
from .attention import attention

MAX_QUERIES = 16  # csrc/ops/attention_decode/params.h
# (units of work that fill a device, fewest keys of a part), so that the parts, and with them the bits, depend on shapes alone.
_PARTS = {"cpu": (32, 1024), "cuda": (512, 256)}

_INPUTS = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? bias, bool causal, float scale, int splits"
_library.define("attention_decode_", f"(Tensor(a!) o, Tensor(b!) lse, Tensor(c!)? parts, {_INPUTS}) -> ()")
_library.define("attention_decode", f"({_INPUTS}) -> (Tensor, Tensor)")


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of n new queries to the keys and values of a cache, of which sample b uses the first ``lengths[b]`` (split-KV decoding:
    Dao et al. 2023, Flash-Decoding).

    ``q`` (B, H, n, D) with n from 1 to 16; ``k_cache`` and ``v_cache`` (B, H / g, capacity, D): query head h reads head h // g, and the
    heads of a group read it once. float32, float64, bfloat16 or float16, any strides. ``lengths`` (B,) int32 or int64 on q's device,
    0 ... capacity, the new tokens included (write their keys and values first); nothing waits for its values, which are checked in host
    memory and clamped on a device. ``causal``: the queries are the last n tokens, query i sees keys 0 ... i + lengths[b] - n. What
    lies beyond a length is never read. ``bias`` (q's dtype or float32) broadcasts to (B, H, n, capacity). ``scale``: 1 / sqrt(D) where
    None. ``splits``: parts that the keys of a sample are divided into (None: chosen from the shapes); it changes rounding alone.

    Returns the output (B, H, n, D), which lies in memory as (B, n, H, D), and with ``return_lse`` also the log-sum-exp of the scores
    (B, H, n), float32 for 16-bit inputs. A query that sees no key gives zeros and -inf. The same arguments give the same bits, and no
    step waits for the device, so a CUDA graph can hold it. With gradients, tangents or torch.func it is `attention` with a mask:
    docs/derivatives.md. A wrong argument is a ValueError that names it.
    """
    scale, parts = _check(q, k_cache, v_cache, lengths, bias, scale, splits)
    if wanted((q, k_cache, v_cache, lengths, bias)) or not _kernel_takes(q, k_cache):
        k, v, mask = visible_cache(q, k_cache, v_cache, lengths, causal)
        return attention(q, k, v, bias, mask, False, scale, return_lse)
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
    call = _straight if readable(q) else torch.ops.genfast.attention_decode
    o, lse = call(q, k_cache, v_cache, lengths, bias, causal, scale, parts)
    return (o, lse) if return_lse else o


def _check(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, bias: Tensor | None, scale: float | None, splits: int | None
) -> tuple[float, int]:
    """The scale and the number of parts."""
    if q.ndim != 4 or not 1 <= q.shape[2] <= MAX_QUERIES:
        raise refusal("q", f"shape {tuple(q.shape)}", f"(B, H, 1 to {MAX_QUERIES}, D); `attention` takes more queries")
    check_floating("q", q)
    batch, heads, n, d = q.shape
    if d == 0:
        raise refusal("q", "a head dimension of 0", "1 and more")
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != d or k.shape[1] == 0 or heads % k.shape[1]:
        raise refusal("k_cache", f"shape {tuple(k.shape)}", f"({batch}, heads, capacity, {d}) where heads divides q's {heads}")
    if v.shape != k.shape:
        raise refusal("v_cache", f"shape {tuple(v.shape)}", f"{tuple(k.shape)}, as k_cache")
    for name, t in (("k_cache", k), ("v_cache", v)):
        if t.dtype != q.dtype or t.device != q.device:
            raise refusal(name, f"{t.dtype} on {t.device}", f"{q.dtype} on {q.device}, as q")
    capacity = k.shape[2]
    if lengths.shape != (batch,) or lengths.dtype not in (torch.int32, torch.int64) or lengths.device != q.device:
        got = f"{lengths.dtype} {tuple(lengths.shape)} on {lengths.device}"
        raise refusal("lengths", got, f"torch.int32 or torch.int64 ({batch},) on {q.device}, keys in use of each sample")
    if readable(lengths):
        for length in lengths.tolist():
            if not 0 <= length <= capacity:
                raise refusal("lengths", length, f"0 to {capacity}, the cache's capacity")
    if bias is not None:
        if bias.dtype not in (q.dtype, torch.float32) or (q.dtype == torch.float64) != (bias.dtype == torch.float64):
            raise refusal("bias", bias.dtype, f"{q.dtype}{'' if q.dtype in (torch.float64, torch.float32) else ' or torch.float32'}")
        scores = (batch, heads, n, capacity)
        if bias.device != q.device or bias.ndim > 4 or any(a not in (1, b) for a, b in zip(bias.shape[::-1], scores[::-1], strict=False)):
            raise refusal("bias", f"shape {tuple(bias.shape)} on {bias.device}", f"a shape that broadcasts to {scores} on {q.device}")
    if scale is None:
        scale = d**-0.5
    if not math.isfinite(scale):
        raise refusal("scale", scale, "a finite number")
    if splits is None:
        fill, fewest = _PARTS.get(q.device.type, (1, 1))
        splits = max(1, min(-(-fill // max(1, batch * k.shape[1])), capacity // fewest))
    elif splits < 1:
        raise refusal("splits", splits, "1 and more")
    return float(scale), splits


def _kernel_takes(q: Tensor, k: Tensor) -> bool:
    if q.numel() == 0 or k.numel() == 0 or q.dtype == torch.float64 or not _library.has_kernels(q.device.type):
        return False
    return q.device.type == "cpu" or q.shape[3] <= 256


# ---- the operators ---------------------------------------------------------------------------------------------------------------


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2), q.new_empty((b, h, n), dtype=torch.float32)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, bias: Tensor | None, causal: bool, scale: float, splits: int
) -> tuple[Tensor, Tensor]:
    o, lse = _fake(q)
    parts = q.new_empty(splits * lse.numel() * (q.shape[3] + 2), dtype=torch.float32) if splits > 1 else None
    if bias is not None:
        bias = whole(bias, q, k)
    _backend.namespace.attention_decode_(o, lse, parts, unit(q), unit(k), unit(v), lengths.contiguous(), bias, causal, scale, splits)
    return o, lse


def _straight(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Past the dispatcher where nobody watches the operators: it costs as much as a small call."""
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*arguments)


implementations.impl("attention_decode", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("genfast::attention_decode", _fake, lib=implementations)
torch.library.register_fake("genfast::attention_decode_", lambda *_: None, lib=implementations)
refuse_lost_derivatives("attention_decode", "genfast.ops.attention_decode")
