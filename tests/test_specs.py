"""Every operator keeps the promises of its OpSpec (genfast/testing): the kernels against the reference, and the reference in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from genfast import _library, ops, reference
from genfast.testing import SPECS, Case, OpSpec
from genfast.testing.oracle import assert_accurate, precision, same_bits
from genfast.testing.spec import LAYOUTS, Arguments, change_tensors, copy, laid_out, tensors_in, widened

FORWARD = [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() for c in s.cases]
BITS = [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() if s.bits for c in s.cases]
SMOOTH = [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() for c in s.cases if c.name in s.twice]
# Where clip, threshold or a value that is not finite is about, derivatives are compared, not measured by differences.
ONCE = [
    pytest.param(s, c, id=f"{s.name}-{c.name}")
    for s in SPECS.values()
    for c in s.cases
    if s.differentiable and "empty" not in c.name and "not finite" not in c.name
]


def assert_same(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for k, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(g, e), f"{name}: result {k} differs, by at most {(g.double() - e.double()).abs().max()}"


def assert_right(spec: OpSpec, case: Case, got: list[Tensor], arguments: Arguments, dtype: torch.dtype) -> None:
    """The reference's bits where they are promised, and no further from the truth than it is."""
    working = spec.call(reference, arguments)
    if spec.bits:
        assert_same(case.name, got, working)
    for result, plain, exact in zip(got, working, spec.call(reference, widened(arguments)), strict=True):
        if result.is_floating_point():
            assert_accurate(case.name, result, plain, exact, precision(spec, dtype))


def test_the_kernels_are_what_is_tested() -> None:
    assert _library.has_kernels("cpu")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_signature_is_the_references(spec: OpSpec) -> None:
    assert inspect.signature(getattr(ops, spec.name)) == inspect.signature(getattr(reference, spec.name))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", SPECS["normal"].dtypes, ids=str)
@pytest.mark.parametrize(("spec", "case"), FORWARD)
def test_forward(spec: OpSpec, case: Case, dtype: torch.dtype, layout: str) -> None:
    arguments = laid_out(spec, case.make(dtype), LAYOUTS[layout])
    assert_right(spec, case, spec.call(ops, arguments), arguments, dtype)


@pytest.mark.parametrize("dtype", SPECS["normal"].dtypes, ids=str)
@pytest.mark.parametrize(("spec", "case"), FORWARD)
def test_every_instruction_set(spec: OpSpec, case: Case, dtype: torch.dtype, isa: str) -> None:
    arguments = case.make(dtype)
    assert_right(spec, case, spec.call(ops, arguments), arguments, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "case"), [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() for c in s.benchmarks])
def test_forward_of_what_is_timed(spec: OpSpec, case: Case) -> None:
    arguments = case.make(torch.float32)
    assert_right(spec, case, spec.call(ops, arguments), arguments, torch.float32)


@pytest.mark.parametrize(("spec", "case"), BITS)
def test_layout_changes_no_bit(spec: OpSpec, case: Case) -> None:
    """Any memory format, and inputs that lie anyhow, give the same bits; a rescaled row's sums follow the storage, so it is left out."""
    arguments = case.make(torch.float32)
    if arguments.get("rescale"):
        return
    expected = spec.call(ops, arguments)
    assert_same("channels_last", spec.call(ops, laid_out(spec, arguments, torch.channels_last)), expected)

    def scattered(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0] if t.is_floating_point() else t

    loose = {k: change_tensors(v, scattered) if k in ("cond", "uncond", "inputs") else v for k, v in arguments.items()}
    assert_same("strided", spec.call(ops, loose), expected)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("spec", "case"), FORWARD)
def test_threads_change_no_bit(spec: OpSpec, case: Case) -> None:
    arguments = case.make(torch.float32)
    with threads(1):
        alone = spec.call(ops, arguments)
    with threads(2):
        assert_same(case.name, spec.call(ops, arguments), alone)


def batch_rows(value: Any, rows: Tensor, batch: int, dim: int) -> Any:
    """The samples ``rows`` of an argument whose dimension ``dim`` holds the batch, or twice the batch."""

    def take(t: Tensor) -> Tensor:
        return torch.cat([t.narrow(dim, start, batch).index_select(dim, rows) for start in range(0, t.shape[dim], batch)], dim)

    return change_tensors(value, take)


@pytest.mark.parametrize(("spec", "case"), BITS)
def test_batch_split_and_order_change_no_bit(spec: OpSpec, case: Case) -> None:
    arguments = case.make(torch.float32)
    image = arguments["shape"] if "shape" in arguments else tensors_in(arguments.get("inputs", arguments.get("ring")))[0].shape
    batch = image[1 if "ring" in arguments else 0]
    whole = spec.call(ops, arguments)
    for rows in [torch.arange(batch - 1, -1, -1), *torch.arange(batch).split(1)] if batch else []:
        part = {key: batch_rows(value, rows, batch, 0) if key in spec.batched else value for key, value in arguments.items()}
        part |= {key: batch_rows(value, rows, batch, 1) for key, value in arguments.items() if key in spec.stacked}
        if "shape" in part:
            part["shape"] = (len(rows), *part["shape"][1:])
        dims = [1 if key in spec.stacked else 0 for key in spec.mutates if arguments[key] is not None] or [0] * len(whole)
        expected = [batch_rows(t, rows, batch, dim) for t, dim in zip(whole, dims, strict=True)]
        assert_same(f"samples {rows.tolist()}", spec.call(ops, part), expected)


