"""On a GPU: upfirdn2d, bn_act, group_norm_silu and conv_block, values and gradients against the reference in float64 on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from emulator.test_emulator_upfirdn2d import KINDS, case
from test_specs import cotangents, gradients

from genfast import ops, reference
from genfast.testing import SPECS, Case, OpSpec
from genfast.testing.oracle import assert_accurate, precision
from genfast.testing.spec import LAYOUTS, Arguments, change_tensors, laid_out, widened

pytestmark = pytest.mark.cuda
NAMES = ["upfirdn2d", "bn_act", "group_norm_silu", "conv_block"]


def on_device(arguments: Arguments) -> Arguments:
    return {key: change_tensors(value, torch.Tensor.cuda) for key, value in arguments.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("spec", "given"),
    [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in map(SPECS.get, NAMES) for c in s.cases if "empty" not in c.name],
)
def test_values_and_gradients(spec: OpSpec, given: Case, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    arguments = laid_out(spec, given.make(dtype), LAYOUTS[layout])
    weights = cotangents(spec, arguments)

    def all_of(namespace: Any, given: Arguments, device: str) -> list[torch.Tensor]:
        found = gradients(spec, namespace, given, [w.to(device) for w in weights])
        return [t.cpu() for t in spec.call(namespace, given) + found]

    got = all_of(ops, on_device(arguments), "cuda")
    working, exact = all_of(reference, on_device(arguments), "cuda"), all_of(reference, widened(arguments), "cpu")
    for result, plain, truth in zip(got, working, exact, strict=True):
        assert_accurate(given.name, result, plain, truth, precision(spec, dtype))


@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_sweep_of_resampling(kind: tuple[int, int, int], dtype: torch.dtype, channels_last: bool) -> None:
    random = np.random.default_rng(sum(kind))
    for _ in range(20):
        x, f, options = case(random, *kind, channels_last, dtype)
        got = ops.upfirdn2d(x.cuda(), f.cuda(), **options).cpu()
        working, exact = reference.upfirdn2d(x, f, **options), reference.upfirdn2d(x.double(), f.double(), **options)
        assert_accurate(f"{tuple(x.shape)} {options}", got, working, exact, precision(SPECS["upfirdn2d"], dtype))
