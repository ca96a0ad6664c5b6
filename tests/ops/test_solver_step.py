"""What follows from the solver step's definition, how rows are packed, and what compilers and transforms may do with it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from genfast import ops, reference
from genfast.ops import _backend, pack_row
from genfast.testing.oracle import same_bits

PARAMS = Path(__file__).resolve().parents[2] / "csrc/ops/solver_step/params.h"


def tables(**row: object) -> tuple[Tensor, Tensor]:
    floats, integers = pack_row(**row)  # type: ignore[arg-type]
    return torch.tensor(floats), torch.tensor(integers)


# ---- rows --------------------------------------------------------------------------------------------------------------------


def test_offsets_are_those_of_the_kernels() -> None:
    source = PARAMS.read_text()
    there = {name: int(value) for name, value in re.findall(r"\bk(\w+) = (\d+)", source)}
    here, base = vars(sys.modules["genfast.ops.solver_step"]), vars(sys.modules["genfast.reference.solver_step"])
    for constant, ours in {
        "MaxSlots": "MAX_SLOTS", "MaxHistory": "MAX_HISTORY", "MaxOutputs": "MAX_OUTPUTS", "Terms": "TERMS", "RowFloats": "ROW_FLOATS",
        "RowInts": "ROW_INTS", "Ax": "AX", "Am": "AM", "Guidance": "GUIDANCE", "Clip": "CLIP", "NextCIn": "NEXT_C_IN",
        "Rescale": "RESCALE", "Quantile": "QUANTILE", "MaxThreshold": "MAX_THRESHOLD", "Coef": "COEF", "Draw": "DRAW",
        "NumOut": "NUM_OUT", "NumHist": "NUM_HIST", "HistSlot": "HIST_SLOT", "OutSlot": "OUT_SLOT", "TermH": "FIRST_HISTORY_TERM",
    }.items():  # fmt: skip
        assert here[ours] == there[constant], constant
    assert here["NAMED_TERMS"] == {"x": there["TermX"], "d": there["TermD"], "m": there["TermM"], "noise": there["TermNoise"]}
    assert (base["CHUNK"], base["NEXT_C_IN"], base["FIRST_COEF"], base["TERMS"], base["FIRST_HISTORY"], base["NOISE"]) == tuple(
        there[k] for k in ("Chunk", "NextCIn", "Coef", "Terms", "TermH", "TermNoise")
    )
    derivatives = vars(sys.modules["genfast.ops._autograd"])
    assert [derivatives[k] for k in ("_CLIP", "_COEF", "_TERMS", "_OUTPUTS", "_NOISE")] == [
        there[k] for k in ("Clip", "Coef", "Terms", "MaxOutputs", "TermNoise")
    ]


def test_a_packed_row() -> None:
    floats, integers = pack_row(
        convert=(0.5, -0.25), outputs={0: {"x": 1.0, 7: 2.0, "noise": 3.0}, 4: {3: 4.0, 7: 5.0, 9: 0.0}}, guidance=6.0, clip=7.0,
        next_c_in=8.0, rescale=0.9, quantile=0.95, max_threshold=11.0, draw=12,
    )  # fmt: skip
    assert floats[:8] == [0.5, -0.25, 6.0, 7.0, 8.0, 0.9, 0.95, 11.0]
    assert floats[8:18] == [1.0, 0, 0, 2.0, 0, 0, 0, 0, 0, 3.0]
    assert floats[18:28] == [0, 0, 0, 5.0, 4.0, 0, 0, 0, 0, 0]
    assert floats[28:] == [0.0] * 12
    assert integers == [12, 2, 2, 7, 3, 0, 0, 0, 0, 0, 4, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": {}}, "outputs: got 0 outputs, supported: 1 to 3"),
        ({"outputs": {k: {} for k in range(4)}}, "outputs: got 4 outputs, supported: 1 to 3"),
        ({"outputs": {16: {}}}, "outputs: got slot 16, supported: slots 0 to 15"),
        ({"outputs": {0: {"h": 1.0}}}, "outputs: got term 'h', supported: 'x', 'd', 'm', 'noise' or the number of a history slot"),
        ({"outputs": {0: {0: 1.0}}}, "outputs: got history slot 0, supported: slots 1 to 15 (slot 0 is 'x')"),
        ({"outputs": {0: dict.fromkeys(range(1, 8), 1.0)}}, "supported: at most 6 distinct ones in a row"),
        ({"draw": -1}, "draw: got -1, supported: an integer in [0, 2^32)"),
        ({"quantile": 1.5}, "quantile: got 1.5, supported: a number in [0, 1], 0 for none"),
        ({"clip": -1.0}, "clip: got -1.0, supported: a number of at least 0, 0 for none"),
    ],
)
def test_a_row_that_cannot_be_packed(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pack_row(**{"convert": (1.0, 0.0), "outputs": {0: {"x": 1.0}}, **change})  # type: ignore[arg-type]


# ---- analysis ----------------------------------------------------------------------------------------------------------------


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_term_that_is_absent_is_not_read() -> None:
    """Slots never written and a state that is not used may hold anything, NaN too; slots that are not outputs keep what they hold."""
    coef, index = tables(convert=(0.0, 1.0), outputs={1: {"d": 2.0, 2: 0.0}})
    ring = torch.full((3, 2, 5), torch.nan)
    cond = some(2, 5)
    ops.solver_step_(ring, cond, coef[None], index[None], torch.tensor([0]))
    assert torch.equal(ring[1], 2 * cond)
    assert ring[0].isnan().all() and ring[2].isnan().all()


def test_outputs_may_overwrite_inputs() -> None:
    """Swapping the state and a slot: both are read before either is written."""
    coef, index = tables(convert=(0.0, 0.0), outputs={0: {1: 1.0}, 1: {"x": 1.0}})
    ring = some(2, 3, 4, 9, 9)
    before = ring.clone()
    ops.solver_step_(ring, some(3, 4, 9, 9), coef[None], index[None], torch.tensor([0]))
    assert torch.equal(ring, before.flip(0))


def test_the_functions_of_the_literature() -> None:
    """Guidance, rescale and threshold against torch's own std and quantile, in float64."""
    x, uncond, cond = (some(3, 4, 40, 40, seed=s).double() for s in range(3))
    floats, integers = pack_row(convert=(0.5, 0.8), outputs={0: {"d": 1.0}}, guidance=4.0, rescale=0.7, quantile=0.93, max_threshold=2.5)
    coef, index = torch.tensor(floats, dtype=torch.float64), torch.tensor(integers)
    (got,) = ops.solver_step([x], cond, coef, index, uncond=uncond, rescale=True, threshold=True)
    guided = uncond + 4 * (cond - uncond)
    ratio = cond.flatten(1).std(1) / guided.flatten(1).std(1)
    denoised = 0.5 * x + 0.8 * guided * (0.7 * ratio + 0.3).view(-1, 1, 1, 1)
    s = torch.quantile(denoised.abs().flatten(1), 0.93, dim=1).clamp(1, 2.5).view(-1, 1, 1, 1)
    torch.testing.assert_close(got, denoised.clamp(-s, s) / s, rtol=1e-13, atol=1e-13)


