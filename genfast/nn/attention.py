"""Multi-head attention on the fused operators."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from genfast import ops, reference
from genfast.nn.plain import plain

_NAMESPACES: dict[str, ModuleType] = {"fused": ops, "reference": reference}
_NORMS: dict[str, Any] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}
_ROPES = {"interleaved": True, "half": False}


def _one_of(name: str, value: object, supported: object) -> ValueError:
    return ValueError(f"{name}: got {value!r}, supported: {supported}")


class Attention(nn.Module):
    """Self-attention, or with ``cross_dim`` cross-attention, of tokens (Vaswani et al. 2017, section 3.2.2).

    (B, N, dim) -> (B, N, dim), and for cross-attention a context (B, M, cross_dim).

    ``heads`` query heads of ``head_dim`` (dim / heads where None) and ``kv_heads`` key and value heads, a divisor of them (Ainslie et al.
    2023). ``qk_norm``: "rms" or "layer", a norm of each head of q and k with a weight, ``eps`` in it; or None. ``rope``: the pairs that
    `forward`'s table turns, "interleaved" (2i, 2i + 1) or "half" (i, i + R / 2), or None for no table; self-attention alone. ``bias``: of
    the packed projections; the last one has its own always. ``causal``: a token sees those before it. ``impl``: "fused" or "reference".

    State dict as timm's: ``qkv`` ((heads + 2 kv_heads) head_dim, dim), q's heads first, then k's, then v's; or ``q`` and ``kv`` for
    cross-attention; ``q_norm`` and ``k_norm``; ``proj``. Wrong arguments are a ValueError. Submodules may be hooked, wrapped, adapted or
    replaced: norms that are not torch's own as they are (`genfast.nn.plain`) are called.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        cross_dim: int | None = None,
        qk_norm: str | None = None,
        rope: str | None = None,
        bias: bool = True,
        causal: bool = False,
        eps: float = 1e-6,
        impl: str = "fused",
    ) -> None:
        super().__init__()
        if head_dim is None and (heads < 1 or dim % heads):
            raise _one_of("heads", heads, f"a divisor of dim {dim}, or head_dim given")
        self.heads, self.kv_heads = heads, heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise _one_of("kv_heads", kv_heads, f"a divisor of the {heads} heads")
        for name, value, known in (("qk_norm", qk_norm, _NORMS), ("rope", rope, _ROPES)):
            if value is not None and value not in known:
                raise _one_of(name, value, ", ".join(map(repr, known)) + ", None")
        if impl not in _NAMESPACES:
            raise _one_of("impl", impl, ", ".join(map(repr, _NAMESPACES)))
        if cross_dim is not None and (rope is not None or causal):
            raise _one_of("cross_dim", cross_dim, "None with rope or causal, which cross-attention has not")
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.cross_dim, self.qk_norm, self.rope, self.causal, self.eps, self.impl = cross_dim, qk_norm, rope, causal, eps, impl
        width, kv_width = heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        if cross_dim is None:
            self.qkv = nn.Linear(dim, width + kv_width, bias=bias)
        else:
            self.q = nn.Linear(dim, width, bias=bias)
            self.kv = nn.Linear(cross_dim, kv_width, bias=bias)
        if qk_norm is not None:
            self.q_norm, self.k_norm = (_NORMS[qk_norm](self.head_dim, eps=eps) for _ in range(2))
        self.proj = nn.Linear(width, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """``x`` (B, N, dim); ``context`` (B, M, cross_dim) for cross-attention; ``rope`` (cos, sin) from `genfast.ops.rope_table`,
        (N, R / 2) or (B, N, R / 2). ``bias`` and the bool ``mask`` (True: sees) broadcast to (B, heads, N, M). Returns (B, N, dim)."""
        if (context is None) != (self.cross_dim is None):
            raise _one_of("context", None if context is None else tuple(context.shape), "a tensor where there is a cross_dim, else None")
        if (rope is None) != (self.rope is None):
            got = None if rope is None else tuple(rope[0].shape)
            raise _one_of("rope", got, "a table where the module has a rope, else None")
        if context is None:
            qkv = self.qkv(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        else:
            q = self.q(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            k, v = self.kv(context).unflatten(2, (-1, self.head_dim)).transpose(1, 2).chunk(2, dim=1)
        namespace = _NAMESPACES[self.impl]
        norm: str | None = None
        options: dict[str, Any] = {"interleaved": _ROPES.get(self.rope or "", True)}
        if self.qk_norm is not None:
            norm = _fused_norm(self.q_norm, self.k_norm, self.head_dim)
            if norm is None:
                q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
            else:
                options |= {f"{name}_weight": m.weight for name, m in (("q", self.q_norm), ("k", self.k_norm))}
                options |= {f"{name}_bias": getattr(m, "bias", None) for name, m in (("q", self.q_norm), ("k", self.k_norm))}
                options["eps"] = self.q_norm.eps
        if norm is not None or rope is not None:
            cos, sin = (None, None) if rope is None else rope
            q, k = namespace.qknorm_rope(q, k, cos=cos, sin=sin, norm=norm, **options)
        o: Tensor = namespace.attention(q, k, v, bias, mask, self.causal)
        out: Tensor = self.proj(o.transpose(1, 2).flatten(2))
        return out

    def extra_repr(self) -> str:
        names = ("heads", "kv_heads", "head_dim", "rope", "causal", "impl")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _fused_norm(q_norm: Any, k_norm: Any, head_dim: int) -> str | None:
    """Which norm `genfast.ops.qknorm_rope` has to compute in place of calls of both modules; None where they have to be called."""
    for name, cls in _NORMS.items():
        if plain(q_norm, cls) and plain(k_norm, cls):
            q, k = ((tuple(m.normalized_shape), m.eps, m.weight is None, getattr(m, "bias", None) is None) for m in (q_norm, k_norm))
            return name if q == k and q[0] == (head_dim,) and q[1] is not None else None
    return None
