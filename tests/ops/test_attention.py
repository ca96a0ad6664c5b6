"""Attention beyond its OpSpec: what follows from analysis, a sweep of shapes, derivatives of higher order, compilers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from genfast import _library, ops, reference
from genfast.ops import _attention_blocks
from genfast.ops.attention import route, route_backward
from genfast.testing import SPECS
from genfast.testing.oracle import assert_accurate, precision
from genfast.testing.specs.attention import Attention

DOUBLE = torch.float64


def draw(*shape: int, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=DOUBLE).to(dtype)


# ---- identities --------------------------------------------------------------------------------------------------------------


def test_equal_scores_average_the_values() -> None:
    v = draw(2, 3, 11, 8)
    o, lse = ops.attention(torch.zeros(2, 3, 5, 8, dtype=DOUBLE), draw(2, 3, 11, 8), v, return_lse=True)
    torch.testing.assert_close(o, v.mean(2, keepdim=True).expand_as(o))
    torch.testing.assert_close(lse, torch.full((2, 3, 5), 11, dtype=DOUBLE).log())


def test_a_large_score_selects_its_value() -> None:
    keys = torch.eye(8, dtype=torch.float32)[None, None]
    v = draw(1, 1, 8, 8, dtype=torch.float32)
    torch.testing.assert_close(ops.attention(keys, keys, v, scale=1e4), v)


def test_a_causal_query_ignores_what_follows() -> None:
    q, k, v = draw(1, 2, 4, 8), draw(1, 2, 9, 8, seed=1), draw(1, 2, 9, 8, seed=2)
    o = ops.attention(q, k, v, causal=True)
    for i in range(4):
        visible = i + 9 - 4 + 1
        torch.testing.assert_close(o[:, :, i], ops.attention(q[:, :, i : i + 1], k[:, :, :visible], v[:, :, :visible])[:, :, 0])


@pytest.mark.parametrize("block", [1, 2**22])
def test_a_query_that_sees_nothing_gives_zeros_and_gradient_zero(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention_blocks, "BLOCK_SCORES", block)
    mask = torch.ones(1, 1, 20, 9, dtype=torch.bool)
    mask[:, :, [3, 17]] = False
    inputs = [draw(1, 2, 20, 8), draw(1, 2, 9, 8), draw(1, 2, 9, 8, seed=1), draw(1, 2, 20, 9)]
    leaves = [t.requires_grad_() for t in inputs]

    def loss(*given: Tensor) -> Tensor:
        o, lse = ops.attention(*given, mask, return_lse=True)
        assert (o[:, :, [3, 17]] == 0).all() and (lse[:, :, [3, 17]] == -torch.inf).all()
        seen = mask.any(-1)
        return (o**2).sum() + (lse * lse.where(seen, torch.zeros_like(lse))).where(seen, torch.zeros_like(lse)).sum()

    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
    for g in (*first, *second):
        assert g.isfinite().all()
    for g in (first[0], second[0], first[3], second[3]):
        assert (g[:, :, [3, 17]] == 0).all()


def test_explanations() -> None:
    q = draw(1, 2, 20, 8, dtype=torch.float32)
    assert "Forward: genfast (tiles" in ops.explain_attention(q, q, q)
    assert "torch_cpu_flash (float64" in ops.explain_attention(q.double(), q.double(), q.double())
    assert "torch_cpu_flash (3 queries" in ops.explain_attention(q[:, :, :3], q, q)
    assert "Forward: blocks (there is nothing to compute)" in ops.explain_attention(q[:0], q[:0], q[:0])


@pytest.mark.parametrize(("wish", "capability", "kernel"), [("1", (9, 0), "wgmma"), ("1", (8, 0), "mma.sync"), ("0", (9, 0), "mma.sync")])
def test_explain_on_cuda(wish: str, capability: tuple[int, int], kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hopper's own kernels are named where they are asked for and there."""
    monkeypatch.setenv("GENFAST_ATTENTION_HOPPER", wish)
    monkeypatch.setattr(_library, "has_kernels", lambda device: device == "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), shape=(1, 1, 64, 64), dtype=torch.bfloat16, numel=lambda: 1)
    assert kernel in route(q, q, False).why.removesuffix("else mma.sync")
    assert kernel in route_backward(q, q, False).why.removesuffix("else mma.sync")
    q.shape = (1, 1, 64, 160)
    assert kernel in route(q, q, False).why.removesuffix("else mma.sync")
    assert "mma.sync" in route_backward(q, q, False).why.removesuffix("else mma.sync")


# ---- a sweep -----------------------------------------------------------------------------------------------------------------


def sweep(count: int) -> list[Attention]:
    random = torch.Generator().manual_seed(7)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    cases = []
    for i in range(count):
        n, m, d = pick(1, 3, 16, 33, 64, 95), pick(1, 7, 16, 77, 128, 145), pick(1, 8, 16, 24, 40, 64, 72, 80, 96, 112, 128, 160, 256)
        batch, groups, kv_heads = pick(1, 2), pick(1, 2, 3), pick(1, 2)
        broadcast = [(pick(1, batch), pick(1, kv_heads * groups), pick(1, n), last) for last in (m, pick(1, m))]
        cases.append(
            Attention(
                f"sweep {i}",
                batch,
                kv_heads * groups,
                n,
                m,
                d,
                kv_heads,
                bias=pick(None, broadcast[0] if m > 1 else None),  # of a single key the gradient is zero
                mask=pick(None, broadcast[1]),
                blind=pick(False, False, True),
                causal=pick(False, True),
                scale=pick(None, 0.2),
            )
        )
    return cases


def strided(t: Tensor, how: int) -> Tensor:
    """The same numbers: as they are; heads last; between others, as in a packed qkv; with gaps within rows."""
    if how == 1:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 2:
        return torch.stack([t, -t, t], 3)[:, :, :, 1].neg()
    return torch.stack([t, t], -1)[..., 0] if how == 3 else t


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, DOUBLE], ids=str)
def test_sweep(dtype: torch.dtype) -> None:
    """Values, log-sum-exp and gradients, no further from float64 than torch's own arithmetic in the same dtype, twice over."""
    eps = precision(SPECS["attention"], dtype)
    for i, case in enumerate(sweep(120)):
        arguments = case.make(dtype)
        for j, name in enumerate(("q", "k", "v", "bias")):
            if arguments[name] is not None:
                arguments[name] = strided(arguments[name], (i + j) % 4)
        weights = draw(*arguments["q"].shape).mul(4).round().div(4)
        results = []
        for namespace, wide in ((ops, dtype), (reference, dtype), (reference, DOUBLE)):
            given = {key: t.to(wide) if isinstance(t, Tensor) and t.is_floating_point() else t for key, t in arguments.items()}
            leaves = [given[key].requires_grad_() for key in ("q", "k", "v", "bias") if given[key] is not None]
            o, lse = namespace.attention(**given)
            grads = [g.flatten() for g in torch.autograd.grad((o * weights.to(wide)).sum(), leaves)]
            # The gradients of q and k can be sums that cancel (one key: to zero), so one bound serves those of q, k and v.
            results.append([o.detach(), lse.detach(), torch.cat(grads[:3]), *grads[3:]])
        for what, (got, plain, exact) in enumerate(zip(*results, strict=True)):
            assert_accurate(f"{case}, result {what}", got, plain, exact, eps)