def test_rows_follow_the_counter() -> None:
    """A table is executed by moving the counter alone; slots given apart are the ring's."""
    rows = [
        pack_row(convert=(1.0, -0.5), outputs={0: {"x": 0.9 - k / 10, "d": 0.1, 1: 0.2, "noise": 0.3}, 1: {"d": 1.0}}, draw=k + 1)
        for k in range(3)
    ]
    coef, index = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    ring, cond, seeds, counter = some(2, 2, 3, 8, 8), some(2, 3, 8, 8, seed=1), torch.tensor([3, 2**62]), torch.tensor([0])
    slots, state, history = [t.clone() for t in ring], ring[0].clone(), ring[1].clone()
    for k in range(3):
        counter.fill_(k)
        ops.solver_step_(ring, cond, coef, index, counter, seeds=seeds)
        ops.solver_step_(slots, cond, coef, index, counter, seeds=seeds)
        state, history = reference.solver_step([state, history], cond, coef[k], index[k], seeds=seeds, outputs=2)
        assert same_bits(ring[0], state) and same_bits(ring[1], history)
        assert same_bits(slots[0], state) and same_bits(slots[1], history)


def test_versions_are_counted() -> None:
    """Autograd must see that a tensor saved for backward has been overwritten."""
    coef, index = tables(convert=(1.0, 1.0), outputs={0: {"x": 2.0}}, next_c_in=1.0)
    ring, weight = torch.ones(1, 2, 3), torch.ones(2, 3, requires_grad=True)
    product = (weight * ring[0]).sum()
    model_input, watch = torch.zeros(2, 3), torch.full((2,), 5)
    versions = [t._version for t in (ring, model_input, watch)]
    ops.solver_step_(ring, torch.ones(2, 3), coef[None], index[None], torch.tensor([0]), model_input=model_input, watch=watch)
    assert all(t._version > before for t, before in zip((ring, model_input, watch), versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode() -> None:
    coef, index = tables(convert=(1.0, 1.0), outputs={0: {"x": 2.0}})
    with torch.inference_mode():
        ring = torch.ones(1, 2, 3)
        ops.solver_step_(ring, torch.ones(2, 3), coef[None], index[None], torch.tensor([0]))
        assert torch.equal(ring, torch.full((1, 2, 3), 2.0))


def test_a_device_without_kernels_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation behind every kernel: the reference, with one warning for each reason, and rows checked as the kernels do."""
    monkeypatch.setattr(_backend, "_warned", set())
    coef, index = tables(convert=(0.5, 0.5), outputs={0: {"x": 1.0, "d": 1.0}})
    ring = torch.ones(1, 2, 3)
    arguments = (torch.ones(2, 3), None, coef[None], index[None], torch.tensor([0]), None, None, None, False, False)
    with pytest.warns(UserWarning, match="no kernels for 'cpu' tensors .* reference runs instead"):
        _backend._solver_step_(ring, *arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _backend._solver_step_([ring[0]], *arguments)
        out = torch.empty(2, 3)
        _backend._noise_(out, torch.arange(2), 1, 0, False)
    assert torch.equal(ring[0], torch.full((2, 3), 3.5))
    assert same_bits(out, ops.normal(torch.arange(2), (2, 3), draw=1))
    for place, value, message in ((9, 1, "slot 1"), (9, -1, "slot -1"), (0, -1, "draw -1")):
        bad = index.clone()
        bad[place] = value
        with pytest.raises(RuntimeError, match=message):
            _backend._solver_step_(ring, *arguments[:3], bad[None], *arguments[4:])


# ---- compilers and transforms ------------------------------------------------------------------------------------------------

COEF, INDEX = tables(convert=(0.5, 0.8), outputs={0: {"x": 0.9, "d": 0.2, "m": 0.1, 3: 0.4, "noise": 0.3}}, guidance=3.0, draw=5)


def guided(x: Tensor, cond: Tensor, uncond: Tensor, history: Tensor) -> Tensor:
    return ops.solver_step([x, history], cond, COEF, INDEX, uncond=uncond, seeds=torch.arange(len(x)))[0]


def in_place(x: Tensor, cond: Tensor, uncond: Tensor, history: Tensor) -> Tensor:
    ring = torch.stack([x, history, history, history])
    ops.solver_step_(ring, cond * 1, COEF[None], INDEX[None], torch.tensor([0]), uncond=uncond, seeds=torch.arange(len(x)))
    return ring[0]


@pytest.fixture
def inputs() -> list[Tensor]:
    torch._dynamo.reset()
    return [some(2, 3, 4, 4, seed=s) for s in range(4)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("step", [guided, in_place])
def test_compiles_whole_without_gradients(step: Callable[..., Tensor], backend: str, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        compiled = torch.compile(lambda *t: step(*(v * 1 for v in t)) * 1, backend=backend, fullgraph=True)
        assert same_bits(compiled(*inputs), guided(*inputs))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_gradient_is_exact_around_the_step(backend: str, inputs: list[Tensor]) -> None:
    """Without fullgraph the step runs between two graphs, first and second derivatives included."""

    def loss(x: Tensor) -> Tensor:
        return (guided(x * 1, *inputs[1:]) ** 3).sum()

    x, y = inputs[0].clone().requires_grad_(), inputs[0].clone().requires_grad_()
    (got,), (expected,) = torch.autograd.grad(torch.compile(loss, backend=backend)(x), x), torch.autograd.grad(loss(y), y)
    torch.testing.assert_close(got, expected)


def refusals(step: Callable[..., Tensor], inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    x, *rest = inputs
    leaf = x.clone().requires_grad_()

    def compiled(function: Callable[..., object]) -> Callable[..., object]:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return compiled(lambda x: step(x, *rest))(forward_ad.make_dual(x, x))  # type: ignore[return-value]

    return {
        "gradient": lambda: compiled(lambda x: step(x, *rest).sum())(leaf),
        "double": lambda: compiled(torch.func.grad(lambda x: torch.func.grad(lambda x: (step(x, *rest) ** 3).sum())(x).square().sum()))(x),
        "func.grad": lambda: compiled(torch.func.grad(lambda x: step(x, *rest).sum()))(x),
        "func.jvp": lambda: compiled(lambda x: torch.func.jvp(lambda x: step(x, *rest), (x,), (x,)))(x),
        "dual": dual,
        "vmap": lambda: compiled(lambda x: torch.vmap(lambda x: step(x, *rest))(x))(torch.stack([x, x])),
    }


@pytest.mark.parametrize("step", [guided, in_place])
@pytest.mark.parametrize("kind", ["gradient", "double", "func.grad", "func.jvp", "dual", "vmap"])
def test_fullgraph_derivatives_are_refused(step: Callable[..., Tensor], kind: str, inputs: list[Tensor]) -> None:
    """Dynamo would lose them: any answer here would be wrong."""
    with pytest.raises(
        Exception, match=r"supported: (none|no tangents|a tensor without gradient)|torch.compiler.disable|Batching rule not implemented"
    ):
        refusals(step, inputs)[kind]()


def test_double_backward_compiles_through_make_fx(inputs: list[Tensor]) -> None:
    """Tracing the whole of stock autograd and compiling that is exact, the step's kernels kept as nodes."""
    rest = inputs[1:]

    def penalty(x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((guided(leaf, *rest) ** 3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.square().sum(), leaf)[0]

    expected = penalty(inputs[0])
    traced = make_fx(penalty)(inputs[0])
    assert sum("genfast.solver_step" in str(node.target) for node in traced.graph.nodes) >= 3
    with torch.no_grad():
        got = torch.compile(traced, backend="inductor", fullgraph=True)(inputs[0] + 1)
    torch.testing.assert_close(got, penalty(inputs[0] + 1))
    torch.testing.assert_close(traced(inputs[0]), expected)


def test_the_operators_refuse_what_they_would_lose(inputs: list[Tensor]) -> None:
    x, cond, uncond, history = inputs
    leaf = cond.clone().requires_grad_()
    tables_ = (COEF[None], INDEX[None], torch.tensor([0]), torch.arange(2))

    def functional(c: Tensor) -> Tensor:
        return torch.ops.genfast.solver_step([x, history], c, uncond, *tables_, 1, False, False)[0]

    def writing(c: Tensor) -> Tensor:
        ring = torch.stack([x, history, history, history])
        torch.ops.genfast.solver_step_(ring, c, uncond, *tables_, None, None, False, False)
        return ring[0]

    for raw in (functional, writing):
        for lost in (
            lambda: raw(leaf),  # noqa: B023
            lambda: torch.func.jvp(raw, (cond,), (cond,)),  # noqa: B023
            lambda: torch.func.grad(lambda c: raw(c).sum())(cond),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"call genfast.ops.solver_step outside torch.compile"):
                lost()
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.vmap(raw)(torch.stack([cond, cond]))
    for transform in (
        lambda: torch.func.jvp(lambda c: in_place(x, c, uncond, history), (cond,), (cond,)),
        lambda: torch.func.grad(lambda c: in_place(x, c, uncond, history).sum())(cond),
        lambda: torch.vmap(lambda c: in_place(x, c, uncond, history))(torch.stack([cond, cond])),
    ):
        with pytest.raises(ValueError, match=r"solver_step_: got an input with a gradient, a tangent or inside a torch.func transform"):
            transform()
    with torch.no_grad():
        in_place(x, leaf, uncond, history)


def test_vmap_needs_one_table(inputs: list[Tensor]) -> None:
    def step(coef: Tensor) -> Tensor:
        return ops.solver_step([inputs[0]], inputs[1], coef, INDEX, seeds=torch.arange(2))[0]

    with pytest.raises((ValueError, RuntimeError)):
        torch.vmap(step)(torch.stack([COEF, COEF]))


def test_autocast_changes_nothing(inputs: list[Tensor]) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs]
    plain = torch.autograd.grad(guided(*leaves).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        out = guided(*leaves)
        inside = torch.autograd.grad(out.sum(), leaves)
    assert same_bits(out, guided(*leaves))
    assert all(same_bits(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("row", [{}, {"clip": 0.5}, {"quantile": 0.9, "max_threshold": 2.0}, {"rescale": 0.7}])
def test_vmap_of_any_row(row: dict[str, float], channels_last: bool, inputs: list[Tensor]) -> None:
    coef, index = tables(convert=(0.5, 0.8), outputs={0: {"x": 0.9, "d": 0.2}}, guidance=3.0, **row)
    flags = {"rescale": "rescale" in row, "threshold": "quantile" in row}

    def step(x: Tensor) -> Tensor:
        return ops.solver_step([x], inputs[1], coef, index, uncond=inputs[2], **flags)[0]

    many = torch.cat(inputs).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    many = many.view(4, 2, 3, 4, 4)
    assert same_bits(torch.vmap(step)(many), torch.stack([step(x) for x in many]))
    assert same_bits(torch.vmap(step, in_dims=2)(many.movedim(0, 2)), torch.stack([step(x) for x in many]))


def test_traced_tables_are_refused(inputs: list[Tensor]) -> None:
    leaf = inputs[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="coef: got a table that is an input of the traced function"):
        make_fx(
            lambda coef: ops.solver_step([leaf], inputs[1], coef, INDEX.clone().index_fill(0, torch.tensor([2]), 0), seeds=torch.arange(2))[
                0
            ]
        )(COEF)


def test_batched_cotangents_are_refused(inputs: list[Tensor]) -> None:
    leaf = inputs[0].clone().requires_grad_()
    out = guided(leaf, *inputs[1:])
    with pytest.raises(ValueError, match="gradients of genfast's operators: got a batch of them"):
        torch.autograd.grad(out, leaf, torch.stack([out, out]), is_grads_batched=True)


@pytest.mark.parametrize("q", [0.01, 0.37, 0.5, 0.77, 0.995, 1.0])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 20_000])
@pytest.mark.parametrize("values", ["normal", "equal", "hidden"])
def test_the_threshold_is_exact_for_any_values(values: str, n: int, q: float, isa: str) -> None:
    """The kernel guesses a bound from every so many-th element; "hidden" makes all of those tiny, so that the guess is wrong."""
    generator = torch.Generator().manual_seed(n)
    d = 3 * torch.randn(2, n, generator=generator)
    if values == "equal":
        d = torch.full_like(d, 1.75)
    if values == "hidden":
        d[:, :: max(1, n // 2048)] *= 1e-3
    coef, index = ops.pack_row(convert=(0.0, 1.0), outputs={0: {"d": 1.0}}, quantile=q, max_threshold=10.0)
    got, expected = torch.empty(1, 2, n), torch.empty(1, 2, n)
    tables = torch.tensor([coef]), torch.tensor([index]), torch.zeros(1, dtype=torch.int64)
    ops.solver_step_(got, d, *tables, threshold=True)
    reference.solver_step_(expected, d, *tables, threshold=True)
    assert torch.equal(got, expected)
    bound = d.double().abs().quantile(float(torch.tensor(q)), dim=1, keepdim=True).clamp(1, 10)
    torch.testing.assert_close(got[0].double(), d.double().clamp(-bound, bound) / bound, rtol=1e-5, atol=1e-6)
