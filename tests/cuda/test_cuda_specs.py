"""On a GPU: the OpSpec cases of the GAN operators, results and gradients, as close as the CPU kernels have to be."""

from __future__ import annotations

import pytest
import torch
from test_specs import cotangents, gradients

from genfast import ops, reference
from genfast.testing import SPECS, Case, OpSpec
from genfast.testing.oracle import assert_accurate, precision
from genfast.testing.spec import LAYOUTS, change_tensors, laid_out, widened

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
NAMES = ["bias_act", "bn_act", "group_norm_silu", "modulate_bias_act", "upfirdn2d", "modulated_conv2d", "filtered_lrelu"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("spec", "case"), [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in map(SPECS.get, NAMES) for c in s.cases])
def test_cases(spec: OpSpec, case: Case, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    arguments = laid_out(spec, case.make(dtype), LAYOUTS[layout])
    on_device = {key: change_tensors(value, lambda t: t.to(DEVICE)) for key, value in arguments.items()}
    # The working precision's reference runs there too: cuDNN's convolutions round otherwise than the CPU's.
    pairs = [spec.call(ops, on_device), spec.call(reference, on_device), spec.call(reference, widened(arguments))]
    if "empty" not in case.name and "not finite" not in case.name:
        weights = cotangents(spec, arguments)
        there = [t.to(DEVICE) for t in weights]
        pairs[0] += gradients(spec, ops, on_device, there)
        pairs[1] += gradients(spec, reference, on_device, there)
        pairs[2] += gradients(spec, reference, widened(arguments), weights)
    for got, working, exact in zip(*pairs, strict=True):
        assert_accurate(case.name, got.cpu(), working.cpu(), exact, precision(spec, dtype))
