"""Fused diffusers schedulers whose state somebody else changes: everything that a step reads, in place or replaced, is seen, and the result
is stock's. Every change is made to a stock scheduler as well; nothing here knows how a change is noticed."""

from __future__ import annotations

import copy
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from fused_runs import CLASSES, PATHWISE, Outputs, difference, gen, make, net, run, start
from torch import Tensor

import genfast.compat.diffusers as fused
from genfast.compat.diffusers import FusedScheduler, rows

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 8


def both(scenario: Callable[[Any], Outputs], name: str, **config: Any) -> list[Any]:
    """What a stock scheduler and a fused one come to; the classes of what they raise."""
    outcomes: list[Any] = []
    for module in (diffusers, fused):
        torch.manual_seed(5)
        s = make(module, name, **config)
        s.set_timesteps(STEPS)
        try:
            outcomes.append(scenario(s))
        except Exception as error:
            outcomes.append(type(error))
    return outcomes


def assert_same(outcomes: list[Any], tolerance: float = 4e-5) -> None:
    expected, found = outcomes
    if isinstance(expected, type) or isinstance(found, type):
        assert expected is found
    else:
        assert difference(expected, found) < tolerance


def changed_between(s: Any, change: Callable[[Any], None], at: int = 3) -> Outputs:
    """A trajectory with a change of the scheduler before its step ``at``; twice, so that every row of the first half is known."""
    out: Outputs = []
    for _ in range(2):
        s.set_timesteps(STEPS)
        first = run(s, start(s), s.timesteps[:at], gen())
        change(s)
        out += first + run(s, first[-1][0], s.timesteps[at:], gen(2))
    return out


# What a step reads


def edit_tables_in_place(s: Any) -> None:
    for name, value in s.__dict__.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 1 and name != "timesteps":
            value.mul_(0.97)


def edit_tables_past_the_version_counter(s: Any) -> None:
    """Through ``.data`` and through an array that shares the memory."""
    for name, value in s.__dict__.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 1 and name != "timesteps":
            value.data.mul_(0.98)
            array = value.numpy()
            array *= 0.99


def replace_tables(s: Any) -> None:
    for name, value in list(s.__dict__.items()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 1 and name != "timesteps":
            s.__dict__[name] = value * 0.97


def edit_what_is_kept_in_place(s: Any) -> None:
    for value in s.__dict__.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor) and item.ndim > 1:
                item.mul_(0.5)


def replace_what_is_kept(s: Any) -> None:
    for name, value in list(s.__dict__.items()):
        if isinstance(value, list):
            s.__dict__[name] = [item * 0.5 if isinstance(item, Tensor) and item.ndim > 1 else item for item in value]
        elif isinstance(value, Tensor) and value.ndim > 1:
            s.__dict__[name] = value + 0.1


def forget_an_output(s: Any) -> None:
    """The order that is left is a lower one."""
    if hasattr(s, "lower_order_nums"):
        s.lower_order_nums = 1
    for name in ("ets", "derivatives"):
        if isinstance(s.__dict__.get(name), list):
            del s.__dict__[name][0]


def change_numbers(s: Any) -> None:
    for name in ("num_inference_steps", "this_order", "counter", "noise_sampler_seed"):
        if isinstance(s.__dict__.get(name), int):
            s.__dict__[name] += 1


def edit_the_configuration(s: Any) -> None:
    """As users do, although they should not."""
    for name, value in {"prediction_type": "v_prediction", "clip_sample": False, "solver_order": 1, "s_noise": 0.5}.items():
        if name in s.config:
            setattr(s.config, name, value)


def replace_the_configuration(s: Any) -> None:
    for name, value in {"prediction_type": "sample", "clip_sample": False, "lower_order_final": False}.items():
        if name in s.config:
            s.register_to_config(**{name: value})


def find_the_index_again(s: Any) -> None:
    if "_step_index" in s.__dict__:
        s._step_index = None


def go_back(s: Any) -> None:
    if "_step_index" in s.__dict__:
        s._step_index = 1


def announce_another_beginning(s: Any) -> None:
    if hasattr(s, "set_begin_index") and "_step_index" in s.__dict__:
        s.set_begin_index(2)
        s._step_index = None


CHANGES = [
    edit_tables_in_place, edit_tables_past_the_version_counter, replace_tables, edit_what_is_kept_in_place, replace_what_is_kept,
    forget_an_output, change_numbers, edit_the_configuration, replace_the_configuration, find_the_index_again, go_back,
    announce_another_beginning,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CLASSES)