@pytest.mark.parametrize(("spec", "bad"), [pytest.param(s, b, id=f"{s.name}-{b.name}") for s in SPECS.values() for b in s.bad])
def test_bad_input(spec: OpSpec, bad: Any) -> None:
    """One sentence that names the argument, before anything is written."""
    arguments = bad.change(spec.cases[0].make(torch.float32))
    before = {key: copy(arguments[key]) for key in spec.mutates}
    with pytest.raises(bad.error) as caught:
        getattr(ops, spec.name)(**arguments)
    assert bad.message in str(caught.value)
    assert "\n" not in str(caught.value) and ", supported: " in str(caught.value)
    for key, value in before.items():
        for now, then in zip(tensors_in(arguments[key]), tensors_in(value), strict=True):
            assert torch.equal(now.detach(), then.detach())


@pytest.mark.parametrize("name", ["solver_step_", "solver_step"])
@pytest.mark.parametrize("case", ["three outputs, six history slots", "everything, several chunks", "empty batch"])
def test_opcheck(name: str, case: str) -> None:
    spec = SPECS[name]
    a = next(c for c in spec.cases if c.name == case).make(torch.float32)
    cond, uncond = a["cond"], a["uncond"]
    if uncond is None:
        uncond, cond = (t.clone() for t in cond.chunk(2))
    flags = (a["rescale"], a["threshold"])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if name == "solver_step":
        tables = (a["coef"][None], a["index"][None], torch.tensor([0]), a["seeds"])
        checked = torch.library.opcheck(
            torch.ops.genfast.solver_step, (a["inputs"], cond, uncond, *tables, a["outputs"], *flags), test_utils=tests
        )
    else:
        rest = (cond, uncond, a["coef"], a["index"], a["counter"], a["seeds"], a["model_input"], a["watch"], *flags)
        checked = torch.library.opcheck(torch.ops.genfast.solver_step_, (a["ring"], *rest), test_utils=tests)
        slots = list(a["ring"].clone())
        checked |= torch.library.opcheck(torch.ops.genfast.solver_step_slots_, (slots, *rest), test_utils=tests)
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("uniform", [False, True])
def test_opcheck_of_the_noise(uniform: bool) -> None:
    checked = torch.library.opcheck(torch.ops.genfast.noise_, (torch.empty(2, 3, 5), torch.arange(2), 1, 2, uniform))
    assert set(checked.values()) == {"SUCCESS"}


# ---- derivatives -------------------------------------------------------------------------------------------------------------


