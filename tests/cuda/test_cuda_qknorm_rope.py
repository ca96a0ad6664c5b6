"""On a GPU: qknorm_rope and its gradients, as close to the truth as the CPU kernels have to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_specs import cotangents, gradients

from genfast import ops, reference
from genfast.testing import SPECS, Case
from genfast.testing.oracle import assert_accurate, precision
from genfast.testing.spec import Arguments, change_tensors, widened

pytestmark = pytest.mark.cuda
SPEC = SPECS["qknorm_rope"]


@pytest.mark.parametrize("dtype", SPEC.dtypes, ids=str)
@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.name)
def test_results_and_gradients(case: Case, dtype: torch.dtype) -> None:
    arguments = case.make(dtype)
    weights = cotangents(SPEC, arguments)

    def all_of(namespace: Any, given: Arguments, device: str = "cpu") -> list[torch.Tensor]:
        given = {key: change_tensors(value, lambda t: t.to(device)) for key, value in given.items()}
        found = SPEC.call(namespace, given) + gradients(SPEC, namespace, given, [w.to(device) for w in weights])
        return [t.cpu() for t in found]

    got, working, exact = all_of(ops, arguments, "cuda"), all_of(reference, arguments), all_of(reference, widened(arguments))
    for result, plain, truth in zip(got, working, exact, strict=True):
        assert_accurate(case.name, result, plain, truth, precision(SPEC, dtype))
