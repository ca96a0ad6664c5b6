"""Conditions in any nesting: stacked leaf by leaf, or refused with the name of the leaf."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import Tensor

from genfast import schedules
from genfast.samplers import Denoiser, Sampler
from genfast.samplers import conditions as C

VP = schedules.scaled_linear()
SHAPE = (2, 3, 8, 8)
Pair = namedtuple("Pair", "first second")


def drawn(cond: object, uncond: object, g: object = 3.0) -> tuple[Tensor, list[dict]]:
    calls: list[dict] = []

    def net(x: Tensor, t: Tensor, **given: object) -> Tensor:
        calls.append(given)
        return torch.tanh(x)

    draw = Sampler("euler", steps=2, guidance_scale=g, progress=False)
    return draw(Denoiser(net, "v", noise=VP), SHAPE, seeds=[0, 1], cond=cond, uncond=uncond), calls


def both(value: float, *sizes: int) -> tuple[Tensor, Tensor]:
    """A conditional and an unconditional tensor, and what the network must get of them."""
    return torch.full((2, *sizes), value), torch.full((2, *sizes), -value)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: {"text_embeds": a, "time_ids": b},
        lambda a, b: OrderedDict(text_embeds=a, time_ids=b),
        lambda a, b: (a, b),
        lambda a, b: [a, (b, a)],
        lambda a, b: Pair(a, {"deep": [b]}),
        lambda a, b: {"mid": a, "down": (b, b, None), "scale": 0.5, "name": "canny"},
    ],
    ids=["sdxl", "ordered", "tuple", "list", "namedtuple", "controlnet"],
)
def test_nested_tensors_are_stacked_leaf_by_leaf(wrap: object) -> None:
    a, b = both(1.0, 4), both(2.0, 3, 2, 2)
    _, calls = drawn({"added": wrap(a[0], b[0])}, {"added": wrap(a[1], b[1])})
    expected = wrap(torch.cat([a[1], a[0]]), torch.cat([b[1], b[0]]))
    flat, spec = torch.utils._pytree.tree_flatten(expected)
    for given in calls:
        got, got_spec = torch.utils._pytree.tree_flatten(given["added"])
        assert got_spec == spec
        assert all(torch.equal(g, f) if isinstance(f, Tensor) else g == f for g, f in zip(got, flat, strict=True))


def test_one_unconditional_entry_serves_all_samples_and_one_half_alone_is_passed_as_it_is() -> None:
    cond = {"added": {"t": torch.ones(2, 4)}, "residuals": (torch.ones(2, 3),)}
    _, calls = drawn(cond, {"added": {"t": torch.zeros(1, 4)}, "residuals": (torch.zeros(1, 3),)})
    assert calls[0]["added"]["t"].shape == (4, 4) and calls[0]["residuals"][0][:2].abs().max() == 0
    _, calls = drawn(cond, None, g=1.0)
    assert calls[0]["added"] is cond["added"] and calls[0]["residuals"] is cond["residuals"]


@pytest.mark.parametrize("mapping", [UserDict, MappingProxyType])
def test_any_mapping_is_a_condition(mapping: type) -> None:
    _, calls = drawn(mapping({"y": torch.ones(2)}), mapping({"y": torch.zeros(2)}))
    assert calls[0]["y"].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("cond", "uncond", "message"),
    [
        ({"added": {"t": torch.ones(2, 4)}}, {"added": {"u": torch.ones(2, 4)}}, r"uncond\['added'\]: got a dict of \['u'\] with cond"),
        ({"r": (torch.ones(2), torch.ones(2))}, {"r": (torch.ones(2),)}, r"uncond\['r'\]: got a tuple of 1 with cond a tuple of 2"),
        ({"r": (torch.ones(2),)}, {"r": None}, r"uncond\['r'\]: got a NoneType with cond a tuple of 1"),
        ({"r": torch.ones(2)}, {"r": (torch.ones(2),)}, r"uncond\['r'\]: got a tuple with cond a Tensor"),
        ({"r": [torch.ones(2), torch.ones(3)]}, {"r": [torch.ones(2)] * 2}, r"cond\['r'\]\[1\]: got shape \(3,\), supported: \(2, ...\)"),
        ({"a": {"b": torch.ones(2, 3)}}, {"a": {"b": torch.ones(2, 4)}}, r"uncond\['a'\]\['b'\]: got shape \(2, 4\), supported: \(2, 3\)"),
        ({"a": {"b": torch.tensor(1.0)}}, {"a": {"b": torch.tensor(1.0)}}, r"cond\['a'\]\['b'\]: got shape \(\), supported: \(2, ...\)"),
        ({"a": [1.0, 2.0]}, {"a": [1.0, 3.0]}, r"uncond\['a'\]\[1\]: got 3.0 with cond 2.0"),
        ({"a": np.ones(2)}, {"a": np.zeros(2)}, r"uncond\['a'\]: got a ndarray with cond a ndarray"),
        ({"a": torch.ones(2)}, {"a": None}, r"uncond\['a'\]: got None with cond a Tensor"),
        ([torch.ones(2)], [torch.ones(2)], "cond: got a list, supported: a tensor, a mapping"),
        (torch.ones(2), "", "uncond: got a str, supported: a tensor, a mapping"),
        ({0: torch.ones(2)}, {0: torch.ones(2)}, "cond: got the key 0, supported: names"),
    ],
)
def test_halves_that_do_not_fit_are_refused_by_name(cond: object, uncond: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(cond, uncond)


def test_what_a_recording_keeps_of_a_condition() -> None:
    """Tensors are buffers of the recording's own; the nesting and everything else is baked in."""
    cond = {"added": {"t": torch.ones(2), "n": 3}, "res": (torch.zeros(2), None)}
    copy = C.clone(cond)
    assert C.signature(copy) == C.signature(cond) and len(C.tensors_of(cond)) == 2
    assert all(a is not b and torch.equal(a, b) for a, b in zip(C.tensors_of(copy), C.tensors_of(cond), strict=True))
    for other in ({**cond, "res": (torch.zeros(2), 1)}, {**cond, "res": [torch.zeros(2), None]}, {"added": cond["added"]}, None):
        assert C.signature(other) != C.signature(cond)