def as_function(spec: OpSpec, namespace: Any, arguments: Arguments) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The operator as a function of its differentiable tensors alone, and those tensors."""
    tensors = [t for key in spec.differentiable for t in tensors_in(arguments[key])]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given)
        changed = {key: change_tensors(arguments[key], lambda _: next(left)) for key in spec.differentiable}
        return tuple(tensors_in(getattr(namespace, spec.name)(**{**arguments, **changed})))

    return function, tensors


def gradients(spec: OpSpec, namespace: Any, arguments: Arguments, weights: list[Tensor]) -> list[Tensor]:
    function, tensors = as_function(spec, namespace, arguments)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = function(*leaves)
    loss = sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=True))
    loss = loss + sum(0 * leaf.sum() for leaf in leaves)  # a row need not use them all
    return list(torch.autograd.grad(loss, leaves))


def cotangents(spec: OpSpec, arguments: Arguments) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    # Numbers that every dtype holds, so that all precisions differentiate the same loss.
    return [torch.randint(-4, 5, t.shape, generator=random).double() / 2 for t in spec.call(reference, arguments)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("spec", "case"), ONCE)
def test_gradient(spec: OpSpec, case: Case, dtype: torch.dtype, layout: str) -> None:
    arguments = laid_out(spec, case.make(dtype), LAYOUTS[layout])
    weights = cotangents(spec, arguments)
    exact = gradients(spec, reference, widened(arguments), weights)
    working = gradients(spec, reference, arguments, weights)
    for got, plain, truth in zip(gradients(spec, ops, arguments, weights), working, exact, strict=True):
        assert_accurate(case.name, got, plain, truth, precision(spec, dtype))


@pytest.mark.parametrize(("spec", "case"), SMOOTH)
def test_differences(spec: OpSpec, case: Case) -> None:
    """Backward, forward and both twice against finite differences in float64."""
    function, tensors = as_function(spec, ops, case.make(torch.float64))
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True)


def second_tangent(function: Any, primals: tuple[Tensor, ...], directions: tuple[Tensor, ...]) -> Any:
    return torch.func.jvp(lambda *t: torch.func.jvp(function, t, directions)[1], primals, directions)[1]


@pytest.mark.parametrize(("spec", "case"), ONCE)
def test_transforms(spec: OpSpec, case: Case) -> None:
    """torch.func.grad, jvp, vmap and their compositions against the same of the reference, in float64."""
    arguments = case.make(torch.float64)
    fused, tensors = as_function(spec, ops, arguments)
    plain, _ = as_function(spec, reference, arguments)
    directions = [torch.cos(torch.arange(t.numel(), dtype=t.dtype)).view(t.shape) for t in tensors]

    def loss(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
        return lambda *given: torch.stack([(r**3).sum() for r in function(*given)]).sum()

    def both(transform: Callable[[Any], Any]) -> None:
        for got, expected in zip(transform(fused), transform(plain), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)

    def agree(name: str, got: list[Tensor], expected: list[Tensor]) -> None:
        if spec.bits:
            assert_same(name, got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)

    places = tuple(range(len(tensors)))
    both(lambda f: torch.func.grad(loss(f), argnums=places)(*tensors))
    both(lambda f: torch.func.jvp(f, tuple(tensors), tuple(directions))[1])
    both(lambda f: second_tangent(f, tuple(tensors), tuple(directions)))
    both(lambda f: [torch.func.jvp(lambda *g: torch.func.grad(loss(f), argnums=places)(*g), tuple(tensors), tuple(directions))[1][0]])
    if case.name in spec.twice and not arguments.get("rescale"):
        many = [torch.stack([t, d, t - d]) for t, d in zip(tensors, directions, strict=True)]
        for got, *expected in zip(torch.vmap(fused)(*many), *(plain(*(t[k] for t in many)) for k in range(3)), strict=True):
            agree("vmap", list(got), expected)
        moved = [many[0].movedim(0, 1), *tensors[1:]]
        for got, *expected in zip(
            torch.vmap(fused, (1, *[None] * (len(tensors) - 1)))(*moved), *(plain(many[0][k], *tensors[1:]) for k in range(3)), strict=True
        ):
            agree("vmap over one", list(got), expected)
        per_sample = torch.vmap(torch.func.grad(loss(fused)))(*many)
        for k in range(3):
            torch.testing.assert_close(per_sample[k], torch.func.grad(loss(plain))(*(t[k] for t in many)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("spec", "case"), ONCE)
def test_batched_gradients_are_exact_or_refused(spec: OpSpec, case: Case) -> None:
    """``is_grads_batched`` (and ``vectorize=True``, which is that): where it is not refused, no derivative of the gradients is lost."""
    function, given = as_function(spec, ops, case.make(torch.float64))
    tensors = [t.detach().requires_grad_() for t in given]
    draw = torch.Generator().manual_seed(0)

    def gradients_of(batched: bool) -> list[Tensor]:
        results = [r for r in function(*tensors) if r.requires_grad]
        draw.manual_seed(0)
        weights = [torch.randn(2, *r.shape, generator=draw, dtype=r.dtype, requires_grad=True) for r in results]
        options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        if batched:
            first = torch.autograd.grad(results, tensors, weights, is_grads_batched=True, **options)
        else:
            each = [torch.autograd.grad(results, tensors, [w[i] for w in weights], **options) for i in range(2)]
            first = tuple(map(torch.stack, zip(*each, strict=True)))
        loss = torch.stack([(f**2).sum() for f in first]).sum()
        return [*first, *torch.autograd.grad(loss, [*tensors, *weights], allow_unused=True, materialize_grads=True)]

    expected = gradients_of(False)
    try:
        got = gradients_of(True)
    except (RuntimeError, ValueError) as refused:
        assert "does not require grad" not in str(refused)
        return
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max().clamp(min=1)) if b.numel() else 0.0)


@pytest.mark.parametrize(("spec", "case"), [p for p in ONCE if p.values[1].name in p.values[0].twice])
def test_inputs_computed_from_each_other(spec: OpSpec, case: Case) -> None:
    """Each input depends on the one before it: no path is counted twice or lost in the first two derivatives."""
    arguments = case.make(torch.float64)

    def chain(namespace: Any) -> list[Tensor]:
        function, tensors = as_function(spec, namespace, arguments)
        source = torch.ones((), dtype=torch.float64, requires_grad=True)
        given = [tensors[0] * source]
        for t in tensors[1:]:
            given.append(t * (1 + 0.1 * given[-1].mean()))
        loss = torch.stack([(r**3).sum() for r in function(*given)]).sum()
        (first,) = torch.autograd.grad(loss, source, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first, source)]

    for got, expected in zip(chain(ops), chain(reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().clamp(min=1)))