def test_a_change_on_the_way_is_seen(name: str, change: Callable[[Any], None]) -> None:
    assert_same(both(lambda s: changed_between(s, change), name))


@pytest.mark.parametrize("name", CLASSES)
def test_tables_of_inference_mode_edited_in_place(name: str) -> None:
    """They have no version counter; a whole pipeline often runs in that mode."""
    with torch.inference_mode():
        assert_same(both(lambda s: changed_between(s, edit_tables_in_place), name))
        s = make(fused, name)
        s.set_timesteps(STEPS)
        run(s, start(s), s.timesteps, gen())
        assert s.fallback is None


def test_the_changes_matter() -> None:
    """Each of them makes another picture, of stock's, with some class: what is compared above differs."""
    for change in CHANGES:
        moved = 0.0
        for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "IPNDMScheduler"):
            results = []
            for what in (change, lambda s: None):
                s = make(diffusers, name)
                try:
                    results.append(changed_between(s, what))
                except Exception:
                    results.append([(torch.full((1,), 9.0),)])
            if len(results[0]) != len(results[1]):
                moved = 1.0
            else:
                moved = max(moved, difference(*results))
        assert moved > 1e-3, change.__name__


@pytest.mark.parametrize("thresholding", [False, True])
def test_an_index_past_the_beginning_of_what_was_seen(thresholding: bool) -> None:
    def scenario(s: Any) -> Outputs:
        s.set_begin_index(5)
        out = run(s, start(s), s.timesteps[5:7])
        s._step_index = 2
        return out + run(s, out[-1][0], s.timesteps[2:4])

    assert_same(both(scenario, "DPMSolverMultistepScheduler", thresholding=thresholding))


@pytest.mark.parametrize("name", CLASSES)
def test_a_second_loop_without_set_timesteps(name: str) -> None:
    assert_same(both(lambda s: run(s, start(s), s.timesteps, gen()) + run(s, start(s, seed=3), s.timesteps[:3], gen(2)), name))


@pytest.mark.parametrize("order", [2, 3])
def test_a_scheduler_inside_a_scheduler_is_left_alone(order: int) -> None:
    """Its state is not the fused scheduler's to trace: the stock step runs, and advances it once a step."""
    outcomes = []
    for module in (diffusers, fused):
        inner = diffusers.DPMSolverMultistepScheduler(solver_order=order)
        s = module.UniPCMultistepScheduler(solver_p=inner, solver_order=order)
        s.set_timesteps(STEPS)
        outcomes.append([*run(s, start(s), s.timesteps), (torch.tensor([inner._step_index, inner.lower_order_nums]),)])
    assert torch.equal(outcomes[0][-1][0], outcomes[1][-1][0])
    assert difference(*outcomes) == 0
    assert "solver_p" in s.fallback


def test_arrays_in_the_configuration_and_for_an_index() -> None:
    """They cannot be compared as a number is; two schedulers have two arrays."""
    outcomes = []
    for module in (diffusers, fused):
        for _ in range(2):
            s = module.EulerDiscreteScheduler(trained_betas=np.linspace(1e-4, 0.02, 1000, dtype=np.float32))
            s.set_timesteps(STEPS)
            out = run(s, start(s), s.timesteps[:3])
            s._step_index = np.array(2)
            outcomes.append(out + run(s, out[-1][0], s.timesteps[2:3]))
    assert all(difference(outcomes[0], other) < 4e-5 for other in outcomes[1:])


# What a step leaves


