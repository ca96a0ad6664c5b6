"""`solver_step_` and `solver_step`: docs/solver-step.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from genfast.ops import pack_row
from genfast.testing.spec import Arguments, BadInput, Case, OpSpec

DDIM: dict[str, Any] = {"convert": (1.02, -0.31), "outputs": {0: {"x": 0.9, "d": 0.2}}}
EULER_A: dict[str, Any] = {"convert": (1.0, -0.7), "outputs": {0: {"x": 0.8, "d": 0.2, "noise": 0.35}}, "draw": 4}
DPMPP_2M: dict[str, Any] = {"convert": (1.1, -0.6), "outputs": {0: {"x": 0.7, "d": 0.5, 2: -0.2}, 2: {"d": 1.0}}, "next_c_in": 0.8}
WIDE: dict[str, Any] = {
    "convert": (0.9, -0.4),
    "outputs": {
        0: {"x": 1.25, "d": -0.5, 1: 0.125, 2: 0.3},
        3: {"m": 1.0, 3: 0.5, 4: -0.75, "noise": 0.1},
        2: {"x": 0.5, "d": 0.1, "m": -0.25, 1: 1.5, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5, 6: -0.6, "noise": 0.7},
    },
    "draw": 2**32 - 1,
}
CLIPPED: dict[str, Any] = {**DDIM, "clip": 0.5}
RESCALED: dict[str, Any] = {**DPMPP_2M, "rescale": 0.7}
THRESHOLDED: dict[str, Any] = {**EULER_A, "quantile": 0.9, "max_threshold": 1.5}
EVERYTHING: dict[str, Any] = {**THRESHOLDED, "rescale": 0.3, "clip": 1.4, "next_c_in": 0.5}


@dataclass(frozen=True)
class Step:
    """One row and the tensors that it runs on."""

    name: str
    row: dict[str, Any]
    shape: tuple[int, ...] = (2, 3, 5, 7)
    guidance: Literal["none", "halves", "batched"] = "none"
    slots: int = 7
    model: torch.dtype | None = None  # None: the state's
    copies: int = 0
    watch: bool = False
    spoil: dict[str, float] = field(default_factory=dict)  # one element of these arguments: the last of cond, the first of the ring

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        random = torch.Generator().manual_seed(11)
        batch, sample = self.shape[0], self.shape[1:]

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        model = self.model if self.model is not None and dtype != torch.float64 else dtype
        floats, integers = pack_row(**self.row, guidance=1.0 if self.guidance == "none" else 3.0)
        both = normal(2 * batch, *sample, dtype=model)
        t: dict[str, Any] = {
            "ring": normal(self.slots, *self.shape, dtype=dtype),
            "cond": both if self.guidance == "batched" else both[batch:].clone(),
            "uncond": both[:batch].clone() if self.guidance == "halves" else None,
            "floats": floats,
            "integers": integers,
            "seeds": torch.arange(batch) * 2**40 + 5 if any("noise" in terms for terms in self.row["outputs"].values()) else None,
            "rescale": "rescale" in self.row,
            "threshold": "quantile" in self.row,
        }
        for name, value in self.spoil.items():
            t[name].view(-1)[-1 if name == "cond" else 0] = value
        return t

    def in_place(self, dtype: torch.dtype) -> Arguments:
        t = self.tensors(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # The row stands between two that would do something else.
        floats, integers = t.pop("floats"), t.pop("integers")
        other = [0, 1, 0] + [0] * 9
        given = {
            **t,
            "coef": torch.tensor([[9.0] * 40, floats, [9.0] * 40], dtype=wide),
            "index": torch.tensor([other, integers, other]),
            "counter": torch.tensor([1]),
            "model_input": None,
            "watch": None,
        }
        if self.copies:
            given["model_input"] = torch.full((self.copies * self.shape[0], *self.shape[1:]), 9.0, dtype=dtype)
        if self.watch:
            given["watch"] = torch.full((self.shape[0],), 2**62)
        return given

    def functional(self, dtype: torch.dtype) -> Arguments:
        t = self.tensors(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ring, floats, integers = t.pop("ring"), t.pop("floats"), t.pop("integers")
        slots = [0, *integers[3 : 3 + integers[2]]]
        tables = {"coef": torch.tensor(floats, dtype=wide), "index": torch.tensor(integers), "outputs": integers[1]}
        return {**t, **tables, "inputs": [ring[k].clone() for k in slots]}


STEPS = [
    Step("ddim", DDIM),
    Step("euler_a, guided", EULER_A, guidance="halves", watch=True),
    Step("dpmpp_2m, both halves", DPMPP_2M, guidance="batched", copies=2),
    Step("three outputs, six history slots", WIDE, guidance="halves"),
    Step("no term at all", {"convert": (0.0, 0.0), "outputs": {0: {}}}),
    Step("clip", CLIPPED),
    Step("rescale", RESCALED, guidance="halves", copies=1),
    Step("threshold", THRESHOLDED),
    Step("everything, several chunks", EVERYTHING, (2, 3, 64, 33), guidance="batched", copies=2, watch=True),
    Step("bfloat16 model", WIDE, guidance="batched", model=torch.bfloat16),
    Step("float16 model, rescale", RESCALED, guidance="halves", model=torch.float16),
    Step("one number a sample", EULER_A, (5,)),
    Step("size 1", WIDE, (1, 1, 1, 1), guidance="halves", copies=2),
    Step("size 1, threshold", THRESHOLDED, (1, 1)),
    Step("empty batch", EVERYTHING, (0, 3, 4, 4), guidance="halves", copies=1, watch=True),
    Step("empty sample", EVERYTHING, (2, 0, 4), guidance="halves", watch=True),
    Step("video", EVERYTHING, (2, 3, 2, 3, 5), guidance="halves"),
    Step("not finite", DPMPP_2M, copies=1, watch=True, spoil={"cond": float("inf"), "ring": float("nan")}),
    Step("not finite, clip", CLIPPED, watch=True, spoil={"cond": float("nan")}),
    Step("not finite, everything", EVERYTHING, guidance="halves", watch=True, spoil={"cond": float("nan")}),
]
_BENCHMARKS = [
    Step(f"{name}, {'x'.join(map(str, shape))}", row, shape, guidance="halves")
    for shape in ((8, 3, 256, 256), (1, 4, 64, 64))
    for name, row in (("ddim", DDIM), ("dpmpp_2m", DPMPP_2M), ("euler_a", EULER_A), ("threshold", THRESHOLDED), ("rescale", RESCALED))
]


def _with(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **changes}


def _change(name: str, change: Callable[[Tensor], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, name: change(arguments[name])}


def _set(name: str, place: tuple[int, ...], value: float) -> Callable[[Arguments], Arguments]:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[place] = value
        return t

    return _change(name, change)


_BAD_OUTPUT = [
    BadInput(
        "cond of another shape", _change("cond", lambda t: t[:, :2]), "cond: got shape (2, 2, 5, 7), supported: (2, 3, 5, 7); or (4, 3,"
    ),
    BadInput("integer cond", _change("cond", torch.Tensor.int), "cond: got torch.int32, supported: torch.float32"),
    BadInput("a model wider than the state", _change("cond", torch.Tensor.double), "cond: got torch.float64 for a state of torch.float32"),
    BadInput("uncond of another dtype", lambda a: {**a, "uncond": a["cond"].half()}, "uncond: got torch.float16, supported: torch.float32"),
    BadInput(
        "uncond of another shape", lambda a: {**a, "uncond": a["cond"][:1]}, "uncond: got shape (1, 3, 5, 7), supported: (2, 3, 5, 7)"
    ),
    BadInput("cond elsewhere", _change("cond", lambda t: t.to("meta")), "cond: got a tensor on meta, supported: cpu, the state's device"),
    BadInput("coef in double", _change("coef", torch.Tensor.double), "coef: got torch.float64, supported: torch.float32"),
    BadInput("index in int32", _change("index", torch.Tensor.int), "index: got torch.int32, supported: torch.int64"),
    BadInput("too few seeds", _with(seeds=torch.arange(1)), "seeds: got torch.int64 (1,) on cpu, supported: torch.int64 (2,) on cpu"),
    BadInput("a negative seed", _with(seeds=torch.tensor([3, -1])), "seeds: got -1, supported: integers in [0, 2^63)"),
]
_OVERWRITTEN = "supported: a tensor without gradient, because it is overwritten"
_LOST = "solver_step_: got an input with a gradient, a tangent or inside a torch.func transform, supported: none of these; call genfast.ops"

SOLVER_STEP_ = OpSpec(
    name="solver_step_",
    cases=[Case(step.name, step.in_place) for step in STEPS],
    benchmarks=[Case(step.name, step.in_place) for step in _BENCHMARKS],
    bad=[
        *_BAD_OUTPUT,
        BadInput(
            "ring with gradient", _change("ring", lambda t: t.clone().requires_grad_()), f"ring: got requires_grad=True, {_OVERWRITTEN}"
        ),
        BadInput("cond with gradient", _change("cond", lambda t: t.clone().requires_grad_()), _LOST),
        BadInput("integer ring", _change("ring", torch.Tensor.int), "ring: got torch.int32, supported: torch.float32"),
        BadInput("too many slots", _change("ring", lambda t: t.repeat(3, 1, 1, 1, 1)), "ring: got 21 slots, supported: 1 to 16"),
        BadInput(
            "slots with holes",
            _change("ring", lambda t: t[..., ::2]),
            "ring: got slots with strides (105, 35, 7, 2), supported: contiguous",
        ),
        BadInput("one slot thrice", _change("ring", lambda t: t[:1].expand(3, -1, -1, -1, -1)), "ring: got a stride of 0 between slots"),
        BadInput(
            "a slot of another dtype",
            _change("ring", lambda t: [t[0], t[1].half()]),
            "ring[1]: got torch.float16, supported: torch.float32",
        ),
        BadInput(
            "a slot of another layout",
            _change("ring", lambda t: [t[0], t[1].contiguous(memory_format=torch.channels_last)]),
            "ring[1]: got strides (105, 1, 21, 3), supported: those of ring[0], (105, 35, 7, 1)",
        ),
        BadInput("coef too narrow", _change("coef", lambda t: t[:, :39].clone()), "coef: got shape (3, 39), supported: (3, 40)"),
        BadInput("coef not contiguous", _change("coef", lambda t: t.T.contiguous().T), "coef and index: got strides (1, 3) and (12, 1)"),
        BadInput("two counters", _with(counter=torch.zeros(2, dtype=torch.int64)), "counter: got shape (2,), supported: (1,)"),
        BadInput("a row too far", _with(counter=torch.tensor([3])), "counter: got 3, supported: 0 to 2", RuntimeError),
        BadInput("a negative row", _with(counter=torch.tensor([-1])), "counter: got -1, supported: 0 to 2", RuntimeError),
        BadInput("a slot too far", _set("index", (1, 9), 7), "index: got slot 7, supported: 0 to 6", RuntimeError),
        BadInput("noise without seeds", _set("coef", (1, 17), 0.1), "seeds: got None, supported: ", RuntimeError),
        BadInput(
            "a short input",
            _with(model_input=torch.zeros(1, 3, 5, 7)),
            "model_input: got shape (1, 3, 5, 7), supported: (2, 3, 5, 7) or (4,",
        ),
        BadInput(
            "an input of another layout",
            _with(model_input=torch.zeros(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)),
            "model_input: got strides (105, 1, 21, 3), supported: the state's memory format",
        ),
        BadInput("a float watch", _with(watch=torch.zeros(2)), "watch: got torch.float32, supported: torch.int64"),
    ],
    batched=["cond", "uncond", "seeds", "model_input", "watch"],
    mutates=["ring", "model_input", "watch"],
    stacked=["ring"],
)
SOLVER_STEP = OpSpec(
    name="solver_step",
    cases=[Case(step.name, step.functional) for step in STEPS],
    benchmarks=[Case(step.name, step.functional) for step in _BENCHMARKS],
    bad=[
        *_BAD_OUTPUT,
        BadInput("no inputs", _with(inputs=[]), "inputs: got 0 tensors, supported: 1 to 7: the state and its history terms"),
        BadInput(
            "a history term too many", lambda a: {**a, "inputs": a["inputs"] * 2}, "inputs: got 1 history terms, supported: 0, as many as"
        ),
        BadInput(
            "history of another dtype", lambda a: {**a, "inputs": [a["inputs"][0], a["inputs"][0].half()]}, "inputs[1]: got torch.float16"
        ),
        BadInput("four outputs", _with(outputs=4), "outputs: got 4, supported: 1 to 3"),
        BadInput(
            "two rows", _change("coef", lambda t: torch.stack([t, t])), "coef and index: got shapes (2, 40) and (12,), supported: one row"
        ),
        BadInput(
            "learnt coefficients",
            _change("coef", lambda t: t.clone().requires_grad_()),
            "coef: got requires_grad=True, supported: coefficients",
        ),
        BadInput("noise without seeds", _set("coef", (17,), 0.1), "seeds: got None, supported: ", RuntimeError),
    ],
    batched=["inputs", "cond", "uncond", "seeds"],
    differentiable=["inputs", "cond", "uncond"],
    twice=["ddim", "euler_a, guided", "dpmpp_2m, both halves", "three outputs, six history slots", "rescale"],
)