# ---- derivatives -------------------------------------------------------------------------------------------------------------

MASK = torch.rand(2, 1, 20, 7, generator=torch.Generator().manual_seed(0)) > 0.4
MASK[0, 0, 2] = False


def everything(namespace: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Mask, causal, groups, bias; the log-sum-exp where it is finite."""
    o, lse = namespace.attention(*tensors, MASK, True, 0.7, True)
    return o, lse.masked_fill(lse == -torch.inf, 0)


def few(bias: tuple[int, ...] = (1, 4, 20, 7)) -> list[Tensor]:
    return [draw(2, 4, 20, 4), draw(2, 2, 7, 4), draw(2, 2, 7, 4, seed=1), draw(*bias)]


@pytest.mark.parametrize("block", [1, 2**22])
@pytest.mark.parametrize("bias", [(1, 4, 20, 7), (2, 1, 1, 7)])
def test_differences(block: int, bias: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention_blocks, "BLOCK_SCORES", block)
    leaves = [t.requires_grad_() for t in few(bias)]
    assert torch.autograd.gradcheck(lambda *t: everything(ops, *t), leaves, check_forward_ad=True, fast_mode=True)
    options = {"check_fwd_over_rev": True, "check_rev_over_rev": True, "fast_mode": True}
    assert torch.autograd.gradgradcheck(lambda *t: everything(ops, *t), leaves, **options)


def test_third_derivative() -> None:
    def third(namespace: Any) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in few()]
        o, lse = everything(namespace, *leaves)
        loss = (o**3).sum() + (lse**2).sum()
        for _ in range(2):
            loss = sum((g**2).sum() for g in torch.autograd.grad(loss, leaves, create_graph=True))
        return torch.autograd.grad(loss, leaves)

    for got, expected in zip(third(ops), third(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11 * float(expected.abs().max()))


def test_gradient_of_a_tangent() -> None:
    """Reverse over forward, which neither sCM nor MeanFlow needs."""
    directions = [t.roll(1) for t in few()]

    def gradient(namespace: Any) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in few()]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(leaves, directions, strict=True)]
            tangent = forward_ad.unpack_dual(everything(namespace, *duals)[0]).tangent
            return torch.autograd.grad((tangent**2).sum(), leaves)

    for got, expected in zip(gradient(ops), gradient(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_attention_jvp() -> None:
    (q, k, v, bias), directions = few(), [t.roll(1) for t in few()[:3]]
    got = ops.attention_jvp(q, k, v, *directions, bias, MASK, True, 0.7)
    expected = torch.func.jvp(lambda *t: reference.attention(*t, bias, MASK, True, 0.7), (q, k, v), tuple(directions))
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"tk: got shape \(2, 2, 6, 4\), supported: \(2, 2, 7, 4\)"):
        ops.attention_jvp(q, k, v, directions[0], directions[1][:, :, :6], directions[2])


@pytest.mark.parametrize("transform", ["attention_jvp", "torch.func.jvp"])
def test_tangent_beside_a_gradient(transform: str) -> None:
    """As sCM and MeanFlow train: gradients through the output, and where it is asked for through the tangent, to the second order."""
    directions = tuple(t.roll(1) for t in few()[:3])

    def both(leaves: list[Tensor], namespace: Any = ops) -> tuple[Tensor, Tensor]:
        *primals, bias = leaves
        if transform == "attention_jvp" and namespace is ops:
            return ops.attention_jvp(*primals, *directions, bias, MASK, True, 0.7)
        result = torch.func.jvp(lambda *t: namespace.attention(*t, bias, MASK, True, 0.7), tuple(primals), directions)
        return result[0], result[1]

    def loss(o: Tensor, to: Tensor) -> Tensor:
        return (o**3).sum() + (o * to).sum() + (to**2).sum()

    results = []
    for namespace in (ops, reference):
        leaves = [t.requires_grad_() for t in few()]
        first = torch.autograd.grad(loss(*both(leaves, namespace)), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum((g**2).sum() for g in first), leaves)])  # type: ignore[arg-type]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        both([t.requires_grad_() for t in few()])
    assert kept and max(kept) <= max(t.numel() for t in (*few(), MASK))  # no block of scores


def test_tangent_of_a_tangent() -> None:
    directions = tuple(t.roll(1) for t in few()[:3])

    def second(namespace: Any, *primals: Tensor) -> Tensor:
        def first(*t: Tensor) -> Tensor:
            return torch.func.jvp(lambda *u: namespace.attention(*u, None, MASK, True, 0.7), t, directions)[1]  # type: ignore[no-any-return]

        return torch.func.jvp(first, primals, directions)[1]  # type: ignore[no-any-return]

    expected = second(reference, *few()[:3])
    torch.testing.assert_close(second(ops, *few()[:3]), expected, rtol=1e-10, atol=1e-10)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(few()[:3], directions, strict=True)]
        to = ops.attention_jvp(*duals, *directions, None, MASK, True, 0.7)[1]  # type: ignore[arg-type]
        torch.testing.assert_close(forward_ad.unpack_dual(to).tangent, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (1, None, 0, None), (None, 2, None, 0), (None, None, None, 3)], ids=str)
def test_vmap(dims: tuple[int | None, ...]) -> None:
    """Values and per-sample gradients with any of the inputs batched, a bias of one sample for all included."""
    stacked = [t if d is None else torch.stack([t, t.roll(1), -t], d) for t, d in zip(few(), dims, strict=True)]

    def loss(namespace: Any) -> Callable[..., Tensor]:
        return lambda *t: sum((r**3).sum() for r in everything(namespace, *t))  # type: ignore[return-value]

    for transform in (lambda n: partial(everything, n), lambda n: torch.func.grad(loss(n), argnums=(0, 1, 2, 3))):
        got = torch.vmap(transform(ops), dims)(*stacked)
        for k in range(3):
            expected = transform(reference)(*(t if d is None else t.select(d, k) for t, d in zip(stacked, dims, strict=True)))
            for g, e in zip(got, expected, strict=True):
                torch.testing.assert_close(g[k], e, rtol=1e-11, atol=1e-11)


def test_hessian() -> None:
    q, k, v = draw(1, 1, 3, 2), draw(1, 1, 4, 2), draw(1, 1, 4, 2, seed=1)
    got, expected = (torch.func.hessian(lambda q, n=n: (n.attention(q, k, v) ** 3).sum())(q) for n in (ops, reference))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_autocast_leaves_the_dtypes() -> None:
    q = draw(1, 2, 3, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q, q, q).dtype == torch.float32


# ---- compilers ---------------------------------------------------------------------------------------------------------------


def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return ops.attention(q * 1, k, v, bias, causal=True) * 1  # type: ignore[operator]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_without_gradients(backend: str) -> None:
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(step, backend=backend, fullgraph=True)(*few()), step(*few()))


def test_compiled_gradient_is_exact_around_the_operator() -> None:
    """Without fullgraph attention runs between two graphs, second derivatives included."""

    def penalty(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in few()]
        grads = torch.autograd.grad((function(*leaves) ** 3).sum(), leaves, create_graph=True)
        return (*grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), leaves))

    plain = penalty(step)
    for got, expected in zip(penalty(torch.compile(step, backend="eager")), plain, strict=True):
        torch.testing.assert_close(got, expected)
    leaves = [t.requires_grad_() for t in few()]
    got = torch.autograd.grad((torch.compile(step, backend="aot_eager")(*leaves) ** 3).sum(), leaves)
    for g, expected in zip(got, plain[:4], strict=True):
        torch.testing.assert_close(g, expected)


def test_compiles_vmap() -> None:
    q, *rest = few()
    many = torch.stack([q, q.roll(1), -q])
    got = torch.compile(torch.vmap(lambda x: step(x, *rest)), backend="aot_eager", fullgraph=True)(many)
    torch.testing.assert_close(got, torch.stack([step(x, *rest) for x in many]))


@pytest.mark.parametrize("kind", ["gradient", "func.grad", "func.jvp", "dual"])
def test_fullgraph_derivatives_are_refused(kind: str) -> None:
    q, *rest = few()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return compiled(lambda x: step(x, *rest))(forward_ad.make_dual(q, q))

    attempts = {
        "gradient": lambda: compiled(lambda x: step(x, *rest).sum())(q.clone().requires_grad_()),
        "func.grad": lambda: compiled(torch.func.grad(lambda x: step(x, *rest).sum()))(q),
        "func.jvp": lambda: compiled(lambda x: torch.func.jvp(lambda x: step(x, *rest), (x,), (x,)))(q),
        "dual": dual,
    }
    with pytest.raises(Exception, match=r"supported: none of these|torch.compiler.disable"):
        attempts[kind]()


def test_double_backward_compiles_through_make_fx() -> None:
    q, *rest = few()

    def penalty(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((step(leaf, *rest) ** 3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]

    traced = make_fx(penalty)(q)
    assert sum("genfast.attention" in str(node.target) for node in traced.graph.nodes) >= 2
    with torch.no_grad():
        got = torch.compile(traced, backend="aot_eager", fullgraph=True)(q + 1)
    torch.testing.assert_close(got, penalty(q + 1))


@pytest.mark.parametrize("bias_grad", [False, True])
def test_opcheck(bias_grad: bool) -> None:
    q, k, v, bias = few()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (q, k, v, bias, MASK, False, 0.5)
    o, _, row_stats = torch.ops.genfast.attention(*forward, True)
    checked = torch.library.opcheck(torch.ops.genfast.attention, (*forward, bias_grad), test_utils=tests)
    backward = (o, None, *forward, o, row_stats, bias_grad)
    checked |= torch.library.opcheck(torch.ops.genfast.attention_backward, backward, test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}


def test_the_operators_refuse_what_they_would_lose() -> None:
    q, k, v, bias = few()
    leaf = q.clone().requires_grad_()
    for given in itertools.permutations([leaf, k, v], 3):
        with pytest.raises(ValueError, match=r"call genfast\.ops\.attention outside torch\.compile"):
            torch.ops.genfast.attention(*given, bias, None, False, 1.0, False)