@pytest.mark.parametrize("name", CLASSES)
def test_the_attributes_are_stocks_after_every_step(name: str) -> None:
    """Names, numbers, lists, dtypes and tensors. What IPNDM's step does not read any more it need not keep."""
    if name in PATHWISE:
        pytest.importorskip("torchsde")
    pair = [make(module, name) for module in (diffusers, fused)]
    for s in pair:
        s.set_timesteps(STEPS)
    xs = [start(s) for s in pair]
    for t in pair[0].timesteps:
        for k, s in enumerate(pair):
            xs[k] = run(s, xs[k], [t], gen())[-1][0]
        stock, ours = ({n: v for n, v in s.__dict__.items() if n in pair[0].__dict__} for s in pair)
        assert stock.keys() == ours.keys()
        for attribute, expected in stock.items():
            found = ours[attribute]
            if attribute == "ets" and name == "IPNDMScheduler":
                expected = expected[-3:]
            values = (expected, found) if isinstance(expected, list) else ([expected], [found])
            assert len(values[0]) == len(values[1]), attribute
            for e, f in zip(*values, strict=True):
                assert type(e) is type(f) or callable(e), attribute
                if isinstance(e, Tensor):
                    assert e.dtype == f.dtype and e.shape == f.shape
                    # Stock's derivatives are differences of large numbers, so loosely; the trajectories are compared elsewhere.
                    torch.testing.assert_close(f, e, rtol=2e-3, atol=2e-3, equal_nan=True)
                elif isinstance(e, int | float | str | None):
                    assert e == f, attribute


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float16), (torch.float64, torch.float32)], ids=str
)
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_what_is_kept_has_stocks_dtype(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    kept = []
    for module in (diffusers, fused):
        s = make(module, name)
        s.set_timesteps(STEPS)
        x = start(s, dtype=dtypes[0])
        for t in s.timesteps[:3]:
            out = net(s.scale_model_input(x, t) if hasattr(s, "scale_model_input") else x, t).to(dtypes[1])
            x = s.step(out, t, x).prev_sample
        values = (item for value in s.__dict__.values() for item in (value if isinstance(value, list) else [value]))
        kept.append([x.dtype] + [v.dtype for v in values if isinstance(v, Tensor) and v.ndim > 1])
        if module is fused:
            assert s.fallback is None
    assert kept[0] == kept[1]


def test_what_was_kept_is_not_written_again() -> None:
    """A reference to it that somebody holds stays what it was, as with stock."""
    s = make(fused, "DPMSolverMultistepScheduler")
    s.set_timesteps(STEPS)
    x, held = start(s), []
    for t in s.timesteps:
        x = run(s, x, [t])[-1][0]
        held.append((s.model_outputs[-1], s.model_outputs[-1].clone()))
    assert all(torch.equal(a, b) for a, b in held)


# Methods


METHODS = {  # one that every step of the class calls
    "DDPMScheduler": "_get_variance", "DDIMScheduler": "_get_variance",
    "PNDMScheduler": "_get_prev_sample", "IPNDMScheduler": "_get_prev_sample",
    "EDMEulerScheduler": "precondition_outputs", "LCMScheduler": "get_scalings_for_boundary_condition_discrete",
    "CMStochasticIterativeScheduler": "get_scalings_for_boundary_condition", "LMSDiscreteScheduler": "get_lms_coefficient",
}  # fmt: skip


def a_method_of(name: str) -> str:
    stock = getattr(diffusers, name)
    return METHODS.get(name, "convert_model_output" if hasattr(stock, "convert_model_output") else "index_for_timestep")


def wrapped(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def wrapper(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return function(*args, **options)

    return wrapper


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("DDIMInverseScheduler", "TCDScheduler")])
def test_a_wrapped_method_is_called_as_often_as_by_stock(name: str) -> None:
    """On the object, in mid-run, and taken off again: stock goes on where a row stopped, and the other way round."""
    method, counts, outputs = a_method_of(name), [], []
    for module in (diffusers, fused):
        s, calls = make(module, name), []
        s.set_timesteps(STEPS)
        out = run(s, start(s), s.timesteps[:2], gen())
        setattr(s, method, wrapped(getattr(s, method), calls))
        out += run(s, out[-1][0], s.timesteps[2:5], gen(1))
        if module is fused:
            assert s.fallback == f"a method that is not the stock class's: {method}"
        delattr(s, method)
        outputs.append(out + run(s, out[-1][0], s.timesteps[5:], gen(2)))
        counts.append(len(calls))
        assert module is diffusers or s.fallback is None
    assert counts[0] == counts[1] and (counts[0] or method == "index_for_timestep")
    assert difference(*outputs) < 4e-5


@pytest.mark.parametrize("where", ["stock", "fused", "subclass"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_a_method_replaced_in_a_class(name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, cls = getattr(diffusers, name), getattr(fused, name)
    method, calls = a_method_of(name), []
    expected = make(diffusers, name)
    expected.set_timesteps(STEPS)
    if where == "subclass":
        cls = type(name, (cls,), {method: wrapped(getattr(stock, method), calls)})
    s = cls()
    s.set_timesteps(STEPS)
    out = run(s, start(s), s.timesteps[:2], gen())
    if where != "subclass":
        monkeypatch.setattr(stock if where == "stock" else cls, method, wrapped(getattr(stock, method), calls))
    out += run(s, out[-1][0], s.timesteps[2:], gen(1))
    assert s.fallback == f"a method that is not the stock class's: {method}"
    assert len(calls) == (STEPS if where == "subclass" else STEPS - 2)
    monkeypatch.undo()
    theirs = run(expected, start(expected), expected.timesteps[:2], gen())
    assert difference(theirs + run(expected, theirs[-1][0], expected.timesteps[2:], gen(1)), out) < 4e-5


@pytest.mark.parametrize("method", ["step", "scale_model_input", "set_timesteps", "add_noise"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler"])
def test_a_method_of_the_pipelines_replaced_on_the_object(name: str, method: str) -> None:
    """The wrapper is what a pipeline calls, and what it calls in turn is ours."""

    def scenario(s: Any) -> Outputs:
        calls: list[int] = []
        setattr(s, method, wrapped(getattr(s, method), calls))
        s.set_timesteps(STEPS)
        out = run(s, start(s), s.timesteps, gen())
        noise = s.add_noise(out[0][0], out[1][0], s.timesteps[1:2].expand(2))
        return [*out, (noise,), (torch.tensor(float(len(calls))),)]

    assert_same(both(scenario, name))


def test_a_stock_step_replaced_in_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a profiler does."""
    calls: list[int] = []
    s = fused.EulerDiscreteScheduler()
    s.set_timesteps(STEPS)
    monkeypatch.setattr(diffusers.EulerDiscreteScheduler, "step", wrapped(diffusers.EulerDiscreteScheduler.step, calls))
    run(s, start(s), s.timesteps)
    assert len(calls) == STEPS and s.fallback == "a method that is not the stock class's: step"


def piped(scheduler: Any) -> Any:
    return types.SimpleNamespace(scheduler=scheduler, components={"scheduler": scheduler})


@pytest.mark.parametrize("method", ["step", "convert_model_output", "set_timesteps", "a hook"])
def test_accelerate_leaves_a_scheduler_whose_methods_are_replaced(method: str) -> None:
    """What replaced them is bound to the object that it was made for."""
    stock = diffusers.DPMSolverMultistepScheduler()
    setattr(stock, "hook" if method == "a hook" else method, stock.step if method == "a hook" else wrapped(getattr(stock, method), []))
    pipe = piped(stock)
    report = fused.accelerate(pipe)
    assert pipe.scheduler is stock and not report.swapped
    assert report.left == {"scheduler": f"its {'hook' if method == 'a hook' else method} is a method of the object alone"}


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in PATHWISE])
def test_accelerate_in_mid_run(name: str) -> None:
    """The trajectory goes on, and the stock object is not touched any more."""
    stock = make(diffusers, name)
    stock.set_timesteps(STEPS)
    out = run(stock, start(stock), stock.timesteps[:3], gen())
    twin, pipe = copy.deepcopy(stock), piped(stock)
    fused.accelerate(pipe)
    before = copy.deepcopy(stock.__dict__)
    ours = run(pipe.scheduler, out[-1][0], stock.timesteps[3:], gen(2))
    assert pipe.scheduler is not stock and pipe.scheduler.fallback is None
    assert difference(run(twin, out[-1][0], stock.timesteps[3:], gen(2)), ours) < 4e-5
    for attribute, value in before.items():
        if isinstance(value, list):
            now = stock.__dict__[attribute]
            assert len(now) == len(value) and all(a is b or torch.equal(a, b) for a, b in zip(value, now, strict=True) if a is not None)


# Threads


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMInverseScheduler", "DDPMScheduler"])
def test_two_threads_on_one_scheduler_without_state(name: str) -> None:
    """Each follows a trajectory of its own, with a stock scheduler's result; a barrier puts every step of one beside one of the other."""
    s, expected = make(fused, name), make(diffusers, name)
    for scheduler in (s, expected):
        scheduler.set_timesteps(40)
    barrier, results = threading.Barrier(2), [[], []]

    def work(k: int) -> None:
        x = start(s, seed=k)
        for t in s.timesteps if k else s.timesteps.flip(0):
            barrier.wait()
            results[k] += run(s, x, [t], gen(k))
            x = torch.tanh(results[k][-1][0])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        x, theirs = start(s, seed=k), []
        for t in expected.timesteps if k else expected.timesteps.flip(0):
            theirs += run(expected, x, [t], gen(k))
            x = torch.tanh(theirs[-1][0])
        assert difference(theirs, results[k]) < 4e-5


@pytest.mark.parametrize("name", CLASSES)
def test_two_threads_in_turn_on_one_scheduler(name: str) -> None:
    """As with stock, whose steps they are in common: two samples, one count."""

    def scenario(s: Any) -> Outputs:
        turn, out = threading.Condition(), []
        xs, order = [start(s, seed=0), start(s, seed=1)], iter(range(STEPS - 2))
        errors: list[Exception] = []

        def work(k: int) -> None:
            for _ in range(STEPS // 2 - 1):
                with turn:
                    turn.wait_for(lambda: len(out) % 2 == k or errors)
                    try:
                        out.extend(run(s, xs[k], [s.timesteps[next(order)]], gen(k)))
                        xs[k] = out[-1][0]
                    except Exception as error:
                        errors.append(error)
                    turn.notify_all()
                    if errors:
                        return

        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return out

    assert_same(both(scenario, name))


# What is given to step


def test_a_list_of_seeds_edited_in_place() -> None:
    seeds, s = [1, 2], make(fused, "EulerAncestralDiscreteScheduler")
    s.seeds = seeds
    results = []
    for values in ([1, 2], [3, 4], [1, 2]):
        seeds[:] = values
        s.set_timesteps(STEPS)
        results.append(run(s, start(s), s.timesteps[:3])[-1][0])
    assert torch.equal(results[0], results[2]) and not torch.equal(results[0], results[1])
    seeds.append(5)
    with pytest.raises(ValueError, match=r"^seeds: got torch.int64 \(3,\)"):
        run(s, start(s), s.timesteps[3:4])


def test_prepared_steps_see_what_happens_between_steps_that_run_at_once() -> None:
    outcomes = []
    for module in (diffusers, fused):
        s = make(module, "DPMSolverMultistepScheduler")
        s.set_timesteps(STEPS)
        if module is fused:
            s.prepare(start(s))
        out = run(s, start(s), s.timesteps[:3])
        assert module is diffusers or s._run is not None
        s.model_outputs[-1] = s.model_outputs[-1] * 0.5
        s.sigmas.mul_(0.95)
        outcomes.append(out + run(s, out[-1][0], s.timesteps[3:]))
        assert module is diffusers or (s._run is None and s.fallback is None)
    assert difference(*outcomes) < 4e-5


# Tracing


@pytest.fixture
def _default_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(FusedScheduler, "trace_from", 1 << 14)
    rows.clear()
    return


@pytest.mark.usefixtures("_default_patience")
@pytest.mark.parametrize("name", CLASSES)
def test_a_first_trajectory_on_small_tensors_is_stocks_to_the_bit(name: str) -> None:
    """No row is traced before a step comes up again; then every one is, once."""
    expected = make(diffusers, name)
    expected.set_timesteps(STEPS)
    theirs = run(expected, start(expected), expected.timesteps, gen())
    s = make(fused, name)
    known = []
    for k in range(3):
        s.set_timesteps(STEPS)
        ours = run(s, start(s), s.timesteps, gen())
        assert s.fallback is None and difference(theirs, ours) < (4e-5 if k else 1e-30)
        known.append(sum(map(len, rows._rows.values())))
    assert known[0] == 0 < known[1] == known[2]


@pytest.mark.usefixtures("_default_patience")
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_one_step_traces_no_more_than_itself(name: str) -> None:
    """A large sample, of a scheduler whose grid has a thousand steps."""
    s = make(fused, name)
    if name != "DDPMScheduler":
        s.set_timesteps(1000)
    x = torch.zeros(1, 4, 64, 64)
    s.step(x, s.timesteps[3], x)
    found = [row for several in rows._rows.values() for row in several]
    assert len(found) == 1 and found[0].step is not None


@pytest.mark.usefixtures("_default_patience")
def test_a_step_is_not_traced_twice() -> None:
    """Another object of the same configuration, other values, another shape: the same rows."""
    counts = []
    for k in range(3):
        s = fused.UniPCMultistepScheduler()
        s.set_timesteps(STEPS)
        run(s, start(s, (1, 4, 64, 64 + k), seed=k), s.timesteps)
        counts.append(sum(map(len, rows._rows.values())))
    assert counts == [STEPS] * 3


def test_tables_on_a_gpu_are_read_once_a_version() -> None:
    """What `Stamps` does, with a stand-in for a tensor on a GPU: nothing is copied to the host while object and version stay."""
    copies: list[int] = []

    class OnGpu(Tensor):
        @property
        def device(self) -> Any:  # type: ignore[override]
            return torch.device("meta")

        def detach(self) -> Tensor:
            copies.append(1)
            return self.as_subclass(Tensor).detach()

    from genfast.compat.diffusers.state import Stamps

    stamps, table = Stamps(), torch.arange(3.0).as_subclass(OnGpu)
    first = stamps.content("sigmas", table)
    assert stamps.content("sigmas", table) == first and len(copies) == 1
    table.mul_(2)
    second = stamps.content("sigmas", table)
    assert second != first and len(copies) == 2
    assert stamps.content("sigmas", torch.arange(3.0)) == first
    assert np.frombuffer(second.data, np.float32).tolist() == [0.0, 2.0, 4.0]
