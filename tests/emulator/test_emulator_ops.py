"""The CUDA kernels under the block emulator, bit for bit against the references. docs/emulator.md says what that shows.

GENFAST_EMULATOR_SANITIZE=1 loads the library built with AddressSanitizer, GENFAST_EMULATOR_LIBRARY=path another one; the last tests
of this file run the others, and attention's, in such a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from emulator import emulator_build
from emulator.step_cases import Case, cases, differing, run_operator, same_bits, tensors_of
from ops import numpy_noise
from test_specs import cotangents, gradients

from genfast import ops, reference
from genfast.testing import SPECS, OpSpec, operators_from
from genfast.testing import Case as SpecCase
from genfast.testing.oracle import assert_accurate, precision
from genfast.testing.spec import LAYOUTS, Arguments, laid_out, widened

ACCURATE = ["bias_act", "bn_act", "modulate_bias_act", "qknorm_rope", "upfirdn2d"]  # derivatives by kernel, without promised bits


@pytest.mark.parametrize(("spec", "case"), [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() if s.bits for c in s.cases])
def test_opspecs(emulated: Any, schedule: None, spec: OpSpec, case: SpecCase) -> None:
    """The cases that the CPU kernels are tested with, through the same wrappers."""
    arguments = case.make(torch.float32)
    with operators_from("genfast_emulator"):
        got = spec.call(ops, arguments)
    assert all(same_bits(a, b) for a, b in zip(got, spec.call(reference, arguments), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("spec", "case"), [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in map(SPECS.get, ACCURATE) for c in s.cases])
def test_gradients(emulated: Any, schedule: None, spec: OpSpec, case: SpecCase, dtype: torch.dtype, layout: str) -> None:
    """Results and gradients, as close as the CPU kernels have to be."""
    arguments = laid_out(spec, case.make(dtype), LAYOUTS[layout])
    weights = cotangents(spec, arguments)

    def all_of(namespace: Any, given: Arguments) -> list[torch.Tensor]:
        derived = [] if "not finite" in case.name else gradients(spec, namespace, given, weights)
        return spec.call(namespace, given) + derived

    with operators_from("genfast_emulator"):
        got = all_of(ops, arguments)
    working, exact = all_of(reference, arguments), all_of(reference, widened(arguments))
    for result, plain, truth in zip(got, working, exact, strict=True):
        assert_accurate(case.name, result, plain, truth, precision(spec, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 24, 4, 8), (5, 6, 33, 34)], ids=str)
def test_samples_have_statistics_of_their_own(emulated: Any, schedule: None, shape: tuple[int, ...], layout: str) -> None:
    """Group normalisation with a residual and its gradients: one call forward and one backward, in both layouts."""
    random = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=random, dtype=torch.float64).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    given = [x, residual, torch.randn(shape[1], generator=random).double(), torch.randn(shape[1], generator=random).double()]

    def all_of(namespace: Any) -> list[torch.Tensor]:
        x, residual, weight, bias = leaves = [t.clone().requires_grad_() for t in given]
        ones = torch.eye(shape[1], dtype=x.dtype)[:, :, None, None]
        y = namespace.conv_block(x, ones, bias, residual, norm="group", norm_groups=3, norm_weight=weight, act="swish")
        return [y, *torch.autograd.grad((y * y.detach().cos()).sum(), leaves)]

    launches = []
    with operators_from("genfast_emulator"):
        kernel = torch.ops.genfast_emulator.bn_act_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.ops.genfast_emulator, "bn_act_", lambda *a: (launches.append(a[13]), kernel(*a)))
            got = all_of(ops)
    assert launches == [4, 5]
    for a, b in zip(got, all_of(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("uniform", [False, True], ids=["normal", "uniform"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 3, 5, 7), (2, 4, 6, 6), (2, 3, 40, 40), (1, 2, 3, 4, 5), (300, 8)], ids=str)
def test_noise(emulated: Any, schedule: None, shape: tuple[int, ...], uniform: bool, dtype: torch.dtype) -> None:
    seeds = torch.arange(shape[0]) * (2**62 // shape[0]) + 11
    fill = reference.uniform if uniform else reference.normal
    layouts = [torch.contiguous_format, *{4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), [])]
    for layout in layouts:
        out = torch.full(shape, float("nan"), dtype=dtype).contiguous(memory_format=layout)
        emulated.noise_(out, seeds, 2**32 - 1, 3, uniform)
        want = fill(seeds, shape, draw=2**32 - 1, stream=3, dtype=dtype)
        assert same_bits(out, want)


@pytest.mark.parametrize("kind", ["normals", "uniforms"])
def test_noise_from_the_page_alone(emulated: Any, kind: str) -> None:
    seed, count = 2**63 - 25, 5001
    out = torch.empty(1, count)
    emulated.noise_(out, torch.tensor([seed]), 7, 1, kind == "uniforms")
    assert same_bits(out[0], torch.from_numpy(getattr(numpy_noise, kind)(seed, 7, 1, count)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noise_into_an_unaligned_view(emulated: Any, dtype: torch.dtype) -> None:
    storage = torch.full((2 * 64 + 3,), -7.0, dtype=dtype)
    emulated.noise_(storage[1:129].view(2, 64), torch.tensor([1, 2]), 0, 0, False)
    assert same_bits(storage[1:129].view(2, 64), reference.normal(torch.tensor([1, 2]), (2, 64), dtype=dtype))
    assert storage[[0, 129, 130]].tolist() == [-7.0] * 3


@pytest.mark.parametrize("schedule", [0, 5], indirect=True)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_solver_step(emulated: Any, schedule: None, case: Case) -> None:
    given = tensors_of(case)
    want, got = given.clone(), given.clone()
    reference.solver_step_(
        want.ring,
        want.cond,
        want.coef,
        want.index,
        want.counter,
        uncond=want.uncond,
        seeds=want.seeds,
        model_input=want.model_input,
        watch=want.watch,
        rescale=case.rescale != 0,
        threshold=case.quantile != 0,
    )
    run_operator(emulated.solver_step_, case, got)
    assert differing(got, want) == []
    assert differing(got, given) != []  # the step did something


def test_solver_step_on_separate_slots(emulated: Any) -> None:
    case = Case(slots=4, history=(3,), written=(1, 0), terms=(((0, 0.5), (3, 2.0)), ((1, 1.0),)))
    ring, separate = tensors_of(case), tensors_of(case)
    slots = [slot.clone() for slot in separate.ring]
    run_operator(emulated.solver_step_, case, ring)
    t = separate
    emulated.solver_step_slots_(slots, t.cond, t.uncond, t.coef, t.index, t.counter, None, None, None, False, False)
    assert same_bits(torch.stack(slots), ring.ring)


def test_rows_that_do_not_ask_for_rescale_or_threshold(emulated: Any) -> None:
    """A plan may use them in other rows: the launches are there, this row passes through."""
    case = Case(shape=(2, 3, 12, 12), guidance=3.0)
    alone, among = tensors_of(case), tensors_of(case)
    run_operator(emulated.solver_step_, case, alone)
    t = among
    emulated.solver_step_(t.ring, t.cond, t.uncond, t.coef, t.index, t.counter, None, None, None, True, True)
    assert same_bits(among.ring, alone.ring)


def test_noise_without_seeds_is_nan(emulated: Any) -> None:
    """The row is known on the device alone, so it cannot be refused there; it must not look like a draw either."""
    coef, index = ops.pack_row(convert=(0.0, 1.0), outputs={0: {"d": 1.0, "noise": 0.5}}, draw=1)
    ring, watch = torch.zeros(1, 2, 8), torch.full((2,), 99)
    tables = torch.tensor([coef]), torch.tensor([index]), torch.zeros(1, dtype=torch.int64)
    emulated.solver_step_(ring, torch.zeros(2, 8), None, *tables, None, None, watch, False, False)
    assert ring.isnan().all() and watch.tolist() == [0, 0]


def test_a_sample_alone_equals_the_sample_in_a_batch(emulated: Any) -> None:
    case = Case(shape=(5, 3, 9, 9), guidance=2.0, rescale=0.5, quantile=0.9, terms=(((0, 1.0), (1, 0.5), (9, 0.25)),))
    batch = tensors_of(case)
    ring, cond, uncond = batch.ring.clone(), batch.cond.clone(), batch.uncond.clone()
    run_operator(emulated.solver_step_, case, batch)
    for b in range(5):
        alone = ring[:, b : b + 1].contiguous()
        one = slice(b, b + 1)
        t = batch
        emulated.solver_step_(alone, cond[one], uncond[one], t.coef, t.index, t.counter, t.seeds[one], None, None, True, True)
        assert same_bits(alone, batch.ring[:, one])


FILES = sorted(f.name for f in Path(__file__).parent.glob("test_emulator_*.py") if "self" not in f.name)


def run_these_files(
    library: dict[str, str], preload: str = "", only: str = "", names: Sequence[str] = FILES
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **library, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
    files = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", only, *files]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def sanitized(**mutation: Any) -> tuple[dict[str, str], str]:
    path = emulator_build.library(sanitize=True, **mutation)
    return {"GENFAST_EMULATOR_SANITIZE": "1", "GENFAST_EMULATOR_LIBRARY": str(path)}, str(emulator_build.asan_runtime())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if "large_scores" not in name])  # whose addresses are those of the others
def test_everything_under_address_sanitizer(name: str) -> None:
    done = run_these_files(*sanitized(), names=[name])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "passed" in done.stdout


@pytest.mark.slow
def test_address_sanitizer_sees_a_kernel_read_out_of_bounds() -> None:
    bug = ("core/vec.cuh", "      if (i >= span.count) break;", "")
    done = run_these_files(*sanitized(mutation=bug, only="solver_step"), only="test_solver_step", names=["test_emulator_ops.py"])
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "apply_kernel" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "replacement", "only"),
    [
        ("core/reduce.cuh", "    __syncthreads();\n    if (lane < s)", "    if (lane < s)", "test_solver_step and rescale"),
        (
            *("ops/solver_step/solver_step.cu", "+ j * kFoldLanes + threadIdx.x", "+ threadIdx.x * (kChunk / kFoldLanes) + j"),
            "test_solver_step and rescale",
        ),
        ("ops/attention/attention_forward.cuh", "key + kKeys > at.m || ", "", "test_every_head and not decode"),
        ("ops/attention/attention_forward.cuh", "    __syncthreads();  // the keys are there", "    //", "test_every_head and not decode"),
        (
            *("ops/attention/attention_backward.cuh", "cp_async_wait_all();\n    __syncthreads();  // walked1", "__syncthreads();  //"),
            "test_every_head and not decode",
        ),
        ("ops/upfirdn2d/upfirdn2d.cu", "  });\n  __syncthreads();\n", "  });\n", "test_a_sweep_of_shapes and planes"),
        ("ops/upfirdn2d/upfirdn2d.cu", "? static_cast<int>(first_element(p.x, 0) & 1) : 0", "? 0 : 0", "test_a_sweep_of_shapes and planes"),
        (
            "ops/bn_act/bn_act.cu",
            "(sample * p.outer + row + k * groups) * period, span);",
            "(row + k * groups) * period, span);",
            "test_samples",
        ),
    ],
    ids=[
        "fold without a barrier",
        "sum in another order",
        "keys beyond the last",
        "loop without a barrier",
        "copy without a wait",
        "lines without a barrier",
        "pairs at odd elements",
        "the first sample",
    ],
)
def test_a_planted_bug_fails(file: str, text: str, replacement: str, only: str) -> None:
    path = emulator_build.library(mutation=(file, text, replacement))
    done = run_these_files({"GENFAST_EMULATOR_LIBRARY": str(path)}, only=only)
    assert done.returncode == 1, done.stdout[-5000:] + done.stderr[-5000:]
    assert " failed" in done.stdout
